// Tables of block masses: sums over them, and what their rows have in common. Four rows lie side by side, LANES / 4 blocks a
// vector where there are only four.
#include "kernels/four.h"
#include "kernels/functions.h"

namespace sieve {
namespace SIEVE_LEVEL {

constexpr int TOGETHER = LANES / SCAN_ROWS;  // groups, or blocks of one group, in a vector

// Four numbers at p as the first lanes of a vector, `fill` in the others.
static inline vf load_four(const float* p, float fill) {
  vf x = splat(fill);
  for (int r = 0; r < SCAN_ROWS; ++r) x[r] = p[r];
  return x;
}

static inline vf base_of(const float* base, int64_t i, int64_t rows) {
  vf x;
  for (int l = 0; l < LANES; ++l) x[l] = base[(i + l) % rows];
  return x;
}

void fold(const float* mass, int64_t n, int64_t each, int64_t rows, float* out) {
  const float infinity = __builtin_inff();
  for (int64_t first = 0; first < n; first += each, out += rows)
    for (int64_t r = 0; r < rows; r += SCAN_ROWS) {
      const int64_t last = first + each < n ? first + each : n;
      vf most = splat(-infinity), total = vf{};
      for (int64_t i = first; i < last; ++i) most = max_(load_four(mass + i * rows + r, -infinity), most);
      const vf safe = select(most > splat(-infinity), most, vf{});
      for (int64_t i = first; i < last; ++i) total += exp2_<6>(load_four(mass + i * rows + r, -infinity) - safe);
      const vf sum = log_(total) * LOG2E + safe;
      for (int i = 0; i < SCAN_ROWS; ++i) out[r + i] = sum[i];
    }
}

void row_mass(const float* mass, int64_t n, int64_t rows, float* out) {
  const float infinity = __builtin_inff();
  for (int64_t r = 0; r < rows; r += SCAN_ROWS) {
    const bool tight = rows == SCAN_ROWS;
    const int64_t step = tight ? TOGETHER : 1;
    vf most = splat(-infinity), total = vf{};
    int64_t i = 0;
    for (; i + step <= n; i += step) most = max_(tight ? load(mass + i * rows) : load_four(mass + i * rows + r, -infinity), most);
    for (; i < n; ++i) most = max_(load_four(mass + i * rows + r, -infinity), most);
    most = over_keys(most, true);
    const vf safe = select(most > splat(-infinity), most, vf{});
    for (i = 0; i + step <= n; i += step)
      total += exp2_<6>((tight ? load(mass + i * rows) : load_four(mass + i * rows + r, -infinity)) - safe);
    for (; i < n; ++i) total += exp2_<6>(load_four(mass + i * rows + r, -infinity) - safe);
    const vf sum = log_(over_keys(total, false)) * LOG2E + safe;
    for (int l = 0; l < SCAN_ROWS; ++l) out[r + l] = sum[l];
  }
}

void best_row(const float* mass, const float* base, int64_t n, int64_t rows, float* out) {
  for (int64_t i = 0; i < n; ++i, mass += rows) {
    float best = mass[0] - base[0];
    for (int64_t r = 1; r < rows; ++r) {
      const float x = mass[r] - base[r];
      best = x > best ? x : best;
    }
    out[i] = best;
  }
}

void powers(const float* mass, const float* base, int64_t n, int64_t rows, float* out) {
  const int64_t all = n * rows;
  const bool tight = rows == SCAN_ROWS;
  const vf same = base_of(base, 0, rows);
  int64_t i = 0;
  for (; i + LANES <= all; i += LANES) store(out + i, exp2_<6>(load(mass + i) - (tight ? same : base_of(base, i, rows))));
  for (; i < all; ++i) out[i] = exp2_one(mass[i] - base[i % rows]);
}

void split(const float* upper, const float* lower, const float* level, int64_t n, int64_t rows, float* below, float* above) {
  const float infinity = __builtin_inff();
  const bool tight = rows == SCAN_ROWS;
  for (int64_t r = 0; r < rows; r += SCAN_ROWS) {
    const vf cut = four(level + r);
    const int64_t step = tight ? TOGETHER : 1;
    vf low = vf{}, high = vf{};
    int64_t i = 0;
    for (; i + step <= n; i += step) {
      const vf u = tight ? load(upper + i * rows) : load_four(upper + i * rows + r, infinity);
      const vf l = tight ? load(lower + i * rows) : load_four(lower + i * rows + r, 0.0f);
      const vi under = u <= cut;
      low += (vf)((vi)u & under);
      high += (vf)((vi)l & ~under);
    }
    for (; i < n; ++i) {
      const vf u = load_four(upper + i * rows + r, infinity), l = load_four(lower + i * rows + r, 0.0f);
      const vi under = u <= cut;
      low += (vf)((vi)u & under);
      high += (vf)((vi)l & ~under);
    }
    low = over_keys(low, false);
    high = over_keys(high, false);
    for (int j = 0; j < SCAN_ROWS; ++j) {
      below[r + j] = low[j];
      above[r + j] = high[j];
    }
  }
}

}  // namespace SIEVE_LEVEL
}  // namespace sieve
