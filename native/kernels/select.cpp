// What selectors make of the estimates of sixteen query rows, [block][16].
#include "kernels/functions.h"
#include "kernels/lanes.h"

namespace sieve {
namespace SIEVE_LEVEL {

// log2 of the sum over all blocks of 2^(unit * estimate), per lane; 0 where that is not finite
static inline void mass_of(const float* estimate, int64_t blocks, float unit, vf* top, vf* lse) {
  const float infinity = __builtin_inff();
  for (int v = 0; v < PANEL_VECS; ++v) {
    vf m = splat(-infinity);
    for (int64_t b = 0; b < blocks; ++b) m = max_(load(estimate + b * LANE_ROWS + v * LANES), m);
    const vf reference = select((m > splat(-infinity)) & (m < splat(infinity)), m, vf{});
    vf total = vf{};
    for (int64_t b = 0; b < blocks; ++b) {
      vf x = (load(estimate + b * LANE_ROWS + v * LANES) - reference) * unit;
      x = x > splat(1.0f) ? splat(1.0f) : x;
      total += exp2_<5>(x);
    }
    top[v] = m;
    const vf finite = reference + log2_(max_(total, splat(1e-30f))) * (1.0f / unit);
    lse[v] = select((m > splat(-infinity)) & (m < splat(infinity)), finite, vf{});
  }
}

void largest_share(const float* estimate, int64_t blocks, float unit, float* best) {
  vf top[PANEL_VECS], lse[PANEL_VECS];
  mass_of(estimate, blocks, unit, top, lse);
  for (int64_t b = 0; b < blocks; ++b) {
    vf x = load(estimate + b * LANE_ROWS) - lse[0];
    for (int v = 1; v < PANEL_VECS; ++v) x = max_(load(estimate + b * LANE_ROWS + v * LANES) - lse[v], x);
    const float most = lane_max(x);
    best[b] = most > best[b] ? most : best[b];
  }
}

void largest(const float* estimate, int64_t blocks, float* best) {
  for (int64_t b = 0; b < blocks; ++b) {
    vf x = load(estimate + b * LANE_ROWS);
    for (int v = 1; v < PANEL_VECS; ++v) x = max_(load(estimate + b * LANE_ROWS + v * LANES), x);
    const float most = lane_max(x);
    best[b] = most > best[b] ? most : best[b];
  }
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

// Floats in the order of their values as integers.
static inline vi ordered(vf x) {
  const vi bits = (vi)x;
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

static inline int64_t count_from(const float* x, int64_t n, int32_t level) {
  int64_t count = 0;
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + LANES <= n; i += LANES)
    count += __builtin_popcount(_mm512_cmpge_epi32_mask((__m512i)ordered(load(x + i)), _mm512_set1_epi32(level)));
#else
  vi total = vi{};
  for (; i + LANES <= n; i += LANES) total -= ordered(load(x + i)) >= splat_int(level);
  for (int l = 0; l < LANES; ++l) count += total[l];
#endif
  for (; i < n; ++i) {
    int32_t bits;
    memcpy(&bits, x + i, 4);
    count += (bits ^ ((bits >> 31) & 0x7fffffff)) >= level;
  }
  return count;
}

void mark_largest(const float* x, int64_t n, int64_t k, uint8_t* marks) {
  // the largest level that k numbers reach
  int64_t low = INT32_MIN, high = INT32_MAX;
  while (low < high) {
    const int64_t mid = low + (high - low + 1) / 2;
    if (count_from(x, n, (int32_t)mid) >= k)
      low = mid;
    else
      high = mid - 1;
  }
  const int32_t level = (int32_t)low, bits = level ^ ((level >> 31) & 0x7fffffff);
  float last;
  memcpy(&last, &bits, 4);
  int64_t i = 0, above = 0;
#if defined(__AVX512F__)
  for (; i + LANES <= n; i += LANES) {
    const __mmask16 more = _mm512_cmp_ps_mask(_mm512_loadu_ps(x + i), _mm512_set1_ps(last), _CMP_GT_OQ);
    const __m128i old = _mm_loadu_si128(reinterpret_cast<const __m128i*>(marks + i));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(marks + i), _mm_mask_mov_epi8(old, more, _mm_set1_epi8(1)));
    above += __builtin_popcount(more);
  }
#endif
  for (; i < n; ++i)
    if (x[i] > last) {
      marks[i] = 1;
      ++above;
    }
  for (i = 0; i < n && above < k; ++i)
    if (x[i] == last) {
      marks[i] = 1;
      ++above;
    }
}

}  // namespace SIEVE_LEVEL
}  // namespace sieve
