// From dot products to masked base-2 exponents, shared by the forward and the backward kernel.
#pragma once
#include "kernels.h"
#include "kernels/vec.h"

namespace sieve {
namespace SIEVE_LEVEL {

constexpr float LOG2E = 1.44269504088896340736f;
constexpr float LN2 = 0.693147180559945309417f;

static inline vf tanh_(vf x) {
  const vf a = (vf)((vi)x & splat_int(0x7fffffff));
  const vf z = x * x;
  vf p = splat(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z + -5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z + -3.33332819422e-1f;
  const vf small = x + x * z * p;
  const vf e = exp2_<6>(a * (-2.0f * LOG2E));
  const vf t = (1.0f - e) / (1.0f + e);
  const vf large = (vf)(((vi)x & splat_int((int32_t)0x80000000)) | (vi)t);
  return select(a < splat(0.625f), small, large);
}

static inline uint32_t span_bits(int64_t from, int64_t to) {
  from = from < 0 ? 0 : from > PANEL ? PANEL : from;
  to = to < 0 ? 0 : to > PANEL ? PANEL : to;
  return ((1u << to) - 1u) & ~((1u << from) - 1u);
}

// Which keys of the tile's panel number `n` row `r` attends to.
static inline uint32_t visible_bits(const Tile& t, int n, int r) {
  const int64_t panel = t.panel[n], base = panel * PANEL;
  uint32_t bits = t.keep[n];
  if (t.row_keep) bits &= t.row_keep[(int64_t)n * t.rows + r];
  bits &= span_bits(t.low[r] - base, t.high[r] - base);
  if (t.near_low) bits &= span_bits(0, t.prefix - base) | span_bits(t.near_low[r] - base, t.near_high[r] - base);
  if (t.key_bits) bits &= t.key_bits[panel];
  if (t.mask_row && bits) {
    const char* row = t.mask_row[r] + base * t.mask_stride;
    uint32_t allowed = 0;
    for (uint32_t left = bits; left; left &= left - 1) {
      const int i = __builtin_ctz(left);
      allowed |= (uint32_t)(row[i * t.mask_stride] != 0) << i;
    }
    bits = allowed;
  }
  return bits;
}

static inline bool transformed(const Tile& t) { return t.softcap != 0.0f || t.bias_row || !(t.scale > 0.0f); }

// What turns a number of the tile into a base-2 exponent: after `shape_logits` it is 1.
static inline float exponent_unit(const Tile& t) { return transformed(t) ? 1.0f : t.scale * LOG2E; }

// Scale, cap, bias and masks of one row over panels n..n+count-1. `s` holds raw dot products and becomes what exponent_unit
// says; keys that the row does not attend to become -inf. `capped` (or null) receives capped natural logits before the bias.
static inline void shape_logits(const Tile& t, int n, int count, int r, float* s, float* capped) {
  const float infinity = __builtin_inff();
  if (transformed(t)) {
    for (int i = 0; i < count * PANEL; i += LANES) {
      vf x = load(s + i) * t.scale;
      if (t.softcap != 0.0f) x = tanh_(x / t.softcap) * t.softcap;
      if (capped) store(capped + i, x);
      store(s + i, x * LOG2E);
    }
    if (t.bias_row) {
      const char* bias = t.bias_row[r];
      for (int p = 0; p < count; ++p) {
        const int64_t base = (int64_t)t.panel[n + p] * PANEL;
        const int there = (int)(t.kv_len - base < PANEL ? t.kv_len - base : PANEL);
        for (int i = 0; i < there; ++i) {
          const float b = read_one(bias, (base + i) * t.bias_stride, t.bias_dtype);
          float& x = s[p * PANEL + i];
          x = b == -infinity ? b : x + b * LOG2E;
        }
      }
    }
  }
#if defined(__AVX512F__)
  if (t.rows_alone) {
    // nothing is loaded: lanes that are not attended to are overwritten
    const uint16_t* bits = t.row_keep + (int64_t)n * t.rows + r;
    for (int p = 0; p < count; ++p, bits += t.rows)
      _mm512_mask_storeu_ps(s + p * PANEL, (__mmask16)~*bits, _mm512_set1_ps(-infinity));
    return;
  }
#endif
  for (int p = 0; p < count; ++p) {
    if (!t.masked[n + p]) continue;
    const uint32_t bits = t.rows_alone ? t.row_keep[(int64_t)(n + p) * t.rows + r] : visible_bits(t, n + p, r);
    for (int j = 0; j < PANEL_VECS; ++j) {
      float* x = s + p * PANEL + j * LANES;
      store(x, select(lanes_of(bits, j * LANES), load(x), splat(-infinity)));
    }
  }
}

constexpr float FAR = 0x1p12f;  // powers of two beyond which the rounding of a reference may not be left in an exponent

static inline bool is_far(float base) { return base > FAR || base < -FAR; }

// What to take from n logits times `unit`: `base`, their reference times `unit`, or nothing where that would round too much and the
// reference was taken from the logits themselves.
static inline float close_base(float* s, int n, float reference, float base) {
  if (!is_far(base)) return base;
  for (int i = 0; i < n; i += LANES) store(s + i, load(s + i) - reference);
  return 0.0f;
}

// Weights of logits taken from their lse are at most one, however both were rounded; NaN stays.
static inline vf at_most_zero(vf x) { return select(x > vf{}, vf{}, x); }

}  // namespace SIEVE_LEVEL
}  // namespace sieve
