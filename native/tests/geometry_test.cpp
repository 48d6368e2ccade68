// Summaries of key blocks and the key sketch against their definitions as plain loops over doubles, between guard pages.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <thread>

#include "kernels.h"
#include "level.h"
#include "summary.h"

using namespace sieve;

namespace {

#if defined(__SANITIZE_THREAD__)
constexpr int CASES = 12;
#else
constexpr int CASES = 80;
#endif

constexpr double UNIT = 0x1p-24, LARGEST = 3.4028234e38, SMALLEST = 0x1p-126;
const View absent{nullptr, F32, {0, 0, 0, 0}, {0, 0, 0, 0}};

struct Keys {
  Array key, mask;
  int64_t batch, heads, len, d;
  KeyKind kind;
  Keys(Random& random, DType dtype, int64_t most) {
    const int64_t widths[] = {1, 7, 8, 16, 20, 33, 64, 80, 100, 128}, lengths[] = {1, 2, 15, 16, 17, 31, 63, 65, 90, 150};
    batch = random.between(1, 2);
    heads = random.between(1, 2);
    len = std::min(most, lengths[random.below(10)]);
    d = widths[random.below(10)];
    kind = static_cast<KeyKind>(random.below(KEY_KINDS));
    key = make(random, dtype, {batch, heads, len, d}, static_cast<Layout>(random.below(LAYOUTS)));
    fill_keys(random, key, kind);
    if (random.chance(0.7)) return;
    mask = make(random, U8, {batch, 1, 1, len}, random.chance(0.5) ? CONTIGUOUS : STRIDED);
    const double share = random.chance(0.3) ? 0.1 : 0.7;
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t j = 0; j < len; ++j) mask.set(b, 0, 0, j, random.chance(share));
  }
  bool takes_part(int64_t b, int64_t j) const { return !mask.memory || mask.get(b, 0, 0, j) != 0; }
  bool sound(int64_t b, int64_t h, int64_t j) const {
    for (int64_t c = 0; c < d; ++c)
      if (!std::isfinite(key.get(b, h, j, c))) return false;
    return true;
  }
  bool counts(int64_t b, int64_t h, int64_t j) const { return takes_part(b, j) && sound(b, h, j); }
  View mask_view() const { return mask.memory ? mask.view : absent; }
};

// At least `truth`, and above it by no more than `terms` roundings.
bool just_above(double got, double truth, double terms) {
  if (std::isinf(got)) return truth * (1 + terms * UNIT) >= LARGEST;
  return got >= truth && got <= truth * (1 + terms * UNIT) + 1e-44;
}

void check_blocks(const Keys& k, const Summary& s) {
  for (int64_t b = 0; b < k.batch; ++b)
    for (int64_t h = 0; h < k.heads; ++h)
      for (int64_t n = 0; n < s.blocks; ++n) {
        const int64_t first = n * s.size, last = std::min(k.len, first + s.size);
        std::vector<int64_t> there;
        int64_t count = 0;
        for (int64_t j = first; j < last; ++j) {
          count += k.takes_part(b, j);
          if (k.counts(b, h, j)) there.push_back(j);
        }
        const double keys = std::max<double>(1.0, static_cast<double>(there.size()));
        CHECK(entry<int32_t>(s.count, 0, b, h, n) == count);
        double longest = 0, apart = 0;
        bool fits = true;
        for (const int64_t j : there) {
          double square = 0;
          for (int64_t c = 0; c < k.d; ++c) square += k.key.get(b, h, j, c) * k.key.get(b, h, j, c);
          longest = std::max(longest, std::sqrt(square));
        }
        const bool finite = s.finite.get(0, b, h, n) != 0;
        for (int64_t c = 0; c < k.d; ++c) {
          double sum = 0, size = 0, low = INFINITY, high = -INFINITY;
          for (const int64_t j : there) {
            const double x = k.key.get(b, h, j, c);
            sum += x;
            size += std::fabs(x);
            low = std::min(low, x);
            high = std::max(high, x);
          }
          fits &= size < LARGEST;
          CHECK(s.low.get(b, h, n, c) == (there.empty() ? 0.0 : low));
          CHECK(s.high.get(b, h, n, c) == (there.empty() ? 0.0 : high));
          const double mean = s.mean.get(b, h, n, c);
          CHECK(finite ? std::fabs(mean - sum / keys) <= (keys + 2) * UNIT * size / keys + 1e-44 : mean == 0.0);
        }
        const bool all_sound = static_cast<int64_t>(there.size()) == count;
        CHECK(all_sound ? finite || !fits || longest * (1 + 64 * UNIT + k.d * UNIT) >= LARGEST : !finite);
        for (const int64_t j : there) {
          double square = 0;
          for (int64_t c = 0; c < k.d; ++c) {
            const double x = k.key.get(b, h, j, c) - s.mean.get(b, h, n, c);
            square += x * x;
          }
          apart = std::max(apart, std::sqrt(square));
        }
        CHECK(just_above(s.key_norm.get(0, b, h, n), longest, 3 * static_cast<double>(k.d) + 32));
        CHECK(just_above(s.radius.get(0, b, h, n), apart, 3 * static_cast<double>(k.d) + 32));
      }
}

