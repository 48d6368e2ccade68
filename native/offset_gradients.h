// What the backward passes of the two plans share: the pairs of lists by diagonals, and the sums into keys and values.
#pragma once
#include <vector>

#include "offset_rows.h"

namespace sieve {

// Gradients of the keys and values of one KV head, fp32 rows whose width is a multiple of 16: in memory of their own, or, for the
// first part, where the result will lie if it lies so.
struct KeySums {
  float *dk = nullptr, *dv = nullptr;
  Buffer<float> own_dk, own_dv;

  void start(const OffsetAttention& a, const OffsetGradients& g, int64_t item, int64_t parts);  // zeros
};

// Every KV head is worked on in so many parts with sums of their own, added up in order. Shapes alone decide, so that gradients
// are the same on any number of threads.
int64_t gradient_parts(const OffsetAttention& a);

// The first keys and the offsets of `a` for part `part` of the query rows of a KV head. The gradients of its queries go to g.dq,
// or, where `dq` is given, to its rows [batch, q_heads, q_len][channels up to 16].
void diagonal_gradients(const OffsetAttention& a, const OffsetGradients& g, int64_t b, int64_t kv, int64_t part, int64_t parts,
                        const KeySums& total, float* dq);

// sums [batch * kv_heads][parts] to g.dk and g.dv; those of the first part are overwritten
void write_key_gradients(const OffsetAttention& a, const OffsetGradients& g, const std::vector<KeySums>& sums, int64_t parts);

}  // namespace sieve
