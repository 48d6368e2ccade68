// Ternary products and the diagonal recurrence against loops in double precision, in memory between guard pages.
#include "ternary.h"

#include <cmath>
#include <cstring>

#include "level.h"
#include "diagonal_scan.h"
#include "test.h"

using namespace sieve;

namespace {

struct Matrix {
  int64_t rows, columns, groups, alphas;
  std::vector<int> trits;
  Guarded codes, alpha;
  Matrix(Random& random, int64_t r, int64_t c)
      : rows(r), columns(c), groups((c + 15) / 16), alphas(random.chance(0.5) ? r : 1), trits(r * c),
        codes((r + 31) / 32 * groups * 128, random.chance(0.5)), alpha(alphas * 4, random.chance(0.5)) {
    uint8_t* byte = reinterpret_cast<uint8_t*>(codes.data());
    std::memset(byte, 0x55, (r + 31) / 32 * groups * 128);
    for (int64_t i = 0; i < r; ++i)
      for (int64_t j = 0; j < c; ++j) {
        const int trit = trits[i * c + j] = static_cast<int>(random.below(3)) - 1;
        const int64_t shift = 2 * (j % 16 / 4);
        uint8_t& w = byte[((i / 32 * groups + j / 16) * 4 + j % 4) * 32 + i % 32];
        w = static_cast<uint8_t>((w & ~(3 << shift)) | (trit + 1) << shift);
      }
    for (int64_t i = 0; i < alphas; ++i) reinterpret_cast<float*>(alpha.data())[i] = static_cast<float>(0.5 + random.uniform());
  }
  double scale(int64_t row) const { return reinterpret_cast<const float*>(alpha.data())[alphas > 1 ? row : 0]; }
  TernaryWeights weights() const {
    const uint8_t* c = reinterpret_cast<const uint8_t*>(codes.data());
    return {c, rows, columns, reinterpret_cast<const float*>(alpha.data()), alphas > 1, ternary_fewest(c, rows, columns)};
  }
};

constexpr double UNIT[] = {6e-8, 5e-4, 4e-3};

void check_product(Random& random, const Matrix& m, int64_t tokens, DType dtype, bool int8, int threads) {
  Array x = make(random, dtype, {1, 1, tokens, m.columns}, static_cast<Layout>(random.below(REVERSED + 1)));
  Array out = make(random, dtype, {1, 1, tokens, m.rows}, static_cast<Layout>(random.below(REVERSED + 1)));
  fill(random, x);
  ternary_linear(m.weights(), x.view, int8, out.view, threads);
  for (int64_t t = 0; t < tokens; ++t) {
    float most = 0;
    for (int64_t j = 0; j < m.columns; ++j) most = std::fmax(most, std::fabs(static_cast<float>(x.get(0, 0, t, j))));
    const float step = most / 127.0f;
    for (int64_t i = 0; i < m.rows; ++i) {
      double sum = 0, size = 0;
      for (int64_t j = 0; j < m.columns; ++j) {
        const float y = static_cast<float>(x.get(0, 0, t, j));
        const double used = int8 ? (step > 0 ? std::nearbyintf(y / step) : 0.0) * step : y;
        sum += used * m.trits[i * m.columns + j];
        size += std::fabs(used);
      }
      const double exact = sum * m.scale(i);
      CHECK(std::fabs(out.get(0, 0, t, i) - exact) <= 1e-6 * (1 + size * m.scale(i)) + UNIT[dtype] * std::fabs(exact));
    }
  }
}

}  // namespace

TEST(ternary_products_are_their_sums) {
  each_level([](const std::string& level) {
    for (int n = 0; n < 60; ++n) {
      Random random(n);
      const int64_t rows = random.between(1, n % 7 ? 70 : 400), columns = random.between(1, n % 5 ? 90 : 700);
      const int64_t tokens = n % 3 ? random.between(1, 8) : random.between(1, 150);
      const DType dtype = static_cast<DType>(random.below(3));
      const bool int8 = random.chance(0.4);
      note(level + ", case " + std::to_string(n) + ": " + std::to_string(rows) + " x " + std::to_string(columns) + ", tokens " +
           std::to_string(tokens) + ", dtype " + std::to_string(dtype) + (int8 ? ", int8" : ""));
      const Matrix m(random, rows, columns);
      check_product(random, m, tokens, dtype, int8, static_cast<int>(random.between(1, 3)));
    }
  });
}

TEST(ternary_products_take_several_threads) {
  each_level([](const std::string& level) {
    Random random(5);
    const Matrix m(random, 900, 1100);
    for (const int64_t tokens : {1, 6, 140}) {
      note(level + ", tokens " + std::to_string(tokens));
      for (const bool int8 : {false, true}) check_product(random, m, tokens, F32, int8, 4);
    }
  });
}

TEST(the_diagonal_recurrence_is_its_loop) {
  each_level([](const std::string& level) {
    for (int n = 0; n < 40; ++n) {
      Random random(n);
      const int64_t batch = random.between(1, 3), length = random.between(1, 60), width = random.between(1, 150);
      note(level + ", case " + std::to_string(n));
      Array x = make(random, F32, {1, batch, length, width}, CONTIGUOUS), out = make(random, F32, {1, batch, length, width}, CONTIGUOUS);
      Array a = make(random, F32, {1, 1, 1, width}, CONTIGUOUS), start = make(random, F32, {1, 1, batch, width}, CONTIGUOUS);
      fill(random, x);
      fill(random, start);
      for (int64_t c = 0; c < width; ++c) a.set(0, 0, 0, c, std::tanh(random.normal()));
      const bool reverse = random.chance(0.5);
      diagonal_scan(x.view, static_cast<float*>(a.view.data), static_cast<float*>(start.view.data), out.view, reverse, 1 + n % 3);
      for (int64_t b = 0; b < batch; ++b)
        for (int64_t c = 0; c < width; ++c) {
          double h = start.get(0, 0, b, c);
          for (int64_t t = 0; t < length; ++t) {
            const int64_t at = reverse ? length - 1 - t : t;
            h = a.get(0, 0, 0, c) * h + x.get(0, b, at, c);
            CHECK(std::fabs(out.get(0, b, at, c) - h) <= 1e-5 * (1 + std::fabs(h)));
          }
        }
    }
  });
}
