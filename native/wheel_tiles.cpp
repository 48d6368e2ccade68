#include "wheel_tiles.h"

#include <algorithm>

namespace sieve {

Spokes::Spokes(const OffsetAttention& a, int64_t modulus, int64_t residue) : residue(residue) {
  bits.assign(a.k.shape[2] / modulus + 2 + 2 * PANEL_KEYS, 0);
  for (int64_t i = 0; i < a.count; ++i)
    if (a.offsets[i] % modulus == residue)
      for (int64_t bit = 0; bit < PANEL_KEYS; ++bit)
        bits[a.offsets[i] / modulus + bit + PANEL_KEYS] |= static_cast<uint16_t>(1u << bit);
}

WheelTiles::WheelTiles(const OffsetAttention& a, const Wheel& wheel) : modulus(wheel.modulus) {
  const int64_t kv_len = a.k.shape[2], offset = kv_len - a.q.shape[2];
  for (int64_t i = 0; i < wheel.residue_count; ++i) spokes.emplace_back(a, modulus, wheel.residues[i]);
  for (int64_t i = 0; i < a.count; ++i)
    if (!std::binary_search(wheel.residues, wheel.residues + wheel.residue_count, a.offsets[i] % modulus))
      rest.push_back(a.offsets[i]);
  for (int64_t c = 0; c < std::min(modulus, kv_len); ++c) {
    const int64_t keys = (kv_len - c + modulus - 1) / modulus, first = offset > c ? (offset - c + modulus - 1) / modulus : 0;
    groups.push_back({keys, panels});
    panels += up((keys + PANEL_KEYS - 1) / PANEL_KEYS, 2);
    for (int64_t x = first; x < keys; x += MAX_ROWS) tiles.push_back({c, x});
  }
}

int64_t WheelTiles::rows(const std::pair<int64_t, int64_t>& tile) const {
  return std::min<int64_t>(MAX_ROWS, groups[tile.first].keys - tile.second);
}

void WheelTiles::list(const OffsetAttention& a, const std::pair<int64_t, int64_t>& tile, PanelList& out) const {
  const auto [c, x] = tile;
  const int64_t rows = this->rows(tile);
  out.panel.clear();
  out.row_keep.clear();
  for (const Spokes& spoke : spokes) {
    const int64_t other = (c - spoke.residue + modulus) % modulus, wrap = c < spoke.residue ? 1 : 0;
    if (other >= static_cast<int64_t>(groups.size())) continue;
    const int64_t last = std::min(groups[other].keys, x + rows - wrap);  // keys before the last row
    for (int64_t y = 0; y < last; y += PANEL_KEYS) {
      const size_t start = out.row_keep.size();
      // keys of the prefix are read on their own
      const int64_t hidden = std::clamp<int64_t>((a.prefix - other + modulus - 1) / modulus - y, 0, PANEL_KEYS);
      const int64_t there = std::min<int64_t>(groups[other].keys - y, PANEL_KEYS);
      const uint16_t real = static_cast<uint16_t>(((1u << there) - 1u) & ~((1u << hidden) - 1u));
      out.row_keep.resize(start + rows);
      uint16_t *to = out.row_keep.data() + start, some = 0;
      // rows before the panel's first key see none of it
      const int64_t before = std::clamp<int64_t>(y + wrap - x, 0, rows);
      const uint16_t* bits = spoke.keys(x + before - wrap - y);
      std::fill_n(to, before, uint16_t{0});
      for (int64_t r = before; r < rows; ++r) {
        to[r] = bits[r - before] & real;
        some |= to[r];
      }
      if (some)
        out.panel.push_back(static_cast<int32_t>(groups[other].first_panel + y / PANEL_KEYS));
      else
        out.row_keep.resize(start);
    }
  }
  out.keep.assign(out.panel.size(), 0xffff);
  out.masked.assign(out.panel.size(), 1);
}

}  // namespace sieve
