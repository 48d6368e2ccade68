// Ternary products: reads activations once, chooses between tables (few tokens) and decoded tiles (many), scales the sums.
#include "ternary.h"

#include <algorithm>

#include "buffer.h"
#include "kernels.h"
#include "level.h"
#include "parallel.h"

namespace sieve {

namespace {

constexpr int64_t FEW = 4;                      // tokens that one call of a table kernel takes
constexpr int64_t BLOCKS = 4;                   // row blocks that one call takes
constexpr int64_t WORK = int64_t{1} << 21;      // products below which another thread costs more than it brings

struct Product {
  const Kernels& k;
  const TernaryWeights& w;
  const View& x;
  const View& out;
  int64_t tokens, groups, blocks;
  int threads;

  int64_t padded() const { return groups * TERNARY_COLUMNS; }
  const uint8_t* codes(int64_t block) const { return w.codes + block * groups * TERNARY_BYTES; }
  void read(int64_t first, int64_t last, float* rows) const { k.read_rows(x, 0, 0, first, last, padded(), false, rows); }

  // Sums of one token over some row blocks, scaled, as a piece of the output's row.
  void write(const void* sums, bool integer, int64_t token, int64_t first_block, int64_t count, float scale, float* line) const {
    const int64_t first = first_block * TERNARY_ROWS, last = std::min(w.rows, first + count * TERNARY_ROWS);
    k.ternary_write(sums, integer, last - first, w.alpha + first * w.alpha_stride, w.alpha_stride, scale, line,
                    at(out, 0, 0, token, first), out.stride[3], out.dtype);
  }
};

// Tables of every pair of columns, or what else the level makes of a token, then one pass over the weights.
void few(const Product& p) {
  const int64_t table = p.k.ternary_table_floats(p.groups), row = BLOCKS * TERNARY_ROWS;
  const int preparing = static_cast<int>(std::min<int64_t>(p.threads, p.tokens));
  Buffer<float> tables(p.tokens * table), x(preparing * p.padded());
  parallel_for(p.tokens, preparing, [&](int64_t t, int thread) {
    float* token = x.get() + thread * p.padded();
    p.read(t, t + 1, token);
    p.k.ternary_tables(token, p.groups, p.w.fewest, tables.get() + t * table);
  });
  Buffer<float> space(p.threads * FEW * row);
  parallel_for((p.blocks + BLOCKS - 1) / BLOCKS, p.threads, [&](int64_t item, int thread) {
    float* sums = space.get() + thread * FEW * row;
    const int64_t first = item * BLOCKS, count = std::min(BLOCKS, p.blocks - first);
    for (int64_t t = 0; t < p.tokens; t += FEW) {
      const int64_t together = std::min(FEW, p.tokens - t);
      p.k.ternary_few(TernaryTask{p.codes(first), count, p.groups, together, tables.get() + t * table, table, 1, sums, row, nullptr});
      for (int64_t i = 0; i < together; ++i) p.write(sums + i * row, false, t + i, first, count, 1.0f, sums + i * row);
    }
  });
}

// Blocks of tokens times strips of row blocks. `from(token)` is where a block of tokens begins.
template <class From>
void strips(const Product& p, bool integer, int64_t parts, int64_t x_stride, const float* scale, From from) {
  const int64_t columns = p.k.ternary_many_blocks, wide = (p.blocks + columns - 1) / columns, row = columns * TERNARY_ROWS;
  const int64_t high = (p.tokens + TERNARY_TOKENS - 1) / TERNARY_TOKENS, part = TERNARY_TOKENS * row, each = part + p.k.ternary_scratch_floats;
  Buffer<float> space(p.threads * each);
  parallel_for(wide * high, p.threads, [&](int64_t item, int thread) {
    float* sums = space.get() + thread * each;
    const int64_t first = item % wide * columns, count = std::min(columns, p.blocks - first);
    const int64_t token = item / wide * TERNARY_TOKENS, together = std::min<int64_t>(TERNARY_TOKENS, p.tokens - token);
    const TernaryTask task{p.codes(first), count, p.groups, together, from(token), x_stride, parts, sums, row, sums + part};
    (integer ? p.k.ternary_many_int8 : p.k.ternary_many)(task);
    for (int64_t t = 0; t < together; ++t)
      p.write(sums + t * row, integer, token + t, first, count, scale ? scale[token + t] : 1.0f, sums + part);
  });
}

void many(const Product& p) {
  const int64_t padded = p.padded();
  if (!p.k.ternary_tiles) {
    const bool as_is = p.x.dtype == F32 && p.x.stride[3] == 1 && p.w.columns == padded;
    Buffer<float> rows(as_is ? 0 : p.tokens * padded);
    if (!as_is) p.read(0, p.tokens, rows.get());
    const float* x = as_is ? static_cast<const float*>(p.x.data) : rows.get();
    const int64_t stride = as_is ? p.x.stride[2] : padded;
    return strips(p, false, 1, stride, nullptr, [=](int64_t token) { return x + token * stride; });
  }
  const int64_t parts = p.x.dtype == BF16 ? 1 : p.x.dtype == F16 ? 2 : 3;
  const int64_t wide = up(p.groups, 2) * TERNARY_COLUMNS * parts, height = up(p.tokens, 16);
  Buffer<uint16_t> split(height * wide);
  Buffer<float> rows(p.threads * 16 * padded);
  parallel_for(height / 16, p.threads, [&](int64_t i, int thread) {
    float* x = rows.get() + thread * 16 * padded;
    const int64_t last = std::min(p.tokens, (i + 1) * 16);
    p.read(i * 16, last, x);
    p.k.ternary_split(x, padded, last - i * 16, p.groups, parts, split.get() + i * 16 * wide);
  });
  const uint16_t* x = split.get();
  strips(p, false, parts, 0, nullptr, [=](int64_t token) { return x + token * wide; });
}

// Sums are integers; their scale is that of the token times alpha.
void eight_bit(const Product& p) {
  const bool tiles = p.k.ternary_tiles && p.tokens > FEW;
  const int64_t wide = up(p.groups, 4) * TERNARY_COLUMNS, height = tiles ? up(p.tokens, 16) : p.tokens;
  Buffer<int8_t> q(height * wide);
  Buffer<float> scale(height), rows(p.threads * p.padded());
  Buffer<int8_t> lines(p.threads * wide);
  parallel_for(height, p.threads, [&](int64_t t, int thread) {
    float* x = rows.get() + thread * p.padded();
    int8_t* line = tiles ? lines.get() + thread * wide : q.get() + t * wide;
    std::fill_n(line, wide, int8_t{0});
    if (t < p.tokens) {
      p.read(t, t + 1, x);
      scale[t] = p.k.ternary_round(x, p.w.columns, line);
    }
    if (tiles)  // tiles of 16 tokens and 64 columns lie in one piece
      for (int64_t c = 0; c < wide; c += 64) std::copy_n(line + c, 64, q.get() + (t / 16 * (wide / 64) + c / 64) * 1024 + t % 16 * 64);
  });
  const int8_t* x = q.get();
  if (tiles) return strips(p, true, 1, 0, scale.get(), [=](int64_t token) { return x + token * wide; });
  const int64_t row = BLOCKS * TERNARY_ROWS;
  Buffer<int32_t> space(p.threads * FEW * row);
  Buffer<float> line(p.threads * row);
  parallel_for((p.blocks + BLOCKS - 1) / BLOCKS, p.threads, [&](int64_t item, int thread) {
    int32_t* sums = space.get() + thread * FEW * row;
    const int64_t first = item * BLOCKS, count = std::min(BLOCKS, p.blocks - first);
    for (int64_t token = 0; token < p.tokens; token += FEW) {
      const int64_t together = std::min(FEW, p.tokens - token);
      p.k.ternary_few_int8(TernaryTask{p.codes(first), count, p.groups, together, x + token * wide, wide, 1, sums, row, nullptr});
      for (int64_t t = 0; t < together; ++t)
        p.write(sums + t * row, true, token + t, first, count, scale[token + t], line.get() + thread * row);
    }
  });
}

}  // namespace

int64_t ternary_fewest(const uint8_t* codes, int64_t rows, int64_t columns) {
  const int64_t groups = (columns + TERNARY_COLUMNS - 1) / TERNARY_COLUMNS;
  int64_t fewest = columns;
  for (int64_t row = 0; row < rows; ++row) {
    const uint8_t* byte = codes + row / TERNARY_ROWS * groups * TERNARY_BYTES + row % TERNARY_ROWS;
    int64_t count = 0;
    for (int64_t i = 0; i < groups * 4; ++i) {
      const uint32_t other = byte[i * TERNARY_ROWS] ^ 0x55u;  // zeros of trits are code 1
      count += __builtin_popcount((other | other >> 1) & 0x55u);
    }
    fewest = std::min(fewest, count);
  }
  return fewest;
}

void ternary_linear(const TernaryWeights& w, const View& x, bool int8, const View& out, int threads) {
  const Kernels& k = kernels();
  const int64_t tokens = x.shape[2], groups = (w.columns + TERNARY_COLUMNS - 1) / TERNARY_COLUMNS;
  const int64_t blocks = (w.rows + TERNARY_ROWS - 1) / TERNARY_ROWS;
  const int64_t worth = 1 + tokens * w.rows * w.columns / WORK;
  const Product p{k, w, x, out, tokens, groups, blocks, static_cast<int>(std::clamp<int64_t>(worth, 1, std::max(threads, 1)))};
  if (int8)
    eight_bit(p);
  else if (tokens <= k.ternary_few_tokens)
    few(p);
  else
    many(p);
}

}  // namespace sieve
