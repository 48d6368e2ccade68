#include "offset_problem.h"

#include <algorithm>
#include <cmath>
#include <cstring>

using namespace sieve;

constexpr double GRADIENT_TOLERANCE[] = {1e-3, 1.5e-2, 1e-1};
constexpr char GAP = 0x5a;  // what outputs hold before the call

OffsetShape short_shape(Random& random) {
  const int64_t lengths[] = {1, 2, 15, 16, 17, 31, 33, 48, 63, 65, 90, 131, 150};
  const int64_t widths[] = {1, 7, 16, 20, 32, 33, 48, 64, 64, 70, 128};
  OffsetShape s{random.between(1, 2),     random.between(1, 2),     random.between(1, 3),    lengths[random.below(13)],
                lengths[random.below(13)], widths[random.below(11)], widths[random.below(11)]};
  if (random.chance(0.4)) s.q_len = s.kv_len;
  if (random.chance(0.2)) s.q_len = random.between(1, 3);
  if (random.chance(0.5)) s.dv = s.d;
  return s;
}

OffsetShape long_shape(Random& random) {
  const int64_t widths[] = {3, 16, 32};
  OffsetShape s{1, random.between(1, 2), random.between(1, 2), random.between(1020, 1100), random.between(1020, 1200), 0, 5};
  s.d = widths[random.below(3)];
  if (random.chance(0.3)) s.q_len = random.between(500, 530);
  if (random.chance(0.5)) s.dv = s.d;
  return s;
}

static bool prime(int64_t n) {
  for (int64_t i = 2; i * i <= n; ++i)
    if (n % i == 0) return false;
  return n > 1;
}

static std::vector<int64_t> pattern(Random& random, int64_t kv_len) {
  const int64_t kind = random.below(6), window = random.chance(0.6) ? random.between(1, 8) : random.below(70);
  const double density = random.uniform() * random.uniform();
  std::vector<int64_t> out;
  for (int64_t s = 0; s < 2 * kv_len + 4; ++s) {
    const int64_t root = std::llround(std::sqrt(static_cast<double>(s)));
    const bool in = kind == 0   ? s < window
                    : kind == 1 ? s < 5 || prime(s)
                    : kind == 2 ? s < 2 || root * root == s
                    : kind == 3 ? random.chance(density)
                    : kind == 4 ? s >= kv_len
                                : s > kv_len - 3 || s % 30 == 7;
    if (in) out.push_back(s);
  }
  return out;
}

// Any layout; with `broadcast`, one axis may be one element for all.
static Array input(Random& random, DType dtype, std::vector<int64_t> shape, double size, bool broadcast) {
  std::vector<int64_t> held = shape;
  const int64_t axis = broadcast && random.chance(0.3) ? random.below(4) : -1;
  if (axis >= 0) held[axis] = 1;
  Array x = make(random, dtype, held, static_cast<Layout>(random.below(LAYOUTS)));
  fill(random, x, size);
  if (axis >= 0) {
    x.view.shape[axis] = shape[axis];
    x.view.stride[axis] = 0;
  }
  return x;
}

static Array list(Random& random, const std::vector<int64_t>& numbers) {
  const int64_t n = static_cast<int64_t>(numbers.size());
  Array x;
  x.view = View{nullptr, I64, {1, 1, 1, n}, {n, n, n, 1}};
  x.memory = std::make_shared<Guarded>(n * 8, random.chance(0.5));
  x.view.data = x.memory->data();
  if (n) std::memcpy(x.view.data, numbers.data(), n * 8);
  return x;
}

static int64_t span(const Array& x) {
  int64_t last = 0;
  for (int i = 0; i < 4; ++i) last += (x.view.shape[i] - 1) * std::abs(x.view.stride[i]);
  return (last + 1) * dtype_bytes(x.view.dtype);
}

Array output(Random& random, DType dtype, std::vector<int64_t> shape, int64_t layouts) {
  Array x = make(random, dtype, shape, static_cast<Layout>(random.below(layouts)));
  std::memset(x.memory->data(), GAP, span(x));
  return x;
}

static std::vector<double> numbers(const Array& x) {
  std::vector<double> out;
  each_element(x, [&](int64_t a, int64_t b, int64_t c, int64_t d) { out.push_back(x.get(a, b, c, d)); });
  return out;
}

void check_gaps(const Array& x) {
  const char* start = x.memory->data();
  std::vector<char> element(span(x), 0);
  each_element(x, [&](int64_t a, int64_t b, int64_t c, int64_t d) {
    std::memset(element.data() + (at(x.view, a, b, c, d) - start), 1, dtype_bytes(x.view.dtype));
  });
  for (size_t i = 0; i < element.size(); ++i) CHECK(element[i] || start[i] == GAP);
}

