// Splits the keys into runs of blocks and hands them to threads.
#include "geometry.h"

#include <algorithm>
#include <vector>

#include "buffer.h"
#include "kernels.h"
#include "level.h"
#include "parallel.h"

namespace sieve {

namespace {

constexpr int64_t RUN_KEYS = 1024;  // keys that one thread summarises at a time

template <class T>
T* part_of(T* x, int64_t offset) {
  return x ? x + offset : nullptr;
}

}  // namespace

void build_geometry(const GeometryTask& t) {
  const Kernels& k = kernels();
  const int64_t batch = t.key.shape[0], heads = t.key.shape[1], kv_len = t.key.shape[2], d = t.key.shape[3];
  const int64_t blocks = (kv_len + t.block_size - 1) / t.block_size, bytes = (d + 7) / 8;
  const int64_t room_blocks = t.room_blocks ? t.room_blocks : blocks, room_keys = t.room_blocks ? t.room_keys : kv_len;
  std::vector<std::vector<uint8_t>> part(t.key_mask.data ? batch : 0);
  for (size_t b = 0; b < part.size(); ++b) {
    part[b].resize(kv_len);
    for (int64_t j = 0; j < kv_len; ++j) part[b][j] = *at(t.key_mask, b, 0, 0, j) != 0;
  }
  auto takes_part = [&](int64_t b) { return part.empty() ? nullptr : part[b].data(); };
  if (t.bits && !t.scale_is_given)
    for (int64_t i = 0; i < batch * heads; ++i)
      k.channel_scale(t.key, i / heads, i % heads, takes_part(i / heads), t.channel_scale + i * d);

  const int64_t run = std::max<int64_t>(1, RUN_KEYS / t.block_size), runs = (blocks + run - 1) / run;
  const int threads = static_cast<int>(std::min<int64_t>(std::max(t.threads, 1), batch * heads * runs));
  const int64_t scratch_size = k.key_run_scratch(t.block_size, static_cast<int32_t>(d));
  std::vector<Buffer<float>> scratch;
  for (int i = 0; i < threads; ++i) scratch.emplace_back(scratch_size);
  parallel_for(batch * heads * runs, threads, [&](int64_t item, int thread) {
    const int64_t i = item / runs, b = i / heads;
    KeyRun r{};
    r.key = &t.key;
    r.b = b;
    r.h = i % heads;
    r.first = item % runs * run;
    r.last = std::min(blocks, r.first + run);
    r.block_size = t.block_size;
    r.part = takes_part(b);
    r.d = static_cast<int32_t>(d);
    r.bits = t.bits;
    r.channel_scale = part_of(t.channel_scale, i * d);
    const int64_t block = i * room_blocks + t.first_block, j = i * room_keys + t.first_block * t.block_size;
    r.count = t.count + block;
    r.finite = t.finite + block;
    r.mean = t.mean + block * d;
    r.key_norm = t.key_norm + block;
    r.radius = part_of(t.radius, block);
    r.low = part_of(t.low, block * d);
    r.high = part_of(t.high, block * d);
    r.planes = part_of(t.planes, j * bytes);
    r.plane_stride = batch * heads * room_keys * bytes;
    r.scale = part_of(t.scale, j);
    r.error = part_of(t.error, j);
    r.metric_error = part_of(t.metric_error, j);
    r.spectral = part_of(t.spectral, block);
    r.metric_spectral = part_of(t.metric_spectral, block);
    r.scratch = scratch[thread].get();
    k.summarise(r);
  });
}

}  // namespace sieve
