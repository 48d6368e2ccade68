// Forward attention of one tile of bf16 inputs on tile registers (AMX): fp32 sums, weights rounded to bf16.
#include "kernels/functions.h"
#include "kernels/softmax.h"

namespace sieve {
namespace SIEVE_LEVEL {

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

// Two sets of accumulators (tiles 0-1 and 2-3, one tile per 16 rows) take turns: a finished set is stored between the
// products of the next one, which hides the stores. Tiles 4 to 6 are operands. The compiler wants tile numbers as literals.
#define SIEVE_PRODUCTS(A, B, C, D, STORE, left, right)                              \
  {                                                                                 \
    _tile_loadd(4, right, 64);                                                      \
    _tile_loadd(5, left, left_stride);                                              \
    _tile_dpbf16ps(A, 5, 4);                                                        \
    if (STORE) _tile_stored(C, last, out_stride);                                   \
    if constexpr (Rows > 1) {                                                       \
      _tile_loadd(6, left + 16 * (left_stride / 2), left_stride);                   \
      _tile_dpbf16ps(B, 6, 4);                                                      \
      if (STORE) _tile_stored(D, last + 16 * (out_stride / 4), out_stride);         \
    }                                                                               \
  }

// s [32 | 16 rows][count * 16 keys] from queries and packed key panels
template <int Rows>
static inline void dots(const uint16_t* q, int64_t stride, int64_t wide, const uint16_t* const* panel, int count, float* s) {
  const int64_t left_stride = stride * 2, out_stride = S_STRIDE * 4;
  float* last = s;
#define SIEVE_PANEL(A, B, C, D)                                                     \
  {                                                                                 \
    _tile_zero(A);                                                                  \
    if constexpr (Rows > 1) _tile_zero(B);                                          \
    SIEVE_PRODUCTS(A, B, C, D, i > 0, q, panel[i])                                  \
    for (int64_t c = 32; c < wide; c += 32) SIEVE_PRODUCTS(A, B, C, D, false, (q + c), (panel[i] + c * PANEL)) \
    last = s + i * PANEL;                                                           \
  }
  int i = 0;
  for (; i + 1 < count; ++i) {
    SIEVE_PANEL(0, 1, 2, 3)
    ++i;
    SIEVE_PANEL(2, 3, 0, 1)
  }
  if (i < count) {
    SIEVE_PANEL(0, 1, 2, 3)
    _tile_stored(0, last, out_stride);
    if constexpr (Rows > 1) _tile_stored(1, last + 16 * S_STRIDE, out_stride);
  } else {
    _tile_stored(2, last, out_stride);
    if constexpr (Rows > 1) _tile_stored(3, last + 16 * S_STRIDE, out_stride);
  }
#undef SIEVE_PANEL
}

// o [32 | 16 rows][columns from `column` to `end`] += weights times value pairs; `v` has one pair of panels each
template <int Rows>
static inline void weigh(const uint16_t* p, const uint16_t* const* v, int pairs, int column, int end, float* o, int64_t wide) {
  const int64_t left_stride = CHUNK * 2, out_stride = wide * 4;
  float* last = o;
#define SIEVE_COLUMN(A, B, C, D)                                                    \
  {                                                                                 \
    _tile_loadd(A, o + i, out_stride);                                              \
    if constexpr (Rows > 1) _tile_loadd(B, o + i + 16 * wide, out_stride);          \
    SIEVE_PRODUCTS(A, B, C, D, i > column, p, (v[0] + i * 32))                      \
    for (int j = 1; j < pairs; ++j) SIEVE_PRODUCTS(A, B, C, D, false, (p + j * 32), (v[j] + i * 32)) \
    last = o + i;                                                                   \
  }
  int i = column;
  for (; i + 16 < end; i += 16) {
    SIEVE_COLUMN(0, 1, 2, 3)
    i += 16;
    SIEVE_COLUMN(2, 3, 0, 1)
  }
  if (i < end) {
    SIEVE_COLUMN(0, 1, 2, 3)
    _tile_stored(0, last, out_stride);
    if constexpr (Rows > 1) _tile_stored(1, last + 16 * wide, out_stride);
  } else {
    _tile_stored(2, last, out_stride);
    if constexpr (Rows > 1) _tile_stored(3, last + 16 * wide, out_stride);
  }
#undef SIEVE_COLUMN
}
#undef SIEVE_PRODUCTS

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

static inline void clean_pair(float* marks, const float* s, int rows, int j, int wide, uint16_t* pair) {
  const float infinity = __builtin_inff();
  for (int c = 0; c < wide; ++c)
    for (int key = 0; key < 2 * PANEL; ++key) {
      uint16_t& x = pair[(c / 16) * 512 + (key / 2) * 32 + (c % 16) * 2 + (key & 1)];
      if ((x & 0x7f80u) != 0x7f80u) continue;
      for (int r = 0; r < rows; ++r)
        if (s[(int64_t)r * S_STRIDE + j * 32 + key] > -infinity) marks[(int64_t)r * wide + c] += from_bf16(x);
      x = 0;
    }
}

constexpr int GROUP = 32;                         // rows that are worked on at a time
constexpr int PART_PANELS = 4, PART_COLUMNS = 64;  // what the tile unit gets to do at a time

// One chunk of panels: where its keys and value pairs lie.
struct Chunk {
  int n, count, pairs;
  bool touched;
  const uint16_t* panel[CHUNK_PANELS];
  const uint16_t* pair[CHUNK_PANELS / 2];
  int parts() const { return (count + PART_PANELS - 1) / PART_PANELS; }
};

// Everything that the steps of one call share.
struct Work {
  const Tile& t;
  int wide;
  int64_t wide_d, q_stride;
  const uint16_t *keys, *values, *q;
  float* s;
  uint16_t *copy, *p;
  float unit;
  bool shaped;
  Softmax x;

