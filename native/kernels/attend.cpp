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
  return logits + values + weights + MAX_ROWS * wide * 4 + 4096;
}

// Rows of values that are a power of two apart share few sets of a cache of 32 KB, and every row of a tile reads them: with eight
// lanes they lie in panels, 16 channels of 16 keys side by side.
constexpr bool VALUE_PANELS = LANES == 8;

bool value_panels() { return VALUE_PANELS; }

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

// Lines that are read soon, asked for a few at a time: all at once they would fill the queue of misses and hold up the products.
struct Ahead {
  const float* line;
  int left, step;
  Ahead(const float* first, int lines, int turns) : line(first), left(first ? lines : 0), step((lines + turns - 1) / turns) {}
  void some() {
    for (int i = 0; i < step && left > 0; ++i, --left, line += 16) __builtin_prefetch(line, 0, 3);
  }
};

// Logits of panels n..n+count-1, panel by panel, while the next panel of keys and this panel's values are on their way: lists leave
// the page that they are on again and again, and nothing else foresees where they go.
static inline void panel_logits(const Tile& t, int n, int count, const float* const* panel, const float* const* value_panel, float* s) {
  const float* q = static_cast<const float*>(t.q);
  const int groups = (t.rows + GEMM_ROWS - 1) / GEMM_ROWS;
  for (int p = 0; p < count; ++p) {
    const float* next = n + p + 1 < t.panels ? static_cast<const float*>(t.k) + (int64_t)t.panel[n + p + 1] * PANEL * t.d : nullptr;
    Ahead keys(next, t.d, groups), values(value_panel[p], (int)up(t.dv, 16), groups);
    int r = 0;
    for (; r + GEMM_ROWS <= t.rows; r += GEMM_ROWS) {
      keys.some();
      values.some();
      panels_block<GEMM_ROWS, 1>(q + r * t.q_stride, t.q_stride, 1, t.d, panel + p, s + r * S_STRIDE + p * PANEL, S_STRIDE);
    }
    keys.some();
    values.some();
    times_panels(q + r * t.q_stride, t.q_stride, t.rows - r, t.d, panel + p, 1, s + r * S_STRIDE + p * PANEL, S_STRIDE);
  }
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
  const bool ends_early = VALUE_PANELS && t.rows >= 2 * GEMM_ROWS && !t.sanitize;
  const FlushToZero flush;
  if (begins) start(t, x, wide);
  if (t.sanitize) memset(marks, 0, sizeof(float) * t.rows * wide);
  for (int n = 0; n < t.panels; n += CHUNK_PANELS) {
    const int count = t.panels - n < CHUNK_PANELS ? t.panels - n : CHUNK_PANELS;
    const float *panel[CHUNK_PANELS], *value_panel[CHUNK_PANELS], *row[CHUNK];
    int rows = 0;
    bool touched = shaped;
    for (int p = 0; p < count; ++p) {
      const int64_t number = t.panel[n + p], base = number * PANEL;
      panel[p] = keys + number * PANEL * t.d;
      value_panel[p] = values + number * PANEL * wide;
      touched |= t.masked[n + p] != 0;
      // a panel that ends behind the last key ends the list: its weights there are zero, its values are not read or zero
      const int there = (int)(t.kv_len - base < PANEL ? t.kv_len - base : PANEL);
      if (!VALUE_PANELS)
        for (int i = 0; i < there; ++i) row[rows + i] = values + (base + i) * t.v_stride;
      rows += there;
    }
    Ends ends_of;
    if (ends_early) ends_of.find(t, n, count);
    if (ends_of.early) {
      for (int p = 0; p < count; ++p)
        ends_of.each_run(t.rows, p, [&](int r, int some) {
          times_panels(q + r * t.q_stride, t.q_stride, some, t.d, panel + p, 1, s + r * S_STRIDE + p * PANEL, S_STRIDE);
        });
    } else if (VALUE_PANELS) {
      panel_logits(t, n, count, panel, value_panel, s);
    } else {
      times_panels(q, t.q_stride, t.rows, t.d, panel, count, s, S_STRIDE);
    }
    if (touched)
      for (int r = 0; r < t.rows; ++r) shape_logits(t, n, ends_of.of(r, count), r, s + r * S_STRIDE, nullptr);
    if (t.sanitize) {
      memset(copy, 0, sizeof(float) * count * PANEL * wide);
      for (int j = 0; j < rows; ++j) {
        float* clean = copy + (VALUE_PANELS ? j / PANEL * PANEL * wide + j % PANEL * PANEL : j * wide);
        if (VALUE_PANELS)
          mark_non_finite(t, marks, s, value_panel[j / PANEL] + j % PANEL * PANEL, clean, j, t.dv, wide, PANEL * PANEL);
        else
          mark_non_finite(t, marks, s, row[j], clean, j, t.dv, wide);
        row[j] = clean;
      }
      for (int p = 0; p < count; ++p) value_panel[p] = copy + p * PANEL * wide;
    }
    for (int r = 0; r < t.rows; ++r)
      if (const int own = ends_of.of(r, count)) soften(t, x, r, s + r * S_STRIDE, own * PANEL, unit, wide);
    if (VALUE_PANELS)
      times_values(s, S_STRIDE, t.rows, value_panel, count, ends_of.given(), wide, t.o, wide);
    else
      for (int j = 0; j < rows; j += step)
        times_rows(s + j, S_STRIDE, 1, t.rows, rows - j < step ? rows - j : step, row + j, wide, t.o, wide);
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
