#include "sight.h"

#include <algorithm>

namespace sieve {

Sight::Sight(const GateTask& t) : task_(t) {
  batch_ = t.q.shape[0];
  q_heads_ = t.q.shape[1];
  q_len_ = t.q.shape[2];
  kv_heads_ = t.key.shape[1];
  kv_len_ = t.key.shape[2];
  offset_ = kv_len_ - q_len_;
  blocks_ = (kv_len_ + t.block_size - 1) / t.block_size;
  lead_ = t.causal ? ((offset_ % t.query_tile) + t.query_tile) % t.query_tile : 0;
  tiles_ = (q_len_ + lead_ + t.query_tile - 1) / t.query_tile;
  group_ = q_heads_ / kv_heads_;
  sequences_.resize(batch_);
  if (!t.key_mask.data) return;
  for (int64_t b = 0; b < batch_; ++b) {
    Sequence& s = sequences_[b];
    s.part.resize(kv_len_);
    s.part_before.assign(kv_len_ + 1, 0);
    s.there_before.assign(blocks_ + 1, 0);
    for (int64_t j = 0; j < kv_len_; ++j) {
      s.part[j] = *at(t.key_mask, b, 0, 0, j) != 0;
      s.part_before[j + 1] = s.part_before[j] + s.part[j];
    }
    for (int64_t n = 0; n < blocks_; ++n) s.there_before[n + 1] = s.there_before[n] + (weight(b, n) > 0);
  }
}

// The visible keys of a query are one interval: causality, window and packing each cut one out.
void Sight::interval(int64_t query, int64_t& low, int64_t& high) const {
  const int64_t position = offset_ + query;
  low = 0;
  high = kv_len_;
  if (task_.causal) high = std::min(high, position + 1);
  if (task_.window >= 0) {
    low = std::max(low, position - task_.window + 1);
    if (!task_.causal) high = std::min(high, position + task_.window);
  }
  if (task_.edges) {
    const int64_t* end = task_.edges + task_.edge_count;
    const int64_t* next = std::upper_bound(task_.edges, end, query);
    low = std::max(low, next == task_.edges ? int64_t{0} : next[-1]);
    high = std::min(high, next == end ? kv_len_ : *next);
  }
  high = std::max(high, low);
}

int64_t Sight::keys_between(int64_t b, int64_t low, int64_t high) const {
  if (high <= low) return 0;
  const Sequence& s = sequences_[b];
  return s.part.empty() ? high - low : s.part_before[high] - s.part_before[low];
}

int64_t Sight::weight(int64_t b, int64_t block) const {
  return keys_between(b, block * task_.block_size, std::min(kv_len_, (block + 1) * task_.block_size));
}

void Sight::frame(int64_t b, int64_t tile, Frame& f) const {
  const int64_t size = task_.block_size;
  f.first = std::max<int64_t>(0, tile * task_.query_tile - lead_);
  f.last = std::min(q_len_, (tile + 1) * task_.query_tile - lead_);
  const int64_t n = f.last - f.first;
  f.low.resize(n);
  f.high.resize(n);
  int64_t bottom = kv_len_, top = 0, inner_low = 0, inner_high = kv_len_;
  for (int64_t i = 0; i < n; ++i) {
    interval(f.first + i, f.low[i], f.high[i]);
    inner_low = std::max(inner_low, f.low[i]);
    inner_high = std::min(inner_high, f.high[i]);
    if (f.low[i] == f.high[i]) inner_high = 0;
    else {
      bottom = std::min(bottom, f.low[i]);
      top = std::max(top, f.high[i]);
    }
  }
  f.from = bottom < top ? bottom / size : 0;
  f.to = bottom < top ? (top + size - 1) / size : 0;
  f.whole_from = std::min(f.to, (inner_low + size - 1) / size);
  f.whole_to = std::max(f.whole_from, inner_high >= kv_len_ ? blocks_ : inner_high / size);
  f.edge.clear();
  f.edge_weight.clear();
  for (int64_t block = f.from; block < f.to; ++block) {
    if (block == f.whole_from && f.whole_to > f.whole_from) {
      block = f.whole_to - 1;
      continue;
    }
    const int64_t start = block * size, end = std::min(kv_len_, start + size);
    int64_t most = 0;
    for (int64_t i = 0; i < n; ++i) most = std::max(most, keys_between(b, std::max(start, f.low[i]), std::min(end, f.high[i])));
    f.edge.push_back(block);
    f.edge_weight.push_back(most);
  }
  force(b, f);
}

void Sight::force(int64_t b, Frame& f) const {
  const int64_t size = task_.block_size, n = f.last - f.first;
  f.forced = f.edge;  // cut for some query
  int64_t done_from = -1, done_to = -1;
  auto keep = [&](int64_t i, int64_t from, int64_t to) {  // the blocks that query i sees of keys from..to-1
    from = std::max(from, f.low[i]);
    to = std::min(to, f.high[i]);
    if (from >= to) return;
    // without masked keys, what is visible of a range is marked once for all queries that see the same blocks of it
    if (sequences_[b].part.empty() && from / size == done_from && (to - 1) / size == done_to) return;
    done_from = from / size;
    done_to = (to - 1) / size;
    for (int64_t block = from / size; block * size < to; ++block)
      if (keys_between(b, std::max(block * size, f.low[i]), std::min(std::min(kv_len_, (block + 1) * size), f.high[i])) > 0)
        f.forced.push_back(block);
  };
  if (task_.sinks)
    for (int64_t i = 0; i < n; ++i) keep(i, 0, std::min(task_.sinks, kv_len_));
  if (task_.near)
    for (int64_t i = 0; i < n; ++i) keep(i, offset_ + f.first + i - task_.near + 1, offset_ + f.first + i + task_.near);
  std::sort(f.forced.begin(), f.forced.end());
  f.forced.erase(std::unique(f.forced.begin(), f.forced.end()), f.forced.end());
}

}  // namespace sieve
