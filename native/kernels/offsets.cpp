// Rows times lists of single keys: exact pairs only. A row's keys are read where they lie; consecutive rows read consecutive
// keys. All rows of a tile go over PASS numbers before the next ones: a key comes back after as many rows as lie between two
// numbers, and between them so few others are read, of keys alone or of values alone, that it is still in the first cache.
#include "kernels/functions.h"
#include "kernels/logits.h"

namespace sieve {
namespace SIEVE_LEVEL {

constexpr int GROUP = LANES;  // keys whose dot products are summed across lanes together
constexpr int SIXTEEN = 16;   // both kinds of rows are padded to it
constexpr int PASS = LANES < 8 ? 8 : LANES;
constexpr int KEYS_AHEAD = 6; // keys after which the sums of their gradients are asked for
static_assert(OFFSET_CHUNK % PASS == 0 && PASS % GROUP == 0);

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

// s[g] = a . the row at `rows + at[g]` for n of them; what lies behind n, up to a multiple of GROUP, is undefined. N vectors a row,
// or `width` floats where N is 0.
template <int N>
static inline __attribute__((always_inline)) void dots(const float* a, const float* rows, const int64_t* at, int n, int width, float* s) {
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
      const float* key = rows + at[g + i < n ? g + i : n - 1];
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
    const float* key = rows + at[g];
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

// out += sum_g weight(g) * the row at `rows + at[g]`, N vectors
template <int N, class Weight>
static inline __attribute__((always_inline)) void gather_vectors(Weight weight, const float* rows, const int64_t* at, int n, float* out) {
  constexpr int CHAINS = N < 8 ? 2 : 1;  // sums enough to hide their latency, and registers for them
  vf sums[CHAINS][N];
#pragma GCC unroll 8
  for (int c = 0; c < N; ++c) {
    sums[0][c] = load(out + c * LANES);
    if constexpr (CHAINS > 1) sums[1][c] = vf{};
  }
  const auto add = [&](int g, vf* to) {
    const float* x = rows + at[g];
    const vf p = splat(weight(g));
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c) to[c] += p * load(x + c * LANES);
  };
  int g = 0;
  for (; g + CHAINS <= n; g += CHAINS)
#pragma GCC unroll 2
    for (int i = 0; i < CHAINS; ++i) add(g + i, sums[i]);
  if (g < n) add(g, sums[0]);
#pragma GCC unroll 8
  for (int c = 0; c < N; ++c) store(out + c * LANES, CHAINS > 1 ? sums[0][c] + sums[CHAINS - 1][c] : sums[0][c]);
}

// The same with `width` floats, a multiple of 16, where N is 0
template <int N, class Weight>
static inline __attribute__((always_inline)) void gather(Weight weight, const float* rows, const int64_t* at, int n, int width, float* out) {
  if constexpr (N > 0) return gather_vectors<N>(weight, rows, at, n, out);
  constexpr int MANY = 4 * SIXTEEN / LANES, FEW = SIXTEEN / LANES;
  int c = 0;
  for (; c + MANY * LANES <= width; c += MANY * LANES) gather_vectors<MANY>(weight, rows + c, at, n, out + c);
  for (; c < width; c += FEW * LANES) gather_vectors<FEW>(weight, rows + c, at, n, out + c);
}

static inline int reach(const OffsetTile& t, int from, int64_t limit) {
  while (from < t.count && t.list[from] <= limit) ++from;
  return from;
}

// one(r, first, n) for every pass and every row that reads n > 0 of its numbers, which begin at `first`
template <class One>
static inline __attribute__((always_inline)) void each_pass(const OffsetTile& t, One one) {
  const int64_t step = t.limit_step;
  const int rows = t.rows, all = t.count;  // what is loaded through `t` within the loops would be loaded after every store
  for (int first = 0; first < all; first += PASS) {
    const int64_t* list = t.list + first;
    const int count = all - first < PASS ? all - first : PASS;
    int64_t limit = t.limit;
    int n = 0;
    for (int r = 0; r < rows; ++r, limit += step) {
      while (n < count && list[n] <= limit) ++n;
      if (n) one(r, first, n);
    }
  }
}

template <int D, int V>
static void attend_rows(const OffsetTile& t) {
  const float infinity = __builtin_inff();
  const float *q = t.q, *k = t.k, *v = t.v;
  float *s = t.s, *o = t.o;
  const int64_t d = t.d, dv = t.dv, k_row = t.k_row, v_row = t.v_row;
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
    each_pass(part, [&](int r, int first, int n) {
      dots<D>(q + r * d, k + r * k_row, key_at + first, n, (int)d, s + (int64_t)r * OFFSET_CHUNK + first);
    });
    int n = 0;
    for (int r = 0; r < t.rows; ++r) {
      n = reach(part, n, t.limit + r * t.limit_step);
      if (n == 0) continue;
      float* x = s + (int64_t)r * OFFSET_CHUNK;
      const int padded = (n + GROUP - 1) / GROUP * GROUP;
      for (int i = n; i < padded; ++i) x[i] = -infinity;
      vf most = load(x);
      for (int i = LANES; i < padded; i += LANES) most = max_(load(x + i), most);
      const float peak = top(most);
      if (peak > t.m[r]) {
        if (t.m[r] > -infinity) {
          const float shrink = exp2_one(t.m[r] - peak);
          t.l[r] *= shrink;
          for (int64_t c = r * dv; c < (r + 1) * dv; c += LANES) store(o + c, load(o + c) * shrink);
        }
        t.m[r] = peak;
      }
      const float base = t.m[r] == -infinity ? 0.0f : t.m[r];
      vf total = vf{};
      for (int i = 0; i < padded; i += LANES) {
        const vf p = exp2_<6>(load(x + i) - base);
        store(x + i, p);
        total += p;
      }
      t.l[r] += sum(total);
    }
    each_pass(part, [&](int r, int first, int n) {
      const float* p = s + (int64_t)r * OFFSET_CHUNK + first;
      gather<V>([=](int g) { return p[g]; }, v + r * v_row, value_at + first, n, (int)dv, o + r * dv);
    });
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

// sums[key] += share[query][number] * x[query], key by key, so that each sum is loaded and stored once a pass. Keys are those that
// stand `list` before their queries; `sums` begins at the key of the tile's first row and number 0.
template <int N>
static void add_to_keys(const OffsetTile& t, const float* share, const float* x, int width, float* sums) {
  int64_t share_at[OFFSET_CHUNK], x_at[OFFSET_CHUNK];  // from what belongs to row 0
  for (int i = 0; i < t.count; ++i) {
    share_at[i] = t.list[i] * OFFSET_CHUNK + i;
    x_at[i] = t.list[i] * width;
  }
  for (int begin = 0; begin < t.count; begin += PASS) {
    const int end = begin + PASS < t.count ? begin + PASS : t.count;
    const int64_t lowest = -t.list[end - 1] > -t.limit ? -t.list[end - 1] : -t.limit;
    int first = end, last = end;  // numbers with a row of this tile above key `at`
    for (int64_t at = lowest; at < t.rows - t.list[begin]; ++at) {
      while (first > begin && at + t.list[first - 1] >= 0) --first;
      while (last > begin && at + t.list[last - 1] >= t.rows) --last;
      if (last <= first) continue;
      for (int c = 0; c < width; c += 16) __builtin_prefetch(sums + (at + KEYS_AHEAD) * width + c, 1);
      const float* p = share + at * OFFSET_CHUNK;
      gather<N>([=, &share_at](int g) { return p[share_at[first + g]]; }, x + at * width, x_at + first, last - first, width, sums + at * width);
    }
  }
}

// The same where all rows read the same keys.
template <int N>
static void add_to_same_keys(const OffsetTile& t, const float* share, const float* x, int width, float* sums) {
  int64_t x_at[OFFSET_CHUNK];
  for (int i = 0; i < t.count; ++i)
    for (int r = 0; r < t.rows;) {
      int m = 0;
      for (; r < t.rows && m < OFFSET_CHUNK; ++r) {
        if (t.list[i] > t.limit + r * t.limit_step) continue;
        x_at[m++] = (int64_t)r * width;
      }
      const float* p = share + (int64_t)(r - m) * OFFSET_CHUNK + i;  // rows that read a number are the last ones
      gather<N>([=](int g) { return p[g * OFFSET_CHUNK]; }, x, x_at, m, width, sums + t.list[i] * width);
    }
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
  const float *q = t.q, *k = t.k, *v = t.v, *d_out = g.d_out, *k_clean = g.k_clean;
  float* dq = g.dq;
  const int64_t d = t.d, dv = t.dv, k_row = t.k_row, v_row = t.v_row, clean_row = g.clean_row;
  each_pass(t, [&](int r, int first, int n) {
    dots<D>(q + r * d, k + r * k_row, key_at + first, n, (int)d, weight + (int64_t)r * OFFSET_CHUNK + first);
  });
  each_pass(t, [&](int r, int first, int n) {
    dots<V>(d_out + r * dv, v + r * v_row, value_at + first, n, (int)dv, slope + (int64_t)r * OFFSET_CHUNK + first);
  });
  int n = 0;
  for (int r = 0; r < t.rows; ++r) {
    n = reach(t, n, t.limit + r * t.limit_step);
    float *s = weight + (int64_t)r * OFFSET_CHUNK, *ds = slope + (int64_t)r * OFFSET_CHUNK;
    float base = g.lse[r] == -__builtin_inff() ? 0.0f : g.lse[r] * LOG2E;
    if (is_far(base)) {
      // first natural logits, rounded as finish_offset_row rounds the reference of lse, so that the largest weighs one
      for (int i = 0; i < n; i += LANES) store(s + i, load(s + i) * LN2);
      for (int i = 0; i < n; i += LANES) store(s + i, at_most_zero(load(s + i) - g.lse[r]) * LOG2E);
      base = 0.0f;
    }
    for (int i = 0; i < n; i += LANES) {
      const vf p = exp2_<6>(load(s + i) - base);
      const vi none = p == vf{};
      store(s + i, p);
      store(ds + i, select(none, vf{}, p * (load(ds + i) + g.shift[r])));
    }
  }
  each_pass(t, [&](int r, int first, int n) {
    const float* ds = slope + (int64_t)r * OFFSET_CHUNK + first;
    gather<D>([=](int i) { return ds[i]; }, k_clean + r * clean_row, clean_at + first, n, (int)d, dq + r * d);
  });
  float *dv_sum = g.dv_sum + g.sum_at * dv, *dk = g.dk + g.sum_at * d;
  if (t.k_row != 0 && t.k_step == -t.k_row) {
    add_to_keys<V>(t, weight, g.d_out, t.dv, dv_sum);
    add_to_keys<D>(t, slope, g.q_clean, t.d, dk);
  } else {
    add_to_same_keys<V>(t, weight, g.d_out, t.dv, dv_sum);
    add_to_same_keys<D>(t, slope, g.q_clean, t.d, dk);
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
