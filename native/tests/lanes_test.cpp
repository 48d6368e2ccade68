// Kernels of the gate of a prefill: estimates of blocks for sixteen queries at a time, and what selectors make of them.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "kernels.h"
#include "level.h"
#include "summary.h"

using namespace sieve;

namespace {

#if defined(__SANITIZE_THREAD__)
constexpr int CASES = 10;
#else
constexpr int CASES = 40;
#endif

constexpr double LOG2E = 1.4426950408889634;

// Sixteen intervals over blocks of keys, with or without masked keys.
struct Rows {
  Lanes lanes{};
  std::vector<uint8_t> part;
  std::vector<int32_t> before;
  Rows(Random& random, int64_t kv_len, int64_t size) {
    lanes.kv_len = kv_len;
    lanes.block_size = size;
    lanes.all_high = kv_len;
    const bool whole = random.chance(0.3), causal = random.chance(0.4);
    const int64_t position = random.below(kv_len);
    for (int i = 0; i < LANE_ROWS; ++i) {
      lanes.low[i] = whole || causal || random.chance(0.4) ? 0 : random.between(0, kv_len);
      lanes.high[i] = causal ? std::min(kv_len, position + i + 1)
                      : whole || random.chance(0.4) ? kv_len : random.between(lanes.low[i], kv_len);
      lanes.all_low = std::max(lanes.all_low, lanes.low[i]);
      lanes.all_high = std::min(lanes.all_high, lanes.high[i]);
    }
    const int64_t blocks = (kv_len + size - 1) / size;
    lanes.first = random.below(blocks);
    lanes.last = random.between(lanes.first + 1, blocks);
    if (random.chance(0.6)) return;
    for (int64_t j = 0; j < kv_len; ++j) part.push_back(j && random.chance(0.8) ? part.back() : random.chance(0.6));
    before.assign(kv_len + 1, 0);
    for (int64_t j = 0; j < kv_len; ++j) before[j + 1] = before[j] + part[j];
    lanes.part = part.data();
    lanes.part_before = before.data();
  }
  bool sees(int i, int64_t j) const { return lanes.low[i] <= j && j < lanes.high[i] && (part.empty() || part[j]); }
};

}  // namespace

TEST(planes_expand_to_codes_and_scales_to_steps) {
  each_level([](const std::string& level) {
    for (int n = 0; n < 80; ++n) {
      Random random(n + 1);
      const int32_t d = static_cast<int32_t>(random.between(1, 140)), wide = static_cast<int32_t>(up(d, 64)), bits = 1 + n % 8;
      const int64_t keys = random.between(1, 40), bytes = (d + 7) / 8;
      note(level + ", case " + std::to_string(n));
      Array planes = make(random, U8, {1, 1, bits, keys * bytes}, random.chance(0.5) ? CONTIGUOUS : PADDED);
      for (int32_t p = 0; p < bits; ++p)
        for (int64_t i = 0; i < keys * bytes; ++i) entry<uint8_t>(planes, 0, 0, p, i) = static_cast<uint8_t>(random.next());
      const Row<int8_t> codes(keys * wide);
      const Row<int32_t> origin(keys);
      const Row<float> step(keys), shift(keys);
      Array halves = make(random, F16, {1, 1, 1, keys}, CONTIGUOUS);
      fill(random, halves);
      kernels().expand_codes(reinterpret_cast<uint8_t*>(planes.view.data), planes.view.stride[2], 8, bits, keys, d, wide, codes.get(),
                             origin.get());
      kernels().read_steps(reinterpret_cast<uint16_t*>(halves.view.data), keys, 4.0f, step.get(), shift.get());
      for (int64_t j = 0; j < keys; ++j) {
        int32_t sum = 0;
        for (int32_t c = 0; c < wide; ++c) {
          int code = 0;
          for (int32_t p = 0; p < bits && c < d; ++p) code = 2 * code + ((entry<uint8_t>(planes, 0, 0, p, j * bytes + c / 8) >> (7 - c % 8)) & 1);
          const int8_t got = codes[j * wide + c];
          CHECK(c >= d ? got == 0 : twice_level(kernels().plain_codes, got, bits) == 2 * code - ((1 << bits) - 1));
          sum += got;
        }
        const float magic = 12582912.0f;  // 1.5 * 2^23
        int32_t above;
        std::memcpy(&above, &magic, 4);
        if (!kernels().plain_codes) CHECK(origin[j] == above - 128 * sum);
        CHECK(step[j] == 4 * halves.get(0, 0, 0, j) && shift[j] == -magic * step[j]);
      }
    }
  });
}

