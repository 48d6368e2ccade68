// The two inner products of attention in bf16 on vectors (AVX512-BF16).
#pragma once
#include "kernels/bf16.h"

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)

namespace sieve {
namespace SIEVE_LEVEL {

constexpr bool VALUE_PAIRS = false;

static inline void begin_products() {}
static inline void end_products() {}

static inline __m512bh two_of(const uint16_t* x) {
  int32_t both;
  memcpy(&both, x, 4);
  return (__m512bh)_mm512_set1_epi32(both);
}

// acc [R][C] += pairs of `a` times n lines of pairs
template <int R, int C>
static inline __attribute__((always_inline)) void add_pairs(__m512 (&acc)[R][C], const uint16_t* a, int64_t stride, int n, const uint16_t* const* line) {
  for (int k = 0; k < n; ++k) {
    __m512bh b[C];
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) b[j] = (__m512bh)_mm512_loadu_si512(line[j] + k * 32);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512bh x = two_of(a + r * stride + 2 * k);
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) acc[r][j] = _mm512_dpbf16_ps(acc[r][j], x, b[j]);
    }
  }
}

template <int R, int C>
static inline void dots_block(const uint16_t* q, int64_t stride, int64_t wide, const uint16_t* const* panel, float* s) {
  __m512 acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) acc[r][j] = _mm512_setzero_ps();
  add_pairs<R, C>(acc, q, stride, (int)(wide / 2), panel);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) _mm512_storeu_ps(s + r * S_STRIDE + j * PANEL, acc[r][j]);
}

template <int R, int C>
static inline void weigh_block(const uint16_t* p, const uint16_t* const* half, int count, int column, float* o, int64_t wide) {
  __m512 acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) acc[r][j] = _mm512_loadu_ps(o + r * wide + column + j * 16);
  for (int i = 0; i < count; ++i) {
    const uint16_t* line[C];
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) line[j] = half[i] + (column + j * 16) * 32;
    add_pairs<R, C>(acc, p + i * PANEL, CHUNK, PANEL / 2, line);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) _mm512_storeu_ps(o + r * wide + column + j * 16, acc[r][j]);
}

// Numbers that a compiler knows
template <int N>
struct Count {
  static constexpr int value = N;
};

// Goes over vectors of columns, four at a time, then fewer.
template <class Body>
static inline __attribute__((always_inline)) void each_columns(int columns, const Body& body) {
  int i = 0;
  for (; i + 4 <= columns; i += 4) body(Count<4>{}, i);
  if (i + 2 <= columns) {
    body(Count<2>{}, i);
    i += 2;
  }
  if (i < columns) body(Count<1>{}, i);
}

// Goes over rows in blocks of 6, then fewer: 24 sums, the lines that they share and a pair of the left factor fill the registers.
template <class Body>
static inline __attribute__((always_inline)) void each_rows(int rows, const Body& body) {
  int r = 0;
  for (; r + 6 <= rows; r += 6) body(Count<6>{}, r);
  if (r + 4 <= rows) {
    body(Count<4>{}, r);
    r += 4;
  }
  if (r + 2 <= rows) {
    body(Count<2>{}, r);
    r += 2;
  }
  if (r < rows) body(Count<1>{}, r);
}

// s [rows][count * 16 keys] from queries and packed key panels
static inline void dots(const uint16_t* q, int64_t stride, int rows, int64_t wide, const uint16_t* const* panel, int count, float* s) {
  each_columns(count, [&](auto some, int i) {
    each_rows(rows, [&](auto n, int r) {
      dots_block<n.value, some.value>(q + r * stride, stride, wide, panel + i, s + r * S_STRIDE + i * PANEL);
    });
  });
}

// o [rows][columns from `column` to `end`] += weights times values; `half` are the panels
static inline void weigh(const uint16_t* p, int rows, const uint16_t* const* half, int count, int column, int end, float* o, int64_t wide) {
  each_columns((end - column) / 16, [&](auto some, int j) {
    each_rows(rows, [&](auto n, int r) {
      weigh_block<n.value, some.value>(p + r * CHUNK, half, count, column + j * 16, o + r * wide, wide);
    });
  });
}

}  // namespace SIEVE_LEVEL
}  // namespace sieve

#endif
