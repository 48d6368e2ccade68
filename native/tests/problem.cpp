#include "problem.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "top_k.h"

using namespace sieve;

static const View absent{nullptr, F32, {0, 0, 0, 0}, {0, 0, 0, 0}};

Problem::Problem(Random& random, Kind kind_, DType dtype) : kind(kind_) {
  const int64_t widths[] = {1, 7, 16, 20, 32, 33, 48, 64, 70};
  const int64_t lengths[] = {1, 2, 15, 16, 17, 31, 48, 63, 65, 90, 150};
  const int64_t b = random.between(1, 2), kv_heads = random.between(1, 2), h = kv_heads * random.between(1, 3);
  const int64_t n = lengths[random.below(11)], m = lengths[random.below(11)], d = widths[random.below(9)], dv = widths[random.below(9)];
  const auto layout = [&] { return static_cast<Layout>(random.below(LAYOUTS)); };
  q = make(random, dtype, {b, h, n, d}, layout());
  k = make(random, dtype, {b, kv_heads, m, d}, layout());
  v = make(random, dtype, {b, kv_heads, m, dv}, layout());
  out = make(random, dtype, {b, h, n, dv}, static_cast<Layout>(random.below(SHARED_HEADS)));
  fill(random, q, 1.5);
  fill(random, k);
  fill(random, v);
  call.q = q.view;
  call.k = k.view;
  call.v = v.view;
  call.mask = call.bias = call.key_mask = absent;
  call.causal = random.chance(0.5);
  call.window = random.chance(0.3) ? random.between(1, 40) : -1;
  call.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(d)));
  call.softcap = random.chance(0.3) ? 3.0f : 0.0f;
  call.threads = static_cast<int>(random.between(1, 3));
  if (random.chance(0.3)) {
    mask = make(random, U8, {random.chance(0.5) ? b : 1, random.chance(0.5) ? h : 1, n, m}, CONTIGUOUS);
    for (int64_t i = 0; i < mask.view.shape[0] * mask.view.shape[1] * n * m; ++i)
      static_cast<char*>(mask.view.data)[i] = random.chance(0.7);
    for (int axis = 0; axis < 2; ++axis)
      if (mask.view.shape[axis] == 1) mask.view.stride[axis] = 0;
    call.mask = mask.view;
  }
  if (kind != TOP_K && random.chance(0.3)) {
    bias = make(random, random.chance(0.5) ? F32 : dtype, {1, random.chance(0.5) ? h : 1, random.chance(0.5) ? n : 1, m}, CONTIGUOUS);
    fill(random, bias);
    if (random.chance(0.5)) bias.set(0, 0, 0, random.below(m), -INFINITY);
    const int64_t full[] = {b, h, n, m};
    for (int axis = 0; axis < 4; ++axis)
      if (bias.view.shape[axis] == 1 && full[axis] > 1) bias.view.stride[axis] = 0;
    call.bias = bias.view;
  }
  if (random.chance(0.3)) {
    key_mask = make(random, U8, {b, 1, 1, m}, random.chance(0.5) ? CONTIGUOUS : STRIDED);
    for (int64_t i = 0; i < b; ++i)
      for (int64_t j = 0; j < m; ++j) key_mask.set(i, 0, 0, j, random.chance(0.8));
    call.key_mask = key_mask.view;
  }
  if (random.chance(0.3)) {
    for (int64_t i = 0; i < h; ++i) sink.push_back(static_cast<float>(random.normal()));
    call.sink = sink.data();
  }
  if (n == m && random.chance(0.5)) {
    edges = {0};
    for (int64_t i = 1; i < m; ++i)
      if (random.chance(0.1)) edges.push_back(i);
    edges.push_back(m);
    call.edges = edges.data();
    call.edge_count = static_cast<int64_t>(edges.size());
  }
  call.choice.prefix = m;
  if (kind == BLOCKS) choose_blocks(random);
  if (kind == RANGES) {
    call.choice.prefix = random.between(0, m);
    call.choice.window = random.between(0, 40);
    call.choice.two_sided = random.chance(0.5);
  }
  if (kind == ROWS) choose_rows(random);
  if (kind == TOP_K) top_k = random.between(1, std::min<int64_t>(m, random.chance(0.3) ? m : 9));
  lse.resize(b * h * n);
  text = "kind " + std::to_string(kind) + " dtype " + std::to_string(dtype) + " [" + std::to_string(b) + ", " + std::to_string(h) + " on " +
         std::to_string(kv_heads) + ", " + std::to_string(n) + " x " + std::to_string(m) + ", " + std::to_string(d) + ", " +
         std::to_string(dv) + "] causal " + std::to_string(call.causal) + " window " + std::to_string(call.window) + " cap " +
         std::to_string(call.softcap) + " mask " + std::to_string(mask.memory != nullptr) + " bias " +
         std::to_string(bias.memory != nullptr) + " top_k " + std::to_string(top_k);
}

