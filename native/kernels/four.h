// Vectors that hold four query rows side by side: [keys or blocks][4 rows].
#pragma once
#include "kernels/logits.h"

namespace sieve {
namespace SIEVE_LEVEL {

// Natural logarithm of x in [1, 2^100], or 0, whose logarithm is -inf; errs by 2e-7 and a unit of the result.
static inline vf log_(vf x) {
  const float infinity = __builtin_inff();
  const vi bits = (vi)x;
  vi e = ((bits >> 23) & splat_int(0xff)) - 127;
  vf m = (vf)((bits & splat_int(0x007fffff)) | splat_int(0x3f800000));
  const vi big = m > splat(1.41421356f);
  m = select(big, m * 0.5f, m);
  e = e - big;  // a true lane is -1
  const vf f = m - 1.0f, z = f * f;
  vf p = splat(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  vf scale = __builtin_convertvector(e, vf);
  const vf y = f - 0.5f * z + f * z * p + scale * LN2;
  return select(x > splat(0.0f), y, splat(-infinity));
}

// The largest, or the sum, over the keys of a vector of [keys][4 rows], in every key's place.
static inline vf over_keys(vf x, bool largest) {
#if defined(__AVX512F__)
  __m512 a = (__m512)x, b = _mm512_shuffle_f32x4(a, a, 0x4e);
  a = largest ? _mm512_max_ps(a, b) : _mm512_add_ps(a, b);
  b = _mm512_shuffle_f32x4(a, a, 0xb1);
  return (vf)(largest ? _mm512_max_ps(a, b) : _mm512_add_ps(a, b));
#elif defined(__AVX2__)
  const vf other = (vf)_mm256_permute2f128_ps((__m256)x, (__m256)x, 0x01);
  return largest ? max_(x, other) : x + other;
#else
  vf y;
  for (int r = 0; r < SCAN_ROWS; ++r) {
    float total = x[r];
    for (int i = r + SCAN_ROWS; i < LANES; i += SCAN_ROWS) total = largest ? (x[i] > total ? x[i] : total) : total + x[i];
    for (int i = r; i < LANES; i += SCAN_ROWS) y[i] = total;
  }
  return y;
#endif
}

// Four numbers, for every key of a vector.
static inline vf four(const float* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_broadcast_f32x4(_mm_loadu_ps(p));
#elif defined(__AVX2__)
  return (vf)_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
#else
  vf x;
  for (int i = 0; i < LANES; ++i) x[i] = p[i % SCAN_ROWS];
  return x;
#endif
}

static inline vi four_integers(const int32_t* p) {
#if defined(__AVX512F__)
  return (vi)_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  return (vi)_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vi x;
  for (int i = 0; i < LANES; ++i) x[i] = p[i % SCAN_ROWS];
  return x;
#endif
}

}  // namespace SIEVE_LEVEL
}  // namespace sieve
