// Ternary products of few tokens with AVX2, where 32 bytes are looked up at once and floats only 8 at a time. A token of floats becomes
// whole numbers of a unit, x_c = unit * n_c, and every pair of channels (a, b) a table of the 9 sums
//   (t_a n_a + |n_a|) + (t_b n_b + |n_b|) >= 0
// whose digits in base 64 lie in planes of bytes: looked up by the codes of 32 rows at a time, four digits add up within a byte, and
// the sum over all channels, less the sum of the |n_c|, is free of rounding.
//
// The unit is as fine as the upper plane allows, where four digits, of the eight channels of a step, must stay below 256: P planes
// hold steps of up to 126 * 64^(P - 1) units. Entries that end in zeros (they were bf16 or fp16) take three or four planes of a unit
// that is a power of two and are exact. Where no row can be rounded by more than 2^-20 of the sum of its |x_c| (sums of floats
// in eight chains may be by 2^-24 times an eighth of the channels), others take four planes of the finest unit. A row with m trits
// that are not zero loses at most m / 2 units, and holds at least the m smallest |x_c|; what that is to a row grows with m, so the row
// with fewest trits decides. Where roundings are independent it is some 2^-28 of 4,096 normal entries, less than the 2^-26 of sums of
// floats. Any other token takes five planes, and entries below 2^20 units, which would lose digits of their own where a row may read
// nothing else, are added as floats: so every entry is rounded to 2^-21 of itself at most. A token with many of those is left to
// floats altogether.
#pragma once
#include <cmath>

#include "kernels/functions.h"
#include "kernels/ternary_codes.h"

#if defined(__AVX2__) && !defined(__AVX512F__)

