// AVX-512 with its products of bytes, bf16 and bit matrices in software, put before every kernel of the levels above avx2 by
// -DSIEVE_EMULATE=avx512: their kernels can then be tested on machines that stop at AVX2. Only what the kernels use is here; a
// new intrinsic does not compile until it is added.
#pragma once
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#error "the compiler must not use AVX-512 itself where it is emulated"
#endif

namespace emulated_512 {

template <class T>
struct Lanes {
  static constexpr int COUNT = 64 / sizeof(T);
  T lane[COUNT];
  T& operator[](int i) { return lane[i]; }
  const T& operator[](int i) const { return lane[i]; }
};

template <class To, class From>
inline To bits_of(const From& x) {
  static_assert(sizeof(To) == sizeof(From), "the same bits as another type");
  To y;
  memcpy(&y, &x, sizeof(y));
  return y;
}

template <class T, class V>
inline Lanes<T> lanes(V x) { return bits_of<Lanes<T>>(x); }

// Halves and quarters, which AVX2 works on
template <class Half>
struct Two {
  Half low, high;
};
template <class Half, class V>
inline Two<Half> halves(V x) { return bits_of<Two<Half>>(x); }

template <class V, class Half, class Act>
inline V by_halves(V a, V b, Act act) {
  const Two<Half> x = halves<Half>(a), y = halves<Half>(b);
  return bits_of<V>(Two<Half>{act(x.low, y.low), act(x.high, y.high)});
}
template <class V, class Half, class Act>
inline V by_halves(V a, Act act) {
  const Two<Half> x = halves<Half>(a);
  return bits_of<V>(Two<Half>{act(x.low), act(x.high)});
}

template <class V, class T, class Act>
inline V each(V a, Act act) {
  Lanes<T> x = lanes<T>(a);
  for (T& e : x.lane) e = act(e);
  return bits_of<V>(x);
}

template <class T, class V, class Holds>
inline uint64_t mask_where(V a, V b, Holds holds) {
  const Lanes<T> x = lanes<T>(a), y = lanes<T>(b);
  uint64_t mask = 0;
  for (int i = 0; i < Lanes<T>::COUNT; ++i) mask |= (uint64_t)holds(x[i], y[i]) << i;
  return mask;
}

// `yes` where the mask has a bit, else `no`
template <class T, class V>
inline V blend(uint64_t mask, V yes, V no) {
  const Lanes<T> x = lanes<T>(yes);
  Lanes<T> y = lanes<T>(no);
  for (int i = 0; i < Lanes<T>::COUNT; ++i)
    if (mask >> i & 1) y[i] = x[i];
  return bits_of<V>(y);
}

// Arithmetic, two halves at a time
#define SIEVE_HALVES_2(name, V, Half, half) \
  inline V name(V a, V b) { return by_halves<V, Half>(a, b, [](Half x, Half y) { return half(x, y); }); }
SIEVE_HALVES_2(add_ps, __m512, __m256, _mm256_add_ps)
SIEVE_HALVES_2(sub_ps, __m512, __m256, _mm256_sub_ps)
SIEVE_HALVES_2(mul_ps, __m512, __m256, _mm256_mul_ps)
SIEVE_HALVES_2(max_ps, __m512, __m256, _mm256_max_ps)
SIEVE_HALVES_2(min_ps, __m512, __m256, _mm256_min_ps)
SIEVE_HALVES_2(unpacklo_ps, __m512, __m256, _mm256_unpacklo_ps)
SIEVE_HALVES_2(unpackhi_ps, __m512, __m256, _mm256_unpackhi_ps)
SIEVE_HALVES_2(unpacklo_pd, __m512d, __m256d, _mm256_unpacklo_pd)
SIEVE_HALVES_2(unpackhi_pd, __m512d, __m256d, _mm256_unpackhi_pd)
SIEVE_HALVES_2(add_epi8, __m512i, __m256i, _mm256_add_epi8)
SIEVE_HALVES_2(sub_epi8, __m512i, __m256i, _mm256_sub_epi8)
SIEVE_HALVES_2(add_epi32, __m512i, __m256i, _mm256_add_epi32)
SIEVE_HALVES_2(and_si512, __m512i, __m256i, _mm256_and_si256)
SIEVE_HALVES_2(or_si512, __m512i, __m256i, _mm256_or_si256)
SIEVE_HALVES_2(maddubs_epi16, __m512i, __m256i, _mm256_maddubs_epi16)
SIEVE_HALVES_2(madd_epi16, __m512i, __m256i, _mm256_madd_epi16)
SIEVE_HALVES_2(shuffle_epi8, __m512i, __m256i, _mm256_shuffle_epi8)
SIEVE_HALVES_2(unpacklo_epi8, __m512i, __m256i, _mm256_unpacklo_epi8)
SIEVE_HALVES_2(unpackhi_epi8, __m512i, __m256i, _mm256_unpackhi_epi8)
SIEVE_HALVES_2(unpacklo_epi16, __m512i, __m256i, _mm256_unpacklo_epi16)
SIEVE_HALVES_2(unpackhi_epi16, __m512i, __m256i, _mm256_unpackhi_epi16)
SIEVE_HALVES_2(unpacklo_epi32, __m512i, __m256i, _mm256_unpacklo_epi32)
SIEVE_HALVES_2(unpackhi_epi32, __m512i, __m256i, _mm256_unpackhi_epi32)
SIEVE_HALVES_2(unpacklo_epi64, __m512i, __m256i, _mm256_unpacklo_epi64)
SIEVE_HALVES_2(unpackhi_epi64, __m512i, __m256i, _mm256_unpackhi_epi64)
#undef SIEVE_HALVES_2

inline __m512 sqrt_ps(__m512 a) { return by_halves<__m512, __m256>(a, [](__m256 x) { return _mm256_sqrt_ps(x); }); }
inline __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  const Two<__m256> x = halves<__m256>(a), y = halves<__m256>(b), z = halves<__m256>(c);
  return bits_of<__m512>(Two<__m256>{_mm256_fmadd_ps(x.low, y.low, z.low), _mm256_fmadd_ps(x.high, y.high, z.high)});
}
inline __m512i srli_epi32(__m512i a, unsigned n) { return by_halves<__m512i, __m256i>(a, [=](__m256i x) { return _mm256_srli_epi32(x, (int)n); }); }
inline __m512i slli_epi32(__m512i a, unsigned n) { return by_halves<__m512i, __m256i>(a, [=](__m256i x) { return _mm256_slli_epi32(x, (int)n); }); }
inline __m512i srli_epi16(__m512i a, unsigned n) { return by_halves<__m512i, __m256i>(a, [=](__m256i x) { return _mm256_srli_epi16(x, (int)n); }); }

