// What concerns the process: concurrent calls, forked children, levels, exceptions in threads, and addresses beyond 2^31 elements.
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <thread>

#include "kernels.h"
#include "level.h"
#include "parallel.h"
#include "problem.h"
#include "top_k.h"

using namespace sieve;

TEST(concurrent_calls_give_the_same_bits) {
  each_level([&](const std::string& level) {
    for (const Kind kind : {BLOCKS, RANGES, ROWS, TOP_K}) {
      note(level + ", kind " + std::to_string(kind));
      std::vector<std::unique_ptr<Problem>> all;
      for (int i = 0; i < 4; ++i) {
        Random random(17 + kind);
        all.push_back(std::make_unique<Problem>(random, kind, BF16));
        all.back()->call.threads = 1 + i % 3;
      }
      std::vector<std::thread> threads;
      for (auto& p : all) threads.emplace_back([&p] { for (int i = 0; i < 5; ++i) p->run(); });
      for (auto& t : threads) t.join();
      for (auto& p : all) {
        CHECK(std::memcmp(p->lse.data(), all[0]->lse.data(), p->lse.size() * 4) == 0);
        CHECK(p->index == all[0]->index);
      }
    }
  });
}

#if !defined(__SANITIZE_THREAD__)
TEST(a_forked_child_can_call_kernels) {
  Random random(3);
  Problem p(random, TOP_K, F32);
  p.call.threads = 3;
  p.run();
  const pid_t child = fork();
  if (child == 0) {
    p.run();
    p.check_output(1e-4);
    _exit(0);
  }
  int status = 1;
  CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
}
#endif

TEST(levels_are_named_and_unknown_ones_refused) {
  CHECK(levels()[0] == "portable");
  each_level([](const std::string& name) { CHECK(level() == name); });
  try {
    force_level("mmx");
    CHECK(false);
  } catch (const std::invalid_argument& e) {
    CHECK(std::string(e.what()).find("portable") != std::string::npos);
  }
}

TEST(an_exception_in_a_thread_reaches_the_caller) {
  for (const int threads : {1, 3}) {
    try {
      parallel_for(100, threads, [](int64_t i, int) { if (i == 57) throw std::runtime_error("57"); });
      CHECK(false);
    } catch (const std::runtime_error& e) {
      CHECK(std::string(e.what()) == "57");
    }
  }
}

