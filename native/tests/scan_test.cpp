// The gate of decoding: integer dots of bit planes, tables of masses, brackets, and the blocks that are kept.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "choosing.h"
#include "kernels.h"
#include "level.h"
#include "scan_rows.h"

using namespace sieve;

namespace {

#if defined(__SANITIZE_THREAD__)
constexpr int CASES = 5;
#else
constexpr int CASES = 25;
#endif

constexpr double LOG2E = 1.4426950408889634;

bool near_to(double got, double exact, double tolerance) {
  return std::isfinite(exact) ? std::fabs(got - exact) <= tolerance * (1 + std::fabs(exact)) : got == exact;
}

// Random planes of keys with gaps between them, and integers that stand for queries.
struct Planes {
  int32_t d, bits, rows, groups, digits;
  int64_t len, bytes, stride;
  Array planes;  // [1, bits, len, bytes]
  std::vector<int8_t> integers;
  Row<uint16_t> scales;
  Row<uint8_t> mask;
  int64_t scale_stride, mask_stride;
  std::vector<float> factor;
  std::vector<int32_t> centre;
  std::vector<int64_t> low, high;
  Row<char> packed, scratch;
  Scan scan{};

  Planes(Random& random, int32_t d_, int64_t len_, int32_t bits_, int32_t rows_, int32_t digits_, bool full = false)
      : d(d_), bits(bits_), rows(rows_), groups((rows_ + SCAN_ROWS - 1) / SCAN_ROWS), digits(digits_), len(len_), bytes((d_ + 7) / 8),
        planes(make(random, U8, {1, bits_, len_, bytes}, random.chance(0.5) ? CONTIGUOUS : PADDED)),
        integers(static_cast<size_t>(groups * digits * SCAN_ROWS * d), 0), scales((len_ - 1) * 2 + 1), mask((len_ - 1) * 3 + 1),
        scale_stride(random.chance(0.5) ? 2 : 1), mask_stride(random.chance(0.5) ? 3 : 1),
        packed(kernels().scan_bytes(d_, groups * digits_ * SCAN_ROWS)),
        scratch(up(kernels().scan_scratch(d_, groups * digits_ * SCAN_ROWS), 64)) {
    const bool ends = full || random.chance(0.3);  // the largest products
    for (int32_t p = 0; p < bits; ++p)
      for (int64_t j = 0; j < len; ++j)
        for (int64_t i = 0; i < bytes; ++i) entry<uint8_t>(planes, 0, p, j, i) = full ? 0xff : static_cast<uint8_t>(random.next());
    if (d % 8)  // what lies behind the last channel is zero
      for (int32_t p = 0; p < bits; ++p)
        for (int64_t j = 0; j < len; ++j) entry<uint8_t>(planes, 0, p, j, bytes - 1) &= static_cast<uint8_t>(0xff << (8 - d % 8));
    for (int32_t i = 0; i < groups * digits * SCAN_ROWS; ++i)
      if (row_of(i) < rows)
        for (int32_t c = 0; c < d; ++c)
          integers[static_cast<size_t>(i) * d + c] = static_cast<int8_t>(ends ? 127 : random.between(-127, 127));
    for (int64_t i = 0; i < scales.size; ++i) scales[i] = 0x3c00;  // one
    for (int64_t i = 0; i < mask.size; ++i) mask[i] = 1;
    factor.assign(groups * digits * SCAN_ROWS, 1.0f);
    for (int32_t i = 0; i < groups * digits * SCAN_ROWS; ++i) {
      int32_t sum = 0;
      for (int32_t c = 0; c < d; ++c) sum += integers[static_cast<size_t>(i) * d + c];
      centre.push_back(((1 << bits) - 1) * sum);
    }
    low.assign(groups * SCAN_ROWS, 0);
    high.assign(groups * SCAN_ROWS, len);
    kernels().pack_scan(integers.data(), d, groups * digits * SCAN_ROWS, digits, bits, packed.get());
    scan.d = d;
    scan.groups = groups;
    scan.digits = digits;
    scan.rows = rows;
    scan.bits = bits;
    scan.query = packed.get();
    scan.factor = factor.data();
    scan.centre = centre.data();
    for (int32_t p = 0; p < bits; ++p) scan.planes[p] = reinterpret_cast<uint8_t*>(at(planes.view, 0, p, 0, 0));
    scan.key_stride = planes.view.stride[2];
    scan.scale = scales.get();
    scan.scale_stride = scale_stride;
    scan.kv_len = len;
    scan.low = low.data();
    scan.high = high.data();
    scan.key_mask = mask.get();
    scan.key_mask_stride = mask_stride;
  }
  int32_t row_of(int32_t i) const { return i / (digits * SCAN_ROWS) * SCAN_ROWS + i % SCAN_ROWS; }
  double twice(int32_t r, int32_t digit, int64_t j) const {  // the dot with twice the levels
    const int8_t* q = integers.data() + static_cast<size_t>((r / SCAN_ROWS * digits + digit) * SCAN_ROWS + r % SCAN_ROWS) * d;
    int64_t total = 0;
    for (int32_t c = 0; c < d; ++c) {
      int code = 0;
      for (int32_t p = 0; p < bits; ++p) code = 2 * code + ((entry<uint8_t>(planes, 0, p, j, c / 8) >> (7 - c % 8)) & 1);
      total += q[c] * (2 * code - ((1 << bits) - 1));
    }
    return static_cast<double>(total);
  }
};

}  // namespace

