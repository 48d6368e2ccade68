// Products of a few query rows with keys and values where they lie: every number is read once and converted in registers.
#pragma once
#include "kernels/logits.h"

namespace sieve {
namespace SIEVE_LEVEL {

constexpr int DIRECT_ROWS = 8;  // more rows are worth packing keys for

// Rows that are read next are asked for while others are multiplied, one row at a time and in the order in which they will be
// read: blocks that were chosen lie anywhere, so hardware does not foresee them, asking for many at once would hold up what is
// computed, and memory answers lines that are asked for out of their order a quarter more slowly.

static inline void ask(const char* row, int64_t bytes) {
  for (int64_t c = 0; c < bytes; c += 64) __builtin_prefetch(row + c, 0, 2);
}

// Channels column..column + 2 LANES - 1 as two vectors. Those of bf16 come as even and odd ones: a shift and a mask, no shuffle.
template <DType T>
static inline void load_two(const char* p, int64_t column, vf* x) {
  if constexpr (T == BF16) {
    const vi both = *reinterpret_cast<const vi_any*>(p + column * 2);
    x[0] = (vf)(both << 16);
    x[1] = (vf)(both & splat_int((int32_t)0xffff0000));
  } else {
    x[0] = load_as_float(p, column, T);
    x[1] = load_as_float(p, column + LANES, T);
  }
}

// Channels in the order in which `load_two` of bf16 finds them, and back; those behind the last two whole vectors stay.
static inline void part_channels(const float* from, int n, float* to) {
  int c = 0;
  for (; c + 2 * LANES <= n; c += 2 * LANES)
    for (int i = 0; i < LANES; ++i) {
      to[c + i] = from[c + 2 * i];
      to[c + i + LANES] = from[c + 2 * i + 1];
    }
  for (; c < n; ++c) to[c] = from[c];
}

static inline void join_channels(const float* from, int n, float* to) {
  int c = 0;
  for (; c + 2 * LANES <= n; c += 2 * LANES)
    for (int i = 0; i < LANES; ++i) {
      to[c + 2 * i] = from[c + i];
      to[c + 2 * i + 1] = from[c + i + LANES];
    }
  for (; c < n; ++c) to[c] = from[c];
}

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
  // a shuffle, a blend and a sum at each step: only half of the ports that multiply can shuffle
  const auto fours = [](vf a, vf b) {
    return _mm256_add_ps(_mm256_shuffle_ps((__m256)a, (__m256)b, 0x4e), _mm256_blend_ps((__m256)a, (__m256)b, 0xcc));
  };
  const auto twos = [](__m256 a, __m256 b) {
    return _mm256_add_ps(_mm256_blend_ps(a, b, 0xaa), _mm256_permute_ps(_mm256_blend_ps(a, b, 0x55), 0xb1));
  };
  const __m256 a = twos(fours(v[0], v[2]), fours(v[1], v[3])), b = twos(fours(v[4], v[6]), fours(v[5], v[7]));
  return (vf)_mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x21), _mm256_blend_ps(a, b, 0xf0));
#else
  vf sums;
  for (int i = 0; i < LANES; ++i) sums[i] = sum(v[i]);
  return sums;
#endif
}

// Keeps a number that serves several products in a register: compilers would rather read it again for each of them.
static inline void hold(vf& x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  asm("" : "+x"(x));
#else
  (void)x;
#endif
}

