// Forward attention of one tile in fp32: out = sum_j 2^(s_j - m) v_j over the tile's panels, with the online softmax.
#include "kernels/functions.h"
#include "kernels/gemm.h"
#include "kernels/logits.h"

namespace sieve {
namespace SIEVE_LEVEL {

constexpr int CHUNK = CHUNK_PANELS * PANEL;
constexpr int S_STRIDE = CHUNK + 16;  // rows do not fall on one set of the cache
constexpr float SLACK = 8.0f;         // a row is rescaled once its reference is this far (in powers of two) below its maximum

int64_t tile_scratch(int32_t d, int32_t dv, bool bf16) {
  (void)d;
  const int64_t wide = up(dv, 16);
  const int64_t logits = MAX_ROWS * S_STRIDE * 4;
  const int64_t values = bf16 ? CHUNK * wide * 2 : CHUNK * wide * 4;
  const int64_t weights = bf16 ? MAX_ROWS * CHUNK * 2 : 0;
  return logits + values + weights + MAX_ROWS * wide * 4 + 4096;
}

bool all_finite(const float* x, int64_t n) {
  vi bad = vi{};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    const vf y = load(x + i);
    bad |= (y - y) != vf{};
  }
  bool fine = true;
  for (int l = 0; l < LANES; ++l) fine &= bad[l] == 0;
  for (; i < n; ++i) fine &= x[i] - x[i] == 0.0f;
  return fine;
}

float finish_row(const Tile& t, int row, float sink, void* out, int64_t stride, DType dtype) {
  const float infinity = __builtin_inff();
  const int wide = (int)up(t.dv, 16);
  float* o = t.o + (int64_t)row * wide;
  const float unit = exponent_unit(t);
  const float m = t.m[row], l = t.l[row];
  const bool empty = m == -infinity && l == 0.0f;  // a row of NaN alone never finds a maximum, but its sum is NaN
  float lse = empty ? -infinity : m == -infinity ? l : m * unit * LN2 + log_one(l);
  float share = empty ? 0.0f : 1.0f / l;
  if (sink > -infinity || sink != sink) {
    if (empty) {
      lse = sink;
    } else {
      const float high = lse > sink ? lse : sink, low = lse > sink ? sink : lse;
      const float both = high + __builtin_log1pf(__builtin_expf(low - high));
      share *= __builtin_expf(lse - both);
      lse = both;
    }
  }
  if (empty) {
    for (int i = 0; i < wide; ++i) o[i] = 0.0f;
  } else {
    for (int i = 0; i < wide; i += LANES) store(o + i, load(o + i) * share);
  }
  write_row(o, t.dv, out, stride, dtype);
  return lse;
}

// What the online softmax remembers of the rows: their references, and one partial sum a lane.
struct Softmax {
  float base[MAX_ROWS];   // reference times unit
  float limit[MAX_ROWS];  // a logit above this raises the reference
  float sums[MAX_ROWS][LANES];
};

static inline bool any_above(vf x, float limit) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(limit), _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)(x > splat(limit))) != 0;
#else
  const vi over = x > splat(limit);
  int32_t some = 0;
  for (int i = 0; i < LANES; ++i) some |= over[i];
  return some != 0;
#endif
}

// The row's reference rises to its new maximum; what was summed so far shrinks.
static __attribute__((noinline)) void raise_reference(const Tile& t, Softmax& x, int r, vf most, float unit, int wide) {
  const float peak = top(most), before = t.m[r];
  t.m[r] = peak;
  x.base[r] = peak * unit;
  x.limit[r] = peak + SLACK / unit;
  if (before == -__builtin_inff()) return;
  const float shrink = exp2_one((before - peak) * unit);
  store(x.sums[r], load(x.sums[r]) * shrink);
  float* o = t.o + (int64_t)r * wide;
  for (int i = 0; i < wide; i += LANES) store(o + i, load(o + i) * shrink);
}

static inline vf largest(const float* s, int n) {
  vf most = load(s);
  for (int i = LANES; i < n; i += LANES) most = max_(load(s + i), most);
  return most;
}

