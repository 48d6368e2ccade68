#include "offset_gradients.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "level.h"
#include "parallel.h"

namespace sieve {

namespace {

// Query rows whose weights and slopes are held for a chunk, so that far offsets meet at the same keys; a quarter of few rows.
constexpr int64_t TILE = 2048, LEAST_TILE = 512;

int64_t tile_rows(int64_t q_len) { return std::clamp(up((q_len + 3) / 4, 16), LEAST_TILE, TILE); }

// One head's rows, and the same rows with zeros for what is not finite: those themselves where everything is.
struct CleanRows {
  Rows32 rows, cleaned;

  CleanRows(const View& x, int64_t b, int64_t h) {
    rows.read(x, b, h);
    const int64_t width = up(x.shape[3], 16);
    for (int64_t j = 0; j < x.shape[2]; ++j)
      if (!kernels().all_finite(rows.data + j * rows.stride, width)) {
        cleaned.read(x, b, h, true);
        return;
      }
  }
  const Rows32& clean() const { return cleaned.data ? cleaned : rows; }
};

}  // namespace

void KeySums::start(const OffsetAttention& a, const OffsetGradients& g, int64_t item, int64_t parts) {
  const int64_t kv_heads = a.k.shape[1], b = item / parts / kv_heads, kv = item / parts % kv_heads;
  const auto zeros = [&](const View& x, const View& result, Buffer<float>& own) {
    const int64_t width = up(x.shape[3], 16), count = x.shape[2] * width;
    const bool there = item % parts == 0 && rows_as_they_are(result) && result.stride[2] == width;
    if (!there) own = Buffer<float>(count);
    float* sums = there ? reinterpret_cast<float*>(at(result, b, kv, 0, 0)) : own.get();
    std::fill_n(sums, count, 0.0f);
    return sums;
  };
  dk = zeros(a.k, g.dk, own_dk);
  dv = zeros(a.v, g.dv, own_dv);
}

int64_t gradient_parts(const OffsetAttention& a) {
  const int64_t tile = tile_rows(a.q.shape[2]), tiles = (a.q.shape[2] + tile - 1) / tile, key_heads = a.q.shape[0] * a.k.shape[1];
  return std::min<int64_t>(std::max<int64_t>(1, 4 / key_heads), tiles);
}

void diagonal_gradients(const OffsetAttention& a, const OffsetGradients& g, int64_t b, int64_t kv, int64_t part, int64_t parts,
                        const KeySums& total, float* dq) {
  const Kernels& kernel = kernels();
  const int64_t group = a.q.shape[1] / a.k.shape[1], q_len = a.q.shape[2], offset = a.k.shape[2] - q_len;
  const int64_t d = up(a.k.shape[3], 16), dv = up(a.v.shape[3], 16);
  const int64_t most = tile_rows(q_len), tiles = (q_len + most - 1) / most;
  const CleanRows keys(a.k, b, kv), values(a.v, b, kv);
  const Rows32 &k = keys.rows, &kc = keys.clean(), &vc = values.clean();
  std::vector<int64_t> front(a.prefix);
  std::iota(front.begin(), front.end(), int64_t{0});
  Buffer<float> q(most * d), q_clean(most * d), pull(most * dv), dq_rows(most * d), scratch(2 * most * OFFSET_CHUNK);
  float lse[TILE], shift[TILE];
  for (int64_t h = kv * group; h < (kv + 1) * group; ++h)
    for (int64_t tile = part; tile < tiles; tile += parts) {
      const int64_t first = tile * most, rows = std::min(most, q_len - first), p = offset + first;
      read_queries(a.q, b, h, first, 1, rows, a.scale * OFFSET_LOG2E, d, false, q.get());
      read_queries(a.q, b, h, first, 1, rows, a.scale, d, true, q_clean.get());
      read_queries(g.d_out, b, h, first, 1, rows, 1.0f, dv, false, pull.get());
      std::fill_n(dq_rows.get(), rows * d, 0.0f);
      for (int64_t r = 0; r < rows; ++r) {
        lse[r] = g.lse[flat_row(a, b, h, first + r)];
        shift[r] = g.shift[flat_row(a, b, h, first + r)];
      }
      OffsetGradient x{};
      x.t = OffsetTile{int32_t(rows), int32_t(d), int32_t(dv), q.get(), nullptr, 0, p, 1, k.data, vc.data, 0, 0, k.stride,
                       vc.stride, nullptr, nullptr, nullptr, nullptr};
      x.lse = lse;
      x.shift = shift;
      x.d_out = pull.get();
      x.q_clean = q_clean.get();
      x.k_clean = kc.data;
      x.clean_row = 0;
      x.clean_step = kc.stride;
      x.dq = dq_rows.get();
      x.dk = total.dk;
      x.dv_sum = total.dv;
      x.scratch = scratch.get();
      const auto each_chunk = [&](const int64_t* list, int64_t count) {
        for (int64_t from = 0; from < count; from += OFFSET_CHUNK) {
          x.t.list = list + from;
          x.t.count = static_cast<int32_t>(std::min<int64_t>(OFFSET_CHUNK, count - from));
          kernel.gradient_offsets(x);
        }
      };
      x.sum_at = 0;
      each_chunk(front.data(), std::min<int64_t>(a.prefix, std::max<int64_t>(p + rows, 0)));
      x.sum_at = p;
      x.t.limit = p - a.prefix;
      x.t.k = k.data + p * k.stride;
      x.t.v = vc.data + p * vc.stride;
      x.t.k_row = k.stride;
      x.t.v_row = vc.stride;
      x.t.k_step = -k.stride;
      x.t.v_step = -vc.stride;
      x.k_clean = kc.data + p * kc.stride;
      x.clean_row = kc.stride;
      x.clean_step = -kc.stride;
      each_chunk(a.offsets, std::upper_bound(a.offsets, a.offsets + a.count, p + rows - 1 - a.prefix) - a.offsets);
      for (int64_t i = 0; i < rows * d; ++i) dq_rows[i] *= a.scale;
      if (dq) {
        std::memcpy(dq + flat_row(a, b, h, first) * d, dq_rows.get(), rows * d * sizeof(float));
        continue;
      }
      for (int64_t r = 0; r < rows; ++r)
        kernel.write_row(dq_rows.get() + r * d, a.q.shape[3], at(g.dq, b, h, first + r, 0), g.dq.stride[3], g.dq.dtype);
    }
}

void write_key_gradients(const OffsetAttention& a, const OffsetGradients& g, const std::vector<KeySums>& sums, int64_t parts) {
  const Kernels& kernel = kernels();
  const int64_t kv_heads = a.k.shape[1], kv_len = a.k.shape[2], d = up(a.k.shape[3], 16), dv = up(a.v.shape[3], 16);
  parallel_for(a.q.shape[0] * kv_heads, a.threads, [&](int64_t item, int) {
    const int64_t b = item / kv_heads, kv = item % kv_heads;
    const KeySums& to = sums[item * parts];
    for (int64_t part = 1; part < parts; ++part) {
      const KeySums& from = sums[item * parts + part];
      for (int64_t i = 0; i < kv_len * d; ++i) to.dk[i] += from.dk[i];
      for (int64_t i = 0; i < kv_len * dv; ++i) to.dv[i] += from.dv[i];
    }
    for (int64_t j = 0; to.own_dk.get() && j < kv_len; ++j)
      kernel.write_row(to.dk + j * d, a.k.shape[3], at(g.dk, b, kv, j, 0), g.dk.stride[3], g.dk.dtype);
    for (int64_t j = 0; to.own_dv.get() && j < kv_len; ++j)
      kernel.write_row(to.dv + j * dv, a.v.shape[3], at(g.dv, b, kv, j, 0), g.dv.stride[3], g.dv.dtype);
  });
}

void attend_offsets_backward(const OffsetAttention& a, const OffsetGradients& g) {
  const int64_t kv_heads = a.k.shape[1], parts = gradient_parts(a);
  std::vector<KeySums> sums(a.q.shape[0] * kv_heads * parts);
  parallel_for(static_cast<int64_t>(sums.size()), a.threads, [&](int64_t item, int) {
    sums[item].start(a, g, item, parts);
    diagonal_gradients(a, g, item / parts / kv_heads, item / parts % kv_heads, item % parts, parts, sums[item], nullptr);
  });
  write_key_gradients(a, g, sums, parts);
}

}  // namespace sieve
