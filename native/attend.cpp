// Forward and backward of the attend stage: packs keys and values of a few heads at a time, then hands tiles to threads.
#include "attend.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "buffer.h"
#include "level.h"
#include "parallel.h"
#include "plan.h"
#include "side_by_side.h"

namespace sieve {

namespace {

constexpr int64_t PACKED_BYTES = int64_t{1} << 22;  // packed heads held at a time by a thread: still in the last cache when they are read
constexpr int64_t PACK_STEP = 64;                   // panels that one thread packs at a time

// Whether fp32 values can be read where they lie.
bool rows_in_place(const Kernels& k, const View& v) {
  return !k.value_panels && v.dtype == F32 && v.stride[3] == 1 && v.shape[3] % PANEL_KEYS == 0;
}

struct Packed {
  Buffer<char> keys, values;
  int64_t key_bytes = 0, value_bytes = 0;  // of one head
};

void pack(const Attention& a, const Plan& plan, const Kernels& k, bool bf16, bool in_place, int64_t first_head, int64_t heads,
          Packed& out) {
  const int64_t steps = (plan.key_panels + PACK_STEP - 1) / PACK_STEP;
  std::vector<std::vector<uint8_t>> used(heads);
  parallel_for(heads, a.threads, [&](int64_t i, int) {
    plan.used((first_head + i) / plan.kv_heads, (first_head + i) % plan.kv_heads, used[i]);
  });
  const int64_t wide_v = up(a.v.shape[3], 16), wide_d = bf16 ? up(a.k.shape[3], 32) : a.k.shape[3];
  parallel_for(heads * steps, a.threads, [&](int64_t item, int) {
    const int64_t i = item / steps, b = (first_head + i) / plan.kv_heads, h = (first_head + i) % plan.kv_heads;
    char* keys = out.keys.get() + i * out.key_bytes;
    char* values = in_place ? nullptr : out.values.get() + i * out.value_bytes;
    const int64_t end = std::min(plan.key_panels, (item % steps + 1) * PACK_STEP);
    for (int64_t p = item % steps * PACK_STEP; p < end; p += 2) {  // values of bf16 come in pairs of panels
      const int64_t stop = std::min(plan.key_panels, p + 2);
      const bool one = used[i][p], two = p + 1 < stop && used[i][p + 1];
      if (!one && !two) continue;
      const int64_t from = one ? p : p + 1, to = two ? p + 2 : p + 1;
      if (bf16) {
        k.pack_keys_bf16(a.k, b, h, from, to, reinterpret_cast<uint16_t*>(keys) + from * PANEL_KEYS * wide_d);
        k.pack_values_bf16(a.v, b, h, p, stop, reinterpret_cast<uint16_t*>(values) + p * PANEL_KEYS * wide_v);
      } else {
        k.pack_keys(a.k, b, h, from, to, reinterpret_cast<float*>(keys) + from * PANEL_KEYS * wide_d);
        if (k.value_panels)
          k.pack_values(a.v, b, h, from, to, reinterpret_cast<float*>(values) + from * PANEL_KEYS * wide_v);
        else if (!in_place)
          k.read_rows(a.v, b, h, from * PANEL_KEYS, std::min(plan.kv_len, to * PANEL_KEYS), wide_v, false,
                      reinterpret_cast<float*>(values) + from * PANEL_KEYS * wide_v);
      }
    }
  });
}

void pack_queries(const Attention& a, int64_t b, const std::vector<Row>& rows, bool bf16, int64_t wide, char* out) {
  const Kernels& k = kernels();
  const int64_t d = a.q.shape[3];
  if (!bf16) {
    for (size_t r = 0; r < rows.size();) {
      size_t last = r + 1;
      while (last < rows.size() && rows[last].head == rows[r].head) ++last;
      const int64_t first = rows[r].query, stop = rows[last - 1].query + 1;
      k.read_rows(a.q, b, rows[r].head, first, stop, wide, false, reinterpret_cast<float*>(out) + r * wide);
      r = last;
    }
    return;
  }
  uint16_t* to = reinterpret_cast<uint16_t*>(out);
  const int64_t padded = up(static_cast<int64_t>(rows.size()), 16);
  for (int64_t r = 0; r < padded; ++r, to += wide) {
    int64_t c = 0;
    if (r < static_cast<int64_t>(rows.size())) {
      const char* from = at(a.q, b, rows[r].head, rows[r].query, 0);
      if (a.q.stride[3] == 1) {
        std::memcpy(to, from, d * 2);
        c = d;
      }
      for (; c < d; ++c) to[c] = *reinterpret_cast<const uint16_t*>(from + c * a.q.stride[3] * 2);
    }
    for (; c < wide; ++c) to[c] = 0;
  }
}

// Queries that lie as the kernels read them need no copy; null where they do not.
const char* queries_in_place(const Attention& a, int64_t b, const std::vector<Row>& rows, bool bf16, int64_t& stride) {
  const int64_t n = static_cast<int64_t>(rows.size());
  const bool ready = bf16 ? n % 16 == 0 && a.q.shape[3] % 32 == 0 : a.q.dtype == F32;
  if (!ready || a.q.stride[3] != 1 || rows[n - 1].query - rows[0].query != n - 1 || rows[n - 1].head != rows[0].head) return nullptr;
  stride = a.q.stride[2];
  return at(a.q, b, rows[0].head, rows[0].query, 0);
}

constexpr int64_t FORWARD_UNITS = 4, FORWARD_BYTES = int64_t{1} << 18;  // queries and sums of units stay in the second cache

// Rows of one tile against its keys.
struct ForwardUnit {
  ForwardUnit(const Attention& a, const Kernels& k, bool bf16)
      : a(a), k(k), bf16(bf16), wide_d(bf16 ? up(a.k.shape[3], 32) : a.k.shape[3]), wide_v(up(a.v.shape[3], 16)),
        q(MAX_ROWS * up(a.k.shape[3], 32) * (bf16 ? 2 : 4)), o(MAX_ROWS * wide_v), softmax(SOFTMAX_BYTES), m(MAX_ROWS), l(MAX_ROWS) {}

