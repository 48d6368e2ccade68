// Top-k attention: packs keys, hands tiles of queries to threads, visits key blocks by decreasing upper bound, and attends to
// what is left over. Memory: packed keys of a few heads, and per thread the ranks of one tile.
// A few queries read the keys once, packing as they go: bounds would cost as much as they do, packed keys twice as many bytes.
#include "top_k.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "buffer.h"
#include "level.h"
#include "parallel.h"
#include "plan.h"
#include "rows.h"

namespace sieve {

namespace {

constexpr int64_t PACKED_BYTES = int64_t{1} << 27;
constexpr int64_t PACK_STEP = 64;  // panels, whole blocks
constexpr int64_t NEAR_FLOATS = 8192;  // keys that are packed and met at once, in the first cache
constexpr int64_t SPLIT_BLOCKS = 64;   // blocks that are worth a thread

struct Head {
  float *keys, *centre, *reach;
};

struct Workspace {
  Workspace(const Attention& a, int64_t top_k, int64_t blocks, bool bounded) {
    const int64_t d = a.k.shape[3], dv = a.v.shape[3];
    q = Buffer<float>(MAX_ROWS * d);
    best = Buffer<uint64_t>(MAX_ROWS * top_k);
    s = Buffer<float>(up(top_k, 16));
    row = Buffer<float>(up(std::max(d, dv), 16));
    o = Buffer<float>(up(dv, 16));
    key = Buffer<int32_t>(top_k);
    if (!bounded) return;
    q_panels = Buffer<float>(MAX_ROWS * d);
    upper = Buffer<float>(blocks * MAX_ROWS);
    priority = Buffer<float>(blocks);
  }
  Buffer<float> q, q_panels, upper, priority, s, row, o;
  Buffer<uint64_t> best;
  Buffer<int32_t> key;
  int64_t count[MAX_ROWS], computed[MAX_ROWS];
  float least[MAX_ROWS], q_norm[MAX_ROWS];
  Panels list;
  Plan::Sight sight;
  std::vector<Row> rows;
  std::vector<int32_t> order;
};

// The rows of a tile in heads first_head..last_head-1 of the group, and what they see.
void look(const Attention& a, const Plan& plan, const Kernels& k, int64_t b, int64_t kv, int64_t t, int64_t first_head, int64_t last_head,
          Workspace& w, TopKTile& x) {
  int64_t start, stop;
  plan.queries(t, start, stop);
  w.rows.clear();
  for (int64_t h = first_head; h < last_head; ++h)
    for (int64_t query = start; query < stop; ++query) w.rows.push_back({kv * plan.group + h, query});
  x.tile.q = w.q.get();
  x.count = w.count;
  x.least = w.least;
  x.computed = w.computed;
  plan.look(b, start, w.rows, w.list, w.sight, x.tile);
  for (int32_t r = 0; r < x.tile.rows; ++r) {
    k.read_rows(a.q, b, w.rows[r].head, w.rows[r].query, w.rows[r].query + 1, a.k.shape[3], false, w.q.get() + r * a.k.shape[3]);
    w.count[r] = w.computed[r] = 0;
    w.least[r] = std::numeric_limits<float>::quiet_NaN();
  }
}

int64_t visible_keys(const Attention& a, const Plan& plan, int64_t b, const Row& row) {
  int64_t low, high, n = 0;
  plan.interval(row.query, low, high);
  if (!a.mask.data && !a.key_mask.data) return high - low;
  for (int64_t j = low; j < high; ++j)
    n += (!a.mask.data || *at(a.mask, b, row.head, row.query, j)) && (!a.key_mask.data || *at(a.key_mask, b, 0, 0, j));
  return n;
}

// Upper bounds of the blocks that the tile's panels touch, and the order in which to visit them.
void order_blocks(const Kernels& k, const Plan& plan, const Head& head, Workspace& w, TopKTile& x) {
  const Tile& t = x.tile;
  const int64_t d = t.d;
  for (int r = 0; r < MAX_ROWS; ++r) {
    double size = 0;
    for (int64_t c = 0; r < t.rows && c < d; ++c) size += static_cast<double>(w.q[r * d + c]) * w.q[r * d + c];
    w.q_norm[r] = static_cast<float>(std::sqrt(size) * (1.0 + 1e-6));
  }
  const View rows{w.q.get(), F32, {1, 1, t.rows, d}, {0, 0, d, 1}};
  k.pack_keys(rows, 0, 0, 0, (t.rows + PANEL_KEYS - 1) / PANEL_KEYS, w.q_panels.get());
  const int64_t first = t.panel[0] / BLOCK_PANELS, last = t.panel[t.panels - 1] / BLOCK_PANELS + 1;
  const int64_t used = up(t.rows, PANEL_KEYS) * d;
  std::fill_n(w.q_panels.get() + used, MAX_ROWS * d - used, 0.0f);
  k.upper_bounds(BlockBounds{first, last, plan.kv_len, t.d, head.keys, head.centre, head.reach, w.q_panels.get(), w.q_norm,
                             w.upper.get(), w.priority.get()});
  w.order.resize(last - first);
  for (int64_t i = first; i < last; ++i) w.order[i - first] = static_cast<int32_t>(i);
  const float* priority = w.priority.get();
  std::stable_sort(w.order.begin(), w.order.end(),
                   [=](int32_t i, int32_t j) { return priority[i - first] > priority[j - first]; });
  x.upper = w.upper.get();
  x.order = w.order.data();
}

void attend_tile(const Attention& a, const Plan& plan, const Kernels& k, int64_t b, int64_t kv, const TopKTile& x, Workspace& w,
                 const View& out, float* lse, int32_t* index, int64_t* counts) {
  RowTask task{};
  task.k = rows_of(a.k, b, kv);
  task.v = rows_of(a.v, b, kv);
  task.scale = a.scale;
  task.softcap = a.softcap;
  task.s = w.s.get();
  task.row = w.row.get();
  task.key = w.key.get();
  for (int32_t r = 0; r < x.tile.rows; ++r) {
    const Row& row = w.rows[r];
    const int64_t flat = (b * plan.q_heads + row.head) * plan.q_len + row.query, n = w.count[r];
    uint64_t* best = x.best + r * x.top_k;
    std::sort(best, best + n, [](uint64_t i, uint64_t j) { return static_cast<uint32_t>(i) > static_cast<uint32_t>(j); });
    for (int64_t j = 0; j < n; ++j) {
      w.key[j] = static_cast<int32_t>(~static_cast<uint32_t>(best[j]));
      w.s[j] = k.top_k_product(best[j]);
    }
    std::copy_n(w.key.get(), n, index + flat * x.top_k);
    std::fill_n(index + flat * x.top_k + n, x.top_k - n, -1);
    task.count = n;
    const float sink = a.sink ? a.sink[row.head] : -std::numeric_limits<float>::infinity();
    lse[flat] = k.row_attend(task, sink, w.o.get(), at(out, b, row.head, row.query, 0), out.stride[3], out.dtype);
    if (!counts) continue;
    int64_t* total = counts + (b * plan.q_heads + row.head) * 2;
    __atomic_fetch_add(total, visible_keys(a, plan, b, row), __ATOMIC_RELAXED);
    __atomic_fetch_add(total + 1, w.computed[r], __ATOMIC_RELAXED);
  }
}

// Every row of the call in one tile of a KV head, or two; each part of the keys keeps the best of its own, and ranks order them all.
void top_k_few(const Attention& a, const Plan& plan, const Kernels& k, int64_t top_k, const View& out, float* lse, int32_t* index,
               int64_t* counts) {
  const int64_t d = a.k.shape[3], blocks = (plan.key_panels + BLOCK_PANELS - 1) / BLOCK_PANELS, tiles = plan.batch * plan.kv_heads * plan.tiles;
  const int64_t parts = std::clamp<int64_t>(blocks / SPLIT_BLOCKS, 1, std::max(a.threads, 1));
  const int64_t at_once = std::max<int64_t>(1, NEAR_FLOATS / (BLOCK_PANELS * PANEL_KEYS * d)), most = plan.group * plan.q_len;
  std::vector<Workspace> spaces;
  std::vector<Buffer<float>> near;
  for (int i = 0; i < std::max(a.threads, 1); ++i) {
    spaces.emplace_back(a, top_k, blocks, false);
    near.emplace_back(at_once * BLOCK_PANELS * PANEL_KEYS * d);
  }
  Buffer<uint64_t> best(tiles * parts * most * top_k);
  std::vector<int64_t> count(tiles * parts * most), computed(tiles * parts * most);
  const auto head_of = [&](int64_t tile, int64_t& b, int64_t& kv) {
    b = tile / plan.tiles / plan.kv_heads;
    kv = tile / plan.tiles % plan.kv_heads;
  };
  parallel_for(tiles * parts, a.threads, [&](int64_t item, int thread) {
    Workspace& w = spaces[thread];
    const int64_t tile = item / parts, part = item % parts, t = tile % plan.tiles;
    int64_t b, kv;
    head_of(tile, b, kv);
    plan.list(b, kv * plan.group, t, w.list);
    TopKTile x{};
    x.tile.k = near[thread].get();
    x.top_k = top_k;
    x.best = best.get() + item * most * top_k;
    look(a, plan, k, b, kv, t, 0, plan.group, w, x);
    if (x.tile.panels) {
      const int64_t first = x.tile.panel[0] / BLOCK_PANELS, all = x.tile.panel[x.tile.panels - 1] / BLOCK_PANELS + 1 - first;
      const int64_t last = first + all * (part + 1) / parts;
      for (int64_t block = first + all * part / parts; block < last; block += at_once) {
        x.first_block = static_cast<int32_t>(block);
        x.blocks = static_cast<int32_t>(std::min(at_once, last - block));
        x.k_panel = x.first_block * BLOCK_PANELS;
        k.pack_keys(a.k, b, kv, x.k_panel, std::min<int64_t>(plan.key_panels, x.k_panel + x.blocks * BLOCK_PANELS), near[thread].get());
        k.top_k(x);
      }
    }
    std::copy_n(w.count, x.tile.rows, count.data() + item * most);
    std::copy_n(w.computed, x.tile.rows, computed.data() + item * most);
  });
  parallel_for(tiles, a.threads, [&](int64_t tile, int thread) {
    Workspace& w = spaces[thread];
    int64_t b, kv;
    head_of(tile, b, kv);
    TopKTile x{};
    x.top_k = top_k;
    x.best = best.get() + tile * parts * most * top_k;
    w.list.panel.clear();  // what is seen does not matter any more
    look(a, plan, k, b, kv, tile % plan.tiles, 0, plan.group, w, x);
    std::vector<uint64_t> ranks;
    for (int32_t r = 0; r < x.tile.rows; ++r) {
      ranks.clear();
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t at = (tile * parts + part) * most + r;
        ranks.insert(ranks.end(), best.get() + at * top_k, best.get() + at * top_k + count[at]);
        w.computed[r] += computed[at];
      }
      w.count[r] = std::min<int64_t>(top_k, ranks.size());
      std::nth_element(ranks.begin(), ranks.begin() + w.count[r], ranks.end(), std::greater<uint64_t>());
      std::copy_n(ranks.begin(), w.count[r], x.best + r * top_k);
    }
    attend_tile(a, plan, k, b, kv, x, w, out, lse, index, counts);
  });
}

}  // namespace

