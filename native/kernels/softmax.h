// The online softmax of one tile: logits of a few panels become weights, and what came before is rescaled.
#pragma once
#include "kernels/logits.h"

namespace sieve {
namespace SIEVE_LEVEL {

constexpr int CHUNK = CHUNK_PANELS * PANEL;
constexpr int S_STRIDE = CHUNK + 16;  // rows do not fall on one set of the cache
constexpr float SLACK = 8.0f;         // a row is rescaled once its reference is this far (in powers of two) below its maximum

// Row r over n logits: raises the reference if needed, turns the logits into weights, rescales what came before.
template <int Terms>
static inline void soften(const Tile& t, int r, float* s, int n, float unit, int wide) {
  const float infinity = __builtin_inff();
  vf most = load(s);
  for (int i = LANES; i < n; i += LANES) most = max_(load(s + i), most);
  const float peak = top(most), before = t.m[r];
  if (peak > before && !((peak - before) * unit <= SLACK)) {
    const float shrink = exp2_one((before - peak) * unit);
    t.m[r] = peak;
    if (before != -infinity) {
      t.l[r] *= shrink;
      float* o = t.o + (int64_t)r * wide;
      for (int i = 0; i < wide; i += LANES) store(o + i, load(o + i) * shrink);
    }
  }
  const float base = t.m[r] == -infinity ? 0.0f : t.m[r] * unit;
  vf total = vf{};
  for (int i = 0; i < n; i += LANES) {
    const vf p = exp2_<Terms>(load(s + i) * unit - base);
    store(s + i, p);
    total += p;
  }
  t.l[r] += sum(total);
}

// A value that is not finite reaches exactly the rows that attend to its key; everyone else sees zero in its place.
static inline void mark_non_finite(const Tile& t, float* marks, const float* s, const float* v, float* clean, int column, int dv,
                                   int wide) {
  const float infinity = __builtin_inff();
  for (int c = 0; c < wide; ++c) {
    const float x = v[c];
    clean[c] = x;
    if (c < dv && x - x != 0.0f) {
      clean[c] = 0.0f;
      for (int r = 0; r < t.rows; ++r)
        if (s[(int64_t)r * S_STRIDE + column] > -infinity) marks[(int64_t)r * wide + c] += x;
    }
  }
}

static inline void start(const Tile& t, int wide) {
  const float infinity = __builtin_inff();
  memset(t.o, 0, sizeof(float) * up(t.rows, 16) * wide);
  for (int r = 0; r < t.rows; ++r) {
    t.m[r] = -infinity;
    t.l[r] = 0.0f;
  }
}

static inline void add_marks(const Tile& t, const float* marks, int wide) {
  for (int64_t i = 0; i < (int64_t)t.rows * wide; ++i) t.o[i] += marks[i];
}

}  // namespace SIEVE_LEVEL
}  // namespace sieve