#if !defined(__SANITIZE_THREAD__)
// Address space of which only what is asked for can be touched.
class Sparse {
 public:
  explicit Sparse(int64_t bytes) : size_(bytes) {
    data_ = static_cast<char*>(mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    CHECK(data_ != MAP_FAILED);
  }
  ~Sparse() { munmap(data_, size_); }
  char* open(int64_t from, int64_t bytes) const {
    const int64_t page = sysconf(_SC_PAGESIZE), first = from / page * page, last = (from + bytes + page - 1) / page * page;
    CHECK(mprotect(data_ + first, last - first, PROT_READ | PROT_WRITE) == 0);
    return data_ + from;
  }
  char* data() const { return data_; }

 private:
  char* data_;
  int64_t size_;
};

// A copy of `x` whose rows, heads and sequences lie so far apart that element numbers leave 32 bits.
static View far_apart(const Array& x, Sparse& memory) {
  View far = x.view;
  const int64_t row = (int64_t{1} << 26) + 3;
  far.data = memory.data();
  far.stride[3] = 1;
  far.stride[2] = row;
  far.stride[1] = row * x.view.shape[2];
  far.stride[0] = far.stride[1] * x.view.shape[1];
  const int64_t bytes = dtype_bytes(x.view.dtype);
  for (int64_t a = 0; a < x.view.shape[0]; ++a)
    for (int64_t b = 0; b < x.view.shape[1]; ++b)
      for (int64_t c = 0; c < x.view.shape[2]; ++c) {
        char* to = memory.open((a * far.stride[0] + b * far.stride[1] + c * far.stride[2]) * bytes, x.view.shape[3] * bytes);
        for (int64_t d = 0; d < x.view.shape[3]; ++d) std::memcpy(to + d * bytes, at(x.view, a, b, c, d), bytes);
      }
  return far;
}

TEST(arrays_of_more_than_2_to_the_31_elements) {
  each_level([&](const std::string& level) {
    for (int seed = 0; seed < 6; ++seed)
      for (const Kind kind : {BLOCKS, RANGES, ROWS, TOP_K})
        for (const DType dtype : {F32, BF16}) {
          Random random(seed + 31);
          Problem p(random, kind, dtype);
          note(level + ", seed " + std::to_string(seed) + ": " + p.text);
          p.run();
          const std::vector<float> lse = p.lse;
          const std::vector<int32_t> index = p.index;
          const int64_t rows = 2 * 6 * 150, most = rows * ((int64_t{1} << 26) + 3) * 4 + (1 << 20);
          Sparse q(most), k(most), v(most), out(most);
          p.call.q = far_apart(p.q, q);
          p.call.k = far_apart(p.k, k);
          p.call.v = far_apart(p.v, v);
          Array near = p.out;
          p.out.view = far_apart(p.out, out);
          p.run();
          CHECK(std::memcmp(lse.data(), p.lse.data(), lse.size() * 4) == 0);
          CHECK(index == p.index);
          for (int64_t b = 0; b < p.batch(); ++b)
            for (int64_t h = 0; h < p.heads(); ++h)
              for (int64_t i = 0; i < p.q_len(); ++i)
                for (int64_t c = 0; c < p.call.v.shape[3]; ++c) {
                  const double x = near.get(b, h, i, c), y = p.out.get(b, h, i, c);
                  CHECK(x == y || (std::isnan(x) && std::isnan(y)));
                }
        }
  });
}

// Packed keys and values beyond 2^31 elements: the last panel of 1.6 billion keys, through each kernel of a tile.
TEST(panels_beyond_2_to_the_31_elements) {
  constexpr int32_t D = 16, ROWS = 5, LAST = 100'000'000;
  const int64_t bytes = (int64_t{LAST} + 1) * PANEL_KEYS * D * 4;
  Sparse keys(2 * bytes), values(2 * bytes), clean(2 * bytes), packed_values(2 * bytes), dk(2 * bytes), dv(2 * bytes);
  const auto open = [&](Sparse& x, int64_t per_key, int64_t size) {
    for (const int64_t panel : {int64_t{0}, int64_t{LAST}}) x.open(panel * PANEL_KEYS * per_key * size, PANEL_KEYS * per_key * size);
  };
  for (Sparse* x : {&keys, &values, &clean, &packed_values, &dk, &dv}) open(*x, D, 4);
  Random random(5);
  const int32_t panel[] = {0, LAST};
  const uint16_t keep[] = {0xffff, 0xffff};
  const uint8_t masked[] = {0, 0};
  std::vector<float> q(ROWS * D), o(16 * 16), m(ROWS), l(ROWS);
  for (float& x : q) x = static_cast<float>(random.normal());
  float* k[] = {reinterpret_cast<float*>(keys.data()), reinterpret_cast<float*>(keys.data()) + int64_t{LAST} * PANEL_KEYS * D};
  float* v[] = {reinterpret_cast<float*>(values.data()), reinterpret_cast<float*>(values.data()) + int64_t{LAST} * PANEL_KEYS * D};
  for (int i = 0; i < PANEL_KEYS * D; ++i)
    for (int p = 0; p < 2; ++p) {
      k[p][i] = static_cast<float>(random.normal());
      v[p][i] = static_cast<float>(random.normal());
    }
  const int64_t low[ROWS] = {}, kv_len = (int64_t{LAST} + 1) * PANEL_KEYS;
  int64_t high[ROWS];
  for (int64_t& x : high) x = kv_len;
  Tile t{};
  t.rows = ROWS;
  t.d = t.dv = D;
  t.q = q.data();
  t.panels = 2;
  t.panel = panel;
  t.keep = keep;
  t.masked = masked;
  t.low = low;
  t.high = high;
  t.k = keys.data();
  t.v = values.data();
  t.v_stride = D;
  t.kv_len = kv_len;
  t.scale = 0.25f;
  t.o = o.data();
  t.m = m.data();
  t.l = l.data();
  each_level([&](const std::string& level) {
    note(level);
    const Kernels& kernel = kernels();
    alignas(64) static char scratch[1 << 20];
    CHECK(kernel.tile_scratch(D, D, false) <= 1 << 20 && kernel.gradient_scratch(D, D) <= 1 << 20);
    t.scratch = scratch;
    kernel.attend(t);
    std::vector<float> near(16 * 16), near_m(ROWS), near_l(ROWS), packed;
    std::vector<float> together(2 * PANEL_KEYS * D), together_v(2 * PANEL_KEYS * D);
    for (int p = 0; p < 2; ++p) {
      std::memcpy(together.data() + p * PANEL_KEYS * D, k[p], PANEL_KEYS * D * 4);
      std::memcpy(together_v.data() + p * PANEL_KEYS * D, v[p], PANEL_KEYS * D * 4);
    }
    const int32_t both[] = {0, 1};
    Tile small = t;
    small.k = together.data();
    small.v = together_v.data();
    small.panel = both;
    small.kv_len = 2 * PANEL_KEYS;
    small.o = near.data();
    small.m = near_m.data();
    small.l = near_l.data();
    kernel.attend(small);
    CHECK(std::memcmp(o.data(), near.data(), ROWS * D * 4) == 0);

    uint64_t best[ROWS * 3], near_best[ROWS * 3];
    int64_t count[ROWS] = {}, computed[ROWS] = {};
    float least[ROWS];
    std::fill_n(least, ROWS, std::nanf(""));
    const int32_t order[] = {LAST / BLOCK_PANELS, 0};
    // the list of panels of top-k has no gaps, so it begins late
    const int32_t late[] = {LAST};
    TopKTile x{};
    x.tile = t;
    x.tile.panels = 1;
    x.tile.panel = late;
    x.top_k = 3;
    x.blocks = 1;
    x.order = order;
    x.first_block = LAST / BLOCK_PANELS;
    x.best = best;
    x.count = count;
    x.least = least;
    x.computed = computed;
    kernel.top_k(x);
    TopKTile y = x;
    const int32_t zero[] = {0};
    y.tile.k = k[1];
    y.tile.panel = zero;
    y.order = zero;
    y.first_block = 0;
    y.best = near_best;
    std::fill_n(count, ROWS, 0);
    std::fill_n(least, ROWS, std::nanf(""));
    kernel.top_k(y);
    for (int i = 0; i < ROWS * 3; ++i) {
      CHECK(best[i] >> 32 == near_best[i] >> 32);
      CHECK(static_cast<int64_t>(~static_cast<uint32_t>(best[i])) == int64_t{LAST} * PANEL_KEYS + ~static_cast<uint32_t>(near_best[i]));
    }

    std::vector<float> lse(ROWS, 1.0f), shift(ROWS, 0.5f), pull(ROWS * D, 0.1f), dq(ROWS * D), near_dq(ROWS * D);
    TileGradient g{};
    g.tile = t;
    g.lse = lse.data();
    g.shift = shift.data();
    g.d_out = pull.data();
    g.q_clean = q.data();
    g.k_rows = reinterpret_cast<float*>(values.data());  // any finite rows
    g.v_panels = reinterpret_cast<float*>(keys.data());
    g.dq = dq.data();
    g.dk = reinterpret_cast<float*>(dk.data());
    g.dv = reinterpret_cast<float*>(dv.data());
    for (float* to : {g.dk, g.dv})
      for (const int64_t p : {int64_t{0}, int64_t{LAST}}) std::memset(to + p * PANEL_KEYS * D, 0, PANEL_KEYS * D * 4);
    kernel.gradient(g);
    TileGradient n = g;
    std::vector<float> near_dk(2 * PANEL_KEYS * D), near_dv(2 * PANEL_KEYS * D);
    n.tile = small;
    n.k_rows = together_v.data();
    n.v_panels = together.data();
    n.dq = near_dq.data();
    n.dk = near_dk.data();
    n.dv = near_dv.data();
    kernel.gradient(n);
    CHECK(std::memcmp(dq.data(), near_dq.data(), ROWS * D * 4) == 0);
    CHECK(std::memcmp(g.dk + int64_t{LAST} * PANEL_KEYS * D, near_dk.data() + PANEL_KEYS * D, PANEL_KEYS * D * 4) == 0);
    CHECK(std::memcmp(g.dv + int64_t{LAST} * PANEL_KEYS * D, near_dv.data() + PANEL_KEYS * D, PANEL_KEYS * D * 4) == 0);
  });
}
#endif
