// Ternary products of few tokens. Every pair of input channels becomes a table of its 16 sums, and codes look them up: floats with
// AVX-512, bytes of whole numbers with AVX2; elsewhere trits are multiplied as floats. Integer forms multiply code bytes (trit + 1)
// and correct the sum.
#include "ternary.h"

#include "kernels/functions.h"
#include "kernels/gemm.h"
#include "kernels/ternary_codes.h"
#include "kernels/ternary_planes.h"

namespace sieve {
namespace SIEVE_LEVEL {

#if defined(__AVX512F__)
constexpr int HEADER_FLOATS = 0, GROUP_FLOATS = 8 * 16;
#elif defined(__AVX2__)
constexpr int GROUP_FLOATS = MOST_PLANES * 32 + sizeof(Small) / sizeof(float);  // tables of planes, or the columns; one entry of the list
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
  const Planes made = planes_of(x, groups, fewest, reinterpret_cast<uint8_t*>(to));
  memcpy(tables, &made, sizeof(made));
  if (made.unit > 0.0) return;
#endif
  memcpy(to, x, sizeof(float) * groups * 16);
#endif
}

#if defined(__AVX512F__)
// What row block b reads 16 groups after group g; behind its end, what the call for the next B blocks begins with
template <int B>
static inline const uint8_t* ahead(const uint8_t* codes, int64_t groups, int b, int64_t g) {
  return codes + (g + 16 < groups ? b * groups + g + 16 : (b + B) * groups + g + 16 - groups) * TERNARY_BYTES;
}

template <int B>
static inline void read_words(const uint8_t* codes, int64_t groups, int64_t g, __m512i z[2 * B]) {
#pragma GCC unroll 8
  for (int b = 0; b < B; ++b) {
    row_words(codes + (b * groups + g) * TERNARY_BYTES, z + 2 * b);
    const uint8_t* next = ahead<B>(codes, groups, b, g);
    _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(next + 64), _MM_HINT_T0);
  }
}

// B row blocks against T tokens
template <int B, int T>
static inline void look_up(const TernaryTask& t, int64_t block, int64_t token) {
  constexpr int R = 2 * B;
  const uint8_t* codes = code_bytes(t, block);
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
      read_words<B>(codes, t.groups, g, z);
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
  float* sums = static_cast<float*>(t.sums) + token * t.stride + block * TERNARY_ROWS;
  for (int i = 0; i < T; ++i)
    for (int r = 0; r < R; ++r) _mm512_storeu_ps(sums + i * t.stride + r * 16, total[i][r]);
}
#else
template <int B, int T>
static inline void look_up(const TernaryTask& t, int64_t block, int64_t token) {
  static_assert(B == 1 && T == 1, "one block at a time");
  const uint8_t* codes = code_bytes(t, block);
  const float* x = static_cast<const float*>(t.x) + token * t.x_stride + HEADER_FLOATS;
  float* sums = static_cast<float*>(t.sums) + token * t.stride + block * TERNARY_ROWS;
#if defined(__AVX2__)
  Planes made;
  memcpy(&made, x - HEADER_FLOATS, sizeof(made));
  if (made.unit > 0.0) return add_planes(made, codes, t.groups, reinterpret_cast<const uint8_t*>(x), sums);
#endif
  for (int row = 0; row < TERNARY_ROWS; row += LANES) {
    vf total = vf{};
    for (int64_t g0 = 0; g0 < t.groups; g0 += FLUSH) {
      const int64_t stop = g0 + FLUSH < t.groups ? g0 + FLUSH : t.groups;
      vf some = vf{};
      for (int64_t g = g0; g < stop; ++g)
        for (int b = 0; b < 4; ++b) {
          const vi z = rows_of_bytes(codes + g * TERNARY_BYTES + b * TERNARY_ROWS + row);
          for (int i = 0; i < 4; ++i) some += trits(z, i) * x[g * 16 + 4 * i + b];
        }
      total += some;
    }
    store(sums + row, total);
  }
}
#endif

template <int B, int T>
static inline int64_t look_up_blocks(const TernaryTask& t, int64_t block, int64_t token) {
  for (; block + B <= t.blocks; block += B) look_up<B, T>(t, block, token);
  return block;
}

