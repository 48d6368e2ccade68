// What a choice of blocks must satisfy; see choosing.h.
#include <algorithm>
#include <thread>
#include <cmath>
#include <functional>

#include "choosing.h"

using namespace sieve;

static constexpr double LOWEST_ESTIMATE = -1e30;

// The keys that queries see, masks aside; each is one run.
void Choosing::find_intervals() {
  low_.assign(q_len, 0);
  high_.assign(q_len, 0);
  for (int64_t i = 0; i < q_len; ++i) {
    const int64_t position = kv_len - q_len + i;
    bool any = false;
    for (int64_t j = 0; j < kv_len; ++j) {
      bool sees = !(causal && j > position) && !(window >= 0 && (j <= position - window || j >= position + window));
      for (size_t e = 1; e < edges.size(); ++e) sees &= (i < edges[e]) == (j < edges[e]);
      if (!sees) continue;
      if (!any) low_[i] = j;
      high_[i] = j + 1;
      any = true;
    }
  }
}

// Whether the channel scale was measured on keys that this query must not know.
bool Choosing::early(int64_t b, int64_t i) const {
  if (decoding || by != KEYS) return false;
  int64_t known = 0, before = 0;
  for (int64_t n = 0; n < blocks; ++n) {
    for (int64_t j = n * size; j < std::min(kv_len, (n + 1) * size); ++j) known += takes_part(b, j);
    before += known < 64;
  }
  if (known < 64) return true;
  const int64_t end = (before + 1) * size, last = std::min(end, kv_len) - 1;
  return kv_len - q_len + i < end && !(low_[i] <= last && last < high_[i]);
}

// Natural log masses of all blocks for all queries, as the scorer estimates them and as they are.
void Choosing::estimate_all() {
  find_intervals();
  const Summary& s = *summary;
  const int64_t group = q_heads / kv_heads;
  const auto capped = [&](double x) { return softcap != 0.0f ? softcap * std::tanh(x / softcap) : x; };
  const auto log_sum = [](const std::vector<double>& x) {
    double top = -INFINITY, total = 0;
    for (const double y : x) {
      if (std::isnan(y)) return static_cast<double>(NAN);
      top = std::max(top, y);
    }
    if (!std::isfinite(top)) return top;
    for (const double y : x) total += std::exp(y - top);
    return top + std::log(total);
  };
  std::vector<double> real(kv_len * d), known(kv_len * d), exact(d), asked(d);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < q_heads; ++h) {
      const int64_t kv = h / group;
      if (h % group == 0)
        for (int64_t j = 0; j < kv_len; ++j)
          for (int64_t c = 0; c < d; ++c) {
            real[j * d + c] = key.get(b, kv, j, c);
            if (by == KEYS) known[j * d + c] = s.known(b, kv, j, c, bits);
          }
      for (int64_t i = 0; i < q_len; ++i) {
        const int64_t low = low_[i], high = high_[i];
        float most = 0;
        double norm = 0;
        bool number = true;
        for (int64_t c = 0; c < d; ++c) {
          exact[c] = asked[c] = q.get(b, h, i, c);
          norm += exact[c] * exact[c];
          number &= std::isfinite(exact[c]);
          if (by == KEYS) most = std::max(most, std::fabs(static_cast<float>(exact[c]) * static_cast<float>(s.channel_scale.get(0, b, kv, c))));
        }
        norm = std::sqrt(norm);
        const bool themselves = early(b, i);
        if (round && !themselves && number) {
          const float step = std::max(most, 1e-30f) / 127.0f;
          for (int64_t c = 0; c < d; ++c) {
            const float a = static_cast<float>(s.channel_scale.get(0, b, kv, c)), stretched = static_cast<float>(exact[c]) * a;
            asked[c] = std::floor(stretched / step + 0.5f) * static_cast<double>(step) / a;
          }
        }
        std::vector<double> estimate(blocks, -INFINITY), truth(blocks, -INFINITY);
        std::vector<int64_t> seen(blocks, 0);
        for (int64_t n = 0; n < blocks; ++n) {
          const int64_t from = n * size, to = std::min(kv_len, from + size);
          std::vector<double> guess, mass;
          for (int64_t j = std::max(from, low); j < std::min(to, high); ++j) {
            if (!takes_part(b, j)) continue;
            double x = 0, y = 0;
            for (int64_t c = 0; c < d; ++c) {
              x += exact[c] * real[j * d + c];
              y += asked[c] * (themselves ? real : known)[j * d + c];
            }
            mass.push_back(capped(scale * x));
            guess.push_back(number ? capped(scale * y) : NAN);
          }
          seen[n] = static_cast<int64_t>(mass.size());
          if (!seen[n]) continue;
          truth[n] = log_sum(mass);
          double x = by == KEYS ? log_sum(guess) : 0;
          if (by != KEYS) {
            double dot = 0;
            for (int64_t c = 0; c < d; ++c) dot += exact[c] * s.mean.get(b, kv, n, c);
            if (by == BALLS) dot += norm * s.radius.get(0, b, kv, n);
            x = capped(scale * dot) + (by == MEANS ? std::log(static_cast<double>(entry<int32_t>(s.count, 0, b, kv, n))) : 0.0);
            if (low > from || high < to) x = LOWEST_ESTIMATE;
          }
          estimate[n] = std::isnan(x) ? LOWEST_ESTIMATE : std::max(x, LOWEST_ESTIMATE);
        }
        estimate_.push_back(estimate);
        truth_.push_back(truth);
        seen_.push_back(seen);
      }
    }
}

