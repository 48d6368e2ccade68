// What kernels that multiply bf16 share: weights rounded to it, and values that are not finite.
#pragma once
#include "kernels/softmax.h"

#if defined(__AVX512BF16__)

namespace sieve {
namespace SIEVE_LEVEL {

// `soften` with weights rounded to bf16 for the second product; the sum takes them unrounded.
static inline void soften_bf16(const Tile& t, Softmax& x, int r, float* s, int n, float unit, int wide, uint16_t* p) {
  const vf most = largest(s, n);
  if (any_above(most, x.limit[r])) raise_reference(t, x, r, most, unit, wide);
  const float base = close_base(s, n, t.m[r], x.base[r]);
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

// Hides values that are not finite from a pair of panels, and notes them for the rows that attend to them.
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

}  // namespace SIEVE_LEVEL
}  // namespace sieve

#endif