void Problem::choose_blocks(Random& random) {
  Choice& c = call.choice;
  const int64_t q_blocks[] = {1, 16, 30, 64, 100}, kv_blocks[] = {16, 32, 24, 64, 128};
  c.batch = random.chance(0.5) ? batch() : 1;
  const int64_t head_counts[] = {1, call.k.shape[1], heads()};
  c.heads = head_counts[random.below(3)];
  c.q_block = q_blocks[random.below(5)];
  c.kv_block = kv_blocks[random.below(5)];
  c.lead = random.below(c.q_block);
  const int64_t tiles = (q_len() + c.lead + c.q_block - 1) / c.q_block, blocks = (kv_len() + c.kv_block - 1) / c.kv_block;
  const double density = random.chance(0.1) ? 0.0 : random.uniform();
  std::vector<int32_t> entries;
  row_ptr = {0};
  for (int64_t i = 0; i < c.batch * c.heads * tiles; ++i) {
    for (int64_t j = 0; j < blocks; ++j)
      if (random.chance(density)) entries.push_back(static_cast<int32_t>(j));
    row_ptr.push_back(static_cast<int64_t>(entries.size()));
  }
  block_memory = std::make_shared<Guarded>(static_cast<int64_t>(entries.size()) * 4, true);
  if (!entries.empty()) std::memcpy(block_memory->data(), entries.data(), entries.size() * 4);
  c.block_index = reinterpret_cast<int32_t*>(block_memory->data());
  c.row_ptr = row_ptr.data();
  if (random.chance(0.4)) {
    const int64_t count = static_cast<int64_t>(entries.size()) * c.q_block;
    row_mask_memory = std::make_shared<Guarded>(count, true);
    for (int64_t i = 0; i < count; ++i) row_mask_memory->data()[i] = random.chance(0.6);
    c.row_mask = reinterpret_cast<uint8_t*>(row_mask_memory->data());
  }
}

void Problem::choose_rows(Random& random) {
  rows.index = absent;
  if (random.chance(0.6)) {
    const int64_t head_counts[] = {1, call.k.shape[1], heads()}, most = random.between(0, 12);
    const int64_t h = head_counts[random.below(3)], b = random.chance(0.5) ? batch() : 1;
    token_memory = std::make_shared<Guarded>(b * h * q_len() * most * 4, true);
    int32_t* token = reinterpret_cast<int32_t*>(token_memory->data());
    for (int64_t i = 0; i < b * h * q_len() * most; ++i) token[i] = static_cast<int32_t>(random.between(-1, kv_len() - 1));
    rows.index = View{token, I32, {b, h, q_len(), most}, {h * q_len() * most, q_len() * most, most, 1}};
  } else {
    for (int64_t i = random.between(0, 9); i > 0; --i) rows.offsets.push_back(random.between(-5, 60));
    rows.first_key = random.between(0, 4);
    rows.prefix = random.between(0, std::min<int64_t>(kv_len(), 4));
    rows.window = random.between(0, 5);
    rows.two_sided = random.chance(0.3);
  }
}

