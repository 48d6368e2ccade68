// The online softmax of a tile: references that rise rarely, one partial sum a lane.
#pragma once
#include "kernels/logits.h"

namespace sieve {
namespace SIEVE_LEVEL {

constexpr int CHUNK = CHUNK_PANELS * PANEL;
constexpr int S_STRIDE = CHUNK + 16;  // rows do not fall on one set of the cache
constexpr float SLACK = 8.0f;         // a row is rescaled once its reference is this far (in powers of two) below its maximum

// What the online softmax remembers of the rows: their references, and one partial sum a lane.
struct Softmax {
  float base[MAX_ROWS];   // reference times unit
  float limit[MAX_ROWS];  // a logit above this raises the reference
  float sums[MAX_ROWS][LANES];
};
static_assert(sizeof(Softmax) <= SOFTMAX_BYTES);

static inline bool any_above(vf x, float limit) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(limit), _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)(x > splat(limit))) != 0;
#else
  const vi over = x > splat(limit);
  int32_t some = 0;
  for (int i = 0; i < LANES; ++i) some |= over[i];
  return some != 0;
#endif
}

// The row's reference rises to its new maximum; what was summed so far shrinks.
static __attribute__((noinline)) void raise_reference(const Tile& t, Softmax& x, int r, vf most, float unit, int wide) {
  const float peak = top(most), before = t.m[r];
  t.m[r] = peak;
  x.base[r] = peak * unit;
  x.limit[r] = peak + SLACK / unit;
  if (before == -__builtin_inff()) return;
  const float shrink = exp2_one((before - peak) * unit);
  store(x.sums[r], load(x.sums[r]) * shrink);
  float* o = t.o + (int64_t)r * wide;
  for (int i = 0; i < wide; i += LANES) store(o + i, load(o + i) * shrink);
}

static inline vf largest(const float* s, int n) {
  vf most = load(s);
  for (int i = LANES; i < n; i += LANES) most = max_(load(s + i), most);
  return most;
}

// Row r over n logits: they become weights, and their sum is added.
static inline void soften(const Tile& t, Softmax& x, int r, float* s, int n, float unit, int wide) {
  const vf most = largest(s, n);
  if (any_above(most, x.limit[r])) raise_reference(t, x, r, most, unit, wide);
  const float base = close_base(s, n, t.m[r], x.base[r]);
  vf total = load(x.sums[r]);
  for (int i = 0; i < n; i += LANES) {
    const vf p = exp2_<6>(load(s + i) * unit - base);
    store(s + i, p);
    total += p;
  }
  store(x.sums[r], total);
}

// Weights below the smallest normal number count as zero: denormal numbers would cost a hundred times more.
struct FlushToZero {
#if defined(__x86_64__)
  unsigned before = _mm_getcsr();
  FlushToZero() { _mm_setcsr(before | 0x8000u); }
  ~FlushToZero() { _mm_setcsr(before); }
#endif
};

static inline void start(const Tile& t, Softmax& x, int wide) {
  memset(t.o, 0, sizeof(float) * up(t.rows, 16) * wide);
  memset(x.sums, 0, sizeof(x.sums));
  for (int r = 0; r < t.rows; ++r) {
    t.m[r] = x.limit[r] = -__builtin_inff();
    x.base[r] = 0.0f;
  }
}

static inline void finish(const Tile& t, const Softmax& x, const float* marks, int wide) {
  for (int r = 0; r < t.rows; ++r) t.l[r] = sum(load(x.sums[r]));
  if (t.sanitize)
    for (int64_t i = 0; i < (int64_t)t.rows * wide; ++i) t.o[i] += marks[i];
}

// A value that is not finite reaches exactly the rows that attend to its key; everyone else sees zero in its place. Every 16 channels
// of `v` and `clean` begin `apart` floats behind the last.
static inline void mark_non_finite(const Tile& t, float* marks, const float* s, const float* v, float* clean, int column, int dv,
                                   int wide, int apart = PANEL) {
  const float infinity = __builtin_inff();
  for (int c = 0; c < wide; ++c) {
    const int at = c / PANEL * apart + c % PANEL;
    const float x = v[at];
    clean[at] = x;
    if (c < dv && x - x != 0.0f) {
      clean[at] = 0.0f;
      for (int r = 0; r < t.rows; ++r)
        if (s[(int64_t)r * S_STRIDE + column] > -infinity) marks[(int64_t)r * wide + c] += x;
    }
  }
}

}  // namespace SIEVE_LEVEL
}  // namespace sieve
