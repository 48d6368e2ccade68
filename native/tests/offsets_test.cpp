// Offset attention on both plans against plain loops: forward, gradients and decoding steps, in memory between guard pages.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <thread>

#include "offset_problem.h"

using namespace sieve;

#if defined(__SANITIZE_THREAD__)
constexpr int CASES = 6;
#else
constexpr int CASES = 30;
#endif

namespace {

void set_row(Array& x, int64_t row, double value) {
  const View w = x.view;
  for (int64_t a = 0; a < w.shape[0]; ++a)
    for (int64_t b = 0; b < w.shape[1]; ++b)
      for (int64_t d = 0; d < w.shape[3]; ++d) x.set(a, b, row, d, value);
}

void both_plans(const std::string& level, int seed, Random& random, const OffsetProblem& c) {
  for (const Plan plan : PLANS) {
    note(level + ", seed " + std::to_string(seed) + ", plan " + std::to_string(plan) + ": " + c.text);
    const int threads = static_cast<int>(random.between(1, 3));
    OffsetResult r = c.result(seed + 1), other = c.result(seed + 1);
    c.forward(plan, threads, r);
    c.backward(plan, threads, r);
    c.check(r, true);
    c.forward(plan, threads % 3 + 1, other);
    c.backward(plan, threads % 3 + 1, other);
    CHECK(r.same_bits(other));
  }
}

}  // namespace

TEST(offsets_against_loops) {
  each_level([](const std::string& level) {
    for (int seed = 0; seed < CASES; ++seed)
      for (const DType dtype : FLOATS) {
        Random random(seed * 10 + dtype + 1);
        both_plans(level, seed, random, OffsetProblem(random, dtype, short_shape(random)));
      }
  });
}

TEST(offsets_of_several_tiles_against_loops) {
  each_level([](const std::string& level) {
    for (int seed = 0; seed < CASES / 6; ++seed) {
      Random random(seed * 10 + 7);
      both_plans(level, seed, random, OffsetProblem(random, FLOATS[seed % 3], long_shape(random)));
    }
  });
}

TEST(offsets_of_the_smallest_problems) {
  each_level([](const std::string& level) {
    int seed = 0;
    for (const int64_t q_len : {1, 2, 9})
      for (const int64_t kv_len : {1, 2, 9})
        for (int n = 0; n < 8; ++n) {
          Random random(++seed);
          const OffsetShape s{1, 1, random.between(1, 2), q_len, kv_len, random.between(1, 17), random.between(1, 17)};
          both_plans(level, seed, random, OffsetProblem(random, FLOATS[n % 3], s));
        }
  });
}

// Keys and values after a query, and those that its list passes over, reach neither its output nor a gradient that it takes part in.
TEST(offsets_that_are_not_read_change_nothing) {
  each_level([](const std::string& level) {
    const double poisons[] = {NAN, INFINITY, -INFINITY, 3e38};
    for (int seed = 0; seed < 2 * CASES; ++seed) {
      Random random(seed * 10 + 3);
      OffsetProblem c(random, FLOATS[seed % 3], short_shape(random), false);
      std::vector<bool> bad_key(c.s.kv_len), hit(c.s.q_len), unsaid(c.s.q_len);
      const bool future = random.chance(0.5), read_too = random.chance(0.5);
      const int64_t from = random.below(c.s.kv_len);
      for (int64_t j = 0; j < c.s.kv_len; ++j) {
        if (future ? j < from : !random.chance(0.05)) continue;
        bad_key[j] = true;
        // where a query reads it, loops say what becomes of it, but for infinite keys
        if (read_too && random.chance(0.5)) set_row(c.k, j, NAN);
        else if (!read_too) set_row(c.k, j, poisons[random.below(4)]);
        set_row(c.v, j, poisons[random.below(3)]);
      }
      if (random.chance(0.3)) {
        const int64_t i = random.below(c.s.q_len);
        set_row(c.q, i, NAN);
        hit[i] = true;
      }
      for (int64_t i = 0; i < c.s.q_len; ++i)
        for (const int64_t j : c.read[i])
          if (bad_key[j]) {
            hit[i] = true;
            unsaid[i] = !read_too;
          }
      for (const Plan plan : PLANS) {
        note(level + ", seed " + std::to_string(seed) + ", plan " + std::to_string(plan) + ": " + c.text);
        OffsetResult r = c.result(seed);
        c.forward(plan, 2, r);
        c.backward(plan, 2, r);
        c.check(r, true, unsaid, hit);
      }
    }
  });
}

