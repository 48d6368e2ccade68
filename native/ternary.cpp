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
constexpr int64_t BLOCKS = 8;                   // row blocks that one call takes
constexpr int64_t TILE_TOKENS = 128;            // tokens whose sums stay in the cache while weights are decoded
constexpr int64_t WORK = int64_t{1} << 21;      // products below which another thread costs more than it brings

struct Product {
  const Kernels& k;
  const TernaryWeights& w;
  const View& x;
  const View& out;
  int64_t tokens, groups, blocks;
  int threads;

  const int32_t* codes(int64_t block) const { return w.codes + block * groups * TERNARY_ROWS; }

  // The sums of one token over rows first..last-1, scaled, as a row of the output.
  void write(float* sums, int64_t token, int64_t first_block, int64_t count, float token_scale) const {
    const int64_t first = first_block * TERNARY_ROWS, last = std::min(w.rows, first + count * TERNARY_ROWS);
    for (int64_t r = first; r < last; ++r) sums[r - first] *= w.alpha[r * w.alpha_stride] * token_scale;
    k.write_row(sums, last - first, at(out, 0, 0, token, first), out.stride[3], out.dtype);
  }
};

// Tables of every pair of columns, or what else the level makes of a token, then one pass over the weights.
void few(const Product& p, const float* x, int64_t padded) {
  const int64_t table = p.k.ternary_table_floats() * p.groups;
  Buffer<float> tables(p.tokens * table);
  for (int64_t t = 0; t < p.tokens; ++t) p.k.ternary_tables(x + t * padded, p.groups, tables.get() + t * table);
  const int64_t items = (p.blocks + BLOCKS - 1) / BLOCKS;
  Buffer<float> sums(p.threads * FEW * BLOCKS * TERNARY_ROWS);
  parallel_for(items, p.threads, [&](int64_t item, int thread) {
    float* mine = sums.get() + thread * FEW * BLOCKS * TERNARY_ROWS;
    const int64_t first = item * BLOCKS, count = std::min(BLOCKS, p.blocks - first);
    for (int64_t t = 0; t < p.tokens; t += FEW) {
      const int64_t together = std::min(FEW, p.tokens - t);
      p.k.ternary_few(TernaryTask{p.codes(first), count, p.groups, together, tables.get() + t * table, table, 1, mine,
                                  BLOCKS * TERNARY_ROWS, nullptr});
      for (int64_t i = 0; i < together; ++i) p.write(mine + i * BLOCKS * TERNARY_ROWS, t + i, first, count, 1.0f);
    }
  });
}

void many(const Product& p, const float* x, int64_t padded) {
  const bool tiles = p.k.ternary_tiles;
  const int64_t parts = p.x.dtype == BF16 ? 1 : p.x.dtype == F16 ? 2 : 3;
  const int64_t wide = up(p.groups, 2) * TERNARY_COLUMNS, height = up(p.tokens, 16);
  Buffer<uint16_t> split(tiles ? height * wide * parts : 0);
  if (tiles)
    parallel_for(height / 16, p.threads, [&](int64_t i, int) {
      p.k.ternary_split(x + i * 16 * padded, padded, std::min<int64_t>(16, p.tokens - i * 16), p.groups, parts,
                        split.get() + i * 16 * wide * parts);
    });
  const int64_t columns = p.k.ternary_many_blocks, items_wide = (p.blocks + columns - 1) / columns;
  const int64_t items_high = (p.tokens + TILE_TOKENS - 1) / TILE_TOKENS;
  const int64_t sum_count = TILE_TOKENS * columns * TERNARY_ROWS, scratch = p.k.ternary_scratch_floats;
  Buffer<float> space(p.threads * (sum_count + scratch));
  parallel_for(items_wide * items_high, p.threads, [&](int64_t item, int thread) {
    float* mine = space.get() + thread * (sum_count + scratch);
    const int64_t first = item % items_wide * columns, count = std::min(columns, p.blocks - first);
    const int64_t token = item / items_wide * TILE_TOKENS, together = std::min(TILE_TOKENS, p.tokens - token);
    const void* from = tiles ? static_cast<const void*>(split.get() + token * wide * parts) : x + token * padded;
    p.k.ternary_many(TernaryTask{p.codes(first), count, p.groups, together, from, padded, parts, mine, columns * TERNARY_ROWS,
                                 mine + sum_count});
    for (int64_t t = 0; t < together; ++t) p.write(mine + t * columns * TERNARY_ROWS, token + t, first, count, 1.0f);
  });
}

