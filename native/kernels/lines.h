// Products of a few query rows with keys and values where they lie: every number is read once and converted in registers.
#pragma once
#include "kernels/logits.h"

namespace sieve {
namespace SIEVE_LEVEL {

constexpr int DIRECT_ROWS = 8;  // more rows are worth packing keys for

// Rows that are read next are asked for line by line while others are multiplied: blocks that were chosen lie anywhere, so
// hardware does not foresee them, and asking for many at once would hold up what is computed.

// The sums of the lanes of LANES vectors, in their order.
static inline vf lane_sums(const vf* v) {
#if defined(__AVX512F__)
  __m512 four[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const vf* x = v + 4 * i;
    const auto pairs = [](vf a, vf b) {
      return _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b)));
    };
    const __m512d a = pairs(x[0], x[1]), b = pairs(x[2], x[3]);
    four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  const auto halves = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return (vf)halves(halves(four[0], four[1]), halves(four[2], four[3]));
#elif defined(__AVX2__)
  const auto two = [&](int i) { return _mm256_hadd_ps((__m256)v[i], (__m256)v[i + 1]); };
  const __m256 a = _mm256_hadd_ps(two(0), two(2)), b = _mm256_hadd_ps(two(4), two(6));
  return (vf)_mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
#else
  vf sums;
  for (int i = 0; i < LANES; ++i) sums[i] = sum(v[i]);
  return sums;
#endif
}

// s [R][16] = q [R][d] times the keys of a panel; what stands behind the last key is any number. Key i asks for next[i].
template <DType T, int R>
static inline void dot_keys(const float* q, int d, const char* data, int64_t stride, int there, float* s, const char* const* next, int64_t next_bytes) {
  constexpr int K = LANES / R;  // keys whose sums fill a vector
#pragma GCC unroll 1
  for (int key = 0; key < PANEL; key += K) {
    const char* at[K];
    for (int i = 0; i < K; ++i) at[i] = data + (key + i < there ? key + i : 0) * stride;
    if (next)
      for (int i = 0; i < K; ++i)
        for (int64_t c = 0; c < next_bytes; c += 64) __builtin_prefetch(next[key + i] + c, 0, 2);
    vf total[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) total[i] = vf{};
#pragma GCC unroll 1
    for (int c = 0; c < d; c += LANES) {
      vf x[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) x[r] = load(q + (int64_t)r * d + c);
#pragma GCC unroll 16
      for (int i = 0; i < K; ++i) {
        const vf y = load_as_float(at[i], c, T);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) total[r * K + i] += x[r] * y;
      }
    }
    alignas(64) float sums[LANES];
    store(sums, lane_sums(total));
    for (int r = 0; r < R; ++r) memcpy(s + (int64_t)r * S_STRIDE + key, sums + r * K, K * sizeof(float));
  }
}

// `next` are the rows that the 16 keys ask for, or null
template <DType T>
static inline void dot_panel(const float* q, int rows, int d, const char* data, int64_t stride, int there, float* s, const char* const* next, int64_t next_bytes) {
  int r = 0;
  for (; r + 4 <= rows; r += 4, next = nullptr)
    dot_keys<T, 4>(q + (int64_t)r * d, d, data, stride, there, s + r * S_STRIDE, next, next_bytes);
  for (; r + 2 <= rows; r += 2, next = nullptr)
    dot_keys<T, 2>(q + (int64_t)r * d, d, data, stride, there, s + r * S_STRIDE, next, next_bytes);
  if (r < rows) dot_keys<T, 1>(q + (int64_t)r * d, d, data, stride, there, s + r * S_STRIDE, next, next_bytes);
}

// o [R][..] += weights [R][n] times n rows of numbers, C vectors of columns from `column`. Row j asks for the same share of next[j].
template <DType T, int R, int C>
static inline void add_columns(const float* weight, int n, const char* const* row, int column, float* o, int wide, const char* const* next) {
  constexpr int SIZE = T == F32 ? 4 : 2;
  vf total[R][C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) total[r][c] = load(o + r * wide + column + c * LANES);
#pragma GCC unroll 1
  for (int j = 0; j < n; ++j) {
    vf x[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) x[c] = load_as_float(row[j], column + c * LANES, T);
    if (next)
#pragma GCC unroll 4
      for (int c = 0; c < C * LANES * SIZE; c += 64) __builtin_prefetch(next[j] + column * SIZE + c, 0, 2);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const vf w = splat(weight[r * S_STRIDE + j]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) total[r][c] += w * x[c];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(o + r * wide + column + c * LANES, total[r][c]);
}

template <DType T, int R>
static inline void add_row_group(const float* weight, int n, const char* const* row, int dv, float* o, int wide, const char* const* next) {
  constexpr int C = LANES == 16 ? 4 : 2;
  int column = 0;
  for (; column + C * LANES <= dv; column += C * LANES) add_columns<T, R, C>(weight, n, row, column, o, wide, next);
  for (; column < dv; column += LANES) add_columns<T, R, 1>(weight, n, row, column, o, wide, next);
}

template <DType T>
static inline void add_values(const float* weight, int rows, int n, const char* const* row, int dv, float* o, int wide, const char* const* next) {
  int r = 0;
  for (; r + 4 <= rows; r += 4, next = nullptr) add_row_group<T, 4>(weight + r * S_STRIDE, n, row, dv, o + r * wide, wide, next);
  for (; r + 2 <= rows; r += 2, next = nullptr) add_row_group<T, 2>(weight + r * S_STRIDE, n, row, dv, o + r * wide, wide, next);
  if (r < rows) add_row_group<T, 1>(weight + r * S_STRIDE, n, row, dv, o + r * wide, wide, next);
}

}  // namespace SIEVE_LEVEL
}  // namespace sieve
