// The plan of diagonals: rows go over their lists chunk by chunk, keys are read as they lie in memory.
#include "offsets.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "level.h"
#include "offset_rows.h"
#include "parallel.h"

namespace sieve {

namespace {

constexpr int64_t TILE = 512;                        // query rows that slide over a chunk of the list together
constexpr int64_t COPIED_BYTES = int64_t{1} << 27;   // heads whose copies are held at a time

struct Space {
  Space(int64_t rows, int64_t d, int64_t dv) : q(rows * d), o(rows * dv), m(rows), l(rows), s(rows * OFFSET_CHUNK) {}
  Buffer<float> q, o, m, l, s;
};

void clear(Space& s, int64_t rows, int64_t dv) {
  std::fill_n(s.o.get(), rows * dv, 0.0f);
  std::fill_n(s.m.get(), rows, -std::numeric_limits<float>::infinity());
  std::fill_n(s.l.get(), rows, 0.0f);
}

// A few queries against a long cache: the keys that they read are copied out, nothing else is touched.
void attend_few(const OffsetAttention& a, const View& out, float* lse) {
  const Kernels& kernel = kernels();
  const int64_t batch = a.q.shape[0], kv_heads = a.k.shape[1], group = a.q.shape[1] / kv_heads, q_len = a.q.shape[2];
  const int64_t d = up(a.k.shape[3], 16), dv = up(a.v.shape[3], 16), offset = a.k.shape[2] - q_len;
  parallel_for(batch * kv_heads, a.threads, [&](int64_t item, int) {
    const int64_t b = item / kv_heads, kv = item % kv_heads;
    Buffer<float> keys((a.count + a.prefix) * d), values((a.count + a.prefix) * dv);
    std::vector<int64_t> list(a.count + a.prefix);
    std::iota(list.begin(), list.end(), int64_t{0});
    Space s(1, d, dv);
    for (int64_t i = 0; i < q_len; ++i) {
      const int64_t p = offset + i;
      int64_t n = 0;
      const auto take = [&](int64_t j) {
        kernel.read_rows(a.k, b, kv, j, j + 1, d, false, keys.get() + n * d);
        kernel.read_rows(a.v, b, kv, j, j + 1, dv, false, values.get() + n * dv);
        ++n;
      };
      for (int64_t j = 0; j < std::min(a.prefix, p + 1); ++j) take(j);
      for (int64_t g = 0; g < a.count && p - a.offsets[g] >= a.prefix; ++g) take(p - a.offsets[g]);
      for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
        read_queries(a.q, b, h, i, 1, 1, a.scale * OFFSET_LOG2E, d, false, s.q.get());
        clear(s, 1, dv);
        OffsetTile t{1, int32_t(d), int32_t(dv), s.q.get(), list.data(), int32_t(n), n, 0, keys.get(), values.get(), 0, 0, d, dv,
                     s.o.get(), s.m.get(), s.l.get(), s.s.get()};
        kernel.attend_offsets(t);
        lse[flat_row(a, b, h, i)] = finish_offset_row(s.o.get(), s.m[0], s.l[0], a.v.shape[3], dv, at(out, b, h, i, 0),
                                                      out.stride[3], out.dtype);
      }
    }
  });
}

}  // namespace

// One row for every key is copied out: with a step of 0 from row to row, kernels would take offsets for key rows.
bool rows_as_they_are(const View& x) {
  return x.dtype == F32 && x.stride[3] == 1 && x.stride[2] != 0 && x.shape[3] % 16 == 0;
}

void Rows32::read(const View& x, int64_t b, int64_t h, bool clean) {
  if (!clean && rows_as_they_are(x)) {
    data = reinterpret_cast<const float*>(at(x, b, h, 0, 0));
    stride = x.stride[2];
    return;
  }
  stride = up(x.shape[3], 16);
  copy = Buffer<float>(x.shape[2] * stride);
  kernels().read_rows(x, b, h, 0, x.shape[2], stride, clean, copy.get());
  data = copy.get();
}

void read_queries(const View& q, int64_t b, int64_t h, int64_t first, int64_t step, int64_t count, float factor, int64_t wide,
                  bool clean, float* out) {
  View rows = q;
  rows.data = at(q, 0, 0, first, 0);
  rows.stride[2] = q.stride[2] * step;
  kernels().read_rows(rows, b, h, 0, count, wide, clean, out);
  for (int64_t i = 0; i < count * wide; ++i) out[i] *= factor;
}