  Chunk prepare(int n) const {
    Chunk c;
    c.n = n;
    c.count = t.panels - n < CHUNK_PANELS ? t.panels - n : CHUNK_PANELS;
    c.pairs = (c.count + 1) / 2;
    c.touched = shaped;
    for (int i = 0; i < c.count; ++i) {
      c.panel[i] = keys + t.panel[n + i] * PANEL * wide_d;
      c.touched |= t.masked[n + i] != 0;
    }
    for (int j = 0; j < c.pairs; ++j) {
      const int64_t first = t.panel[n + 2 * j];
      const bool together = 2 * j + 1 < c.count && first % 2 == 0 && t.panel[n + 2 * j + 1] == first + 1;
      c.pair[j] = values + (first / 2) * 2 * PANEL * wide;
      if (together && !t.sanitize) continue;
      uint16_t* to = copy + (int64_t)j * 2 * PANEL * wide;
      gather_pair(t, values, n, c.count, j, wide, to);
      c.pair[j] = to;
    }
    return c;
  }

  // Logits of four panels for the rows from r on (32, or 16 where `two` is false)
  void logits(const Chunk& c, int r, bool two, int i) {
    const int first = i * PART_PANELS, some = c.count - first < PART_PANELS ? c.count - first : PART_PANELS;
    float* to = s + first * PANEL;
    if (two) dots<2>(q + r * q_stride, q_stride, wide_d, c.panel + first, some, to);
    else dots<1>(q + r * q_stride, q_stride, wide_d, c.panel + first, some, to);
  }

