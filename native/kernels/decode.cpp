// Attention of a few query rows over keys and values that are read once, where they lie, and never packed.
#include "kernels/amx.h"
#include "kernels/functions.h"
#include "kernels/gemm.h"
#include "kernels/lines.h"
#include "kernels/transpose.h"

namespace sieve {
namespace SIEVE_LEVEL {

int64_t lines_scratch(int32_t d, int32_t dv) {
  const int64_t wide = up(dv, 32), lines = (up(d, 32) + wide) * PANEL * 4;  // a panel of keys and one of values
  const int64_t keys = CHUNK * up(d, 16) * 4, values = CHUNK * wide * 4, weights = MAX_ROWS * CHUNK * 2;
  return MAX_ROWS * S_STRIDE * 4 + lines * CHUNK_PANELS + keys + values + weights + 2 * MAX_ROWS * wide * 4 + 8192;
}

constexpr int STEP_PANELS = 4;  // panels of a bf16 step: its keys and the next values fit into the first cache together
// The same where they are read as they lie. What is asked for shortly before it is needed comes faster: with AVX2 on Zen 3 a panel
// ahead took 36 ns a key, two 37, four 39; with 16 lanes on Zen 4 all three took the same.
constexpr int DIRECT_PANELS = LANES == 8 ? 1 : 4;

struct Scratch {
  char* next;
  template <class T>
  T* take(int64_t count) {
    T* here = reinterpret_cast<T*>(next);
    next += up(count * (int64_t)sizeof(T), 64);
    return here;
  }
};

struct Panel16 {
  const char* data;
  int64_t stride;  // bytes
};

static inline const char* line(const Lines& x, int64_t key) {
  if (!x.table) return x.data + key * x.stride;
  return x.data + x.table[key / x.page_size] * x.page_stride + key % x.page_size * x.stride;
}

// The first `there` keys of a panel as rows at one stride; a panel over several pages is copied to `copy`, and so is one that
// must have all 16 rows (`whole`) and does not: what is missing is zero.
static inline Panel16 panel_of(const Lines& x, int64_t panel, int there, bool whole, char* copy) {
  const int64_t base = panel * PANEL;
  const bool one_piece = !x.table || base / x.page_size == (base + there - 1) / x.page_size;
  if (one_piece && (there == PANEL || !whole)) return {line(x, base), x.stride};
  const int64_t bytes = x.width * dtype_bytes(x.dtype);
  for (int i = 0; i < there; ++i) memcpy(copy + i * bytes, line(x, base + i), bytes);
  memset(copy + there * bytes, 0, (PANEL - there) * bytes);
  return {copy, bytes};
}

// Asks for the lines of a panel that is read soon: blocks that were chosen lie anywhere, so hardware does not foresee them.
static inline void fetch(const Lines& x, int64_t panel, int there) {
  const char* at = line(x, panel * PANEL);
  const int64_t bytes = x.width * dtype_bytes(x.dtype);
  for (int i = 0; i < there; ++i) ask(at + i * x.stride, bytes);
}

static inline int keys_there(const Tile& t, int64_t panel) {
  const int64_t left = t.kv_len - panel * PANEL;
  return left < PANEL ? (int)left : PANEL;
}

// The panels of the next chunk, where they do not simply follow.
static inline void fetch_next(const Tile& t, const Lines& x, int n) {
  const int place = n + CHUNK_PANELS;
  if (place >= t.panels) return;
  const int64_t panel = t.panel[place], there = keys_there(t, panel);
  if (x.table && (panel * PANEL) / x.page_size != (panel * PANEL + there - 1) / x.page_size) return;
  fetch(x, panel, (int)there);
}

// The rows of DIRECT_PANELS panels from the n-th; returns how many there are.
static inline int rows_of(const Tile& t, const Lines& x, int n, const char** row) {
  int rows = 0;
  for (int p = n; p < t.panels && p < n + DIRECT_PANELS; ++p) {
    const int64_t base = (int64_t)t.panel[p] * PANEL;
    const int there = keys_there(t, t.panel[p]);
    if (!x.table)
      for (int i = 0; i < there; ++i) row[rows++] = x.data + (base + i) * x.stride;
    else
      for (int i = 0; i < there; ++i) row[rows++] = line(x, base + i);
  }
  return rows;
}

// Asks for a line of the n-th panel, so that its page has an address once the others are asked for.
static inline void touch(const Tile& t, const Lines& x, int n) {
  if (n < t.panels) __builtin_prefetch(line(x, (int64_t)t.panel[n] * PANEL), 0, 2);
}

// A few rows go over keys and values as they lie. Keys ask for the values of the same step, values for the keys of the next one.
template <DType T>
static void attend_direct(const LineTile& job) {
  const Tile& t = job.tile;
  const FlushToZero flush;
  const int wide = (int)up(t.dv, 16);
  const int64_t k_bytes = t.d * dtype_bytes(T), v_bytes = t.dv * dtype_bytes(T);
  Scratch scratch{static_cast<char*>(t.scratch)};
  float* s = scratch.take<float>(MAX_ROWS * S_STRIDE);
  char* copy = scratch.take<char>(PANEL * up(t.d > wide ? t.d : wide, 16) * 4);
  const float* q = static_cast<const float*>(t.q);
  const char* none = static_cast<const char*>(t.q);
  if constexpr (T == BF16) {
    float* apart = scratch.take<float>((int64_t)DIRECT_ROWS * t.d);
    for (int r = 0; r < t.rows; ++r) part_channels(q + (int64_t)r * t.d, t.d, apart + (int64_t)r * t.d);
    q = apart;
  }
  const float unit = exponent_unit(t);
  const bool shaped = transformed(t);
  float* values = t.sanitize ? scratch.take<float>((int64_t)CHUNK * wide) : nullptr;
  float* marks = t.sanitize ? scratch.take<float>((int64_t)MAX_ROWS * wide) : nullptr;
  if (t.sanitize) memset(marks, 0, sizeof(float) * t.rows * wide);
  Softmax sums;
  start(t, sums, wide);
  for (int n = 0; n < t.panels; n += DIRECT_PANELS) {
    const int count = t.panels - n < DIRECT_PANELS ? t.panels - n : DIRECT_PANELS;
    const char *row[DIRECT_PANELS * PANEL], *next[DIRECT_PANELS * PANEL];
    const int rows = rows_of(t, job.v, n, row);
    for (int i = rows; i < count * PANEL; ++i) row[i] = none;
    bool touched = shaped;
    for (int p = 0; p < count; ++p) {
      const int64_t number = t.panel[n + p];
      const int there = keys_there(t, number);
      touched |= t.masked[n + p] != 0;
      touch(t, job.v, n + p + DIRECT_PANELS);
      touch(t, job.k, n + p + 2 * DIRECT_PANELS);
      const Panel16 k = panel_of(job.k, number, there, false, copy);
      dot_panel<T>(q, t.rows, t.d, k.data, k.stride, there, s + p * PANEL, row + p * PANEL, v_bytes);
    }
    if (touched)
      for (int r = 0; r < t.rows; ++r) shape_logits(t, n, count, r, s + r * S_STRIDE, nullptr);
    if (t.sanitize)
      for (int j = 0; j < rows; ++j) {
        float* to = values + (int64_t)j * wide;
        read_row(row[j], 1, T, t.dv, wide, to);
        mark_non_finite(t, marks, s, to, to, j, t.dv, wide);
        row[j] = reinterpret_cast<const char*>(to);
      }
    for (int r = 0; r < t.rows; ++r) soften(t, sums, r, s + r * S_STRIDE, count * PANEL, unit, wide);
    const Ahead ahead{next, next + rows_of(t, job.k, n + DIRECT_PANELS, next), k_bytes, 1};
    if (t.sanitize)
      add_values<F32>(s, t.rows, rows, row, t.dv, t.o, wide, ahead);
    else
      add_values<T>(s, t.rows, rows, row, t.dv, t.o, wide, ahead);
  }
  if (T == BF16 && !t.sanitize)
    for (int r = 0; r < t.rows; ++r) {
      memcpy(s, t.o + (int64_t)r * wide, t.dv * sizeof(float));
      join_channels(s, t.dv, t.o + (int64_t)r * wide);
    }
  finish(t, sums, marks, wide);
}

static inline bool direct(const LineTile& job) {
  const Tile& t = job.tile;
  return t.rows <= DIRECT_ROWS && t.d % LANES == 0 && t.dv % PANEL == 0 && job.k.dtype == job.v.dtype;
}

void attend_lines(const LineTile& job) {
  const Tile& t = job.tile;
  if (direct(job)) {
    switch (job.k.dtype) {
      case F32: return attend_direct<F32>(job);
      case F16: return attend_direct<F16>(job);
      default: return attend_direct<BF16>(job);
    }
  }
  const FlushToZero flush;
  const int wide = (int)up(t.dv, 16);
  Scratch scratch{static_cast<char*>(t.scratch)};
  float* s = scratch.take<float>(MAX_ROWS * S_STRIDE);
  float* keys = scratch.take<float>((int64_t)CHUNK * t.d);
  float* values = scratch.take<float>((int64_t)CHUNK * wide);
  float* marks = scratch.take<float>((int64_t)MAX_ROWS * wide);
  char* copy = scratch.take<char>(PANEL * up(t.d > wide ? t.d : wide, 16) * 4);
  const float* q = static_cast<const float*>(t.q);
  const float unit = exponent_unit(t);
  const bool shaped = transformed(t), in_place = job.v.dtype == F32 && t.dv % PANEL == 0;
  Softmax sums;
  start(t, sums, wide);
  if (t.sanitize) memset(marks, 0, sizeof(float) * t.rows * wide);
  for (int n = 0; n < t.panels; n += CHUNK_PANELS) {
    const int count = t.panels - n < CHUNK_PANELS ? t.panels - n : CHUNK_PANELS;
    const float* panel[CHUNK_PANELS];
    const float* row[CHUNK];
    int rows = 0;
    bool touched = shaped;
    for (int p = 0; p < count; ++p) {
      const int64_t number = t.panel[n + p];
      const int there = keys_there(t, number);
      touched |= t.masked[n + p] != 0;
      fetch_next(t, job.k, n + p);
      const Panel16 k = panel_of(job.k, number, there, false, copy);
      float* to = keys + (int64_t)p * PANEL * t.d;
      const int64_t stride = k.stride / dtype_bytes(job.k.dtype);
      const View lines{const_cast<char*>(k.data), job.k.dtype, {1, 1, there, t.d}, {0, 0, stride, 1}};
      pack_keys(lines, 0, 0, 0, 1, to);
      panel[p] = to;
    }
    times_panels(q, t.d, t.rows, t.d, panel, count, s, S_STRIDE);
    if (touched)
      for (int r = 0; r < t.rows; ++r) shape_logits(t, n, count, r, s + r * S_STRIDE, nullptr);
    for (int p = 0; p < count; ++p) {
      const int64_t number = t.panel[n + p];
      const int there = keys_there(t, number);
      fetch_next(t, job.v, n + p);
      for (int i = 0; i < there; ++i, ++rows) {
        const char* from = line(job.v, number * PANEL + i);
        row[rows] = values + (int64_t)rows * wide;
        if (in_place)
          row[rows] = reinterpret_cast<const float*>(from);
        else
          read_row(from, 1, job.v.dtype, t.dv, wide, values + (int64_t)rows * wide);
      }
    }
    if (t.sanitize)
      for (int j = 0; j < rows; ++j) {
        float* to = values + (int64_t)j * wide;
        mark_non_finite(t, marks, s, row[j], to, j, t.dv, wide);
        row[j] = to;
      }
    for (int r = 0; r < t.rows; ++r) soften(t, sums, r, s + r * S_STRIDE, count * PANEL, unit, wide);
    times_rows(s, S_STRIDE, 1, t.rows, rows, row, wide, t.o, wide);
  }
  finish(t, sums, marks, wide);
}

void merge(const Tile& t, int parts, float* o, float* m, float* l) {
  const float infinity = __builtin_inff();
  const int wide = (int)up(t.dv, 16);
  const float unit = exponent_unit(t);
  const int64_t step = up(t.rows, 16) * wide;
  for (int r = 0; r < t.rows; ++r) {
    float most = -infinity;
    for (int p = 0; p < parts; ++p) most = m[p * MAX_ROWS + r] > most ? m[p * MAX_ROWS + r] : most;
    float total = 0.0f;
    float* sum = o + (int64_t)r * wide;
    for (int p = 0; p < parts; ++p) {
      const float own = m[p * MAX_ROWS + r], weight = l[p * MAX_ROWS + r];
      const float* from = o + p * step + (int64_t)r * wide;
      // a part without a key holds nothing; one of NaN alone has a sum but no maximum
      const bool nothing = own == -infinity && weight == 0.0f;
      const float factor = nothing ? 0.0f : own == most ? 1.0f : own == -infinity ? 1.0f : exp2_one((own - most) * unit);
      if (p == 0) {
        for (int c = 0; c < wide; c += LANES) store(sum + c, nothing ? vf{} : load(from + c) * factor);
      } else if (!nothing) {
        for (int c = 0; c < wide; c += LANES) store(sum + c, load(sum + c) + load(from + c) * factor);
      }
      total += nothing ? 0.0f : weight * factor;
    }
    m[r] = most;
    l[r] = total;
  }
}

#if defined(__AMX_BF16__)

bool bf16_lines() { return true; }

void pack_rows_bf16(const View& q, int64_t b, const int64_t* head, const int64_t* query, int rows, uint16_t* out) {
  const int d = (int)q.shape[3];
  for (int first = 0; first < rows; first += 16)
    for (int c = 0; c < d; c += 32, out += 512)
      for (int pair = 0; pair < 16; ++pair)
        for (int i = 0; i < 16; ++i)
          for (int e = 0; e < 2; ++e) {
            const int r = first + i, channel = c + 2 * pair + e;
            out[pair * 32 + i * 2 + e] =
                r < rows ? *reinterpret_cast<const uint16_t*>(at(q, b, head[r], query[r], channel)) : (uint16_t)0;
          }
}

// Tiles: 0, 1 the output of at most 16 rows; 2, 3 logits of 16 keys each; 4 weights; 5 queries; 6, 7 keys or values.
static inline void configure_lines(int rows) {
  TileConfig c;
  for (int i = 0; i < 8; ++i) {
    c.bytes[i] = 64;
    c.rows[i] = (uint8_t)(i == 0 || i == 1 || i == 4 ? rows : 16);
  }
  _tile_loadconfig(&c);
}

// `turned` [16 keys][16 rows] to s [rows][keys]
static inline void turn(const float* turned, int rows, float* s) {
  if (rows <= 4) {
    __m512 x[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {  // lane l holds the four rows of key 4 l + i
      x[i] = _mm512_castps128_ps512(_mm_load_ps(turned + 16 * i));
      x[i] = _mm512_insertf32x4(x[i], _mm_load_ps(turned + 16 * (4 + i)), 1);
      x[i] = _mm512_insertf32x4(x[i], _mm_load_ps(turned + 16 * (8 + i)), 2);
      x[i] = _mm512_insertf32x4(x[i], _mm_load_ps(turned + 16 * (12 + i)), 3);
    }
    const __m512 a = _mm512_unpacklo_ps(x[0], x[1]), b = _mm512_unpackhi_ps(x[0], x[1]);
    const __m512 c = _mm512_unpacklo_ps(x[2], x[3]), d = _mm512_unpackhi_ps(x[2], x[3]);
    _mm512_storeu_ps(s, _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(c))));
    _mm512_storeu_ps(s + S_STRIDE, _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(c))));
    _mm512_storeu_ps(s + 2 * S_STRIDE, _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(b), _mm512_castps_pd(d))));
    _mm512_storeu_ps(s + 3 * S_STRIDE, _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(b), _mm512_castps_pd(d))));
    return;
  }
  __m512 x[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) x[i] = _mm512_loadu_ps(turned + 16 * i);
  transpose16(x);
  for (int i = 0; i < rows; ++i) _mm512_storeu_ps(s + i * S_STRIDE, x[i]);
}

