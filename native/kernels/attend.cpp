// Forward attention of one tile in fp32: out = sum_j 2^(s_j - m) v_j over the tile's panels, with the online softmax.
#include "kernels/ends.h"
#include "kernels/functions.h"
#include "kernels/gemm.h"
#include "kernels/softmax.h"

namespace sieve {
namespace SIEVE_LEVEL {

int64_t tile_scratch(int32_t d, int32_t dv, bool bf16) {
  (void)d;
  const int64_t wide = up(dv, 16);
  const int64_t logits = MAX_ROWS * S_STRIDE * 4;
  const int64_t values = bf16 ? CHUNK * wide * 2 : CHUNK * wide * 4;
  const int64_t weights = bf16 ? MAX_ROWS * CHUNK * 2 : 0;
  const int64_t gathered = LANES == 8 ? up(GATHERED_BYTES, wide * PANEL * 4) : 0;
  return logits + values + weights + MAX_ROWS * wide * 4 + gathered + 4096;
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

static void attend_chunks(const Tile& t, Softmax& x, bool begins, bool ends) {
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
  float* gathered = marks + (int64_t)MAX_ROWS * wide;
  const bool gathers = gathering(t.rows);
  const FlushToZero flush;
  if (begins) start(t, x, wide);
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
    Ends ends_of;
    if (gathers && !t.sanitize) ends_of.find(t, n, count);
    if (gathers) {
      // values are asked for while their logits are made: they come from far away, and nothing foresees where a list goes next
      for (int p = 0; p < count; ++p) {
        for (int j = p * PANEL; j < rows && j < (p + 1) * PANEL; ++j)
          for (int c = 0; c < wide; c += 16) __builtin_prefetch(row[j] + c, 0, 2);
        ends_of.each_run(t.rows, p, [&](int r, int some) {
          times_panels(q + r * t.q_stride, t.q_stride, some, t.d, panel + p, 1, s + r * S_STRIDE + p * PANEL, S_STRIDE);
        });
      }
    } else {
      times_panels(q, t.q_stride, t.rows, t.d, panel, count, s, S_STRIDE);
    }
    if (touched)
      for (int r = 0; r < t.rows; ++r) shape_logits(t, n, ends_of.of(r, count), r, s + r * S_STRIDE, nullptr);
    if (t.sanitize)
      for (int j = 0; j < rows; ++j) {
        mark_non_finite(t, marks, s, row[j], copy + (int64_t)j * wide, j, t.dv, wide);
        row[j] = copy + (int64_t)j * wide;
      }
    for (int r = 0; r < t.rows; ++r)
      if (const int own = ends_of.of(r, count)) soften(t, x, r, s + r * S_STRIDE, own * PANEL, unit, wide);
    if (gathers) {
      times_gathered(s, S_STRIDE, t.rows, rows, ends_of.given(), row, wide, gathered, t.o, wide);
      continue;
    }
    for (int j = 0; j < rows; j += step) times_rows(s + j, S_STRIDE, 1, t.rows, rows - j < step ? rows - j : step, row + j, wide, t.o, wide);
  }
  if (ends) finish(t, x, marks, wide);
}

void attend(const Tile& t) {
  Softmax x;
  attend_chunks(t, x, true, true);
}

void attend_part(const Tile& t, bool begins, bool ends) { attend_chunks(t, *static_cast<Softmax*>(t.softmax), begins, ends); }

}  // namespace SIEVE_LEVEL
}  // namespace sieve
