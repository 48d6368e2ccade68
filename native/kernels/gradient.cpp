// Gradients of one tile: P again from lse, dV += P^T dO, dS = P * (dO V^T + shift), dQ += dS K, dK += dS^T Q.
#include "kernels/ends.h"
#include "kernels/functions.h"
#include "kernels/gemm.h"
#include "kernels/logits.h"

namespace sieve {
namespace SIEVE_LEVEL {

constexpr int STEP_PANELS = 4;  // panels at a time: logits, weights and slopes of 64 rows stay in the cache
constexpr int STEP = STEP_PANELS * PANEL;
constexpr int STRIDE = STEP + 16;

int64_t gradient_scratch(int32_t d, int32_t dv) {
  const int64_t wide_d = up(d, 16), gathered = MAX_ROWS * (wide_d + up(dv, 16)) * 4 + up(GATHERED_BYTES, wide_d * PANEL * 4);
  return 3 * MAX_ROWS * STRIDE * 4 + gathered;
}

void gradient(const TileGradient& g) {
  const Tile& t = g.tile;
  const float infinity = __builtin_inff();
  const int64_t wide_d = up(t.d, 16), wide_v = up(t.dv, 16);
  float* s = static_cast<float*>(t.scratch);
  float* slope = s + MAX_ROWS * STRIDE;
  float* capped = slope + MAX_ROWS * STRIDE;
  float* gathered_pull = capped + MAX_ROWS * STRIDE;
  float* gathered_query = gathered_pull + MAX_ROWS * wide_v;
  float* gathered_keys = gathered_query + MAX_ROWS * wide_d;
  const float* keys = static_cast<const float*>(t.k);
  const float* q = static_cast<const float*>(t.q);
  const float unit = exponent_unit(t);
  const bool shaped = transformed(t), cap = t.softcap != 0.0f, gathers = gathering(t.rows);
  const float *query[MAX_ROWS], *pull[MAX_ROWS];
  for (int r = 0; r < t.rows; ++r) {
    query[r] = g.q_clean + r * wide_d;
    pull[r] = g.d_out + r * wide_v;
  }
  if (gathers) {
    gather_columns(pull, t.rows, (int)wide_v, gathered_pull);
    gather_columns(query, t.rows, (int)wide_d, gathered_query);
  }
  for (int n = 0; n < t.panels; n += STEP_PANELS) {
    const int count = t.panels - n < STEP_PANELS ? t.panels - n : STEP_PANELS;
    const float* panel[STEP_PANELS];
    const float* value_panel[STEP_PANELS];
    const float* row[STEP];
    int rows = 0;
    bool touched = shaped;
    for (int p = 0; p < count; ++p) {
      const int64_t number = t.panel[n + p], base = number * PANEL;
      panel[p] = keys + number * PANEL * t.d;
      value_panel[p] = g.v_panels + number * PANEL * t.dv;
      touched |= t.masked[n + p] != 0;
      const int there = (int)(t.kv_len - base < PANEL ? t.kv_len - base : PANEL);
      for (int i = 0; i < there; ++i) row[rows++] = g.k_rows + (base + i) * wide_d;
    }
    Ends ends;
    if (gathers && !g.d_bias_row) ends.find(t, n, count);
    if (ends.early) {
      for (int p = 0; p < count; ++p)
        ends.each_run(t.rows, p, [&](int r, int some) {
          const int at = r * STRIDE + p * PANEL;
          times_panels(q + r * t.q_stride, t.q_stride, some, t.d, panel + p, 1, s + at, STRIDE);
          times_panels(g.d_out + r * wide_v, wide_v, some, t.dv, value_panel + p, 1, slope + at, STRIDE);
        });
    } else {
      times_panels(q, t.q_stride, t.rows, t.d, panel, count, s, STRIDE);
      times_panels(g.d_out, wide_v, t.rows, t.dv, value_panel, count, slope, STRIDE);
    }
    for (int r = 0; r < t.rows; ++r) {
      const int own = ends.of(r, count);
      float *sr = s + r * STRIDE, *dr = slope + r * STRIDE, *cr = capped + r * STRIDE;
      if (touched) shape_logits(t, n, own, r, sr, cap ? cr : nullptr);
      float base = g.lse[r] == -infinity ? 0.0f : g.lse[r] * LOG2E;
      if (is_far(base)) {
        // first natural logits, rounded as finish_row rounds the reference of lse, so that the largest weighs one
        const float back = LOG2E / unit;
        for (int i = 0; i < own * PANEL; i += LANES) store(sr + i, load(sr + i) * unit * LN2);
        for (int i = 0; i < own * PANEL; i += LANES) store(sr + i, at_most_zero(load(sr + i) - g.lse[r]) * back);
        base = 0.0f;
      }
      for (int i = 0; i < own * PANEL; i += LANES) {
        const vf logit = load(sr + i);
        // a row whose lse is NaN weighs the keys that are hidden from it by zero all the same
        const vf p = select(logit == splat(-infinity), vf{}, exp2_<6>(logit * unit - base));
        const vi none = p == vf{};
        store(sr + i, p);
        store(dr + i, select(none, vf{}, p * (load(dr + i) + g.shift[r])));
      }
      if (g.d_bias_row) {
        float* to = reinterpret_cast<float*>(g.d_bias_row[r]);
        for (int p = 0; p < count; ++p) {
          const int64_t key = (int64_t)t.panel[n + p] * PANEL;
          const int there = (int)(t.kv_len - key < PANEL ? t.kv_len - key : PANEL);
          for (int i = 0; i < there; ++i) to[(key + i) * g.d_bias_stride] += dr[p * PANEL + i];
        }
      }
      for (int i = 0; i < own * PANEL; i += LANES) {
        vf x = load(dr + i) * t.scale;
        if (cap) {
          const vf c = load(cr + i) / t.softcap;
          x = select(load(sr + i) == vf{}, vf{}, x * (1.0f - c * c));
        }
        store(dr + i, x);
      }
    }
    if (gathers)
      times_gathered(slope, STRIDE, t.rows, rows, ends.given(), row, (int)wide_d, gathered_keys, g.dq, wide_d);
    else
      times_rows(slope, STRIDE, 1, t.rows, rows, row, (int)wide_d, g.dq, wide_d);
    for (int p = 0; p < count; ++p) {
      const int64_t key = (int64_t)t.panel[n + p] * PANEL;
      const int there = (int)(t.kv_len - key < PANEL ? t.kv_len - key : PANEL);
      if (gathers) {
        ends.each_run(t.rows, p, [&](int r, int some) {
          const int at = r * STRIDE + p * PANEL;
          times_columns(s + at, 1, STRIDE, there, some, gathered_pull + r * PANEL, t.rows, (int)wide_v, g.dv + key * wide_v, wide_v);
          times_columns(slope + at, 1, STRIDE, there, some, gathered_query + r * PANEL, t.rows, (int)wide_d, g.dk + key * wide_d, wide_d);
        });
      } else {
        times_rows(s + p * PANEL, 1, STRIDE, there, t.rows, pull, (int)wide_v, g.dv + key * wide_v, wide_v);
        times_rows(slope + p * PANEL, 1, STRIDE, there, t.rows, query, (int)wide_d, g.dk + key * wide_d, wide_d);
      }
    }
  }
}

}  // namespace SIEVE_LEVEL
}  // namespace sieve
