// Ternary products of few tokens with AVX2, where bytes are multiplied 32 at a time and floats 8. A token of floats becomes whole
// numbers of four base-256 digits,
//   x_c = unit * (d_0 + 256 d_1 + 256^2 d_2 + 256^3 d_3),   -128 <= d <= 127,   unit = 2^e,   2^29 < max |x| / unit < 2^31,
// whose products with codes (trit + 1) are sums of integers, free of rounding. Entries below 2^20 units would lose digits of their own,
// and a row may read nothing else: they are added as floats, and a token with many of them is left to floats altogether. So every
// entry is rounded to 2^-21 of itself at most, and then the result. Low digits that are zero in every entry are not multiplied: of
// entries that were bf16 or fp16, whose mantissas are short, the lowest always is, and where few entries of a bf16 token lie below
// 2^23 units, those are added as floats too and two digits are left.
//
// Any other token needs three, of a finer unit, where no row can be rounded by more than 2^-20 of the sum of its |x_c| (sums of floats
// in eight chains may be by 2^-24 times an eighth of the channels). A row with m trits that are not zero loses at most m / 2 units, and
// holds at least the m smallest |x_c|; what that is to a row grows with m, so the row with fewest trits decides. Where roundings are
// independent it is some 2^-28 of 4,096 normal entries, less than the 2^-26 of sums of floats.
#pragma once
#include <cmath>

#include "kernels/functions.h"
#include "kernels/ternary_codes.h"
#include "ternary.h"

#if defined(__AVX2__) && !defined(__AVX512F__)

