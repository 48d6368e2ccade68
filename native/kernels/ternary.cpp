// Ternary products. Few tokens: every pair of input channels becomes a table of its 16 sums, and codes look them up. Many tokens:
// codes are decoded once for all of them, to floats or to tiles. Integer forms multiply code bytes (trit + 1) and correct the sum.
#include "ternary.h"

#include "kernels/functions.h"
#include "kernels/gemm.h"

namespace sieve {
namespace SIEVE_LEVEL {

constexpr uint32_t ZEROS = 0x55555555u;  // sixteen codes of trit 0
constexpr int FLUSH = 16;                // groups after which partial sums join the total: fp32 errors grow with the shorter chain

static inline int column_of(int slot) { return 4 * (slot % 4) + slot / 4; }  // slot: two bits of a word, from the lowest
static inline int pair_column(int pair) { return 8 * (pair & 1) + (pair >> 1); }  // its partner is four columns on

#if defined(__AVX512F__)
constexpr int TABLE_FLOATS = 8 * 16;
#elif defined(__AVX2__)
constexpr int TABLE_FLOATS = 16 * 4;
#else
constexpr int TABLE_FLOATS = 16;
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
#elif defined(__AVX2__)
    for (int s = 0; s < 16; ++s) {
      const float y = x[column_of(s)];
      _mm_storeu_ps(tables + s * 4, _mm_mul_ps(_mm_set_ps(2, 1, 0, -1), _mm_set1_ps(y)));
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
template <int R, int T>
static inline void look_up(const TernaryTask& t, int64_t block, int64_t token) {
  static_assert(T == 1, "one token at a time");
  const int32_t* codes = t.codes + block * t.groups * 16;
  const float* tables = static_cast<const float*>(t.x) + token * t.x_stride;
  float* sums = static_cast<float*>(t.sums) + token * t.stride + block * 16;
  __m256 total[2 * R];
  for (int r = 0; r < 2 * R; ++r) total[r] = _mm256_setzero_ps();
  for (int64_t g0 = 0; g0 < t.groups; g0 += FLUSH) {
    const int64_t stop = g0 + FLUSH < t.groups ? g0 + FLUSH : t.groups;
    __m256 part[2 * R];
#pragma GCC unroll 8
    for (int r = 0; r < 2 * R; ++r) part[r] = _mm256_setzero_ps();
    for (int64_t g = g0; g < stop; ++g) {
      __m256i z[2 * R];
#pragma GCC unroll 8
      for (int r = 0; r < 2 * R; ++r)
        z[r] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + (r / 2 * t.groups + g) * 16 + r % 2 * 8));
#pragma GCC unroll 16
      for (int s = 0; s < 16; ++s) {
        const __m256 table = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(tables + g * TABLE_FLOATS + s * 4));
#pragma GCC unroll 8
        for (int r = 0; r < 2 * R; ++r) {
          part[r] = _mm256_add_ps(part[r], _mm256_permutevar_ps(table, z[r]));
          z[r] = _mm256_srli_epi32(z[r], 2);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < 2 * R; ++r) total[r] = _mm256_add_ps(total[r], part[r]);
  }
  for (int r = 0; r < 2 * R; ++r) _mm256_storeu_ps(sums + r * 8, total[r]);
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

// Many tokens -----------------------------------------------------------------------------------------------------------

#if defined(__AMX_INT8__)

bool ternary_tiles() { return true; }
int64_t ternary_few_tokens() { return 4; }
int64_t ternary_many_blocks() { return 16; }

constexpr int STEPS = 16;  // tiles of decoded weights, a row block: two blocks stay in the first cache, all of them in the second

int64_t ternary_scratch_floats() { return 16 * STEPS * 256; }

static inline void set_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } c;
  for (int i = 0; i < 8; ++i) {
    c.bytes[i] = 64;
    c.rows[i] = 16;
  }
  _tile_loadconfig(&c);
}

// 16 rows of fp32 as bf16 terms that sum to them: by truncation, so that three terms of 8 bits are all 24. Channels are in the
// order of pairs; tiles [step of 32 channels][part][16 rows][32].
void ternary_split(const float* x, int64_t stride, int64_t rows, int64_t groups, int64_t parts, uint16_t* out) {
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  const __m512i upper = _mm512_set1_epi32((int)0xffff0000u), quiet = _mm512_set1_epi32(0x00400000);
  if (rows < 16 || groups % 2) memset(out, 0, sizeof(uint16_t) * up(groups, 2) * 16 * 16 * parts);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t g = 0; g < groups; ++g) {
      uint16_t* to = out + (g / 2 * parts) * 512 + r * 32 + (g & 1) * 16;
      __m512 y = _mm512_permutexvar_ps(order, _mm512_loadu_ps(x + r * stride + g * 16));
      const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_sub_ps(y, y), _mm512_setzero_ps(), _CMP_EQ_OQ);
      // a NaN keeps a bit where truncation would leave an infinity
      const __mmask16 nan = _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q);
      y = _mm512_castsi512_ps(_mm512_mask_or_epi32(_mm512_castps_si512(y), nan, _mm512_castps_si512(y), quiet));
      for (int64_t p = 0; p < parts; ++p) {
        const __m512i top = _mm512_and_si512(_mm512_castps_si512(y), upper);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + p * 512), _mm512_cvtepi32_epi16(_mm512_srli_epi32(top, 16)));
        y = _mm512_maskz_sub_ps(finite, y, _mm512_castsi512_ps(top));
      }
    }
}