namespace sieve {
namespace SIEVE_LEVEL {

constexpr int MOST_PLANES = 5;
constexpr int STEP = 64;                         // bytes of a plane's tables of four pairs: two bytes of codes
constexpr float FOUR_DIGITS = 126.0f;            // in units of the upper plane; less than 127.5 for what is rounded
constexpr float LOSS = 14.9f / 16777216.0f;      // 2^-20, less 2^-24 for the product that makes an entry a number of units
constexpr int64_t MANY = 512;                    // trits from which independent roundings cancel better than those of float sums
constexpr float SMALL = 1e-27f, LARGE = 1e30f;   // magnitudes between which units are normal numbers
constexpr int64_t WIDE = int64_t{1} << 16;       // groups up to which sums are exact in a double
constexpr int64_t FULL = 128;                    // groups of two steps of up to 255 that fit 16 bits

// What ternary_tables writes before the tables of a token
struct alignas(32) Planes {
  double unit;    // 0: floats lie here, no tables
  double total;   // of the |n_c|
  int32_t count;  // planes
  int32_t small;  // entries that are floats, listed behind the most tables that there can be
};
struct alignas(32) Small {
  float products[4];  // -x, 0, x: what a code reads
  int32_t byte, shift;  // where its codes are in a row block
};
constexpr int HEADER_FLOATS = sizeof(Planes) / sizeof(float);

static inline Small* list_of(uint8_t* tables, int64_t groups) { return reinterpret_cast<Small*>(tables + groups * 2 * MOST_PLANES * STEP); }

static inline double sum(__m256d x) { return x[0] + x[1] + x[2] + x[3]; }

struct Look {
  float high;     // the largest size of an entry, or 0 where whole numbers cannot hold the token
  float step;     // the largest sum of the sizes of a step
  uint32_t bits;  // that are set in an entry
};

static inline Look look_at(const float* x, int64_t groups) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  __m256 most = _mm256_setzero_ps(), step = _mm256_setzero_ps(), bits = _mm256_setzero_ps(), other = _mm256_setzero_ps();
  for (int64_t g = 0; g < groups; ++g) {
    const __m256 y0 = _mm256_loadu_ps(x + g * 16), y1 = _mm256_loadu_ps(x + g * 16 + 8);
    const __m256 a0 = _mm256_andnot_ps(sign, y0), a1 = _mm256_andnot_ps(sign, y1);
    most = _mm256_max_ps(most, _mm256_max_ps(a0, a1));
    other = _mm256_or_ps(other, _mm256_cmp_ps(y0, y1, _CMP_UNORD_Q));  // a maximum forgets NaN
    bits = _mm256_or_ps(bits, _mm256_or_ps(y0, y1));
    // a step is two bytes: columns 0, 1 or 2, 3 of every four
    const __m256 two = _mm256_add_ps(a0, a1), four = _mm256_add_ps(two, _mm256_permute2f128_ps(two, two, 1));
    step = _mm256_max_ps(step, _mm256_add_ps(four, _mm256_permute_ps(four, 0xb1)));
  }
  Look found{0.0f, 0.0f, 0};
  for (int l = 0; l < 8; ++l) {
    uint32_t word;
    memcpy(&word, reinterpret_cast<const float*>(&bits) + l, 4);
    found.bits |= word;
    found.high = most[l] > found.high ? most[l] : found.high;
    found.step = step[l] > found.step ? step[l] : found.step;
  }
  const bool known = _mm256_movemask_ps(other) == 0 && found.high > SMALL && found.high < LARGE;
  if (!known || groups > WIDE) found.high = 0.0f;
  return found;
}

// Units to one for `count` planes
static inline float finest(const Look& seen, int count) { return FOUR_DIGITS * (float)(int64_t{1} << 6 * (count - 1)) / seen.step; }
static inline float power_of_two_below(float x) {
  int e;
  frexpf(x, &e);
  return ldexpf(1.0f, e - 1);
}

// Whether rows of at least `fewest` entries lose no more than LOSS of the sum of their sizes where entries are rounded to units. The
// sum of the smallest entries is counted in layers: what is at least level j lies above all layers below.
static inline bool rounding_is_small(const float* x, int64_t n, int64_t fewest, float high, float unit) {
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
  return (double)fewest * 0.5 * unit <= LOSS * least;
}

// The tables of a group of 16 whole numbers: per step and plane four pairs, entry 4 * second + first
template <int P>
static inline void write_group(__m256i n0, __m256i n1, uint8_t* out) {
  const __m256i trit = _mm256_setr_epi32(-1, 0, 1, 0, -1, 0, 1, 0), digit = _mm256_set1_epi32(63);
  // both pairs of a byte: columns 0 to 3 and 8 to 11 with 4 to 7 and 12 to 15
  const __m256i firsts = _mm256_permute2x128_si256(n0, n1, 0x20), seconds = _mm256_permute2x128_si256(n0, n1, 0x31);
  const auto pairs_of = [&](__m256i a, __m256i b, uint8_t* to) {
    const __m256i size = _mm256_abs_epi32(b), first = _mm256_add_epi32(_mm256_abs_epi32(a), _mm256_sign_epi32(a, trit));
    __m256i v[3] = {_mm256_add_epi32(first, _mm256_sub_epi32(size, b)), _mm256_add_epi32(first, size), _mm256_add_epi32(first, _mm256_add_epi32(size, b))};
#pragma GCC unroll 5
    for (int p = 0; p < P; ++p) {
      __m256i d[3];
      for (int k = 0; k < 3; ++k) d[k] = p == P - 1 ? v[k] : _mm256_and_si256(v[k], digit);
      const __m256i low = _mm256_packus_epi32(d[0], d[1]), high = _mm256_packus_epi32(d[2], d[2]);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + p * STEP), _mm256_packus_epi16(low, high));
      for (int k = 0; k < 3; ++k) v[k] = _mm256_srli_epi32(v[k], 6);
    }
  };
  pairs_of(_mm256_shuffle_epi32(firsts, 0x00), _mm256_shuffle_epi32(seconds, 0x00), out);
  pairs_of(_mm256_shuffle_epi32(firsts, 0x55), _mm256_shuffle_epi32(seconds, 0x55), out + 32);
  pairs_of(_mm256_shuffle_epi32(firsts, 0xaa), _mm256_shuffle_epi32(seconds, 0xaa), out + P * STEP);
  pairs_of(_mm256_shuffle_epi32(firsts, 0xff), _mm256_shuffle_epi32(seconds, 0xff), out + P * STEP + 32);
}

