// Products with ternary weights at two bits each: out = alpha * (x times the trits' transpose).
//
// Layout of the codes (trit + 1: 0, 1, 2): [row blocks][column groups][4][32 rows] bytes of four columns each. Byte b of a row
// holds columns b, 4 + b, 8 + b and 12 + b of its group of 16, from the lowest bits on, so that 32 bytes are as many rows at the
// same columns, and every nibble is a pair of columns that indexes a table of 16. Rows and columns beyond the matrix hold code 1, a
// zero.
#pragma once
#include "view.h"

namespace sieve {

constexpr int TERNARY_ROWS = 32;     // output channels in a block
constexpr int TERNARY_COLUMNS = 16;  // input channels in a group
constexpr int TERNARY_BYTES = TERNARY_ROWS * TERNARY_COLUMNS / 4;  // of a row block and a group
constexpr int TERNARY_TOKENS = 128;  // tokens whose sums stay in the cache while weights are decoded

struct TernaryWeights {
  const uint8_t* codes;
  int64_t rows, columns;
  const float* alpha;    // one scale, or one a row
  int64_t alpha_stride;  // 0 or 1
  int64_t fewest;        // trits that are not zero, of the row that has fewest; 0 where nobody counted
};

// `fewest` of these codes
int64_t ternary_fewest(const uint8_t* codes, int64_t rows, int64_t columns);

// x [tokens, columns] and out [tokens, rows] are the last two axes, in fp32, fp16 or bf16. Sums are at least as exact as sums in
// fp32; with `int8` every token is first rounded to 8 bits under its own scale, max |x| / 127, and sums are exact integers.
void ternary_linear(const TernaryWeights& w, const View& x, bool int8, const View& out, int threads);

// For kernels: some row blocks against some tokens.
struct TernaryTask {
  const uint8_t* codes;   // of the first block
  int64_t blocks, groups;
  int64_t tokens;
  const void* x;          // as the level's function wants it
  int64_t x_stride;       // between tokens, in elements, where x is rows
  int64_t parts;          // bf16 terms that sum to x, for tiles
  void* sums;             // [tokens][stride] fp32 or int32, written
  int64_t stride;
  void* scratch;          // 64-byte aligned
};

}  // namespace sieve
