// Stages 2 and 3 of a prefill, fused: scores of one tile of queries at a time, and the blocks that a rule keeps of them.
#pragma once
#include <vector>

#include "view.h"

namespace sieve {

enum Scoring : int32_t { BY_KEYS = 0, BY_MEANS = 1, BY_BALLS = 2 };
enum Rule : int32_t { KEEP_COUNT = 0, KEEP_SHARE = 1, ABOVE = 2, NEAR_BEST = 3, KEEP_MASS = 4, KEEP_PROVED = 5 };

struct GateTask {
  View q, key;    // [batch, q_heads | kv_heads, length, d]
  View key_mask;  // [batch, kv_len] in shape[0], shape[3]; data null if absent
  const int64_t* edges;
  int64_t edge_count;
  bool causal;
  int64_t window;  // -1: none
  float scale, softcap;

  Scoring scoring;
  int32_t bits, sketch_bits;  // bits <= sketch_bits
  bool round_queries;
  // [batch, kv_heads, ...] each, any strides but contiguous in the last axis; planes [bits, batch, kv_heads, kv_len * bytes]
  View planes, key_scale, channel_scale, mean, radius, count, finite;
  View error, metric_error, spectral, metric_spectral, key_norm;  // for proofs; spectral ones may be absent
  const float* sink;                                              // [q_heads] or null

  Rule rule;
  double level;    // threshold, margin, mass, sparsity or error
  int64_t blocks;  // KEEP_COUNT
  int64_t block_size, query_tile, stride, heads;
  int64_t sinks, near;  // forced tokens; 0: none
  double dense_above;   // 1: never
  int threads;
};

// What is kept; each array over batch * heads * tiles.
struct Gated {
  int64_t batch, heads, tiles, entries = 0;
  std::vector<std::vector<int32_t>> list;
  std::vector<int64_t> kept, visible, computed;  // keys; computed: whose products were made, on average over a tile's queries
  std::vector<uint8_t> dense;
};

Gated gate(const GateTask& task);

}  // namespace sieve