// Tables of P planes, `by` units to one. Entries below `least` units are listed, `most` of them at most; unit 0 where there are more.
template <int P>
static inline Planes write_tables(const float* x, int64_t groups, float by, int32_t least, uint8_t* out, int64_t most) {
  const __m256 scale = _mm256_set1_ps(by);
  Small* list = list_of(out, groups);
  __m256d total = _mm256_setzero_pd();
  int32_t count = 0;
  for (int64_t g = 0; g < groups; ++g) {
    __m256i whole[2];
    for (int h = 0; h < 2; ++h) {
      const __m256 y = _mm256_loadu_ps(x + g * 16 + 8 * h);
      const __m256i n = _mm256_cvtps_epi32(_mm256_mul_ps(y, scale)), size = _mm256_abs_epi32(n);
      const __m256i small = _mm256_cmpgt_epi32(_mm256_set1_epi32(least), size);
      uint32_t bits = (uint32_t)_mm256_movemask_ps(_mm256_and_ps(_mm256_castsi256_ps(small), _mm256_cmp_ps(y, _mm256_setzero_ps(), _CMP_NEQ_UQ)));
      for (; bits; bits &= bits - 1) {
        if (count == most) return {};
        const int c = 8 * h + __builtin_ctz(bits);
        const float one = x[g * 16 + c];
        list[count++] = {{-one, 0.0f, one, 0.0f}, (int32_t)(g * TERNARY_BYTES + c % 4 * TERNARY_ROWS), 2 * (c / 4)};
      }
      whole[h] = _mm256_andnot_si256(small, n);
      const __m256i counted = _mm256_andnot_si256(small, size);
      total = _mm256_add_pd(total, _mm256_add_pd(_mm256_cvtepi32_pd(_mm256_castsi256_si128(counted)), _mm256_cvtepi32_pd(_mm256_extracti128_si256(counted, 1))));
    }
    write_group<P>(whole[0], whole[1], out + g * 2 * P * STEP);
  }
  return {1.0 / (double)by, sum(total), P, count};
}

// The tables of a token behind their header; unit 0 where floats must do
static inline Planes planes_of(const float* x, int64_t groups, int64_t fewest, uint8_t* out) {
  const Look seen = look_at(x, groups);
  if (!(seen.bits & 0x7fffffff)) return write_tables<3>(x, groups, 1.0f, 0, out, 0);  // zeros, as padding has them
  if (!(seen.high > 0.0f)) return {};
  int32_t exact = 1 << 20;  // units from which a mantissa is whole
  if (!(seen.bits & 0xffff)) {  // that of a bf16
    exact = 1 << 7;
    const Planes made = write_tables<3>(x, groups, power_of_two_below(finest(seen, 3)), exact, out, groups / 2);
    if (made.unit > 0.0) return made;
  } else if (!(seen.bits & 0x1fff)) {  // that of an fp16
    exact = 1 << 10;
    const Planes made = write_tables<4>(x, groups, power_of_two_below(finest(seen, 4)), exact, out, groups / 2);
    if (made.unit > 0.0) return made;
  } else if (fewest >= MANY) {
    const float by = finest(seen, 4);
    if (rounding_is_small(x, groups * 16, fewest, seen.high, 1.0f / by)) return write_tables<4>(x, groups, by, 0, out, 0);
  }
  return write_tables<5>(x, groups, power_of_two_below(finest(seen, 5)), exact, out, groups);
}

