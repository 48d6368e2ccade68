// Forward and backward of every operation against plain loops, on every level, between guard pages.
#include <cmath>

#include "kernels.h"
#include "level.h"
#include "problem.h"
#include "summary.h"

using namespace sieve;

static void against_loops(Kind kind, int cases) {
  each_level([&](const std::string& level) {
    for (int seed = 0; seed < cases; ++seed) {
      for (const DType dtype : {F32, F16, BF16}) {
        Random random(seed * 10 + dtype + 1);
        Problem p(random, kind, dtype);
        note(level + ", seed " + std::to_string(seed) + ": " + p.text);
        p.run();
        const double tolerance = dtype == F32 ? 1e-4 : dtype == F16 ? 3e-3 : 2e-2;
        p.check_output(tolerance);
        if (kind == TOP_K) p.check_top_k();
        p.check_gradients(random, dtype == F32 ? 1e-3 : 5 * tolerance);
      }
    }
  });
}

#if defined(__SANITIZE_THREAD__)
constexpr int CASES = 8;
#else
constexpr int CASES = 40;
#endif

TEST(blocks_against_loops) { against_loops(BLOCKS, CASES); }
TEST(ranges_against_loops) { against_loops(RANGES, CASES); }
TEST(rows_against_loops) { against_loops(ROWS, CASES); }
TEST(top_k_against_loops) { against_loops(TOP_K, CASES); }

// Panels hold what their views hold, zeros behind the last key, and behind the last channel of values.
TEST(keys_and_values_lie_in_panels) {
  each_level([](const std::string& level) {
    for (int n = 0; n < 3 * CASES; ++n) {
      Random random(n + 1);
      const int64_t d = random.between(1, 70), wide = up(d, 16), kv_len = random.between(1, 90), panels = up(kv_len, 16) / 16;
      const int64_t first = random.below(panels), last = random.between(first + 1, panels), h = random.below(2);
      note(level + ", case " + std::to_string(n) + ": keys " + std::to_string(kv_len) + ", d " + std::to_string(d));
      Array x = make(random, static_cast<DType>(n % 3), {1, 2, kv_len, d}, static_cast<Layout>(random.below(LAYOUTS)));
      fill(random, x);
      const auto entry = [&](int64_t j, int64_t c) { return j < kv_len && c < d ? static_cast<float>(x.get(0, h, j, c)) : 0.0f; };
      const Row<float> keys((last - first) * 16 * d), values((last - first) * 16 * wide);
      kernels().pack_keys(x.view, 0, h, first, last, keys.get());
      kernels().pack_values(x.view, 0, h, first, last, values.get());
      for (int64_t j = first * 16; j < last * 16; ++j) {
        const int64_t panel = j / 16 - first, i = j % 16;
        for (int64_t c = 0; c < d; ++c) CHECK(keys[(panel * d + c) * 16 + i] == entry(j, c));
        for (int64_t c = 0; c < wide; ++c) CHECK(values[panel * 16 * wide + c / 16 * 256 + i * 16 + c % 16] == entry(j, c));
      }
    }
  });
}

// What is not finite reaches the rows that attend to it and nobody else.
TEST(non_finite_and_denormal_numbers) {
  each_level([&](const std::string& level) {
    for (int seed = 0; seed < CASES; ++seed)
      for (const Kind kind : {BLOCKS, RANGES, ROWS})
        for (const DType dtype : {F32, BF16}) {
          Random random(seed * 7 + 3 + kind);
          Problem p(random, kind, dtype);
          note(level + ", seed " + std::to_string(seed) + ": " + p.text);
          const double poison[] = {NAN, INFINITY, -INFINITY};
          const int64_t j = random.below(p.kv_len());
          const int64_t c = random.below(p.call.v.shape[3]);
          p.v.set(0, 0, j, c, poison[random.below(3)]);
          if (random.chance(0.5)) p.k.set(0, 0, random.below(p.kv_len()), 0, NAN);
          const int64_t small = random.below(p.kv_len());
          for (int64_t e = 0; e < p.call.k.shape[3]; ++e) p.k.set(0, 0, small, e, 1e-41);
          for (int64_t e = 0; e < p.call.v.shape[3]; ++e)
            if (small != j) p.v.set(0, 0, small, e, -1e-41);
          p.run();
          p.check_output(dtype == F32 ? 1e-4 : 2e-2);
        }
  });
}