TEST(lanes_hold_their_queries) {
  each_level([](const std::string& level) {
    for (int n = 0; n < 80; ++n) {
      Random random(n + 1);
      const int64_t d = random.between(1, 140), wide = up(d, 64);
      const int rows = static_cast<int>(random.between(1, LANE_ROWS));
      const bool stretch = random.chance(0.7), round = stretch && random.chance(0.6);
      note(level + ", case " + std::to_string(n));
      Array q = make(random, static_cast<DType>(n % 3), {2, 3, 20, d}, static_cast<Layout>(random.below(LAYOUTS)));
      fill(random, q);
      int64_t head[LANE_ROWS], query[LANE_ROWS];
      for (int i = 0; i < rows; ++i) {
        head[i] = random.below(3);
        query[i] = random.below(20);
      }
      if (random.chance(0.3)) q.set(1, head[0], query[0], random.below(d), random.chance(0.5) ? NAN : INFINITY);
      const Row<float> a(d), panel(wide * LANE_ROWS), step(LANE_ROWS), norm(LANE_ROWS);
      const Row<int8_t> codes(wide * LANE_ROWS);
      for (int64_t c = 0; c < d; ++c) a[c] = static_cast<float>(random.uniform() + 0.1);
      kernels().prepare_lanes(q.view, 1, head, query, rows, stretch ? a.get() : nullptr, round, static_cast<int32_t>(d),
                              static_cast<int32_t>(wide), panel.get(), round ? codes.get() : nullptr, step.get(), norm.get());
      for (int i = 0; i < LANE_ROWS; ++i) {
        const int r = std::min(i, rows - 1);
        float most = 0;
        double square = 0;
        bool number = true;
        for (int64_t c = 0; c < d; ++c) {
          const double x = q.get(1, head[r], query[r], c);
          number &= std::isfinite(x);
          square += x * x;
          most = std::max(most, std::fabs(static_cast<float>(x) * (stretch ? a[c] : 1.0f)));
        }
        CHECK(number ? std::fabs(norm[i] - std::sqrt(square)) <= 1e-5 * std::sqrt(square) : !std::isfinite(norm[i]));
        if (stretch && !number) {
          CHECK(std::isnan(step[i]));
          continue;
        }
        const float unit = round ? std::max(most, 1e-30f) / 127.0f : 1.0f;
        CHECK(step[i] == unit);
        for (int64_t c = 0; c < d && number; ++c) {
          const float x = static_cast<float>(q.get(1, head[r], query[r], c)) * (stretch ? a[c] : 1.0f);
          CHECK(panel[c * LANE_ROWS + i] == (round ? std::floor(x / unit + 0.5f) : x));
        }
        for (int64_t c = 0; c < wide && round; ++c)
          CHECK(codes[c / 4 * 4 * LANE_ROWS + i * 4 + c % 4] == (c < d ? panel[c * LANE_ROWS + i] : 0.0f));
      }
    }
  });
}

