// Keys of the gate as rows of floats: their codes, or the keys themselves.
#pragma once
#include "kernels.h"
#include "kernels/lanes.h"
#include "kernels/vec.h"

namespace sieve {
namespace SIEVE_LEVEL {

// Rows of a run of keys as floats [keys][wide].
static inline void read_keys(const KeyScore& s, int64_t first, int n, float* rows) {
  for (int i = 0; i < n; ++i) {
    float* row = rows + (int64_t)i * s.wide;
    if (!s.codes) {
      read_row(at(*s.key, s.b, s.h, first + i, 0), s.key->stride[3], s.key->dtype, s.d, s.wide, row);
      continue;
    }
    const int8_t* code = s.codes + (first + i) * s.wide;
    int c = 0;
#if defined(__AVX512F__)
    const __m512i one = _mm512_set1_epi32(s.bits == 8 ? 1 : 0);
    for (; c < s.wide; c += 16) {
      __m512i x = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(code + c)));
      if (s.bits == 8) x = _mm512_add_epi32(_mm512_add_epi32(x, x), one);
      _mm512_storeu_ps(row + c, _mm512_cvtepi32_ps(x));
    }
#elif defined(__AVX2__)
    const __m256i odd = _mm256_set1_epi32((1 << s.bits) - 1);
    for (; c < s.wide; c += 8) {
      const __m256i x = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(code + c)));
      _mm256_storeu_ps(row + c, _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_add_epi32(x, x), odd)));
    }
#else
    for (; c < s.wide; ++c) row[c] = (float)twice_level(PLAIN_CODES, code[c], s.bits);
#endif
    // behind the last channel the query is zero, whatever the code
  }
}

}  // namespace SIEVE_LEVEL
}  // namespace sieve
