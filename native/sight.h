// What tiles of queries see of key blocks: intervals, cut blocks, and the blocks that are kept whatever the scores say.
#pragma once
#include <vector>

#include "gate.h"

namespace sieve {

// What is the same for all heads of a sequence.
struct Sequence {
  std::vector<uint8_t> part;         // empty without a key mask
  std::vector<int32_t> part_before;  // [kv_len + 1]
  std::vector<int32_t> there_before; // [blocks + 1] blocks of which some key takes part
};

// What one tile of queries sees.
struct Frame {
  int64_t first, last;             // queries
  std::vector<int64_t> low, high;  // [last - first]
  int64_t from, to;                // blocks that some query may see
  int64_t whole_from, whole_to;    // blocks that every query sees whole
  std::vector<int64_t> edge, edge_weight;
  std::vector<int64_t> forced;     // blocks that are kept whatever the scores say
};

class Sight {
 public:
  explicit Sight(const GateTask& t);

  int64_t batch_, q_heads_, kv_heads_, q_len_, kv_len_, blocks_, offset_, lead_, tiles_, group_;
  std::vector<Sequence> sequences_;

  void frame(int64_t b, int64_t tile, Frame& f) const;
  int64_t keys_between(int64_t b, int64_t low, int64_t high) const;
  int64_t weight(int64_t b, int64_t block) const;  // keys of the block that take part
  void interval(int64_t query, int64_t& low, int64_t& high) const;

 private:
  void force(int64_t b, Frame& f) const;
  const GateTask& task_;
};

}  // namespace sieve