  // Outputs of 64 (or the last few) channels
  void outputs(const Chunk& c, int r, bool two, int j) {
    const int column = j * PART_COLUMNS, end = column + PART_COLUMNS < wide ? column + PART_COLUMNS : wide;
    float* to = t.o + (int64_t)r * wide;
    if (two) weigh<2>(p, c.pair, c.pairs, column, end, to, wide);
    else weigh<1>(p, c.pair, c.pairs, column, end, to, wide);
  }
};

// What the chunk from panel `next` on reads, unless it follows what is read now: that the hardware fetches by itself.
static inline Ahead look_ahead(const Work& w, int next) {
  Ahead ahead;
  const Tile& t = w.t;
  const int end = next + CHUNK_PANELS < t.panels ? next + CHUNK_PANELS : t.panels;
  if (next >= end || (next > 0 && t.panel[end - 1] - t.panel[next - 1] == end - next)) return ahead;
  for (int i = next; i < end; ++i) {
    const int64_t number = t.panel[i];
    ahead.add(w.keys + number * PANEL * w.wide_d, PANEL * w.wide_d * 2);
    if (number % 2 == 0 || i == next || t.panel[i - 1] != number - 1)
      ahead.add(w.values + number / 2 * 2 * PANEL * w.wide, 2 * PANEL * w.wide * 2);
  }
  return ahead;
}

// One chunk of panels after the other, 32 rows at a time: logits, weights and their operands stay in the nearest cache.
static void attend_chunks(Work& w, float* marks) {
  const Tile& t = w.t;
  const int rows16 = (int)up(t.rows, 16), columns = (w.wide + PART_COLUMNS - 1) / PART_COLUMNS;
  const int lines = (int)((CHUNK_PANELS * PANEL * 2 * (w.wide_d + w.wide) / 64 + t.rows - 1) / t.rows);
  for (int n = 0; n < t.panels; n += CHUNK_PANELS) {
    Chunk c = w.prepare(n);
    Ahead ahead = look_ahead(w, n + c.count);
    for (int r = 0; r < rows16; r += GROUP) {
      const int last = r + GROUP < t.rows ? GROUP : t.rows - r;
      const bool two = r + 16 < rows16;
      for (int i = 0; i < c.parts(); ++i) w.logits(c, r, two, i);
      if (c.touched)
        for (int i = 0; i < last; ++i) shape_logits(t, n, c.count, r + i, w.s + i * S_STRIDE, nullptr);
      if (t.sanitize) {
        if (c.count % 2)  // the absent half of the last pair is attended to by nobody
          for (int i = 0; i < last; ++i)
            for (int k = 0; k < PANEL; ++k) w.s[i * S_STRIDE + c.count * PANEL + k] = -__builtin_inff();
        if (r > 0) c = w.prepare(n);
        for (int j = 0; j < c.pairs; ++j)
          clean_pair(marks + (int64_t)r * w.wide, w.s, last, j, w.wide, const_cast<uint16_t*>(c.pair[j]));
      }
      for (int i = 0; i < last; ++i) {
        ahead.some(lines);
        soften_bf16(t, w.x, r + i, w.s + i * S_STRIDE, c.count * PANEL, w.unit, w.wide, w.p + i * CHUNK);
      }
      for (int j = 0; j < columns; ++j) w.outputs(c, r, two, j);
    }
  }
}

void attend_bf16(const Tile& t) {
  const int wide = (int)up(t.dv, 16);
  float* s = static_cast<float*>(t.scratch);
  uint16_t* copy = reinterpret_cast<uint16_t*>(s + MAX_ROWS * S_STRIDE);
  uint16_t* p = copy + (int64_t)CHUNK * wide;
  float* marks = reinterpret_cast<float*>(p + MAX_ROWS * CHUNK);
  const FlushToZero flush;
  Work w{t, wide, up(t.d, 32), t.q_stride, static_cast<const uint16_t*>(t.k), static_cast<const uint16_t*>(t.v),
         static_cast<const uint16_t*>(t.q), s, copy, p, exponent_unit(t), transformed(t), {}};
  start(t, w.x, wide);
  if (t.sanitize) memset(marks, 0, sizeof(float) * t.rows * wide);
  memset(p, 0, sizeof(uint16_t) * GROUP * CHUNK);  // rows that are not there weigh nothing
  configure();
  attend_chunks(w, marks);
  _tile_release();
  finish(t, w.x, marks, wide);
}

#else

bool attends_bf16() { return false; }
void attend_bf16(const Tile&) {}

#endif

}  // namespace SIEVE_LEVEL
}  // namespace sieve
