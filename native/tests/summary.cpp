#include "summary.h"

#include <algorithm>
#include <cmath>
#include <cstring>

using namespace sieve;

void fill_keys(Random& random, Array& key, KeyKind kind) {
  const int64_t *n = key.view.shape, run = kind == RUNS ? 40 : n[2];
  const bool half = key.view.dtype == F16;
  double size = 1.0;
  if (kind == ZERO) size = 0.0;
  if (kind == LARGE) size = half ? 8e3 : random.chance(0.5) ? 1e30 : 3e37;
  if (kind == SMALL) size = half ? 1e-7 : random.chance(0.5) ? 1e-30 : 1e-41;
  std::vector<double> channel(n[3], 1.0), row(n[3]);
  if (kind == OUTLIERS)
    for (double& x : channel) x = random.chance(0.1) ? 40.0 : random.chance(0.2) ? 1e-4 : 1.0;
  for (int64_t a = 0; a < n[0]; ++a)
    for (int64_t b = 0; b < n[1]; ++b)
      for (int64_t c = 0; c < n[2]; ++c) {
        const double length = kind == OUTLIERS && random.chance(0.1) ? 8.0 * size : size;
        if (kind == RUNS || kind == EQUAL) {
          if (c % run == 0)
            for (double& x : row) x = 2.0 * random.normal();
          for (int64_t d = 0; d < n[3]; ++d) key.set(a, b, c, d, row[d] + (kind == RUNS ? 0.05 * random.normal() : 0.0));
          continue;
        }
        for (int64_t d = 0; d < n[3]; ++d) key.set(a, b, c, d, random.normal() * length * channel[d]);
        const double poison[] = {NAN, INFINITY, -INFINITY};
        if (kind == BROKEN && random.chance(0.05)) key.set(a, b, c, random.below(n[3]), poison[random.below(3)]);
      }
}

Array moved(Random& random, const Array& x, Layout layout) {
  if (!x.memory) return x;
  const int64_t* n = x.view.shape;
  Array y = make(random, x.view.dtype, {n[0], n[1], n[2], n[3]}, layout);
  for (int64_t a = 0; a < n[0]; ++a)
    for (int64_t b = 0; b < n[1]; ++b)
      for (int64_t c = 0; c < n[2]; ++c)
        for (int64_t d = 0; d < n[3]; ++d) std::memcpy(at(y.view, a, b, c, d), at(x.view, a, b, c, d), dtype_bytes(x.view.dtype));
  return y;
}

double log_sum(const std::vector<double>& x) {
  double top = -INFINITY, total = 0;
  for (const double y : x) {
    if (std::isnan(y)) return y;
    top = std::max(top, y);
  }
  if (!std::isfinite(top)) return top;
  for (const double y : x) total += std::exp2(y - top);
  return top + std::log2(total);
}

bool same_bits(const Array& x, const Array& y) {
  const int64_t* n = x.view.shape;
  for (int64_t a = 0; a < n[0]; ++a)
    for (int64_t b = 0; b < n[1]; ++b)
      for (int64_t c = 0; c < n[2]; ++c)
        for (int64_t d = 0; d < n[3]; ++d)
          if (std::memcmp(at(x.view, a, b, c, d), at(y.view, a, b, c, d), dtype_bytes(x.view.dtype)) != 0) return false;
  return true;
}

Summary::Summary(Random& random, const View& key, const View& key_mask, int64_t block_size, int bits_, bool with_spectral)
    : batch(key.shape[0]), heads(key.shape[1]), kv_len(key.shape[2]), d(key.shape[3]), size(block_size),
      blocks((kv_len + block_size - 1) / block_size), bits(bits_) {
  task.key = key;
  task.key_mask = key_mask;
  task.block_size = size;
  task.bits = bits;
  task.threads = static_cast<int>(random.between(1, 3));
  const auto fresh = [&](DType type, std::vector<int64_t> shape) { return make(random, type, shape, CONTIGUOUS); };
  for (Array* x : {&mean, &low, &high}) *x = fresh(F32, {batch, heads, blocks, d});
  for (Array* x : {&key_norm, &radius}) *x = fresh(F32, {1, batch, heads, blocks});
  count = fresh(I32, {1, batch, heads, blocks});
  finite = fresh(U8, {1, batch, heads, blocks});
  task.count = static_cast<int32_t*>(count.view.data);
  task.finite = static_cast<uint8_t*>(finite.view.data);
  task.mean = static_cast<float*>(mean.view.data);
  task.key_norm = static_cast<float*>(key_norm.view.data);
  task.radius = static_cast<float*>(radius.view.data);
  task.low = static_cast<float*>(low.view.data);
  task.high = static_cast<float*>(high.view.data);
  if (!bits) return;
  planes = fresh(U8, {bits, batch, heads, kv_len * ((d + 7) / 8)});
  for (Array* x : {&scale, &error, &metric_error}) *x = fresh(F16, {1, batch, heads, kv_len});
  channel_scale = fresh(F32, {1, batch, heads, d});
  task.planes = static_cast<uint8_t*>(planes.view.data);
  task.scale = static_cast<uint16_t*>(scale.view.data);
  task.error = static_cast<uint16_t*>(error.view.data);
  task.metric_error = static_cast<uint16_t*>(metric_error.view.data);
  task.channel_scale = static_cast<float*>(channel_scale.view.data);
  if (!with_spectral) return;
  for (Array* x : {&spectral, &metric_spectral}) *x = fresh(F32, {1, batch, heads, blocks});
  task.spectral = static_cast<float*>(spectral.view.data);
  task.metric_spectral = static_cast<float*>(metric_spectral.view.data);
}

std::vector<const Array*> Summary::arrays() const {
  std::vector<const Array*> there;
  for (const Array* x : {&mean, &low, &high, &count, &finite, &key_norm, &radius, &spectral, &metric_spectral, &planes, &scale, &error,
                         &metric_error, &channel_scale})
    if (x->memory) there.push_back(x);
  return there;
}

int Summary::code(int64_t b, int64_t h, int64_t j, int64_t c, int leading) const {
  int code = 0;
  for (int p = 0; p < leading; ++p) code = 2 * code + ((entry<uint8_t>(planes, p, b, h, j * ((d + 7) / 8) + c / 8) >> (7 - c % 8)) & 1);
  return code;
}

float Summary::decoded(int64_t b, int64_t h, int64_t j, int64_t c) const {
  const float top = static_cast<float>((1 << bits) - 1) / 2.0f, step = static_cast<float>(scale.get(0, b, h, j));
  return (static_cast<float>(code(b, h, j, c, bits)) - top) * step * static_cast<float>(channel_scale.get(0, b, h, c));
}

double Summary::known(int64_t b, int64_t h, int64_t j, int64_t c, int leading) const {
  const double top = ((1 << leading) - 1) / 2.0, step = std::ldexp(scale.get(0, b, h, j), bits - leading);
  return (code(b, h, j, c, leading) - top) * step * channel_scale.get(0, b, h, c);
}