// One visible key a panel: its mass is its logit, and that is the integer dot.
TEST(dots_of_bit_planes_are_exact) {
  each_level([](const std::string& level) {
    const int32_t widths[] = {1, 7, 8, 24, 32, 33, 64, 70, 100, 128, 160, 200, 256, 300, 512};
    for (int n = 0; n < 120; ++n) {
      Random random(n + 1);
      const int32_t d = widths[n % 15], bits = 1 + n % 8;
      Planes p(random, d, random.between(1, 200), bits, static_cast<int32_t>(random.between(1, 9)), 1);
      note(level + ", case " + std::to_string(n) + ": d " + std::to_string(d) + ", bits " + std::to_string(bits) + ", keys " +
           std::to_string(p.len) + ", rows " + std::to_string(p.rows));
      const int64_t panels = (p.len + PANEL_KEYS - 1) / PANEL_KEYS, chunks = (panels + SCAN_PANELS - 1) / SCAN_PANELS;
      const int64_t width = p.groups * SCAN_ROWS, first = random.below(chunks) * SCAN_PANELS, some = chunks - first / SCAN_PANELS;
      const int64_t seen = random.below(PANEL_KEYS);
      for (int64_t j = 0; j < p.len; ++j) p.mask[j * p.mask_stride] = j % PANEL_KEYS == seen;
      const Row<float> mass(some * SCAN_PANELS * width), largest(some * SCAN_PANELS);
      kernels().scan(p.scan, first, some, mass.get(), nullptr, largest.get(), p.scratch.get());
      for (int64_t panel = 0; panel < some * SCAN_PANELS; ++panel) {
        const int64_t j = (first + panel) * PANEL_KEYS + seen;
        for (int32_t r = 0; r < p.rows; ++r)  // the logarithm of one weight is not quite 0
          CHECK(j < p.len ? std::fabs(mass[panel * width + r] - p.twice(r, 0, j)) <= 1e-3 : mass[panel * width + r] == -INFINITY);
        CHECK(largest[panel] == ((first + panel) * PANEL_KEYS < p.len ? 1.0f : 0.0f));
      }
    }
  });
}