  // `shared`: what the tiles of a head have in common
  void read(const Plan& plan, const Tile& shared, int64_t batch, int64_t t, const std::vector<Row>& of, const Panels& list) {
    b = batch;
    rows = of;
    x = shared;
    plan.look(b, t * plan.tile - plan.lead, rows, list, sight, x);
    x.q = queries_in_place(a, b, rows, bf16, x.q_stride);
    if (!x.q) {
      pack_queries(a, b, rows, bf16, wide_d, q.get());
      x.q = q.get();
      x.q_stride = wide_d;
    }
    x.o = o.get();
    x.m = m.get();
    x.l = l.get();
    x.softmax = softmax.get();
    next = 0;
  }

  const Tile& tile() const { return x; }
  void advance(int32_t stop) {
    const int32_t last = after(x, next, stop, CHUNK_PANELS);
    if (last == next) return;
    if (next == 0 && last == x.panels)
      whole();
    else
      k.attend_part(part_of(x, next, last), next == 0, last == x.panels);
    next = last;
  }

  // Once all keys are done: rows of the output and their lse.
  void finish(const Plan& plan, const View& out, float* lse) {
    if (!x.panels) whole();
    if (!k.all_finite(x.o, x.rows * wide_v)) {
      // a value that is not finite must reach only the rows that attend to it
      x.sanitize = true;
      whole();
    }
    for (int32_t r = 0; r < x.rows; ++r) {
      const auto [h, n] = rows[r];
      const float sink = a.sink ? a.sink[h] : -std::numeric_limits<float>::infinity();
      lse[(b * plan.q_heads + h) * plan.q_len + n] = k.finish_row(x, r, sink, at(out, b, h, n, 0), out.stride[3], out.dtype);
    }
  }

 private:
  void whole() { (bf16 ? k.attend_bf16 : k.attend)(x); }