Choosing::Unit Choosing::unit(int64_t b, int64_t h, int64_t t) const {
  const int64_t group = q_heads / kv_heads, each = by_tile ? group : 1;
  Unit u{b, by_tile ? h : h / group, std::max<int64_t>(0, t * tile - lead), std::min(q_len, (t + 1) * tile - lead), {}, {}, {}, {}, {}, {}};
  u.seen.assign(blocks, 0);
  for (auto* x : {&u.forced, &u.needed, &u.allowed}) x->assign(blocks, false);
  for (int64_t g = h * each; g < (h + 1) * each; ++g)
    for (int64_t i = u.first; i < u.last; ++i) {
      const int64_t lane = (i + lead) % tile;
      u.row.push_back((b * q_heads + g) * q_len + i);
      u.looked.push_back(lane % stride == stride - 1 || lane == tile - 1 || i == q_len - 1);
      for (int64_t n = 0; n < blocks; ++n) u.seen[n] = std::max(u.seen[n], seen_[u.row.back()][n]);
    }
  for (int64_t n = 0; n < blocks; ++n) {
    const int64_t from = n * size, to = std::min(kv_len, from + size);
    bool some = false, every = true, wanted = false;
    for (int64_t i = u.first; i < u.last; ++i) {
      const int64_t low = low_[i], high = high_[i];
      const int64_t position = kv_len - q_len + i;
      for (int64_t j = from; j < to; ++j) {
        const bool sees = low <= j && j < high;
        some |= sees;
        every &= sees;
        wanted |= sees && (j < sinks || (near && std::abs(j - position) < near));
      }
    }
    u.forced[n] = u.seen[n] > 0 && ((some && !every) || wanted || !summary->finite.get(0, b, u.kv, n));
  }
  return u;
}