TEST(masses_of_panels_are_their_sums) {
  each_level([](const std::string& level) {
    const int32_t widths[] = {5, 32, 40, 64, 128, 256};
    for (int n = 0; n < 288; ++n) {  // every width, number of digits and of bits, and again at their largest
      Random random(n + 100);
      const int32_t digits = 1 + n % 3;
      const int32_t d = widths[n / 3 % 6], bits = 1 + n / 18 % 8;
      Planes p(random, d, random.between(1, 300), bits, static_cast<int32_t>(random.between(1, 6)), digits, n >= 144);
      note(level + ", case " + std::to_string(n));
      Array halves = make(random, F16, {1, 1, p.len, p.scale_stride}, CONTIGUOUS);
      for (int64_t j = 0; j < p.len; ++j) {
        halves.set(0, 0, j, 0, random.uniform() + 0.01);
        p.scales[j * p.scale_stride] = entry<uint16_t>(halves, 0, 0, j, 0);
      }
      for (size_t i = 0; i < p.factor.size(); ++i) {
        const double step = 4.0 / (std::sqrt(static_cast<double>(p.d)) * 127 * (1 << p.bits));
        p.factor[i] = static_cast<float>(step / std::pow(SCAN_DIGIT, static_cast<double>(i / SCAN_ROWS % static_cast<size_t>(digits))));
      }
      for (int32_t r = 0; r < p.rows; ++r) {
        p.low[r] = random.chance(0.5) ? 0 : random.between(0, p.len);
        p.high[r] = random.chance(0.5) ? p.len : random.between(p.low[r], p.len);
      }
      const bool masked = random.chance(0.5);
      for (int64_t j = 0; j < p.len; ++j) p.mask[j * p.mask_stride] = !masked || random.chance(0.6);
      if (!masked) p.scan.key_mask = nullptr;
      const int64_t panels = (p.len + PANEL_KEYS - 1) / PANEL_KEYS, chunks = (panels + SCAN_PANELS - 1) / SCAN_PANELS;
      const int64_t width = p.groups * SCAN_ROWS;
      const Row<float> mass(chunks * SCAN_PANELS * width), norms(mass.size), largest(chunks * SCAN_PANELS);
      kernels().scan(p.scan, 0, chunks, mass.get(), norms.get(), largest.get(), p.scratch.get());
      for (int64_t panel = 0; panel < panels; ++panel) {
        double most = 0;
        for (int32_t r = 0; r < p.rows; ++r) {
          std::vector<double> x;
          for (int64_t j = panel * PANEL_KEYS; j < std::min(p.len, (panel + 1) * PANEL_KEYS); ++j) {
            most = std::max(most, halves.get(0, 0, j, 0));
            if ((masked && !p.mask[j * p.mask_stride]) || j < p.low[r] || j >= p.high[r]) continue;
            double logit = 0;
            for (int32_t e = 0; e < digits; ++e)
              logit += p.twice(r, e, j) * p.factor[(r / SCAN_ROWS * digits + e) * SCAN_ROWS + r % SCAN_ROWS];
            x.push_back(logit * halves.get(0, 0, j, 0));
          }
          const double exact = log_sum(x);
          CHECK(near_to(mass[panel * width + r], exact, 3e-5));
          double squares = 0;
          for (const double y : x) squares += std::exp2(2 * (y - exact));
          CHECK(std::fabs(norms[panel * width + r] - (x.empty() ? 0.0 : std::sqrt(squares))) <= 1e-4);
        }
        CHECK(largest[panel] == static_cast<float>(most));
      }
    }
  });
}

