// Random offset attention, and what it means, as plain loops over doubles.
#pragma once
#include "offsets.h"
#include "test.h"

enum Plan { DIAGONALS, WHEEL };
constexpr Plan PLANS[] = {DIAGONALS, WHEEL};
constexpr sieve::DType FLOATS[] = {sieve::F32, sieve::F16, sieve::BF16};
constexpr double OFFSET_TOLERANCE[] = {1e-4, 3e-3, 2e-2};

struct OffsetShape {
  int64_t batch, kv_heads, group, q_len, kv_len, d, dv;
};
OffsetShape short_shape(Random& random);
OffsetShape long_shape(Random& random);  // rows of several tiles of either pass

struct OffsetResult {
  Array out, lse, shift, dq, dk, dv;

  bool same_bits(const OffsetResult& other) const;
};

struct OffsetProblem {
  // `wild`: large logits, and arrays with one element for a whole axis
  OffsetProblem(Random& random, sieve::DType dtype, const OffsetShape& shape, bool wild = true);

  OffsetShape s;
  sieve::DType dtype;
  sieve::OffsetAttention call{};
  sieve::Wheel wheel{};
  Array q, k, v, d_out, offsets, residues;
  std::vector<std::vector<int64_t>> read;  // the keys of every query
  std::string text;

  int64_t heads() const { return s.kv_heads * s.group; }
  OffsetResult result(int64_t seed) const;
  void forward(Plan plan, int threads, const OffsetResult& r) const;
  void backward(Plan plan, int threads, OffsetResult& r) const;  // after forward
  // Output and lse but for the queries of `unsaid`; gradients but for the queries of `hit` and the keys that these read.
  void check(const OffsetResult& r, bool gradients, const std::vector<bool>& unsaid = {}, const std::vector<bool>& hit = {}) const;
};

// An array of any layout, filled so that what is not written shows, and what is written between its elements.
Array output(Random& random, sieve::DType dtype, std::vector<int64_t> shape, int64_t layouts = SHARED_HEADS);
void check_gaps(const Array& x);
bool near(double got, double exact, double tolerance);

template <class F>
void each_element(const Array& x, const F& body) {
  const int64_t* n = x.view.shape;
  for (int64_t a = 0; a < n[0]; ++a)
    for (int64_t b = 0; b < n[1]; ++b)
      for (int64_t c = 0; c < n[2]; ++c)
        for (int64_t d = 0; d < n[3]; ++d) body(a, b, c, d);
}
