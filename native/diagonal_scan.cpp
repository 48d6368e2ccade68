#include "diagonal_scan.h"

#include <algorithm>

#include "kernels.h"
#include "level.h"
#include "parallel.h"

namespace sieve {

void diagonal_scan(const View& x, const float* a, const float* start, const View& out, bool reverse, int threads) {
  constexpr int64_t CHANNELS = 64;  // one item's: long enough for whole cache lines, and their state stays in registers
  constexpr int64_t WORK = int64_t{1} << 18;
  const int64_t batch = x.shape[1], length = x.shape[2], width = x.shape[3], parts = (width + CHANNELS - 1) / CHANNELS;
  const int64_t worth = std::clamp<int64_t>(1 + batch * length * width / WORK, 1, std::max(threads, 1));
  const Kernels& k = kernels();
  parallel_for(batch * parts, static_cast<int>(worth), [&](int64_t item, int) {
    const int64_t b = item / parts, c = item % parts * CHANNELS, n = std::min(CHANNELS, width - c);
    const int64_t first = reverse ? length - 1 : 0, sign = reverse ? -1 : 1;
    k.diagonal_scan(reinterpret_cast<const float*>(at(x, 0, b, first, c)), sign * x.stride[2], a + c, start + b * width + c,
                    reinterpret_cast<float*>(at(out, 0, b, first, c)), sign * out.stride[2], length, n);
  });
}

}  // namespace sieve
