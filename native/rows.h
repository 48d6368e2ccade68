// Attention over short lists of single keys, one list a query: what a selection of tokens or of offsets means.
#pragma once
#include <vector>

#include "attend.h"

namespace sieve {

struct Kernels;
class Plan;

// Rows of one head where they lie: row i begins at data + i * stride elements.
struct RowSource {
  const char* data;
  int64_t stride, channel;
  DType dtype;
  int32_t width;
};

// One query and its list. All lists of the structure are `count` long; buffers of floats reach to the next multiple of 16.
struct RowTask {
  int64_t count;
  const int32_t* key;     // increasing
  RowSource k, v;
  const float* q;         // fp32 [d]
  float scale, softcap;   // softcap 0: none
  const float* bias;      // natural logits, or null
  float* s;               // q . k_j, then the weights
  float* row;             // scratch of max(d, dv) up to a multiple of 16
};

// Which keys each query keeps: the union of what is given, every key once.
struct RowChoice {
  View index;                    // [batch | 1, heads, q_len, k] I32 or I64, negative where there is none; data null if absent
  std::vector<int64_t> offsets;  // key position - offset, where it is at least first_key
  int64_t first_key = 0;
  int64_t prefix = 0, window = 0;  // as in Choice
  bool two_sided = false;
};

// Throws std::invalid_argument where an index reaches behind the last key.
void check_rows(const Attention& a, const RowChoice& choice);
void attend_rows(const Attention& a, const RowChoice& choice, const View& out, float* lse);
void attend_rows_backward(const Attention& a, const RowChoice& choice, const Gradients& g);

RowSource rows_of(const View& x, int64_t b, int64_t h);

}  // namespace sieve
