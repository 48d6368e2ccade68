// A random attention call with whatever options, and what it means, as plain loops over doubles.
#pragma once
#include "attend.h"
#include "rows.h"
#include "test.h"

enum Kind { BLOCKS, RANGES, ROWS, TOP_K };

struct Problem {
  Problem(Random& random, Kind kind, sieve::DType dtype);

  sieve::Attention call{};
  sieve::RowChoice rows;
  int64_t top_k = 0;
  Kind kind;
  Array q, k, v, mask, bias, key_mask, out;
  std::vector<float> sink, lse;
  std::vector<int64_t> edges, row_ptr, counts;
  std::vector<int32_t> index;
  std::shared_ptr<Guarded> block_memory, row_mask_memory, token_memory;
  std::string text;

  int64_t batch() const { return call.q.shape[0]; }
  int64_t heads() const { return call.q.shape[1]; }
  int64_t q_len() const { return call.q.shape[2]; }
  int64_t kv_len() const { return call.k.shape[2]; }
  int64_t group() const { return heads() / call.k.shape[1]; }
  bool visible(int64_t b, int64_t h, int64_t i, int64_t j) const;
  bool kept(int64_t b, int64_t h, int64_t i, int64_t j) const;
  double logit(int64_t b, int64_t h, int64_t i, int64_t j) const;  // capped, without bias
  double biased(int64_t b, int64_t h, int64_t i, int64_t j) const;

  void run();                // fills out, lse (and index, counts)
  void check_output(double tolerance);
  void check_top_k() const;  // the index is the best there is, in increasing order
  void check_gradients(Random& random, double tolerance);

 private:
  void choose_blocks(Random& random);
  void choose_rows(Random& random);
};
