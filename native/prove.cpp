// The blocks that sixteen rows must keep so that each is proved to drop little: brackets from the sketch, and the keys themselves
// for what is reached. Every rounding is counted outward, as selection/certified.py does for the reference.
#include <algorithm>
#include <cmath>
#include <limits>

#include "gate_rows.h"

namespace sieve {

namespace {

constexpr double LOG2E = 1.4426950408889634, UNIT = 0x1p-24;
constexpr double GLANCE = 8;  // blocks that a proof of an eighth of the error drops need no close look: no more of it can be lost
constexpr float INFINITE = std::numeric_limits<float>::infinity();

float outward(double x) { return static_cast<float>(x * (1 + 1e-6)); }

// Runs of blocks that are marked, as first..last-1.
template <class Act>
void each_run(const std::vector<uint8_t>& marks, int64_t blocks, Act act) {
  for (int64_t n = 0; n < blocks;) {
    int64_t end = n;
    while (end < blocks && marks[end]) ++end;
    if (end > n) act(n, end);
    n = std::max(end, n + 1);
  }
}

}  // namespace

// `plain`: [16] scale * ||q||. Fills upper, lower and estimate. With `glance`, rounded queries meet the codes as integers first,
// and only blocks that matter are looked at closely: the others keep the bracket of their largest errors.
void GateRows::bracket(const RowSet& set, const Head& head, const Frame& f, const Lanes& lanes, const float* plain, bool glance,
                       RowSpace& w) const {
  const int32_t d = static_cast<int32_t>(d_), wide = static_cast<int32_t>(wide_);
  const int64_t entries = d_ * LANE_ROWS, blocks = lanes.last - lanes.first;
  const float* a = reinterpret_cast<const float*>(at(t_.channel_scale, 0, set.b, set.kv, 0));
  float factor[LANE_ROWS], step[LANE_ROWS], half[LANE_ROWS], stretched[LANE_ROWS], rest[LANE_ROWS] = {};
  float* q = w.q.get();
  k_.prepare_lanes(t_.q, set.b, set.head, set.query, set.rows, a, false, d, wide, q, nullptr, factor, nullptr);
  double squares[LANE_ROWS] = {};
  for (int64_t c = 0; c < entries; ++c) squares[c % LANE_ROWS] += static_cast<double>(q[c]) * q[c];
  for (int i = 0; i < LANE_ROWS; ++i) stretched[i] = outward(t_.scale * std::sqrt(squares[i]) * (1 + 0x1p-16));
  KeyProof p{};
  p.keys = keys_of(set, head, lanes, step, w);
  p.key_norm = head.key_norm;
  p.plain = plain;
  p.stretched = stretched;
  p.rest = rest;
  p.rounding = static_cast<float>(static_cast<double>(d_ + t_.block_size + 16) * UNIT);
  p.upper = w.upper.get();
  p.lower = w.lower.get();
  if (glance || t_.round_queries) {
    std::copy_n(q, entries, w.exact.get());
    k_.prepare_lanes(t_.q, set.b, set.head, set.query, set.rows, a, true, d, wide, q, w.q_codes.get(), step, nullptr);
    std::fill_n(squares, LANE_ROWS, 0.0);
    for (int64_t c = 0; c < entries; ++c) {
      const double apart = w.exact[c] - static_cast<double>(q[c]) * step[c % LANE_ROWS];
      squares[c % LANE_ROWS] += apart * apart;
    }
    for (int i = 0; i < LANE_ROWS; ++i) rest[i] = outward(t_.scale * std::sqrt(squares[i]) * (1 + 0x1p-12));
  }
  std::fill_n(w.reached.begin(), blocks, uint8_t{1});
  if (glance) {
    halve(w.q_codes.get(), half);
    if (t_.round_queries) std::copy_n(step, LANE_ROWS, factor);
    for (float& x : step) x *= t_.scale * static_cast<float>((t_.bits == 8 ? 1.0 : 0.5) * LOG2E);
    p.keys.q_codes = w.q_codes.get();
    p.keys.half = half;
    p.error = head.worst_error;
    p.metric_error = head.worst_metric;
    p.length = head.worst_length;
    k_.score_keys(p.keys);
    k_.widen(p);
    const Proof first = start(set, head, f, lanes, plain, t_.level / GLANCE, w);
    std::fill_n(w.reached.begin(), blocks, uint8_t{0});
    k_.stop_streams(first, set.rows, false, w.reached.data(), w.list.get());
    if (!t_.round_queries) {
      std::copy_n(w.exact.get(), entries, q);
      std::fill_n(rest, LANE_ROWS, 0.0f);
    }
  } else if (t_.round_queries) {
    std::copy_n(step, LANE_ROWS, factor);
  }
  for (float& x : factor) x *= t_.scale * static_cast<float>(0.5 * LOG2E);  // codes are twice the levels
  p.keys.q_codes = nullptr;
  p.keys.factor = factor;
  p.error = head.error;
  p.metric_error = head.metric_error;
  p.length = t_.round_queries ? head.length : nullptr;
  p.spectral = head.spectral;
  p.metric_spectral = head.metric_spectral;
  each_run(w.reached, blocks, [&](int64_t from, int64_t to) {
    KeyProof run = p;
    run.keys.lanes.first = lanes.first + from;
    run.keys.lanes.last = lanes.first + to;
    run.keys.out += from * LANE_ROWS;
    run.upper += from * LANE_ROWS;
    run.lower += from * LANE_ROWS;
    k_.bracket_keys(run);
  });
}

// What the reached blocks hold, from their keys. A row of which nothing can be known gets no room: it keeps everything.
void GateRows::count_exactly(const RowSet& set, const Lanes& lanes, const Proof& proof, float* room, RowSpace& w) const {
  plain_queries(set, w, nullptr);
  each_run(w.reached, lanes.last - lanes.first, [&](int64_t from, int64_t to) {
    Lanes run = lanes;
    run.first = lanes.first + from;
    run.last = lanes.first + to;
    score_keys_themselves(set, run, w, w.other.get());
    for (int64_t i = 0; i < (to - from) * LANE_ROWS; ++i)
      if (w.other[i] == LOWEST || w.other[i] == INFINITE) room[i % LANE_ROWS] = -1.0f;
    k_.weigh_kept(proof, w.other.get(), from, to);
  });
}

// The streams of a promise of at most `error`, from brackets and estimates.
Proof GateRows::start(const RowSet& set, const Head& head, const Frame& f, const Lanes& lanes, const float* plain, double error,
                      RowSpace& w) const {
  const int64_t first = lanes.first, last = lanes.last, blocks = last - first;
  std::fill_n(w.first.begin(), blocks, uint8_t{0});
  const auto comes_first = [&](int64_t n) {
    if (n >= first && n < last) w.first[n - first] = 1;
  };
  for (int64_t n : f.forced) comes_first(n);
  for (int32_t n : head.broken) comes_first(n);
  float longest = 0;
  for (int64_t n = first; n < last; ++n) longest = std::max(longest, head.key_norm[n]);

  // a hair below the target, so that the certificate computed afterwards in another order meets it too
  const double target = error * (1 - 0x1p-10);
  Proof p{};
  p.blocks = blocks;
  p.upper = w.upper.get();
  p.lower = w.lower.get();
  p.estimate = w.estimate.get();
  p.first = w.first.data();
  p.log_kappa = static_cast<float>(std::log2(target / (1 - target)));
  p.priority = w.priority.get();
  p.dropped = w.dropped.get();
  p.kept = w.kept.get();
  k_.weigh(p);
  const double sums = static_cast<double>(blocks + 64) * UNIT, additions = static_cast<double>(kv_len_ + 4 * blocks + 16) * UNIT;
  for (int i = 0; i < LANE_ROWS; ++i) {
    // what the kept mass may have lost: bounds.kept_mass; a mass is at most 2^100 times 2^base
    const double margin = static_cast<double>(d_ + 8) * UNIT * plain[i] * longest;
    const double size = (std::fabs(p.base[i]) + 100) / LOG2E + std::log(static_cast<double>(kv_len_) + 1);
    const double loss = margin + 8 * UNIT * size + additions;
    p.room[i] = static_cast<float>(target / (1 + 8 * UNIT - target) * std::exp(-loss) * (1 - 4 * sums) * (1 - 1e-6));
    if (!std::isfinite(p.room[i])) p.room[i] = -1.0f;
    if (t_.sink) {
      const double x = t_.sink[set.head[std::min(i, set.rows - 1)]];
      p.sink[i] = static_cast<float>(std::exp2(std::min(x * LOG2E - p.base[i], 100.0)) * (1 - 1e-6));
      if (!(x < INFINITE)) p.room[i] = -1.0f;
    }
  }
  return p;
}

void GateRows::prove(const RowSet& set, const Head& head, const Frame& f, const Lanes& lanes, RowSpace& w) const {
  const int64_t blocks = lanes.last - lanes.first;
  w.asked += blocks;
  w.scored += blocks;
  float plain[LANE_ROWS];
  plain_queries(set, w, plain);
  for (float& x : plain) x = outward(static_cast<double>(t_.scale) * x * (1 + static_cast<double>(d_) * 0x1p-22));
  bool is_early[LANE_ROWS], some_early, all_early;
  early_rows(set, head, is_early, some_early, all_early);
  if (some_early) score_keys_themselves(set, lanes, w, w.other.get());
  bracket(set, head, f, lanes, plain, !some_early && integers_fit(), w);
  for (int i = 0; i < LANE_ROWS && some_early; ++i)
    for (int64_t n = 0; n < blocks && is_early[i]; ++n) w.estimate[n * LANE_ROWS + i] = w.other[n * LANE_ROWS + i];
  Proof p = start(set, head, f, lanes, plain, t_.level, w);
  std::fill_n(w.reached.begin(), blocks, uint8_t{0});
  k_.stop_streams(p, set.rows, false, w.reached.data(), w.list.get());
  count_exactly(set, lanes, p, p.room, w);
  k_.stop_streams(p, set.rows, true, w.marks.data() + lanes.first, w.list.get());
}

}  // namespace sieve
