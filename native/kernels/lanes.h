// Operations over the sixteen query rows of the gate.
#pragma once
#include "kernels.h"
#include "kernels/logits.h"
#include "kernels/vec.h"

namespace sieve {
namespace SIEVE_LEVEL {

constexpr int MOST_CHANNELS = 512;

// Where integer products are added in 16 bits, codes stay what they are, 0 to 2^bits - 1: half as large as twice their level, so twice
// as many products fit.
#if defined(__AVX2__) && !defined(__AVX512F__)
#define SIEVE_PAIRS
constexpr bool PLAIN_CODES = true;
#else
constexpr bool PLAIN_CODES = false;
#endif

// x = 2^e * (1 + m) with 1 + m in [sqrt(1/2), sqrt(2)), for positive normal numbers; returns m
static inline vf mantissa(vf x, vi* e) {
  const vi bits = (vi)x;
  *e = (bits - 0x3f3504f3) >> 23;
  return (vf)(bits - (*e << 23)) - 1.0f;
}

// log2 of positive normal numbers, within 2^-22 of the result or of 1
static inline vf log2_(vf x) {
  vi e;
  const vf m = mantissa(x, &e);
  vf p = splat(7.0376836292e-2f);
  p = p * m + -1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m + -1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m + -1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m + -2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const vf z = m * m;
  const vf ln = m + (z * -0.5f + z * m * p);
  return ln * LOG2E + __builtin_convertvector(e, vf);
}

static inline vf sqrt_(vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (vf)_mm256_sqrt_ps((__m256)x);
#else
  vf root;
  for (int i = 0; i < LANES; ++i) root[i] = __builtin_sqrtf(x[i]);
  return root;
#endif
}

// log2 for estimates: errs by at most 2.3e-6 beside the rounding of the result
static inline vf short_log2(vf x) {
  vi e;
  const vf m = mantissa(x, &e);
  vf p = splat(-0.20659174025058746f);
  p = p * m + 0.32215479016304016f;
  p = p * m + -0.3674899637699127f;
  p = p * m + 0.47934800386428833f;
  p = p * m + -0.7211318612098694f;
  p = p * m + 1.4427134990692139f;
  return p * m + __builtin_convertvector(e, vf);
}

// 2^x for estimates: errs by at most 1.1e-4 of the result; without an instruction to split a number, x counts as one of -126..127
static inline vf weight(vf x) {
#if defined(__AVX512F__)
  const __m512 f = _mm512_reduce_ps((__m512)x, 0x09);  // x - floor(x)
  vf p = splat(7.8024523e-2f);
  p = p * (vf)f + 2.2606716e-1f;
  p = p * (vf)f + 6.9583356e-1f;
  p = p * (vf)f + 9.9989274e-1f;
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)x);  // takes the floor itself
#else
  x = max_(splat(-126.0f), min_(splat(127.0f), x));  // what overflows must be seen to
  const vf above = x + BIASED, f = x - (above - BIASED);
  vf p = splat(5.51716685295105e-2f);
  p = p * f + 2.426111251115799e-1f;
  p = p * f + 6.932609677314758e-1f;
  p = p * f + 9.999280571937561e-1f;
  return p * power(above);
#endif
}

}  // namespace SIEVE_LEVEL
}  // namespace sieve