// Row r over n logits: they become weights, and their sum is added.
static inline void soften(const Tile& t, Softmax& x, int r, float* s, int n, float unit, int wide) {
  const vf most = largest(s, n);
  if (any_above(most, x.limit[r])) raise_reference(t, x, r, most, unit, wide);
  const float base = x.base[r];
  vf total = load(x.sums[r]);
  for (int i = 0; i < n; i += LANES) {
    const vf p = exp2_<6>(load(s + i) * unit - base);
    store(s + i, p);
    total += p;
  }
  store(x.sums[r], total);
}

// A value that is not finite reaches exactly the rows that attend to its key; everyone else sees zero in its place.
static inline void mark_non_finite(const Tile& t, float* marks, const float* s, const float* v, float* clean, int column, int dv,
                                   int wide) {
  const float infinity = __builtin_inff();
  for (int c = 0; c < wide; ++c) {
    const float x = v[c];
    clean[c] = x;
    if (c < dv && x - x != 0.0f) {
      clean[c] = 0.0f;
      for (int r = 0; r < t.rows; ++r)
        if (s[(int64_t)r * S_STRIDE + column] > -infinity) marks[(int64_t)r * wide + c] += x;
    }
  }
}

// Weights below the smallest normal number count as zero: denormal numbers would cost a hundred times more.
struct FlushToZero {
#if defined(__x86_64__)
  unsigned before = _mm_getcsr();
  FlushToZero() { _mm_setcsr(before | 0x8000u); }
  ~FlushToZero() { _mm_setcsr(before); }
#endif
};

static inline void start(const Tile& t, Softmax& x, int wide) {
  memset(t.o, 0, sizeof(float) * up(t.rows, 16) * wide);
  memset(x.sums, 0, sizeof(x.sums));
  for (int r = 0; r < t.rows; ++r) {
    t.m[r] = x.limit[r] = -__builtin_inff();
    x.base[r] = 0.0f;
  }
}

static inline void finish(const Tile& t, const Softmax& x, const float* marks, int wide) {
  for (int r = 0; r < t.rows; ++r) t.l[r] = sum(load(x.sums[r]));
  if (t.sanitize)
    for (int64_t i = 0; i < (int64_t)t.rows * wide; ++i) t.o[i] += marks[i];
}

void attend(const Tile& t) {
  const int wide = (int)up(t.dv, 16);
  float* s = static_cast<float*>(t.scratch);
  float* copy = s + MAX_ROWS * S_STRIDE;
  float* marks = copy + (int64_t)CHUNK * wide;
  const float* keys = static_cast<const float*>(t.k);
  const float* values = static_cast<const float*>(t.v);
  const float* q = static_cast<const float*>(t.q);
  const float unit = exponent_unit(t);
  const bool shaped = transformed(t);
  const int step = wide > 64 ? 64 : CHUNK;  // long rows fall on few sets of the cache: take fewer at a time
  Softmax x;
  const FlushToZero flush;
  start(t, x, wide);
  if (t.sanitize) memset(marks, 0, sizeof(float) * t.rows * wide);
  for (int n = 0; n < t.panels; n += CHUNK_PANELS) {
    const int count = t.panels - n < CHUNK_PANELS ? t.panels - n : CHUNK_PANELS;
    const float* panel[CHUNK_PANELS];
    const float* row[CHUNK];
    int rows = 0;
    bool touched = shaped;
    for (int p = 0; p < count; ++p) {
      const int64_t number = t.panel[n + p], base = number * PANEL;
      panel[p] = keys + number * PANEL * t.d;
      touched |= t.masked[n + p] != 0;
      // a panel that ends behind the last key ends the list: its weights there are zero, its values are not read
      const int there = (int)(t.kv_len - base < PANEL ? t.kv_len - base : PANEL);
      for (int i = 0; i < there; ++i) row[rows++] = values + (base + i) * t.v_stride;
    }
    times_panels(q, t.d, t.rows, t.d, panel, count, s, S_STRIDE);
    if (touched)
      for (int r = 0; r < t.rows; ++r) shape_logits(t, n, count, r, s + r * S_STRIDE, nullptr);
    if (t.sanitize)
      for (int j = 0; j < rows; ++j) {
        mark_non_finite(t, marks, s, row[j], copy + (int64_t)j * wide, j, t.dv, wide);
        row[j] = copy + (int64_t)j * wide;
      }
    for (int r = 0; r < t.rows; ++r) soften(t, x, r, s + r * S_STRIDE, count * PANEL, unit, wide);
    for (int j = 0; j < rows; j += step) times_rows(s + j, S_STRIDE, 1, t.rows, rows - j < step ? rows - j : step, row + j, wide, t.o, wide);
  }
  finish(t, x, marks, wide);
}

