// Forward attention of one tile of bf16 inputs, on tile registers or vectors: fp32 sums, weights rounded to bf16.
#include "kernels/bf16_amx.h"
#include "kernels/bf16_vectors.h"
#include "kernels/functions.h"

namespace sieve {
namespace SIEVE_LEVEL {

#if defined(__AVX512BF16__)

bool multiplies_bf16() { return true; }

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

constexpr int GROUP = 32;                          // rows that are worked on at a time
constexpr int64_t HALF = 8 * 32;                   // numbers that 16 channels of a panel of values are
constexpr int PART_PANELS = 4, PART_COLUMNS = 64;  // what a product gets to do at a time

// Halves of two panels as one pair, wherever they lie
static inline void gather_pair(const uint16_t* const* from, bool both, int wide, uint16_t* to) {
  for (int half = 0; half < 2; ++half, to += HALF)
    for (int c = 0; c < wide; c += 16)
      for (int i = 0; i < 8; ++i)
        _mm512_storeu_si512(to + c * 32 + i * 32, half == 0 || both ? _mm512_loadu_si512(from[half] + c * 32 + i * 32) : _mm512_setzero_si512());
}

// One chunk of panels: where its keys and value pairs lie.
struct Chunk {
  int n, count, pairs;
  bool touched;
  const uint16_t* panel[CHUNK_PANELS];
  const uint16_t* half[CHUNK_PANELS];  // values of a panel: the upper or lower half of their pair
  uint16_t* pair[CHUNK_PANELS / 2];    // copies of pairs, where there are any
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
    for (int i = 0; i < c.count; ++i) {
      const int64_t number = t.panel[n + i];
      c.half[i] = values + (number / 2) * 2 * PANEL * wide + (number & 1) * HALF;
    }
    for (int j = 0; j < c.pairs; ++j) {
      const bool both = 2 * j + 1 < c.count, together = both && t.panel[n + 2 * j] % 2 == 0 && c.half[2 * j + 1] == c.half[2 * j] + HALF;
      if (!t.sanitize && (together || !VALUE_PAIRS)) continue;
      uint16_t* to = c.pair[j] = copy + (int64_t)j * 2 * PANEL * wide;
      gather_pair(c.half + 2 * j, both, wide, to);
      c.half[2 * j] = to;
      if (both) c.half[2 * j + 1] = to + HALF;
    }
    return c;
  }

  // Logits of four panels for some rows from r on
  void logits(const Chunk& c, int r, int some, int i) {
    const int first = i * PART_PANELS, count = c.count - first < PART_PANELS ? c.count - first : PART_PANELS;
    dots(q + r * q_stride, q_stride, some, wide_d, c.panel + first, count, s + first * PANEL);
  }

  // Outputs of 64 (or the last few) channels
  void outputs(const Chunk& c, int r, int some, int j) {
    const int column = j * PART_COLUMNS, end = column + PART_COLUMNS < wide ? column + PART_COLUMNS : wide;
    weigh(p, some, c.half, c.count, column, end, t.o + (int64_t)r * wide, wide);
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

// One chunk of panels after the other, a group of rows at a time: logits, weights and their operands stay in the nearest cache.
static void attend_chunks(Work& w, float* marks) {
  const Tile& t = w.t;
  const int columns = (w.wide + PART_COLUMNS - 1) / PART_COLUMNS;
  const int lines = (int)((CHUNK_PANELS * PANEL * 2 * (w.wide_d + w.wide) / 64 + t.rows - 1) / t.rows);
  for (int n = 0; n < t.panels; n += CHUNK_PANELS) {
    Chunk c = w.prepare(n);
    Ahead ahead = look_ahead(w, n + c.count);
    for (int r = 0; r < t.rows; r += GROUP) {
      const int last = r + GROUP < t.rows ? GROUP : t.rows - r;
      for (int i = 0; i < c.parts(); ++i) w.logits(c, r, last, i);
      if (c.touched)
        for (int i = 0; i < last; ++i) shape_logits(t, n, c.count, r + i, w.s + i * S_STRIDE, nullptr);
      if (t.sanitize) {
        if (c.count % 2)  // the absent half of the last pair is attended to by nobody
          for (int i = 0; i < last; ++i)
            for (int k = 0; k < PANEL; ++k) w.s[i * S_STRIDE + c.count * PANEL + k] = -__builtin_inff();
        if (r > 0) c = w.prepare(n);
        for (int j = 0; j < c.pairs; ++j)
          clean_pair(marks + (int64_t)r * w.wide, w.s, last, j, w.wide, c.pair[j]);
      }
      for (int i = 0; i < last; ++i) {
        ahead.some(lines);
        soften_bf16(t, w.x, r + i, w.s + i * S_STRIDE, c.count * PANEL, w.unit, w.wide, w.p + i * CHUNK);
      }
      for (int j = 0; j < columns; ++j) w.outputs(c, r, last, j);
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
  begin_products();
  attend_chunks(w, marks);
  end_products();
  finish(t, w.x, marks, wide);
}

#else

bool multiplies_bf16() { return false; }
void attend_bf16(const Tile&) {}

#endif

}  // namespace SIEVE_LEVEL
}  // namespace sieve