bool near(double got, double exact, double tolerance) {
  if (!std::isfinite(exact)) return std::isnan(exact) ? std::isnan(got) : got == exact;
  return std::fabs(got - exact) <= tolerance * (1.0 + std::fabs(exact));
}

bool OffsetResult::same_bits(const OffsetResult& other) const {
  for (const auto x : {&OffsetResult::out, &OffsetResult::lse, &OffsetResult::dq, &OffsetResult::dk, &OffsetResult::dv})
    if (std::memcmp((this->*x).memory->data(), (other.*x).memory->data(), span(this->*x)) != 0) return false;
  return true;
}

OffsetProblem::OffsetProblem(Random& random, DType type, const OffsetShape& shape, bool wild) : s(shape), dtype(type) {
  const int64_t heads = s.kv_heads * s.group, moduli[] = {1, 2, 6, 7, 30, 30, 240};
  q = input(random, type, {s.batch, heads, s.q_len, s.d}, wild && random.chance(0.2) ? 12.0 : 1.5, wild);
  k = input(random, type, {s.batch, s.kv_heads, s.kv_len, s.d}, 1.0, wild);
  v = input(random, type, {s.batch, s.kv_heads, s.kv_len, s.dv}, 1.0, wild);
  d_out = input(random, type, {s.batch, heads, s.q_len, s.dv}, 1.0, wild);
  std::vector<int64_t> chosen = pattern(random, s.kv_len);  // callers leave out what no query reaches
  chosen.resize(std::lower_bound(chosen.begin(), chosen.end(), s.kv_len) - chosen.begin());
  offsets = list(random, chosen);
  const int64_t prefix = random.chance(0.4) ? 0 : std::min(s.kv_len, random.chance(0.8) ? random.between(1, 5) : random.between(1, 80));
  call = {q.view, k.view, v.view, static_cast<int64_t*>(offsets.view.data), static_cast<int64_t>(chosen.size()), prefix,
          static_cast<float>((random.chance(0.5) ? 1.0 : 0.3) / std::sqrt(static_cast<double>(s.d))), 1};
  wheel.modulus = moduli[random.below(7)];
  const double share = random.chance(0.3) ? 1.0 : random.uniform();
  std::vector<int64_t> tiled;
  for (int64_t r = 0; r < wheel.modulus; ++r)
    if (random.chance(share)) tiled.push_back(r);
  residues = list(random, tiled);
  wheel.residues = static_cast<int64_t*>(residues.view.data);
  wheel.residue_count = static_cast<int64_t>(tiled.size());
  read.resize(s.q_len);
  for (int64_t i = 0; i < s.q_len; ++i)
    for (int64_t p = s.kv_len - s.q_len + i, j = 0; j <= p; ++j)
      if (j < prefix || std::binary_search(chosen.begin(), chosen.end(), p - j)) read[i].push_back(j);
  text = "dtype " + std::to_string(type) + " [" + std::to_string(s.batch) + ", " + std::to_string(heads) + " on " +
         std::to_string(s.kv_heads) + ", " + std::to_string(s.q_len) + " x " + std::to_string(s.kv_len) + ", " + std::to_string(s.d) +
         ", " + std::to_string(s.dv) + "] offsets " + std::to_string(chosen.size()) + " prefix " + std::to_string(prefix) +
         " modulus " + std::to_string(wheel.modulus) + " residues " + std::to_string(tiled.size());
}

OffsetResult OffsetProblem::result(int64_t seed) const {
  Random random(seed);
  const int64_t rows = s.batch * heads() * s.q_len;
  return {output(random, dtype, {s.batch, heads(), s.q_len, s.dv}),    output(random, F32, {1, 1, 1, rows}, 1),
          output(random, F32, {1, 1, 1, rows}, 1),                     output(random, dtype, {s.batch, heads(), s.q_len, s.d}),
          output(random, dtype, {s.batch, s.kv_heads, s.kv_len, s.d}), output(random, dtype, {s.batch, s.kv_heads, s.kv_len, s.dv})};
}

void OffsetProblem::forward(Plan plan, int threads, const OffsetResult& r) const {
  OffsetAttention a = call;
  a.threads = threads;
  float* lse = static_cast<float*>(r.lse.view.data);
  if (plan == DIAGONALS) attend_offsets(a, r.out.view, lse);
  else attend_wheel(a, wheel, r.out.view, lse);
}