void top_k_attention(const Attention& a, int64_t top_k, const View& out, float* lse, int32_t* index, int64_t* counts) {
  const Plan plan(a);
  const Kernels& k = kernels();
  const int64_t d = a.k.shape[3], key_heads = plan.batch * plan.kv_heads;
  const int64_t blocks = (plan.key_panels + BLOCK_PANELS - 1) / BLOCK_PANELS;
  if (plan.q_len * plan.group < MAX_ROWS) return top_k_few(a, plan, k, top_k, out, lse, index, counts);
  const bool bounded = blocks > 2;
  const int64_t key_floats = plan.key_panels * PANEL_KEYS * d;
  const int64_t at_once = std::clamp<int64_t>(PACKED_BYTES / std::max<int64_t>(key_floats * 4, 1), 1, key_heads);
  Buffer<float> keys(at_once * key_floats), centres(bounded ? at_once * blocks * d : 0), reaches(bounded ? at_once * blocks : 0);
  std::vector<Workspace> spaces;
  for (int i = 0; i < std::max(a.threads, 1); ++i) spaces.emplace_back(a, top_k, blocks, bounded);

  for (int64_t first = 0; first < key_heads; first += at_once) {
    const int64_t heads = std::min(at_once, key_heads - first), steps = (plan.key_panels + PACK_STEP - 1) / PACK_STEP;
    const auto head_of = [&](int64_t i) {
      return Head{keys.get() + i * key_floats, centres.get() + (bounded ? i * blocks * d : 0), reaches.get() + (bounded ? i * blocks : 0)};
    };
    parallel_for(heads * steps, a.threads, [&](int64_t item, int) {
      const int64_t i = item / steps, b = (first + i) / plan.kv_heads, h = (first + i) % plan.kv_heads;
      const int64_t from = item % steps * PACK_STEP, to = std::min(plan.key_panels, from + PACK_STEP);
      const Head head = head_of(i);
      k.pack_keys(a.k, b, h, from, to, head.keys + from * PANEL_KEYS * d);
      if (bounded)
        k.block_bounds(BlockBounds{from / BLOCK_PANELS, (to + BLOCK_PANELS - 1) / BLOCK_PANELS, plan.kv_len, static_cast<int32_t>(d),
                                   head.keys, head.centre, head.reach, nullptr, nullptr, nullptr, nullptr});
    });
    parallel_for(heads * plan.tiles, a.threads, [&](int64_t item, int thread) {
      Workspace& w = spaces[thread];
      const int64_t i = item / plan.tiles, b = (first + i) / plan.kv_heads, kv = (first + i) % plan.kv_heads;
      const int64_t t = plan.tiles - 1 - item % plan.tiles;  // the long ones of a causal call first
      int64_t start, stop;
      plan.queries(t, start, stop);
      if (start >= stop) return;
      plan.list(b, kv * plan.group, t, w.list);
      TopKTile x{};
      x.tile.k = head_of(i).keys;
      x.top_k = top_k;
      x.best = w.best.get();
      const int64_t together = std::max<int64_t>(1, MAX_ROWS / (stop - start));
      for (int64_t g = 0; g < plan.group; g += together) {
        look(a, plan, k, b, kv, t, g, std::min(plan.group, g + together), w, x);
        x.order = nullptr;
        x.upper = nullptr;
        x.blocks = 0;
        if (x.tile.panels) {
          x.first_block = x.tile.panel[0] / BLOCK_PANELS;
          x.blocks = x.tile.panel[x.tile.panels - 1] / BLOCK_PANELS + 1 - x.first_block;
          if (bounded) order_blocks(k, plan, head_of(i), w, x);
        }
        k.top_k(x);
        attend_tile(a, plan, k, b, kv, x, w, out, lse, index, counts);
      }
    });
  }
}

}  // namespace sieve
