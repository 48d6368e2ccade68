// Rows times lists of single keys: exact pairs only. A row's keys are read where they lie; consecutive rows read consecutive
// keys, so a chunk of the list slides a window over the keys that stays in the cache.
#include "kernels/functions.h"
#include "kernels/logits.h"

namespace sieve {
namespace SIEVE_LEVEL {

constexpr int GROUP = LANES;  // keys whose dot products are summed across lanes together
constexpr int SIXTEEN = 16;   // both kinds of rows are padded to it
constexpr int KEYS_AHEAD = 6; // keys after which the sums of their gradients are asked for

struct QuietDenormals {
#if defined(__x86_64__)
  unsigned before = _mm_getcsr();
  QuietDenormals() { _mm_setcsr(before | 0x8000u); }
  ~QuietDenormals() { _mm_setcsr(before); }
#endif
};

// Lane i of the result is the sum of x[i].
static inline vf sums_of(vf x[GROUP]) {
#if defined(__AVX512F__)
  __m512 t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {  // pairs i and i + 8, so that the last step leaves them in order
    const __m512 a = (__m512)x[i], b = (__m512)x[i + 8];
    t[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 a = t[i], b = t[i + 4];
    t[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  // quarters of t[i] now belong to the keys i, i + 8, i + 4, i + 12
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    t[i] = _mm512_add_ps(_mm512_unpacklo_ps(t[i], t[i + 2]), _mm512_unpackhi_ps(t[i], t[i + 2]));
  const __m512 sum = _mm512_add_ps(_mm512_unpacklo_ps(t[0], t[1]), _mm512_unpackhi_ps(t[0], t[1]));
  // lanes of a quarter hold the keys +0, +1, +2, +3
  return (vf)_mm512_shuffle_f32x4(sum, sum, 0xd8);
#elif defined(__AVX2__)
  const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps((__m256)x[0], (__m256)x[1]), _mm256_hadd_ps((__m256)x[2], (__m256)x[3]));
  const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps((__m256)x[4], (__m256)x[5]), _mm256_hadd_ps((__m256)x[6], (__m256)x[7]));
  return (vf)_mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
#else
  vf out;
  for (int i = 0; i < GROUP; ++i) out[i] = sum(x[i]);
  return out;
#endif
}

// s[0..n) = a . row[list[g]]; what lies behind n, up to a multiple of GROUP, is undefined. N vectors a row, or `width` floats where N is 0.
template <int N>
static inline __attribute__((always_inline)) void dots(const float* a, const float* rows, int64_t step, const int64_t* list, int n, int width, float* s) {
  constexpr int REGS = N ? N : 1;
  vf q[REGS];
  if constexpr (N > 0)
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c) q[c] = load(a + c * LANES);
  int g = 0;
  for (; g < n; g += GROUP) {
    if (n - g <= GROUP / 4) break;  // a few are summed one by one
    vf x[GROUP];
#pragma GCC unroll 16
    for (int i = 0; i < GROUP; ++i) {
      const int at = g + i < n ? g + i : n - 1;
      const float* key = rows + list[at] * step;
      if constexpr (N > 0) {
        vf t = q[0] * load(key);
#pragma GCC unroll 8
        for (int c = 1; c < N; ++c) t += q[c] * load(key + c * LANES);
        x[i] = t;
      } else {
        vf t = vf{};
        for (int c = 0; c < width; c += LANES) t += load(a + c) * load(key + c);
        x[i] = t;
      }
    }
    store(s + g, sums_of(x));
  }
  for (; g < n; ++g) {
    const float* key = rows + list[g] * step;
    vf t = vf{};
    if constexpr (N > 0) {
#pragma GCC unroll 8
      for (int c = 0; c < N; ++c) t += q[c] * load(key + c * LANES);
    } else {
      for (int c = 0; c < width; c += LANES) t += load(a + c) * load(key + c);
    }
    s[g] = sum(t);
  }
}

// out += sum_g weight[g] * row[list[g]]
template <int N>
static inline __attribute__((always_inline)) void gather(const float* weight, const float* rows, int64_t step, const int64_t* list, int n, int width, float* out) {
  if constexpr (N > 0) {
    vf even[N], odd[N];  // two chains hide the latency of the sums
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c) even[c] = load(out + c * LANES), odd[c] = vf{};
    int g = 0;
    for (; g + 2 <= n; g += 2) {
      const float *x = rows + list[g] * step, *y = rows + list[g + 1] * step;
      const vf p = splat(weight[g]), r = splat(weight[g + 1]);
#pragma GCC unroll 8
      for (int c = 0; c < N; ++c) {
        even[c] += p * load(x + c * LANES);
        odd[c] += r * load(y + c * LANES);
      }
    }
    if (g < n) {
      const float* x = rows + list[g] * step;
      const vf p = splat(weight[g]);
#pragma GCC unroll 8
      for (int c = 0; c < N; ++c) even[c] += p * load(x + c * LANES);
    }
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c) store(out + c * LANES, even[c] + odd[c]);
  } else {
    for (int g = 0; g < n; ++g) {
      const float* x = rows + list[g] * step;
      const vf p = splat(weight[g]);
      for (int c = 0; c < width; c += LANES) store(out + c, load(out + c) + p * load(x + c));
    }
  }
}