bool Problem::visible(int64_t b, int64_t h, int64_t i, int64_t j) const {
  const int64_t position = kv_len() - q_len() + i;
  if (call.causal && j > position) return false;
  if (call.window >= 0 && (j <= position - call.window || j >= position + call.window)) return false;
  if (!edges.empty()) {
    size_t mine = 0, its = 0;
    while (edges[mine] <= i) ++mine;
    while (edges[its] <= j) ++its;
    if (mine != its) return false;
  }
  if (call.mask.data && !*at(call.mask, b, h, i, j)) return false;
  if (call.key_mask.data && !*at(call.key_mask, b, 0, 0, j)) return false;
  if (call.bias.data && bias.get(0, call.bias.stride[1] ? h : 0, call.bias.stride[2] ? i : 0, j) == -INFINITY) return false;
  return true;
}

bool Problem::kept(int64_t b, int64_t h, int64_t i, int64_t j) const {
  const int64_t position = kv_len() - q_len() + i;
  if (kind == TOP_K) {
    const int32_t* row = index.data() + ((b * heads() + h) * q_len() + i) * top_k;
    return std::find(row, row + top_k, j) != row + top_k;
  }
  const auto near = [&](int64_t prefix, int64_t window, bool two_sided) {
    return j < prefix || (j > position - window && j < position + (two_sided ? window : 1) && window > 0);
  };
  const Choice& c = call.choice;
  if (kind == RANGES) return near(c.prefix, c.window, c.two_sided);
  const auto chooser = [&](int64_t n) { return n == 1 ? 0 : n == heads() ? h : h / group(); };
  if (kind == ROWS) {
    if (near(rows.prefix, rows.window, rows.two_sided)) return true;
    for (const int64_t offset : rows.offsets)
      if (j == position - offset && j >= rows.first_key) return true;
    if (!rows.index.data) return false;
    for (int64_t e = 0; e < rows.index.shape[3]; ++e)
      if (*reinterpret_cast<int32_t*>(at(rows.index, rows.index.shape[0] == 1 ? 0 : b, chooser(rows.index.shape[1]), i, e)) == j) return true;
    return false;
  }
  const int64_t tiles = (q_len() + c.lead + c.q_block - 1) / c.q_block;
  const int64_t row = ((c.batch == 1 ? 0 : b) * c.heads + chooser(c.heads)) * tiles + (i + c.lead) / c.q_block;
  for (int64_t e = c.row_ptr[row]; e < c.row_ptr[row + 1]; ++e)
    if (c.block_index[e] == j / c.kv_block) return !c.row_mask || c.row_mask[e * c.q_block + (i + c.lead) % c.q_block];
  return false;
}

double Problem::logit(int64_t b, int64_t h, int64_t i, int64_t j) const {
  double dot = 0;
  for (int64_t c = 0; c < call.q.shape[3]; ++c) dot += q.get(b, h, i, c) * k.get(b, h / group(), j, c);
  dot *= call.scale;
  return call.softcap != 0.0f ? call.softcap * std::tanh(dot / call.softcap) : dot;
}

double Problem::biased(int64_t b, int64_t h, int64_t i, int64_t j) const {
  const double s = logit(b, h, i, j);
  return call.bias.data ? s + bias.get(0, call.bias.stride[1] ? h : 0, call.bias.stride[2] ? i : 0, j) : s;
}

void Problem::run() {
  if (kind == TOP_K) {
    index.assign(batch() * heads() * q_len() * top_k, -7);
    counts.assign(batch() * heads() * 2, 0);
    top_k_attention(call, top_k, out.view, lse.data(), index.data(), counts.data());
  } else if (kind == ROWS) {
    check_rows(call, rows);
    attend_rows(call, rows, out.view, lse.data());
  } else {
    attend(call, out.view, lse.data());
  }
}

static bool close(double got, double exact, double tolerance) {
  if (!std::isfinite(exact)) return std::isnan(exact) ? std::isnan(got) : got == exact;
  return std::fabs(got - exact) <= tolerance * (1.0 + std::fabs(exact));
}

