// Ternary products of few tokens. With AVX-512 every pair of input channels becomes a table of its 16 sums, and codes look them
// up; with AVX2 channels become digits that are multiplied as bytes; elsewhere trits are multiplied as floats.
// Integer forms multiply code bytes (trit + 1) and correct the sum.
#include "ternary.h"

#include "kernels/functions.h"
#include "kernels/gemm.h"
#include "kernels/ternary_codes.h"
#include "kernels/ternary_bytes.h"

namespace sieve {
namespace SIEVE_LEVEL {

#if defined(__AVX512F__)
constexpr int HEADER_FLOATS = 0, GROUP_FLOATS = 8 * 16;
#elif defined(__AVX2__)
constexpr int GROUP_FLOATS = 16 + sizeof(Small) / sizeof(float);  // the columns, or four digits of a byte for each; one entry of the list
#else
constexpr int HEADER_FLOATS = 0, GROUP_FLOATS = 16;  // the columns
#endif

int64_t ternary_table_floats(int64_t groups) { return HEADER_FLOATS + GROUP_FLOATS * groups; }

void ternary_tables(const float* x, int64_t groups, int64_t fewest, float* tables) {
  (void)fewest;
#if defined(__AVX512F__)
  // entry (4 * second + first) of a pair; products, so that 0 * inf is NaN as in a product with floats
  const __m512 low = _mm512_set_ps(2, 1, 0, -1, 2, 1, 0, -1, 2, 1, 0, -1, 2, 1, 0, -1);
  const __m512 high = _mm512_set_ps(2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0, -1, -1, -1, -1);
  for (int64_t g = 0; g < groups; ++g, x += 16, tables += GROUP_FLOATS)
    for (int j = 0; j < 8; ++j) {
      const int c = pair_column(j);
      _mm512_storeu_ps(tables + j * 16, _mm512_fmadd_ps(low, _mm512_set1_ps(x[c]), _mm512_mul_ps(high, _mm512_set1_ps(x[c + 4]))));
    }
#else
  float* to = tables + HEADER_FLOATS;
#if defined(__AVX2__)
  const Digits digits = digits_of(x, groups * 16, fewest, reinterpret_cast<int8_t*>(to), reinterpret_cast<Small*>(to + groups * 16), groups);
  memcpy(tables, &digits, sizeof(digits));
  if (digits.unit > 0.0) return;
#endif
  memcpy(to, x, sizeof(float) * groups * 16);
#endif
}

#if defined(__AVX512F__)
// What row block r reads 32 groups after group g; behind its end, what the call for the next R blocks begins with
template <int R>
static inline const char* ahead(const int32_t* codes, int64_t groups, int r, int64_t g) {
  const int64_t next = g + 32 < groups ? r * groups + g + 32 : (r + R) * groups + g + 32 - groups;
  return reinterpret_cast<const char*>(codes) + next * 64;
}

// R row blocks against T tokens
template <int R, int T>
static inline void look_up(const TernaryTask& t, int64_t block, int64_t token) {
  const int32_t* codes = t.codes + block * t.groups * 16;
  const float* tables = static_cast<const float*>(t.x) + token * t.x_stride;
  __m512 total[T][R];
  for (int i = 0; i < T; ++i)
    for (int r = 0; r < R; ++r) total[i][r] = _mm512_setzero_ps();
  for (int64_t g0 = 0; g0 < t.groups; g0 += FLUSH) {
    const int64_t stop = g0 + FLUSH < t.groups ? g0 + FLUSH : t.groups;
    __m512 part[T][R];
#pragma GCC unroll 8
    for (int i = 0; i < T; ++i)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) part[i][r] = _mm512_setzero_ps();
    for (int64_t g = g0; g < stop; ++g) {
      __m512i z[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        z[r] = _mm512_loadu_si512(codes + (r * t.groups + g) * 16);
        _mm_prefetch(ahead<R>(codes, t.groups, r, g), _MM_HINT_T0);
      }
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
#pragma GCC unroll 8
        for (int i = 0; i < T; ++i) {
          const __m512 table = _mm512_loadu_ps(tables + i * t.x_stride + g * GROUP_FLOATS + j * 16);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) part[i][r] = _mm512_add_ps(part[i][r], _mm512_permutexvar_ps(z[r], table));
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) z[r] = _mm512_srli_epi32(z[r], 4);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < T; ++i)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) total[i][r] = _mm512_add_ps(total[i][r], part[i][r]);
  }
  float* sums = static_cast<float*>(t.sums) + token * t.stride + block * 16;
  for (int i = 0; i < T; ++i)
    for (int r = 0; r < R; ++r) _mm512_storeu_ps(sums + i * t.stride + r * 16, total[i][r]);
}
#else
template <int R, int T>
static inline void look_up(const TernaryTask& t, int64_t block, int64_t token) {
  static_assert(R == 1 && T == 1, "one block at a time");
  const int32_t* codes = t.codes + block * t.groups * 16;
  const float* x = static_cast<const float*>(t.x) + token * t.x_stride + HEADER_FLOATS;
  float* sums = static_cast<float*>(t.sums) + token * t.stride + block * 16;
#if defined(__AVX2__)
  Digits digits;
  memcpy(&digits, x - HEADER_FLOATS, sizeof(digits));
  if (digits.unit > 0.0) return add_digits(t, digits, reinterpret_cast<const int8_t*>(x), block, sums);
#endif
  for (int part = 0; part < 16; part += LANES) {
    vf total = vf{};
    for (int64_t g0 = 0; g0 < t.groups; g0 += FLUSH) {
      const int64_t stop = g0 + FLUSH < t.groups ? g0 + FLUSH : t.groups;
      vf some = vf{};
      for (int64_t g = g0; g < stop; ++g) {
        const vi z = *reinterpret_cast<const vi_any*>(codes + g * 16 + part);
        for (int s = 0; s < 16; ++s) some += __builtin_convertvector(((z >> (2 * s)) & 3) - 1, vf) * x[g * 16 + column_of(s)];
      }
      total += some;
    }
    store(sums + part, total);
  }
}
#endif

