// Decoding: a few queries a sequence against a long cache of keys and values, which is read once, in place.
#pragma once
#include "attend.h"

namespace sieve {

// A cache in pages: keys [pages, kv_heads, page_size, channels] (any strides, channels side by side), and for each sequence the
// pages that hold its keys, in order.
struct Pages {
  const int32_t* table;   // [batch, most pages]
  int64_t table_stride;   // entries from sequence to sequence
  const int64_t* length;  // [batch] keys of each sequence
};

// Most query rows (query heads of a group x queries) that a KV head may have here.
constexpr int64_t MAX_DECODE_QUERIES = 16;

// As attend(), for calls of at most MAX_DECODE_QUERIES queries whose channels lie side by side in all three arrays. With pages,
// a.k and a.v are the caches, a.choice is one for every sequence, and query i of sequence b sits at length[b] - q_len + i.
// How the work is cut depends on shapes and the selection alone, so the result does not depend on the number of threads.
void decode(const Attention& a, const Pages* pages, const View& out, float* lse);

}  // namespace sieve
