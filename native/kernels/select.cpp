// What selectors make of the estimates of sixteen query rows, [block][16].
#include "kernels/functions.h"
#include "kernels/lanes.h"

namespace sieve {
namespace SIEVE_LEVEL {

// The logarithm of the sum over all blocks, per lane, in the estimates' own unit; 0 where that is not finite
static inline void mass_of(const float* estimate, int64_t blocks, float unit, vf* lse) {
  const float infinity = __builtin_inff();
  for (int v = 0; v < PANEL_VECS; ++v) {
    vf m = splat(-infinity);
    for (int64_t b = 0; b < blocks; ++b) m = max_(load(estimate + b * LANE_ROWS + v * LANES), m);
    const vi bounded = (m > splat(-infinity)) & (m < splat(infinity));
    const vf reference = select(bounded, m, vf{});
    vf total = vf{}, other = vf{};
    auto one = [&](int64_t b) {
      const vf x = (load(estimate + b * LANE_ROWS + v * LANES) - reference) * unit;
      return weight(min_(max_(x, splat(-100.0f)), splat(1.0f)));  // no denormal number on the way to 0
    };
    int64_t b = 0;
    for (; b + 2 <= blocks; b += 2) {
      total += one(b);
      other += one(b + 1);
    }
    if (b < blocks) total += one(b);
    const vf finite = reference + log2_(max_(total + other, splat(1e-30f))) * (1.0f / unit);
    lse[v] = select(bounded, finite, vf{});
  }
}

#if defined(__AVX512F__)
// The largest lane of each of sixteen vectors.
static inline __m512 sixteen_maxima(__m512 r[16]) {
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)  // halves of vectors i and i + 8
    r[i] = _mm512_max_ps(_mm512_shuffle_f32x4(r[i], r[i + 8], 0x44), _mm512_shuffle_f32x4(r[i], r[i + 8], 0xee));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)  // quarters: r[i] of i, i + 8, r[i + 4] of i + 4, i + 12
    r[i] = _mm512_max_ps(_mm512_shuffle_f32x4(r[i], r[i + 4], 0x88), _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd));
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) r[i] = _mm512_max_ps(_mm512_unpacklo_ps(r[i], r[i + 2]), _mm512_unpackhi_ps(r[i], r[i + 2]));
  const __m512 x = _mm512_max_ps(_mm512_unpacklo_ps(r[0], r[1]), _mm512_unpackhi_ps(r[0], r[1]));
  // 128-bit lane l, place p now holds vector p + 4 * (0, 2, 1, 3)[l]
  return _mm512_shuffle_f32x4(x, x, 0xd8);
}
#elif defined(__AVX2__)
// The largest lane of each of eight vectors.
static inline __m256 eight_maxima(__m256 r[8]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)  // halves: r[i] of i, i + 4
    r[i] = _mm256_max_ps(_mm256_permute2f128_ps(r[i], r[i + 4], 0x20), _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) r[i] = _mm256_max_ps(_mm256_unpacklo_ps(r[i], r[i + 2]), _mm256_unpackhi_ps(r[i], r[i + 2]));
  return _mm256_max_ps(_mm256_unpacklo_ps(r[0], r[1]), _mm256_unpackhi_ps(r[0], r[1]));
}
#endif

// best[i] = max(best[i], the largest of estimate - less over the lanes)
static inline void raise(const float* estimate, int64_t blocks, const vf* less, float* best) {
  int64_t b = 0;
#if defined(__AVX512F__)
  for (; b + 16 <= blocks; b += 16) {
    __m512 r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = _mm512_sub_ps(_mm512_loadu_ps(estimate + (b + i) * LANE_ROWS), (__m512)less[0]);
    _mm512_storeu_ps(best + b, _mm512_max_ps(sixteen_maxima(r), _mm512_loadu_ps(best + b)));
  }
#elif defined(__AVX2__)
  for (; b + 8 <= blocks; b += 8) {
    __m256 r[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const float* x = estimate + (b + i) * LANE_ROWS;
      r[i] = (__m256)max_(load(x + LANES) - less[1], load(x) - less[0]);
    }
    _mm256_storeu_ps(best + b, _mm256_max_ps(eight_maxima(r), _mm256_loadu_ps(best + b)));
  }
#endif
  for (; b < blocks; ++b) {
    vf x = load(estimate + b * LANE_ROWS) - less[0];
    for (int v = 1; v < PANEL_VECS; ++v) x = max_(load(estimate + b * LANE_ROWS + v * LANES) - less[v], x);
    const float most = lane_max(x);
    best[b] = most > best[b] ? most : best[b];
  }
}

void largest_share(const float* estimate, int64_t blocks, float unit, float* best) {
  vf lse[PANEL_VECS];
  mass_of(estimate, blocks, unit, lse);
  raise(estimate, blocks, lse, best);
}

void largest(const float* estimate, int64_t blocks, float* best) {
  const vf nothing[PANEL_VECS] = {};
  raise(estimate, blocks, nothing, best);
}

void mark_above(const float* estimate, int64_t blocks, float margin, uint8_t* marks) {
  const float infinity = __builtin_inff();
  for (int v = 0; v < PANEL_VECS; ++v) {
    vf m = splat(-infinity);
    for (int64_t b = 0; b < blocks; ++b) m = max_(load(estimate + b * LANE_ROWS + v * LANES), m);
    const vf level = m - margin;
    for (int64_t b = 0; b < blocks; ++b) {
      const vf x = load(estimate + b * LANE_ROWS + v * LANES);
      marks[b] |= any_lane((x >= level) & (x > splat(-infinity)));
    }
  }
}

