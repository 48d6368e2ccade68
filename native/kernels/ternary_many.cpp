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

int64_t ternary_scratch_floats() { return (CHUNK_GROUPS * 16 + TERNARY_TOKENS) * 4 * 16; }
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
  float *w = static_cast<float*>(t.scratch), *part = w + CHUNK_GROUPS * 16 * wide, *sums = static_cast<float*>(t.sums);
  for (int64_t i = 0; i < t.tokens; ++i) memset(sums + i * t.stride, 0, sizeof(float) * wide);
  for (int64_t first = 0; first < t.groups; first += CHUNK_GROUPS) {
    // every chunk has a sum of its own: thousands of terms one after another would round too often
    memset(part, 0, sizeof(float) * t.tokens * wide);
    const int64_t n = t.groups - first < CHUNK_GROUPS ? t.groups - first : CHUNK_GROUPS;
    const float* row[CHUNK_GROUPS * 16];
    for (int64_t i = 0; i < n * 16; ++i) row[i] = w + i * wide;
    for (int64_t b = 0; b < t.blocks; ++b)
      for (int64_t g = 0; g < n; ++g) decode(t.codes + (b * t.groups + first + g) * 16, w + g * 16 * wide + b * 16, wide);
    times_rows(x + first * 16, t.x_stride, 1, (int)t.tokens, (int)(n * 16), row, (int)wide, part, wide);
    for (int64_t i = 0; i < t.tokens; ++i)
      for (int64_t c = 0; c < wide; c += LANES)
        store(sums + i * t.stride + c, load(sums + i * t.stride + c) + load(part + i * wide + c));
  }
}

#endif

}  // namespace SIEVE_LEVEL
}  // namespace sieve
