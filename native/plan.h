// What a tile of queries reads: its rows, their intervals, and its list of key panels.
#pragma once
#include <algorithm>
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

  // How many groups of rows each_group makes of a whole tile.
  int64_t groups_of_a_tile() const;
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

// How many heads of `n` rows each share a group.
inline int64_t heads_together(int64_t n, int64_t heads) { return n >= MAX_ROWS ? 1 : std::min(heads, MAX_ROWS / n); }

inline int64_t Plan::groups_of_a_tile() const {
  const int64_t heads = by_head ? 1 : group, together = heads_together(tile, heads);
  return (heads + together - 1) / together * ((tile + MAX_ROWS - 1) / MAX_ROWS);
}

// The rows of a unit in groups of at most MAX_ROWS: heads of a group side by side where they fit, long tiles cut.
template <class Body>
void each_group(const Plan& plan, int64_t head, int64_t t, std::vector<Row>& rows, const Body& body) {
  int64_t first, last;
  plan.queries(t, first, last);
  const int64_t heads = plan.by_head ? 1 : plan.group, first_head = plan.by_head ? head : head * plan.group;
  const int64_t n = last - first;
  if (n <= 0) return;
  const int64_t together = heads_together(n, heads);
  for (int64_t h = 0; h < heads; h += together)
    for (int64_t from = first; from < last; from += MAX_ROWS) {
      const int64_t some = std::min(last, from + MAX_ROWS) - from, end = std::min(heads, h + together);
      rows.resize((end - h) * some);
      Row* row = rows.data();
      for (int64_t g = h; g < end; ++g)
        for (int64_t i = 0; i < some; ++i, ++row) {
          row->head = first_head + g;
          row->query = from + i;
        }
      body();
    }
}

}  // namespace sieve