  const Attention& a;
  const Kernels& k;
  bool bf16;
  int64_t wide_d, wide_v, b = 0;
  Tile x{};
  Buffer<char> q;
  Buffer<float> o;
  Buffer<char> softmax;
  Buffer<float> m, l;
  std::vector<Row> rows;
  Plan::Sight sight;
  int32_t next = 0;
};

// What a thread needs.
struct Workspace {
  Buffer<char> scratch;
  Panels list;
  std::vector<Row> rows;
  std::vector<ForwardUnit> units;
};

constexpr int64_t BACKWARD_UNITS = 8;
constexpr int32_t STEP_PANELS = 4;  // panels that the kernel of gradients takes at a time

struct BackwardUnit {
  BackwardUnit(const Kernels& k, const TileGradient& shared, int64_t wide_d, int64_t wide_v)
      : k(k), x(shared), q(MAX_ROWS * wide_d), q_clean(MAX_ROWS * wide_d), pull(MAX_ROWS * wide_v), dq(MAX_ROWS * wide_d), lse(MAX_ROWS),
        shift(MAX_ROWS), wide_d(wide_d), wide_v(wide_v) {}

  void read(const Attention& a, const Gradients& g, const Plan& plan, int64_t b, int64_t t, const std::vector<Row>& of,
            const Panels& list) {
    rows = of;
    plan.look(b, t * plan.tile - plan.lead, rows, list, sight, x.tile);
    x.tile.q = q.get();
    x.tile.q_stride = wide_d;
    x.lse = lse.get();
    x.shift = shift.get();
    x.d_out = pull.get();
    x.q_clean = q_clean.get();
    x.dq = dq.get();
    std::fill_n(dq.get(), MAX_ROWS * wide_d, 0.0f);
    bias_rows.clear();
    for (size_t r = 0; r < rows.size(); ++r) {
      const auto [h, i] = rows[r];
      k.read_rows(a.q, b, h, i, i + 1, wide_d, false, q.get() + r * wide_d);
      k.read_rows(a.q, b, h, i, i + 1, wide_d, true, q_clean.get() + r * wide_d);
      k.read_rows(g.d_out, b, h, i, i + 1, wide_v, false, pull.get() + r * wide_v);
      const int64_t flat = (b * plan.q_heads + h) * plan.q_len + i;
      lse[r] = g.lse[flat];
      shift[r] = g.shift[flat];
      if (g.d_bias.data) bias_rows.push_back(at(g.d_bias, b, h, i, 0));
    }
    x.d_bias_row = g.d_bias.data ? bias_rows.data() : nullptr;
    next = 0;
  }

  const Tile& tile() const { return x.tile; }
  void advance(int32_t stop) {
    const int32_t last = after(x.tile, next, stop, STEP_PANELS);
    if (last == next) return;
    TileGradient some = x;
    some.tile = part_of(x.tile, next, last);
    k.gradient(some);
    next = last;
  }