// Codes as floats and, where the level has them, as integers; or the keys themselves, with keys that are no numbers.
TEST(scores_of_keys_are_their_sums) {
  each_level([](const std::string& level) {
    const Kernels& k = kernels();
    for (int n = 0; n < 6 * CASES; ++n) {
      Random random(n + 1);
      const int64_t sizes[] = {1, 3, 4, 16, 24, 32, 40, 64, 100}, size = sizes[random.below(9)], kv_len = random.between(1, 210);
      const int32_t d = static_cast<int32_t>(random.between(1, 130)), wide = static_cast<int32_t>(up(d, 64)), bits = 1 + n % 8;
      const bool themselves = n % 5 == 0;
      const int64_t largest = bits == 8 ? 128 : (1 << bits) - 1;
      const bool integers = !themselves && n % 3 && bits <= k.integer_bits && largest * 127 * d < (int64_t{1} << 22);
      const bool halves = integers && bits == 8;
      const Rows rows(random, kv_len, size);
      note(level + ", case " + std::to_string(n) + ": keys " + std::to_string(kv_len) + " by " + std::to_string(size) + ", d " +
           std::to_string(d) + ", bits " + std::to_string(bits) + (integers ? ", integers" : "") + (themselves ? ", keys" : ""));
      Array key = make(random, static_cast<DType>(n % 3), {1, 1, kv_len, d}, static_cast<Layout>(random.below(LAYOUTS)));
      fill(random, key);
      if (random.chance(0.3)) key.set(0, 0, random.below(kv_len), random.below(d), NAN);
      const Row<int8_t> codes((up(kv_len, 32) + 32) * wide), q_codes(wide * LANE_ROWS);
      const Row<int32_t> origin(up(kv_len, 32) + 32);
      const Row<float> step(up(kv_len, 16)), shift(up(kv_len, 16)), q(wide * LANE_ROWS), half(LANE_ROWS), factor(LANE_ROWS);
      const Row<float> out((rows.lanes.last - rows.lanes.first) * LANE_ROWS), scratch(up(k.key_score_scratch(size, wide), 16));
      std::memset(codes.get(), 0x7f, codes.size);
      std::memset(q.get(), 0, q.size * 4);
      std::memset(q_codes.get(), 0, q_codes.size);
      Array planes = make(random, U8, {1, 1, bits, kv_len * ((d + 7) / 8)}, CONTIGUOUS);
      for (int64_t i = 0; i < bits * planes.view.shape[3]; ++i) static_cast<uint8_t*>(planes.view.data)[i] = static_cast<uint8_t>(random.next());
      k.expand_codes(static_cast<uint8_t*>(planes.view.data), planes.view.stride[2], bits, bits, kv_len, d, wide, codes.get(), origin.get());
      const double spread = random.chance(0.2) ? 40.0 : 3.0;  // logits far apart need references of their own
      for (int64_t j = 0; j < kv_len; ++j) {
        step[j] = std::nearbyintf(static_cast<float>(random.uniform() * 1024 + 1)) / 1024.0f;
        if (spread > 3) step[j] *= j % 7 == 0 ? 1.0f : 0.125f;
        shift[j] = -12582912.0f * step[j];
      }
      for (int i = 0; i < LANE_ROWS; ++i) {
        float sum = 0;
        for (int32_t c = 0; c < d; ++c) {
          const int8_t whole = static_cast<int8_t>(random.between(-127, 127));
          q[c * LANE_ROWS + i] = themselves ? static_cast<float>(random.normal()) : whole;
          q_codes[c / 4 * 4 * LANE_ROWS + i * 4 + c % 4] = whole;
          sum += whole;
        }
        half[i] = 0.5f * sum;
        factor[i] = static_cast<float>(spread / std::sqrt(static_cast<double>(d)) * (themselves ? 1.0 : 1.0 / (70.0 * (1 << bits))));
        if (halves) factor[i] *= 2;
      }
      KeyScore s{};
      s.lanes = rows.lanes;
      s.codes = themselves ? nullptr : codes.get();
      s.bits = bits;
      s.key = &key.view;
      s.step = themselves ? nullptr : step.get();
      s.shift = shift.get();
      s.origin = origin.get();
      s.d = d;
      s.wide = wide;
      s.q_codes = integers ? q_codes.get() : nullptr;
      s.q = q.get();
      s.half = half.get();
      s.factor = factor.get();
      s.softcap = random.chance(0.3) ? 5.0f : 0.0f;
      s.out = out.get();
      s.scratch = scratch.get();
      k.score_keys(s);
      for (int64_t b = rows.lanes.first; b < rows.lanes.last; ++b)
        for (int i = 0; i < LANE_ROWS; ++i) {
          std::vector<double> x;
          for (int64_t j = b * size; j < std::min(kv_len, (b + 1) * size); ++j) {
            if (!rows.sees(i, j)) continue;
            double dot = 0;
            for (int32_t c = 0; c < d; ++c) {
              const double code = twice_level(k.plain_codes, codes[j * wide + c], bits);
              dot += q[c * LANE_ROWS + i] * (themselves ? key.get(0, 0, j, c) : code * step[j]);
            }
            if (halves) dot /= 2;
            dot *= factor[i];
            x.push_back(s.softcap != 0.0f ? s.softcap * std::tanh(dot / LOG2E / s.softcap) * LOG2E : dot);
          }
          const double sum = log_sum(x), exact = std::isnan(sum) ? LOWEST : sum, got = out[(b - rows.lanes.first) * LANE_ROWS + i];
          CHECK(std::isfinite(exact) && exact > LOWEST ? std::fabs(got - exact) <= 3e-4 + 1e-5 * std::fabs(exact) : got == exact);
        }
    }
  });
}

