// Ternary products of many tokens: codes are decoded once for all of them, to floats or to tiles.
#include "ternary.h"

#include "kernels/functions.h"
#include "kernels/gemm.h"
#include "kernels/ternary_codes.h"

namespace sieve {
namespace SIEVE_LEVEL {

// Many tokens -----------------------------------------------------------------------------------------------------------

#if defined(__AMX_INT8__)

bool ternary_tiles() { return true; }
int64_t ternary_few_tokens() { return 4; }
int64_t ternary_many_blocks() { return 8; }

constexpr int STEPS = 16;  // tiles of decoded weights, of 16 rows: those of a row block stay in the first cache, all of them in the second

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

static inline void words_or_zeros(const uint8_t* codes, int64_t groups, int64_t g, __m512i z[2]) {
  if (g < groups)
    row_words(codes + g * TERNARY_BYTES, z);
  else
    z[0] = z[1] = _mm512_set1_epi32((int)ZEROS);
}

// Steps first..first+n-1 of one row block as tiles of weights, STEPS of its first 16 rows and then those of the others
static inline void decode_bf16(const uint8_t* codes, int64_t groups, int64_t first, int64_t n, uint16_t* out) {
  // bf16 -1, 0, 1, 2 in pairs, the first code in the lower half
  const uint32_t f[4] = {0xbf80u, 0x0000u, 0x3f80u, 0x4000u};
  alignas(64) uint32_t pairs[16];
  for (int i = 0; i < 16; ++i) pairs[i] = f[i & 3] | f[i >> 2] << 16;
  const __m512i table = _mm512_load_si512(pairs);
  for (int64_t s = 0; s < n; ++s)
    for (int half = 0; half < 2; ++half) {
      __m512i z[2];
      words_or_zeros(codes, groups, 2 * (first + s) + half, z);
      for (int r = 0; r < 2; ++r) {
        uint16_t* to = out + (r * STEPS + s) * 512 + half * 256;
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) {
          _mm512_storeu_si512(to + j * 32, _mm512_permutexvar_epi32(z[r], table));
          z[r] = _mm512_srli_epi32(z[r], 4);
        }
      }
    }
}

static inline void decode_int8(const uint8_t* codes, int64_t groups, int64_t first, int64_t n, int8_t* out) {
  const __m512i low = _mm512_set1_epi32(0x03030303), one = _mm512_set1_epi8(1);
  for (int64_t s = 0; s < n; ++s)
    for (int quarter = 0; quarter < 4; ++quarter) {
      __m512i z[2];
      words_or_zeros(codes, groups, 4 * (first + s) + quarter, z);
      for (int r = 0; r < 2; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
          _mm512_storeu_si512(out + (r * STEPS + s) * 1024 + quarter * 256 + i * 64,
                              _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi32(z[r], 2 * i), low), one));
    }
}