TEST(tables_of_masses_are_their_loops) {
  each_level([](const std::string& level) {
    for (int seed = 0; seed < 60; ++seed) {
      Random random(seed + 5);
      const int64_t n = random.between(1, 40), rows = SCAN_ROWS * random.between(1, 4), each = random.between(1, 5);
      note(level + ", case " + std::to_string(seed));
      const Row<float> mass(n * rows), base(rows), level_of(rows), folded((n + each - 1) / each * rows), all(rows), best(n),
          power(n * rows), below(rows), above(rows), lower(n * rows);
      for (int64_t i = 0; i < n * rows; ++i) mass[i] = random.chance(0.1) ? -INFINITY : static_cast<float>(9 * random.normal());
      for (int64_t r = 0; r < rows; ++r) base[r] = random.chance(0.1) ? INFINITY : static_cast<float>(9 * random.normal());
      const Kernels& k = kernels();
      k.fold(mass.get(), n, each, rows, folded.get());
      k.row_mass(mass.get(), n, rows, all.get());
      k.best_row(mass.get(), base.get(), n, rows, best.get());
      k.powers(mass.get(), base.get(), n, rows, power.get());
      for (int64_t r = 0; r < rows; ++r) {
        std::vector<double> every, part;
        for (int64_t i = 0; i < n; ++i) {
          every.push_back(mass[i * rows + r]);
          part.push_back(mass[i * rows + r]);
          if ((i + 1) % each && i + 1 < n) continue;
          CHECK(near_to(folded[i / each * rows + r], log_sum(part), 1e-6));
          part.clear();
        }
        CHECK(near_to(all[r], log_sum(every), 1e-6));
        for (int64_t i = 0; i < n; ++i) {
          const double x = std::exp2(static_cast<double>(std::max(-200.0f, mass[i * rows + r] - base[r])));
          CHECK(std::fabs(power[i * rows + r] - x) <= 1e-6 * x + 1e-37);
          lower[i * rows + r] = power[i * rows + r] * 0.5f;
        }
        level_of[r] = random.chance(0.5) ? power[random.below(n) * rows + r] : static_cast<float>(random.uniform());
      }
      for (int64_t i = 0; i < n; ++i) {
        float most = -INFINITY;
        for (int64_t r = 0; r < rows; ++r) most = std::max(most, mass[i * rows + r] - base[r]);
        CHECK(best[i] == most);
      }
      k.split(power.get(), lower.get(), level_of.get(), n, rows, below.get(), above.get());
      for (int64_t r = 0; r < rows; ++r) {
        double under = 0, over = 0;
        for (int64_t i = 0; i < n; ++i)
          (power[i * rows + r] <= level_of[r] ? under : over) += power[i * rows + r] <= level_of[r] ? power[i * rows + r] : lower[i * rows + r];
        CHECK(near_to(below[r], under, 1e-5) && near_to(above[r], over, 1e-5));
      }
    }
  });
}

TEST(dots_with_rows_are_their_sums) {
  each_level([](const std::string& level) {
    for (int seed = 0; seed < 60; ++seed) {
      Random random(seed + 9);
      const int32_t d = static_cast<int32_t>(random.between(1, 70)), rows = static_cast<int32_t>(random.between(1, 9));
      const DType dtype = static_cast<DType>(seed % 3);
      note(level + ", case " + std::to_string(seed));
      Array items = make(random, dtype, {1, 1, random.between(1, 9), d}, random.chance(0.5) ? CONTIGUOUS : PADDED);
      fill(random, items);
      const int64_t count = items.view.shape[2], width = up(rows, SCAN_ROWS);
      const Row<float> q(rows * d), out(count * width);
      for (int64_t i = 0; i < q.size; ++i) q[i] = static_cast<float>(random.normal());
      kernels().dot_rows(q.get(), rows, d, items.view.data, dtype, items.view.stride[2], count, out.get());
      for (int64_t i = 0; i < count; ++i)
        for (int32_t r = 0; r < width; ++r) {
          double sum = 0, size = 0;
          for (int32_t c = 0; r < rows && c < d; ++c) {
            sum += static_cast<double>(q[r * d + c]) * items.get(0, 0, i, c);
            size += std::fabs(static_cast<double>(q[r * d + c]) * items.get(0, 0, i, c));
          }
          CHECK(std::fabs(out[i * width + r] - sum) <= 1e-6 * size);
        }
    }
  });
}