TEST(scores_of_means_are_their_products) {
  each_level([](const std::string& level) {
    for (int n = 0; n < 2 * CASES; ++n) {
      Random random(n + 1);
      const int64_t size = random.between(1, 30), kv_len = random.between(1, 300), blocks = (kv_len + size - 1) / size;
      const int32_t d = static_cast<int32_t>(random.between(1, 130));
      const Rows rows(random, kv_len, size);
      note(level + ", case " + std::to_string(n));
      const Row<float> mean(blocks * d), radius(blocks), addend(blocks), q(d * LANE_ROWS), reach(LANE_ROWS);
      const Row<float> out((rows.lanes.last - rows.lanes.first) * LANE_ROWS);
      for (const Row<float>* x : {&mean, &radius, &addend, &q, &reach})
        for (int64_t i = 0; i < x->size; ++i) (*x)[i] = static_cast<float>(random.normal());
      if (random.chance(0.2)) q[0] = NAN;
      const bool balls = random.chance(0.5), sums = random.chance(0.5);
      BlockScore s{rows.lanes, mean.get(), balls ? radius.get() : nullptr, sums ? addend.get() : nullptr, d, q.get(), reach.get(),
                   0.25f, random.chance(0.3) ? 3.0f : 0.0f, out.get()};
      kernels().score_blocks(s);
      for (int64_t b = rows.lanes.first; b < rows.lanes.last; ++b)
        for (int i = 0; i < LANE_ROWS; ++i) {
          const int64_t from = b * size, to = std::min(kv_len, from + size);
          bool some = false;
          for (int64_t j = from; j < to; ++j) some |= rows.sees(i, j);
          double x = 0;
          for (int32_t c = 0; c < d; ++c) x += static_cast<double>(mean[b * d + c]) * q[c * LANE_ROWS + i];
          x = 0.25 * x + (balls ? static_cast<double>(reach[i]) * radius[b] : 0.0);
          if (s.softcap != 0.0f) x = s.softcap * std::tanh(x / s.softcap);
          if (sums) x += addend[b];
          const double got = out[(b - rows.lanes.first) * LANE_ROWS + i];
          const bool cut = rows.lanes.low[i] > from || rows.lanes.high[i] < to;
          CHECK(!some ? got == -INFINITY : cut || std::isnan(x) ? got == LOWEST : std::fabs(got - x) <= 1e-5 * (1 + std::fabs(x)));
        }
    }
  });
}

