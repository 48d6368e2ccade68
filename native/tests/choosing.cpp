#include "choosing.h"

#include <cmath>
#include <cstring>

using namespace sieve;

static const View absent{nullptr, F32, {0, 0, 0, 0}, {0, 0, 0, 0}};
Choosing::Choosing(Random& random, bool decoding_, By by_, Keeps rule_, DType dtype, bool two_levels_)
    : decoding(decoding_), two_levels(two_levels_), by(by_), rule(rule_) {
  const int64_t widths[] = {1, 8, 17, 32, 40, 64, 70, 80, 128}, sizes[] = {1, 4, 16, 24, 33, 64}, tiles_of[] = {1, 2, 8, 16, 33, 64};
  const auto layout = [&](bool side_by_side) {
    const Layout l = static_cast<Layout>(random.below(LAYOUTS));
    return side_by_side && l == STRIDED ? PADDED : l;
  };
  batch = random.between(1, 2);
  kv_heads = random.between(1, 2);
  q_heads = kv_heads * random.between(1, 3);
  d = widths[random.below(9)];
  q_len = decoding ? random.between(1, 6) : random.between(1, 45);
  kv_len = decoding ? random.between(q_len, 400) : random.chance(0.4) ? q_len : random.between(1, 200);
  size = decoding ? 16 * random.between(1, 4) : sizes[random.below(6)];
  tile = tiles_of[random.below(6)];
  stride = random.between(1, 4);
  causal = random.chance(0.6);
  if (random.chance(0.3)) window = random.between(1, 60);
  if (two_levels) {
    batch = kv_heads = 1;
    q_heads = 2;
    d = 16;
    q_len = random.between(18, 24);
    kv_len = random.between(1030, 1300);
    size = 1;
    tile = 2;
    window = -1;
  }
  by_tile = random.chance(0.5);
  scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(d)));
  if (!decoding && random.chance(0.25)) softcap = random.chance(0.5) ? 2.0f : 20.0f;
  if (!decoding && !two_levels && q_len == kv_len && random.chance(0.5)) {
    edges = {0};
    for (int64_t i = 1; i < kv_len; ++i)
      if (random.chance(0.06)) edges.push_back(i);
    edges.push_back(kv_len);
  }
  if (random.chance(0.5)) sinks = random.between(1, 20);
  if (random.chance(0.5)) near = random.between(1, 30);
  if (rule == PROVED && random.chance(0.4))
    for (int64_t h = 0; h < q_heads; ++h) sink.push_back(static_cast<float>(2.0 * random.normal()));
  const double thresholds[] = {0.5, 1.5, 3.0, INFINITY, -INFINITY}, errors[] = {0.005, 0.05, 0.3, 0.9};
  const double masses[] = {0.0, 0.5, 0.8, 0.99, 1.0};
  switch (rule) {
    case COUNT: level = static_cast<double>(random.between(1, two_levels ? 40 : 9)); break;
    case SHARE: level = two_levels ? 0.98 : random.uniform(); break;
    case OVER: level = thresholds[random.below(5)]; break;
    case CLOSE: level = 3.0 * random.uniform(); break;
    case HALF: level = two_levels ? 0.9 : masses[random.below(5)]; break;
    case PROVED: level = errors[random.below(4)]; break;
  }
  if ((rule == HALF || rule == PROVED) && random.chance(0.3)) dense_above = random.uniform();
  const KeyKind kinds[] = {GAUSSIAN, OUTLIERS, RUNS, RUNS, EQUAL};
  kind = two_levels ? RUNS : kinds[random.below(5)];
  key = make(random, dtype, {batch, kv_heads, kv_len, d}, layout(decoding));
  q = make(random, dtype, {batch, q_heads, q_len, d}, layout(decoding));
  fill_keys(random, key, kind);
  fill(random, q, two_levels ? 6.0 : random.chance(0.5) ? 1.0 : 3.0);
  if (two_levels)  // queries that point at one run of keys
    for (int64_t h = 0; h < q_heads; ++h)
      for (int64_t i = 0; i < q_len; ++i) {
        const int64_t j = random.below(kv_len);
        for (int64_t c = 0; c < d; ++c) q.set(0, h, i, c, 3.0 * key.get(0, 0, j, c));
      }
  if (!two_levels && random.chance(0.2))
    for (int i = 0; i < 3; ++i) key.set(random.below(batch), random.below(kv_heads), random.below(kv_len), random.below(d), NAN);
  if (random.chance(rule == PROVED ? 0.2 : 0.1)) q.set(random.below(batch), random.below(q_heads), random.below(q_len), random.below(d), NAN);
  if (!two_levels && random.chance(0.3)) {
    mask = make(random, U8, {batch, 1, 1, kv_len}, CONTIGUOUS);
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t j = 0; j < kv_len; ++j) {
        const bool run = j && random.chance(0.9);  // long runs, so that whole blocks are hidden
        mask.set(b, 0, 0, j, run ? mask.get(b, 0, 0, j - 1) : random.chance(0.6));
      }
  }
  if (by == KEYS) {
    sketch_bits = static_cast<int>(random.between(1, 8));
    bits = rule == PROVED ? sketch_bits : static_cast<int>(random.between(1, sketch_bits));
    round = random.chance(0.6);
    if (decoding) round = rule != PROVED && round;
    digits = rule == PROVED ? 2 : round ? 1 : 3;
  }
  threads = static_cast<int>(random.between(1, 3));
  if (decoding && random.chance(0.25)) softcap = random.chance(0.5) ? 2.0f : 20.0f;
  settle(random);
}