void Problem::check_output(double tolerance) {
  const int64_t dv = call.v.shape[3];
  for (int64_t b = 0; b < batch(); ++b)
    for (int64_t h = 0; h < heads(); ++h)
      for (int64_t i = 0; i < q_len(); ++i) {
        std::vector<double> s, o(dv, 0.0);
        std::vector<int64_t> keys;
        for (int64_t j = 0; j < kv_len(); ++j)
          if (visible(b, h, i, j) && kept(b, h, i, j)) {
            keys.push_back(j);
            s.push_back(biased(b, h, i, j));
          }
        double top = -INFINITY, total = 0;
        for (const double x : s) top = std::max(top, x);
        if (!sink.empty()) top = std::max(top, static_cast<double>(sink[h]));
        for (double& x : s) total += x = std::exp(x - top);
        if (!sink.empty()) total += std::exp(sink[h] - top);
        for (size_t e = 0; e < keys.size(); ++e)
          for (int64_t c = 0; c < dv; ++c) o[c] += s[e] / total * v.get(b, h / group(), keys[e], c);
        const double exact = total > 0 || std::isnan(total) ? top + std::log(total) : -INFINITY;
        CHECK(close(lse[(b * heads() + h) * q_len() + i], exact, tolerance));
        for (int64_t c = 0; c < dv; ++c) CHECK(close(out.get(b, h, i, c), o[c], tolerance));
      }
}

void Problem::check_top_k() const {
  for (int64_t b = 0; b < batch(); ++b)
    for (int64_t h = 0; h < heads(); ++h)
      for (int64_t i = 0; i < q_len(); ++i) {
        const int32_t* row = index.data() + ((b * heads() + h) * q_len() + i) * top_k;
        int64_t seen = 0, n = 0;
        double worst = INFINITY, best = -INFINITY;
        for (int64_t j = 0; j < kv_len(); ++j) {
          if (!visible(b, h, i, j)) continue;
          ++seen;
          const double s = logit(b, h, i, j);
          (kept(b, h, i, j) ? worst : best) = kept(b, h, i, j) ? std::min(worst, s) : std::max(best, s);
        }
        while (n < top_k && row[n] >= 0) {
          CHECK(row[n] < kv_len() && visible(b, h, i, row[n]));
          CHECK(n == 0 || row[n] > row[n - 1]);
          ++n;
        }
        CHECK(n == std::min(seen, top_k));
        for (int64_t e = n; e < top_k; ++e) CHECK(row[e] == -1);
        CHECK(best <= worst + 1e-5 * (1.0 + std::fabs(worst)));
      }
  int64_t visible_pairs = 0;
  for (int64_t b = 0; b < batch(); ++b)
    for (int64_t h = 0; h < heads(); ++h) {
      int64_t pairs = 0;
      for (int64_t i = 0; i < q_len(); ++i)
        for (int64_t j = 0; j < kv_len(); ++j) pairs += visible(b, h, i, j);
      CHECK(counts[(b * heads() + h) * 2] == pairs);
      CHECK(counts[(b * heads() + h) * 2 + 1] <= pairs);
      visible_pairs += pairs;
    }
  (void)visible_pairs;
}