// Sums of P planes of 32 rows: steps of tables lie `step` bytes apart
template <int P>
static inline __attribute__((always_inline)) void look_up_bytes(const uint8_t* codes, int64_t groups, const uint8_t* tables, int64_t step, int32_t sums[P][32]) {
  const __m256i nibble = _mm256_set1_epi8(15);
  for (int p = 0; p < P; ++p) memset(sums[p], 0, sizeof(sums[p]));
  for (int64_t g0 = 0; g0 < groups; g0 += FULL) {
    const int64_t stop = g0 + FULL < groups ? g0 + FULL : groups;
    // Words of two rows' bytes, and the upper row alone: what words hold above 16 bits is lost, and not needed
    __m256i both[P], upper[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) both[p] = upper[p] = _mm256_setzero_si256();
    for (int64_t s = 2 * g0; s < 2 * stop; ++s) {
      const uint8_t* here = codes + s * STEP;
      _mm_prefetch(reinterpret_cast<const char*>(here + 2048), _MM_HINT_T0);
      const __m256i z0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(here));
      const __m256i z1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(here + 32));
      const __m256i pair[4] = {_mm256_and_si256(z0, nibble), _mm256_and_si256(_mm256_srli_epi16(z0, 4), nibble),
                               _mm256_and_si256(z1, nibble), _mm256_and_si256(_mm256_srli_epi16(z1, 4), nibble)};
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        const auto found = [&](int i) {
          const __m128i* table = reinterpret_cast<const __m128i*>(tables + s * step + p * STEP + i * 16);
          return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(table)), pair[i]);
        };
        const __m256i four = _mm256_add_epi8(_mm256_add_epi8(found(0), found(1)), _mm256_add_epi8(found(2), found(3)));
        both[p] = _mm256_add_epi16(both[p], four);
        upper[p] = _mm256_add_epi16(upper[p], _mm256_srli_epi16(four, 8));
        asm("" : "+x"(both[p]), "+x"(upper[p]));  // added one after the other: as a tree they would not fit the registers
      }
    }
    for (int p = 0; p < P; ++p) {
      const __m256i lower = _mm256_sub_epi16(both[p], _mm256_slli_epi16(upper[p], 8));
      const __m256i rows[2] = {_mm256_unpacklo_epi16(lower, upper[p]), _mm256_unpackhi_epi16(lower, upper[p])};
      for (int quarter = 0; quarter < 4; ++quarter) {
        const __m128i eight = quarter < 2 ? _mm256_castsi256_si128(rows[quarter]) : _mm256_extracti128_si256(rows[quarter - 2], 1);
        __m256i* to = reinterpret_cast<__m256i*>(sums[p] + 8 * quarter);
        _mm256_storeu_si256(to, _mm256_add_epi32(_mm256_loadu_si256(to), _mm256_cvtepu16_epi32(eight)));
      }
    }
  }
}

// One row block against one token
static inline void add_planes(const Planes& made, const uint8_t* codes, int64_t groups, const uint8_t* tables, float* sums) {
  int32_t digit[MOST_PLANES][32];
  const int64_t step = made.count * STEP;
  if (made.count == 4) {
    look_up_bytes<4>(codes, groups, tables, step, digit);
  } else {
    look_up_bytes<3>(codes, groups, tables, step, digit);
    if (made.count == 5) look_up_bytes<2>(codes, groups, tables + 3 * STEP, step, digit + 3);  // five would not fit the registers
  }
  const Small* list = list_of(const_cast<uint8_t*>(tables), groups);
  __m256 rest[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
  for (int64_t n = 0; n < made.small; ++n) {
    const __m256 products = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(list[n].products));
    const __m128i shift = _mm_cvtsi32_si128(list[n].shift);
    for (int h = 0; h < 4; ++h) {
      const __m256i bytes = (__m256i)rows_of_bytes(codes + list[n].byte + 8 * h);
      rest[h] = _mm256_add_ps(rest[h], _mm256_permutevar_ps(products, _mm256_srl_epi32(bytes, shift)));
    }
  }
  const __m256d total = _mm256_set1_pd(made.total), unit = _mm256_set1_pd(made.unit), base = _mm256_set1_pd(64.0);
  for (int r = 0; r < TERNARY_ROWS; r += 4) {
    const auto part = [&](int p) { return _mm256_cvtepi32_pd(_mm_loadu_si128(reinterpret_cast<const __m128i*>(digit[p] + r))); };
    __m256d whole = part(made.count - 1);
    for (int p = made.count - 2; p >= 0; --p) whole = _mm256_fmadd_pd(whole, base, part(p));
    const __m128 floats = r % 8 ? _mm256_extractf128_ps(rest[r / 8], 1) : _mm256_castps256_ps128(rest[r / 8]);
    const __m256d sum = _mm256_fmadd_pd(_mm256_sub_pd(whole, total), unit, _mm256_cvtps_pd(floats));
    _mm_storeu_ps(sums + r, _mm256_cvtpd_ps(sum));
  }
}

}  // namespace SIEVE_LEVEL
}  // namespace sieve

#endif
