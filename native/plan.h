// What a tile of queries reads: its rows, their intervals, and its list of key panels.
#pragma once
#include <vector>

#include "attend.h"
#include "kernels.h"

namespace sieve {

struct Row {
  int64_t head, query;
};

// The list of panels of one selection tile, with the keys of each that are kept.
struct Panels {
  std::vector<int32_t> panel;
  std::vector<uint16_t> keep;
  std::vector<uint16_t> row_keep;  // [panels][q_block], only with a row mask
};

class Plan {
 public:
  explicit Plan(const Attention& a);

  int64_t batch, q_heads, kv_heads, group, q_len, kv_len, offset;
  int64_t key_panels;        // ceil(kv_len / 16)
  int64_t tile, tiles, lead; // query tiles
  bool by_head;              // every query head chooses for itself
  std::vector<std::vector<uint16_t>> key_bits;  // [batch][key_panels], empty without a key mask

  // Queries first..last-1 of tile `t`.
  void queries(int64_t t, int64_t& first, int64_t& last) const;
  void list(int64_t b, int64_t head, int64_t t, Panels& out) const;
  // Marks the panels of key head `kv_head` that any tile lists.
  void used(int64_t b, int64_t kv_head, std::vector<uint8_t>& marks) const;
  // Fills the parts of `t` that say what `rows` see; the arrays behind them stay here until the next call.
  struct Sight {
    std::vector<int32_t> panel;
    std::vector<uint16_t> keep, row_keep;
    std::vector<uint8_t> masked;
    std::vector<int64_t> low, high, near_low, near_high;
    std::vector<const char*> mask_row, bias_row;
  };
  void look(int64_t b, int64_t first_query, const std::vector<Row>& rows, const Panels& list, Sight& sight, Tile& t) const;
  // The visible keys of a query, masks aside, are low..high-1.
  void interval(int64_t query, int64_t& low, int64_t& high) const;

 private:
  const Attention& a_;
};

}  // namespace sieve
