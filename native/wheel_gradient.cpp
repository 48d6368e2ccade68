// Gradients of the wheel: the tiles of the forward pass by the kernel of block attention, over keys that lie group after group.
// Offsets of other residues and the first keys go by diagonals before, since these work on runs of neighbouring positions.
#include <algorithm>

#include "level.h"
#include "offset_gradients.h"
#include "parallel.h"
#include "wheel_tiles.h"

namespace sieve {

namespace {

// One KV head, group after group, in the forms that the kernel reads; rows and values without what is not finite.
struct GroupedKeys {
  Buffer<float> panels, rows, values;

  GroupedKeys(const OffsetAttention& a, const WheelTiles& cut, int64_t b, int64_t kv)
      : panels(cut.panels * PANEL_KEYS * a.k.shape[3]),
        rows(cut.panels * PANEL_KEYS * up(a.k.shape[3], 16)),
        values(cut.panels * PANEL_KEYS * a.v.shape[3]) {
    const Kernels& kernel = kernels();
    const int64_t dim = a.k.shape[3], v_dim = a.v.shape[3], d = up(dim, 16), dv = up(v_dim, 16);
    Buffer<float> clean(cut.groups[0].keys * dv);  // no group is longer than the first
    std::fill_n(rows.get(), cut.panels * PANEL_KEYS * d, 0.0f);
    for (size_t c = 0; c < cut.groups.size(); ++c) {
      const auto [keys, first_panel] = cut.groups[c];
      const int64_t count = (keys + PANEL_KEYS - 1) / PANEL_KEYS, first = first_panel * PANEL_KEYS;
      const View k = every(a.k, b, kv, c, cut.modulus, keys), v = every(a.v, b, kv, c, cut.modulus, keys);
      kernel.pack_keys(k, 0, 0, 0, count, panels.get() + first * dim);
      kernel.read_rows(k, 0, 0, 0, keys, d, true, rows.get() + first * d);
      kernel.read_rows(v, 0, 0, 0, keys, dv, true, clean.get());
      kernel.pack_keys(View{reinterpret_cast<char*>(clean.get()), F32, {1, 1, keys, v_dim}, {0, 0, dv, 1}}, 0, 0, 0, count,
                       values.get() + first * v_dim);
    }
  }
};

// Sums of grouped keys to where the keys lie.
void add_groups(const WheelTiles& cut, const float* grouped, int64_t wide, float* to) {
  for (size_t c = 0; c < cut.groups.size(); ++c)
    for (int64_t y = 0; y < cut.groups[c].keys; ++y) {
      const float* from = grouped + (cut.groups[c].first_panel * PANEL_KEYS + y) * wide;
      float* row = to + (static_cast<int64_t>(c) + y * cut.modulus) * wide;
      for (int64_t e = 0; e < wide; ++e) row[e] += from[e];
    }
}

void tile_gradients(const OffsetAttention& a, const OffsetGradients& g, const WheelTiles& cut, int64_t b, int64_t kv, int64_t part,
                    int64_t parts, const KeySums& total, const float* dq) {
  const Kernels& kernel = kernels();
  const int64_t group = a.q.shape[1] / a.k.shape[1], offset = a.k.shape[2] - a.q.shape[2], m = cut.modulus;
  const int64_t dim = a.k.shape[3], v_dim = a.v.shape[3], d = up(dim, 16), dv = up(v_dim, 16), keys = cut.panels * PANEL_KEYS;
  const GroupedKeys held(a, cut, b, kv);
  Buffer<float> dk_sum(keys * d), dv_sum(keys * dv);
  std::fill_n(dk_sum.get(), keys * d, 0.0f);
  std::fill_n(dv_sum.get(), keys * dv, 0.0f);
  Buffer<float> q(MAX_ROWS * d), q_clean(MAX_ROWS * d), pull(MAX_ROWS * dv), dq_rows(MAX_ROWS * d);
  Buffer<char> scratch(kernel.gradient_scratch(static_cast<int32_t>(dim), static_cast<int32_t>(v_dim)));
  float lse[MAX_ROWS], shift[MAX_ROWS];
  const std::vector<int64_t> low(MAX_ROWS, 0), high(MAX_ROWS, keys);
  PanelList list;
  for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
    if (part == 0)  // queries before the first key lie in no tile
      for (int64_t i = 0; i < std::min(-offset, a.q.shape[2]); ++i)
        kernel.write_row(dq + flat_row(a, b, h, i) * d, a.q.shape[3], at(g.dq, b, h, i, 0), g.dq.stride[3], g.dq.dtype);
    for (size_t n = part; n < cut.tiles.size(); n += parts) {
      const auto& tile = cut.tiles[n];
      const int64_t rows = cut.rows(tile), first = tile.first + tile.second * m - offset;
      cut.list(a, tile, list);
      read_queries(a.q, b, h, first, m, rows, 1.0f, d, false, q.get());
      read_queries(a.q, b, h, first, m, rows, 1.0f, d, true, q_clean.get());
      read_queries(g.d_out, b, h, first, m, rows, 1.0f, dv, false, pull.get());
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t flat = flat_row(a, b, h, first + r * m);
        lse[r] = g.lse[flat];
        shift[r] = g.shift[flat];
        std::copy_n(dq + flat * d, d, dq_rows.get() + r * d);
      }
      TileGradient x{};
      x.tile.rows = static_cast<int32_t>(rows);
      x.tile.d = static_cast<int32_t>(dim);
      x.tile.dv = static_cast<int32_t>(v_dim);
      x.tile.q = q.get();
      x.tile.q_stride = d;
      x.tile.panels = static_cast<int32_t>(list.panel.size());
      x.tile.panel = list.panel.data();
      x.tile.keep = list.keep.data();
      x.tile.row_keep = list.row_keep.data();
      x.tile.rows_alone = true;
      x.tile.masked = list.masked.data();
      x.tile.low = low.data();
      x.tile.high = high.data();
      x.tile.k = held.panels.get();
      x.tile.kv_len = keys;
      x.tile.scale = a.scale;
      x.tile.scratch = scratch.get();
      x.lse = lse;
      x.shift = shift;
      x.d_out = pull.get();
      x.q_clean = q_clean.get();
      x.k_rows = held.rows.get();
      x.v_panels = held.values.get();
      x.dq = dq_rows.get();
      x.dk = dk_sum.get();
      x.dv = dv_sum.get();
      kernel.gradient(x);
      for (int64_t r = 0; r < rows; ++r)
        kernel.write_row(dq_rows.get() + r * d, a.q.shape[3], at(g.dq, b, h, first + r * m, 0), g.dq.stride[3], g.dq.dtype);
    }
  }
  add_groups(cut, dk_sum.get(), d, total.dk);
  add_groups(cut, dv_sum.get(), dv, total.dv);
}

}  // namespace