// Sums are integers; their scale is that of the token times alpha.
void eight_bit(const Product& p, const float* x, int64_t padded) {
  const bool tiles = p.k.ternary_tiles && p.tokens > FEW;
  const int64_t wide = up(p.groups, 4) * TERNARY_COLUMNS, height = tiles ? up(p.tokens, 16) : p.tokens;
  Buffer<int8_t> q(height * wide), packed(tiles ? height * wide : 0);
  Buffer<float> scale(height);
  for (int64_t t = 0; t < height; ++t) {
    if (t < p.tokens)
      scale[t] = p.k.ternary_round(x + t * padded, p.w.columns, q.get() + t * wide);
    std::fill(q.get() + t * wide + (t < p.tokens ? p.w.columns : 0), q.get() + (t + 1) * wide, int8_t{0});
  }
  if (tiles)  // tiles of 16 tokens and 64 columns lie in one piece
    for (int64_t t = 0; t < height; ++t)
      for (int64_t c = 0; c < wide; c += 64)
        std::copy_n(q.get() + t * wide + c, 64, packed.get() + (t / 16 * (wide / 64) + c / 64) * 1024 + t % 16 * 64);
  const int64_t step = tiles ? TILE_TOKENS : FEW, columns = tiles ? p.k.ternary_many_blocks : BLOCKS;
  const int64_t row = columns * TERNARY_ROWS, scratch = p.k.ternary_scratch_floats;
  const int64_t items_wide = (p.blocks + columns - 1) / columns;
  // with tables of weights nothing is decoded twice: all tokens of a block belong to one item
  Buffer<int32_t> space(p.threads * (step * row + scratch));
  Buffer<float> line(p.threads * row);
  parallel_for(items_wide, p.threads, [&](int64_t item, int thread) {
    int32_t* mine = space.get() + thread * (step * row + scratch);
    float* out = line.get() + thread * row;
    const int64_t first = item * columns, count = std::min(columns, p.blocks - first);
    for (int64_t token = 0; token < p.tokens; token += step) {
      const int64_t together = std::min(step, p.tokens - token);
      const TernaryTask task{p.codes(first), count, p.groups, together,
                             tiles ? packed.get() + token * wide : q.get() + token * wide, wide, 1, mine, row,
                             mine + step * row};
      (tiles ? p.k.ternary_many_int8 : p.k.ternary_few_int8)(task);
      for (int64_t t = 0; t < together; ++t) {
        for (int64_t c = 0; c < count * TERNARY_ROWS; ++c) out[c] = static_cast<float>(mine[t * row + c]);
        p.write(out, token + t, first, count, scale[token + t]);
      }
    }
  });
}

}  // namespace

void ternary_linear(const TernaryWeights& w, const View& x, bool int8, const View& out, int threads) {
  const Kernels& k = kernels();
  const int64_t tokens = x.shape[2], groups = (w.columns + TERNARY_COLUMNS - 1) / TERNARY_COLUMNS;
  const int64_t blocks = (w.rows + TERNARY_ROWS - 1) / TERNARY_ROWS, padded = groups * TERNARY_COLUMNS;
  const int64_t worth = 1 + tokens * w.rows * w.columns / WORK;
  const Product p{k, w, x, out, tokens, groups, blocks, static_cast<int>(std::clamp<int64_t>(worth, 1, std::max(threads, 1)))};
  Buffer<float> rows(tokens * padded);
  k.read_rows(x, 0, 0, 0, tokens, padded, false, rows.get());
  if (int8)
    eight_bit(p, rows.get(), padded);
  else if (tokens <= k.ternary_few_tokens)
    few(p, rows.get(), padded);
  else
    many(p, rows.get(), padded);
}

}  // namespace sieve