// The root mean square of the first 64 keys that take part; those that are not finite count as zeros.
void check_channel_scale(const Keys& k, const Summary& s) {
  for (int64_t b = 0; b < k.batch; ++b)
    for (int64_t h = 0; h < k.heads; ++h) {
      std::vector<double> square(k.d, 0.0);
      double largest = 0;
      int64_t n = 0;
      for (int64_t j = 0; j < k.len && n < 64; ++j) {
        if (!k.takes_part(b, j)) continue;
        ++n;
        if (!k.sound(b, h, j)) continue;
        for (int64_t c = 0; c < k.d; ++c) {
          const double x = k.key.get(b, h, j, c);
          square[c] += x * x / std::max<double>(1, static_cast<double>(std::min<int64_t>(64, k.len)));
          largest = std::max(largest, std::fabs(x));
        }
      }
      for (double& x : square) x *= static_cast<double>(std::min<int64_t>(64, k.len)) / std::max<double>(1, static_cast<double>(n));
      for (int64_t c = 0; c < k.d; ++c) {
        const double truth = largest > 0 ? std::max(std::sqrt(square[c]), 0x1p-10 * largest) : 1.0;
        CHECK(std::fabs(s.channel_scale.get(0, b, h, c) - truth) <= 1e-5 * truth + 2e-45);
      }
    }
}

float to_half(Random& random, float x) {
  Array one = make(random, F16, {1, 1, 1, 1}, CONTIGUOUS);
  one.set(0, 0, 0, 0, x);
  return static_cast<float>(one.get(0, 0, 0, 0));
}

