// How codes of trits lie in memory, shared by the products of few and of many tokens.
#pragma once
#include "kernels/vec.h"
#include "ternary.h"

namespace sieve {
namespace SIEVE_LEVEL {

constexpr int FLUSH = 16;  // groups after which partial sums join the total: fp32 errors grow with the shorter chain

static inline const uint8_t* code_bytes(const TernaryTask& t, int64_t block) { return t.codes + block * t.groups * TERNARY_BYTES; }

#if defined(__AVX512F__)
constexpr uint32_t ZEROS = 0x55555555u;  // sixteen codes of trit 0

static inline int column_of(int slot) { return 4 * (slot % 4) + slot / 4; }  // slot: two bits of a word, from the lowest
static inline int pair_column(int pair) { return 8 * (pair & 1) + (pair >> 1); }  // its partner is four columns on

// The 16 codes of each row of a block in a word of its own: rows 0 to 15, then 16 to 31
static inline void row_words(const uint8_t* codes, __m512i words[2]) {
  // four rows and one byte of each are a number of 32 bits: those of the same rows side by side, then turned as a matrix
  const __m512i first = _mm512_setr_epi32(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27);
  const __m512i turn = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const __m512i low = _mm512_loadu_si512(codes), high = _mm512_loadu_si512(codes + 64);
  words[0] = _mm512_shuffle_epi8(_mm512_permutex2var_epi32(low, first, high), turn);
  words[1] = _mm512_shuffle_epi8(_mm512_permutex2var_epi32(low, _mm512_add_epi32(first, _mm512_set1_epi32(4)), high), turn);
}
#else
// The bytes of LANES rows as numbers
static inline vi rows_of_bytes(const uint8_t* codes) {
#if defined(__AVX2__)
  return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
#else
  vi z;
  for (int l = 0; l < LANES; ++l) z[l] = codes[l];
  return z;
#endif
}
// The trits at column 4 i + b of such bytes b
static inline vf trits(vi z, int i) { return __builtin_convertvector(((z >> (2 * i)) & 3) - 1, vf); }
#endif

}  // namespace SIEVE_LEVEL
}  // namespace sieve