namespace sieve {
namespace SIEVE_LEVEL {

constexpr int32_t EXACT = 1 << 20;              // units from which an entry keeps the digits of a float
constexpr int32_t HIGH_HALF = 1 << 23;          // units from which the upper two digits hold the mantissa of a bf16
constexpr float THREE = 8355000.0f;            // the largest number of three digits, and a little less
constexpr float LOSS = 14.9f / 16777216.0f;     // 2^-20, less 2^-24 for the product that makes an entry a number of units
constexpr int64_t MANY = 512;                   // trits from which independent roundings cancel better than those of float sums
constexpr float SMALL = 1e-27f, LARGE = 1e30f;   // magnitudes between which units are normal numbers
constexpr int64_t WIDE = int64_t{1} << 16;       // groups up to which sums are exact in a double

// What ternary_tables writes before the groups of a token
struct alignas(32) Digits {
  double unit;   // 0: the groups hold floats
  double total;  // of the whole numbers: what codes, a trit and one, add to the sum
  int32_t small; // entries that are floats, listed behind the groups
  int32_t skip;  // low digits that are zero throughout, up to two
};
struct Small {
  float products[4];  // -x, 0, x: what a code reads
  int32_t word, shift;  // where its codes are in a row block
};
constexpr int HEADER_FLOATS = sizeof(Digits) / sizeof(float);

static inline double sum(__m256d x) { return x[0] + x[1] + x[2] + x[3]; }

struct Look {
  float high;      // the largest size of an entry, or 0 where digits cannot hold the token
  uint32_t bits;  // that are set in an entry
};

static inline Look look_at(const float* x, int64_t n) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  __m256 most = _mm256_setzero_ps(), bits = _mm256_setzero_ps(), other = _mm256_setzero_ps();
  for (int64_t i = 0; i < n; i += 8) {
    const __m256 y = _mm256_loadu_ps(x + i);
    most = _mm256_max_ps(most, _mm256_andnot_ps(sign, y));
    other = _mm256_or_ps(other, _mm256_cmp_ps(y, y, _CMP_UNORD_Q));  // a maximum forgets NaN
    bits = _mm256_or_ps(bits, y);
  }
  Look found{0.0f, 0};
  for (int l = 0; l < 8; ++l) {
    uint32_t word;
    memcpy(&word, reinterpret_cast<const float*>(&bits) + l, 4);
    found.bits |= word;
    found.high = most[l] > found.high ? most[l] : found.high;
  }
  const bool known = _mm256_movemask_ps(other) == 0 && found.high > SMALL && found.high < LARGE;
  if (!known || n > WIDE * 16) found.high = 0.0f;
  return found;
}

// The unit of four digits
static inline float unit_of(float high) {
  int e;
  const float fraction = frexpf(high, &e);
  return ldexpf(1.0f, fraction < 0.99f ? e - 31 : e - 30);  // four digits hold 127.5 * 2^24 at most
}

// Whether rows of at least `fewest` entries lose no more than LOSS of the sum of their sizes in units of high / THREE. The sum of
// the smallest entries is counted in layers: what is at least level j lies above all layers below.
static inline bool three_suffice(const float* x, int64_t n, int64_t fewest, float high) {
  constexpr int LEVELS = 8;
  const float layer = high / 32.0f;
  const __m256 sign = _mm256_set1_ps(-0.0f);
  __m256i reach[LEVELS];
  for (int j = 0; j < LEVELS; ++j) reach[j] = _mm256_setzero_si256();
  for (int64_t i = 0; i < n; i += 8) {
    const __m256 y = _mm256_andnot_ps(sign, _mm256_loadu_ps(x + i));
#pragma GCC unroll 8
    for (int j = 0; j < LEVELS; ++j)
      reach[j] = _mm256_sub_epi32(reach[j], _mm256_castps_si256(_mm256_cmp_ps(y, _mm256_set1_ps(layer * (float)(j + 1)), _CMP_GE_OQ)));
  }
  double least = 0.0;
  for (int j = 0; j < LEVELS; ++j) {
    const vi lanes = (vi)reach[j];
    int64_t there = 0;
    for (int l = 0; l < 8; ++l) there += lanes[l];
    const int64_t certain = fewest - (n - there);  // of a row's entries reach this level
    least += certain > 0 ? (double)certain * layer : 0.0;
  }
  return (double)fewest * 0.5 * (high / THREE) <= LOSS * least;
}

// 16 columns a group: 4 columns by 4 digits in each half of 32 bytes. A unit is 2^-low / by, of which entries are multiples of 2^low.
// Entries below `least` units are listed, `most` of them at most.
static inline Digits write_digits(const float* x, int64_t n, float by, int low, int32_t least, int8_t* out, Small* list, int64_t most) {
  const __m256 scale = _mm256_set1_ps(by);
  const __m128i shift = _mm_cvtsi32_si128(low);
  const __m256i half = _mm256_set1_epi32(0x00808080);
  const __m256i by_digit = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m256d total = _mm256_setzero_pd();
  __m256i used = _mm256_setzero_si256();
  int32_t count = 0;
  for (int64_t i = 0; i < n; i += 8) {
    const __m256 y = _mm256_loadu_ps(x + i);
    __m256i whole = _mm256_sll_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(y, scale)), shift);
    const __m256i small = _mm256_cmpgt_epi32(_mm256_set1_epi32(least), _mm256_abs_epi32(whole));
    uint32_t bits = (uint32_t)_mm256_movemask_ps(_mm256_and_ps(_mm256_castsi256_ps(small), _mm256_cmp_ps(y, _mm256_setzero_ps(), _CMP_NEQ_UQ)));
    for (; bits; bits &= bits - 1) {
      if (count == most) return {};
      const int64_t c = i + __builtin_ctz(bits);
      list[count++] = {{-x[c], 0.0f, x[c], 0.0f}, (int32_t)(c / 16 * 16), (int32_t)(8 * (c % 4) + 2 * (c % 16 / 4))};
    }
    whole = _mm256_andnot_si256(small, whole);
    used = _mm256_or_si256(used, whole);
    total = _mm256_add_pd(total, _mm256_add_pd(_mm256_cvtepi32_pd(_mm256_castsi256_si128(whole)), _mm256_cvtepi32_pd(_mm256_extracti128_si256(whole, 1))));
    const __m256i digits = _mm256_xor_si256(_mm256_add_epi32(whole, half), half);  // a digit above 127 carries
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i * 4), _mm256_shuffle_epi8(digits, by_digit));
  }
  const int32_t skip = _mm256_testz_si256(used, _mm256_set1_epi32(0xffff)) ? 2 : _mm256_testz_si256(used, _mm256_set1_epi32(0xff)) ? 1 : 0;
  return {1.0 / ((double)by * (double)(1 << low)), sum(total), count, skip};
}

// The digits of a token behind their header; unit 0 where floats must do
static inline Digits digits_of(const float* x, int64_t n, int64_t fewest, int8_t* out, Small* list, int64_t most) {
  const Look seen = look_at(x, n);
  if (!(seen.high > 0.0f)) return {};
  const float by = 1.0f / unit_of(seen.high);
  if (!(seen.bits & 0xffff)) {  // mantissas of bf16
    const Digits half = write_digits(x, n, by, 0, HIGH_HALF, out, list, most / 2);
    if (half.unit > 0.0) return half;
  }
  const bool few_digits = (seen.bits & 0x1fff) == 0;  // mantissas of fp16 have three of the four
  if (!few_digits && fewest >= MANY && three_suffice(x, n, fewest, seen.high)) return write_digits(x, n, THREE / seen.high, 8, 0, out, list, most);
  return write_digits(x, n, by, 0, EXACT, out, list, most);
}

