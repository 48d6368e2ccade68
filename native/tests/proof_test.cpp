// Proofs of a prefill: brackets hold the true masses, streams stop where what is left is little, and every query keeps its promise.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <thread>

#include "choosing.h"
#include "kernels.h"
#include "level.h"

using namespace sieve;

namespace {

#if defined(__SANITIZE_THREAD__)
constexpr int CASES = 12;
#else
constexpr int CASES = 50;
#endif

constexpr double LOG2E = 1.4426950408889634, UNIT = 0x1p-24;

float outward(double x) { return static_cast<float>(x * (1 + 1e-6)); }

// Sixteen queries against the sketch of one head, with what prove.cpp works out for the brackets.
struct Brackets {
  int64_t len, d, size, blocks, wide;
  Array key, q;
  Summary summary;
  std::vector<uint8_t> part;
  std::vector<int32_t> before;
  Row<int8_t> codes, q_codes;
  Row<int32_t> origin;
  Row<float> step, shift, error, metric, length, spectral, metric_spectral, panel, plain, stretched, rest, factor, upper, lower, estimate,
      scratch;
  float scale;
  KeyProof proof{};

  static Array keys(Random& random) {
    const int64_t widths[] = {1, 8, 17, 32, 64, 70, 128};
    Array key = make(random, static_cast<DType>(random.below(3)), {1, 1, random.between(1, 150), widths[random.below(7)]}, CONTIGUOUS);
    const KeyKind kinds[] = {GAUSSIAN, OUTLIERS, RUNS, EQUAL};
    fill_keys(random, key, kinds[random.below(4)]);
    return key;
  }
  static int64_t block_size(Random& random) {
    const int64_t sizes[] = {1, 4, 16, 24, 33, 64};
    return sizes[random.below(6)];
  }

