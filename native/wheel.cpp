// The wheel: positions are grouped by their residue modulo m. Between two groups the distances are m * u + r for one r, so the
// offsets with that residue are diagonals of a dense tile: tiles of 64 queries of a group against panels of keys of another, with
// a bit for each offset. Offsets of other residues, and the first keys, are added row by row as the diagonals plan does.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "attend.h"
#include "level.h"
#include "offset_rows.h"
#include "parallel.h"
#include "wheel_tiles.h"

namespace sieve {

namespace {

constexpr int64_t HELD_BYTES = int64_t{1} << 28;  // packed heads that are held at a time

struct Room {
  Room(int64_t d, int64_t wide_q, int64_t dv, int64_t scratch_bytes)
      : packed(MAX_ROWS * wide_q), q(MAX_ROWS * d), o(MAX_ROWS * dv), s(MAX_ROWS * OFFSET_CHUNK), scratch(scratch_bytes) {}
  Buffer<char> packed;
  Buffer<float> q, o, s;
  Buffer<char> scratch;
  float m[MAX_ROWS], l[MAX_ROWS];
  PanelList list;
};

}  // namespace

void attend_wheel(const OffsetAttention& a, const Wheel& wheel, const View& out, float* lse) {
  const Kernels& kernel = kernels();
  const int64_t m = wheel.modulus, batch = a.q.shape[0], kv_heads = a.k.shape[1], heads_of = a.q.shape[1] / kv_heads;
  const int64_t kv_len = a.k.shape[2], offset = kv_len - a.q.shape[2], dim = a.k.shape[3], v_dim = a.v.shape[3];
  const int64_t d = up(dim, 16), dv = up(v_dim, 16);
  const bool bf16 = multiplies_bf16(a.q, a.threads);
  const int64_t wide_d = bf16 ? up(dim, 32) : dim, unit = bf16 ? 2 : 4;
  for (int64_t i = 0; i < std::min(-offset, a.q.shape[2]); ++i)  // queries before the first key
    for (int64_t row = 0; row < batch * a.q.shape[1]; ++row) {
      Buffer<float> nothing(dv);
      const int64_t b = row / a.q.shape[1], h = row % a.q.shape[1];
      lse[flat_row(a, b, h, i)] = finish_offset_row(nothing.get(), -std::numeric_limits<float>::infinity(), 0.0f, v_dim, dv,
                                                    at(out, b, h, i, 0), out.stride[3], out.dtype);
    }
  const WheelTiles cut(a, wheel);
  const std::vector<Group>& groups = cut.groups;
  const int64_t panels = cut.panels;
  std::vector<int64_t> front(a.prefix);
  std::iota(front.begin(), front.end(), int64_t{0});
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
        if (kernel.value_panels) {
          kernel.pack_values(v, 0, 0, 0, count, rows);
        } else {
          kernel.read_rows(v, 0, 0, 0, g.keys, dv, false, rows);
          std::fill(rows + g.keys * dv, rows + count * PANEL_KEYS * dv, 0.0f);
        }
      }
    });
    const int64_t per_head = static_cast<int64_t>(cut.tiles.size());
    parallel_for(heads * heads_of * per_head, a.threads, [&](int64_t item, int thread) {
      Room& w = rooms[thread];
      const int64_t i = item / (heads_of * per_head), b = (start + i) / kv_heads, kv = (start + i) % kv_heads;
      const int64_t h = kv * heads_of + item / per_head % heads_of;
      const auto& tile = cut.tiles[item % per_head];
      const int64_t rows = cut.rows(tile), p = tile.first + tile.second * m;
      cut.list(a, tile, w.list);
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
      t.panels = static_cast<int32_t>(w.list.panel.size());
      t.panel = w.list.panel.data();
      t.keep = w.list.keep.data();
      t.row_keep = w.list.row_keep.data();
      t.rows_alone = true;
      t.masked = w.list.masked.data();
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
                   k.stride, v.stride, w.o.get(), w.m, w.l, w.s.get()};
      if (a.prefix) kernel.attend_offsets(s);
      s.list = cut.rest.data();
      s.count = static_cast<int32_t>(cut.rest.size());
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
