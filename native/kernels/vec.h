// Vectors of one level. Compiled with that level's flags; everything is static, so no code is shared between levels.
// `vf` holds LANES floats; GCC and Clang vector extensions give the arithmetic on every machine.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "view.h"

namespace sieve {
namespace SIEVE_LEVEL {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int PANEL = 16;                   // keys whose channels lie side by side in a packed panel, on every level
constexpr int PANEL_VECS = PANEL / LANES;

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef float vf_any __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t vi_any __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

static inline vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
static inline void store(float* p, vf x) { *reinterpret_cast<vf_any*>(p) = x; }
static inline vf splat(float x) { return x - vf{}; }
static inline vi splat_int(int32_t x) { return x - vi{}; }
// b where either is NaN
static inline vf max_(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
static inline vf min_(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

static inline vi iota() {
  vi x;
  for (int i = 0; i < LANES; ++i) x[i] = i;
  return x;
}

static inline float sum(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#elif defined(__AVX2__)
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  float total = 0;
  for (int i = 0; i < LANES; ++i) total += x[i];
  return total;
#endif
}

static inline bool any_lane(vi x) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)x, (__m512i)x) != 0;
#elif defined(__AVX2__)
  return _mm256_testz_si256((__m256i)x, (__m256i)x) == 0;
#else
  int32_t all = 0;
  for (int l = 0; l < LANES; ++l) all |= x[l];
  return all != 0;
#endif
}

static inline float lane_max(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#elif defined(__AVX2__)
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
#else
  float best = x[0];
  for (int i = 1; i < LANES; ++i) best = x[i] > best ? x[i] : best;
  return best;
#endif
}

// The largest lane that is a number; -inf if none is.
static inline float top(vf x) {
  return lane_max(x == x ? x : splat(-__builtin_inff()));
}

// All ones in lane i where bit (first + i) of `bits` is set.
static inline vi lanes_of(uint32_t bits, int first) {
#if defined(__AVX512F__)
  return (vi)_mm512_movm_epi32((__mmask16)(bits >> first));
#else
  vi one;
  for (int i = 0; i < LANES; ++i) one[i] = 1 << (first + i);
  return (splat_int((int32_t)bits) & one) != 0;
#endif
}

static inline vf select(vi where, vf yes, vf no) { return (vf)((where & (vi)yes) | (~where & (vi)no)); }

static inline vf round_even(vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_roundscale_ps((__m512)x, 0);
#elif defined(__AVX2__)
  return (vf)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: |x| stays far below
  return (x + magic) - magic;
#endif
}

constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: an integer added to its bits is that integer added to the number

// 2^x: NaN for NaN, exactly 0 for -inf. 6 terms err by 8e-8 of the result, 5 by 3e-6.
#if defined(__AVX512F__)
// 2^floor(x) comes from the scaling itself, the rest from a polynomial on [0, 1); no special case needs a look
template <int Terms>
static inline vf exp2_(vf x) {
  const vf f = (vf)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  vf p;
  if constexpr (Terms >= 6) {
    p = splat(1.8775766948238015e-3f);
    p = p * f + 8.989340625703335e-3f;
    p = p * f + 5.582631751894951e-2f;
    p = p * f + 2.4015361070632935e-1f;
    p = p * f + 6.931530833244324e-1f;
    p = p * f + 9.999999403953552e-1f;
  } else {
    p = splat(1.3534167781472206e-2f);
    p = p * f + 5.201146379113197e-2f;
    p = p * f + 2.414427548646927e-1f;
    p = p * f + 6.930038332939148e-1f;
    p = p * f + 1.0000026226043701f;
  }
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)x);
}
#else
constexpr float BIASED = MAGIC + 127.0f;  // the bits of n + BIASED end in those of the exponent of 2^n

// 2^n from n + BIASED, for n from -126 to 127; -127 gives 0
static inline vf power(vf above) { return (vf)((vi)above << 23); }

// (What lies below 2^-126.5 is 0. Just below 2^-126 lie denormal numbers, which cost a hundred times as much: what is masked must not
// become one on its way.)
template <int Terms>
static inline vf exp2_(vf x) {
  x = max_(splat(-127.0f), x);
  const vf above = x + BIASED, f = x - (above - BIASED);
  vf p;
  if constexpr (Terms >= 6) {
    p = splat(1.3276472454890609e-3f);
    p = p * f + 9.675541892647743e-3f;
    p = p * f + 5.550713092088699e-2f;
    p = p * f + 2.4022120237350464e-1f;
    p = p * f + 6.931469440460205e-1f;
    p = p * f + 1.0000001192092896f;
  } else {
    p = splat(9.570102207362652e-3f);
    p = p * f + 5.591786280274391e-2f;
    p = p * f + 2.40247443318367e-1f;
    p = p * f + 6.931217908859253e-1f;
    p = p * f + 9.999992847442627e-1f;
  }
  return p * power(above);
}

#endif

