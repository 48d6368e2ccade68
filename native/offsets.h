// Attention to keys at fixed offsets before the query and to the first keys, forward and backward. Exact pairs only.
#pragma once
#include "view.h"

namespace sieve {

// Query i sits at position p = kv_len - q_len + i and reads key j iff j <= p and (j < prefix or p - j is an offset).
struct OffsetAttention {
  View q, k, v;            // [batch, q_heads | kv_heads, length, channels]
  const int64_t* offsets;  // [count] increasing, not negative, below kv_len
  int64_t count;
  int64_t prefix;          // at most kv_len
  float scale;             // positive
  int threads;
};

// Which offsets go by tiles over residue classes; the others go by diagonals. See wheel.cpp.
struct Wheel {
  int64_t modulus;
  const int64_t* residues;  // [residue_count] increasing
  int64_t residue_count;
};

// out [batch, q_heads, q_len, dv] in q's dtype, lse [batch, q_heads, q_len] fp32 contiguous
void attend_offsets(const OffsetAttention& a, const View& out, float* lse);
void attend_wheel(const OffsetAttention& a, const Wheel& w, const View& out, float* lse);

struct OffsetGradients {
  View d_out;          // [batch, q_heads, q_len, dv]
  const float* lse;    // [batch, q_heads, q_len]
  const float* shift;  // [batch, q_heads, q_len] d lse - sum(dO * O)
  View dq, dk, dv;     // written, in their own dtype
};

void attend_offsets_backward(const OffsetAttention& a, const OffsetGradients& g);
void attend_wheel_backward(const OffsetAttention& a, const Wheel& w, const OffsetGradients& g);

}  // namespace sieve