// Constants
template <class V, class T>
inline V filled(T x) {
  Lanes<T> y;
  for (T& e : y.lane) e = x;
  return bits_of<V>(y);
}
inline __m512 set1_ps(float x) { return filled<__m512>(x); }
inline __m512i set1_epi8(char x) { return filled<__m512i>((int8_t)x); }
inline __m512i set1_epi16(short x) { return filled<__m512i>((int16_t)x); }
inline __m512i set1_epi32(int x) { return filled<__m512i>((int32_t)x); }
inline __m512i set1_epi64(long long x) { return filled<__m512i>((int64_t)x); }
inline __m512i maskz_set1_epi8(__mmask64 mask, char x) { return blend<int8_t>(mask, set1_epi8(x), set1_epi8(0)); }
// the last argument is the lowest lane
template <class V, class T, class... Xs>
inline V listed(Xs... xs) {
  const Lanes<T> given{{(T)xs...}};
  static_assert(sizeof...(Xs) == Lanes<T>::COUNT, "a number for every lane");
  Lanes<T> y;
  for (int i = 0; i < Lanes<T>::COUNT; ++i) y[i] = given[Lanes<T>::COUNT - 1 - i];
  return bits_of<V>(y);
}

// Memory
template <class V>
inline V load(const void* p) {
  V x;
  memcpy(&x, p, 64);
  return x;
}
template <class V>
inline void store(void* p, V x) { memcpy(p, &x, 64); }
template <class V, class T>
inline V load_some(uint64_t mask, const void* p) {
  constexpr int COUNT = sizeof(V) / sizeof(T);
  T lane[COUNT] = {};
  for (int i = 0; i < COUNT; ++i)
    if (mask >> i & 1) memcpy(lane + i, static_cast<const T*>(p) + i, sizeof(T));
  V x;
  memcpy(&x, lane, sizeof(V));
  return x;
}
inline void mask_storeu_ps(void* p, __mmask16 mask, __m512 x) {
  const Lanes<float> y = lanes<float>(x);
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) memcpy(static_cast<float*>(p) + i, &y[i], 4);
}

