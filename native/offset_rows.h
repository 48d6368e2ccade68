// What the two plans share: rows as padded fp32, lists without what no row reads, and the end of a row.
#pragma once
#include <vector>

#include "buffer.h"
#include "kernels.h"
#include "offsets.h"

namespace sieve {

constexpr float OFFSET_LOG2E = 1.44269504088896340736f, OFFSET_LN2 = 0.693147180559945309417f;

// One head as fp32 rows whose width is a multiple of 16: where it lies, or a copy.
struct Rows32 {
  const float* data = nullptr;
  int64_t stride = 0;
  Buffer<float> copy;

  void read(const View& x, int64_t b, int64_t h, bool clean = false);
};

bool rows_as_they_are(const View& x);

// Queries `first`, `first + step`, ... of a head as fp32 times `factor`.
void read_queries(const View& q, int64_t b, int64_t h, int64_t first, int64_t step, int64_t count, float factor, int64_t wide,
                  bool clean, float* out);

// o / l to `out`, natural lse returned; zeros and -inf for a row without keys.
float finish_offset_row(float* o, float m, float l, int64_t dv, int64_t wide, void* out, int64_t stride, DType dtype);

inline int64_t flat_row(const OffsetAttention& a, int64_t b, int64_t h, int64_t i) {
  return (b * a.q.shape[1] + h) * a.q.shape[2] + i;
}

}  // namespace sieve
