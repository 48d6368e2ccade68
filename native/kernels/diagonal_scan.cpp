// The diagonal recurrence over a strip of channels: the state stays in registers, memory is read and written once.
#include "kernels/functions.h"
#include "kernels/vec.h"

namespace sieve {
namespace SIEVE_LEVEL {

template <int V>
static inline void strip(const float* x, int64_t x_step, const float* a, const float* start, float* out, int64_t out_step,
                         int64_t length) {
  vf h[V], decay[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    h[v] = load(start + v * LANES);
    decay[v] = load(a + v * LANES);
  }
  for (int64_t t = 0; t < length; ++t)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      h[v] = decay[v] * h[v] + load(x + t * x_step + v * LANES);
      store(out + t * out_step + v * LANES, h[v]);
    }
}

void diagonal_scan(const float* x, int64_t x_step, const float* a, const float* start, float* out, int64_t out_step, int64_t length,
                   int64_t channels) {
  int64_t c = 0;
  for (; c + 4 * LANES <= channels; c += 4 * LANES) strip<4>(x + c, x_step, a + c, start + c, out + c, out_step, length);
  for (; c + LANES <= channels; c += LANES) strip<1>(x + c, x_step, a + c, start + c, out + c, out_step, length);
  for (; c < channels; ++c) {
    float h = start[c];
    for (int64_t t = 0; t < length; ++t) out[t * out_step + c] = h = a[c] * h + x[t * x_step + c];
  }
}

}  // namespace SIEVE_LEVEL
}  // namespace sieve