void Choosing::settle(Random& random) {
  heads = by_tile ? kv_heads : q_heads;
  lead = causal ? ((kv_len - q_len) % tile + tile) % tile : 0;
  tiles = (q_len + lead + tile - 1) / tile;
  blocks = (kv_len + size - 1) / size;
  summary = std::make_unique<Summary>(random, key.view, mask.memory ? mask.view : absent, size, sketch_bits, random.chance(0.7));
  build_geometry(summary->task);
  lay_out(random);
  text = std::string(decoding ? "decoding" : "prefill") + ", by " + std::to_string(by) + ", rule " + std::to_string(rule) + " at " +
         std::to_string(level) + ", dtype " + std::to_string(key.view.dtype) + " [" + std::to_string(batch) + ", " + std::to_string(q_heads) +
         " on " + std::to_string(kv_heads) + ", " + std::to_string(q_len) + " x " + std::to_string(kv_len) + ", " + std::to_string(d) +
         "] blocks of " + std::to_string(size) + ", tiles of " + std::to_string(tile) + " by " + std::to_string(stride) + ", bits " +
         std::to_string(bits) + " of " + std::to_string(sketch_bits) + ", round " + std::to_string(round) + ", causal " +
         std::to_string(causal) + ", window " + std::to_string(window) + ", cap " + std::to_string(softcap) + ", mask " +
         std::to_string(mask.memory != nullptr) + ", edges " + std::to_string(edges.size()) + ", kind " + std::to_string(kind) +
         ", heads " + std::to_string(heads) + ", ends " + std::to_string(sinks) + ", " + std::to_string(near);
}

// Copies of the summary: a prefill reads any strides but in the last axis, decoding any at all but of channels and planes.
void Choosing::lay_out(Random& random) {
  const auto copy = [&](const Array& x, bool side_by_side) {
    const Layout l = static_cast<Layout>(random.below(SHARED_HEADS));
    return moved(random, x, side_by_side && l == STRIDED ? PADDED : l);
  };
  const Summary& s = *summary;
  Array mean = s.mean;
  if (!decoding) mean.view = View{s.mean.view.data, F32, {1, batch, kv_heads, blocks * d}, {0, kv_heads * blocks * d, blocks * d, 1}};
  mean_ = copy(mean, true);
  for (const auto& [to, from] : {std::pair{&key_scale_, &s.scale}, {&channel_scale_, &s.channel_scale}, {&radius_, &s.radius},
                                 {&count_, &s.count}, {&finite_, &s.finite}, {&error_, &s.error}, {&metric_error_, &s.metric_error},
                                 {&spectral_, &s.spectral}, {&metric_spectral_, &s.metric_spectral}, {&key_norm_, &s.key_norm}})
    *to = copy(*from, !decoding);
  if (s.planes.memory && !decoding) planes_ = copy(s.planes, true);
  if (s.planes.memory && decoding) {  // [bits * batch, kv_heads, kv_len, bytes]
    const int64_t bytes = (d + 7) / 8;
    planes_ = make(random, U8, {s.bits * batch, kv_heads, kv_len, bytes}, random.chance(0.5) ? CONTIGUOUS : PADDED);
    for (int64_t p = 0; p < s.bits; ++p)
      for (int64_t b = 0; b < batch; ++b)
        for (int64_t h = 0; h < kv_heads; ++h)
          for (int64_t j = 0; j < kv_len; ++j)
            std::memcpy(at(planes_.view, p * batch + b, h, j, 0), at(s.planes.view, p, b, h, j * bytes), bytes);
  }
  if (mask.memory) key_mask_ = moved(random, mask, random.chance(0.5) ? CONTIGUOUS : STRIDED);
}