static inline int reach(const OffsetTile& t, int from, int64_t limit) {
  while (from < t.count && t.list[from] <= limit) ++from;
  return from;
}

template <int D, int V>
static void attend_rows(const OffsetTile& t) {
  const float infinity = __builtin_inff();
  alignas(64) float s[OFFSET_CHUNK];
  for (int from = 0; from < t.count; from += OFFSET_CHUNK) {
    OffsetTile part = t;
    part.list = t.list + from;
    part.count = t.count - from < OFFSET_CHUNK ? t.count - from : OFFSET_CHUNK;
    // distances in floats, so that the inner loops add and do not multiply
    int64_t key_at[OFFSET_CHUNK], value_at[OFFSET_CHUNK];
    for (int i = 0; i < part.count; ++i) {
      key_at[i] = part.list[i] * t.k_step;
      value_at[i] = part.list[i] * t.v_step;
    }
    int n = 0;
    for (int r = 0; r < t.rows; ++r) {
      n = reach(part, n, t.limit + r * t.limit_step);
      if (n == 0) continue;
      dots<D>(t.q + (int64_t)r * t.d, t.k + r * t.k_row, 1, key_at, n, t.d, s);
      const int padded = (n + GROUP - 1) / GROUP * GROUP;
      for (int i = n; i < padded; ++i) s[i] = -infinity;
      vf most = load(s);
      for (int i = LANES; i < padded; i += LANES) most = max_(load(s + i), most);
      const float peak = top(most);
      float* o = t.o + (int64_t)r * t.dv;
      if (peak > t.m[r]) {
        if (t.m[r] > -infinity) {
          const float shrink = exp2_one(t.m[r] - peak);
          t.l[r] *= shrink;
          for (int c = 0; c < t.dv; c += LANES) store(o + c, load(o + c) * shrink);
        }
        t.m[r] = peak;
      }
      const float base = t.m[r] == -infinity ? 0.0f : t.m[r];
      vf total = vf{};
      for (int i = 0; i < padded; i += LANES) {
        const vf p = exp2_<6>(load(s + i) - base);
        store(s + i, p);
        total += p;
      }
      t.l[r] += sum(total);
      gather<V>(s, t.v + r * t.v_row, 1, value_at, n, t.dv, o);
    }
  }
}

void attend_offsets(const OffsetTile& t) {
  const QuietDenormals quiet;
  if (t.d == t.dv && t.d == 4 * SIXTEEN) return attend_rows<4 * SIXTEEN / LANES, 4 * SIXTEEN / LANES>(t);
  if (t.d == t.dv && t.d == 2 * SIXTEEN) return attend_rows<2 * SIXTEEN / LANES, 2 * SIXTEEN / LANES>(t);
#if defined(__AVX512F__)
  if (t.d == t.dv && t.d == 8 * SIXTEEN) return attend_rows<8, 8>(t);
#endif
  attend_rows<0, 0>(t);
}