void Problem::check_gradients(Random& random, double tolerance) {
  const int64_t d = call.q.shape[3], dv = call.v.shape[3], kv_heads = call.k.shape[1];
  const auto layout = [&] { return static_cast<Layout>(random.below(SHARED_HEADS)); };
  Array d_out = make(random, call.q.dtype, {batch(), heads(), q_len(), dv}, static_cast<Layout>(random.below(LAYOUTS)));
  Array dq = make(random, call.q.dtype, {batch(), heads(), q_len(), d}, layout());
  Array dk = make(random, call.q.dtype, {batch(), kv_heads, kv_len(), d}, layout());
  Array d_v = make(random, call.q.dtype, {batch(), kv_heads, kv_len(), dv}, layout());
  fill(random, d_out);
  Array d_bias;
  std::vector<double> exact_bias;
  View bias_view = absent;
  if (call.bias.data) {
    d_bias = make(random, F32, {1, bias.view.shape[1], bias.view.shape[2], kv_len()}, CONTIGUOUS);
    bias_view = d_bias.view;
    std::memset(bias_view.data, 0, bias_view.shape[1] * bias_view.shape[2] * kv_len() * 4);
    for (int axis = 0; axis < 4; ++axis)
      if (call.bias.stride[axis] == 0) bias_view.stride[axis] = 0;
    exact_bias.assign(bias_view.shape[1] * bias_view.shape[2] * kv_len(), 0.0);
  }
  std::vector<float> shift(lse.size());
  std::vector<double> q_(batch() * heads() * q_len() * d), k_(batch() * kv_heads * kv_len() * d), v_(batch() * kv_heads * kv_len() * dv);
  for (int64_t b = 0; b < batch(); ++b)
    for (int64_t h = 0; h < heads(); ++h)
      for (int64_t i = 0; i < q_len(); ++i) {
        const int64_t flat = (b * heads() + h) * q_len() + i;
        double sum = 0;
        for (int64_t c = 0; c < dv; ++c) sum += d_out.get(b, h, i, c) * out.get(b, h, i, c);
        shift[flat] = static_cast<float>(-sum + 0.25);  // any gradient of lse
        for (int64_t j = 0; j < kv_len(); ++j) {
          if (!visible(b, h, i, j) || !kept(b, h, i, j)) continue;
          const int64_t key = (b * kv_heads + h / group()) * kv_len() + j;
          const double s = logit(b, h, i, j), p = std::exp(biased(b, h, i, j) - lse[flat]);
          double pull = shift[flat];
          for (int64_t c = 0; c < dv; ++c) pull += d_out.get(b, h, i, c) * v.get(b, h / group(), j, c);
          for (int64_t c = 0; c < dv; ++c) v_[key * dv + c] += p * d_out.get(b, h, i, c);
          double slope = p * pull;
          if (call.bias.data)
            exact_bias[((bias_view.stride[1] ? h : 0) * bias_view.shape[2] + (bias_view.stride[2] ? i : 0)) * kv_len() + j] += slope;
          if (call.softcap != 0.0f) slope *= 1.0 - (s / call.softcap) * (s / call.softcap);
          slope *= call.scale;
          for (int64_t c = 0; c < d; ++c) {
            q_[flat * d + c] += slope * k.get(b, h / group(), j, c);
            k_[key * d + c] += slope * q.get(b, h, i, c);
          }
        }
      }
  const Gradients g{d_out.view, lse.data(), shift.data(), dq.view, dk.view, d_v.view, bias_view};
  if (kind == TOP_K) {
    RowChoice chosen;
    chosen.index = View{index.data(), I32, {batch(), heads(), q_len(), top_k}, {heads() * q_len() * top_k, q_len() * top_k, top_k, 1}};
    attend_rows_backward(call, chosen, g);
  } else if (kind == ROWS) {
    attend_rows_backward(call, rows, g);
  } else {
    attend_backward(call, g);
  }
  const auto compare = [&](const Array& got, const std::vector<double>& exact, int64_t n, int64_t len, int64_t width) {
    for (int64_t b = 0; b < batch(); ++b)
      for (int64_t h = 0; h < n; ++h)
        for (int64_t i = 0; i < len; ++i)
          for (int64_t c = 0; c < width; ++c) CHECK(close(got.get(b, h, i, c), exact[((b * n + h) * len + i) * width + c], tolerance));
  };
  compare(dq, q_, heads(), q_len(), d);
  compare(dk, k_, kv_heads, kv_len(), d);
  compare(d_v, v_, kv_heads, kv_len(), dv);
  for (size_t i = 0; i < exact_bias.size(); ++i) CHECK(close(static_cast<float*>(d_bias.view.data)[i], exact_bias[i], tolerance));
}
