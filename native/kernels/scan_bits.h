// Integer dots of rounded queries with the codes of keys on AVX2, where the bits of a key fill a vector, half of it, a quarter or an
// eighth. Bit j of every byte of four planes becomes one vector of codes, so eight vectors are the codes of 256 channels, of as many
// keys as that is; transposing bits costs a third of spreading each plane over bytes. Included by scan_vectors.h alone.
#pragma once
#include "kernels/four.h"

namespace sieve {
namespace SIEVE_LEVEL {

constexpr int LINE = 8 * 32;  // bytes of a packed query row: for each bit j the channels that lie there, once for every key of a vector

static inline bool fills_vectors(int32_t d) { return d == 32 || d == 64 || d == 128 || d == 256; }

// Bit j of byte b is channel 8 b + 7 - j.
static inline void pack_line(const int8_t* q, int32_t d, int8_t* to) {
  for (int j = 0; j < 8; ++j)
    for (int lane = 0; lane < 32; ++lane) to[32 * j + lane] = q[8 * (lane % (d / 8)) + 7 - j];
}

// Two digits of a channel that meet codes of more than four bits are one number of 16 bits: that takes as many products as one digit
// with the two halves of a code.
static inline bool are_one(int32_t d, int32_t digits, int32_t bits) { return fills_vectors(d) && digits == 2 && bits > 4; }

// As pack_line, channels of even bytes before those of odd ones.
static inline void pack_two(const int8_t* first, const int8_t* second, int32_t d, int16_t* to) {
  for (int j = 0; j < 8; ++j)
    for (int lane = 0; lane < 32; ++lane) {
      const int c = 8 * (lane % (d / 8)) + 7 - j;
      to[32 * j + lane % 2 * 16 + lane / 2] = (int16_t)(SCAN_DIGIT * first[c] + second[c]);
    }
}

static inline __m256i masked(__m256i x, int byte) { return _mm256_and_si256(x, _mm256_set1_epi8((char)byte)); }

// code[j] of every byte: bit j of each plane, the most significant plane first
template <int Planes>
static inline __attribute__((always_inline)) void turn_bits(const __m256i* plane, __m256i code[8]) {
  if constexpr (Planes == 1) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) code[j] = masked(j ? _mm256_srli_epi16(plane[0], j) : plane[0], 1);
  } else {
    // two planes to fields of two bits, of the odd and of the even bits
    const auto odd = [](__m256i a, __m256i b) { return _mm256_or_si256(masked(a, 0xaa), masked(_mm256_srli_epi16(b, 1), 0x55)); };
    const auto even = [](__m256i a, __m256i b) { return _mm256_or_si256(masked(_mm256_slli_epi16(a, 1), 0xaa), masked(b, 0x55)); };
    if constexpr (Planes == 2) {
      const __m256i x[2] = {even(plane[0], plane[1]), odd(plane[0], plane[1])};
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) code[j] = masked(j > 1 ? _mm256_srli_epi16(x[j % 2], j / 2 * 2) : x[j % 2], 3);
    } else {
      const __m256i a = Planes == 4 ? plane[0] : _mm256_setzero_si256(), *rest = plane + Planes - 3;
      const __m256i first[2] = {even(a, rest[0]), odd(a, rest[0])}, second[2] = {even(rest[1], rest[2]), odd(rest[1], rest[2])};
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const __m256i x = _mm256_or_si256(masked(_mm256_slli_epi16(first[j], 2), 0xcc), masked(second[j], 0x33));
        const __m256i y = _mm256_or_si256(masked(first[j], 0xcc), masked(_mm256_srli_epi16(second[j], 2), 0x33));
        code[j] = masked(x, 15);
        code[j + 4] = masked(_mm256_srli_epi16(x, 4), 15);
        code[j + 2] = masked(y, 15);
        code[j + 6] = masked(_mm256_srli_epi16(y, 4), 15);
      }
    }
  }
}

// Sums of neighbouring products: 16 bits hold 8 pairs of codes up to 15 and bytes.
static inline __m256i products(const __m256i code[8], const int8_t* q) {
  __m256i sum = _mm256_maddubs_epi16(code[0], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q)));
#pragma GCC unroll 8
  for (int j = 1; j < 8; ++j) {
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(code[j], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + 32 * j))));
    asm("" : "+x"(sum));  // one after the other: as a tree they would not fit the registers
  }
  return sum;
}

// Sums of products of whole codes, four bits in `low` and the rest in `high`, with four rows of numbers of 16 bits.
static inline void products_of_two(const __m256i low[8], const __m256i high[8], const int16_t* q, __m256i sums[SCAN_ROWS]) {
  const __m256i even_bytes = _mm256_set1_epi16(0xff);
#pragma GCC unroll 4
  for (int r = 0; r < SCAN_ROWS; ++r) sums[r] = _mm256_setzero_si256();
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {
    const __m256i code = _mm256_or_si256(low[j], _mm256_slli_epi16(high[j], 4));
    const __m256i even = _mm256_and_si256(code, even_bytes), odd = _mm256_srli_epi16(code, 8);
#pragma GCC unroll 4
    for (int r = 0; r < SCAN_ROWS; ++r) {
      const __m256i* with = reinterpret_cast<const __m256i*>(q + r * LINE + 32 * j);
      sums[r] = _mm256_add_epi32(sums[r], _mm256_madd_epi16(even, _mm256_loadu_si256(with)));
      sums[r] = _mm256_add_epi32(sums[r], _mm256_madd_epi16(odd, _mm256_loadu_si256(with + 1)));
      asm("" : "+x"(sums[r]));  // as above
    }
  }
}