template <int R, int T>
static inline int64_t look_up_blocks(const TernaryTask& t, int64_t block, int64_t token) {
  for (; block + R <= t.blocks; block += R) look_up<R, T>(t, block, token);
  return block;
}

void ternary_few(const TernaryTask& t) {
  int64_t token = 0;
#if defined(__AVX512F__)
  for (; token + 4 <= t.tokens; token += 4) look_up_blocks<1, 4>(t, look_up_blocks<2, 4>(t, 0, token), token);
  for (; token + 2 <= t.tokens; token += 2) look_up_blocks<1, 2>(t, look_up_blocks<4, 2>(t, 0, token), token);
  for (; token < t.tokens; ++token)
    look_up_blocks<1, 1>(t, look_up_blocks<2, 1>(t, look_up_blocks<8, 1>(t, 0, token), token), token);
#else
  for (; token < t.tokens; ++token) look_up_blocks<1, 1>(t, 0, token);
#endif
}

// 8 bits ----------------------------------------------------------------------------------------------------------------

// Codes of a token rounded to 8 bits under its own scale, which is returned; NaN where the token is not finite.
float ternary_round(const float* x, int64_t n, int8_t* q) {
  vf high = vf{};
  float most = 0.0f;
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    const vf y = load(x + i);
    high = max_(y, max_(-y, high));
  }
  for (; i < n; ++i) most = __builtin_fabsf(x[i]) > most ? __builtin_fabsf(x[i]) : most;
  for (int l = 0; l < LANES; ++l) most = high[l] > most ? high[l] : most;
  const bool finite = all_finite(x, n);
  const float scale = most / 127.0f, magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to even
  if (!finite || scale < 1.17549435e-38f) {                // a token of denormal numbers counts as zero
    memset(q, 0, n);
    return finite ? 0.0f : __builtin_nanf("");
  }
  // a division, because a product could be fused with the addition on some machines and round elsewhere
  for (i = 0; i + LANES <= n; i += LANES) {
    const vi whole = __builtin_convertvector((load(x + i) / scale + magic) - magic, vi);
    for (int l = 0; l < LANES; ++l) q[i + l] = (int8_t)whole[l];
  }
  for (; i < n; ++i) q[i] = (int8_t)(int32_t)((x[i] / scale + magic) - magic);
  return scale;
}

void ternary_write(const void* sums, bool integer, int64_t n, const float* alpha, int64_t alpha_stride, float scale, float* line,
                   void* out, int64_t stride, DType dtype) {
  const float* f = static_cast<const float*>(sums);
  const int32_t* whole = static_cast<const int32_t*>(sums);
  if (integer) {
    for (int64_t i = 0; i < n; ++i) line[i] = (float)whole[i];
    f = line;
  }
  if (alpha_stride) {
    for (int64_t i = 0; i < n; ++i) line[i] = f[i] * (alpha[i] * scale);
  } else {
    const float both = *alpha * scale;
    for (int64_t i = 0; i < n; ++i) line[i] = f[i] * both;
  }
  write_row(line, (int)n, out, stride, dtype);
}