// Asks for bytes c..c+63 of the rows of a panel that is read soon. Asking for them all at once would hold up what is computed.
static inline void fetch(const Panel16& x, int64_t c) {
#pragma GCC unroll 16
  for (int i = 0; i < PANEL; ++i) __builtin_prefetch(x.data + i * x.stride + c);
}

// Logits of 16 or 32 keys and at most 16 rows: keys where they lie are the first operand, so what comes out is turned around.
template <int Panels>
static inline void dots_in_place(const Panel16* k, const Panel16* next, const uint16_t* q, int64_t d, int rows, float* turned,
                                 float* s) {
  _tile_zero(2);
  if constexpr (Panels > 1) _tile_zero(3);
  for (int64_t c = 0; c < d; c += 32) {
    _tile_loadd(5, q + c * 16, 64);
    _tile_loadd(6, k[0].data + c * 2, k[0].stride);
    _tile_dpbf16ps(2, 6, 5);
    if (next) fetch(next[0], c * 2);
    if constexpr (Panels > 1) {
      _tile_loadd(7, k[1].data + c * 2, k[1].stride);
      _tile_dpbf16ps(3, 7, 5);
      if (next) fetch(next[1], c * 2);
    }
  }
  _tile_stored(2, turned, 64);
  if constexpr (Panels > 1) _tile_stored(3, turned + 256, 64);
  turn(turned, rows, s);
  if constexpr (Panels > 1) turn(turned + 256, rows, s + PANEL);
}