  const Kernels& k;
  TileGradient x;
  Buffer<float> q, q_clean, pull, dq, lse, shift;
  int64_t wide_d, wide_v;
  std::vector<Row> rows;
  std::vector<char*> bias_rows;
  Plan::Sight sight;
  int32_t next = 0;
};

}  // namespace

bool multiplies_bf16(const View& query, int threads) {
  const Kernels& k = kernels();
  if (!k.multiplies_bf16 || query.dtype != BF16) return false;
  std::atomic<bool> ordinary{true};
  parallel_for(query.shape[0] * query.shape[1], threads, [&](int64_t i, int) {
    if (ordinary && !k.ordinary_bf16(query, i / query.shape[1], i % query.shape[1])) ordinary = false;
  });
  return ordinary;
}

void attend(const Attention& a, const View& out, float* lse) {
  const Plan plan(a);
  const Kernels& k = kernels();
  const bool bf16 = multiplies_bf16(a.q, a.threads);
  const bool in_place = !bf16 && rows_in_place(k, a.v);
  const int64_t wide_v = up(a.v.shape[3], 16), wide_d = bf16 ? up(a.k.shape[3], 32) : a.k.shape[3];
  const int64_t padded_panels = up(plan.key_panels, 2);
  Packed packed;
  packed.key_bytes = padded_panels * PANEL_KEYS * wide_d * (bf16 ? 2 : 4);
  packed.value_bytes = in_place ? 0 : padded_panels * PANEL_KEYS * wide_v * (bf16 ? 2 : 4);
  const int64_t key_heads = plan.batch * plan.kv_heads;
  const int64_t at_once = std::clamp<int64_t>(PACKED_BYTES * std::max(a.threads, 1) / std::max<int64_t>(packed.key_bytes + packed.value_bytes, 1), 1, key_heads);
  packed.keys = Buffer<char>(at_once * packed.key_bytes);
  packed.values = Buffer<char>(at_once * packed.value_bytes);
  const int64_t scratch = k.tile_scratch(static_cast<int32_t>(a.k.shape[3]), static_cast<int32_t>(a.v.shape[3]), bf16);
  // (attend_bf16 takes a list whole)
  const int64_t unit_bytes = MAX_ROWS * (wide_d + wide_v) * 4;
  const int64_t units = bf16 ? 1 : std::clamp<int64_t>(FORWARD_BYTES / unit_bytes, 1, FORWARD_UNITS);
  std::vector<Workspace> spaces(std::max(a.threads, 1));
  for (Workspace& w : spaces) {
    w.scratch = Buffer<char>(scratch);
    for (int64_t i = 0; i < units; ++i) w.units.emplace_back(a, k, bf16);
  }
  const int64_t choosers = plan.by_head ? plan.group : 1;
  // tiles that one thread takes at a time: enough for its units, but no fewer turns than keep the threads busy
  const int64_t lists = std::min(at_once, key_heads) * choosers * plan.tiles, turns = 8 * static_cast<int64_t>(spaces.size());
  const int64_t together = std::clamp<int64_t>(std::min(units / plan.groups_of_a_tile(), lists / turns), 1, plan.tiles);
  const int64_t runs = (plan.tiles + together - 1) / together;

  for (int64_t first = 0; first < key_heads; first += at_once) {
    const int64_t heads = std::min(at_once, key_heads - first);
    pack(a, plan, k, bf16, in_place, first, heads, packed);
    parallel_for(heads * choosers * runs, a.threads, [&](int64_t item, int thread) {
      Workspace& w = spaces[thread];
      const int64_t i = item / (choosers * runs), rest = item % (choosers * runs);
      const int64_t b = (first + i) / plan.kv_heads, kv = (first + i) % plan.kv_heads;
      const int64_t head = plan.by_head ? kv * plan.group + rest / runs : kv;
      const int64_t stop = plan.tiles - rest % runs * together;  // the long ones of a causal call first
      Tile tile{};
      tile.k = packed.keys.get() + i * packed.key_bytes;
      tile.v = in_place ? at(a.v, b, kv, 0, 0) : packed.values.get() + i * packed.value_bytes;
      tile.v_stride = in_place ? a.v.stride[2] : wide_v;
      tile.scratch = w.scratch.get();
      int64_t filled = 0;
      const auto flush = [&] {
        pass_keys(w.units.data(), filled);
        for (int64_t u = 0; u < filled; ++u) w.units[u].finish(plan, out, lse);
        filled = 0;
      };
      for (int64_t t = std::max<int64_t>(0, stop - together); t < stop; ++t) {
        plan.list(b, plan.by_head ? head : kv * plan.group, t, w.list);
        each_group(plan, head, t, w.rows, [&] {
          w.units[filled].read(plan, tile, b, t, w.rows, w.list);
          if (++filled == units) flush();
        });
      }
      flush();
    });
  }
}

void attend_backward(const Attention& a, const Gradients& g) {
  const Plan plan(a);
  const Kernels& k = kernels();
  const int64_t d = a.k.shape[3], dv = a.v.shape[3], wide_d = up(d, 16), wide_v = up(dv, 16);
  const int64_t key_heads = plan.batch * plan.kv_heads;
  // how work is cut depends on shapes alone, so that gradients are the same on any number of threads
  const int64_t parts = std::min<int64_t>(std::max<int64_t>(1, 4 / key_heads), plan.tiles);
  // units that add to one bias entry take turns
  const int64_t* along = g.d_bias.stride;
  const bool shared_bias = g.d_bias.data && (along[0] == 0 || along[1] == 0 || along[2] == 0);
  const int threads = shared_bias ? 1 : a.threads;
  const int64_t scratch_bytes = k.gradient_scratch(static_cast<int32_t>(d), static_cast<int32_t>(dv));
  const int64_t padded_keys = plan.key_panels * PANEL_KEYS;

  struct Sums {
    Buffer<float> dk, dv;
  };
  std::vector<Sums> sums(key_heads * parts);
  parallel_for(key_heads * parts, threads, [&](int64_t item, int) {
    const int64_t b = item / parts / plan.kv_heads, kv = item / parts % plan.kv_heads, part = item % parts;
    Sums& total = sums[item];
    total.dk = Buffer<float>(plan.kv_len * wide_d);
    total.dv = Buffer<float>(plan.kv_len * wide_v);
    std::fill_n(total.dk.get(), plan.kv_len * wide_d, 0.0f);
    std::fill_n(total.dv.get(), plan.kv_len * wide_v, 0.0f);
    Buffer<float> panels(padded_keys * d), rows(plan.kv_len * wide_d), values(padded_keys * dv), clean(plan.kv_len * wide_v);
    k.pack_keys(a.k, b, kv, 0, plan.key_panels, panels.get());
    k.read_rows(a.k, b, kv, 0, plan.kv_len, wide_d, true, rows.get());
    k.read_rows(a.v, b, kv, 0, plan.kv_len, wide_v, true, clean.get());
    const View clean_view{clean.get(), F32, {1, 1, plan.kv_len, dv}, {0, 0, wide_v, 1}};
    k.pack_keys(clean_view, 0, 0, 0, plan.key_panels, values.get());

    Buffer<char> scratch(scratch_bytes);
    TileGradient x{};
    x.tile.k = panels.get();
    x.tile.scratch = scratch.get();
    x.k_rows = rows.get();
    x.v_panels = values.get();
    x.dk = total.dk.get();
    x.dv = total.dv.get();
    x.d_bias_stride = g.d_bias.stride[3];
    std::vector<BackwardUnit> units;
    for (int64_t i = 0; i < BACKWARD_UNITS; ++i) units.emplace_back(k, x, wide_d, wide_v);
    int64_t filled = 0;
    const auto flush = [&] {
      pass_keys(units.data(), filled);
      for (int64_t i = 0; i < filled; ++i)
        for (size_t r = 0; r < units[i].rows.size(); ++r) {
          const auto [h, n] = units[i].rows[r];
          k.write_row(units[i].dq.get() + r * wide_d, d, at(g.dq, b, h, n, 0), g.dq.stride[3], g.dq.dtype);
        }
      filled = 0;
    };
    std::vector<Row> group_rows;
    Panels list;
    const int64_t choosers = plan.by_head ? plan.group : 1;
    for (int64_t chooser = 0; chooser < choosers; ++chooser)
      for (int64_t t = part; t < plan.tiles; t += parts) {
        const int64_t head = plan.by_head ? kv * plan.group + chooser : kv;
        plan.list(b, plan.by_head ? head : kv * plan.group, t, list);
        each_group(plan, head, t, group_rows, [&] {
          units[filled].read(a, g, plan, b, t, group_rows, list);
          if (++filled == BACKWARD_UNITS) flush();
        });
      }
    flush();
  });
  parallel_for(key_heads, threads, [&](int64_t item, int) {
    const int64_t b = item / plan.kv_heads, kv = item % plan.kv_heads;
    for (int64_t part = 1; part < parts; ++part) {
      const Sums &from = sums[item * parts + part], &to = sums[item * parts];
      for (int64_t i = 0; i < plan.kv_len * wide_d; ++i) to.dk[i] += from.dk[i];
      for (int64_t i = 0; i < plan.kv_len * wide_v; ++i) to.dv[i] += from.dv[i];
    }
    for (int64_t j = 0; j < plan.kv_len; ++j) {
      k.write_row(sums[item * parts].dk.get() + j * wide_d, d, at(g.dk, b, kv, j, 0), g.dk.stride[3], g.dk.dtype);
      k.write_row(sums[item * parts].dv.get() + j * wide_v, dv, at(g.dv, b, kv, j, 0), g.dv.stride[3], g.dv.dtype);
    }
  });
}

}  // namespace sieve