float finish_offset_row(float* o, float m, float l, int64_t dv, int64_t wide, void* out, int64_t stride, DType dtype) {
  const float infinity = std::numeric_limits<float>::infinity();
  const bool empty = m == -infinity && l == 0.0f;
  const float share = empty ? 0.0f : 1.0f / l;
  for (int64_t c = 0; c < wide; ++c) o[c] = empty ? 0.0f : o[c] * share;
  kernels().write_row(o, dv, out, stride, dtype);
  return empty ? -infinity : m == -infinity ? l : m * OFFSET_LN2 + std::log(l);
}

void attend_offsets(const OffsetAttention& a, const View& out, float* lse) {
  const int64_t batch = a.q.shape[0], kv_heads = a.k.shape[1], group = a.q.shape[1] / kv_heads, q_len = a.q.shape[2];
  const int64_t kv_len = a.k.shape[2], offset = kv_len - q_len, d = up(a.k.shape[3], 16), dv = up(a.v.shape[3], 16);
  const bool in_place = rows_as_they_are(a.k) && rows_as_they_are(a.v);
  if (!in_place && q_len * (a.count + a.prefix) < kv_len) return attend_few(a, out, lse);
  const Kernels& kernel = kernels();
  std::vector<int64_t> front(a.prefix);
  std::iota(front.begin(), front.end(), int64_t{0});
  const int64_t tiles = (q_len + TILE - 1) / TILE, rows_most = std::min(q_len, TILE), key_heads = batch * kv_heads;
  std::vector<Space> spaces;
  for (int i = 0; i < std::max(a.threads, 1); ++i) spaces.emplace_back(rows_most, d, dv);
  const int64_t at_once = in_place ? key_heads : std::clamp<int64_t>(COPIED_BYTES / (kv_len * (d + dv) * 4), 1, key_heads);
  for (int64_t start = 0; start < key_heads; start += at_once) {
    const int64_t heads = std::min(at_once, key_heads - start);
    std::vector<Rows32> keys(heads), values(heads);
    parallel_for(heads, a.threads, [&](int64_t i, int) {
      keys[i].read(a.k, (start + i) / kv_heads, (start + i) % kv_heads);
      values[i].read(a.v, (start + i) / kv_heads, (start + i) % kv_heads);
    });
    parallel_for(heads * group * tiles, a.threads, [&](int64_t item, int thread) {
      Space& s = spaces[thread];
      const int64_t i = item / (group * tiles), b = (start + i) / kv_heads, kv = (start + i) % kv_heads;
      const int64_t h = kv * group + item / tiles % group;
      const int64_t first = (tiles - 1 - item % tiles) * TILE, rows = std::min(TILE, q_len - first), p = offset + first;
      read_queries(a.q, b, h, first, 1, rows, a.scale * OFFSET_LOG2E, d, false, s.q.get());
      clear(s, rows, dv);
      const Rows32 &k = keys[i], &v = values[i];
      OffsetTile t{int32_t(rows), int32_t(d), int32_t(dv), s.q.get(), front.data(), int32_t(a.prefix), p, 1, k.data, v.data, 0, 0,
                   k.stride, v.stride, s.o.get(), s.m.get(), s.l.get(), s.s.get()};
      if (a.prefix) kernel.attend_offsets(t);
      t.list = a.offsets;
      t.count = static_cast<int32_t>(std::upper_bound(a.offsets, a.offsets + a.count, p + rows - 1 - a.prefix) - a.offsets);
      t.limit = p - a.prefix;
      t.k = k.data + p * k.stride;
      t.v = v.data + p * v.stride;
      t.k_row = k.stride;
      t.v_row = v.stride;
      t.k_step = -k.stride;
      t.v_step = -v.stride;
      kernel.attend_offsets(t);
      for (int64_t r = 0; r < rows; ++r)
        lse[flat_row(a, b, h, first + r)] = finish_offset_row(s.o.get() + r * dv, s.m[r], s.l[r], a.v.shape[3], dv,
                                                              at(out, b, h, first + r, 0), out.stride[3], out.dtype);
    });
  }
}

}  // namespace sieve