// Natural logarithm of a positive number; -inf, inf and NaN as they should be. Errs by a unit or two.
static inline float log_one(float x) {
  if (!(x > 0.0f && x < __builtin_inff())) return __builtin_logf(x);
  int32_t bits;
  memcpy(&bits, &x, 4);
  if (bits < 0x00800000) return __builtin_logf(x);
  // x = 2^e * y with y in [sqrt(1/2), sqrt(2)); log y = 2 atanh((y - 1) / (y + 1))
  const int32_t e = (bits - 0x3f3504f3) >> 23;
  bits -= e * (1 << 23);
  float y;
  memcpy(&y, &bits, 4);
  const float z = (y - 1.0f) / (y + 1.0f), w = z * z;
  const float series = ((0.2360336f * w + 0.28535636f) * w + 0.40000374f) * w + 0.66666665f;
  return (float)e * 0.693147180559945f + (z * w * series + 2.0f * z);
}

static inline float exp2_one(float x) { return exp2_<6>(splat(x))[0]; }

// 16-bit floats -------------------------------------------------------------------------------------------------------

static inline float from_bf16(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

static inline uint16_t to_bf16(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40u);
  return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline float from_f16(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, rest = h & 0x7fffu;
  float f;
  if (rest >= 0x7c00u) {
    const uint32_t bits = sign | 0x7f800000u | ((rest & 0x3ffu) << 13);
    memcpy(&f, &bits, 4);
    return f;
  }
  // a half's bits, moved up, are the number times 2^-112: denormals included
  const uint32_t bits = rest << 13;
  memcpy(&f, &bits, 4);
  f *= 5.192296858534828e33f;
  return sign ? -f : f;
#endif
}

static inline uint16_t to_f16(float f) {
#if defined(__F16C__)
  return (uint16_t)_cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT);
#else
  uint32_t bits;
  memcpy(&bits, &f, 4);
  const uint16_t sign = (uint16_t)((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
  if (bits >= 0x47800000u) return (uint16_t)(sign | 0x7c00u);
  if (bits < 0x38800000u) {
    // adding 0.5 rounds to the denormal grid of halves
    float m;
    memcpy(&m, &bits, 4);
    m += 0.5f;
    memcpy(&bits, &m, 4);
    return (uint16_t)(sign | (bits - 0x3f000000u));
  }
  bits += 0xc8000fffu + ((bits >> 13) & 1u);
  return (uint16_t)(sign | (bits >> 13));
#endif
}

static inline float read_one(const void* p, int64_t i, DType t) {
  switch (t) {
    case F32: return static_cast<const float*>(p)[i];
    case F16: return from_f16(static_cast<const uint16_t*>(p)[i]);
    case BF16: return from_bf16(static_cast<const uint16_t*>(p)[i]);
    default: return 0.0f;
  }
}

static inline void write_one(void* p, int64_t i, DType t, float x) {
  switch (t) {
    case F32: static_cast<float*>(p)[i] = x; break;
    case F16: static_cast<uint16_t*>(p)[i] = to_f16(x); break;
    case BF16: static_cast<uint16_t*>(p)[i] = to_bf16(x); break;
    default: break;
  }
}

// LANES consecutive numbers as floats
static inline vf load_as_float(const void* p, int64_t i, DType t) {
  if (t == F32) return load(static_cast<const float*>(p) + i);
  const uint16_t* h = static_cast<const uint16_t*>(p) + i;
#if defined(__AVX512F__)
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(h));
  if (t == BF16) return (vf)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
  return (vf)_mm512_cvtph_ps(raw);
#elif defined(__AVX2__)
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(h));
  if (t == BF16) return (vf)_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
  return (vf)_mm256_cvtph_ps(raw);
#else
  vf x;
  for (int l = 0; l < LANES; ++l) x[l] = read_one(h, l, t);
  return x;
#endif
}

// `n` numbers with a stride as floats, zeros up to `padded`
static inline void read_row(const void* p, int64_t stride, DType t, int n, int padded, float* out) {
  int i = 0;
  if (stride == 1)
    for (; i + LANES <= n; i += LANES) store(out + i, load_as_float(p, i, t));
  for (; i < n; ++i) out[i] = read_one(p, i * stride, t);
  for (; i < padded; ++i) out[i] = 0.0f;
}

static inline void write_row(const float* x, int n, void* p, int64_t stride, DType t) {
  int i = 0;
  if (stride == 1 && t == F32) {
    for (; i + LANES <= n; i += LANES) store(static_cast<float*>(p) + i, load(x + i));
  }
#if defined(__AVX2__) && !defined(__AVX512F__)
  if (stride == 1 && t == BF16)
    for (; i + 8 <= n; i += 8) {
      const vi bits = (vi)load(x + i), odd = (bits >> 16) & splat_int(1), number = ~((bits & splat_int(0x7fffffff)) > splat_int(0x7f800000));
      const vi rounded = (number & (bits + 0x7fff + odd)) | (~number & (bits | splat_int(0x400000)));
      const __m256i high = _mm256_srli_epi32((__m256i)rounded, 16);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(p) + i),
                       _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
    }
  if (stride == 1 && t == F16)
    for (; i + 8 <= n; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(p) + i), _mm256_cvtps_ph((__m256)load(x + i), _MM_FROUND_TO_NEAREST_INT));
#endif
#if defined(__AVX512BF16__)
  if (stride == 1 && t == BF16)
    for (; i + LANES <= n; i += LANES)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(p) + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + i)));
#endif
  for (; i < n; ++i) write_one(p, i * stride, t, x[i]);
}

}  // namespace SIEVE_LEVEL
}  // namespace sieve