// What the rule needs, and what it allows, where estimates may err a little.
void Choosing::judge(Unit& u) const {
  const auto near_to = [](double x) { return 1e-3 + 1e-5 * std::fabs(x); };
  const bool ranks = rule == COUNT || rule == SHARE;
  std::vector<double> best(blocks, -INFINITY);
  for (size_t r = 0; r < u.row.size(); ++r) {
    const std::vector<double>& x = estimate_[u.row[r]];
    double top = -INFINITY, total = 0;
    for (const double y : x) top = std::max(top, y);
    if (top == -INFINITY || (!u.looked[r] && rule != OVER && rule != CLOSE)) continue;
    for (const double y : x) total += std::exp(y - top);
    std::vector<double> falling(x), before{0.0};  // and the mass before each
    std::sort(falling.rbegin(), falling.rend());
    for (const double y : falling) before.push_back(before.back() + std::exp(y - top) / total);
    for (int64_t n = 0; n < blocks; ++n) {
      if (x[n] == -INFINITY) continue;
      const double apart = near_to(x[n]);
      if (ranks) best[n] = std::max(best[n], x[n] - static_cast<float>(top + std::log(total)));  // of a query that is no number: 0
      if (rule == OVER || rule == CLOSE) {
        const double limit = rule == OVER ? level : top - level;
        u.needed[n] = u.needed[n] || x[n] > limit + apart || level == -INFINITY;
        u.allowed[n] = u.allowed[n] || x[n] >= limit - apart;
      }
      if (rule == HALF) {
        const auto more = [&](double y) {  // the mass of blocks above y
          return before[std::lower_bound(falling.begin(), falling.end(), y, std::greater<double>()) - falling.begin()];
        };
        const double ahead = more(x[n] + apart), perhaps = more(x[n] - apart) - std::exp(x[n] - top) / total;
        const bool number = top > LOWEST_ESTIMATE;  // else every block has the whole mass in fp32
        u.needed[n] = u.needed[n] || (number && perhaps < level - 1e-3);
        u.allowed[n] = u.allowed[n] || ahead < level + 1e-3;
      }
    }
  }
  if (rule == HALF && level == 1.0) u.needed = u.allowed = std::vector<bool>(blocks, true);
  if (!ranks) return;
  std::vector<double> order;
  for (int64_t n = 0; n < blocks; ++n)
    if (u.seen[n]) order.push_back(best[n] = std::max(best[n], LOWEST_ESTIMATE));
  const int64_t there = static_cast<int64_t>(order.size());
  u.most = std::min(there, rule == COUNT ? static_cast<int64_t>(level)
                                         : std::max<int64_t>(1, std::llrint(static_cast<double>(there) * (1.0 - level))));
  if (!there) return;
  std::sort(order.rbegin(), order.rend());
  const double last = order[u.most - 1], apart = near_to(last);
  for (int64_t n = 0; n < blocks; ++n) {
    u.needed[n] = u.seen[n] && best[n] > last + apart;
    u.allowed[n] = u.seen[n] && best[n] >= last - apart;
  }
}