  explicit Brackets(Random& random)
      : key(keys(random)),
        summary(random, key.view, View{nullptr, F32, {}, {}}, block_size(random), static_cast<int>(random.between(1, 8)), true),
        codes(up(key.view.shape[2], 32) * up(key.view.shape[3], 64)), q_codes(up(key.view.shape[3], 64) * LANE_ROWS),
        origin(up(key.view.shape[2], 16)), step(origin.size), shift(origin.size), error(origin.size), metric(origin.size),
        length(origin.size), spectral(summary.blocks), metric_spectral(summary.blocks), panel(up(key.view.shape[3], 64) * LANE_ROWS),
        plain(LANE_ROWS), stretched(LANE_ROWS), rest(LANE_ROWS), factor(LANE_ROWS), upper(summary.blocks * LANE_ROWS),
        lower(upper.size), estimate(upper.size),
        scratch(up(kernels().bracket_scratch(summary.size, static_cast<int32_t>(up(key.view.shape[3], 64))), 16)) {
    const Kernels& k = kernels();
    len = summary.kv_len;
    d = summary.d;
    size = summary.size;
    blocks = summary.blocks;
    wide = up(d, 64);
    scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(d)));
    build_geometry(summary.task);
    q = make(random, F32, {1, 1, LANE_ROWS, d}, CONTIGUOUS);
    fill(random, q, 2.0);
    for (int i = 0; i < LANE_ROWS; i += 2) {  // along the error of one key: its logit is as wrong as it can be
      const int64_t j = random.below(len);
      const bool metric = random.chance(0.5);
      const auto along = [&](int64_t c) {
        const double a = metric ? summary.channel_scale.get(0, 0, 0, c) : 1.0;
        return apart(j, c) / (a * a);
      };
      double square = 0;
      for (int64_t c = 0; c < d; ++c) square += apart(j, c) * along(c);
      const double far = (random.chance(0.5) ? 1 : -1) * 3 * random.uniform() / (scale * square);
      for (int64_t c = 0; c < d && square > 0; ++c) q.set(0, 0, i, c, far * along(c));
    }
    std::memset(codes.get(), 0x7f, codes.size);
    k.expand_codes(summary.task.planes, len * ((d + 7) / 8), summary.bits, summary.bits, len, static_cast<int32_t>(d),
                   static_cast<int32_t>(wide), codes.get(), origin.get());
    k.read_steps(summary.task.scale, len, 1.0f, step.get(), shift.get());
    k.read_steps(summary.task.error, len, 1.0f, error.get(), shift.get());
    k.read_steps(summary.task.metric_error, len, 1.0f, metric.get(), shift.get());
    for (int64_t j = 0; j < len; ++j) {
      double square = 0;
      for (int64_t c = 0; c < d; ++c) {
        const double x = summary.known(0, 0, j, c, summary.bits) / summary.channel_scale.get(0, 0, 0, c);
        square += x * x;
      }
      length[j] = outward(std::sqrt(square));
    }
    for (int64_t n = 0; n < blocks; ++n) {
      spectral[n] = std::sqrt(static_cast<float>(summary.spectral.get(0, 0, 0, n)));
      metric_spectral[n] = std::sqrt(static_cast<float>(summary.metric_spectral.get(0, 0, 0, n)));
    }
    proof.keys.lanes = lanes(random);
    proof.keys.codes = codes.get();
    proof.keys.bits = summary.bits;
    proof.keys.key = &key.view;
    proof.keys.step = step.get();
    proof.keys.shift = shift.get();
    proof.keys.origin = origin.get();
    proof.keys.d = static_cast<int32_t>(d);
    proof.keys.wide = static_cast<int32_t>(wide);
    proof.keys.q = panel.get();
    proof.keys.factor = factor.get();
    proof.keys.softcap = random.chance(0.25) ? 4.0f : 0.0f;
    proof.keys.out = estimate.get();
    proof.keys.scratch = scratch.get();
    proof.error = error.get();
    proof.metric_error = metric.get();
    proof.spectral = random.chance(0.7) ? spectral.get() : nullptr;
    proof.metric_spectral = proof.spectral ? metric_spectral.get() : nullptr;
    proof.key_norm = summary.task.key_norm;
    proof.plain = plain.get();
    proof.stretched = stretched.get();
    proof.rest = rest.get();
    proof.rounding = static_cast<float>(static_cast<double>(d + size + 16) * UNIT);
    proof.upper = upper.get();
    proof.lower = lower.get();
    ask(random.chance(0.5));
  }

  double apart(int64_t j, int64_t c) const { return key.get(0, 0, j, c) - summary.decoded(0, 0, j, c); }

  Lanes lanes(Random& random) {
    Lanes l{};
    l.kv_len = len;
    l.block_size = size;
    l.all_high = len;
    const bool whole = random.chance(0.4);
    for (int i = 0; i < LANE_ROWS; ++i) {
      l.low[i] = whole || random.chance(0.5) ? 0 : random.between(0, len);
      l.high[i] = whole || random.chance(0.5) ? len : random.between(l.low[i], len);
      l.all_low = std::max(l.all_low, l.low[i]);
      l.all_high = std::min(l.all_high, l.high[i]);
    }
    l.first = 0;
    l.last = blocks;
    if (random.chance(0.6)) return l;
    for (int64_t j = 0; j < len; ++j) part.push_back(random.chance(0.7));
    before.assign(len + 1, 0);
    for (int64_t j = 0; j < len; ++j) before[j + 1] = before[j] + part[j];
    l.part = part.data();
    l.part_before = before.data();
    return l;
  }

  // The queries as they are, or rounded to integers with what that loses.
  void ask(bool round) {
    int64_t head[LANE_ROWS] = {}, query[LANE_ROWS];
    std::iota(query, query + LANE_ROWS, 0);
    float unit[LANE_ROWS];
    kernels().prepare_lanes(q.view, 0, head, query, LANE_ROWS, summary.task.channel_scale, round, static_cast<int32_t>(d),
                            static_cast<int32_t>(wide), panel.get(), q_codes.get(), unit, nullptr);
    for (int i = 0; i < LANE_ROWS; ++i) {
      double norm = 0, metric_norm = 0, lost = 0;
      for (int64_t c = 0; c < d; ++c) {
        const double x = q.get(0, 0, i, c), y = x * summary.channel_scale.get(0, 0, 0, c);
        const double off = y - static_cast<double>(panel[c * LANE_ROWS + i]) * unit[i];
        norm += x * x;
        metric_norm += y * y;
        lost += off * off;
      }
      plain[i] = outward(scale * std::sqrt(norm));
      stretched[i] = outward(scale * std::sqrt(metric_norm));
      rest[i] = outward(scale * std::sqrt(lost));
      factor[i] = static_cast<float>(unit[i] * scale * 0.5 * LOG2E);
    }
    proof.length = round ? length.get() : nullptr;
  }

  bool sees(int i, int64_t j) const {
    return proof.keys.lanes.low[i] <= j && j < proof.keys.lanes.high[i] && (part.empty() || part[j]);
  }
  // Base-2 log mass of what row i sees of block n.
  double truth(int64_t n, int i) const {
    std::vector<double> x;
    for (int64_t j = n * size; j < std::min(len, (n + 1) * size); ++j) {
      if (!sees(i, j)) continue;
      double dot = 0;
      for (int64_t c = 0; c < d; ++c) dot += q.get(0, 0, i, c) * key.get(0, 0, j, c);
      dot *= scale;
      const double cap = proof.keys.softcap;
      x.push_back((cap != 0 ? cap * std::tanh(dot / cap) : dot) * LOG2E);
    }
    return log_sum(x);
  }
};

}  // namespace