// Sums of 16 rows: codes times each of T lines of bytes, of which four columns lie together, the next four `step` bytes on, the
// next group `group` bytes on, the next line `line` bytes on.
template <int T>
static inline __attribute__((always_inline)) void multiply_bytes(const int32_t* codes, int64_t groups, const int8_t* x, int64_t group, int64_t step, int64_t line,
                                                                 int32_t sums[T][16]) {
  constexpr int GROUPS = 16;  // of 4 products of two codes up to 2 and two bytes: so many fit 16 bits
  const __m256i low = _mm256_set1_epi32(0x03030303), one = _mm256_set1_epi16(1);
  __m256i total[T][2];
  for (int i = 0; i < T; ++i) total[i][0] = total[i][1] = _mm256_setzero_si256();
  for (int64_t g0 = 0; g0 < groups; g0 += GROUPS) {
    const int64_t stop = g0 + GROUPS < groups ? g0 + GROUPS : groups;
    __m256i part[T][2];
#pragma GCC unroll 4
    for (int i = 0; i < T; ++i) part[i][0] = part[i][1] = _mm256_setzero_si256();
    for (int64_t g = g0; g < stop; ++g) {
      _mm_prefetch(reinterpret_cast<const char*>(codes + (g + 32) * 16), _MM_HINT_T0);
      const __m256i z0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + g * 16));
      const __m256i z1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + g * 16 + 8));
#pragma GCC unroll 4
      for (int s = 0; s < 4; ++s) {
        const __m256i c0 = _mm256_and_si256(s ? _mm256_srli_epi32(z0, 2 * s) : z0, low);
        const __m256i c1 = _mm256_and_si256(s ? _mm256_srli_epi32(z1, 2 * s) : z1, low);
#pragma GCC unroll 4
        for (int i = 0; i < T; ++i) {
          const __m256i y = _mm256_set1_epi32(four(x + g * group + s * step + i * line));
          part[i][0] = _mm256_add_epi16(part[i][0], _mm256_maddubs_epi16(c0, y));
          part[i][1] = _mm256_add_epi16(part[i][1], _mm256_maddubs_epi16(c1, y));
          asm("" : "+x"(part[i][0]), "+x"(part[i][1]));  // added one after the other: as a tree they would not fit the registers
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < T; ++i)
      for (int h = 0; h < 2; ++h) total[i][h] = _mm256_add_epi32(total[i][h], _mm256_madd_epi16(part[i][h], one));
  }
  for (int i = 0; i < T; ++i)
    for (int h = 0; h < 2; ++h) _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums[i] + 8 * h), total[i][h]);
}

// One row block against one token
static inline void add_digits(const TernaryTask& t, const Digits& d, const int8_t* x, int64_t block, float* sums) {
  int32_t digit[4][16];
  const int32_t* codes = t.codes + block * t.groups * 16;
  if (d.skip == 2)
    multiply_bytes<2>(codes, t.groups, x + 8, 64, 16, 4, digit + 2);
  else if (d.skip == 1)
    multiply_bytes<3>(codes, t.groups, x + 4, 64, 16, 4, digit + 1);
  else
    multiply_bytes<4>(codes, t.groups, x, 64, 16, 4, digit);
  const Small* list = reinterpret_cast<const Small*>(x + t.groups * 64);
  __m256 rest[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  for (int64_t n = 0; n < d.small; ++n) {
    const __m256 products = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(list[n].products));
    const __m128i shift = _mm_cvtsi32_si128(list[n].shift);
    for (int h = 0; h < 2; ++h) {
      const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + list[n].word + 8 * h));
      rest[h] = _mm256_add_ps(rest[h], _mm256_permutevar_ps(products, _mm256_srl_epi32(words, shift)));
    }
  }
  const __m256d total = _mm256_set1_pd(d.total), unit = _mm256_set1_pd(d.unit), base = _mm256_set1_pd(256.0);
  for (int r = 0; r < 16; r += 4) {
    const auto part = [&](int i) { return _mm256_cvtepi32_pd(_mm_loadu_si128(reinterpret_cast<const __m128i*>(digit[i] + r))); };
    __m256d whole = part(3);
    for (int i = 2; i >= d.skip; --i) whole = _mm256_fmadd_pd(whole, base, part(i));
    for (int i = 0; i < d.skip; ++i) whole = _mm256_mul_pd(whole, base);
    const __m128 floats = r % 8 ? _mm256_extractf128_ps(rest[r / 8], 1) : _mm256_castps256_ps128(rest[r / 8]);
    const __m256d sum = _mm256_fmadd_pd(_mm256_sub_pd(whole, total), unit, _mm256_cvtps_pd(floats));
    _mm_storeu_ps(sums + r, _mm256_cvtpd_ps(sum));
  }
}

}  // namespace SIEVE_LEVEL
}  // namespace sieve

#endif
