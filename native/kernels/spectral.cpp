// tr(G^8)^(1/8) of a small Gram matrix: three products of matrices of at most min(keys, channels) rows.
#include "kernels/spectral.h"

#include "kernels/gemm.h"

namespace sieve {
namespace SIEVE_LEVEL {

constexpr float SMALLEST = 1.17549435e-38f;
constexpr int MOST_PANELS = 32;  // channels up to 512

int64_t spectral_scratch(int64_t block_size, int32_t d) {
  const int64_t n = up(block_size, 16), wide = up(d, 16), order = n <= wide ? n : wide, other = n <= wide ? wide : n;
  return 2 * order * other + 3 * order * order;
}

// [rows][columns] to panels of 16 rows [rows / 16][columns][16]
static void to_panels(const float* x, int rows, int columns, float* out) {
  for (int p = 0; p < rows; p += 16)
    for (int c = 0; c < columns; ++c)
      for (int i = 0; i < 16; ++i) out[(int64_t)p * columns + c * 16 + i] = x[(int64_t)(p + i) * columns + c];
}

// out [rows][rows] = x [rows][columns] times its transpose, which lies in panels
static void gram(const float* x, const float* panels, int rows, int columns, float* out) {
  const float* panel[MOST_PANELS];
  for (int p = 0; p < rows / 16; ++p) panel[p] = panels + (int64_t)p * 16 * columns;
  times_panels(x, columns, rows, columns, panel, rows / 16, out, rows);
}

float largest_eigenvalue(const float* rows, int n, int size, int d, int wide, float* scratch) {
  float largest = 0.0f;
  for (int i = 0; i < n; ++i) {
    double total = 0.0;
    vf squares = vf{};
    for (int c = 0; c < wide; c += LANES) {
      const vf x = load(rows + (int64_t)i * wide + c);
      squares += x * x;
    }
    float s = sum(squares);
    if (!(s >= 1e-30f && s <= 1e38f)) {
      for (int c = 0; c < wide; ++c) total += (double)rows[(int64_t)i * wide + c] * rows[(int64_t)i * wide + c];
      s = (float)__builtin_sqrt(total);
    } else {
      s = __builtin_sqrtf(s);
    }
    largest = s > largest ? s : largest;
  }
  if (!(largest > 0.0f)) return 0.0f;
  if (largest == __builtin_inff()) return largest;
  const int padded = (int)up(n, 16);
  const bool by_rows = padded <= wide;
  const int order = by_rows ? padded : wide, other = by_rows ? wide : padded;
  float* x = scratch;
  float* panels = x + (int64_t)order * other;
  float* a = panels + (int64_t)order * other;
  float* b = a + (int64_t)order * order;
  float* c = b + (int64_t)order * order;
  memset(x, 0, sizeof(float) * order * other);
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < d; ++j) {
      const float value = rows[(int64_t)i * wide + j] / largest;
      x[by_rows ? (int64_t)i * other + j : (int64_t)j * other + i] = value;
    }
  to_panels(x, order, other, panels);
  gram(x, panels, order, other, a);
  float trace = 0.0f;
  for (int i = 0; i < order; ++i) trace += a[(int64_t)i * order + i];
  trace = trace > SMALLEST ? trace : SMALLEST;
  for (int i = 0; i < order * order; ++i) a[i] /= trace;
  to_panels(a, order, order, c);
  gram(a, c, order, order, b);  // symmetric, so a matrix times its transpose is its square
  to_panels(b, order, order, c);
  gram(b, c, order, order, a);
  double eighth = 0.0;
  for (int i = 0; i < order * order; ++i) eighth += (double)a[i] * a[i];
  const double unit = 5.9604644775390625e-8;
  const int least = size < d ? size : d;
  const double top = (double)trace * __builtin_sqrt(__builtin_sqrt(__builtin_sqrt(eighth)));
  const double bound = top * largest * largest * (1.0 + 4.0 * least * (size + d + 8) * unit);
  const float up_to = (float)(bound * (1.0 + 2.0 * unit));
  return up_to > SMALLEST ? up_to : SMALLEST;
}

}  // namespace SIEVE_LEVEL
}  // namespace sieve