void ternary_few(const TernaryTask& t) {
  int64_t token = 0;
#if defined(__AVX512F__)
  for (; token + 4 <= t.tokens; token += 4) look_up_blocks<1, 4>(t, 0, token);
  for (; token + 2 <= t.tokens; token += 2) look_up_blocks<1, 2>(t, look_up_blocks<2, 2>(t, 0, token), token);
  for (; token < t.tokens; ++token) look_up_blocks<1, 1>(t, look_up_blocks<4, 1>(t, 0, token), token);
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

static inline int32_t four(const int8_t* q) {
  int32_t word;
  memcpy(&word, q, 4);
  return word;
}

template <int B, int T>
static inline void bytes(const TernaryTask& t, int64_t block, int64_t token) {
  constexpr int R = 2 * B;
  const uint8_t* codes = code_bytes(t, block);
  const int8_t* x = static_cast<const int8_t*>(t.x) + token * t.x_stride;
  const __m512i low = _mm512_set1_epi32(0x03030303);
  __m512i acc[T][R];
  for (int i = 0; i < T; ++i)
    for (int r = 0; r < R; ++r) acc[i][r] = _mm512_set1_epi32(-total_of(x + i * t.x_stride, t.groups * 16));
  for (int64_t g = 0; g < t.groups; ++g) {
    __m512i z[R];
    read_words<B>(codes, t.groups, g, z);
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
  int32_t* sums = static_cast<int32_t*>(t.sums) + token * t.stride + block * TERNARY_ROWS;
  for (int i = 0; i < T; ++i)
    for (int r = 0; r < R; ++r) _mm512_storeu_si512(sums + i * t.stride + r * 16, acc[i][r]);
}
#elif defined(__AVX2__)
// Two columns' bytes of a row lie side by side where two vectors of rows are interleaved, as products of bytes want them.
template <int B, int T>
static inline void bytes(const TernaryTask& t, int64_t block, int64_t token) {
  static_assert(B == 1, "one block at a time");
  constexpr int GROUPS = 8;  // of 8 sums of two codes up to 2 times bytes: so many fit 16 bits
  const uint8_t* codes = code_bytes(t, block);
  const int8_t* x = static_cast<const int8_t*>(t.x) + token * t.x_stride;
  const __m256i low = _mm256_set1_epi8(3);
  int32_t* sums = static_cast<int32_t*>(t.sums) + token * t.stride + block * TERNARY_ROWS;
  for (int i = 0; i < T; ++i) {
    const int32_t total = total_of(x + i * t.x_stride, t.groups * 16);
    for (int r = 0; r < TERNARY_ROWS; ++r) sums[i * t.stride + r] = -total;
  }
  for (int64_t g0 = 0; g0 < t.groups; g0 += GROUPS) {
    const int64_t stop = g0 + GROUPS < t.groups ? g0 + GROUPS : t.groups;
    __m256i part[T][2];  // rows 0 to 7 and 16 to 23, rows 8 to 15 and 24 to 31
#pragma GCC unroll 4
    for (int k = 0; k < T; ++k) part[k][0] = part[k][1] = _mm256_setzero_si256();
    for (int64_t g = g0; g < stop; ++g) {
      const uint8_t* here = codes + g * TERNARY_BYTES;
      _mm_prefetch(reinterpret_cast<const char*>(here + 2048), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(here + 2112), _MM_HINT_T0);
#pragma GCC unroll 2
      for (int b = 0; b < 4; b += 2) {
        const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(here + b * TERNARY_ROWS));
        const __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(here + (b + 1) * TERNARY_ROWS));
        const __m256i z0 = _mm256_unpacklo_epi8(first, second), z1 = _mm256_unpackhi_epi8(first, second);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const __m256i c0 = _mm256_and_si256(i ? _mm256_srli_epi16(z0, 2 * i) : z0, low);
          const __m256i c1 = _mm256_and_si256(i ? _mm256_srli_epi16(z1, 2 * i) : z1, low);
#pragma GCC unroll 4
          for (int k = 0; k < T; ++k) {
            int16_t two;
            memcpy(&two, x + k * t.x_stride + g * 16 + 4 * i + b, 2);
            const __m256i y = _mm256_set1_epi16(two);
            part[k][0] = _mm256_add_epi16(part[k][0], _mm256_maddubs_epi16(c0, y));
            part[k][1] = _mm256_add_epi16(part[k][1], _mm256_maddubs_epi16(c1, y));
            asm("" : "+x"(part[k][0]), "+x"(part[k][1]));  // added one after the other: as a tree they would not fit the registers
          }
        }
      }
    }
    for (int k = 0; k < T; ++k)
      for (int quarter = 0; quarter < 4; ++quarter) {
        const __m256i half = part[k][quarter & 1];
        const __m128i rows = quarter < 2 ? _mm256_castsi256_si128(half) : _mm256_extracti128_si256(half, 1);
        __m256i* to = reinterpret_cast<__m256i*>(sums + k * t.stride + 8 * quarter);
        _mm256_storeu_si256(to, _mm256_add_epi32(_mm256_loadu_si256(to), _mm256_cvtepi16_epi32(rows)));
      }
  }
}
#else
template <int B, int T>
static inline void bytes(const TernaryTask& t, int64_t block, int64_t token) {
  static_assert(B == 1 && T == 1, "one block at a time");
  const uint8_t* codes = code_bytes(t, block);
  const int8_t* x = static_cast<const int8_t*>(t.x) + token * t.x_stride;
  int32_t* sums = static_cast<int32_t*>(t.sums) + token * t.stride + block * TERNARY_ROWS;
  int32_t acc[TERNARY_ROWS] = {};
  for (int64_t c = 0; c < t.groups * 4; ++c, codes += TERNARY_ROWS)
    for (int i = 0; i < 4; ++i) {
      const int32_t y = x[c / 4 * 16 + 4 * i + c % 4];
      for (int r = 0; r < TERNARY_ROWS; ++r) acc[r] += ((codes[r] >> (2 * i) & 3) - 1) * y;
    }
  memcpy(sums, acc, sizeof(acc));
}
#endif

template <int B, int T>
static inline int64_t bytes_blocks(const TernaryTask& t, int64_t block, int64_t token) {
  for (; block + B <= t.blocks; block += B) bytes<B, T>(t, block, token);
  return block;
}

void ternary_few_int8(const TernaryTask& t) {
  int64_t token = 0;
#if defined(__AVX512BW__)
  for (; token + 4 <= t.tokens; token += 4) bytes_blocks<1, 4>(t, 0, token);
  for (; token < t.tokens; ++token) bytes_blocks<1, 1>(t, bytes_blocks<4, 1>(t, 0, token), token);
#elif defined(__AVX2__)
  for (; token + 4 <= t.tokens; token += 4) bytes_blocks<1, 4>(t, 0, token);
  for (; token < t.tokens; ++token) bytes_blocks<1, 1>(t, 0, token);
#else
  for (; token < t.tokens; ++token) bytes_blocks<1, 1>(t, 0, token);
#endif
}

}  // namespace SIEVE_LEVEL
}  // namespace sieve
