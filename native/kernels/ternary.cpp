// Ternary products of few tokens. With AVX-512 every pair of input channels becomes a table of its 16 sums, and codes look them
// up; elsewhere codes look up their trits.
// Integer forms multiply code bytes (trit + 1) and correct the sum.
#include "ternary.h"

#include "kernels/functions.h"
#include "kernels/gemm.h"
#include "kernels/ternary_codes.h"

namespace sieve {
namespace SIEVE_LEVEL {

#if defined(__AVX512F__)
constexpr int TABLE_FLOATS = 8 * 16;
#else
constexpr int TABLE_FLOATS = 16;  // the columns in the order of their slots
#endif

int64_t ternary_table_floats() { return TABLE_FLOATS; }

void ternary_tables(const float* x, int64_t groups, float* tables) {
  for (int64_t g = 0; g < groups; ++g, x += 16, tables += TABLE_FLOATS) {
#if defined(__AVX512F__)
    // entry (4 * second + first) of a pair; products, so that 0 * inf is NaN as in a product with floats
    const __m512 low = _mm512_set_ps(2, 1, 0, -1, 2, 1, 0, -1, 2, 1, 0, -1, 2, 1, 0, -1);
    const __m512 high = _mm512_set_ps(2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0, -1, -1, -1, -1);
    for (int j = 0; j < 8; ++j) {
      const int c = pair_column(j);
      _mm512_storeu_ps(tables + j * 16, _mm512_fmadd_ps(low, _mm512_set1_ps(x[c]), _mm512_mul_ps(high, _mm512_set1_ps(x[c + 4]))));
    }
#else
    for (int s = 0; s < 16; ++s) tables[s] = x[column_of(s)];
#endif
  }
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
          const __m512 table = _mm512_loadu_ps(tables + i * t.x_stride + g * TABLE_FLOATS + j * 16);
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
#elif defined(__AVX2__)
// One group: part += weight * x. A word's next byte is read from the next address rather than shifted there, since shifts and
// look-ups share two ports; behind the last word nothing may be read.
template <int R, int T, bool Last>
static inline __attribute__((always_inline)) void add_group(const int32_t* codes, int64_t groups, const float* x, int64_t x_stride, __m256 part[T][2 * R]) {
  const __m256 trits = _mm256_setr_ps(-1, 0, 1, 2, -1, 0, 1, 2);
#pragma GCC unroll 4
  for (int b = 0; b < 4; ++b) {
    __m256i z[2 * R];
#pragma GCC unroll 8
    for (int r = 0; r < 2 * R; ++r) {
      const char* from = reinterpret_cast<const char*>(codes + r / 2 * groups * 16 + r % 2 * 8);
      z[r] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + (Last ? 0 : b)));
      if (Last && b) z[r] = _mm256_srli_epi32(z[r], 8 * b);
    }
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) {
      __m256 y[T];
#pragma GCC unroll 2
      for (int i = 0; i < T; ++i) y[i] = _mm256_broadcast_ss(x + i * x_stride + 4 * b + s);
#pragma GCC unroll 8
      for (int r = 0; r < 2 * R; ++r) {
        const __m256 weight = _mm256_permutevar_ps(trits, s ? _mm256_srli_epi32(z[r], 2 * s) : z[r]);
#pragma GCC unroll 2
        for (int i = 0; i < T; ++i) part[i][r] = _mm256_fmadd_ps(y[i], weight, part[i][r]);
      }
    }
  }
}