// An infinite key whose logit is -inf has no weight, and leaves every number finite.
TEST(offsets_of_keys_without_weight) {
  each_level([](const std::string& level) {
    for (int seed = 0; seed < CASES; ++seed) {
      Random random(seed * 10 + 9);
      OffsetProblem c(random, FLOATS[seed % 3], short_shape(random), false);
      each_element(c.q, [&](int64_t a, int64_t b, int64_t i, int64_t) { c.q.set(a, b, i, 0, 0.5); });
      for (int64_t n = random.between(1, 3); n > 0; --n) {
        const int64_t j = random.below(c.s.kv_len);
        each_element(c.k, [&](int64_t a, int64_t b, int64_t, int64_t) { c.k.set(a, b, j, 0, -INFINITY); });
      }
      both_plans(level, seed, random, c);
    }
  });
}

TEST(offsets_of_denormal_numbers) {
  each_level([](const std::string& level) {
    for (int seed = 0; seed < CASES / 3; ++seed) {
      Random random(seed * 10 + 5);
      OffsetProblem c(random, FLOATS[seed % 3], short_shape(random), false);
      set_row(c.k, random.below(c.s.kv_len), 1e-41);
      set_row(c.v, random.below(c.s.kv_len), -1e-41);
      set_row(c.q, random.below(c.s.q_len), 1e-41);
      both_plans(level, seed, random, c);
      // the caller's mode is as it was
      volatile float small = 1e-38f;
      small = small * 0.1f;
      CHECK(small > 0.0f);
    }
  });
}

// A step over the first n keys is the row of the whole, whatever lies behind them.
TEST(offsets_of_steps_are_rows_of_the_whole) {
  each_level([](const std::string& level) {
    for (int seed = 0; seed < CASES; ++seed) {
      Random random(seed * 10 + 4);
      OffsetShape s = short_shape(random);
      s.q_len = s.kv_len;
      OffsetProblem c(random, FLOATS[seed % 3], s, false);
      const OffsetResult whole = c.result(seed);
      note(level + ", seed " + std::to_string(seed) + ": " + c.text);
      c.forward(DIAGONALS, 1, whole);
      c.check(whole, false);
      for (int64_t n = s.kv_len; n > 0; n -= random.between(1, 30)) {
        for (int64_t j = n; j < s.kv_len; ++j) {
          set_row(c.k, j, NAN);
          set_row(c.v, j, NAN);
        }
        OffsetAttention a = c.call;
        const int64_t q_len = a.q.shape[2] = random.between(1, std::min<int64_t>(n, 4));
        a.q.data = at(c.q.view, 0, 0, n - q_len, 0);
        a.k.shape[2] = a.v.shape[2] = n;
        a.threads = static_cast<int>(random.between(1, 2));
        a.count = std::lower_bound(a.offsets, a.offsets + a.count, n) - a.offsets;
        a.prefix = std::min(a.prefix, n);
        for (const Plan plan : PLANS) {
          const Array out = output(random, c.dtype, {s.batch, c.heads(), q_len, s.dv});
          const Array lse = output(random, F32, {s.batch, c.heads(), q_len, 1}, 1);
          if (plan == DIAGONALS) attend_offsets(a, out.view, static_cast<float*>(lse.view.data));
          else attend_wheel(a, c.wheel, out.view, static_cast<float*>(lse.view.data));
          each_element(out, [&](int64_t b, int64_t h, int64_t i, int64_t e) {
            const int64_t row = n - q_len + i;
            CHECK(near(out.get(b, h, i, e), whole.out.get(b, h, row, e), OFFSET_TOLERANCE[c.dtype]));
            CHECK(near(lse.get(b, h, i, 0), whole.lse.get(0, 0, 0, (b * c.heads() + h) * s.kv_len + row), OFFSET_TOLERANCE[F32]));
          });
          check_gaps(out);
        }
      }
    }
  });
}