// Per lane the first blocks, by falling estimate and then by index, whose predecessors hold less than `mass`.
void mark_mass(const float* estimate, int64_t blocks, float unit, float mass, int32_t lanes, uint8_t* marks, float* weights) {
  constexpr int HALVINGS = 16;
  const float infinity = __builtin_inff();
  for (int v = 0; v < PANEL_VECS; ++v) {
    const float* x = estimate + v * LANES;
    float* w = weights + v * LANES;
    vf top = splat(-infinity);
    for (int64_t b = 0; b < blocks; ++b) top = max_(load(x + b * LANE_ROWS), top);
    const vi bounded = (top > splat(-infinity)) & (top < splat(infinity));
    const vf reference = select(bounded, top, vf{});
    vf total = vf{};
    for (int64_t b = 0; b < blocks; ++b) {
      const vf y = (load(x + b * LANE_ROWS) - reference) * unit, share = exp2_<5>(y > splat(1.0f) ? splat(1.0f) : y);
      store(w + b * LANE_ROWS, share);
      total += share;
    }
    const vf wanted = total * mass;
    // more than `high`: less than the wanted mass, which is `before`; more than `low`: at least as much
    vf low = splat(-infinity), high = top, before = vf{}, mid = reference - 40.0f / unit;
    for (int i = 0; i < HALVINGS; ++i) {
      vf above = vf{};
      for (int64_t b = 0; b < blocks; ++b)
        above += select(load(x + b * LANE_ROWS) > mid, load(w + b * LANE_ROWS), vf{});
      const vi enough = above >= wanted, moves = bounded & (mid < high);
      low = select(moves & enough, mid, low);
      high = select(moves & ~enough, mid, high);
      before = select(moves & ~enough, above, before);
      mid = select(low > splat(-infinity), low + (high - low) * 0.5f, high);
    }
    int64_t between = 0;
    int32_t* list = reinterpret_cast<int32_t*>(weights + blocks * LANE_ROWS);
    for (int64_t b = 0; b < blocks; ++b) {
      const vf y = load(x + b * LANE_ROWS);
      marks[b] |= any_lane(y > high);
      if (any_lane((y <= high) & (y > low))) list[between++] = (int32_t)b;
    }
    // the few between the two, one at a time: the largest and of equal ones the earliest first
    for (int i = 0; i < LANES && v * LANES + i < lanes; ++i) {
      float sum_before = before[i], limit = infinity;
      while (sum_before < wanted[i]) {
        float next = -infinity;
        for (int64_t c = 0; c < between; ++c) {
          const float y = x[list[c] * LANE_ROWS + i];
          if (y <= high[i] && y < limit && y > next) next = y;
        }
        if (!(next > -infinity)) break;
        for (int64_t c = 0; c < between && sum_before < wanted[i]; ++c) {
          if (x[list[c] * LANE_ROWS + i] != next) continue;
          marks[list[c]] = 1;
          sum_before += w[list[c] * LANE_ROWS + i];
        }
        limit = next;
      }
    }
  }
}

static inline int64_t count_from(const int32_t* x, int64_t n, int32_t level) {
  int64_t i = 0, count = 0;
  vi total = vi{}, other = vi{};
  for (; i + 2 * LANES <= n; i += 2 * LANES) {
    total -= *reinterpret_cast<const vi_any*>(x + i) >= splat_int(level);
    other -= *reinterpret_cast<const vi_any*>(x + i + LANES) >= splat_int(level);
  }
  total += other;
  for (int l = 0; l < LANES; ++l) count += total[l];
  for (; i < n; ++i) count += x[i] >= level;
  return count;
}

void mark_largest(float* x, int64_t n, int64_t k, uint8_t* marks) {
  // floats as integers in the same order; both zeros become one
  int32_t* order = reinterpret_cast<int32_t*>(x);
  int64_t low = INT32_MAX, high = INT32_MIN;
  for (int64_t i = 0; i < n; ++i) {
    const float y = x[i] + 0.0f;
    int32_t bits;
    memcpy(&bits, &y, 4);
    bits ^= (bits >> 31) & 0x7fffffff;
    memcpy(x + i, &bits, 4);
    low = bits < low ? bits : low;
    high = bits > high ? bits : high;
  }
  // the largest level that k numbers reach
  while (low < high) {
    const int64_t mid = low + (high - low + 1) / 2;
    if (count_from(order, n, (int32_t)mid) >= k)
      low = mid;
    else
      high = mid - 1;
  }
  const int32_t last = (int32_t)low;
  int64_t i = 0, above = 0;
#if defined(__AVX512F__)
  for (; i + LANES <= n; i += LANES) {
    const __mmask16 more = _mm512_cmpgt_epi32_mask(_mm512_loadu_si512(order + i), _mm512_set1_epi32(last));
    const __m128i old = _mm_loadu_si128(reinterpret_cast<const __m128i*>(marks + i));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(marks + i), _mm_mask_mov_epi8(old, more, _mm_set1_epi8(1)));
    above += __builtin_popcount(more);
  }
#endif
  for (; i < n; ++i)
    if (order[i] > last) {
      marks[i] = 1;
      ++above;
    }
  for (i = 0; i < n && above < k; ++i)
    if (order[i] == last) {
      marks[i] = 1;
      ++above;
    }
}

}  // namespace SIEVE_LEVEL
}  // namespace sieve