// Sums of four rows, 8 / Keys of each key, to [keys][4 rows]
template <int Keys>
static inline void put_keys(const __m256i* x, int32_t* to) {
  __m256i* out = reinterpret_cast<__m256i*>(to);
  if constexpr (Keys == 8) {
    const __m256i a = _mm256_unpacklo_epi32(x[0], x[1]), b = _mm256_unpackhi_epi32(x[0], x[1]);
    const __m256i c = _mm256_unpacklo_epi32(x[2], x[3]), d = _mm256_unpackhi_epi32(x[2], x[3]);
    const __m256i k0 = _mm256_unpacklo_epi64(a, c), k1 = _mm256_unpackhi_epi64(a, c), k2 = _mm256_unpacklo_epi64(b, d), k3 = _mm256_unpackhi_epi64(b, d);
    _mm256_storeu_si256(out, _mm256_permute2x128_si256(k0, k1, 0x20));
    _mm256_storeu_si256(out + 1, _mm256_permute2x128_si256(k2, k3, 0x20));
    _mm256_storeu_si256(out + 2, _mm256_permute2x128_si256(k0, k1, 0x31));
    _mm256_storeu_si256(out + 3, _mm256_permute2x128_si256(k2, k3, 0x31));
  } else {
    const __m256i a = _mm256_hadd_epi32(x[0], x[1]), b = _mm256_hadd_epi32(x[2], x[3]);
    if constexpr (Keys == 4) {
      const __m256 p = _mm256_castsi256_ps(a), q = _mm256_castsi256_ps(b);
      const __m256i even = _mm256_castps_si256(_mm256_shuffle_ps(p, q, 0x88)), odd = _mm256_castps_si256(_mm256_shuffle_ps(p, q, 0xdd));
      _mm256_storeu_si256(out, _mm256_permute2x128_si256(even, odd, 0x20));
      _mm256_storeu_si256(out + 1, _mm256_permute2x128_si256(even, odd, 0x31));
    } else {
      const __m256i all = _mm256_hadd_epi32(a, b);
      if constexpr (Keys == 2)
        _mm256_storeu_si256(out, all);
      else
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
    }
  }
}

// Planes lie without gaps. More than four go in two halves, of which the last holds four.
template <int Bits, int Keys>
static inline void dots_of_bits(const Scan& s, const uint8_t* const* planes, int32_t* dots) {
  constexpr int HIGH = Bits > 4 ? Bits - 4 : 0, LOW = Bits - HIGH;
  const int8_t* query = static_cast<const int8_t*>(s.query);
  const __m256i one = _mm256_set1_epi16(1), sixteen = _mm256_set1_epi16(16);
  const bool two = are_one(s.d, s.digits, Bits);
  for (int key = 0; key < SCAN_CHUNK; key += Keys) {
    __m256i plane[Bits], low[8], high[8];
#pragma GCC unroll 8
    for (int b = 0; b < Bits; ++b) plane[b] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(planes[b] + key * (32 / Keys)));
    turn_bits<LOW>(plane + HIGH, low);
    if constexpr (HIGH > 0) turn_bits<HIGH>(plane, high);
    if constexpr (HIGH > 0)
      if (two) {
        for (int g = 0; g < s.groups; ++g) {
          __m256i sums[SCAN_ROWS];
          products_of_two(low, high, reinterpret_cast<const int16_t*>(query) + (int64_t)g * SCAN_ROWS * LINE, sums);
          put_keys<Keys>(sums, dots + (g * SCAN_CHUNK + key) * SCAN_ROWS);
        }
        continue;
      }
    for (int g = 0, left = s.rows; g < s.groups * s.digits; left -= SCAN_ROWS)
      for (int e = 0; e < s.digits; ++e, ++g) {
        __m256i sums[SCAN_ROWS] = {};
#pragma GCC unroll 4
        for (int r = 0; r < SCAN_ROWS; ++r) {
          if (r >= left) break;
          const int8_t* q = query + (int64_t)(g * SCAN_ROWS + r) * LINE;
          sums[r] = _mm256_madd_epi16(products(low, q), one);
          if constexpr (HIGH > 0) sums[r] = _mm256_add_epi32(sums[r], _mm256_madd_epi16(products(high, q), sixteen));
        }
        put_keys<Keys>(sums, dots + (g * SCAN_CHUNK + key) * SCAN_ROWS);
      }
  }
}

template <int Bits>
static inline void dots_of_bits(const Scan& s, const uint8_t* const* planes, int32_t* dots) {
  switch (s.d) {
    case 32: return dots_of_bits<Bits, 8>(s, planes, dots);
    case 64: return dots_of_bits<Bits, 4>(s, planes, dots);
    case 128: return dots_of_bits<Bits, 2>(s, planes, dots);
    default: return dots_of_bits<Bits, 1>(s, planes, dots);
  }
}

}  // namespace SIEVE_LEVEL
}  // namespace sieve
