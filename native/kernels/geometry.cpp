// Summaries of key blocks, and the key sketch. Compiled without fused operations: what a code decodes to is defined rounding by
// rounding, and its error is measured against exactly that.
#include "kernels/functions.h"
#include "kernels/sketch.h"
#include "kernels/spectral.h"
#include "kernels/vec.h"

namespace sieve {
namespace SIEVE_LEVEL {

constexpr int CALIBRATION = 64;  // keys that fix the channel scale
constexpr double UNIT = 5.9604644775390625e-8;

void channel_scale(const View& key, int64_t b, int64_t h, const uint8_t* part, float* out) {
  const int d = (int)key.shape[3];
  const int64_t kv_len = key.shape[2];
  float largest = 0.0f;
  int64_t end = 0;
  int n = 0;
  auto value = [&](int64_t j, int c) { return read_one(at(key, b, h, j, c), 0, key.dtype); };
  auto sound = [&](int64_t j) {
    for (int c = 0; c < d; ++c) {
      const float x = value(j, c);
      if (!(x - x == 0.0f)) return false;
    }
    return true;
  };
  // keys that are not finite count and are zeros, so that appending knows when the scale is settled
  for (; end < kv_len && n < CALIBRATION; ++end) {
    if (part && !part[end]) continue;
    ++n;
    if (!sound(end)) continue;
    for (int c = 0; c < d; ++c) {
      const float x = __builtin_fabsf(value(end, c));
      largest = x > largest ? x : largest;
    }
  }
  if (!(largest > 0.0f)) largest = 1.0f;
  const float keys = n > 1 ? (float)n : 1.0f;
  bool any = false;
  for (int c = 0; c < d; ++c) out[c] = 0.0f;
  for (int64_t j = 0; j < end; ++j) {
    if ((part && !part[j]) || !sound(j)) continue;
    for (int c = 0; c < d; ++c) {
      const float x = value(j, c) / largest;
      out[c] += x * x;
    }
  }
  for (int c = 0; c < d; ++c) {
    out[c] = __builtin_sqrtf(out[c] / keys);
    any |= out[c] > 0.0f;
  }
  for (int c = 0; c < d; ++c) {
    const float rms = any ? out[c] : 1.0f;
    out[c] = (rms > 0.0009765625f ? rms : 0.0009765625f) * largest;
  }
}

int64_t key_run_scratch(int64_t block_size, int32_t d) {
  const int64_t wide = up(d, 16);
  return 3 * block_size * wide + 5 * wide + GROUP / 4 * wide + spectral_scratch(block_size, d) + (block_size + 3) / 4 + 64;
}

// Rows of a block as floats, non-finite and masked keys as zeros; `valid` says which enter the statistics.
static inline bool read_block(const KeyRun& r, int64_t first, int n, int wide, float* rows, uint8_t* valid, int* count) {
  bool broken = false;
  *count = 0;
  for (int i = 0; i < n; ++i) {
    float* row = rows + (int64_t)i * wide;
    valid[i] = 0;
    if (r.part && !r.part[first + i]) {
      memset(row, 0, sizeof(float) * wide);
      continue;
    }
    ++*count;
    read_row(at(*r.key, r.b, r.h, first + i, 0), r.key->stride[3], r.key->dtype, r.d, wide, row);
    vi bad = vi{};
    for (int c = 0; c < wide; c += LANES) {
      const vf x = load(row + c);
      bad |= (x - x) != vf{};
    }
    if (!any_lane(bad)) {
      valid[i] = 1;
    } else {
      broken = true;
      memset(row, 0, sizeof(float) * wide);
    }
  }
  return broken;
}

// One pass over rows: the sums of their channels, and the largest sum of squares. False where some row is too short or too long
// for its sum, or no number.
template <int Vectors>
static inline bool sum_rows(const float* rows, int64_t pitch, int n, float* totals, float* largest) {
  vf total[Vectors ? Vectors : 1] = {};
  float high = 0.0f;
  bool safe = true;
  const auto note = [&](float squares) {
    safe &= squares >= SAFE_SQUARE_LOW && squares <= SAFE_SQUARE_HIGH;
    high = squares > high ? squares : high;
  };
  int i = 0;
  for (; i + 4 <= n; i += 4) {
    vf squares[4] = {};
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const vf x = load(rows + (i + k) * pitch + v * LANES);
        total[v] += x;
        squares[k] = fused(x, x, squares[k]);
      }
    }
    float four[4];
    sum_four(squares[0], squares[1], squares[2], squares[3], four);
    for (int k = 0; k < 4; ++k) note(four[k]);
  }
  for (; i < n; ++i) {
    for (int v = 0; v < Vectors; ++v) total[v] += load(rows + i * pitch + v * LANES);
    note(square_sum(rows + i * pitch, Vectors * LANES));
  }
  for (int v = 0; v < Vectors; ++v) store(totals + v * LANES, total[v]);
  *largest = high;
  return safe;
}