// Queries along the error of a key are as wrong about it as they can be: the brackets hold their true masses too.
TEST(brackets_of_panels_hold_the_true_masses) {
  each_level([](const std::string& level) {
    double widest = 0, panels = 0;
    for (int n = 0; n < CASES; ++n) {
      Random random(n + 41);
      Choosing c(random, true, KEYS, PROVED, static_cast<DType>(n % 3));
      note(level + ", case " + std::to_string(n) + ": " + c.text);
      const Summary& s = *c.summary;
      for (int64_t b = 0; b < c.batch; ++b)
        for (int64_t h = 0; h < c.q_heads; ++h)
          for (int64_t i = 0; i < c.q_len; ++i) {
            const int64_t kv = h / (c.q_heads / c.kv_heads), j = random.below(c.kv_len);
            const bool metric = random.chance(0.5);
            const auto along = [&](int64_t e) {
              const double apart = c.key.get(b, kv, j, e) - s.decoded(b, kv, j, e), a = metric ? s.channel_scale.get(0, b, kv, e) : 1.0;
              return std::isfinite(apart) ? std::pair{apart, apart / (a * a)} : std::pair{0.0, 0.0};
            };
            double square = 0;
            for (int64_t e = 0; e < c.d; ++e) square += along(e).first * along(e).second;
            if (square == 0 || (h + i) % 2) continue;
            const double size = (random.chance(0.5) ? 1 : -1) * 2.0 * random.uniform() / (c.scale * square);
            for (int64_t e = 0; e < c.d; ++e) c.q.set(b, h, i, e, std::clamp(size * along(e).second, -6e4, 6e4));
          }
      const Gate g = c.scan();
      std::vector<GateUnit> units = units_of(g);
      score(g, units);
      for (const GateUnit& u : units)
        for (size_t r = 0; r < u.rows.size(); ++r) {
          const ScanRow& row = u.rows[r];
          if (!row.sound) continue;
          for (int64_t p = 0; p * PANEL_KEYS < c.kv_len; ++p) {
            std::vector<double> x;
            bool number = true;
            for (int64_t j = p * PANEL_KEYS; j < std::min(c.kv_len, (p + 1) * PANEL_KEYS); ++j) {
              if (j < row.low || j >= row.high || (c.mask.memory && c.mask.get(u.batch, 0, 0, j) == 0)) continue;
              double dot = 0;
              for (int64_t e = 0; e < c.d; ++e) dot += c.q.get(u.batch, row.head, row.query, e) * c.key.get(u.batch, u.kv_head, j, e);
              number &= !std::isnan(dot);
              x.push_back((c.softcap != 0 ? c.softcap * std::tanh(dot * c.scale / c.softcap) : dot * c.scale) * LOG2E);
            }
            if (!number) continue;
            const double truth = log_sum(x), upper = u.mass[p * u.width + static_cast<int64_t>(r)];
            const double lower = u.lower[p * u.width + static_cast<int64_t>(r)];
            CHECK(lower <= truth && truth <= upper);
            if (c.sketch_bits < 8 || c.softcap != 0 || x.empty() || (row.head + row.query) % 2 == 0) continue;
            widest += upper - lower;
            panels += 1;
          }
        }
    }
    CHECK(widest <= 6 * panels);
  });
}

TEST(decoding_keeps_what_its_rule_asks_for) {
  each_level([](const std::string& level) {
    int64_t dropped[6] = {};
    for (int n = 0; n < CASES; ++n)
      for (int scorer = 0; scorer < 4; ++scorer)
        for (const Keeps rule : {COUNT, SHARE, OVER, CLOSE, HALF, PROVED}) {
          const By by = scorer == 2 ? MEANS : scorer == 3 ? BALLS : KEYS;
          if (rule == PROVED && by != KEYS) continue;
          Random random(n * 100 + scorer * 10 + rule + 1);
          Choosing c(random, true, by, rule, static_cast<DType>(random.below(3)));
          note(level + ", case " + std::to_string(n) + ": " + c.text);
          c.check(c.run(c.threads));
          dropped[rule] += c.dropped;
        }
    for (const int64_t x : dropped) CHECK(x > 0);
  });
}

TEST(decoding_chooses_the_same_on_any_threads) {
  each_level([](const std::string& level) {
    for (int n = 0; n < 6; ++n) {
      Random random(n + 900);
      const Choosing c(random, true, n % 3 == 2 ? MEANS : KEYS, n % 3 == 0 ? PROVED : COUNT, BF16);
      note(level + ", case " + std::to_string(n) + ": " + c.text);
      c.check_threads();
    }
  });
}

TEST(of_equal_blocks_decoding_keeps_the_first) {
  each_level([](const std::string& level) {
    for (const By by : {KEYS, MEANS, BALLS}) {
      note(level + ", by " + std::to_string(by));
      check_equal_blocks(true, by);
    }
  });
}
