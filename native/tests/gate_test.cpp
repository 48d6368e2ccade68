// The gate of a prefill: what every rule keeps, on one level and on two, alike on any threads.
#include <algorithm>

#include "choosing.h"

using namespace sieve;

namespace {

#if defined(__SANITIZE_THREAD__)
constexpr int CASES = 5;
#else
constexpr int CASES = 25;
#endif

}  // namespace

TEST(a_prefill_keeps_what_its_rule_asks_for) {
  each_level([](const std::string& level) {
    int64_t dropped[5] = {};
    for (int n = 0; n < CASES; ++n)
      for (int scorer = 0; scorer < 4; ++scorer)
        for (const Keeps rule : {COUNT, SHARE, OVER, CLOSE, HALF}) {
          const By by = scorer == 2 ? MEANS : scorer == 3 ? BALLS : KEYS;
          Random random(n * 100 + scorer * 10 + rule + 1);
          Choosing c(random, false, by, rule, static_cast<DType>(random.below(3)));
          note(level + ", case " + std::to_string(n) + ": " + c.text);
          c.check(c.run(c.threads));
          dropped[rule] += c.dropped;
        }
    for (const int64_t x : dropped) CHECK(x > 0);
  });
}

TEST(two_levels_keep_what_one_level_keeps) {
  each_level([](const std::string& level) {
    int64_t computed = 0, visible = 0;
    for (int n = 0; n < 4; ++n)
      for (const Keeps rule : {COUNT, SHARE, HALF}) {
        Random random(n * 10 + rule + 1);
        Choosing c(random, false, KEYS, rule, static_cast<DType>(n % 3), true);
        note(level + ", case " + std::to_string(n) + ": " + c.text);
        const Choosing::Kept kept = c.run(c.threads);
        c.check(kept);
        computed += kept.computed;
        for (const int64_t x : kept.visible) visible += x;
      }
    CHECK(computed < visible * 0.9);  // or groups of blocks were never passed over
  });
}

TEST(a_prefill_chooses_the_same_on_any_threads) {
  each_level([](const std::string& level) {
    for (int n = 0; n < 6; ++n) {
      Random random(n + 900);
      const Choosing c(random, false, n % 3 == 2 ? MEANS : KEYS, n % 2 ? HALF : COUNT, BF16, n == 0);
      note(level + ", case " + std::to_string(n) + ": " + c.text);
      c.check_threads();
    }
  });
}

TEST(of_equal_blocks_a_prefill_keeps_the_first) {
  each_level([](const std::string& level) {
    for (const By by : {KEYS, MEANS, BALLS}) {
      note(level + ", by " + std::to_string(by));
      check_equal_blocks(false, by);
    }
  });
}
