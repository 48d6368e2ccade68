// Exact top-k attention: each query attends to its top_k largest scaled logits among the keys that it sees.
#pragma once
#include "attend.h"
#include "kernels.h"

namespace sieve {

constexpr int BLOCK_PANELS = 4;  // panels that are pruned together

// Ranks order (logit, earlier key) pairs as integers: an order-preserving image of the float above the inverted key index.
// NaN is above everything, so that what it touches shows it.
struct TopKTile {
  Tile tile;              // q fp32 [rows][d]; the list of panels has no gaps; o, m, l, v and scratch unused
  int32_t k_panel;        // the panel that tile.k begins with
  int64_t top_k;
  int32_t blocks;         // how many blocks to visit
  const int32_t* order;   // [blocks] their numbers, best first, or null: as they lie, from that of the first panel
  int32_t first_block;    // of the arrays below
  const float* upper;     // [block][MAX_ROWS] at least every product that this kernel computes in it; null: prune nothing
  // what earlier calls left: at first counts are 0 and the least NaN
  uint64_t* best;         // [rows][top_k] ranks, a heap with the smallest in front once top_k are there
  int64_t* count;         // [rows] how many are there
  float* least;           // [rows] the smallest kept product once top_k are there, NaN before
  int64_t* computed;      // [rows] adds the products of visible keys that were computed
};

// Centre and reach of key blocks: |q . k - q . centre| <= ||q|| * reach for every key, computed or exact.
struct BlockBounds {
  int64_t first, last;    // blocks
  int64_t kv_len;
  int32_t d;
  const float* k;         // packed panels of the head
  float* centre;          // [blocks][d]
  float* reach;           // [blocks], infinite where a key is not finite
  const float* q_panels;  // packed queries of a tile, MAX_ROWS / 16 panels
  const float* q_norm;    // [MAX_ROWS] rounded up
  float* upper;           // [last - first][MAX_ROWS]
  float* priority;        // [last - first] the largest upper bound over the queries, each in units of its norm
};

// out, lse as for attend; index [batch, q_heads, q_len, top_k] contiguous, increasing keys and then -1;
// counts [batch, q_heads, 2] zeroed by the caller: visible (query, key) pairs, and those whose logit was computed; or null.
void top_k_attention(const Attention& a, int64_t top_k, const View& out, float* lse, int32_t* index, int64_t* counts);

}  // namespace sieve