TEST(brackets_of_blocks_hold_the_true_masses) {
  each_level([](const std::string& level) {
    double widest = 0, known = 0;
    for (int n = 0; n < 3 * CASES; ++n) {
      Random random(n + 1);
      Brackets x(random);
      note(level + ", case " + std::to_string(n) + ": keys " + std::to_string(x.len) + " by " + std::to_string(x.size) + ", d " +
           std::to_string(x.d) + ", bits " + std::to_string(x.summary.bits));
      kernels().bracket_keys(x.proof);
      for (int64_t b = 0; b < x.blocks; ++b)
        for (int i = 0; i < LANE_ROWS; ++i) {
          const double truth = x.truth(b, i), above = x.upper[b * LANE_ROWS + i], below = x.lower[b * LANE_ROWS + i];
          const double guess = x.estimate[b * LANE_ROWS + i];
          CHECK(below <= truth && truth <= above);
          if (truth == -INFINITY) CHECK(above == -INFINITY && guess == -INFINITY);
          CHECK(truth == -INFINITY || guess == LOWEST || (guess <= above + 1e-3 && guess >= below - 1e-3));
          if (x.summary.bits < 8 || i % 2 == 0 || truth == -INFINITY || x.proof.length) continue;
          widest += std::min(100.0, above - below);
          known += 1;
        }
      // the same from the largest errors of each block, about estimates with rounded queries
      x.ask(true);
      kernels().bracket_keys(x.proof);
      const Row<float> worst(x.blocks), worst_metric(x.blocks), worst_length(x.blocks);
      for (int64_t b = 0; b < x.blocks; ++b) {
        const int64_t from = b * x.size, to = std::min(x.len, from + x.size);
        worst[b] = *std::max_element(x.error.get() + from, x.error.get() + to);
        worst_metric[b] = *std::max_element(x.metric.get() + from, x.metric.get() + to);
        worst_length[b] = *std::max_element(x.length.get() + from, x.length.get() + to);
      }
      KeyProof wide = x.proof;
      wide.error = worst.get();
      wide.metric_error = worst_metric.get();
      wide.length = worst_length.get();
      kernels().widen(wide);
      for (int64_t b = 0; b < x.blocks; ++b)
        for (int i = 0; i < LANE_ROWS; ++i) {
          const double truth = x.truth(b, i);
          CHECK(x.lower[b * LANE_ROWS + i] <= truth && truth <= x.upper[b * LANE_ROWS + i]);
        }
    }
    CHECK(known > 0 && widest < 2 * known);
  });
}

