// Integer dots of rounded queries with the codes of keys, by vectors of bytes. Included by scan.cpp alone.
#pragma once
#include "kernels/four.h"
#if !defined(__AVX512BW__)
#include "kernels/scan_bits.h"
#endif

namespace sieve {
namespace SIEVE_LEVEL {

#if defined(__AVX512BW__)
constexpr int SCAN_BYTES = 64;  // channels of a vector
constexpr int TOGETHER = 4;    // keys whose products are summed together: one vector of sums for SCAN_ROWS rows
typedef __m512i vb;
#else
constexpr int SCAN_BYTES = 32;
constexpr int TOGETHER = 2;
typedef __m256i vb;
#endif

#if defined(__AVX512BW__)
static inline bool without_gaps(const Scan&) { return false; }
static inline bool two_in_one(const Scan&) { return false; }
int64_t scan_bytes(int32_t d, int32_t rows) { return up(d, SCAN_BYTES) * rows; }
#else
static inline bool without_gaps(const Scan& s) { return fills_vectors(s.d); }
static inline bool two_in_one(const Scan& s) { return are_one(s.d, s.digits, s.bits); }
int64_t scan_bytes(int32_t d, int32_t rows) { return (fills_vectors(d) ? LINE : up(d, SCAN_BYTES)) * rows; }
#endif

// Bit 0 of a plane's byte is its last channel, so the channels of a query turn round within each eight.
void pack_scan(const int8_t* q, int32_t d, int32_t rows, int32_t digits, int32_t bits, void* out) {
  int8_t* to = static_cast<int8_t*>(out);
#if !defined(__AVX512BW__)
  if (fills_vectors(d)) {
    if (are_one(d, digits, bits))
      for (int r = 0; r < rows / 2; ++r) {
        const int8_t* first = q + (int64_t)(r / SCAN_ROWS * 2 * SCAN_ROWS + r % SCAN_ROWS) * d;
        pack_two(first, first + SCAN_ROWS * d, d, reinterpret_cast<int16_t*>(to + (int64_t)r * 2 * LINE));
      }
    else
      for (int r = 0; r < rows; ++r) pack_line(q + (int64_t)r * d, d, to + (int64_t)r * LINE);
    return;
  }
#else
  (void)digits, (void)bits;
#endif
  const int64_t wide = up(d, SCAN_BYTES);
  memset(to, 0, scan_bytes(d, rows));
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < d; ++c) to[r * wide + (c ^ 7)] = q[(int64_t)r * d + c];
}

// A copy of known length is one load; any other goes through memory byte by byte, and then waits for it.
template <class Word>
static inline Word first_bits(const uint8_t* at, int64_t bytes) {
  Word bits = 0;
  if (bytes >= (int64_t)sizeof(Word))
    memcpy(&bits, at, sizeof(Word));
  else
    memcpy(&bits, at, bytes);
  return bits;
}

// `code` with `weight` added to every byte whose bit of `at` is set; `bytes` of `at` may be read.
#if defined(__AVX512BW__)
static inline vb plane_of(const uint8_t* at, int64_t bytes, vb code, int weight) {
  const uint64_t bits = first_bits<uint64_t>(at, bytes);
  return _mm512_mask_add_epi8(code, bits, code, _mm512_set1_epi8((char)weight));
}
static inline vb zero_bytes() { return _mm512_setzero_si512(); }
static inline void put_bytes(uint8_t* to, vb x) { _mm512_storeu_si512(to, x); }
static inline vb get_bytes(const void* from) { return _mm512_loadu_si512(from); }
// `sum` and four neighbouring products, `by` times; codes of up to PRODUCT_BITS bits
#if defined(__AVX512VNNI__)
constexpr int PRODUCT_BITS = 8;
static inline vb add_fours(vb sum, vb codes, vb q, int) { return _mm512_dpbusd_epi32(sum, codes, q); }
#else
constexpr int PRODUCT_BITS = 7;
static inline vb add_fours(vb sum, vb codes, vb q, int by) {
  const vb fours = _mm512_madd_epi16(_mm512_maddubs_epi16(codes, q), _mm512_set1_epi16((short)by));
  return _mm512_add_epi32(sum, fours);
}
#endif
// the sums of the lanes of 16 vectors, in their order
static inline void put_sums(const vb* v, int32_t* to) {
  __m512i four[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const vb* x = v + 4 * i;
    const __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(x[0], x[1]), _mm512_unpackhi_epi32(x[0], x[1]));
    const __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(x[2], x[3]), _mm512_unpackhi_epi32(x[2], x[3]));
    four[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
  }
  const auto halves = [](__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
  };
  _mm512_storeu_si512(to, halves(halves(four[0], four[1]), halves(four[2], four[3])));
}
#else
static inline vb plane_of(const uint8_t* at, int64_t bytes, vb code, int weight) {
  const int32_t bits = first_bits<int32_t>(at, bytes);
  const __m256i byte = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
  const __m256i bit = _mm256_set1_epi64x((long long)0x8040201008040201ull);
  const __m256i mine = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), byte), bit);
  return _mm256_or_si256(code, _mm256_and_si256(_mm256_cmpeq_epi8(mine, bit), _mm256_set1_epi8((char)weight)));
}
static inline vb zero_bytes() { return _mm256_setzero_si256(); }
static inline void put_bytes(uint8_t* to, vb x) { _mm256_storeu_si256((__m256i*)to, x); }
static inline vb get_bytes(const void* from) { return _mm256_loadu_si256((const __m256i*)from); }
constexpr int PRODUCT_BITS = 7;
static inline vb add_fours(vb sum, vb codes, vb q, int by) {
  const vb fours = _mm256_madd_epi16(_mm256_maddubs_epi16(codes, q), _mm256_set1_epi16((short)by));
  return _mm256_add_epi32(sum, fours);
}
// the sums of the lanes of 8 vectors, in their order
static inline void put_sums(const vb* v, int32_t* to) {
  const __m256i a = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
  const __m256i b = _mm256_hadd_epi32(_mm256_hadd_epi32(v[4], v[5]), _mm256_hadd_epi32(v[6], v[7]));
  const __m256i sums = _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
  _mm256_storeu_si256((__m256i*)to, sums);
}
#endif