// The code is the quotient of the key's scale, and the scale is that of the clip that loses least.
void check_codes(Random& random, const Keys& k, const Summary& s) {
  const std::vector<std::vector<float>> clips{{1.0f, 0.95f}, {0.6f, 0.5f, 0.4f, 0.3f, 0.2f}, {0.9f, 0.75f, 0.65f, 0.55f, 0.45f},
                                              {1.0f, 0.9f, 0.8f, 0.7f, 0.6f}, {1.0f, 0.92f, 0.84f, 0.76f}};
  const float levels = static_cast<float>((1 << s.bits) - 1), top = levels / 2.0f;
  for (int64_t b = 0; b < k.batch; ++b)
    for (int64_t h = 0; h < k.heads; ++h)
      for (int64_t j = 0; j < k.len; ++j) {
        const bool counts = k.counts(b, h, j);
        const double chosen = s.scale.get(0, b, h, j);
        std::vector<float> white(k.d, 0.0f);
        float peak = 0.0f;
        for (int64_t c = 0; c < k.d && counts; ++c) {
          white[c] = static_cast<float>(k.key.get(b, h, j, c)) / static_cast<float>(s.channel_scale.get(0, b, h, c));
          peak = std::max(peak, std::fabs(white[c]));
        }
        const auto code_by = [&](float step, int64_t c) {
          const float x = std::floor(white[c] / (step > 0 ? step : 1.0f) + (top + 0.5f));
          return std::min(std::max(x, 0.0f), levels);
        };
        double least = INFINITY, mine = INFINITY;
        for (const float clip : clips[s.bits <= 4 ? s.bits : 0]) {
          const float step = to_half(random, std::min(clip * peak / top, 65504.0f));
          double lost = 0;
          for (int64_t c = 0; c < k.d; ++c) {
            const double x = (static_cast<double>(code_by(step, c)) - top) * step - white[c];
            lost += x * x;
          }
          least = std::min(least, lost);
          if (step == chosen) mine = std::min(mine, lost);
        }
        CHECK(mine <= least * (1 + 1e-4) + 1e-10 * k.d * peak * peak);
        double plain = 0, metric = 0;
        for (int64_t c = 0; c < k.d; ++c) {
          CHECK(s.code(b, h, j, c, s.bits) == static_cast<int>(code_by(static_cast<float>(chosen), c)));
          const double apart = counts ? k.key.get(b, h, j, c) - s.decoded(b, h, j, c) : 0.0;
          const double by = apart / s.channel_scale.get(0, b, h, c);
          plain += apart * apart;
          metric += by * by;
        }
        for (int64_t c = k.d; c % 8; ++c) CHECK(s.code(b, h, j, c, s.bits) == 0);
        for (const auto& [bound, truth] : {std::pair{s.error.get(0, b, h, j), std::sqrt(plain)},
                                           std::pair{s.metric_error.get(0, b, h, j), std::sqrt(metric)}}) {
          CHECK(bound >= truth);
          CHECK(std::isinf(bound) ? truth > 65000 : bound <= truth * (1 + 0x1p-9) + 0x1p-23);
          CHECK(truth > 0 || bound == 0);
        }
      }
}

// At most the square of the largest singular value of the rows, and nearly so.
double top_square(const std::vector<std::vector<double>>& rows) {
  const size_t d = rows[0].size();
  double most = 0, best = 0;
  std::vector<double> v(d);
  for (const auto& row : rows)
    for (const double x : row) most = std::max(most, std::fabs(x));
  if (most == 0) return 0;
  for (const auto& row : rows) {
    double square = 0;
    for (const double x : row) square += x / most * (x / most);
    if (square > best) {
      best = square;
      v = row;
    }
  }
  double value = 0;
  for (int step = 0; step < 40; ++step) {
    double norm = 0;
    for (const double x : v) norm += x / most * (x / most);
    norm = std::sqrt(norm) * most;
    std::vector<double> next(d, 0.0);
    value = 0;
    for (const auto& row : rows) {
      double dot = 0;
      for (size_t c = 0; c < d; ++c) dot += row[c] / most * (v[c] / norm);
      value += dot * dot;
      for (size_t c = 0; c < d; ++c) next[c] += dot * (row[c] / most);
    }
    v = next;
    for (double& x : v) x *= most;
  }
  return value * most * most;
}

void check_spectral(const Keys& k, const Summary& s) {
  for (int64_t b = 0; b < k.batch; ++b)
    for (int64_t h = 0; h < k.heads; ++h)
      for (int64_t n = 0; n < s.blocks; ++n)
        for (const bool metric : {false, true}) {
          std::vector<std::vector<double>> rows;
          for (int64_t j = n * s.size; j < std::min(k.len, (n + 1) * s.size); ++j) {
            rows.emplace_back(k.d, 0.0);
            for (int64_t c = 0; c < k.d && k.counts(b, h, j); ++c)
              rows.back()[c] = (k.key.get(b, h, j, c) - s.decoded(b, h, j, c)) / (metric ? s.channel_scale.get(0, b, h, c) : 1.0);
          }
          const double truth = top_square(rows), bound = (metric ? s.metric_spectral : s.spectral).get(0, b, h, n);
          const double order = static_cast<double>(std::min(k.d, s.size));
          CHECK(bound >= truth);
          CHECK(std::isinf(bound) ? truth > 1e36 : bound <= truth * std::pow(order, 0.125) * 1.15 + 1.001 * SMALLEST);
        }
}