// Quarters of 128 bits
typedef Lanes<__int128> Quarters;
template <class V>
inline V shuffle_quarters(V a, V b, int order) {
  const Quarters x = bits_of<Quarters>(a), y = bits_of<Quarters>(b);
  return bits_of<V>(Quarters{{x[order & 3], x[order >> 2 & 3], y[order >> 4 & 3], y[order >> 6 & 3]}});
}
template <class V, class Quarter>
inline V insert_quarter(V a, Quarter b, int where) {
  Quarters x = bits_of<Quarters>(a);
  x[where & 3] = bits_of<__int128>(b);
  return bits_of<V>(x);
}
template <class V, class Quarter>
inline V four_times(Quarter a) {
  const __int128 x = bits_of<__int128>(a);
  return bits_of<V>(Quarters{{x, x, x, x}});
}
template <class V, class Quarter>
inline V lowest_quarter(Quarter a) { return bits_of<V>(Quarters{{bits_of<__int128>(a), 0, 0, 0}}); }
inline __m512 shuffle_ps(__m512 a, __m512 b, int order) {
  const Lanes<float> x = lanes<float>(a), y = lanes<float>(b);
  Lanes<float> z;
  for (int i = 0; i < 16; i += 4) {
    z[i] = x[i + (order & 3)];
    z[i + 1] = x[i + (order >> 2 & 3)];
    z[i + 2] = y[i + (order >> 4 & 3)];
    z[i + 3] = y[i + (order >> 6 & 3)];
  }
  return bits_of<__m512>(z);
}
template <class V>
inline V permute(__m512i order, V a) {
  const Lanes<uint32_t> at = lanes<uint32_t>(order), x = lanes<uint32_t>(a);
  Lanes<uint32_t> y;
  for (int i = 0; i < 16; ++i) y[i] = x[at[i] & 15];
  return bits_of<V>(y);
}
inline __m512i permute_two(__m512i a, __m512i order, __m512i b) {
  const Lanes<uint32_t> at = lanes<uint32_t>(order), x = lanes<uint32_t>(a), z = lanes<uint32_t>(b);
  Lanes<uint32_t> y;
  for (int i = 0; i < 16; ++i) y[i] = at[i] & 16 ? z[at[i] & 15] : x[at[i] & 15];
  return bits_of<__m512i>(y);
}
inline __m256 half_of(__m512 a, int which) { return which ? halves<__m256>(a).high : halves<__m256>(a).low; }

// Reductions, in the order of GCC's own
template <class Act>
inline float reduced(__m512 a, Act act) {
  Lanes<float> x = lanes<float>(a);
  for (int n = 8; n; n /= 2)
    for (int i = 0; i < n; ++i) x[i] = act(x[i + n], x[i]);
  return x[0];
}
inline float reduce_add_ps(__m512 a) { return reduced(a, [](float x, float y) { return x + y; }); }
inline float reduce_max_ps(__m512 a) { return reduced(a, [](float x, float y) { return x > y ? x : y; }); }

