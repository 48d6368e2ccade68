// Units of queries that go over the keys side by side, some keys at a time: what a head keeps of its keys is more than the near
// caches hold, and would come from afar once a unit.
#pragma once
#include <algorithm>
#include <limits>

#include "kernels.h"

namespace sieve {

// Panels first..last-1 of a tile's list.
inline Tile part_of(const Tile& whole, int32_t first, int32_t last) {
  Tile t = whole;
  t.panel += first;
  t.keep += first;
  t.masked += first;
  if (t.row_keep) t.row_keep += int64_t{first} * t.rows;
  t.panels = last - first;
  return t;
}

// Where the list of `t` stands once every panel below `stop` is done, from `next` on in whole steps of a kernel: steps fall where
// they fall when a unit is alone, and so its sums are the same to the bit.
inline int32_t after(const Tile& t, int32_t next, int32_t stop, int32_t step) {
  const int32_t reached = static_cast<int32_t>(std::lower_bound(t.panel + next, t.panel + t.panels, stop) - t.panel);
  return std::min<int32_t>(t.panels, next + (reached - next + step - 1) / step * step);
}

constexpr int32_t AT_A_TIME = 8;  // panels of a unit between two turns of another

// A unit has a `tile()` and an `advance(stop)` that goes on to the first panel at or behind `stop`.
template <class Unit>
void pass_keys(Unit* units, int64_t count) {
  int32_t first = std::numeric_limits<int32_t>::max(), last = 0, longest = 1;
  for (int64_t i = 0; i < count; ++i) {
    const Tile& t = units[i].tile();
    if (!t.panels) continue;
    first = std::min(first, t.panel[0]);
    last = std::max(last, t.panel[t.panels - 1] + 1);
    longest = std::max(longest, t.panels);
  }
  if (last == 0) return;
  // the thinner the lists, the farther a turn goes; one unit alone goes to the end
  const int32_t step = count == 1 ? last - first : static_cast<int32_t>(std::max<int64_t>(AT_A_TIME, int64_t{AT_A_TIME} * (last - first) / longest));
  for (int32_t stop = first; stop < last;) {
    stop = std::min(last, stop + step);
    for (int64_t i = 0; i < count; ++i) units[i].advance(stop);
  }
}

}  // namespace sieve