// At least the largest distance of the valid rows from `centre` (null: from zero).
static inline float reach(const float* rows, int64_t pitch, const uint8_t* valid, int n, int wide, const float* centre, float* apart,
                          int d) {
  const double outward = 1.0 + (d + 8) * UNIT;
  float squares = 0.0f, careful = 0.0f;
  for (int i = 0; i < n; ++i) {
    if (!valid[i]) continue;
    const float* row = rows + i * pitch;
    if (centre) {
      for (int c = 0; c < wide; c += LANES) store(apart + c, load(row + c) - load(centre + c));
      row = apart;
    }
    const float s = square_sum(row, wide);
    if (s >= SAFE_SQUARE_LOW && s <= SAFE_SQUARE_HIGH) {
      squares = s > squares ? s : squares;
    } else {
      const float exact = round_up(exact_norm(row, wide) * outward);
      careful = exact > careful ? exact : careful;
    }
  }
  const float usual = squares > 0.0f ? round_up(__builtin_sqrt((double)squares) * outward) : 0.0f;
  return usual > careful ? usual : careful;
}

template <int Vectors, int Clips, bool Ragged>
static void summarise_run(const KeyRun& r) {
  const int wide = (int)up(r.d, 16), size = (int)r.block_size;
  float* rows = r.scratch;
  float* error = rows + (int64_t)size * wide;
  float* metric = error + (int64_t)size * wide;
  float* centre = metric + (int64_t)size * wide;
  float* apart = centre + wide;
  float* scale = apart + wide;
  float* inverse = scale + wide;
  float* live = inverse + wide;
  uint8_t* codes = reinterpret_cast<uint8_t*>(live + wide);
  float* rest = live + wide + GROUP / 4 * wide;
  const int64_t kv_len = r.key->shape[2], bytes = (r.d + 7) / 8;
  const float infinity = __builtin_inff(), sketch_outward = (float)(1.0 + (r.d + 16) * UNIT) + 2.0f * (float)UNIT;
  Quantiser s{};
  if (r.bits) {
    s.wide = wide;
    s.d = r.d;
    s.ordinary = true;
    s.levels = (float)((1 << r.bits) - 1);
    s.top = s.levels / 2.0f;
    clips_of(r.bits, s);
    s.scale = scale;
    s.inverse = inverse;
    for (int c = 0; c < wide; ++c) {
      scale[c] = c < r.d ? r.channel_scale[c] : 1.0f;
      s.extreme |= !(scale[c] > 1e-30f && scale[c] < 1e30f);
      s.ordinary &= scale[c] > 1e-12f && scale[c] < 1e12f;
      inverse[c] = 1.0f / scale[c];
      const int32_t ones = c < r.d ? -1 : 0;
      memcpy(live + c, &ones, 4);
    }
    s.live = live;
  }
  uint8_t small[256];
  for (int64_t block = r.first; block < r.last; ++block) {
    const int64_t first = block * size;
    const int n = (int)(kv_len - first < size ? kv_len - first : size);
    uint8_t* valid = size <= 256 ? small : reinterpret_cast<uint8_t*>(rest + spectral_scratch(size, r.d));
    // rows side by side that all take part are read once, where they lie; others are copied, in part as zeros
    const float* keys = rows;
    int64_t pitch = wide;
    float largest = 0.0f;
    bool whole = Vectors && r.key->stride[3] == 1 && !(r.part && memchr(r.part + first, 0, n));
    if (whole && r.key->dtype == F32) {
      keys = reinterpret_cast<const float*>(at(*r.key, r.b, r.h, first, 0));
      pitch = r.key->stride[2];
      if (block + 1 < r.last && kv_len - first >= 2 * size)
        for (int i = 0; i < size; ++i)
          for (int c = 0; c < wide; c += 16) __builtin_prefetch(keys + (size + i) * pitch + c);
    } else if (whole) {
      for (int i = 0; i < n; ++i) read_row(at(*r.key, r.b, r.h, first + i, 0), 1, r.key->dtype, wide, wide, rows + (int64_t)i * wide);
    }
    whole = whole && sum_rows<Vectors>(keys, pitch, n, centre, &largest);
    int count = n, sound = n;
    bool broken = false;
    float norm;
    if (whole) {
      memset(valid, 1, n);
      norm = round_up(__builtin_sqrt((double)largest) * (1.0 + (r.d + 8) * UNIT));
    } else {
      keys = rows;
      pitch = wide;
      broken = read_block(r, first, n, wide, rows, valid, &count);
      sound = 0;
      for (int i = 0; i < n; ++i) sound += valid[i];
      norm = reach(rows, wide, valid, n, wide, nullptr, apart, r.d);
      for (int c = 0; c < wide; c += LANES) {
        vf total = vf{};
        for (int i = 0; i < n; ++i) total += load(rows + (int64_t)i * wide + c);
        store(centre + c, total);
      }
    }
    const vf among = splat(sound > 1 ? (float)sound : 1.0f);
    bool finite = !broken && norm < infinity;
    vi bad = vi{};
    for (int c = 0; c < wide; c += LANES) {
      const vf mean = load(centre + c) / among;
      bad |= (mean - mean) != vf{};
      store(centre + c, mean);
    }
    for (int l = 0; l < LANES; ++l) finite &= bad[l] == 0;
    if (!finite) memset(centre, 0, sizeof(float) * wide);
    r.count[block] = count;
    r.finite[block] = finite;
    r.key_norm[block] = norm;
    memcpy(r.mean + block * r.d, centre, sizeof(float) * r.d);
    if (r.radius) r.radius[block] = reach(keys, pitch, valid, n, wide, centre, apart, r.d);
    if (r.low) {
      float* low = r.low + block * r.d;
      float* high = r.high + block * r.d;
      for (int c = 0; c < r.d; ++c) {
        float least = infinity, greatest = -infinity;
        for (int i = 0; i < n; ++i) {
          if (!valid[i]) continue;
          const float x = keys[i * pitch + c];
          least = x < least ? x : least;
          greatest = x > greatest ? x : greatest;
        }
        low[c] = sound ? least : 0.0f;
        high[c] = sound ? greatest : 0.0f;
      }
    }
    if (!r.bits) continue;
    for (int i = 0; i < n; i += GROUP) {
      const int some = n - i < GROUP ? n - i : GROUP;
      const int64_t j = first + i, at_row = (int64_t)i * wide;
      float squares[2][GROUP] = {};
      sketch_keys<Vectors, Clips, Ragged>(s, keys + i * pitch, pitch, whole && s.ordinary, valid + i, some, codes, error + at_row,
                                          metric + at_row, r.scale + j, squares);
      for (int k = 0; k < some; ++k) pack_planes(codes + k * wide, r.d, r.bits, r.planes + (j + k) * bytes, r.plane_stride);
      errors_above(squares[0], some, error + at_row, wide, sketch_outward, r.error + j);
      errors_above(squares[1], some, metric + at_row, wide, sketch_outward, r.metric_error + j);
    }
    if (r.spectral) {
      r.spectral[block] = largest_eigenvalue(error, n, size, r.d, wide, rest) * sketch_outward;
      r.metric_spectral[block] = largest_eigenvalue(metric, n, size, r.d, wide, rest) * sketch_outward;
    }
  }
}

template <int Vectors, bool Ragged>
static void summarise_with(const KeyRun& r) {
  // as many clips as clips_of gives
  if (r.bits == 4)
    summarise_run<Vectors, 4, Ragged>(r);
  else if (r.bits >= 1 && r.bits <= 3)
    summarise_run<Vectors, 5, Ragged>(r);
  else
    summarise_run<Vectors, 2, Ragged>(r);
}

void summarise(const KeyRun& r) {
  if (r.d == 64)
    summarise_with<64 / LANES, false>(r);
  else if (r.d == 128)
    summarise_with<128 / LANES, false>(r);
  else
    summarise_with<0, true>(r);
}

}  // namespace SIEVE_LEVEL
}  // namespace sieve