template <int D, int V>
static void gradient_rows(const OffsetGradient& g) {
  const OffsetTile& t = g.t;
  float *weight = g.scratch, *slope = weight + (int64_t)t.rows * OFFSET_CHUNK;
  int64_t key_at[OFFSET_CHUNK], value_at[OFFSET_CHUNK], clean_at[OFFSET_CHUNK];  // distances in floats
  for (int i = 0; i < t.count; ++i) {
    key_at[i] = t.list[i] * t.k_step;
    value_at[i] = t.list[i] * t.v_step;
    clean_at[i] = t.list[i] * g.clean_step;
  }
  int n = 0;
  for (int r = 0; r < t.rows; ++r) {
    n = reach(t, n, t.limit + r * t.limit_step);
    float *s = weight + (int64_t)r * OFFSET_CHUNK, *ds = slope + (int64_t)r * OFFSET_CHUNK;
    if (n == 0) continue;
    dots<D>(t.q + (int64_t)r * t.d, t.k + r * t.k_row, 1, key_at, n, t.d, s);
    dots<V>(g.d_out + (int64_t)r * t.dv, t.v + r * t.v_row, 1, value_at, n, t.dv, ds);
    const float base = g.lse[r] == -__builtin_inff() ? 0.0f : g.lse[r];
    for (int i = 0; i < n; i += LANES) {
      const vf p = exp2_<6>(load(s + i) - base);
      const vi none = p == vf{};
      store(s + i, p);
      store(ds + i, select(none, vf{}, p * (load(ds + i) + g.shift[r])));
    }
    gather<D>(ds, g.k_clean + r * g.clean_row, 1, clean_at, n, t.d, g.dq + (int64_t)r * t.d);
  }
  // the other way round, key by key, so that each sum is loaded and stored once a chunk
  alignas(64) float p[OFFSET_CHUNK], ds[OFFSET_CHUNK];
  int64_t query[OFFSET_CHUNK];
  if (t.k_row != 0 && t.k_step == -t.k_row) {
    const int64_t lowest = -t.list[t.count - 1] > -t.limit ? -t.list[t.count - 1] : -t.limit;
    int first = t.count, last = t.count;  // numbers with a row of this tile above key `at`
    for (int64_t at = lowest; at < t.rows - t.list[0]; ++at) {
      while (first > 0 && at + t.list[first - 1] >= 0) --first;
      while (last > 0 && at + t.list[last - 1] >= t.rows) --last;
      const int m = last - first;
      if (m <= 0) continue;
      const int64_t ahead = g.sum_at + at + KEYS_AHEAD;
      for (int c = 0; c < t.dv; c += 16) __builtin_prefetch(g.dv_sum + ahead * t.dv + c, 1);
      for (int c = 0; c < t.d; c += 16) __builtin_prefetch(g.dk + ahead * t.d + c, 1);
      for (int i = 0; i < m; ++i) {
        query[i] = at + t.list[first + i];
        p[i] = weight[query[i] * OFFSET_CHUNK + first + i];
        ds[i] = slope[query[i] * OFFSET_CHUNK + first + i];
      }
      gather<V>(p, g.d_out, t.dv, query, m, t.dv, g.dv_sum + (g.sum_at + at) * t.dv);
      gather<D>(ds, g.q_clean, t.d, query, m, t.d, g.dk + (g.sum_at + at) * t.d);
    }
    return;
  }
  for (int i = 0; i < t.count; ++i)
    for (int r = 0; r < t.rows;) {
      int m = 0;
      for (; r < t.rows && m < OFFSET_CHUNK; ++r) {
        if (t.list[i] > t.limit + r * t.limit_step) continue;
        query[m] = r;
        p[m] = weight[(int64_t)r * OFFSET_CHUNK + i];
        ds[m++] = slope[(int64_t)r * OFFSET_CHUNK + i];
      }
      gather<V>(p, g.d_out, t.dv, query, m, t.dv, g.dv_sum + (g.sum_at + t.list[i]) * t.dv);
      gather<D>(ds, g.q_clean, t.d, query, m, t.d, g.dk + (g.sum_at + t.list[i]) * t.d);
    }
}

void gradient_offsets(const OffsetGradient& g) {
  const QuietDenormals quiet;
  const int d = g.t.d, dv = g.t.dv;
  if (d == dv && d == 4 * SIXTEEN) return gradient_rows<4 * SIXTEEN / LANES, 4 * SIXTEEN / LANES>(g);
  if (d == dv && d == 2 * SIXTEEN) return gradient_rows<2 * SIXTEEN / LANES, 2 * SIXTEEN / LANES>(g);
#if defined(__AVX512F__)
  if (d == dv && d == 8 * SIXTEEN) return gradient_rows<8, 8>(g);
#endif
  gradient_rows<0, 0>(g);
}

}  // namespace SIEVE_LEVEL
}  // namespace sieve
