#include "decode.h"

#include <algorithm>
#include <limits>
#include <memory>

#include "buffer.h"
#include "level.h"
#include "parallel.h"
#include "plan.h"

namespace sieve {

namespace {

constexpr int64_t MOST_PANELS = 512, LEAST_PANELS = 32;  // of one part of a row's keys
constexpr int64_t ENOUGH_ITEMS = 64;                     // parts are made smaller until there is work for this many threads

// Some rows of one KV head and all the panels that they read.
struct Unit {
  int64_t batch, kv_head;
  std::vector<Row> rows;
  Panels list;
  Plan::Sight sight;
  Tile tile{};
  Buffer<char> q;
  int64_t first_part, parts;
};

Lines lines_of(const View& x, int64_t b, int64_t head, const int32_t* table) {
  const int64_t size = dtype_bytes(x.dtype);
  if (!table) return {at(x, b, head, 0, 0), x.dtype, x.shape[3], x.stride[2] * size, nullptr, 0, 0};
  return {at(x, 0, head, 0, 0), x.dtype, x.shape[3], x.stride[2] * size, table, x.shape[2], x.stride[0] * size};
}

// Each sequence as a call of its own where lengths differ.
std::vector<Attention> calls_of(const Attention& a, const Pages* pages) {
  if (!pages) return {a};
  std::vector<Attention> calls;
  for (int64_t b = 0; b < a.q.shape[0]; ++b) {
    Attention one = a;
    for (View* x : {&one.q, &one.mask, &one.bias}) x->data = x->data ? at(*x, b, 0, 0, 0) : nullptr;
    one.q.shape[0] = one.k.shape[0] = one.v.shape[0] = 1;
    one.k.shape[2] = one.v.shape[2] = pages->length[b];
    if (one.choice.row_ptr) {
      const int64_t tiles = (a.q.shape[2] + a.choice.lead + a.choice.q_block - 1) / a.choice.q_block;
      one.choice.row_ptr += (a.choice.batch == 1 ? 0 : b) * a.choice.heads * tiles;
      one.choice.batch = 1;
    } else {
      one.choice.prefix = std::max(one.choice.prefix, pages->length[b]);
    }
    calls.push_back(one);
  }
  return calls;
}

void pack(const Attention& a, bool bf16, Unit& u) {
  const Kernels& k = kernels();
  const int64_t d = a.q.shape[3], n = static_cast<int64_t>(u.rows.size());
  u.q = Buffer<char>(up(n, 16) * up(d, 32) * 4);
  if (!bf16) {
    for (int64_t r = 0; r < n; ++r)
      k.read_rows(a.q, u.batch, u.rows[r].head, u.rows[r].query, u.rows[r].query + 1, d, false,
                  reinterpret_cast<float*>(u.q.get()) + r * d);
  } else {
    int64_t head[MAX_ROWS], query[MAX_ROWS];
    for (int64_t r = 0; r < n; ++r) {
      head[r] = u.rows[r].head;
      query[r] = u.rows[r].query;
    }
    k.pack_rows_bf16(a.q, u.batch, head, query, static_cast<int>(n), reinterpret_cast<uint16_t*>(u.q.get()));
  }
  u.tile.q = u.q.get();
}

void prepare(const Attention& a, const Plan& plan, bool bf16, int64_t sequence, std::vector<Unit>& units) {
  const int64_t heads = plan.by_head ? plan.q_heads : plan.kv_heads;
  std::vector<Row> rows;
  for (int64_t b = 0; b < plan.batch; ++b)
    for (int64_t head = 0; head < heads; ++head)
      for (int64_t t = 0; t < plan.tiles; ++t) {
        Panels list;
        plan.list(b, plan.by_head ? head : head * plan.group, t, list);
        each_group(plan, head, t, rows, [&] {
          Unit u;
          u.batch = b;
          u.kv_head = plan.by_head ? head / plan.group : head;
          u.rows = rows;
          plan.look(b, t * plan.tile - plan.lead, rows, list, u.sight, u.tile);
          pack(a, bf16, u);
          u.batch = b + sequence;
          units.push_back(std::move(u));
        });
      }
}

}  // namespace

void decode(const Attention& a, const Pages* pages, const View& out, float* lse) {
  const Kernels& k = kernels();
  const int64_t d = a.k.shape[3], dv = a.v.shape[3], q_heads = a.q.shape[1], q_len = a.q.shape[2];
  const bool bf16 = k.bf16_lines && d % 32 == 0 && multiplies_bf16(a.q, a.threads);
  const std::vector<Attention> calls = calls_of(a, pages);
  std::vector<std::unique_ptr<Plan>> plans;
  std::vector<Unit> units;
  for (size_t i = 0; i < calls.size(); ++i) {
    plans.push_back(std::make_unique<Plan>(calls[i]));
    prepare(calls[i], *plans.back(), bf16, static_cast<int64_t>(i), units);
  }

  int64_t panels = 0;
  for (const Unit& u : units) panels += u.tile.panels;
  const int64_t step = std::clamp<int64_t>(panels / ENOUGH_ITEMS / 8 * 8, LEAST_PANELS, MOST_PANELS);
  struct Item {
    size_t unit;
    int64_t first, last;
  };
  std::vector<Item> items;
  int64_t most_rows = 0;
  for (size_t i = 0; i < units.size(); ++i) {
    Unit& u = units[i];
    u.first_part = static_cast<int64_t>(items.size());
    for (int64_t first = 0; first < std::max<int64_t>(u.tile.panels, 1); first += step)
      items.push_back({i, first, std::min<int64_t>(u.tile.panels, first + step)});
    u.parts = static_cast<int64_t>(items.size()) - u.first_part;
    most_rows = std::max(most_rows, up(u.tile.rows, 16));
  }

  const int64_t wide = up(dv, 16), scratch_bytes = k.lines_scratch(static_cast<int32_t>(d), static_cast<int32_t>(dv));
  Buffer<float> o(static_cast<int64_t>(items.size()) * most_rows * wide);
  Buffer<float> m(static_cast<int64_t>(items.size()) * MAX_ROWS), l(static_cast<int64_t>(items.size()) * MAX_ROWS);
  std::vector<Buffer<char>> scratch;
  for (int i = 0; i < std::max(a.threads, 1); ++i) scratch.emplace_back(scratch_bytes);

  parallel_for(static_cast<int64_t>(items.size()), a.threads, [&](int64_t i, int thread) {
    const Item& item = items[i];
    const Unit& u = units[item.unit];
    const int64_t n = item.first;
    const int32_t* table = pages ? pages->table + u.batch * pages->table_stride : nullptr;
    LineTile job{u.tile, lines_of(a.k, u.batch, u.kv_head, table), lines_of(a.v, u.batch, u.kv_head, table)};
    Tile& t = job.tile;
    t.panels = static_cast<int32_t>(item.last - item.first);
    t.panel += n;
    t.keep += n;
    t.masked += n;
    if (t.row_keep) t.row_keep += n * t.rows;
    t.o = o.get() + u.first_part * most_rows * wide + (i - u.first_part) * up(t.rows, 16) * wide;
    t.m = m.get() + i * MAX_ROWS;
    t.l = l.get() + i * MAX_ROWS;
    t.scratch = scratch[thread].get();
    (bf16 ? k.attend_lines_bf16 : k.attend_lines)(job);
    if (!k.all_finite(t.o, t.rows * wide)) {
      // a value that is not finite must reach only the rows that attend to it
      t.sanitize = true;
      (bf16 ? k.attend_lines_bf16 : k.attend_lines)(job);
    }
  });
  parallel_for(static_cast<int64_t>(units.size()), a.threads, [&](int64_t i, int) {
    Unit& u = units[i];
    Tile& t = u.tile;
    t.o = o.get() + u.first_part * most_rows * wide;
    t.m = m.get() + u.first_part * MAX_ROWS;
    t.l = l.get() + u.first_part * MAX_ROWS;
    k.merge(t, static_cast<int>(u.parts), t.o, t.m, t.l);
    for (int32_t r = 0; r < t.rows; ++r) {
      const Row& row = u.rows[r];
      const float sink = a.sink ? a.sink[row.head] : -std::numeric_limits<float>::infinity();
      lse[(u.batch * q_heads + row.head) * q_len + row.query] =
          k.finish_row(t, r, sink, at(out, u.batch, row.head, row.query, 0), out.stride[3], out.dtype);
    }
  });
}

}  // namespace sieve
