// The upper of two levels: balls about groups of blocks tell which blocks can matter to sixteen rows. What is passed over weighs
// so little that it changes no share beyond the rounding of estimates, and could not have been kept.
#include <algorithm>
#include <cmath>
#include <limits>

#include "gate_rows.h"

namespace sieve {

namespace {

constexpr float LN2 = 0.69314718f, INFINITE = std::numeric_limits<float>::infinity();
constexpr float HOT = 3.0f;  // natural units below the best centre: groups that say what a row's mass is at least
constexpr int64_t FEWEST_GROUPS = 16;  // fewer are scored at once

// Whether some row has a number above its level.
bool any_above(const float* x, const float* level) {
  bool any = false;
  for (int i = 0; i < LANE_ROWS; ++i) any |= x[i] > level[i];
  return any;
}

}  // namespace

// Means and radii of the decoded keys of groups first..last-1, channels divided by half their scale.
void GateRows::group_keys(const Head& head, int64_t first, int64_t last, float* mean, float* radius, float* addend) const {
  const int64_t size = GROUP * t_.block_size;
  std::vector<float> row(d_);
  for (int64_t g = first; g < last; ++g) {
    float* centre = mean + g * d_;
    const int64_t from = g * size, to = std::min(kv_len_, from + size);
    const auto decode = [&](int64_t j) {
      const int8_t* code = head.codes + j * wide_;
      const float step = head.step[j];
      for (int64_t c = 0; c < d_; ++c) row[c] = step * static_cast<float>(twice_level(k_.plain_codes, code[c], t_.bits));
    };
    std::fill_n(centre, d_, 0.0f);
    for (int64_t j = from; j < to; ++j) {
      decode(j);
      for (int64_t c = 0; c < d_; ++c) centre[c] += row[c];
    }
    for (int64_t c = 0; c < d_; ++c) centre[c] /= static_cast<float>(to - from);
    double most = 0;
    for (int64_t j = from; j < to; ++j) {
      decode(j);
      float square = 0;
      for (int64_t c = 0; c < d_; ++c) square += (row[c] - centre[c]) * (row[c] - centre[c]);
      if (!(square <= most)) most = square;
    }
    radius[g] = static_cast<float>(std::sqrt(most) * (1 + 1e-4));
    addend[g] = std::log(static_cast<float>(to - from)) + 1e-3f;
  }
}

// The largest share of a row's mass that a group may have and still be passed over.
double GateRows::far_share() const {
  const double groups = static_cast<double>((blocks_ + GROUP - 1) / GROUP);
  // estimates err by as much
  double share = 0x1p-13 / groups;
  // and all that is passed over must lie behind the mass that is asked for
  if (t_.rule == KEEP_MASS) share = std::min(share, (1 - t_.level) / 2 / static_cast<double>(blocks_));
  return share;
}

// As score_keys, but blocks of which no row can need anything get -inf. `q`: the rows' queries [d][16] in w.q, `step` what their
// numbers stand for.
void GateRows::score_near(const KeyScore& s, const Head& head, const float* step, RowSpace& w) const {
  const Lanes& lanes = s.lanes;
  const int64_t size = GROUP * t_.block_size;
  const int64_t from = (lanes.all_low + size - 1) / size, to = std::min(lanes.all_high, kv_len_) / size;
  if (to - from < FEWEST_GROUPS) {
    w.scored += lanes.last - lanes.first;
    k_.score_keys(s);
    return;
  }
  float squares[LANE_ROWS] = {}, unit[LANE_ROWS], reach[LANE_ROWS], top[LANE_ROWS], level[LANE_ROWS];
  for (int i = 0; i < LANE_ROWS; ++i) unit[i] = 0.5f * t_.scale * step[i];
  float* q = w.exact.get();
  for (int64_t c = 0; c < d_; ++c)
    for (int i = 0; i < LANE_ROWS; ++i) {
      const float x = w.q[c * LANE_ROWS + i] * unit[i];
      q[c * LANE_ROWS + i] = x;
      squares[i] += x * x;
    }
  for (int i = 0; i < LANE_ROWS; ++i) reach[i] = std::sqrt(squares[i]) * (1 + 1e-4f);
  BlockScore groups{};
  groups.lanes = lanes;
  groups.lanes.block_size = size;
  groups.lanes.first = from;
  groups.lanes.last = to;
  groups.mean = head.group_mean;
  groups.radius = head.group_radius;
  groups.addend = head.group_addend;
  groups.d = static_cast<int32_t>(d_);
  groups.q = q;
  groups.reach = reach;
  groups.scale = 1.0f;
  groups.softcap = t_.softcap;
  groups.out = w.far.get();
  k_.score_blocks(groups);
  const float* bound = w.far.get();
  std::fill_n(top, LANE_ROWS, -INFINITE);
  // a group's mass is at least that of so many keys at its centre, if there is no cap; wide balls say nothing
  const auto least = [&](int64_t g, int i) { return bound[g * LANE_ROWS + i] - reach[i] * head.group_radius[from + g]; };
  for (int64_t g = 0; g < to - from; ++g)
    for (int i = 0; i < LANE_ROWS; ++i) top[i] = std::max(top[i], least(g, i));
  for (int i = 0; i < LANE_ROWS; ++i) level[i] = top[i] - HOT;

  std::fill_n(w.estimate.get(), (lanes.last - lanes.first) * LANE_ROWS, -INFINITE);
  double mass[LANE_ROWS];
  std::fill_n(mass, LANE_ROWS, -1e300);
  const auto run = [&](int64_t first, int64_t last) {
    if (first >= last) return;
    KeyScore part = s;
    part.lanes.first = first;
    part.lanes.last = last;
    part.out = s.out + (first - lanes.first) * LANE_ROWS;
    k_.score_keys(part);
    w.scored += last - first;
    float found[LANE_ROWS];
    k_.row_mass(part.out, last - first, LANE_ROWS, found);
    for (int i = 0; i < LANE_ROWS; ++i) {
      const double most = std::max<double>(mass[i], found[i]);
      if (found[i] > LOWEST) mass[i] = most + std::log2(std::exp2(mass[i] - most) + std::exp2(found[i] - most));
    }
  };
  const auto runs = [&](uint8_t mark) {
    for (int64_t g = from; g < to;) {
      int64_t end = g;
      while (end < to && w.open[end - from] == mark) ++end;
      run(g * GROUP, end * GROUP);
      g = std::max(end, g + 1);
    }
  };
  run(lanes.first, from * GROUP);
  run(to * GROUP, lanes.last);
  for (int64_t g = 0; g < to - from; ++g) {
    uint8_t hot = 0;
    for (int i = 0; i < LANE_ROWS; ++i) hot |= least(g, i) > level[i];
    w.open[g] = hot;
  }
  runs(1);
  const double share = std::log2(far_share());
  for (int i = 0; i < LANE_ROWS; ++i) level[i] = static_cast<float>((mass[i] + share) * LN2);
  for (int64_t g = 0; g < to - from; ++g)
    if (!w.open[g] && any_above(bound + g * LANE_ROWS, level)) w.open[g] = 2;
  runs(2);
}

}  // namespace sieve
