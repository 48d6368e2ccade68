// Scores and proofs of the gate of a prefill: sixteen query rows of a tile at a time, one row a lane.
#pragma once
#include <vector>

#include "buffer.h"
#include "kernels.h"
#include "sight.h"

namespace sieve {

constexpr int64_t GROUP = 8;  // blocks of a group, where blocks are chosen on two levels

// The keys of one KV head as scores and proofs read them.
struct Head {
  const int8_t* codes;
  const float *step, *shift, *addend;
  const int32_t* origin;
  // for proofs: of keys, of blocks, and the largest of each block
  const float *error, *metric_error, *length, *spectral, *metric_spectral, *key_norm, *worst_error, *worst_metric, *worst_length;
  const float *group_mean, *group_radius, *group_addend;  // null where there is one level
  std::vector<int32_t> broken;  // blocks with a key that is not finite
  int64_t calibrated;  // queries before this position may be early, all of them where the sketch is not settled
  bool settled;
};

struct RowSpace {
  RowSpace() = default;
  RowSpace(const GateTask& t, int64_t blocks, int32_t wide);
  Buffer<float> estimate, other, best, q, weights, scratch;
  Buffer<float> exact, far;                   // queries [d][16]; bounds of groups [groups][16]
  Buffer<float> upper, lower, dropped, kept;  // for proofs
  Buffer<int32_t> priority, list;
  Buffer<int8_t> q_codes;
  std::vector<uint8_t> marks, first, reached, open;
  // blocks that rows see, those whose keys were multiplied, and those of rows that had nothing to add to a tile
  int64_t asked = 0, scored = 0, passed = 0;
};

// Up to sixteen rows of one KV head.
struct RowSet {
  int64_t b, kv;
  int64_t head[LANE_ROWS], query[LANE_ROWS];
  int rows;
};

class GateRows : public Sight {
 public:
  explicit GateRows(const GateTask& t);

  // What the rows see, a row a lane.
  Lanes lanes_of(const RowSet& set, const Frame& f) const;
  // Estimates of the blocks that some row sees; returns what turns them into base-2 logarithms.
  float score(const RowSet& set, const Head& head, const Lanes& lanes, bool two_levels, RowSpace& w) const;
  double far_share() const;
  void group_keys(const Head& head, int64_t first, int64_t last, float* mean, float* radius, float* addend) const;
  // Marks what the rows must keep so that each drops at most `level` of its mass.
  void prove(const RowSet& set, const Head& head, const Frame& f, const Lanes& lanes, RowSpace& w) const;

 protected:
  const GateTask& t_;
  const Kernels& k_;
  const int64_t d_, wide_;

 private:
  bool structurally_sees(int64_t query, int64_t key) const;
  bool early(const Head& head, int64_t query) const;
  void early_rows(const RowSet& set, const Head& head, bool* is_early, bool& some, bool& all) const;
  void plain_queries(const RowSet& set, RowSpace& w, float* norm) const;
  KeyScore keys_of(const RowSet& set, const Head& head, const Lanes& lanes, const float* factor, RowSpace& w) const;
  void score_keys_themselves(const RowSet& set, const Lanes& lanes, RowSpace& w, float* out) const;
  void score_near(const KeyScore& s, const Head& head, const float* step, RowSpace& w) const;
  bool integers_fit() const;
  void halve(const int8_t* codes, float* half) const;
  void bracket(const RowSet& set, const Head& head, const Frame& f, const Lanes& lanes, const float* plain, bool glance,
               RowSpace& w) const;
  Proof start(const RowSet& set, const Head& head, const Frame& f, const Lanes& lanes, const float* plain, double error,
              RowSpace& w) const;
  void count_exactly(const RowSet& set, const Lanes& lanes, const Proof& proof, float* room, RowSpace& w) const;
};

}  // namespace sieve