// Rounding and scaling
inline __m512 roundscale_ps(__m512 a, int how) {
  if (how & 0xf4) __builtin_trap();  // digits behind the point, or a mode from elsewhere
  return each<__m512, float>(a, [=](float x) {
    const int mode = how & 3;
    return mode == 0 ? nearbyintf(x) : mode == 1 ? floorf(x) : mode == 2 ? ceilf(x) : truncf(x);
  });
}
inline __m512 rest_ps(__m512 a, int how) {
  return each<__m512, float>(a, [=](float x) {
    if (x - x != 0.0f) return x == x ? 0.0f : x;
    return x - lanes<float>(roundscale_ps(set1_ps(x), how & 7))[0];
  });
}
inline __m512 scalef_ps(__m512 a, __m512 b) {
  Lanes<float> x = lanes<float>(a);
  const Lanes<float> y = lanes<float>(b);
  for (int i = 0; i < 16; ++i) {
    const float by = floorf(y[i]);
    if (x[i] != x[i]) continue;
    if (by != by)
      x[i] = by;
    else if (by - by != 0.0f)
      x[i] = by > 0.0f ? x[i] * by : x[i] == INFINITY ? NAN : 0.0f * x[i];
    else
      x[i] = ldexpf(x[i], (int)fmaxf(fminf(by, 1000.0f), -1000.0f));
  }
  return bits_of<__m512>(x);
}

// Comparisons
inline __mmask16 cmp_ps_mask(__m512 a, __m512 b, int how) {
  return (__mmask16)mask_where<float>(a, b, [=](float x, float y) {
    switch (how) {
      case _CMP_EQ_OQ: return x == y;
      case _CMP_GT_OQ: return x > y;
      case _CMP_NLE_UQ: return !(x <= y);
      case _CMP_NLT_UQ: return !(x < y);
      case _CMP_UNORD_Q: return x != x || y != y;
      default: __builtin_trap();
    }
  });
}
inline __mmask16 cmpgt_epi32_mask(__m512i a, __m512i b) {
  return (__mmask16)mask_where<int32_t>(a, b, [](int32_t x, int32_t y) { return x > y; });
}
inline __mmask64 test_epi8_mask(__m512i a, __m512i b) {
  return mask_where<uint8_t>(a, b, [](uint8_t x, uint8_t y) { return (x & y) != 0; });
}
inline __mmask16 test_epi32_mask(__m512i a, __m512i b) {
  return (__mmask16)mask_where<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return (x & y) != 0; });
}
inline __m512i movm_epi32(__mmask16 mask) { return blend<int32_t>(mask, set1_epi32(-1), set1_epi32(0)); }
inline __m512i mask_or_epi32(__m512i no, __mmask16 mask, __m512i a, __m512i b) { return blend<int32_t>(mask, or_si512(a, b), no); }
inline __m512i mask_add_epi8(__m512i no, __mmask64 mask, __m512i a, __m512i b) { return blend<int8_t>(mask, add_epi8(a, b), no); }
inline __m512 maskz_sub_ps(__mmask16 mask, __m512 a, __m512 b) { return blend<float>(mask, sub_ps(a, b), set1_ps(0.0f)); }
inline __m128i mask_mov_epi8(__m128i no, __mmask16 mask, __m128i yes) {
  uint8_t x[16], y[16];
  memcpy(x, &no, 16);
  memcpy(y, &yes, 16);
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) x[i] = y[i];
  return bits_of<__m128i>(x);
}