TEST(streams_stop_where_the_rest_is_little) {
  each_level([](const std::string& level) {
    const Kernels& k = kernels();
    for (int n = 0; n < 4 * CASES; ++n) {
      Random random(n + 1);
      const int64_t blocks = random.between(1, 60);
      const int lanes = n % 3 ? static_cast<int>(random.between(1, LANE_ROWS)) : 1;
      const bool ties = random.chance(0.5);
      note(level + ", case " + std::to_string(n) + ": blocks " + std::to_string(blocks) + ", lanes " + std::to_string(lanes));
      const Row<float> upper(blocks * LANE_ROWS), lower(upper.size), estimate(upper.size), dropped(upper.size), kept(upper.size);
      const Row<int32_t> priority(upper.size), list(blocks);
      const Row<uint8_t> first(blocks), marks(blocks);
      for (int64_t b = 0; b < blocks; ++b) {
        first[b] = random.chance(0.1);
        marks[b] = 0;
        for (int i = 0; i < LANE_ROWS; ++i) {
          const int64_t at = b * LANE_ROWS + i;
          const float middle = std::nearbyintf(static_cast<float>(10 * random.normal())) / (n % 2 ? 2.0f : 1024.0f);
          upper[at] = random.chance(0.03) ? INFINITY : middle + 0.5f;
          lower[at] = random.chance(0.03) ? -INFINITY : middle - 0.5f;
          estimate[at] = middle;
          if (random.chance(0.1)) upper[at] = lower[at] = estimate[at] = -INFINITY;
          if (i < lanes) continue;  // the last row fills the lanes that are left
          for (const Row<float>* x : {&upper, &lower, &estimate}) (*x)[at] = (*x)[b * LANE_ROWS + lanes - 1];
        }
      }
      Proof p{};
      p.blocks = blocks;
      p.upper = upper.get();
      p.lower = lower.get();
      p.estimate = estimate.get();
      p.first = first.get();
      p.log_kappa = -3.0f;
      p.priority = priority.get();
      p.dropped = dropped.get();
      p.kept = kept.get();
      k.weigh(p);
      for (int i = 0; i < LANE_ROWS; ++i) {
        p.room[i] = random.chance(0.05) ? -1.0f : static_cast<float>(random.uniform());
        p.sink[i] = random.chance(0.3) ? static_cast<float>(4 * random.uniform()) : 0.0f;
        if (i >= lanes) {
          p.room[i] = p.room[lanes - 1];
          p.sink[i] = p.sink[lanes - 1];
        }
        double base = -INFINITY;
        for (int64_t b = 0; b < blocks; ++b)
          if (!first[b] && upper[b * LANE_ROWS + i] < INFINITY) base = std::max<double>(base, upper[b * LANE_ROWS + i]);
        CHECK(p.base[i] == (base == -INFINITY ? 0.0 : base));
        for (int64_t b = 0; b < blocks; ++b) {
          const int64_t at = b * LANE_ROWS + i;
          const bool seen = upper[at] > -INFINITY, before = first[b] || upper[at] == INFINITY;
          const double mass = std::exp2(std::min<double>(upper[at], 1e3) - p.base[i]), least = std::exp2(lower[at] - p.base[i]);
          CHECK(seen ? before ? priority[at] > 0x7f7fffff : priority[at] >= 0 && priority[at] <= 0x7f7fffff : priority[at] == -1);
          CHECK(seen && !before ? dropped[at] >= mass * (1 - 1e-6) && dropped[at] <= mass * (1 + 1e-6) + 1e-37 : dropped[at] == 0);
          CHECK(seen ? kept[at] <= least * (1 + 1e-6) && kept[at] >= least * (1 - 1e-6) - 1e-37 : kept[at] == 0);
          if (!seen || before) continue;
          const float weight = *reinterpret_cast<const float*>(&priority[at]);
          const double middle = std::exp2(std::min(std::max(estimate[at], lower[at]), upper[at]) - p.base[i]) / 8;
          CHECK(std::fabs(weight - mass - middle) <= 1e-6 * (mass + middle) + 1e-37);
        }
      }
      if (random.chance(0.5)) {  // what the keys themselves say is kept
        const int64_t from = random.below(blocks), to = random.between(from + 1, blocks);
        const Row<float> exact((to - from) * LANE_ROWS);
        std::vector<float> old(kept.get(), kept.get() + kept.size);
        for (int64_t i = 0; i < exact.size; ++i)
          exact[i] = i % LANE_ROWS >= lanes        ? exact[i / LANE_ROWS * LANE_ROWS + lanes - 1]
                     : random.chance(0.1) ? random.chance(0.5) ? LOWEST : -INFINITY
                                          : estimate[from * LANE_ROWS + i];
        k.weigh_kept(p, exact.get(), from, to);
        for (int64_t i = 0; i < exact.size; ++i) {
          const int64_t at = from * LANE_ROWS + i;
          const double mass = exact[i] > LOWEST ? std::exp2(exact[i] - p.base[at % LANE_ROWS]) : 0.0;
          CHECK(kept[at] >= old[at] && kept[at] >= mass * (1 - 3e-4) && kept[at] <= std::max<double>(old[at], mass));
        }
      }
      k.stop_streams(p, lanes, ties, marks.get(), list.get());
      for (int i = 0; i < lanes; ++i) {
        double rest = 0, have = p.sink[i];
        bool all = true;
        for (int64_t b = 0; b < blocks; ++b) {
          const int64_t at = b * LANE_ROWS + i;
          CHECK(marks[b] || priority[at] <= 0x7f7fffff);
          (marks[b] ? have : rest) += marks[b] ? kept[at] : dropped[at];
          all &= marks[b] || priority[at] < 0;
        }
        CHECK(all || rest <= p.room[i] * have * (1 + 1e-5));
      }
      if (lanes > 1) continue;
      // one row: greatest priorities first, of equal ones the earliest, and none too many
      std::vector<int64_t> order;
      for (int64_t b = 0; b < blocks; ++b)
        if (priority[b * LANE_ROWS] >= 0) order.push_back(b);
      std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return priority[a * LANE_ROWS] > priority[b * LANE_ROWS]; });
      size_t count = 0;
      while (count < order.size() && marks[order[count]]) ++count;
      for (size_t e = count; e < order.size(); ++e) CHECK(!marks[order[e]]);
      CHECK(count > 0 || order.empty());
      if (count < 2) continue;
      const int32_t last = priority[order[count - 1] * LANE_ROWS];
      size_t fewer = count - 1;  // without ties all of one priority are kept
      while (!ties && fewer > 0 && priority[order[fewer - 1] * LANE_ROWS] == last) --fewer;
      double rest = 0, have = p.sink[0];
      for (size_t e = 0; e < order.size(); ++e) (e < fewer ? have : rest) += e < fewer ? kept[order[e] * LANE_ROWS] : dropped[order[e] * LANE_ROWS];
      CHECK(fewer == 0 || last > 0x7f7fffff || rest > p.room[0] * have * (1 - 1e-5));
    }
  });
}

TEST(every_query_of_a_prefill_keeps_its_promise) {
  each_level([](const std::string& level) {
    int64_t dropped = 0;
    for (int n = 0; n < 3 * CASES; ++n) {
      Random random(n + 1);
      Choosing c(random, false, KEYS, PROVED, static_cast<DType>(random.below(3)));
      note(level + ", case " + std::to_string(n) + ": " + c.text);
      c.check(c.run(c.threads));
      dropped += c.dropped;
    }
    CHECK(dropped > 0);
  });
}

TEST(proofs_are_the_same_on_any_threads) {
  each_level([](const std::string& level) {
    for (int n = 0; n < 3; ++n) {
      Random random(n + 900);
      const Choosing c(random, false, KEYS, PROVED, BF16);
      note(level + ", case " + std::to_string(n) + ": " + c.text);
      const Choosing::Kept one = c.run(1);
      std::vector<Choosing::Kept> found(4);
      std::vector<std::thread> threads;
      for (int i = 0; i < 4; ++i) threads.emplace_back([&, i] { found[i] = c.run(1 + i % 3); });
      for (auto& t : threads) t.join();
      for (const Choosing::Kept& x : found) CHECK(x == one);
    }
  });
}
