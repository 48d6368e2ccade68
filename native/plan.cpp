#include "plan.h"

#include <algorithm>

namespace sieve {

namespace {

constexpr int64_t RANGE_TILE = 64;

uint16_t span(int64_t from, int64_t to) {
  from = std::clamp<int64_t>(from, 0, PANEL_KEYS);
  to = std::clamp<int64_t>(to, 0, PANEL_KEYS);
  return static_cast<uint16_t>(((1u << to) - 1u) & ~((1u << from) - 1u));
}

}  // namespace

Plan::Plan(const Attention& a) : a_(a) {
  batch = a.q.shape[0];
  q_heads = a.q.shape[1];
  kv_heads = a.k.shape[1];
  group = q_heads / kv_heads;
  q_len = a.q.shape[2];
  kv_len = a.k.shape[2];
  offset = kv_len - q_len;
  key_panels = (kv_len + PANEL_KEYS - 1) / PANEL_KEYS;
  const bool blocks = a.choice.row_ptr != nullptr;
  tile = blocks ? a.choice.q_block : RANGE_TILE;
  lead = blocks ? a.choice.lead : (a.causal ? ((offset % tile) + tile) % tile : 0);
  tiles = (q_len + lead + tile - 1) / tile;
  by_head = blocks && a.choice.heads == q_heads && group > 1;
  if (a.key_mask.data) {
    key_bits.resize(batch);
    for (int64_t b = 0; b < batch; ++b) {
      key_bits[b].assign(key_panels, 0);
      for (int64_t j = 0; j < kv_len; ++j)
        if (*at(a.key_mask, b, 0, 0, j)) key_bits[b][j / PANEL_KEYS] |= static_cast<uint16_t>(1u << (j % PANEL_KEYS));
    }
  }
}

void Plan::queries(int64_t t, int64_t& first, int64_t& last) const {
  first = std::max<int64_t>(0, t * tile - lead);
  last = std::min(q_len, (t + 1) * tile - lead);
}

// The visible keys of a query are one interval: causality, window and packing each cut one out.
void Plan::interval(int64_t query, int64_t& low, int64_t& high) const {
  const int64_t position = offset + query;
  low = 0;
  high = kv_len;
  if (a_.causal) high = std::min(high, position + 1);
  if (a_.window >= 0) {
    low = std::max(low, position - a_.window + 1);
    if (!a_.causal) high = std::min(high, position + a_.window);
  }
  if (a_.edges) {
    const int64_t* end = a_.edges + a_.edge_count;
    const int64_t* next = std::upper_bound(a_.edges, end, query);
    low = std::max(low, next == a_.edges ? int64_t{0} : next[-1]);
    high = std::min(high, next == end ? kv_len : *next);
  }
  high = std::max(high, low);
}

void Plan::list(int64_t b, int64_t head, int64_t t, Panels& out) const {
  out.panel.clear();
  out.keep.clear();
  out.row_keep.clear();
  int64_t first, last;
  queries(t, first, last);
  if (first >= last) return;
  const Choice& c = a_.choice;
  if (!c.row_ptr) {
    int64_t low, high, bottom = kv_len, top = 0;
    for (int64_t i = first; i < last; ++i) {
      interval(i, low, high);
      bottom = std::min(bottom, low);
      top = std::max(top, high);
    }
    const int64_t near_low = offset + first - c.window + 1;
    const int64_t near_high = c.window == 0 ? 0 : c.two_sided ? offset + last - 1 + c.window : offset + last;
    for (int64_t p = bottom / PANEL_KEYS; p * PANEL_KEYS < top; ++p) {
      const int64_t base = p * PANEL_KEYS;
      if (base < c.prefix || (c.window > 0 && base < near_high && base + PANEL_KEYS > near_low)) {
        out.panel.push_back(static_cast<int32_t>(p));
        out.keep.push_back(span(0, kv_len - base));
      }
    }
    return;
  }
  const int64_t chooser = c.heads == 1 ? 0 : c.heads == q_heads ? head : head / group;
  const int64_t entry_row = ((c.batch == 1 ? 0 : b) * c.heads + chooser) * tiles + t;
  for (int64_t e = c.row_ptr[entry_row]; e < c.row_ptr[entry_row + 1]; ++e) {
    const int64_t from = c.block_index[e] * c.kv_block, to = std::min(kv_len, from + c.kv_block);
    for (int64_t p = from / PANEL_KEYS; p * PANEL_KEYS < to; ++p) {
      const uint16_t bits = span(from - p * PANEL_KEYS, to - p * PANEL_KEYS);
      if (out.panel.empty() || out.panel.back() != p) {
        out.panel.push_back(static_cast<int32_t>(p));
        out.keep.push_back(0);
        if (c.row_mask) out.row_keep.resize(out.panel.size() * tile, 0);
      }
      out.keep.back() |= bits;
      if (c.row_mask) {
        uint16_t* rows = out.row_keep.data() + (out.panel.size() - 1) * tile;
        for (int64_t i = 0; i < tile; ++i)
          if (c.row_mask[e * tile + i]) rows[i] |= bits;
      }
    }
  }
}

void Plan::used(int64_t b, int64_t kv_head, std::vector<uint8_t>& marks) const {
  const Choice& c = a_.choice;
  marks.assign(key_panels, c.row_ptr ? 0 : 1);
  if (!c.row_ptr) return;
  const int64_t first = c.heads == 1 ? 0 : c.heads == q_heads ? kv_head * group : kv_head;
  const int64_t last = c.heads == q_heads ? first + group : first + 1;
  for (int64_t h = first; h < last; ++h) {
    const int64_t row = ((c.batch == 1 ? 0 : b) * c.heads + h) * tiles;
    for (int64_t e = c.row_ptr[row]; e < c.row_ptr[row + tiles]; ++e) {
      const int64_t from = c.block_index[e] * c.kv_block, to = std::min(kv_len, from + c.kv_block);
      for (int64_t p = from / PANEL_KEYS; p * PANEL_KEYS < to; ++p) marks[p] = 1;
    }
  }
}

void Plan::look(int64_t b, int64_t first_query, const std::vector<Row>& rows, const Panels& list, Sight& s, Tile& t) const {
  const int64_t n = static_cast<int64_t>(rows.size());
  const Choice& c = a_.choice;
  const bool ranges = !c.row_ptr && c.prefix < kv_len;
  s.low.resize(n);
  s.high.resize(n);
  if (ranges) {
    s.near_low.resize(n);
    s.near_high.resize(n);
  }
  int64_t bottom = kv_len, top = 0, inner_low = 0, inner_high = kv_len, near_low = 0, near_high = kv_len;
  for (int64_t r = 0; r < n; ++r) {
    interval(rows[r].query, s.low[r], s.high[r]);
    bottom = std::min(bottom, s.low[r]);
    top = std::max(top, s.high[r]);
    inner_low = std::max(inner_low, s.low[r]);
    inner_high = std::min(inner_high, s.high[r]);
    if (ranges) {
      const int64_t position = offset + rows[r].query;
      s.near_low[r] = c.window > 0 ? position - c.window + 1 : kv_len;
      s.near_high[r] = c.window > 0 ? (c.two_sided ? position + c.window : position + 1) : 0;
      near_low = std::max(near_low, s.near_low[r]);
      near_high = std::min(near_high, s.near_high[r]);
    }
  }
  s.panel.clear();
  s.keep.clear();
  s.masked.clear();
  s.row_keep.clear();
  for (size_t i = 0; i < list.panel.size(); ++i) {
    const int64_t p = list.panel[i], base = p * PANEL_KEYS, end = base + PANEL_KEYS;
    if (end <= bottom || base >= top) continue;
    bool plain = list.keep[i] == 0xffff && base >= inner_low && end <= inner_high && list.row_keep.empty() && !a_.mask.data;
    if (ranges) plain &= end <= c.prefix || (base >= near_low && end <= near_high);
    if (!key_bits.empty()) plain &= key_bits[b][p] == 0xffff;
    s.panel.push_back(list.panel[i]);
    s.keep.push_back(list.keep[i]);
    s.masked.push_back(plain ? 0 : 1);
    if (!list.row_keep.empty())
      for (int64_t r = 0; r < n; ++r) s.row_keep.push_back(list.row_keep[i * tile + (rows[r].query - first_query)]);
  }
  s.mask_row.clear();
  s.bias_row.clear();
  for (const Row& r : rows) {
    if (a_.mask.data) s.mask_row.push_back(at(a_.mask, b, r.head, r.query, 0));
    if (a_.bias.data) s.bias_row.push_back(at(a_.bias, b, r.head, r.query, 0));
  }
  t.rows = static_cast<int32_t>(n);
  t.d = static_cast<int32_t>(a_.k.shape[3]);
  t.dv = static_cast<int32_t>(a_.v.shape[3]);
  t.panels = static_cast<int32_t>(s.panel.size());
  t.panel = s.panel.data();
  t.keep = s.keep.data();
  t.row_keep = s.row_keep.empty() ? nullptr : s.row_keep.data();
  t.masked = s.masked.data();
  t.low = s.low.data();
  t.high = s.high.data();
  t.prefix = c.prefix;
  t.near_low = ranges ? s.near_low.data() : nullptr;
  t.near_high = ranges ? s.near_high.data() : nullptr;
  t.key_bits = key_bits.empty() ? nullptr : key_bits[b].data();
  t.mask_row = a_.mask.data ? s.mask_row.data() : nullptr;
  t.mask_stride = a_.mask.stride[3];
  t.bias_row = a_.bias.data ? s.bias_row.data() : nullptr;
  t.bias_stride = a_.bias.stride[3];
  t.bias_dtype = a_.bias.dtype;
  t.kv_len = kv_len;
  t.scale = a_.scale;
  t.softcap = a_.softcap;
}

}  // namespace sieve
