// Which blocks each tile of queries keeps. What a tile sees is worked out from intervals; only scores touch blocks one by one.
#include "gate.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "gate_rows.h"
#include "level.h"
#include "parallel.h"

namespace sieve {

namespace {

constexpr int64_t CALIBRATION = 64;
constexpr int64_t EXPANDED_BYTES = int64_t{1} << 28;  // codes of the heads that are held at a time
constexpr int64_t FRAME_STEP = 64;                    // tiles whose intervals one thread works out at a time
constexpr int64_t GROUP_STEP = 64;                    // groups that one thread summarises at a time
constexpr int64_t EXPAND_STEP = 4096;                 // keys that one thread expands at a time
constexpr int64_t LONG = 1024, MANY_TILES = 8;        // blocks and tiles from which two levels are tried
constexpr double WORTH = 0.75;                        // and kept where they score less than so much of the keys
constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr float LOG2E = 1.44269504088896340736f;

template <class T>
const T* row_of(const View& x, int64_t b, int64_t h) {
  return reinterpret_cast<const T*>(at(x, 0, b, h, 0));
}

class Gate : GateRows {
 public:
  explicit Gate(const GateTask& t) : GateRows(t) {}
  Gated run();

 private:
  void choose(int64_t b, int64_t h, int64_t tile, const Head& head, RowSpace& w, Gated& out) const;
  void prepare_proof(int64_t b, int64_t kv, float* errors, int64_t padded, float* norms, Head& head) const;
  bool settles(int64_t b, int64_t kv, const float* balls, int64_t groups, Head& head, RowSpace& w, Gated& out) const;
  void largest_of_blocks(const float* errors, int64_t padded, float* norms) const;
  void measure(int64_t b, int64_t kv, int64_t from, int64_t n, const int8_t* codes, const float* step, float* errors, int64_t padded) const;