// Conversions
template <class Narrow, class Out>
inline Out narrowed(__m512i a) {
  const Lanes<uint32_t> x = lanes<uint32_t>(a);
  Narrow y[16];
  for (int i = 0; i < 16; ++i) y[i] = (Narrow)x[i];
  return bits_of<Out>(y);
}
template <class Narrow, class In>
inline __m512i widened(In a) {
  Narrow x[16];
  memcpy(x, &a, sizeof(x));
  Lanes<int32_t> y;
  for (int i = 0; i < 16; ++i) y[i] = (int32_t)x[i];
  return bits_of<__m512i>(y);
}
inline __m512i cvtps_epi32(__m512 a) { return bits_of<__m512i>(by_halves<__m512, __m256>(a, [](__m256 x) { return _mm256_castsi256_ps(_mm256_cvtps_epi32(x)); })); }
inline __m512 cvtepi32_ps(__m512i a) { return by_halves<__m512, __m256>(bits_of<__m512>(a), [](__m256 x) { return _mm256_cvtepi32_ps(_mm256_castps_si256(x)); }); }
inline __m256i cvtps_ph(__m512 a, int how) {
  if (how != _MM_FROUND_TO_NEAREST_INT) __builtin_trap();
  const Two<__m256> x = halves<__m256>(a);
  return _mm256_set_m128i(_mm256_cvtps_ph(x.high, _MM_FROUND_TO_NEAREST_INT), _mm256_cvtps_ph(x.low, _MM_FROUND_TO_NEAREST_INT));
}
inline __m512 cvtph_ps(__m256i a) {
  return bits_of<__m512>(Two<__m256>{_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1))});
}
inline uint16_t bf16_of(float x) {
  uint32_t b = bits_of<uint32_t>(x);
  if (x != x) return (uint16_t)(b >> 16 | 0x40);
  if (!(b & 0x7f800000u)) return (uint16_t)(b >> 16 & 0x8000u);  // denormal numbers count as zero
  return (uint16_t)((b + 0x7fffu + (b >> 16 & 1)) >> 16);
}
inline __m256i cvtneps_pbh(__m512 a) {
  const Lanes<float> x = lanes<float>(a);
  uint16_t y[16];
  for (int i = 0; i < 16; ++i) y[i] = bf16_of(x[i]);
  return bits_of<__m256i>(y);
}
inline __m512i cvtne2ps_pbh(__m512 high, __m512 low) { return bits_of<__m512i>(Two<__m256i>{cvtneps_pbh(low), cvtneps_pbh(high)}); }

inline float normal(float x) { return bits_of<uint32_t>(x) & 0x7f800000u ? x : bits_of<float>(bits_of<uint32_t>(x) & 0x80000000u); }
inline __m512 dpbf16_ps(__m512 sum, __m512i a, __m512i b) {
  Lanes<float> total = lanes<float>(sum);
  const Lanes<uint16_t> x = lanes<uint16_t>(a), y = lanes<uint16_t>(b);
  const auto number = [](uint16_t h) { return normal(bits_of<float>((uint32_t)h << 16)); };
  for (int i = 0; i < 16; ++i)
    for (int half = 1; half >= 0; --half)  // the upper product first; denormal numbers count as zero
      total[i] = normal(__builtin_fmaf(number(x[2 * i + half]), number(y[2 * i + half]), normal(total[i])));
  return bits_of<__m512>(total);
}

// Products of bytes and of bit matrices
inline __m512i dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
  Lanes<int32_t> total = lanes<int32_t>(sum);
  const Lanes<uint8_t> x = lanes<uint8_t>(a);
  const Lanes<int8_t> y = lanes<int8_t>(b);
  for (int i = 0; i < 64; ++i) total[i / 4] += (int32_t)x[i] * y[i];
  return bits_of<__m512i>(total);
}
inline __m512i gf2p8affine_epi64_epi8(__m512i a, __m512i matrices, int plus) {
  const Lanes<uint8_t> x = lanes<uint8_t>(a), m = lanes<uint8_t>(matrices);
  Lanes<uint8_t> y;
  for (int i = 0; i < 64; ++i) {
    y[i] = (uint8_t)plus;
    for (int bit = 0; bit < 8; ++bit) y[i] ^= (uint8_t)(__builtin_parity(m[i / 8 * 8 + 7 - bit] & x[i]) << bit);
  }
  return bits_of<__m512i>(y);
}

}  // namespace emulated_512

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1
#if defined(SIEVE_EMULATE_VNNI)
#define __AVX512VNNI__ 1
#define __AVX512BF16__ 1
#define __AVX512VBMI__ 1
#define __GFNI__ 1
#endif

#include "emulated_avx512_names.h"