// Steps first..first+n-1 of one row block as tiles of weights
static inline void decode_bf16(const int32_t* codes, int64_t groups, int64_t first, int64_t n, uint16_t* out) {
  // bf16 -1, 0, 1, 2 in pairs, the first code in the lower half
  const uint32_t f[4] = {0xbf80u, 0x0000u, 0x3f80u, 0x4000u};
  alignas(64) uint32_t pairs[16];
  for (int i = 0; i < 16; ++i) pairs[i] = f[i & 3] | f[i >> 2] << 16;
  const __m512i table = _mm512_load_si512(pairs);
  for (int64_t s = 0; s < n; ++s)
    for (int half = 0; half < 2; ++half) {
      const int64_t g = 2 * (first + s) + half;
      __m512i z = g < groups ? _mm512_loadu_si512(codes + g * 16) : _mm512_set1_epi32((int)ZEROS);
      uint16_t* to = out + s * 512 + half * 256;
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        _mm512_storeu_si512(to + j * 32, _mm512_permutexvar_epi32(z, table));
        z = _mm512_srli_epi32(z, 4);
      }
    }
}

static inline void decode_int8(const int32_t* codes, int64_t groups, int64_t first, int64_t n, int8_t* out) {
  const __m512i low = _mm512_set1_epi32(0x03030303), one = _mm512_set1_epi8(1);
  for (int64_t s = 0; s < n; ++s)
    for (int quarter = 0; quarter < 4; ++quarter) {
      const int64_t g = 4 * (first + s) + quarter;
      const __m512i z = g < groups ? _mm512_loadu_si512(codes + g * 16) : _mm512_set1_epi32((int)ZEROS);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        _mm512_storeu_si512(out + s * 1024 + quarter * 256 + i * 64,
                            _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi32(z, 2 * i), low), one));
    }
}