  std::vector<Frame> frames_;  // of the sequence at hand
};

int64_t wanted_blocks(const GateTask& t, int64_t visible) {
  if (t.rule == KEEP_COUNT) return std::min(visible, t.blocks);
  const double wanted = static_cast<double>(visible) * (1.0 - t.level), below = std::floor(wanted), rest = wanted - below;
  const bool odd = below - 2.0 * std::floor(below / 2.0) == 1.0;
  return std::max<int64_t>(static_cast<int64_t>(below) + (rest > 0.5 || (rest == 0.5 && odd)), 1);
}

void Gate::choose(int64_t b, int64_t h, int64_t tile, const Head& head, RowSpace& w, Gated& out) const {
  const Frame& f = frames_[tile];
  const Sequence& sequence = sequences_[b];
  const int64_t item = (b * t_.heads + h) * tiles_ + tile;
  const int64_t kv = t_.heads == kv_heads_ ? h : h / group_, heads = t_.heads == kv_heads_ ? group_ : 1;
  const int64_t first_head = t_.heads == kv_heads_ ? h * group_ : h;
  uint8_t* marks = w.marks.data();
  if (f.from < f.to) std::memset(marks + f.from, 0, f.to - f.from);

  int64_t every = 0, seen = 0;  // visible keys and blocks
  for (int64_t x : f.edge_weight) {
    every += x;
    seen += x > 0;
  }
  const int64_t whole_end = std::min(kv_len_, f.whole_to * t_.block_size);
  if (f.whole_to > f.whole_from) {
    every += keys_between(b, f.whole_from * t_.block_size, whole_end);
    seen += sequence.part.empty() ? f.whole_to - f.whole_from : sequence.there_before[f.whole_to] - sequence.there_before[f.whole_from];
  }
  // blocks of which nothing is visible are unmarked at the end
  auto unseen = [&](auto&& act) {
    for (size_t e = 0; e < f.edge.size(); ++e)
      if (f.edge_weight[e] == 0) act(f.edge[e]);
    if (!sequence.part.empty())
      for (int64_t n = f.whole_from; n < f.whole_to; ++n)
        if (sequence.there_before[n + 1] == sequence.there_before[n]) act(n);
  };
  const bool ranks = t_.rule == KEEP_COUNT || t_.rule == KEEP_SHARE;
  const bool every_query = t_.rule == ABOVE || t_.rule == NEAR_BEST;
  const int64_t wanted = ranks && seen ? std::min(seen, wanted_blocks(t_, seen)) : 0;
  const bool all = seen && (ranks ? wanted == seen
                            : t_.rule == KEEP_MASS ? t_.level == 1.0
                                                   : t_.rule == ABOVE && t_.level == -INFINITE);
  auto each_set = [&](auto&& looked, auto&& act) {
    RowSet set{b, kv, {}, {}, 0};
    for (int64_t g = first_head; g < first_head + heads; ++g)
      for (int64_t i = f.first; i < f.last; ++i) {
        if (!looked(i)) continue;
        set.head[set.rows] = g;
        set.query[set.rows++] = i;
        if (set.rows < LANE_ROWS) continue;
        act(set);
        set.rows = 0;
      }
    if (set.rows) act(set);
  };
  const int64_t asked = w.asked, scored = w.scored, passed = w.passed;
  std::vector<int32_t>& list = out.list[item];
  // Lists the blocks that are marked, and counts the keys of them that are visible.
  auto collect = [&] {
    list.clear();
    int64_t n = f.from, keys = 0;
    for (; n + 8 <= f.to; n += 8) {
      uint64_t eight;
      std::memcpy(&eight, marks + n, 8);
      if (!eight) continue;
      for (int64_t i = n; i < n + 8; ++i)
        if (marks[i]) list.push_back(static_cast<int32_t>(i));
    }
    for (; n < f.to; ++n)
      if (marks[n]) list.push_back(static_cast<int32_t>(n));
    for (int32_t block : list)
      if (block >= f.whole_from && block < f.whole_to) keys += weight(b, block);
    for (size_t e = 0; e < f.edge.size(); ++e)
      if (marks[f.edge[e]]) keys += f.edge_weight[e];
    return keys;
  };
  auto too_many = [&](int64_t keys) {
    return (t_.rule == KEEP_MASS || t_.rule == KEEP_PROVED) && t_.dense_above < 1.0 &&
           static_cast<float>(keys) > static_cast<float>(t_.dense_above) * static_cast<float>(every);
  };
  bool dense = false;
  // The rules that do not rank mark block after block: once all that rows see is marked, or enough for the tile to turn dense,
  // those rows have nothing to add. Where attention is spread over everything, the first rows decide for the tile.
  auto adds_nothing = [&](const Lanes& lanes) {
    if (ranks) return false;
    dense = dense || (t_.dense_above < 1.0 && too_many(collect()));
    return dense || !std::memchr(marks + lanes.first, 0, lanes.last - lanes.first);
  };
  auto unmarked_rows = [&](auto&& looked, auto&& act) {
    each_set(looked, [&](const RowSet& set) {
      const Lanes lanes = lanes_of(set, f);
      if (lanes.first == lanes.last) return;
      if (adds_nothing(lanes))
        w.passed += lanes.last - lanes.first;
      else
        act(set, lanes);
    });
  };
  auto scored_rows = [&](bool two_levels, auto&& looked, auto&& act) {
    unmarked_rows(looked, [&](const RowSet& set, const Lanes& lanes) {
      act(lanes.first, lanes.last, score(set, head, lanes, two_levels, w), set.rows);
    });
  };
  if (!ranks) {
    for (int64_t block : f.forced) marks[block] = 1;
    for (int32_t block : head.broken)
      if (block >= f.from && block < f.to) marks[block] = 1;
    unseen([&](int64_t n) { marks[n] = 1; });
  }

  if (all) {
    std::memset(marks + f.from, 1, f.to - f.from);
  } else if (seen && t_.rule == KEEP_PROVED) {
    unmarked_rows([](int64_t) { return true; }, [&](const RowSet& set, const Lanes& lanes) { prove(set, head, f, lanes, w); });
  } else if (seen) {
    float* best = w.best.get();
    const auto look = [&](bool two_levels) {
      std::fill(best + f.from, best + f.to, -INFINITE);
      scored_rows(
          two_levels,
          [&](int64_t i) {
            if (t_.stride == 1 || every_query) return true;
            const int64_t lane = (i + lead_) % t_.query_tile;
            return lane % t_.stride == t_.stride - 1 || lane == t_.query_tile - 1 || i == q_len_ - 1;
          },
          [&](int64_t first, int64_t last, float unit, int rows) {
            const float* x = w.estimate.get();
            if (ranks)
              k_.largest_share(x, last - first, unit, best + first);
            else if (t_.rule == ABOVE) {
              k_.largest(x, last - first, best + first);
              const float base = t_.scoring == BY_KEYS ? 0.693147180559945309417f : 1.0f, level = static_cast<float>(t_.level);
              for (int64_t n = first; n < last; ++n) marks[n] |= best[n] * base > level;
            } else if (t_.rule == NEAR_BEST)
              k_.mark_above(x, last - first, static_cast<float>(t_.level) * (LOG2E / unit), marks + first);
            else
              k_.mark_mass(x, last - first, unit, static_cast<float>(t_.level), rows, marks + first, w.weights.get());
          });
    };
    look(true);
    if (ranks && head.group_mean) {
      // what was passed over has smaller shares than this, so only more than this may be kept
      const float least = static_cast<float>(std::log2(far_share())) + 1e-3f;
      if (std::count_if(best + f.from, best + f.to, [&](float x) { return x > least; }) < wanted) {
        w.asked = asked;
        w.scored = scored;
        look(false);
      }
    }
    if (ranks) {
      // blocks that only queries between the strides see rank last, before the invisible ones
      for (int64_t n = f.from; n < f.to; ++n) best[n] = std::max(best[n], LOWEST);
      unseen([&](int64_t n) { best[n] = -INFINITE; });
      k_.mark_largest(best + f.from, f.to - f.from, wanted, marks + f.from);
    }
  }
  for (int64_t block : f.forced) marks[block] = 1;
  for (int32_t block : head.broken)
    if (block >= f.from && block < f.to) marks[block] = 1;
  unseen([&](int64_t n) { marks[n] = 0; });

  // nobody who sees something is left with nothing
  bool shared = false;
  for (int64_t n = f.whole_from; n < f.whole_to && !shared; ++n) shared = marks[n] != 0;
  if (seen && !shared) {
    std::vector<uint8_t> forgotten(f.last - f.first, 0);
    bool any = false;
    for (int64_t i = 0; i < f.last - f.first; ++i) {
      if (keys_between(b, f.low[i], f.high[i]) == 0) continue;
      bool has = false;
      for (int64_t n = f.low[i] / t_.block_size; !has && n * t_.block_size < f.high[i]; ++n)
        has = marks[n] && keys_between(b, std::max(n * t_.block_size, f.low[i]),
                                       std::min(std::min(kv_len_, (n + 1) * t_.block_size), f.high[i])) > 0;
      forgotten[i] = !has;
      any |= !has;
    }
    if (any)
      scored_rows(false, [&](int64_t i) { return forgotten[i - f.first] != 0; },
                  [&](int64_t first, int64_t last, float, int rows) {
                    for (int i = 0; i < rows; ++i) {
                      int64_t best = first;
                      for (int64_t n = first; n < last; ++n)
                        if (w.estimate[(n - first) * LANE_ROWS + i] > w.estimate[(best - first) * LANE_ROWS + i]) best = n;
                      marks[best] = 1;
                    }
                  });
  }

  list.reserve(std::min(seen, wanted + static_cast<int64_t>(f.forced.size())));
  int64_t kept = collect();
  dense = too_many(kept);
  if (dense) {
    kept = every;
    std::memset(marks + f.from, 1, f.to - f.from);
    unseen([&](int64_t n) { marks[n] = 0; });
    collect();
  }
  // of the keys that rows see, on average over the tile
  const int64_t rows = w.asked - asked + w.passed - passed;
  const double share = rows > 0 ? static_cast<double>(w.scored - scored) / static_cast<double>(rows) : 1.0;
  const bool multiplied = t_.scoring == BY_KEYS && !all;
  out.computed[item] = multiplied ? static_cast<int64_t>(static_cast<double>(every) * std::min(share, 1.0)) : 0;
  out.kept[item] = kept;
  out.visible[item] = every;
  out.dense[item] = dense;
}

// What brackets of this head read: `errors` holds three arrays of keys, `norms` five of blocks.
void Gate::prepare_proof(int64_t b, int64_t kv, float* errors, int64_t padded, float* norms, Head& head) const {
  head.error = errors;
  head.metric_error = errors + padded;
  head.length = errors + 2 * padded;
  head.worst_error = norms + 2 * blocks_;
  head.worst_metric = head.worst_error + blocks_;
  head.worst_length = head.worst_metric + blocks_;
  head.key_norm = row_of<float>(t_.key_norm, b, kv);
  if (!t_.spectral.data) return;
  head.spectral = norms;
  head.metric_spectral = norms + blocks_;
  for (int64_t n = 0; n < blocks_; ++n) {
    norms[n] = std::sqrt(row_of<float>(t_.spectral, b, kv)[n]);
    norms[blocks_ + n] = std::sqrt(row_of<float>(t_.metric_spectral, b, kv)[n]);
  }
}

// Errors and lengths of keys from..from+n-1, whose codes and steps are given.
void Gate::measure(int64_t b, int64_t kv, int64_t from, int64_t n, const int8_t* codes, const float* step, float* errors,
                   int64_t padded) const {
  float* unused = errors + 2 * padded + from;
  k_.read_steps(row_of<uint16_t>(t_.error, b, kv) + from, n, 1.0f, errors + from, unused);
  k_.read_steps(row_of<uint16_t>(t_.metric_error, b, kv) + from, n, 1.0f, errors + padded + from, unused);
  for (int64_t j = 0; j < n; ++j, codes += wide_) {
    int32_t squares = 0;  // of twice the levels
    for (int64_t c = 0; c < d_; ++c) {
      const int32_t twice = twice_level(k_.plain_codes, codes[c], t_.bits);
      squares += twice * twice;
    }
    errors[2 * padded + from + j] = static_cast<float>(0.5 * std::sqrt(static_cast<double>(squares)) * step[j] * (1 + 0x1p-12));
  }
}

void Gate::largest_of_blocks(const float* errors, int64_t padded, float* norms) const {
  for (int64_t e = 0; e < 3; ++e)
    for (int64_t n = 0; n < blocks_; ++n) {
      const float* x = errors + e * padded;
      norms[(2 + e) * blocks_ + n] = *std::max_element(x + n * t_.block_size, x + std::min(kv_len_, (n + 1) * t_.block_size));
    }
}

// Whether groups pay for this head: the last tile and one in the middle are chosen for to see. It takes none of the time of all.
bool Gate::settles(int64_t b, int64_t kv, const float* balls, int64_t groups, Head& head, RowSpace& w, Gated& out) const {
  if (!head.settled) return false;
  head.group_mean = balls;
  head.group_radius = balls + groups * d_;
  head.group_addend = balls + groups * (d_ + 1);
  w.asked = w.scored = w.passed = 0;
  for (int64_t tile : {tiles_ - 1, tiles_ / 2}) choose(b, kv * (t_.heads / kv_heads_), tile, head, w, out);
  return static_cast<double>(w.scored) < WORTH * static_cast<double>(w.asked);
}

Gated Gate::run() {
  Gated out;
  out.batch = batch_;
  out.heads = t_.heads;
  out.tiles = tiles_;
  const int64_t items = batch_ * t_.heads * tiles_;
  out.list.resize(items);
  out.kept.resize(items);
  out.visible.resize(items);
  out.computed.resize(items);
  out.dense.resize(items);

  const bool by_keys = t_.scoring == BY_KEYS, proves = t_.rule == KEEP_PROVED;
  const int64_t padded = up(kv_len_, 32) + 32;
  const int64_t at_once = std::clamp<int64_t>(EXPANDED_BYTES / (padded * (wide_ + 12)), 1, kv_heads_);
  Buffer<int8_t> codes(by_keys ? at_once * padded * wide_ : 0);
  Buffer<int32_t> origins(by_keys ? at_once * padded : 0);
  Buffer<float> steps(by_keys ? at_once * padded * 2 : 0), addends(t_.scoring == BY_MEANS ? at_once * blocks_ : 0);
  Buffer<float> errors(proves ? at_once * padded * 3 : 0), norms(proves ? at_once * blocks_ * 5 : 0);
  const bool tries_groups = by_keys && t_.key_mask.data == nullptr && blocks_ >= LONG && tiles_ >= MANY_TILES &&
                            (t_.rule == KEEP_COUNT || t_.rule == KEEP_SHARE || t_.rule == KEEP_MASS);
  const int64_t groups = (blocks_ + GROUP - 1) / GROUP;
  Buffer<float> balls(tries_groups ? at_once * groups * (d_ + 2) : 0);
  const int64_t choosers = t_.heads / kv_heads_;  // of one key head
  const int threads = static_cast<int>(std::min<int64_t>(std::max(t_.threads, 1), std::max<int64_t>(items, 1)));
  std::vector<RowSpace> spaces;
  for (int i = 0; i < threads; ++i) spaces.emplace_back(t_, blocks_, static_cast<int32_t>(wide_));
  std::vector<Head> known(at_once);
  const int64_t head_steps = (kv_heads_ + at_once - 1) / at_once;
  frames_.resize(tiles_);
  for (int64_t step = 0; step < batch_ * head_steps; ++step) {
    const int64_t b = step / head_steps, start = step % head_steps * at_once, heads = std::min(at_once, kv_heads_ - start);
    if (start == 0)
      parallel_for((tiles_ + FRAME_STEP - 1) / FRAME_STEP, t_.threads, [&](int64_t item, int) {
        for (int64_t tile = item * FRAME_STEP; tile < std::min(tiles_, (item + 1) * FRAME_STEP); ++tile) {
          frame(b, tile, frames_[tile]);
        }
      });
    const int64_t pieces = by_keys ? (kv_len_ + EXPAND_STEP - 1) / EXPAND_STEP : 1;
    for (int64_t i = 0; i < heads; ++i) {
      const int64_t kv = start + i;
      Head& head = known[i];
      head = Head{};
      const uint8_t* finite = row_of<uint8_t>(t_.finite, b, kv);
      const int32_t* count = row_of<int32_t>(t_.count, b, kv);
      for (int64_t n = 0; n < blocks_; ++n)
        if (!finite[n]) head.broken.push_back(static_cast<int32_t>(n));
      int64_t total = 0, before = 0;
      for (int64_t n = 0; n < blocks_; ++n) {
        total += count[n];
        before += total < CALIBRATION;
        if (total >= CALIBRATION) break;
      }
      head.settled = total >= CALIBRATION;
      head.calibrated = (before + 1) * t_.block_size;
      if (by_keys) {
        head.codes = codes.get() + i * padded * wide_;
        head.step = steps.get() + i * padded * 2;
        head.shift = head.step + padded;
        head.origin = origins.get() + i * padded;
      }
      if (proves) prepare_proof(b, kv, errors.get() + i * padded * 3, padded, norms.get() + i * blocks_ * 5, head);
      if (t_.scoring == BY_MEANS) {
        float* addend = addends.get() + i * blocks_;
        for (int64_t n = 0; n < blocks_; ++n) addend[n] = std::log(static_cast<float>(count[n]));
        head.addend = addend;
      }
    }
    if (by_keys)
      parallel_for(heads * pieces, t_.threads, [&](int64_t item, int) {
        const int64_t i = item / pieces, from = item % pieces * EXPAND_STEP, n = std::min(EXPAND_STEP, kv_len_ - from);
        const int64_t kv = start + i, bytes = (d_ + 7) / 8;
        k_.expand_codes(reinterpret_cast<const uint8_t*>(at(t_.planes, 0, b, kv, from * bytes)), t_.planes.stride[0], t_.sketch_bits,
                        t_.bits, n, static_cast<int32_t>(d_), static_cast<int32_t>(wide_), codes.get() + (i * padded + from) * wide_,
                        origins.get() + i * padded + from);
        float* step = steps.get() + i * padded * 2;
        k_.read_steps(row_of<uint16_t>(t_.key_scale, b, kv) + from, n, std::ldexp(1.0f, t_.sketch_bits - t_.bits), step + from,
                      step + padded + from);
        if (proves) measure(b, kv, from, n, codes.get() + (i * padded + from) * wide_, step + from, errors.get() + i * padded * 3, padded);
      });
    if (tries_groups) {
      parallel_for(heads * ((groups + GROUP_STEP - 1) / GROUP_STEP), t_.threads, [&](int64_t item, int) {
        const int64_t i = item % heads, from = item / heads * GROUP_STEP;
        float* mean = balls.get() + i * groups * (d_ + 2);
        group_keys(known[i], from, std::min(groups, from + GROUP_STEP), mean, mean + groups * d_, mean + groups * (d_ + 1));
      });
      parallel_for(heads, t_.threads, [&](int64_t i, int thread) {
        float* mean = balls.get() + i * groups * (d_ + 2);
        if (settles(b, start + i, mean, groups, known[i], spaces[thread], out)) return;
        known[i].group_mean = nullptr;
      });
    }
    for (int64_t i = 0; proves && i < heads; ++i) largest_of_blocks(errors.get() + i * padded * 3, padded, norms.get() + i * blocks_ * 5);
    parallel_for(heads * choosers * tiles_, t_.threads, [&](int64_t item, int thread) {
      const int64_t i = item / (choosers * tiles_), rest = item % (choosers * tiles_);
      const int64_t kv = start + i;
      // late tiles see most: they come first, so that threads end together
      choose(b, kv * choosers + rest / tiles_, tiles_ - 1 - rest % tiles_, known[i], spaces[thread], out);
    });
  }
  for (const auto& list : out.list) out.entries += static_cast<int64_t>(list.size());
  return out;
}

}  // namespace

Gated gate(const GateTask& task) {
  if (task.rule == KEEP_PROVED && !(task.planes.data && task.error.data && task.metric_error.data && task.key_norm.data))
    throw std::invalid_argument("a proof needs the sketch, its errors and the norms of the keys");
  return Gate(task).run();
}

}  // namespace sieve