// Every key lies in a page of its own, and the pages of those that no query reads are closed.
TEST(offset_steps_touch_only_the_keys_that_they_read) {
  const int64_t page = sysconf(_SC_PAGESIZE);
  each_level([&](const std::string& level) {
    for (int seed = 0; seed < CASES; ++seed) {
      Random random(seed * 10 + 6);
      OffsetShape s = short_shape(random);
      const DType dtype = FLOATS[seed % 3];
      if (dtype == F32) s.d = s.dv = 16 * random.between(1, 4);  // rows that need no copies are read where they lie
      s = {1, 1, s.group, random.between(1, 2), random.between(150, 300), s.d, s.dv};
      OffsetProblem c(random, dtype, s, false);
      note(level + ", seed " + std::to_string(seed) + ": " + c.text);
      if (dtype != F32 && s.q_len * (c.call.count + c.call.prefix) >= s.kv_len) continue;  // all are copied
      std::vector<bool> open(s.kv_len);
      for (const auto& row : c.read)
        for (const int64_t j : row) open[j] = true;
      for (View* x : {&c.call.k, &c.call.v}) {
        Array& held = x == &c.call.k ? c.k : c.v;
        const int64_t bytes = dtype_bytes(dtype), width = x->shape[3] * bytes, start = random.chance(0.5) ? 0 : page - width;
        Array apart;
        apart.memory = std::make_shared<Guarded>(s.kv_len * page, true);
        apart.view = View{apart.memory->data() + start, dtype, {1, 1, s.kv_len, x->shape[3]}, {0, 0, page / bytes, 1}};
        each_element(apart, [&](int64_t, int64_t, int64_t j, int64_t e) { apart.set(0, 0, j, e, held.get(0, 0, j, e)); });
        for (int64_t j = 0; j < s.kv_len; ++j)
          if (!open[j]) CHECK(mprotect(apart.memory->data() + j * page, page, PROT_NONE) == 0);
        *x = apart.view;
        held.memory.swap(apart.memory);
        held.view = apart.view;
      }
      const OffsetResult r = c.result(seed);
      c.forward(DIAGONALS, 2, r);
      for (int64_t j = 0; j < s.kv_len; ++j)
        for (const Array* x : {&c.k, &c.v}) CHECK(mprotect(x->memory->data() + j * page, page, PROT_READ | PROT_WRITE) == 0);
      c.check(r, false);
    }
  });
}

TEST(concurrent_offset_calls_give_the_same_bits) {
  each_level([](const std::string& level) {
    for (int seed = 0; seed < 4; ++seed) {
      Random random(seed * 10 + 8);
      const OffsetProblem c(random, FLOATS[seed % 3], seed % 3 ? short_shape(random) : OffsetShape{1, 2, 2, 130, 150, 32, 32});
      for (const Plan plan : PLANS) {
        note(level + ", seed " + std::to_string(seed) + ", plan " + std::to_string(plan) + ": " + c.text);
        std::vector<OffsetResult> results;
        for (int i = 0; i < 3; ++i) results.push_back(c.result(seed));
        std::vector<std::thread> threads;
        for (int i = 0; i < 3; ++i)
          threads.emplace_back([&, i] {
            for (int n = 0; n < 2; ++n) {
              c.forward(plan, 1 + i, results[i]);
              c.backward(plan, 1 + i, results[i]);
            }
          });
        for (std::thread& t : threads) t.join();
        for (const OffsetResult& r : results) CHECK(r.same_bits(results[0]));
      }
    }
  });
}