// sums [16 or 32 tokens][16 or 32 rows] += tiles of activations times tiles of weights; all tiles are 1024 bytes
template <int Rows, int Cols, bool Integer>
static inline void multiply(const char* x, int64_t x_block, int64_t parts, const char* w, int64_t w_block, int64_t steps, void* sums,
                            int64_t stride, bool begin) {
  char* c = static_cast<char*>(sums);
  if (begin) {
    _tile_zero(0);
    if constexpr (Cols > 1) _tile_zero(1);
    if constexpr (Rows > 1) _tile_zero(2);
    if constexpr (Rows > 1 && Cols > 1) _tile_zero(3);
  } else {
    _tile_loadd(0, c, stride);
    if constexpr (Cols > 1) _tile_loadd(1, c + 64, stride);
    if constexpr (Rows > 1) _tile_loadd(2, c + 16 * stride, stride);
    if constexpr (Rows > 1 && Cols > 1) _tile_loadd(3, c + 16 * stride + 64, stride);
  }
  for (int64_t s = 0; s < steps; ++s) {
    _tile_loadd(6, w + s * 1024, 64);
    if constexpr (Cols > 1) _tile_loadd(7, w + w_block + s * 1024, 64);
    for (int64_t p = 0; p < parts; ++p) {
      _tile_loadd(4, x + (s * parts + p) * 1024, 64);
      if constexpr (Rows > 1) _tile_loadd(5, x + x_block + (s * parts + p) * 1024, 64);
      if constexpr (Integer) {
        _tile_dpbssd(0, 4, 6);
        if constexpr (Cols > 1) _tile_dpbssd(1, 4, 7);
        if constexpr (Rows > 1) _tile_dpbssd(2, 5, 6);
        if constexpr (Rows > 1 && Cols > 1) _tile_dpbssd(3, 5, 7);
      } else {
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (Cols > 1) _tile_dpbf16ps(1, 4, 7);
        if constexpr (Rows > 1) _tile_dpbf16ps(2, 5, 6);
        if constexpr (Rows > 1 && Cols > 1) _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, c, stride);
  if constexpr (Cols > 1) _tile_stored(1, c + 64, stride);
  if constexpr (Rows > 1) _tile_stored(2, c + 16 * stride, stride);
  if constexpr (Rows > 1 && Cols > 1) _tile_stored(3, c + 16 * stride + 64, stride);
}

template <bool Integer>
static inline void tiles(const TernaryTask& t) {
  constexpr int GROUPS = Integer ? 4 : 2;
  const int64_t steps = up(t.groups, GROUPS) / GROUPS, x_block = steps * t.parts * 1024, bytes = t.stride * 4;
  char* w = static_cast<char*>(t.scratch);
  const char* x = static_cast<const char*>(t.x);
  char* sums = static_cast<char*>(t.sums);
  set_tiles();
  for (int64_t first = 0; first < steps; first += STEPS) {
    const int64_t n = steps - first < STEPS ? steps - first : STEPS;
    for (int64_t b = 0; b < t.blocks; ++b) {
      if constexpr (Integer)
        decode_int8(t.codes + b * t.groups * 16, t.groups, first, n, reinterpret_cast<int8_t*>(w) + b * STEPS * 1024);
      else
        decode_bf16(t.codes + b * t.groups * 16, t.groups, first, n, reinterpret_cast<uint16_t*>(w) + b * STEPS * 512);
    }
    for (int64_t b = 0; b < t.blocks; b += 2)
      for (int64_t token = 0; token < t.tokens; token += 32) {
        const char *from = x + token / 16 * x_block + first * t.parts * 1024, *weights = w + b * STEPS * 1024;
        void* to = sums + token * bytes + b * 64;
        const bool tall = token + 16 < t.tokens, wide = b + 1 < t.blocks;
        if (tall && wide) multiply<2, 2, Integer>(from, x_block, t.parts, weights, STEPS * 1024, n, to, bytes, first == 0);
        if (tall && !wide) multiply<2, 1, Integer>(from, x_block, t.parts, weights, STEPS * 1024, n, to, bytes, first == 0);
        if (!tall && wide) multiply<1, 2, Integer>(from, x_block, t.parts, weights, STEPS * 1024, n, to, bytes, first == 0);
        if (!tall && !wide) multiply<1, 1, Integer>(from, x_block, t.parts, weights, STEPS * 1024, n, to, bytes, first == 0);
      }
  }
  _tile_release();
}

void ternary_many(const TernaryTask& t) { tiles<false>(t); }
void ternary_many_int8(const TernaryTask& t) { tiles<true>(t); }

#else

bool ternary_tiles() { return false; }
int64_t ternary_few_tokens() { return 4; }
int64_t ternary_many_blocks() { return 4; }

constexpr int CHUNK_GROUPS = 16;  // groups of columns whose decoded weights stay in the cache

int64_t ternary_scratch_floats() { return CHUNK_GROUPS * 16 * 4 * 16; }
void ternary_split(const float*, int64_t, int64_t, int64_t, int64_t, uint16_t*) {}
void ternary_many_int8(const TernaryTask&) {}

// One word of codes of 16 rows as 16 lines of 16 floats, `line` floats apart, in the order of columns
static inline void decode(const int32_t* codes, float* out, int64_t line) {
#if defined(__AVX512F__)
  const __m512 table = _mm512_set_ps(2, 1, 0, -1, 2, 1, 0, -1, 2, 1, 0, -1, 2, 1, 0, -1);
  __m512i z = _mm512_loadu_si512(codes);
#pragma GCC unroll 16
  for (int s = 0; s < 16; ++s) {
    _mm512_storeu_ps(out + column_of(s) * line, _mm512_permutexvar_ps(z, table));
    z = _mm512_srli_epi32(z, 2);
  }
#else
  for (int part = 0; part < 16; part += LANES) {
    const vi z = *reinterpret_cast<const vi_any*>(codes + part);
    for (int s = 0; s < 16; ++s) store(out + column_of(s) * line + part, __builtin_convertvector(((z >> (2 * s)) & 3) - 1, vf));
  }
#endif
}

void ternary_many(const TernaryTask& t) {
  const int64_t wide = t.blocks * 16;
  const float* x = static_cast<const float*>(t.x);
  float *w = static_cast<float*>(t.scratch), *sums = static_cast<float*>(t.sums);
  for (int64_t i = 0; i < t.tokens; ++i) memset(sums + i * t.stride, 0, sizeof(float) * wide);
  for (int64_t first = 0; first < t.groups; first += CHUNK_GROUPS) {
    const int64_t n = t.groups - first < CHUNK_GROUPS ? t.groups - first : CHUNK_GROUPS;
    const float* row[CHUNK_GROUPS * 16];
    for (int64_t i = 0; i < n * 16; ++i) row[i] = w + i * wide;
    for (int64_t b = 0; b < t.blocks; ++b)
      for (int64_t g = 0; g < n; ++g) decode(t.codes + (b * t.groups + first + g) * 16, w + g * 16 * wide + b * 16, wide);
    times_rows(x + first * 16, t.x_stride, 1, (int)t.tokens, (int)(n * 16), row, (int)wide, sums, t.stride);
  }
}

#endif

}  // namespace SIEVE_LEVEL
}  // namespace sieve