void build(const Summary& s) { build_geometry(s.task); }

}  // namespace

TEST(summaries_are_their_definitions) {
  each_level([](const std::string& level) {
    for (int n = 0; n < CASES; ++n)
      for (const DType dtype : {F32, F16, BF16}) {
        Random random(n * 3 + dtype + 1);
        const int64_t sizes[] = {1, 4, 7, 16, 24, 32, 64, 128, 300};
        const Keys k(random, dtype, n % 4 ? 60 : 150);
        const int bits = static_cast<int>(random.between(0, 8));
        const Summary s(random, k.key.view, k.mask_view(), sizes[random.below(9)], bits, random.chance(0.6));
        note(level + ", case " + std::to_string(n) + ", dtype " + std::to_string(dtype) + ", kind " + std::to_string(k.kind) + " [" +
             std::to_string(k.batch) + ", " + std::to_string(k.heads) + ", " + std::to_string(k.len) + ", " + std::to_string(k.d) +
             "] blocks of " + std::to_string(s.size) + ", bits " + std::to_string(bits));
        build(s);
        check_blocks(k, s);
        if (!bits) continue;
        check_channel_scale(k, s);
        check_codes(random, k, s);
        if (s.spectral.memory) check_spectral(k, s);
      }
  });
}

// What a sequence goes on with has the channel scale of its first keys, and then the same bits as if it were built whole.
TEST(appended_keys_get_the_bits_of_the_whole) {
  each_level([](const std::string& level) {
    for (int n = 0; n < CASES / 3; ++n) {
      Random random(n + 7);
      const DType dtype = static_cast<DType>(n % 3);
      const int64_t sizes[] = {1, 4, 16, 24, 64}, size = sizes[random.below(5)], d = random.between(1, 70), len = random.between(100, 220);
      note(level + ", case " + std::to_string(n));
      Array key = make(random, dtype, {2, 2, len, d}, static_cast<Layout>(random.below(LAYOUTS)));
      fill_keys(random, key, n % 2 ? BROKEN : OUTLIERS);
      const int bits = static_cast<int>(random.between(1, 8));
      const Summary whole(random, key.view, absent, size, bits, true);
      build(whole);
      const int64_t start = (64 + size - 1) / size * size;
      View front = key.view, rest = key.view;
      front.shape[2] = start;
      rest.data = at(key.view, 0, 0, start, 0);
      rest.shape[2] = len - start;
      if (rest.shape[2] <= 0) continue;
      const Summary before(random, front, absent, size, bits, true);
      Summary after(random, rest, absent, size, bits, true);
      build(before);
      after.channel_scale = moved(random, before.channel_scale, CONTIGUOUS);
      after.task.channel_scale = static_cast<float*>(after.channel_scale.view.data);
      after.task.scale_is_given = true;
      build(after);
      // in place: behind blocks that are there already, which stay as they are
      Summary grown(random, key.view, absent, size, bits, true);
      grown.channel_scale = moved(random, before.channel_scale, CONTIGUOUS);
      grown.task.channel_scale = static_cast<float*>(grown.channel_scale.view.data);
      grown.task.scale_is_given = true;
      grown.task.key = rest;
      grown.task.first_block = start / size;
      grown.task.room_blocks = grown.blocks;
      grown.task.room_keys = len;
      std::vector<Array> held;
      for (const Array* x : grown.arrays()) held.push_back(moved(random, *x, CONTIGUOUS));
      build(grown);
      CHECK(same_bits(before.channel_scale, whole.channel_scale));
      const std::vector<const Array*> all = whole.arrays(), first = before.arrays(), second = after.arrays(), in_place = grown.arrays();
      for (size_t i = 0; i < all.size(); ++i) {
        if (all[i] == &whole.channel_scale) continue;
        const bool by_row = all[i]->view.shape[0] == 1 || all[i] == &whole.planes;  // its last axis grows, else the third
        View head = all[i]->view, tail = head;
        const int axis = by_row ? 3 : 2;
        head.shape[axis] = first[i]->view.shape[axis];
        tail.shape[axis] = second[i]->view.shape[axis];
        CHECK(head.shape[axis] + tail.shape[axis] == all[i]->view.shape[axis]);
        tail.data = axis == 3 ? at(tail, 0, 0, 0, head.shape[3]) : at(tail, 0, 0, head.shape[2], 0);
        CHECK(same_bits(Array{head, nullptr}, *first[i]));
        CHECK(same_bits(Array{tail, nullptr}, *second[i]));
        View kept = held[i].view, same = in_place[i]->view, written = same;
        kept.shape[axis] = same.shape[axis] = head.shape[axis];
        written.shape[axis] = tail.shape[axis];
        written.data = axis == 3 ? at(written, 0, 0, 0, head.shape[3]) : at(written, 0, 0, head.shape[2], 0);
        CHECK(same_bits(Array{same, nullptr}, Array{kept, nullptr}));
        CHECK(same_bits(Array{written, nullptr}, Array{tail, nullptr}));
      }
    }
  });
}

