// The wheel: positions are grouped by their residue modulo m. Between two groups the distances are m * u + r for one r, so the
// offsets with that residue are diagonals of a dense tile: tiles of 64 queries of a group against panels of keys of another, with
// a bit for each offset. Offsets of other residues, and the first keys, are added row by row as the diagonals plan does.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "level.h"
#include "offset_rows.h"
#include "parallel.h"

namespace sieve {

namespace {

constexpr int64_t HELD_BYTES = int64_t{1} << 28;  // packed heads that are held at a time

// Which u have m * u + residue among the offsets: for every `from` the 16 of them that a row sees in a panel of keys.
struct Spokes {
  int64_t residue;
  std::vector<uint16_t> bits;

  Spokes(const OffsetAttention& a, int64_t modulus, int64_t residue) : residue(residue) {
    bits.assign(a.k.shape[2] / modulus + 2 + 2 * PANEL_KEYS, 0);
    for (int64_t i = 0; i < a.count; ++i)
      if (a.offsets[i] % modulus == residue)
        for (int64_t bit = 0; bit < PANEL_KEYS; ++bit)
          bits[a.offsets[i] / modulus + bit + PANEL_KEYS] |= static_cast<uint16_t>(1u << bit);
  }
  // [0] bit i: u = from - i is there; [1] the same for the next row, and so on. -16 <= from.
  const uint16_t* keys(int64_t from) const { return bits.data() + from + PANEL_KEYS; }
};

struct Group {
  int64_t keys, first_panel, first_query, tiles;  // queries: numbers first_query .. keys - 1 of the group
};

struct Room {
  Room(int64_t d, int64_t wide_q, int64_t dv, int64_t scratch_bytes)
      : packed(MAX_ROWS * wide_q), q(MAX_ROWS * d), o(MAX_ROWS * dv), scratch(scratch_bytes) {}
  Buffer<char> packed;
  Buffer<float> q, o;
  Buffer<char> scratch;
  float m[MAX_ROWS], l[MAX_ROWS];
  std::vector<int32_t> panel;
  std::vector<uint16_t> keep, row_keep;
  std::vector<uint8_t> masked;
};

View every(const View& x, int64_t b, int64_t h, int64_t first, int64_t step, int64_t count) {
  return {at(x, b, h, first, 0), x.dtype, {1, 1, count, x.shape[3]}, {0, 0, x.stride[2] * step, x.stride[3]}};
}

// The panels of all groups that rows x .. x + rows - 1 of group c read, with the keys of each row.
void list_panels(const OffsetAttention& a, int64_t modulus, const std::vector<Spokes>& spokes, const std::vector<Group>& groups,
                 int64_t c, int64_t x, int64_t rows, Room& w) {
  w.panel.clear();
  w.row_keep.clear();
  for (const Spokes& spoke : spokes) {
    const int64_t other = (c - spoke.residue + modulus) % modulus, wrap = c < spoke.residue ? 1 : 0;
    if (other >= static_cast<int64_t>(groups.size())) continue;
    const int64_t last = std::min(groups[other].keys, x + rows - wrap);  // keys before the last row
    for (int64_t y = 0; y < last; y += PANEL_KEYS) {
      const size_t start = w.row_keep.size();
      // keys of the prefix are read on their own
      const int64_t hidden = std::clamp<int64_t>((a.prefix - other + modulus - 1) / modulus - y, 0, PANEL_KEYS);
      const int64_t there = std::min<int64_t>(groups[other].keys - y, PANEL_KEYS);
      const uint16_t real = static_cast<uint16_t>(((1u << there) - 1u) & ~((1u << hidden) - 1u));
      w.row_keep.resize(start + rows);
      uint16_t *to = w.row_keep.data() + start, some = 0;
      // rows before the panel's first key see none of it
      const int64_t before = std::clamp<int64_t>(y + wrap - x, 0, rows);
      const uint16_t* bits = spoke.keys(x + before - wrap - y);
      std::fill_n(to, before, uint16_t{0});
      for (int64_t r = before; r < rows; ++r) {
        to[r] = bits[r - before] & real;
        some |= to[r];
      }
      if (some)
        w.panel.push_back(static_cast<int32_t>(groups[other].first_panel + y / PANEL_KEYS));
      else
        w.row_keep.resize(start);
    }
  }
  w.keep.assign(w.panel.size(), 0xffff);
  w.masked.assign(w.panel.size(), 1);
}

}  // namespace

void attend_wheel(const OffsetAttention& a, const Wheel& wheel, const View& out, float* lse) {
  const Kernels& kernel = kernels();
  const int64_t m = wheel.modulus, batch = a.q.shape[0], kv_heads = a.k.shape[1], heads_of = a.q.shape[1] / kv_heads;
  const int64_t kv_len = a.k.shape[2], offset = kv_len - a.q.shape[2], dim = a.k.shape[3], v_dim = a.v.shape[3];
  const int64_t d = up(dim, 16), dv = up(v_dim, 16);
  const bool bf16 = kernel.bf16_tiles && a.q.dtype == BF16;
  const int64_t wide_d = bf16 ? up(dim, 32) : dim, unit = bf16 ? 2 : 4;
  for (int64_t i = 0; i < std::min(-offset, a.q.shape[2]); ++i)  // queries before the first key
    for (int64_t row = 0; row < batch * a.q.shape[1]; ++row) {
      Buffer<float> nothing(dv);
      const int64_t b = row / a.q.shape[1], h = row % a.q.shape[1];
      lse[flat_row(a, b, h, i)] = finish_offset_row(nothing.get(), -std::numeric_limits<float>::infinity(), 0.0f, v_dim, dv,
                                                    at(out, b, h, i, 0), out.stride[3], out.dtype);
    }
  std::vector<Spokes> spokes;
  std::vector<int64_t> rest;
  for (int64_t i = 0; i < wheel.residue_count; ++i) spokes.emplace_back(a, m, wheel.residues[i]);
  for (int64_t i = 0; i < a.count; ++i)
    if (!std::binary_search(wheel.residues, wheel.residues + wheel.residue_count, a.offsets[i] % m)) rest.push_back(a.offsets[i]);
  std::vector<int64_t> front(a.prefix);
  std::iota(front.begin(), front.end(), int64_t{0});
  std::vector<Group> groups;
  std::vector<std::pair<int64_t, int64_t>> tiles;  // group, number of its first row
  int64_t panels = 0;
  for (int64_t c = 0; c < std::min(m, kv_len); ++c) {
    const int64_t keys = (kv_len - c + m - 1) / m, first = offset > c ? (offset - c + m - 1) / m : 0;
    groups.push_back({keys, panels, first, 0});
    panels += up((keys + PANEL_KEYS - 1) / PANEL_KEYS, 2);  // values of bf16 come in pairs of panels
    for (int64_t x = first; x < keys; x += MAX_ROWS) tiles.push_back({c, x});
  }
  // group after group: all tiles of one read the same few groups of keys, which stay in the cache
  const int64_t key_bytes = panels * PANEL_KEYS * wide_d * unit, value_bytes = panels * PANEL_KEYS * dv * unit;
  const int64_t key_heads = batch * kv_heads;
  const int64_t at_once = std::clamp<int64_t>(HELD_BYTES / (key_bytes + value_bytes + kv_len * (d + dv) * 4), 1, key_heads);
  Buffer<char> packed_keys(at_once * key_bytes), packed_values(at_once * value_bytes);
  const int64_t scratch = kernel.tile_scratch(static_cast<int32_t>(dim), static_cast<int32_t>(v_dim), bf16);
  std::vector<Room> rooms;
  for (int i = 0; i < std::max(a.threads, 1); ++i) rooms.emplace_back(d, up(dim, 32) * unit, dv, scratch);
  std::vector<int64_t> low(MAX_ROWS, 0), high(MAX_ROWS, panels * PANEL_KEYS);
  for (int64_t start = 0; start < key_heads; start += at_once) {
    const int64_t heads = std::min(at_once, key_heads - start), classes = static_cast<int64_t>(groups.size());
    std::vector<Rows32> key_rows(heads), value_rows(heads);
    parallel_for(heads * (classes + 1), a.threads, [&](int64_t item, int) {
      const int64_t i = item / (classes + 1), c = item % (classes + 1), b = (start + i) / kv_heads, kv = (start + i) % kv_heads;
      if (c == classes) {
        key_rows[i].read(a.k, b, kv);
        value_rows[i].read(a.v, b, kv);
        return;
      }
      const Group& g = groups[c];
      const View k = every(a.k, b, kv, c, m, g.keys), v = every(a.v, b, kv, c, m, g.keys);
      const int64_t count = (g.keys + PANEL_KEYS - 1) / PANEL_KEYS;
      char* keys = packed_keys.get() + i * key_bytes + g.first_panel * PANEL_KEYS * wide_d * unit;
      char* values = packed_values.get() + i * value_bytes + g.first_panel * PANEL_KEYS * dv * unit;
      if (bf16) {
        kernel.pack_keys_bf16(k, 0, 0, 0, count, reinterpret_cast<uint16_t*>(keys));
        kernel.pack_values_bf16(v, 0, 0, 0, count, reinterpret_cast<uint16_t*>(values));
      } else {
        kernel.pack_keys(k, 0, 0, 0, count, reinterpret_cast<float*>(keys));
        float* rows = reinterpret_cast<float*>(values);
        kernel.read_rows(v, 0, 0, 0, g.keys, dv, false, rows);
        std::fill(rows + g.keys * dv, rows + count * PANEL_KEYS * dv, 0.0f);
      }
    });
    const int64_t per_head = static_cast<int64_t>(tiles.size());
    parallel_for(heads * heads_of * per_head, a.threads, [&](int64_t item, int thread) {
      Room& w = rooms[thread];
      const int64_t i = item / (heads_of * per_head), b = (start + i) / kv_heads, kv = (start + i) % kv_heads;
      const int64_t h = kv * heads_of + item / per_head % heads_of;
      const auto [c, x] = tiles[item % per_head];
      const int64_t rows = std::min<int64_t>(MAX_ROWS, groups[c].keys - x), p = c + x * m;
      list_panels(a, m, spokes, groups, c, x, rows, w);
      const View q = every(a.q, b, h, p - offset, m, rows);
      if (bf16) {
        uint16_t* to = reinterpret_cast<uint16_t*>(w.packed.get());
        for (int64_t r = 0; r < up(rows, 16); ++r, to += wide_d) {
          int64_t e = 0;
          if (r < rows && q.stride[3] == 1) std::memcpy(to, at(q, 0, 0, r, 0), (e = dim) * 2);
          for (; e < wide_d; ++e) to[e] = r < rows && e < dim ? *reinterpret_cast<const uint16_t*>(at(q, 0, 0, r, e)) : uint16_t{0};
        }
      } else {
        kernel.read_rows(q, 0, 0, 0, rows, dim, false, reinterpret_cast<float*>(w.packed.get()));
      }
      Tile t{};
      t.rows = static_cast<int32_t>(rows);
      t.d = static_cast<int32_t>(dim);
      t.dv = static_cast<int32_t>(v_dim);
      t.q = w.packed.get();
      t.q_stride = wide_d;
      t.panels = static_cast<int32_t>(w.panel.size());
      t.panel = w.panel.data();
      t.keep = w.keep.data();
      t.row_keep = w.row_keep.data();
      t.rows_alone = true;
      t.masked = w.masked.data();
      t.low = low.data();
      t.high = high.data();
      t.k = packed_keys.get() + i * key_bytes;
      t.v = packed_values.get() + i * value_bytes;
      t.v_stride = dv;
      t.kv_len = panels * PANEL_KEYS;
      t.scale = a.scale;
      t.o = w.o.get();
      t.m = w.m;
      t.l = w.l;
      t.scratch = w.scratch.get();
      (bf16 ? kernel.attend_bf16 : kernel.attend)(t);
      if (!kernel.all_finite(t.o, rows * dv)) {
        t.sanitize = true;  // a value that is not finite must reach only the rows that attend to it
        (bf16 ? kernel.attend_bf16 : kernel.attend)(t);
      }
      for (int64_t r = 0; r < rows; ++r) w.m[r] *= a.scale * OFFSET_LOG2E;
      read_queries(a.q, b, h, p - offset, m, rows, a.scale * OFFSET_LOG2E, d, false, w.q.get());
      const Rows32 &k = key_rows[i], &v = value_rows[i];
      OffsetTile s{int32_t(rows), int32_t(d), int32_t(dv), w.q.get(), front.data(), int32_t(a.prefix), p, m, k.data, v.data, 0, 0,
                   k.stride, v.stride, w.o.get(), w.m, w.l};
      if (a.prefix) kernel.attend_offsets(s);
      s.list = rest.data();
      s.count = static_cast<int32_t>(rest.size());
      s.limit = p - a.prefix;
      s.k = k.data + p * k.stride;
      s.v = v.data + p * v.stride;
      s.k_row = m * k.stride;
      s.v_row = m * v.stride;
      s.k_step = -k.stride;
      s.v_step = -v.stride;
      kernel.attend_offsets(s);
      for (int64_t r = 0; r < rows; ++r)
        lse[flat_row(a, b, h, p - offset + r * m)] = finish_offset_row(w.o.get() + r * dv, w.m[r], w.l[r], v_dim, dv,
                                                                       at(out, b, h, p - offset + r * m, 0), out.stride[3], out.dtype);
    });
  }
}

}  // namespace sieve