// o [at most 16 rows][wide] += weights times value pairs; `wide` is a multiple of 32
static inline void weigh_lines(const uint16_t* p, const uint16_t* const* v, int pairs, float* o, int64_t wide) {
  for (int64_t c = 0; c < wide; c += 32) {
    _tile_loadd(0, o + c, wide * 4);
    _tile_loadd(1, o + c + 16, wide * 4);
    for (int j = 0; j < pairs; ++j) {
      _tile_loadd(4, p + j * 32, CHUNK * 2);
      _tile_loadd(6, v[j] + c * 32, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, v[j] + (c + 16) * 32, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, o + c, wide * 4);
    _tile_stored(1, o + c + 16, wide * 4);
  }
}

// The keys of a panel in pairs side by side, 32 channels to two columns of tiles; `channel_of` says where each channel went.
static inline void interleave(const Panel16& v, const Panel16& next, int dv, uint16_t* to) {
  for (int c = 0; c < dv; c += 32, to += 2 * 512) {
    const __mmask32 here = dv - c >= 32 ? ~0u : (1u << (dv - c)) - 1u;
    const char *a = v.data + 2 * c, *ahead = next.data + 2 * c;
#pragma GCC unroll 8
    for (int i = 0; i < PANEL / 2; ++i, a += 2 * v.stride, ahead += 2 * next.stride) {
      const __m512i x = _mm512_maskz_loadu_epi16(here, a), y = _mm512_maskz_loadu_epi16(here, a + v.stride);
      _mm512_storeu_si512(to + i * 32, _mm512_unpacklo_epi16(x, y));
      _mm512_storeu_si512(to + i * 32 + 512, _mm512_unpackhi_epi16(x, y));
      __builtin_prefetch(ahead);
      __builtin_prefetch(ahead + next.stride);
    }
  }
}

static inline int channel_of(int column) {
  const int half = column / 16 % 2, lane = column % 16;
  return column / 32 * 32 + lane / 4 * 8 + half * 4 + lane % 4;
}

void attend_lines_bf16(const LineTile& job) {
  Tile t = job.tile;  // its output has its own width and order here
  const int wide = (int)up(t.dv, 32);
  Scratch scratch{static_cast<char*>(t.scratch)};
  float* s = scratch.take<float>(MAX_ROWS * S_STRIDE);
  uint16_t* pairs_of = scratch.take<uint16_t>((int64_t)CHUNK * wide);
  uint16_t* p = scratch.take<uint16_t>(MAX_ROWS * CHUNK);
  float* o = scratch.take<float>((int64_t)MAX_ROWS * wide);
  float* marks = scratch.take<float>((int64_t)MAX_ROWS * wide);
  float* turned = scratch.take<float>(512);
  char* copy = scratch.take<char>((int64_t)2 * STEP_PANELS * PANEL * (t.d > t.dv ? t.d : t.dv) * 2);
  Panel16 keys[STEP_PANELS], values[STEP_PANELS];
  const uint16_t* q = static_cast<const uint16_t*>(t.q);
  const float unit = exponent_unit(t);
  const bool shaped = transformed(t);
  const int rows16 = (int)up(t.rows, 16);
  float* result = t.o;
  t.o = o;
  Softmax sums;
  start(t, sums, wide);
  if (t.sanitize) memset(marks, 0, sizeof(float) * t.rows * wide);
  memset(p + t.rows * CHUNK, 0, sizeof(uint16_t) * (rows16 - t.rows) * CHUNK);
  configure_lines(t.rows < 16 ? t.rows : 16);
  const int64_t k_bytes = PANEL * t.d * 2, v_bytes = PANEL * t.dv * 2;
  const auto look_up = [&](const Lines& x, int n, Panel16* out, char* to, int64_t bytes) {
    const int count = t.panels - n < STEP_PANELS ? t.panels - n : STEP_PANELS;
    for (int i = 0; i < count; ++i) out[i] = panel_of(x, t.panel[n + i], keys_there(t, t.panel[n + i]), true, to + i * bytes);
    for (int i = count; i < STEP_PANELS; ++i) out[i] = {reinterpret_cast<const char*>(q), 0};
  };
  look_up(job.k, 0, keys, copy, k_bytes);
  for (int n = 0; n < t.panels; n += STEP_PANELS) {
    const int count = t.panels - n < STEP_PANELS ? t.panels - n : STEP_PANELS;
    const int pairs = (count + 1) / 2;
    const uint16_t* pair[STEP_PANELS / 2];
    bool touched = shaped;
    look_up(job.v, n, values, copy + STEP_PANELS * k_bytes, v_bytes);
    for (int i = 0; i < count; i += 2) {
      const bool two = i + 1 < count;
      touched |= t.masked[n + i] != 0 || (two && t.masked[n + i + 1] != 0);
      for (int r = 0; r < t.rows; r += 16) {
        const int some = t.rows - r < 16 ? t.rows - r : 16;
        float* to = s + r * S_STRIDE + i * PANEL;
        const Panel16* ahead = r == 0 ? values + i : nullptr;
        if (two)
          dots_in_place<2>(keys + i, ahead, q + r * t.d, t.d, some, turned, to);
        else
          dots_in_place<1>(keys + i, ahead, q + r * t.d, t.d, some, turned, to);
      }
    }
    look_up(job.k, n + STEP_PANELS, keys, copy, k_bytes);
    if (count % 2)  // the absent half of the last pair is attended to by nobody
      for (int r = 0; r < t.rows; ++r) _mm512_storeu_ps(s + r * S_STRIDE + count * PANEL, _mm512_set1_ps(-__builtin_inff()));
    if (touched)
      for (int r = 0; r < t.rows; ++r) shape_logits(t, n, count, r, s + r * S_STRIDE, nullptr);
    for (int i = 0; i < 2 * pairs; ++i) {
      uint16_t* to = pairs_of + (int64_t)(i / 2) * 32 * wide + i % 2 * 8 * 32;
      if (i % 2 == 0) pair[i / 2] = to;
      if (i < count) {
        interleave(values[i], keys[i], t.dv, to);
      } else {
        for (int c = 0; c < wide; c += 16) memset(to + c * 32, 0, 512);
      }
    }
    if (t.sanitize)
      for (int j = 0; j < pairs; ++j) clean_pair(marks, s, t.rows, j, wide, const_cast<uint16_t*>(pair[j]));
    for (int r = 0; r < t.rows; ++r) soften_bf16(t, sums, r, s + r * S_STRIDE, count * PANEL, unit, wide, p + r * CHUNK);
    for (int r = 0; r < t.rows; r += 16) weigh_lines(p + r * CHUNK, pair, pairs, o + (int64_t)r * wide, wide);
  }
  _tile_release();
  finish(t, sums, marks, wide);
  const int narrow = (int)up(t.dv, 16);
  for (int r = 0; r < t.rows; ++r)
    for (int c = 0; c < wide; ++c)
      if (channel_of(c) < narrow) result[(int64_t)r * narrow + channel_of(c)] = o[(int64_t)r * wide + c];
}

#else

bool bf16_lines() { return false; }
void pack_rows_bf16(const View&, int64_t, const int64_t*, const int64_t*, int, uint16_t*) {}
void attend_lines_bf16(const LineTile&) {}

#endif

}  // namespace SIEVE_LEVEL
}  // namespace sieve
