#include "gate_rows.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "level.h"

namespace sieve {

namespace {

constexpr float LOG2E = 1.44269504088896340736f;

}  // namespace

RowSpace::RowSpace(const GateTask& t, int64_t blocks, int32_t wide) {
  const bool by_keys = t.scoring == BY_KEYS, proves = t.rule == KEEP_PROVED;
  const int64_t table = blocks * LANE_ROWS;
  estimate = Buffer<float>(table);
  best = Buffer<float>(blocks);
  q = Buffer<float>(wide * (LANE_ROWS + 1));
  q_codes = Buffer<int8_t>(wide * LANE_ROWS);
  marks.resize(blocks);
  if (by_keys) other = Buffer<float>(table);
  if (t.rule == KEEP_MASS) weights = Buffer<float>(blocks * (LANE_ROWS + 1));
  const Kernels& k = kernels();
  const int64_t least = proves ? k.bracket_scratch(t.block_size, wide) : 0;
  if (by_keys) scratch = Buffer<float>(std::max(k.key_score_scratch(t.block_size, wide), least));
  if (by_keys) exact = Buffer<float>(wide * LANE_ROWS);
  if (by_keys && !proves) {
    far = Buffer<float>((blocks / GROUP + 1) * LANE_ROWS);
    open.resize(blocks / GROUP + 1);
  }
  if (!proves) return;
  for (Buffer<float>* x : {&upper, &lower, &dropped, &kept}) *x = Buffer<float>(table);
  priority = Buffer<int32_t>(table);
  list = Buffer<int32_t>(blocks);
  first.resize(blocks);
  reached.resize(blocks);
}

GateRows::GateRows(const GateTask& t) : Sight(t), t_(t), k_(kernels()), d_(t.q.shape[3]), wide_(up(d_, 64)) {}

bool GateRows::structurally_sees(int64_t query, int64_t key) const {
  int64_t low, high;
  interval(query, low, high);
  return low <= key && key < high;
}

// The channel scale of the sketch was measured on keys that this query must not know.
bool GateRows::early(const Head& head, int64_t query) const {
  if (t_.scoring != BY_KEYS) return false;
  if (!head.settled) return true;
  return offset_ + query < head.calibrated && !structurally_sees(query, std::min(head.calibrated, kv_len_) - 1);
}

void GateRows::early_rows(const RowSet& set, const Head& head, bool* is_early, bool& some, bool& all) const {
  some = false;
  all = true;
  for (int i = 0; i < LANE_ROWS; ++i) {
    is_early[i] = early(head, set.query[std::min(i, set.rows - 1)]);
    some |= is_early[i];
    all &= is_early[i];
  }
}

Lanes GateRows::lanes_of(const RowSet& set, const Frame& f) const {
  const Sequence& sequence = sequences_[set.b];
  Lanes lanes{};
  lanes.all_high = kv_len_;
  int64_t bottom = kv_len_, top = 0;
  for (int i = 0; i < LANE_ROWS; ++i) {
    const int64_t row = set.query[std::min(i, set.rows - 1)] - f.first;  // the last row fills the lanes that are left
    lanes.low[i] = f.low[row];
    lanes.high[i] = f.high[row];
    lanes.all_low = std::max(lanes.all_low, lanes.low[i]);
    lanes.all_high = std::min(lanes.all_high, lanes.high[i]);
    if (lanes.low[i] < lanes.high[i]) {
      bottom = std::min(bottom, lanes.low[i]);
      top = std::max(top, lanes.high[i]);
    }
  }
  lanes.first = bottom < top ? bottom / t_.block_size : 0;
  lanes.last = bottom < top ? (top + t_.block_size - 1) / t_.block_size : 0;
  lanes.kv_len = kv_len_;
  lanes.block_size = t_.block_size;
  lanes.part = sequence.part.empty() ? nullptr : sequence.part.data();
  lanes.part_before = sequence.part.empty() ? nullptr : sequence.part_before.data();
  return lanes;
}

void GateRows::plain_queries(const RowSet& set, RowSpace& w, float* norm) const {
  float step[LANE_ROWS];
  k_.prepare_lanes(t_.q, set.b, set.head, set.query, set.rows, nullptr, false, static_cast<int32_t>(d_), static_cast<int32_t>(wide_),
                   w.q.get(), nullptr, step, norm);
}

KeyScore GateRows::keys_of(const RowSet& set, const Head& head, const Lanes& lanes, const float* factor, RowSpace& w) const {
  KeyScore s{};
  s.lanes = lanes;
  s.codes = head.codes;
  s.bits = t_.bits;
  s.key = &t_.key;
  s.b = set.b;
  s.h = set.kv;
  s.step = head.step;
  s.shift = head.shift;
  s.origin = head.origin;
  s.d = static_cast<int32_t>(d_);
  s.wide = static_cast<int32_t>(wide_);
  s.q = w.q.get();
  s.factor = factor;
  s.softcap = t_.softcap;
  s.out = w.estimate.get();
  s.scratch = w.scratch.get();
  return s;
}

// The queries must lie in w.q as they are.
void GateRows::score_keys_themselves(const RowSet& set, const Lanes& lanes, RowSpace& w, float* out) const {
  float factor[LANE_ROWS];
  std::fill_n(factor, LANE_ROWS, t_.scale * LOG2E);
  KeyScore s = keys_of(set, Head{}, lanes, factor, w);
  s.out = out;
  k_.score_keys(s);
}

// Products must fit the bits above which they are accumulated.
bool GateRows::integers_fit() const {
  const int64_t largest = t_.bits == 8 ? 128 : (int64_t{1} << t_.bits) - 1;
  return t_.bits <= k_.integer_bits && largest * 127 * d_ < (int64_t{1} << 22);
}

void GateRows::halve(const int8_t* codes, float* half) const {
  int32_t sum[LANE_ROWS] = {};
  for (int64_t c = 0; c < wide_; c += 4)
    for (int i = 0; i < LANE_ROWS; ++i, codes += 4) sum[i] += codes[0] + codes[1] + codes[2] + codes[3];
  for (int i = 0; i < LANE_ROWS; ++i) half[i] = 0.5f * static_cast<float>(sum[i]);
}

float GateRows::score(const RowSet& set, const Head& head, const Lanes& lanes, bool two_levels, RowSpace& w) const {
  const int64_t first = lanes.first, last = lanes.last;
  w.asked += last - first;
  const int32_t d = static_cast<int32_t>(d_), wide = static_cast<int32_t>(wide_);
  if (t_.scoring != BY_KEYS) {
    float reach[LANE_ROWS];
    const bool balls = t_.scoring == BY_BALLS;
    plain_queries(set, w, balls ? reach : nullptr);
    if (balls)
      for (float& x : reach) x = t_.scale * (x * static_cast<float>(1.0 + static_cast<double>(d_) * 1.1920928955078125e-7));
    BlockScore s{};
    s.lanes = lanes;
    s.mean = reinterpret_cast<const float*>(at(t_.mean, 0, set.b, set.kv, 0));
    s.radius = balls ? reinterpret_cast<const float*>(at(t_.radius, 0, set.b, set.kv, 0)) : nullptr;
    s.addend = head.addend;
    s.d = d;
    s.q = w.q.get();
    s.reach = reach;
    s.scale = t_.scale;
    s.softcap = t_.softcap;
    s.out = w.estimate.get();
    k_.score_blocks(s);
    return LOG2E;
  }
  bool is_early[LANE_ROWS], some_early, all_early;
  early_rows(set, head, is_early, some_early, all_early);
  if (!all_early) {
    float factor[LANE_ROWS];
    const float* a = reinterpret_cast<const float*>(at(t_.channel_scale, 0, set.b, set.kv, 0));
    const bool integers = t_.round_queries && integers_fit(), grouped = two_levels && head.group_mean && !some_early;
    float step[LANE_ROWS];
    k_.prepare_lanes(t_.q, set.b, set.head, set.query, set.rows, a, t_.round_queries, d, wide,
                     integers && !grouped ? nullptr : w.q.get(),
                     integers ? w.q_codes.get() : nullptr, factor, nullptr);
    std::copy_n(factor, LANE_ROWS, step);
    // codes are twice the levels, but where eight bits are multiplied as integers
    for (float& x : factor) x *= t_.scale * ((integers && t_.bits == 8 ? 1.0f : 0.5f) * LOG2E);
    float half[LANE_ROWS];
    KeyScore s = keys_of(set, head, lanes, factor, w);
    s.q_codes = integers ? w.q_codes.get() : nullptr;
    s.half = half;
    if (integers && t_.bits == 8) halve(w.q_codes.get(), half);
    if (grouped) {
      score_near(s, head, step, w);
      return 1.0f;
    }
    k_.score_keys(s);
  }
  w.scored += last - first;
  if (some_early) {
    plain_queries(set, w, nullptr);
    score_keys_themselves(set, lanes, w, all_early ? w.estimate.get() : w.other.get());
    if (!all_early)
      for (int64_t n = 0; n < last - first; ++n)
        for (int i = 0; i < LANE_ROWS; ++i)
          if (is_early[i]) w.estimate[n * LANE_ROWS + i] = w.other[n * LANE_ROWS + i];
  }
  return 1.0f;
}

}  // namespace sieve