#if defined(__AMX_BF16__)

bool attends_bf16() { return true; }

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

static inline void configure() {
  TileConfig c;
  for (int i = 0; i < 8; ++i) {
    c.bytes[i] = 64;
    c.rows[i] = 16;
  }
  _tile_loadconfig(&c);
}

// s [32 | 16 rows][32 | 16 keys] from packed queries and key panels; tiles 0-3 accumulate, 4-5 and 6-7 are operands
template <int Rows, int Cols>
static inline void dots(const uint16_t* q, int64_t wide, const uint16_t* k0, const uint16_t* k1, float* s) {
  _tile_zero(0);
  if constexpr (Cols > 1) _tile_zero(1);
  if constexpr (Rows > 1) _tile_zero(2);
  if constexpr (Rows > 1 && Cols > 1) _tile_zero(3);
  for (int64_t c = 0; c < wide; c += 32) {
    _tile_loadd(4, q + c, wide * 2);
    _tile_loadd(6, k0 + c * PANEL, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (Cols > 1) {
      _tile_loadd(7, k1 + c * PANEL, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (Rows > 1) {
      _tile_loadd(5, q + 16 * wide + c, wide * 2);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (Cols > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, s, S_STRIDE * 4);
  if constexpr (Cols > 1) _tile_stored(1, s + 16, S_STRIDE * 4);
  if constexpr (Rows > 1) _tile_stored(2, s + 16 * S_STRIDE, S_STRIDE * 4);
  if constexpr (Rows > 1 && Cols > 1) _tile_stored(3, s + 16 * S_STRIDE + 16, S_STRIDE * 4);
}

// o [32 | 16 rows][32 | 16 channels] += weights times value pairs; `v` has one pair of panels each
template <int Rows, int Cols>
static inline void weigh(const uint16_t* p, const uint16_t* const* v, int pairs, int column, float* o, int64_t wide) {
  _tile_loadd(0, o, wide * 4);
  if constexpr (Cols > 1) _tile_loadd(1, o + 16, wide * 4);
  if constexpr (Rows > 1) _tile_loadd(2, o + 16 * wide, wide * 4);
  if constexpr (Rows > 1 && Cols > 1) _tile_loadd(3, o + 16 * wide + 16, wide * 4);
  for (int j = 0; j < pairs; ++j) {
    _tile_loadd(4, p + j * 32, CHUNK * 2);
    _tile_loadd(6, v[j] + column * 32, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (Cols > 1) {
      _tile_loadd(7, v[j] + (column + 16) * 32, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (Rows > 1) {
      _tile_loadd(5, p + 16 * CHUNK + j * 32, CHUNK * 2);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (Cols > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, o, wide * 4);
  if constexpr (Cols > 1) _tile_stored(1, o + 16, wide * 4);
  if constexpr (Rows > 1) _tile_stored(2, o + 16 * wide, wide * 4);
  if constexpr (Rows > 1 && Cols > 1) _tile_stored(3, o + 16 * wide + 16, wide * 4);
}

// Brings what the next chunk reads into the cache while this one is softmaxed, a few lines a row.
struct Ahead {
  const char* from[2 * CHUNK_PANELS];
  int parts = 0, part = 0;
  int64_t at = 0, bytes[2 * CHUNK_PANELS];
  void add(const void* p, int64_t n) {
    from[parts] = static_cast<const char*>(p);
    bytes[parts++] = n;
  }
  void some(int lines) {
    for (; lines > 0 && part < parts; --lines) {
      __builtin_prefetch(from[part] + at, 0, 2);
      at += 64;
      if (at >= bytes[part]) {
        at = 0;
        ++part;
      }
    }
  }
};

template <int Rows>
static inline void group(const uint16_t* q, int64_t wide_d, const uint16_t* const* panel, int count, float* s) {
  int p = 0;
  for (; p + 2 <= count; p += 2) dots<Rows, 2>(q, wide_d, panel[p], panel[p + 1], s + p * PANEL);
  if (p < count) dots<Rows, 1>(q, wide_d, panel[p], nullptr, s + p * PANEL);
}

template <int Rows>
static inline void outputs(const uint16_t* p, const uint16_t* const* v, int pairs, float* o, int wide) {
  int c = 0;
  for (; c + 32 <= wide; c += 32) weigh<Rows, 2>(p, v, pairs, c, o + c, wide);
  if (c < wide) weigh<Rows, 1>(p, v, pairs, c, o + c, wide);
}

// The same with weights rounded to bf16 for the second product; the sum takes them unrounded.
static inline void soften_bf16(const Tile& t, Softmax& x, int r, const float* s, int n, float unit, int wide, uint16_t* p) {
  const vf most = largest(s, n);
  if (any_above(most, x.limit[r])) raise_reference(t, x, r, most, unit, wide);
  const float base = x.base[r];
  vf total = load(x.sums[r]);
  int i = 0;
  for (; i + 32 <= n; i += 32) {
    const vf a = exp2_<5>(load(s + i) * unit - base), b = exp2_<5>(load(s + i + 16) * unit - base);
    total += a + b;
    _mm512_storeu_si512(p + i, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
  }
  if (i < n) {
    const vf a = exp2_<5>(load(s + i) * unit - base);
    total += a;
    _mm512_storeu_si512(p + i, (__m512i)_mm512_cvtne2ps_pbh(_mm512_setzero_ps(), (__m512)a));
  }
  store(x.sums[r], total);
}

// Halves of two panels that do not lie side by side, as one pair; bad values hidden where asked.
static inline void gather_pair(const Tile& t, const uint16_t* values, int n, int count, int j, int wide, uint16_t* to) {
  for (int half = 0; half < 2; ++half) {
    uint16_t* out = to + half * 8 * 32;
    if (2 * j + half >= count) {
      for (int c = 0; c < wide; c += 16) memset(out + c * 32, 0, 512);
      continue;
    }
    const int64_t panel = t.panel[n + 2 * j + half];
    const uint16_t* from = values + (panel / 2) * 2 * PANEL * wide + (panel & 1) * 8 * 32;
    for (int c = 0; c < wide; c += 16)
      for (int i = 0; i < 8; ++i) _mm512_storeu_si512(out + c * 32 + i * 32, _mm512_loadu_si512(from + c * 32 + i * 32));
  }
}

static inline void clean_pair(const Tile& t, float* marks, const float* s, int j, int wide, uint16_t* pair) {
  const float infinity = __builtin_inff();
  for (int c = 0; c < wide; ++c)
    for (int key = 0; key < 2 * PANEL; ++key) {
      uint16_t& x = pair[(c / 16) * 512 + (key / 2) * 32 + (c % 16) * 2 + (key & 1)];
      if ((x & 0x7f80u) != 0x7f80u) continue;
      for (int r = 0; r < t.rows; ++r)
        if (s[(int64_t)r * S_STRIDE + j * 32 + key] > -infinity) marks[(int64_t)r * wide + c] += from_bf16(x);
      x = 0;
    }
}

void attend_bf16(const Tile& t) {
  const int wide = (int)up(t.dv, 16);
  const int64_t wide_d = up(t.d, 32);
  float* s = static_cast<float*>(t.scratch);
  uint16_t* copy = reinterpret_cast<uint16_t*>(s + MAX_ROWS * S_STRIDE);
  uint16_t* p = copy + (int64_t)CHUNK * wide;
  float* marks = reinterpret_cast<float*>(p + MAX_ROWS * CHUNK);
  const uint16_t* keys = static_cast<const uint16_t*>(t.k);
  const uint16_t* values = static_cast<const uint16_t*>(t.v);
  const uint16_t* q = static_cast<const uint16_t*>(t.q);
  const float unit = exponent_unit(t);
  const bool shaped = transformed(t);
  Softmax x;
  const FlushToZero flush;
  start(t, x, wide);
  if (t.sanitize) memset(marks, 0, sizeof(float) * t.rows * wide);
  const int rows16 = (int)up(t.rows, 16);
  if (rows16 > t.rows) memset(p + t.rows * CHUNK, 0, sizeof(uint16_t) * (rows16 - t.rows) * CHUNK);
  configure();
  for (int n = 0; n < t.panels; n += CHUNK_PANELS) {
    const int count = t.panels - n < CHUNK_PANELS ? t.panels - n : CHUNK_PANELS;
    const int pairs = (count + 1) / 2;
    const uint16_t* panel[CHUNK_PANELS];
    const uint16_t* pair[CHUNK_PANELS / 2];
    bool touched = shaped;
    for (int i = 0; i < count; ++i) {
      panel[i] = keys + t.panel[n + i] * PANEL * wide_d;
      touched |= t.masked[n + i] != 0;
    }
    for (int j = 0; j < pairs; ++j) {
      const int64_t first = t.panel[n + 2 * j];
      const bool together = 2 * j + 1 < count && first % 2 == 0 && t.panel[n + 2 * j + 1] == first + 1;
      pair[j] = values + (first / 2) * 2 * PANEL * wide;
      if (together && !t.sanitize) continue;
      gather_pair(t, values, n, count, j, wide, copy + (int64_t)j * 2 * PANEL * wide);
      pair[j] = copy + (int64_t)j * 2 * PANEL * wide;
    }
    Ahead ahead;
    const int next = n + 2 * CHUNK_PANELS < t.panels ? n + 2 * CHUNK_PANELS : t.panels;
    // what lies side by side the hardware fetches by itself
    if (next > n + count && t.panel[next - 1] - t.panel[n + count - 1] != next - n - count)
      for (int i = n + count; i < next; ++i) {
        const int64_t number = t.panel[i];
        ahead.add(keys + number * PANEL * wide_d, PANEL * wide_d * 2);
        if (number % 2 == 0 || t.panel[i - 1] != number - 1 || i == n + count)
          ahead.add(values + number / 2 * 2 * PANEL * wide, 2 * PANEL * wide * 2);
      }
    const int lines = (int)((CHUNK_PANELS * PANEL * 2 * (wide_d + wide) / 64 + t.rows - 1) / t.rows);
    for (int r = 0; r < rows16; r += 32) {
      const bool two = r + 16 < rows16;
      float* at_s = s + r * S_STRIDE;
      if (two)
        group<2>(q + r * wide_d, wide_d, panel, count, at_s);
      else
        group<1>(q + r * wide_d, wide_d, panel, count, at_s);
      const int last = r + 32 < t.rows ? r + 32 : t.rows;
      if (touched)
        for (int i = r; i < last; ++i) shape_logits(t, n, count, i, s + i * S_STRIDE, nullptr);
      if (t.sanitize) continue;
      for (int i = r; i < last; ++i) {
        ahead.some(lines);
        soften_bf16(t, x, i, s + i * S_STRIDE, count * PANEL, unit, wide, p + i * CHUNK);
      }
      if (two)
        outputs<2>(p + r * CHUNK, pair, pairs, t.o + (int64_t)r * wide, wide);
      else
        outputs<1>(p + r * CHUNK, pair, pairs, t.o + (int64_t)r * wide, wide);
    }
    if (!t.sanitize) continue;
    if (count % 2)  // the absent half of the last pair is attended to by nobody
      for (int i = 0; i < t.rows; ++i)
        for (int c = 0; c < PANEL; ++c) s[i * S_STRIDE + count * PANEL + c] = -__builtin_inff();
    for (int j = 0; j < pairs; ++j) clean_pair(t, marks, s, j, wide, const_cast<uint16_t*>(pair[j]));
    for (int r = 0; r < rows16; r += 32) {
      const int last = r + 32 < t.rows ? r + 32 : t.rows;
      for (int i = r; i < last; ++i) soften_bf16(t, x, i, s + i * S_STRIDE, count * PANEL, unit, wide, p + i * CHUNK);
      if (r + 16 < rows16)
        outputs<2>(p + r * CHUNK, pair, pairs, t.o + (int64_t)r * wide, wide);
      else
        outputs<1>(p + r * CHUNK, pair, pairs, t.o + (int64_t)r * wide, wide);
    }
  }
  _tile_release();
  finish(t, x, marks, wide);
}

#else

bool attends_bf16() { return false; }
void attend_bf16(const Tile&) {}

#endif

}  // namespace SIEVE_LEVEL
}  // namespace sieve