// s [R][16] = q [R][d] times the keys of a panel; what stands behind the last key is any number. Key i asks for next[i]. Queries
// of bf16 keys have their channels parted. Lanes are summed once all keys are through: in between, that would hold up products.
template <DType T, int R>
static inline void dot_keys(const float* q, int d, const char* data, int64_t stride, int there, float* s, const char* const* next, int64_t next_bytes) {
  constexpr int K = LANES / R;  // keys at a time
  vf part[R][PANEL];
#pragma GCC unroll 1
  for (int key = 0; key < PANEL; key += K) {
    const char* at[K];
    for (int i = 0; i < K; ++i) at[i] = data + (key + i < there ? key + i : 0) * stride;
    if (next)
      for (int i = 0; i < K; ++i) ask(next[key + i], next_bytes);
    vf total[R][K];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) total[i / K][i % K] = vf{};
    int c = 0;
#pragma GCC unroll 1
    for (; c + 2 * LANES <= d; c += 2 * LANES)
#pragma GCC unroll 8
      for (int i = 0; i < K; i += 2) {
        vf y[2][2];
        load_two<T>(at[i], c, y[0]);
        load_two<T>(at[i + 1], c, y[1]);
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h)
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            vf x = load(q + (int64_t)r * d + c + h * LANES);
            hold(x);
            total[r][i] += x * y[0][h];
            total[r][i + 1] += x * y[1][h];
          }
      }
    if (c < d)
#pragma GCC unroll 16
      for (int i = 0; i < K; ++i) {
        const vf y = load_as_float(at[i], c, T);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) total[r][i] += load(q + (int64_t)r * d + c) * y;
      }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int i = 0; i < K; ++i) part[r][key + i] = total[r][i];
  }
  for (int r = 0; r < R; ++r)
    for (int key = 0; key < PANEL; key += LANES) store(s + (int64_t)r * S_STRIDE + key, lane_sums(part[r] + key));
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

// Rows next..end-1 that a product asks for on its way over n rows, one for every `step` of them.
struct Ahead {
  const char* const* next;
  const char* const* end;
  int64_t bytes;
  int step;
};

// o [R][..] += weights [R][n] times n rows of numbers, C vectors of columns from `column`
template <DType T, int R, int C>
static inline void add_columns(const float* weight, int n, const char* const* row, int column, float* o, int wide, Ahead& ahead) {
  vf total[R][C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) total[r][c] = load(o + r * wide + column + c * LANES);
  for (int64_t j = 0; j < n;) {
    if (ahead.next < ahead.end) ask(*ahead.next++, ahead.bytes);
    const int64_t last = j + ahead.step < n ? j + ahead.step : n;
    do {
      vf x[C];
      if constexpr (C == 1)
        x[0] = load_as_float(row[j], column, T);
      else
#pragma GCC unroll 4
        for (int c = 0; c < C; c += 2) load_two<T>(row[j], column + c * LANES, x + c);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const vf w = splat(weight[r * S_STRIDE + j]);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) total[r][c] += w * x[c];
      }
    } while (++j < last);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(o + r * wide + column + c * LANES, total[r][c]);
}

template <DType T, int R>
static inline void add_row_group(const float* weight, int n, const char* const* row, int dv, float* o, int wide, Ahead& ahead) {
  constexpr int C = LANES == 16 ? 4 : 2;
  ahead.step = dv / (C * LANES) + dv % (C * LANES) / (2 * LANES) + dv % (2 * LANES) / LANES;  // as many as the rounds below
  int column = 0;
  for (; column + C * LANES <= dv; column += C * LANES) add_columns<T, R, C>(weight, n, row, column, o, wide, ahead);
  for (; column + 2 * LANES <= dv; column += 2 * LANES) add_columns<T, R, 2>(weight, n, row, column, o, wide, ahead);
  for (; column < dv; column += LANES) add_columns<T, R, 1>(weight, n, row, column, o, wide, ahead);
}

// o [rows][wide] += weights [rows][n] times n rows, which ask for those of `ahead`; columns of bf16 rows come out parted.
template <DType T>
static inline void add_values(const float* weight, int rows, int n, const char* const* row, int dv, float* o, int wide, Ahead ahead) {
  int r = 0;
  for (; r + 4 <= rows; r += 4) add_row_group<T, 4>(weight + r * S_STRIDE, n, row, dv, o + r * wide, wide, ahead);
  for (; r + 2 <= rows; r += 2) add_row_group<T, 2>(weight + r * S_STRIDE, n, row, dv, o + r * wide, wide, ahead);
  if (r < rows) add_row_group<T, 1>(weight + r * S_STRIDE, n, row, dv, o + r * wide, wide, ahead);
}

}  // namespace SIEVE_LEVEL
}  // namespace sieve