// Where products are added in pairs of 16 bits, these hold 7 bits of code, and the leading plane of 8 goes apart.
template <int Bits>
static inline void dots_of(const Scan& s, const uint8_t* const* planes, int64_t stride, int32_t* dots, uint8_t* codes) {
#if !defined(__AVX512BW__)
  if (fills_vectors(s.d)) return dots_of_bits<Bits>(s, planes, dots);
#endif
  constexpr int LOW = Bits <= PRODUCT_BITS ? Bits : PRODUCT_BITS, PARTS = Bits <= PRODUCT_BITS ? 1 : 2;
  const int64_t wide = up(s.d, SCAN_BYTES), bytes = (s.d + 7) / 8;
  const int groups = s.groups * s.digits;
  const int8_t* query = static_cast<const int8_t*>(s.query);
  for (int key = 0; key < SCAN_CHUNK; key += TOGETHER) {
    for (int64_t c = 0; c < wide; c += SCAN_BYTES)
#pragma GCC unroll 4
      for (int k = 0; k < TOGETHER; ++k) {
        const int64_t at = (key + k) * stride + c / 8;
        uint8_t* to = codes + c * TOGETHER * PARTS + k * SCAN_BYTES;
        vb code = zero_bytes();
#pragma GCC unroll 8
        for (int b = 0; b < LOW; ++b) code = plane_of(planes[b + PARTS - 1] + at, bytes - c / 8, code, 1 << (LOW - 1 - b));
        put_bytes(to, code);
        if (PARTS == 2) put_bytes(to + TOGETHER * SCAN_BYTES, plane_of(planes[0] + at, bytes - c / 8, zero_bytes(), 1));
      }
    for (int g = 0; g < groups; ++g) {
      vb sums[TOGETHER * SCAN_ROWS];
#pragma GCC unroll 16
      for (int i = 0; i < TOGETHER * SCAN_ROWS; ++i) sums[i] = zero_bytes();
      for (int64_t c = 0; c < wide; c += SCAN_BYTES) {
        const uint8_t* from = codes + c * TOGETHER * PARTS;
#pragma GCC unroll 4
        for (int r = 0; r < SCAN_ROWS; ++r) {
          const vb q = get_bytes(query + (g * SCAN_ROWS + r) * wide + c);
#pragma GCC unroll 4
          for (int k = 0; k < TOGETHER; ++k) {
            vb& sum = sums[k * SCAN_ROWS + r];
            sum = add_fours(sum, get_bytes(from + k * SCAN_BYTES), q, 1);
            if (PARTS == 2) sum = add_fours(sum, get_bytes(from + (TOGETHER + k) * SCAN_BYTES), q, 128);
          }
        }
      }
      put_sums(sums, dots + (g * SCAN_CHUNK + key) * SCAN_ROWS);
    }
  }
}

static inline void integer_dots(const Scan& s, const uint8_t* const* planes, int64_t stride, int32_t* dots, void* scratch) {
  uint8_t* codes = static_cast<uint8_t*>(scratch);
  switch (s.bits) {
    case 1: dots_of<1>(s, planes, stride, dots, codes); break;
    case 2: dots_of<2>(s, planes, stride, dots, codes); break;
    case 3: dots_of<3>(s, planes, stride, dots, codes); break;
    case 4: dots_of<4>(s, planes, stride, dots, codes); break;
    case 5: dots_of<5>(s, planes, stride, dots, codes); break;
    case 6: dots_of<6>(s, planes, stride, dots, codes); break;
    case 7: dots_of<7>(s, planes, stride, dots, codes); break;
    default: dots_of<8>(s, planes, stride, dots, codes);
  }
}

static inline void begin() {}
static inline void end() {}

}  // namespace SIEVE_LEVEL
}  // namespace sieve
