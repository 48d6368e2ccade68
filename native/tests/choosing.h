// A random choice of key blocks, for the gate of a prefill or that of decoding, and what it must satisfy, as loops over doubles.
#pragma once
#include "gate.h"
#include "scan.h"
#include "summary.h"

enum By { KEYS, MEANS, BALLS };  // as Scoring of gate.h and Scorer of scan.h
enum Keeps { COUNT, SHARE, OVER, CLOSE, HALF, PROVED };  // as Rule and KeepRule

struct Choosing {
  bool decoding, two_levels;
  By by;
  Keeps rule;
  int64_t batch, q_heads, kv_heads, q_len, kv_len, d, size, blocks, tile, lead, tiles, heads, stride = 1;
  bool causal = false, round = false, by_tile = false;
  int64_t window = -1, sinks = 0, near = 0;
  double level = 0, dense_above = 1;
  float scale, softcap = 0;
  int bits = 0, sketch_bits = 0, digits = 1, threads = 1;
  std::vector<int64_t> edges;
  std::vector<float> sink;
  Array q, key, mask;
  std::unique_ptr<Summary> summary;
  std::string text;
  KeyKind kind;

  Choosing(Random& random, bool decoding, By by, Keeps rule, sieve::DType dtype, bool two_levels = false);
  Choosing(const Choosing&) = delete;
  void settle(Random& random);  // once more, after what is above has changed

  sieve::GateTask prefill() const;  // reads arrays of its own, made by lay_out
  sieve::Gate scan() const;
  struct Kept {
    std::vector<std::vector<int32_t>> list;
    std::vector<int64_t> kept, visible;
    std::vector<uint8_t> dense;
    int64_t computed = 0;  // by a prefill
    bool operator==(const Kept& o) const { return list == o.list && kept == o.kept && visible == o.visible && dense == o.dense; }
  };
  Kept run(int threads) const;
  void check_threads() const;  // the same from calls at once, on any number of threads
  void check(const Kept& got);  // and counts into `dropped` the blocks that are left out

  int64_t dropped = 0;

 private:
  Array planes_, key_scale_, channel_scale_, mean_, radius_, count_, finite_, error_, metric_error_, spectral_, metric_spectral_,
      key_norm_, key_mask_;
  std::vector<std::vector<double>> estimate_, truth_;  // [batch * q_heads * q_len][blocks] natural log masses
  std::vector<std::vector<int64_t>> seen_;             // visible keys
  std::vector<int64_t> low_, high_;                    // query i sees keys low..high-1, masks aside

  void lay_out(Random& random);
  bool takes_part(int64_t b, int64_t j) const { return !mask.memory || mask.get(b, 0, 0, j) != 0; }
  void find_intervals();
  bool early(int64_t b, int64_t i) const;
  void estimate_all();
  struct Unit {
    int64_t b, kv, first, last;  // queries
    std::vector<int64_t> row;    // of estimate_
    std::vector<bool> looked;
    std::vector<int64_t> seen;   // the most visible keys of each block
    std::vector<bool> forced, needed, allowed;
    int64_t most = 0;            // unforced blocks that a rank may keep
  };
  Unit unit(int64_t b, int64_t h, int64_t t) const;
  void judge(Unit& u) const;
};

// Of blocks whose keys are all equal, those that a count keeps are the first.
void check_equal_blocks(bool decoding, By by);