TEST(marks_are_what_selectors_ask_for) {
  each_level([](const std::string& level) {
    const Kernels& k = kernels();
    for (int n = 0; n < 4 * CASES; ++n) {
      Random random(n + 1);
      const int64_t blocks = random.between(1, 70);
      const float unit = random.chance(0.5) ? 1.0f : static_cast<float>(LOG2E), margin = static_cast<float>(3 * random.uniform());
      const int lanes = static_cast<int>(random.between(1, LANE_ROWS));
      const float mass = static_cast<float>(random.uniform());
      note(level + ", case " + std::to_string(n) + ": blocks " + std::to_string(blocks));
      const Row<float> x(blocks * LANE_ROWS), share(blocks), top(blocks), weights(blocks * (LANE_ROWS + 1)), order(blocks);
      const Row<uint8_t> above(blocks), most(blocks), first(blocks);
      for (int64_t i = 0; i < x.size; ++i)
        x[i] = random.chance(0.1) ? -INFINITY : random.chance(0.05) ? LOWEST : std::nearbyintf(static_cast<float>(20 * random.normal())) / 4.0f;
      if (random.chance(0.3))
        for (int64_t b = 0; b < blocks; ++b) x[b * LANE_ROWS] = -INFINITY;
      for (int64_t b = 0; b < blocks; ++b)  // the last row fills the lanes that are left
        for (int i = lanes; i < LANE_ROWS; ++i) x[b * LANE_ROWS + i] = x[b * LANE_ROWS + lanes - 1];
      for (const Row<uint8_t>* m : {&above, &most, &first}) std::memset(m->get(), 0, blocks);
      std::fill_n(share.get(), blocks, -INFINITY);
      std::fill_n(top.get(), blocks, -INFINITY);
      k.largest_share(x.get(), blocks, unit, share.get());
      k.largest(x.get(), blocks, top.get());
      k.mark_above(x.get(), blocks, margin, above.get());
      k.mark_mass(x.get(), blocks, unit, mass, lanes, most.get(), weights.get());
      std::vector<double> best(LANE_ROWS, -INFINITY), all(LANE_ROWS, 0.0);
      for (int i = 0; i < LANE_ROWS; ++i) {
        for (int64_t b = 0; b < blocks; ++b) best[i] = std::max<double>(best[i], x[b * LANE_ROWS + i]);
        for (int64_t b = 0; b < blocks && best[i] > -INFINITY; ++b) all[i] += std::exp2((x[b * LANE_ROWS + i] - best[i]) * unit);
      }
      std::vector<int> needed(blocks, 0), allowed(blocks, 0);
      for (int64_t b = 0; b < blocks; ++b) {
        double shares = -INFINITY, largest = -INFINITY;
        bool near = false;
        for (int i = 0; i < LANE_ROWS; ++i) {
          const double y = x[b * LANE_ROWS + i];
          if (y == -INFINITY) continue;
          shares = std::max(shares, y - best[i] - std::log2(all[i]) / unit);
          largest = std::max(largest, y);
          near |= x[b * LANE_ROWS + i] >= static_cast<float>(best[i]) - margin;
          double ahead = 0;  // of equal blocks the earlier one is ahead
          for (int64_t m = 0; m < blocks; ++m) {
            const double z = x[m * LANE_ROWS + i];
            if (z > y || (z == y && m < b)) ahead += std::exp2((z - best[i]) * unit) / all[i];
          }
          needed[b] |= ahead < mass - 1e-3;
          allowed[b] |= ahead < mass + 1e-3;
        }
        CHECK(std::isfinite(shares) ? std::fabs(share[b] - shares) <= 5e-4 + 1e-5 * std::fabs(shares) : share[b] == shares);
        CHECK(top[b] == largest);
        CHECK((above[b] != 0) == near);
        order[b] = top[b];
      }
      for (int64_t b = 0; b < blocks; ++b) CHECK((most[b] || !needed[b]) && (allowed[b] || !most[b]));
      const int64_t wanted = random.between(1, blocks);
      std::vector<int64_t> rank(blocks);
      std::iota(rank.begin(), rank.end(), 0);
      std::stable_sort(rank.begin(), rank.end(), [&](int64_t a, int64_t b) { return top[a] > top[b]; });
      k.mark_largest(order.get(), blocks, wanted, first.get());
      for (int64_t e = 0; e < blocks; ++e) CHECK(first[rank[e]] == (e < wanted));
    }
  });
}