void OffsetProblem::backward(Plan plan, int threads, OffsetResult& r) const {
  OffsetAttention a = call;
  a.threads = threads;
  const std::vector<double> o = numbers(r.out), pull = numbers(d_out);
  for (int64_t row = 0; row < r.shift.view.shape[3]; ++row) {
    double sum = 0.25;  // any gradient of lse
    for (int64_t c = 0; c < s.dv; ++c) sum -= pull[row * s.dv + c] * o[row * s.dv + c];
    r.shift.set(0, 0, 0, row, sum);
  }
  const OffsetGradients g{d_out.view, static_cast<float*>(r.lse.view.data), static_cast<float*>(r.shift.view.data),
                          r.dq.view, r.dk.view, r.dv.view};
  if (plan == DIAGONALS) attend_offsets_backward(a, g);
  else attend_wheel_backward(a, wheel, g);
}

void OffsetProblem::check(const OffsetResult& r, bool gradients, const std::vector<bool>& unsaid, const std::vector<bool>& hit) const {
  const std::vector<double> q_ = numbers(q), k_ = numbers(k), v_ = numbers(v), o_ = numbers(r.out), lse_ = numbers(r.lse);
  const std::vector<double> shift_ = gradients ? numbers(r.shift) : q_, pull_ = gradients ? numbers(d_out) : q_;
  std::vector<double> dq(q_.size()), dk(k_.size()), dv(v_.size()), o(s.dv), logit;
  for (int64_t row = 0; row < s.batch * heads() * s.q_len; ++row) {
    const int64_t i = row % s.q_len, head = row / s.q_len / s.group * s.kv_len;
    const double *x = &q_[row * s.d], *pull = &pull_[gradients ? row * s.dv : 0];
    logit.clear();
    double top = -INFINITY, total = 0;
    for (const int64_t j : read[i]) {
      double dot = 0;
      for (int64_t c = 0; c < s.d; ++c) dot += x[c] * k_[(head + j) * s.d + c];
      logit.push_back(dot * call.scale);
      top = std::max(top, logit.back());
    }
    // without weight: no keys, or none but keys whose logit is -inf
    const bool none = std::all_of(logit.begin(), logit.end(), [](double x) { return x == -INFINITY; });
    std::fill(o.begin(), o.end(), 0.0);
    for (size_t e = 0; e < logit.size(); ++e) {
      const double p = std::exp(logit[e] - top);
      total += p;
      for (int64_t c = 0; c < s.dv; ++c) o[c] += p * v_[(head + read[i][e]) * s.dv + c];
    }
    if (unsaid.empty() || !unsaid[i]) {
      CHECK(near(lse_[row], none ? -INFINITY : top + std::log(total), OFFSET_TOLERANCE[F32]));
      for (int64_t c = 0; c < s.dv; ++c) CHECK(near(o_[row * s.dv + c], none ? 0.0 : o[c] / total, OFFSET_TOLERANCE[dtype]));
    }
    for (size_t e = 0; gradients && !none && e < logit.size(); ++e) {
      const int64_t key = head + read[i][e];
      const double p = std::exp(logit[e] - lse_[row]);
      if (p == 0) continue;
      double slope = shift_[row];
      for (int64_t c = 0; c < s.dv; ++c) {
        slope += pull[c] * v_[key * s.dv + c];
        dv[key * s.dv + c] += p * pull[c];
      }
      slope *= p * call.scale;
      for (int64_t c = 0; c < s.d; ++c) {
        dq[row * s.d + c] += slope * k_[key * s.d + c];
        dk[key * s.d + c] += slope * x[c];
      }
    }
  }
  check_gaps(r.out);
  if (!gradients) return;
  std::vector<bool> spoilt(s.kv_len);
  for (size_t i = 0; i < hit.size(); ++i)
    for (const int64_t j : read[i]) spoilt[j] = spoilt[j] || hit[i];
  const auto compare = [&](const Array& got, const std::vector<double>& exact, const std::vector<bool>& skip) {
    const std::vector<double> x = numbers(got);
    const int64_t width = got.view.shape[3], length = got.view.shape[2];
    for (size_t e = 0; e < x.size(); ++e)
      if (skip.empty() || !skip[e / width % length]) CHECK(near(x[e], exact[e], GRADIENT_TOLERANCE[dtype]));
    check_gaps(got);
  };
  compare(r.dq, dq, hit);
  compare(r.dk, dk, spoilt);
  compare(r.dv, dv, spoilt);
}
