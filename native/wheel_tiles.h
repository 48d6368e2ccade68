// What both directions of the wheel share: which offsets are tiled, the groups of positions, and the panels that a tile reads.
#pragma once
#include <utility>
#include <vector>

#include "kernels.h"
#include "offsets.h"

namespace sieve {

// Which u have m * u + residue among the offsets: for every `from` the 16 of them that a row sees in a panel of keys.
struct Spokes {
  int64_t residue;
  std::vector<uint16_t> bits;

  Spokes(const OffsetAttention& a, int64_t modulus, int64_t residue);
  // [0] bit i: u = from - i is there; [1] the same for the next row, and so on. -16 <= from.
  const uint16_t* keys(int64_t from) const { return bits.data() + from + PANEL_KEYS; }
};

struct Group {
  int64_t keys, first_panel;
};

// The panels of a tile, each with the keys that every row reads.
struct PanelList {
  std::vector<int32_t> panel;
  std::vector<uint16_t> keep, row_keep;
  std::vector<uint8_t> masked;
};

// Positions c, c + modulus, ... are group c. Panels are numbered group after group, an even number of them in each, since
// values of bf16 come in pairs of panels; a tile never lists what lies behind a group's last key.
struct WheelTiles {
  int64_t modulus;
  std::vector<Spokes> spokes;
  std::vector<int64_t> rest;                       // offsets that no tile covers
  std::vector<Group> groups;
  std::vector<std::pair<int64_t, int64_t>> tiles;  // group, number of its first row
  int64_t panels = 0;

  WheelTiles(const OffsetAttention& a, const Wheel& wheel);
  int64_t rows(const std::pair<int64_t, int64_t>& tile) const;
  void list(const OffsetAttention& a, const std::pair<int64_t, int64_t>& tile, PanelList& out) const;
};

// `count` positions of a head from `first`, `step` apart.
inline View every(const View& x, int64_t b, int64_t h, int64_t first, int64_t step, int64_t count) {
  return {at(x, b, h, first, 0), x.dtype, {1, 1, count, x.shape[3]}, {0, 0, x.stride[2] * step, x.stride[3]}};
}

}  // namespace sieve