TEST(summaries_have_the_same_bits_on_any_threads) {
  each_level([](const std::string& level) {
    note(level);
    Random random(3);
    Array key = make(random, BF16, {1, 2, 2500, 24}, TRANSPOSED);
    fill_keys(random, key, BROKEN);
    std::vector<std::unique_ptr<Summary>> all;
    for (int i = 0; i < 4; ++i) {
      all.push_back(std::make_unique<Summary>(random, key.view, absent, 16, 4, true));
      all.back()->task.threads = 1 + i % 3;
    }
    std::vector<std::thread> threads;
    for (auto& s : all) threads.emplace_back([&s] { for (int i = 0; i < 2; ++i) build(*s); });
    for (auto& t : threads) t.join();
    for (auto& s : all)
      for (size_t i = 0; i < s->arrays().size(); ++i) CHECK(same_bits(*s->arrays()[i], *all[0]->arrays()[i]));
  });
}

TEST(a_run_of_blocks_touches_its_scratch_alone) {
  each_level([](const std::string& level) {
    for (int n = 0; n < 60; ++n) {
      Random random(n + 1);
      const int64_t sizes[] = {1, 3, 4, 16, 24, 64, 128, 257, 300}, size = sizes[n % 9], len = random.between(1, 2 * size + 3);
      Array key = make(random, F32, {1, 1, len, random.between(1, 140)}, CONTIGUOUS);
      fill_keys(random, key, GAUSSIAN);
      const Summary s(random, key.view, absent, size, static_cast<int>(random.between(1, 8)), true);
      note(level + ", case " + std::to_string(n));
      build(s);
      const Kernels& k = kernels();
      Guarded scratch(up(k.key_run_scratch(size, static_cast<int32_t>(s.d)), 16) * 4, true);
      KeyRun r{&key.view, 0, 0, 0, s.blocks, size, nullptr, static_cast<int32_t>(s.d), s.bits, s.task.channel_scale, s.task.count,
               s.task.finite, s.task.mean, s.task.key_norm, s.task.radius, s.task.low, s.task.high, s.task.planes,
               len * ((s.d + 7) / 8), s.task.scale, s.task.error, s.task.metric_error, s.task.spectral, s.task.metric_spectral,
               reinterpret_cast<float*>(scratch.data())};
      k.summarise(r);
    }
  });
}
