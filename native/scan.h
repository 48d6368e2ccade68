// The gate of decoding: which blocks of keys a few queries keep, from the summaries of the keys alone.
#pragma once
#include <vector>

#include "view.h"

namespace sieve {

enum Scorer : int32_t { SKETCH = 0, MEAN = 1, EUCLIDEAN = 2 };
enum KeepRule : int32_t { TOP_BLOCKS = 0, TARGET_SPARSITY = 1, THRESHOLD = 2, RELATIVE_THRESHOLD = 3, MASS = 4, CERTIFIED = 5 };

struct Gate {
  View q;                        // [batch, q_heads, q_len, d], channels side by side
  Scorer scorer;
  int bits, sketch_bits, digits; // planes that rank, planes that there are, integers that stand for one channel of a query
  View key;                      // [batch, kv_heads, kv_len, d], channels side by side: read for what the sketch cannot decide
  View planes;                   // [batch, kv_heads, kv_len, bytes] of the first plane
  int64_t plane_stride;          // bytes from plane to plane
  View key_scale;                // [1, batch, kv_heads, kv_len] fp16
  View channel_scale;            // [1, batch, kv_heads, d] fp32
  View error, metric_error;      // as key_scale
  View spectral, metric_spectral;  // [1, batch, kv_heads, blocks] fp32; data null if absent
  View mean;                     // [batch, kv_heads, blocks, d] fp32
  View radius, key_norm;         // [1, batch, kv_heads, blocks] fp32
  View count, finite;            // int32, bool
  View key_mask;                 // [1, 1, batch, kv_len]; data null if absent
  const float* sink;             // [q_heads] or null
  bool causal;
  int64_t window;                // -1: none
  float scale, softcap;          // softcap 0: none
  int64_t kv_len, kv_block;      // kv_block a multiple of 16
  int64_t q_tile, lead, query_stride;
  bool share_group;
  int64_t sinks, near;           // forced: the first keys, and keys less than `near` positions away; 0: none
  KeepRule rule;
  double amount, dense_above;    // the number of the rule: k, sparsity, threshold, margin, mass or error
  double unit, exponential;      // how the sums of the attend stage round
  int threads;
};

// Blocks kept by batch x chooser heads x tiles, in compressed rows.
struct Chosen {
  std::vector<int64_t> row_ptr;
  std::vector<int32_t> block;
  std::vector<int64_t> kept, visible;  // keys
  std::vector<uint8_t> dense;          // the rule would have kept more than dense_above
  int64_t planes_read = 0;             // planes x keys that were scanned
};

Chosen choose(const Gate& gate);

}  // namespace sieve