template <int R, int T>
static inline void look_up(const TernaryTask& t, int64_t block, int64_t token) {
  const int32_t* codes = t.codes + block * t.groups * 16;
  const float* x = static_cast<const float*>(t.x) + token * t.x_stride;
  float* sums = static_cast<float*>(t.sums) + token * t.stride + block * 16;
  for (int i = 0; i < T; ++i)
    for (int r = 0; r < 2 * R; ++r) _mm256_storeu_ps(sums + i * t.stride + r * 8, _mm256_setzero_ps());
  for (int64_t g0 = 0; g0 < t.groups; g0 += FLUSH) {
    const int64_t stop = g0 + FLUSH < t.groups ? g0 + FLUSH : t.groups;
    __m256 part[T][2 * R];
#pragma GCC unroll 2
    for (int i = 0; i < T; ++i)
#pragma GCC unroll 8
      for (int r = 0; r < 2 * R; ++r) part[i][r] = _mm256_setzero_ps();
    int64_t g = g0;
    for (; g < stop && g + 1 < t.groups; ++g) add_group<R, T, false>(codes + g * 16, t.groups, x + g * 16, t.x_stride, part);
    if (g < stop) add_group<R, T, true>(codes + g * 16, t.groups, x + g * 16, t.x_stride, part);
#pragma GCC unroll 2
    for (int i = 0; i < T; ++i)
#pragma GCC unroll 8
      for (int r = 0; r < 2 * R; ++r) {
        float* sum = sums + i * t.stride + r * 8;
        _mm256_storeu_ps(sum, _mm256_add_ps(_mm256_loadu_ps(sum), part[i][r]));
      }
  }
}
#else
template <int R, int T>
static inline void look_up(const TernaryTask& t, int64_t block, int64_t token) {
  static_assert(R == 1 && T == 1, "one block at a time");
  const int32_t* codes = t.codes + block * t.groups * 16;
  const float* x = static_cast<const float*>(t.x) + token * t.x_stride;
  float* sums = static_cast<float*>(t.sums) + token * t.stride + block * 16;
  for (int part = 0; part < 16; part += LANES) {
    vf total = vf{};
    for (int64_t g0 = 0; g0 < t.groups; g0 += FLUSH) {
      const int64_t stop = g0 + FLUSH < t.groups ? g0 + FLUSH : t.groups;
      vf some = vf{};
      for (int64_t g = g0; g < stop; ++g) {
        const vi z = *reinterpret_cast<const vi_any*>(codes + g * 16 + part);
        for (int s = 0; s < 16; ++s) some += __builtin_convertvector(((z >> (2 * s)) & 3) - 1, vf) * x[g * 16 + s];
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
#elif defined(__AVX2__)
  for (; token + 2 <= t.tokens; token += 2) look_up_blocks<1, 2>(t, look_up_blocks<2, 2>(t, 0, token), token);
  for (; token < t.tokens; ++token) look_up_blocks<1, 1>(t, look_up_blocks<2, 1>(t, 0, token), token);
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

static inline int32_t four(const int8_t* q) {
  int32_t word;
  memcpy(&word, q, 4);
  return word;
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
  static_assert(R == 1 && T == 1, "one block at a time");
  const int32_t* codes = t.codes + block * t.groups * 16;
  const int8_t* x = static_cast<const int8_t*>(t.x) + token * t.x_stride;
  const __m256i low = _mm256_set1_epi32(0x03030303), one = _mm256_set1_epi16(1);
  __m256i acc[2];
  for (int h = 0; h < 2; ++h) acc[h] = _mm256_set1_epi32(-total_of(x, t.groups * 16));
  for (int64_t g = 0; g < t.groups; ++g)
    for (int h = 0; h < 2; ++h) {
      const __m256i z = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + g * 16 + h * 8));
      __m256i some = _mm256_setzero_si256();
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        some = _mm256_add_epi16(some, _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi32(z, 2 * i), low),
                                                           _mm256_set1_epi32(four(x + g * 16 + i * 4))));
      acc[h] = _mm256_add_epi32(acc[h], _mm256_madd_epi16(some, one));
    }
  int32_t* sums = static_cast<int32_t*>(t.sums) + token * t.stride + block * 16;
  for (int h = 0; h < 2; ++h) _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + h * 8), acc[h]);
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
#else
  for (; token < t.tokens; ++token) bytes_blocks<1, 1>(t, 0, token);
#endif
}

}  // namespace SIEVE_LEVEL
}  // namespace sieve