static inline int32_t total_of(const int8_t* q, int64_t n) {
  int32_t sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += q[i];
  return sum;
}

#if defined(__AVX512BW__)
static inline __m512i dot_bytes(__m512i acc, __m512i codes, __m512i x) {
#if defined(__AVX512VNNI__)
  return _mm512_dpbusd_epi32(acc, codes, x);
#else
  return _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_maddubs_epi16(codes, x), _mm512_set1_epi16(1)));
#endif
}

template <int R, int T>
static inline void bytes(const TernaryTask& t, int64_t block, int64_t token) {
  const int32_t* codes = t.codes + block * t.groups * 16;
  const int8_t* x = static_cast<const int8_t*>(t.x) + token * t.x_stride;
  const __m512i low = _mm512_set1_epi32(0x03030303);
  __m512i acc[T][R];
  for (int i = 0; i < T; ++i)
    for (int r = 0; r < R; ++r) acc[i][r] = _mm512_set1_epi32(-total_of(x + i * t.x_stride, t.groups * 16));
  for (int64_t g = 0; g < t.groups; ++g) {
    __m512i z[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      z[r] = _mm512_loadu_si512(codes + (r * t.groups + g) * 16);
      _mm_prefetch(ahead<R>(codes, t.groups, r, g), _MM_HINT_T0);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 4
      for (int k = 0; k < T; ++k) {
        const __m512i y = _mm512_set1_epi32(four(x + k * t.x_stride + g * 16 + i * 4));
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[k][r] = dot_bytes(acc[k][r], _mm512_and_si512(_mm512_srli_epi32(z[r], 2 * i), low), y);
      }
    }
  }
  int32_t* sums = static_cast<int32_t*>(t.sums) + token * t.stride + block * 16;
  for (int i = 0; i < T; ++i)
    for (int r = 0; r < R; ++r) _mm512_storeu_si512(sums + i * t.stride + r * 16, acc[i][r]);
}
#elif defined(__AVX2__)
template <int R, int T>
static inline void bytes(const TernaryTask& t, int64_t block, int64_t token) {
  static_assert(R == 1, "one block at a time");
  const int8_t* x = static_cast<const int8_t*>(t.x) + token * t.x_stride;
  int32_t whole[T][16], *sums = static_cast<int32_t*>(t.sums) + token * t.stride + block * 16;
  multiply_bytes<T>(t.codes + block * t.groups * 16, t.groups, x, 16, 4, t.x_stride, whole);
  for (int i = 0; i < T; ++i) {
    const int32_t total = total_of(x + i * t.x_stride, t.groups * 16);
    for (int r = 0; r < 16; ++r) sums[i * t.stride + r] = whole[i][r] - total;
  }
}
#else
template <int R, int T>
static inline void bytes(const TernaryTask& t, int64_t block, int64_t token) {
  static_assert(R == 1 && T == 1, "one block at a time");
  const int32_t* codes = t.codes + block * t.groups * 16;
  const int8_t* x = static_cast<const int8_t*>(t.x) + token * t.x_stride;
  int32_t* sums = static_cast<int32_t*>(t.sums) + token * t.stride + block * 16;
  int32_t acc[16] = {};
  for (int64_t g = 0; g < t.groups; ++g)
    for (int s = 0; s < 16; ++s) {
      const int32_t y = x[g * 16 + column_of(s)];
      for (int r = 0; r < 16; ++r) acc[r] += ((int32_t)((uint32_t)codes[g * 16 + r] >> (2 * s) & 3u) - 1) * y;
    }
  memcpy(sums, acc, sizeof(acc));
}
#endif

template <int R, int T>
static inline int64_t bytes_blocks(const TernaryTask& t, int64_t block, int64_t token) {
  for (; block + R <= t.blocks; block += R) bytes<R, T>(t, block, token);
  return block;
}

void ternary_few_int8(const TernaryTask& t) {
  int64_t token = 0;
#if defined(__AVX512BW__)
  for (; token + 4 <= t.tokens; token += 4) bytes_blocks<1, 4>(t, bytes_blocks<2, 4>(t, 0, token), token);
  for (; token < t.tokens; ++token) bytes_blocks<1, 1>(t, bytes_blocks<8, 1>(t, 0, token), token);
#elif defined(__AVX2__)
  for (; token + 4 <= t.tokens; token += 4) bytes_blocks<1, 4>(t, 0, token);
  for (; token < t.tokens; ++token) bytes_blocks<1, 1>(t, 0, token);
#else
  for (; token < t.tokens; ++token) bytes_blocks<1, 1>(t, 0, token);
#endif
}

}  // namespace SIEVE_LEVEL
}  // namespace sieve