void Choosing::check(const Kept& got) {
  if (estimate_.empty()) estimate_all();
  CHECK(static_cast<int64_t>(got.list.size()) == batch * heads * tiles);
  for (int64_t item = 0; item < batch * heads * tiles; ++item) {
    Unit u = unit(item / tiles / heads, item / tiles % heads, item % tiles);
    judge(u);
    const std::vector<int32_t>& list = got.list[item];
    std::vector<bool> kept(blocks, false);
    int64_t keys = 0, every = 0, some = 0, most = 0, unforced = 0;
    for (size_t e = 0; e < list.size(); ++e) {
      CHECK(list[e] >= 0 && list[e] < blocks && (e == 0 || list[e] > list[e - 1]));
      CHECK(u.seen[list[e]] > 0);
      kept[list[e]] = true;
    }
    for (int64_t n = 0; n < blocks; ++n) {
      every += u.seen[n];
      keys += kept[n] ? u.seen[n] : 0;
      some += kept[n];
      most += u.allowed[n] || u.forced[n] ? u.seen[n] : 0;
      dropped += u.seen[n] && !kept[n];
      CHECK(kept[n] || !u.forced[n]);
    }
    CHECK(got.kept[item] == keys && got.visible[item] == every);
    const bool may_turn = (rule == HALF || rule == PROVED) && dense_above < 1.0, dense = got.dense[item] != 0;
    CHECK(!dense || (may_turn && keys == every));
    CHECK(!may_turn || dense || static_cast<double>(keys) <= dense_above * static_cast<double>(every) * (1 + 1e-6));
    for (const int64_t r : u.row) {  // nobody who sees something is left with nothing
      bool sees = false, has = false;
      for (int64_t n = 0; n < blocks; ++n) {
        sees |= seen_[r][n] > 0;
        has |= kept[n] && seen_[r][n] > 0;
      }
      CHECK(has || !sees);
    }
    if (rule == PROVED) {
      for (const int64_t r : u.row) {
        double top = sink.empty() ? -INFINITY : sink[r / q_len % q_heads], all = 0, lost = 0;
        bool some_number = false, number = true, whole = true;
        for (int64_t n = 0; n < blocks; ++n) {
          number &= !std::isnan(truth_[r][n]);
          some_number |= seen_[r][n] > 0 && !std::isnan(truth_[r][n]);
          whole &= kept[n] || !seen_[r][n];
          top = std::max(top, truth_[r][n]);
        }
        CHECK(some_number || whole);  // of a query that is no number nothing is proved
        if (!number || top == -INFINITY) continue;
        if (!sink.empty()) all += std::exp(sink[r / q_len % q_heads] - top);
        for (int64_t n = 0; n < blocks; ++n) {
          const double mass = std::exp(truth_[r][n] - top);
          all += mass;
          lost += kept[n] ? 0.0 : mass;
        }
        CHECK(lost <= level * all);
      }
      continue;
    }
    if (dense) {
      CHECK(static_cast<double>(most) > dense_above * static_cast<double>(every) * (1 - 1e-6));
      continue;
    }
    // what the rule does not allow is the best of a query of which nothing else was kept
    const auto remembered = [&](int64_t n) {
      for (const int64_t r : u.row) {
        bool other = false, best = seen_[r][n] > 0;
        for (int64_t m = 0; best && m < blocks; ++m) {
          other |= m != n && kept[m] && seen_[r][m] > 0 && (u.forced[m] || u.allowed[m]);
          best = estimate_[r][m] <= estimate_[r][n] + 1e-3 + 1e-5 * std::fabs(estimate_[r][n]);
        }
        if (best && !other) return true;
      }
      return false;
    };
    for (int64_t n = 0; n < blocks; ++n) {
      CHECK(kept[n] || !u.needed[n] || !u.seen[n]);
      if (!kept[n] || u.forced[n]) continue;
      CHECK(u.allowed[n] || remembered(n));
      unforced += u.allowed[n];
    }
    if (rule != COUNT && rule != SHARE) continue;
    for (int64_t n = 0; unforced > u.most && n < blocks; ++n) unforced -= kept[n] && !u.forced[n] && u.allowed[n] && remembered(n);
    CHECK(unforced <= u.most && some >= u.most);
  }
}

void Choosing::check_threads() const {
  const Kept one = run(1);
  std::vector<Kept> found(4);
  std::vector<std::thread> all;
  for (int i = 0; i < 4; ++i) all.emplace_back([&, i] { found[i] = run(1 + i % 3); });
  for (auto& t : all) t.join();
  for (const Kept& x : found) CHECK(x == one);
}

void check_equal_blocks(bool decoding, By by) {
  Random random(4);
  Choosing c(random, decoding, by, COUNT, F32);
  c.sinks = c.near = 0;
  c.window = -1;
  c.causal = false;
  c.edges.clear();
  c.mask = Array{};
  fill(random, c.q);
  fill_keys(random, c.key, EQUAL);
  // few digits, so that the mean of any number of equal keys is that key, without rounding
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t h = 0; h < c.kv_heads; ++h)
      for (int64_t j = 0; j < c.kv_len; ++j)
        for (int64_t i = 0; i < c.d; ++i) c.key.set(b, h, j, i, std::round(64 * c.key.get(b, h, j, i)) / 64);
  c.settle(random);
  for (const std::vector<int32_t>& list : c.run(2).list) {
    CHECK(static_cast<int64_t>(list.size()) == std::min(c.blocks, static_cast<int64_t>(c.level)));
    for (size_t e = 0; e < list.size(); ++e) CHECK(list[e] == static_cast<int32_t>(e));
  }
}
