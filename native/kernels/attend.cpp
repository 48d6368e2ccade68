// Forward attention of one tile in fp32: out = sum_j 2^(s_j - m) v_j over the tile's panels, with the online softmax.
#include "kernels/amx.h"
#include "kernels/functions.h"
#include "kernels/gemm.h"

namespace sieve {
namespace SIEVE_LEVEL {

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
  float lse = empty ? -infinity : m == -infinity ? l : m * unit * LN2 + __builtin_logf(l);
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
  start(t, wide);
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
    for (int r = 0; r < t.rows; ++r) soften<6>(t, r, s + r * S_STRIDE, count * PANEL, unit, wide);
    times_rows(s, S_STRIDE, 1, t.rows, rows, row, wide, t.o, wide);
  }
  if (t.sanitize) add_marks(t, marks, wide);
}

#if defined(__AMX_BF16__)

bool attends_bf16() { return true; }

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

template <int Rows>
static inline void group(const uint16_t* q, int64_t wide_d, const uint16_t* const* panel, int count, float* s) {
  int p = 0;
  for (; p + 2 <= count; p += 2) dots<Rows, 2>(q, wide_d, panel[p], panel[p + 1], s + p * PANEL);
  if (p < count) dots<Rows, 1>(q, wide_d, panel[p], nullptr, s + p * PANEL);
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
  start(t, wide);
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
      for (int i = r; i < last; ++i) soften_bf16(t, i, s + i * S_STRIDE, count * PANEL, unit, wide, p + i * CHUNK);
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
      for (int i = r; i < last; ++i) soften_bf16(t, i, s + i * S_STRIDE, count * PANEL, unit, wide, p + i * CHUNK);
      if (r + 16 < rows16)
        outputs<2>(p + r * CHUNK, pair, pairs, t.o + (int64_t)r * wide, wide);
      else
        outputs<1>(p + r * CHUNK, pair, pairs, t.o + (int64_t)r * wide, wide);
    }
  }
  _tile_release();
  if (t.sanitize) add_marks(t, marks, wide);
}

#else

bool attends_bf16() { return false; }
void attend_bf16(const Tile&) {}

#endif

}  // namespace SIEVE_LEVEL
}  // namespace sieve
