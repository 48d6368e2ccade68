// The attend stage: forward and backward over a selection. Shapes are those of the Python call; see kernels.h for the tiles.
#pragma once
#include "view.h"

namespace sieve {

// Which keys each query keeps: blocks in compressed rows over batch x heads x tiles, or a prefix and a window.
struct Choice {
  const int64_t* row_ptr;      // [batch * heads * tiles + 1], or null for ranges
  const int32_t* block_index;  // [entries]
  const uint8_t* row_mask;     // [entries][q_block] bool, or null
  int64_t batch, heads;        // 1 or the call's batch; 1, kv_heads or q_heads
  int64_t q_block, kv_block, lead;
  int64_t prefix, window;      // ranges: key < prefix, or position - window < key (< position + window)
  bool two_sided;
};

struct Attention {
  View q, k, v;         // [batch, q_heads | kv_heads, length, channels]
  View mask, bias;      // [batch, q_heads, q_len, kv_len] with zero strides where broadcast; data null if absent
  View key_mask;        // [batch, kv_len] in shape[0], shape[3]; data null if absent
  const float* sink;    // [q_heads] or null
  const int64_t* edges; // cu_seqlens, or null
  int64_t edge_count;
  bool causal;
  int64_t window;       // -1: none
  float scale, softcap; // softcap 0: none
  Choice choice;
  int threads;
};

// Whether queries are multiplied as bf16. Such instructions take denormal numbers for zero: of keys that is less than 2^-52 of a logit
// where queries stay below 2^64, of queries it may be all of one.
bool multiplies_bf16(const View& query, int threads);

// out [batch, q_heads, q_len, dv] in q's dtype (any strides), lse [batch, q_heads, q_len] fp32 contiguous
void attend(const Attention& a, const View& out, float* lse);

struct Gradients {
  View d_out;           // [batch, q_heads, q_len, dv]
  const float* lse;     // [batch, q_heads, q_len] as the forward pass returned it
  const float* shift;   // [batch, q_heads, q_len] d lse - sum(dO * O)
  View dq, dk, dv;      // written, in their own dtype
  View d_bias;          // fp32, zeroed by the caller, shape and strides of the bias; data null if absent
};

void attend_backward(const Attention& a, const Gradients& g);

}  // namespace sieve