void attend_wheel_backward(const OffsetAttention& a, const Wheel& wheel, const OffsetGradients& g) {
  const int64_t kv_heads = a.k.shape[1], parts = gradient_parts(a);
  const WheelTiles cut(a, wheel);
  OffsetAttention others = a;
  others.offsets = cut.rest.data();
  others.count = static_cast<int64_t>(cut.rest.size());
  std::vector<KeySums> sums(a.q.shape[0] * kv_heads * parts);
  const int64_t items = static_cast<int64_t>(sums.size());
  Buffer<float> dq(a.q.shape[0] * a.q.shape[1] * a.q.shape[2] * up(a.k.shape[3], 16));
  parallel_for(items, a.threads, [&](int64_t item, int) {
    sums[item].start(a, g, item, parts);
    diagonal_gradients(others, g, item / parts / kv_heads, item / parts % kv_heads, item % parts, parts, sums[item], dq.get());
  });
  // a tile's rows are spread over all parts of the diagonals, which are done by now
  parallel_for(items, a.threads, [&](int64_t item, int) {
    tile_gradients(a, g, cut, item / parts / kv_heads, item / parts % kv_heads, item % parts, parts, sums[item], dq.get());
  });
  write_key_gradients(a, g, sums, parts);
}

}  // namespace sieve