GateTask Choosing::prefill() const {
  GateTask t{};
  t.q = q.view;
  t.key = key.view;
  t.key_mask = mask.memory ? key_mask_.view : absent;
  t.edges = edges.empty() ? nullptr : edges.data();
  t.edge_count = static_cast<int64_t>(edges.size());
  t.causal = causal;
  t.window = window;
  t.scale = scale;
  t.softcap = softcap;
  t.scoring = static_cast<Scoring>(by);
  t.bits = bits;
  t.sketch_bits = sketch_bits;
  t.round_queries = round;
  const auto there = [](const Array& x) { return x.memory ? x.view : absent; };
  t.planes = there(planes_);
  t.key_scale = there(key_scale_);
  t.channel_scale = there(channel_scale_);
  t.mean = mean_.view;
  t.radius = there(radius_);
  t.count = there(count_);
  t.finite = there(finite_);
  t.error = there(error_);
  t.metric_error = there(metric_error_);
  t.spectral = there(spectral_);
  t.metric_spectral = there(metric_spectral_);
  t.key_norm = there(key_norm_);
  t.sink = sink.empty() ? nullptr : sink.data();
  t.rule = static_cast<Rule>(rule);
  t.level = level;
  t.blocks = static_cast<int64_t>(level);
  t.block_size = size;
  t.query_tile = tile;
  t.stride = stride;
  t.heads = heads;
  t.sinks = sinks;
  t.near = near;
  t.dense_above = dense_above;
  t.threads = threads;
  return t;
}

Gate Choosing::scan() const {
  Gate g{};
  const auto there = [](const Array& x) { return x.memory ? x.view : absent; };
  g.q = q.view;
  g.scorer = static_cast<Scorer>(by);
  g.bits = bits;
  g.sketch_bits = sketch_bits;
  g.digits = digits;
  g.key = key.view;
  g.planes = there(planes_);
  g.plane_stride = batch * planes_.view.stride[0];
  g.key_scale = there(key_scale_);
  g.channel_scale = there(channel_scale_);
  g.error = there(error_);
  g.metric_error = there(metric_error_);
  g.spectral = there(spectral_);
  g.metric_spectral = there(metric_spectral_);
  g.mean = mean_.view;
  g.radius = there(radius_);
  g.key_norm = there(key_norm_);
  g.count = there(count_);
  g.finite = there(finite_);
  g.key_mask = absent;
  if (mask.memory) {
    g.key_mask = key_mask_.view;
    std::swap(g.key_mask.shape[0], g.key_mask.shape[2]);
    std::swap(g.key_mask.stride[0], g.key_mask.stride[2]);
  }
  g.sink = sink.empty() ? nullptr : sink.data();
  g.causal = causal;
  g.window = window;
  g.scale = scale;
  g.softcap = softcap;
  g.kv_len = kv_len;
  g.kv_block = size;
  g.q_tile = tile;
  g.lead = lead;
  g.query_stride = stride;
  g.share_group = by_tile;
  g.sinks = sinks;
  g.near = near;
  g.rule = static_cast<KeepRule>(rule);
  g.amount = level;
  g.dense_above = dense_above;
  g.unit = 0x1p-24;
  g.exponential = 0x1p-18;
  g.threads = threads;
  return g;
}

Choosing::Kept Choosing::run(int threads_) const {
  if (!decoding) {
    GateTask t = prefill();
    t.threads = threads_;
    Gated g = gate(t);
    int64_t computed = 0;
    for (const int64_t x : g.computed) computed += x;
    return {g.list, g.kept, g.visible, g.dense, computed};
  }
  Gate g = scan();
  g.threads = threads_;
  const Chosen c = choose(g);
  Kept kept{{}, c.kept, c.visible, c.dense, 0};
  for (size_t i = 0; i + 1 < c.row_ptr.size(); ++i) kept.list.emplace_back(c.block.begin() + c.row_ptr[i], c.block.begin() + c.row_ptr[i + 1]);
  return kept;
}