// sums [16 or 32 tokens][32 rows] += tiles of activations times tiles of weights; all tiles are 1024 bytes
template <int Rows, bool Integer>
static inline void multiply(const char* x, int64_t x_block, int64_t parts, const char* w, int64_t steps, void* sums, int64_t stride, bool begin) {
  char* c = static_cast<char*>(sums);
  if (begin) {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (Rows > 1) {
      _tile_zero(2);
      _tile_zero(3);
    }
  } else {
    _tile_loadd(0, c, stride);
    _tile_loadd(1, c + 64, stride);
    if constexpr (Rows > 1) {
      _tile_loadd(2, c + 16 * stride, stride);
      _tile_loadd(3, c + 16 * stride + 64, stride);
    }
  }
  for (int64_t s = 0; s < steps; ++s) {
    _tile_loadd(6, w + s * 1024, 64);
    _tile_loadd(7, w + (STEPS + s) * 1024, 64);
    for (int64_t p = 0; p < parts; ++p) {
      _tile_loadd(4, x + (s * parts + p) * 1024, 64);
      if constexpr (Rows > 1) _tile_loadd(5, x + x_block + (s * parts + p) * 1024, 64);
      if constexpr (Integer) {
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        if constexpr (Rows > 1) {
          _tile_dpbssd(2, 5, 6);
          _tile_dpbssd(3, 5, 7);
        }
      } else {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (Rows > 1) {
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
    }
  }
  _tile_stored(0, c, stride);
  _tile_stored(1, c + 64, stride);
  if constexpr (Rows > 1) {
    _tile_stored(2, c + 16 * stride, stride);
    _tile_stored(3, c + 16 * stride + 64, stride);
  }
}

template <bool Integer>
static inline void tiles(const TernaryTask& t) {
  constexpr int GROUPS = Integer ? 4 : 2;
  constexpr int64_t BLOCK = 2 * STEPS * 1024;  // bytes of a row block's tiles
  const int64_t steps = up(t.groups, GROUPS) / GROUPS, x_block = steps * t.parts * 1024, bytes = t.stride * 4;
  char* w = static_cast<char*>(t.scratch);
  const char* x = static_cast<const char*>(t.x);
  char* sums = static_cast<char*>(t.sums);
  set_tiles();
  for (int64_t first = 0; first < steps; first += STEPS) {
    const int64_t n = steps - first < STEPS ? steps - first : STEPS;
    for (int64_t b = 0; b < t.blocks; ++b) {
      if constexpr (Integer)
        decode_int8(code_bytes(t, b), t.groups, first, n, reinterpret_cast<int8_t*>(w + b * BLOCK));
      else
        decode_bf16(code_bytes(t, b), t.groups, first, n, reinterpret_cast<uint16_t*>(w + b * BLOCK));
    }
    for (int64_t b = 0; b < t.blocks; ++b)
      for (int64_t token = 0; token < t.tokens; token += 32) {
        const char* from = x + token / 16 * x_block + first * t.parts * 1024;
        void* to = sums + token * bytes + b * TERNARY_ROWS * 4;
        if (token + 16 < t.tokens)
          multiply<2, Integer>(from, x_block, t.parts, w + b * BLOCK, n, to, bytes, first == 0);
        else
          multiply<1, Integer>(from, x_block, t.parts, w + b * BLOCK, n, to, bytes, first == 0);
      }
  }
  _tile_release();
}

void ternary_many(const TernaryTask& t) { tiles<false>(t); }
void ternary_many_int8(const TernaryTask& t) { tiles<true>(t); }

#else

bool ternary_tiles() { return false; }
#if defined(__AVX2__) && !defined(__AVX512F__)
int64_t ternary_few_tokens() { return 32; }  // where tables of bytes and decoded weights take as long
#else
int64_t ternary_few_tokens() { return 4; }
#endif
int64_t ternary_many_blocks() { return 2; }

constexpr int CHUNK_GROUPS = 16;  // groups of columns whose decoded weights stay in the cache

int64_t ternary_scratch_floats() { return (CHUNK_GROUPS * 16 + TERNARY_TOKENS) * 4 * 16; }
void ternary_split(const float*, int64_t, int64_t, int64_t, int64_t, uint16_t*) {}
void ternary_many_int8(const TernaryTask&) {}

// One group of a row block as 16 lines in the order of columns, `line` floats apart; its second 16 rows lie `half` after the first
static inline void decode(const uint8_t* codes, float* out, int64_t line, int64_t half) {
#if defined(__AVX512F__)
  const __m512 table = _mm512_set_ps(2, 1, 0, -1, 2, 1, 0, -1, 2, 1, 0, -1, 2, 1, 0, -1);
  __m512i z[2];
  row_words(codes, z);
  for (int r = 0; r < 2; ++r)
#pragma GCC unroll 16
    for (int s = 0; s < 16; ++s) {
      _mm512_storeu_ps(out + column_of(s) * line + r * half, _mm512_permutexvar_ps(z[r], table));
      z[r] = _mm512_srli_epi32(z[r], 2);
    }
#else
  for (int b = 0; b < 4; ++b)
    for (int row = 0; row < TERNARY_ROWS; row += LANES) {
      const vi z = rows_of_bytes(codes + b * TERNARY_ROWS + row);
      for (int i = 0; i < 4; ++i) store(out + (4 * i + b) * line + row / 16 * half + row % 16, trits(z, i));
    }
#endif
}

void ternary_many(const TernaryTask& t) {
  const int64_t wide = t.blocks * TERNARY_ROWS;
  const float* x = static_cast<const float*>(t.x);
  float *w = static_cast<float*>(t.scratch), *part = w + CHUNK_GROUPS * 16 * wide, *sums = static_cast<float*>(t.sums);
  for (int64_t i = 0; i < t.tokens; ++i) memset(sums + i * t.stride, 0, sizeof(float) * wide);
  for (int64_t first = 0; first < t.groups; first += CHUNK_GROUPS) {
    // every chunk has a sum of its own: thousands of terms one after another would round too often
    memset(part, 0, sizeof(float) * t.tokens * wide);
    const int64_t n = t.groups - first < CHUNK_GROUPS ? t.groups - first : CHUNK_GROUPS;
    // 16 rows of weights side by side where that pays (see gemm.h), or all of them
    const bool apart = gathering((int)t.tokens);
    const int64_t columns = n * 16, line = apart ? 16 : wide, half = apart ? columns * 16 : 16;
    for (int64_t b = 0; b < t.blocks; ++b)
      for (int64_t g = 0; g < n; ++g) decode(code_bytes(t, b) + (first + g) * TERNARY_BYTES, w + g * 16 * line + 2 * b * half, line, half);
    if (apart) {
      times_columns(x + first * 16, t.x_stride, 1, (int)t.tokens, (int)columns, w, (int)columns, (int)wide, part, wide);
    } else {
      const float* row[CHUNK_GROUPS * 16];
      for (int64_t i = 0; i < columns; ++i) row[i] = w + i * wide;
      times_rows(x + first * 16, t.x_stride, 1, (int)t.tokens, (int)columns, row, (int)wide, part, wide);
    }
    for (int64_t i = 0; i < t.tokens; ++i)
      for (int64_t c = 0; c < wide; c += LANES)
        store(sums + i * t.stride + c, load(sums + i * t.stride + c) + load(part + i * wide + c));
  }
}

#endif

}  // namespace SIEVE_LEVEL
}  // namespace sieve
