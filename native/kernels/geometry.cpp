// Summaries of key blocks, and the key sketch. Compiled without fused operations: what a code decodes to is defined rounding by
// rounding, and its error is measured against exactly that.
#include "kernels/functions.h"
#include "kernels/spectral.h"
#include "kernels/vec.h"

namespace sieve {
namespace SIEVE_LEVEL {

constexpr int CALIBRATION = 64;  // keys that fix the channel scale
constexpr int MAX_VECTORS = 512 / LANES;  // head dimensions up to 512
constexpr double UNIT = 5.9604644775390625e-8;
constexpr float LARGEST_HALF = 65504.0f;
constexpr float SAFE_SQUARE_LOW = 1e-30f, SAFE_SQUARE_HIGH = 1e38f;  // sums of squares between them lost nothing

static inline float round_up(double x) {
  const float f = (float)x;
  return (double)f < x ? __builtin_nextafterf(f, __builtin_inff()) : f;
}

static inline float most(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float best = x[0];
  for (int i = 1; i < LANES; ++i) best = x[i] > best ? x[i] : best;
  return best;
#endif
}

static inline bool any_lane(vi x) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)x, (__m512i)x) != 0;
#else
  int32_t all = 0;
  for (int l = 0; l < LANES; ++l) all |= x[l];
  return all != 0;
#endif
}

static inline vf size_of(vf x) { return (vf)((vi)x & splat_int(0x7fffffff)); }
static inline vf floor_of(vf x) { return __builtin_convertvector(__builtin_convertvector(x, vi), vf); }  // 0 <= x < 2^31

// a * b + c, rounded once where there is an instruction for it: for what is compared, not stored
static inline vf fused(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

static inline float square_sum(const float* x, int wide) {
  vf total = vf{};
  for (int i = 0; i < wide; i += LANES) {
    const vf y = load(x + i);
    total = fused(y, y, total);
  }
  return sum(total);
}

// Sums of four vectors at once: half the work of four single ones.
static inline void sum_four(vf a, vf b, vf c, vf d, float* out) {
#if defined(__AVX512F__)
  const __m512 p = (__m512)a, q = (__m512)b, r = (__m512)c, s = (__m512)d;
  const __m512 pq = _mm512_add_ps(_mm512_unpacklo_ps(p, q), _mm512_unpackhi_ps(p, q));
  const __m512 rs = _mm512_add_ps(_mm512_unpacklo_ps(r, s), _mm512_unpackhi_ps(r, s));
  const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(pq, rs, 0x44), _mm512_shuffle_ps(pq, rs, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#else
  out[0] = sum(a);
  out[1] = sum(b);
  out[2] = sum(c);
  out[3] = sum(d);
#endif
}

// Euclidean norm that neither overflows nor loses small numbers, before any rounding outward.
static inline double exact_norm(const float* x, int wide) {
  double total = 0;
  for (int i = 0; i < wide; ++i) total += (double)x[i] * (double)x[i];
  return __builtin_sqrt(total);
}

// The smallest half that is at least x >= 0.
static inline uint16_t half_above(float x) {
#if defined(__F16C__)
  return (uint16_t)_cvtss_sh(x, _MM_FROUND_TO_POS_INF);
#else
  uint16_t h = to_f16(x);
  return from_f16(h) < x ? (uint16_t)(h + 1) : h;
#endif
}

static inline uint16_t error_above(float squares, const float* e, int wide, float outward) {
  if (squares >= SAFE_SQUARE_LOW) return squares <= SAFE_SQUARE_HIGH ? half_above(__builtin_sqrtf(squares) * outward) : 0x7c00;
  for (int i = 0; i < wide; ++i)
    if (e[i] != 0.0f) return 1;  // the smallest half: squares underflow, the number does not vanish
  return 0;
}

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

struct Quantiser {
  int wide, d;
  float top, levels;  // (2^bits - 1) / 2 and 2^bits - 1
  const float* scale;    // [wide], 1 behind the last channel
  const float* inverse;  // [wide]
  bool extreme;          // 1 / scale may leave the normal numbers: divide
  const float* live;     // [wide] all ones as bits, 0 behind the last channel
  float clip[8];  // zeros behind the last
};

static void clips_of(int bits, Quantiser& s) {
  static const float table[5][5] = {{1.0f, 0.95f},
                                    {0.6f, 0.5f, 0.4f, 0.3f, 0.2f},
                                    {0.9f, 0.75f, 0.65f, 0.55f, 0.45f},
                                    {1.0f, 0.9f, 0.8f, 0.7f, 0.6f},
                                    {1.0f, 0.92f, 0.84f, 0.76f}};
  static const int count[5] = {2, 5, 5, 5, 4};
  const int row = bits <= 4 ? bits : 0;
  for (int i = 0; i < count[row]; ++i) s.clip[i] = table[row][i];
}

// One key: its codes, its scale, what the codes lose (`error`, also over the channel scale) and the squares of that, to be summed
// over lanes. Vectors is wide / LANES, or 0; Clips how many there are.
template <int Vectors, int Clips, bool Ragged>
static inline uint16_t sketch_key(const Quantiser& s, const float* key, bool valid, uint8_t* codes, float* error, float* metric,
                                  float* error_squares, float* metric_squares) {
  const int n = Vectors ? Vectors : s.wide / LANES;
  vf white[Vectors ? Vectors : MAX_VECTORS];
  vf peaks = vf{};
  for (int i = 0; i < n; ++i) {
    white[i] = load(key + i * LANES) / load(s.scale + i * LANES);
    peaks = max_(size_of(white[i]), peaks);
  }
  const float peak = most(peaks);
  const vf half = splat(s.top + 0.5f), top = splat(s.top), highest = splat(s.levels);
  const vi counts = splat_int(valid ? -1 : 0);
  uint16_t rounded[8];
  float steps[8], inverse[8], losses[8];
#if defined(__AVX2__)
  {
    const __m256 wished = _mm256_div_ps(_mm256_mul_ps(_mm256_loadu_ps(s.clip), _mm256_set1_ps(peak)), _mm256_set1_ps(s.top));
    const __m128i halves = _mm256_cvtps_ph(_mm256_min_ps(wished, _mm256_set1_ps(LARGEST_HALF)), _MM_FROUND_TO_NEAREST_INT);
    const __m256 wide = _mm256_cvtph_ps(halves), one = _mm256_set1_ps(1.0f);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(rounded), halves);
    _mm256_storeu_ps(steps, wide);
    const __m256 divisor = _mm256_blendv_ps(one, wide, _mm256_cmp_ps(wide, _mm256_setzero_ps(), _CMP_GT_OQ));
    _mm256_storeu_ps(inverse, _mm256_div_ps(one, divisor));
  }
#else
  for (int k = 0; k < Clips; ++k) {
    const float wished = s.clip[k] * peak / s.top;
    rounded[k] = to_f16(wished < LARGEST_HALF ? wished : LARGEST_HALF);
    steps[k] = from_f16(rounded[k]);
    inverse[k] = 1.0f / (steps[k] > 0.0f ? steps[k] : 1.0f);
  }
#endif
  vf lost[Clips < 4 ? 4 : Clips];
#pragma GCC unroll 5
  for (int k = 0; k < (Clips < 4 ? 4 : Clips); ++k) {
    lost[k] = vf{};
    if (k >= Clips) continue;
    const vf by = splat(inverse[k]), w = splat(steps[k]);
    for (int i = 0; i < n; ++i) {
      const vf code = floor_of(min_(max_(fused(white[i], by, half), vf{}), highest));
      vf apart = fused(code - top, w, -white[i]);
      if (Ragged) apart = (vf)((vi)apart & (vi)load(s.live + i * LANES));
      lost[k] = fused(apart, apart, lost[k]);
    }
  }
  sum_four(lost[0], lost[1], lost[2], lost[3], losses);
  if constexpr (Clips > 4) losses[4] = sum(lost[4]);
  float least = losses[0];
  int best = 0;
#pragma GCC unroll 5
  for (int k = 1; k < Clips; ++k) {
    const int better = -(int)(losses[k] < least);  // a branch would be guessed wrong every other time
    least = losses[k] < least ? losses[k] : least;
    best = (best & ~better) | (k & better);
  }
  // The code is the floor of a quotient. A product by the inverse gives the same but next to an integer: there it is divided.
  const float wide = steps[best];
  const vf w = splat(wide), by = splat(inverse[best]), divisor = splat(wide > 0.0f ? wide : 1.0f);
  const vf close = splat((s.levels + 1.0f) * 1e-6f);
  vi doubtful = vi{};
  vf level[Vectors ? Vectors : MAX_VECTORS];
  for (int i = 0; i < n; ++i) {
    const vf quotient = fused(white[i], by, half);
    doubtful |= size_of(quotient - round_even(quotient)) < close;
    level[i] = min_(max_(quotient, vf{}), highest);
  }
  if (any_lane(doubtful))
    for (int i = 0; i < n; ++i) level[i] = min_(max_(white[i] / divisor + half, vf{}), highest);
  vf squares = vf{}, metric_sum = vf{};
  for (int i = 0; i < n; ++i) {
    const vi whole = __builtin_convertvector(level[i], vi);
#if defined(__AVX512F__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i * LANES), _mm512_cvtepi32_epi8((__m512i)whole));
#else
    for (int l = 0; l < LANES; ++l) codes[i * LANES + l] = (uint8_t)whole[l];
#endif
    vf e = load(key + i * LANES) - (__builtin_convertvector(whole, vf) - top) * w * load(s.scale + i * LANES);
    if (Ragged) e = (vf)((vi)e & (vi)load(s.live + i * LANES));
    e = (vf)((vi)e & counts);
    store(error + i * LANES, e);
    const vf m = e * load(s.inverse + i * LANES);
    store(metric + i * LANES, m);
    squares = fused(e, e, squares);
    metric_sum = fused(m, m, metric_sum);
  }
  if (__builtin_expect(s.extreme, 0)) {
    metric_sum = vf{};
    for (int i = 0; i < n; ++i) {
      const vf m = load(error + i * LANES) / load(s.scale + i * LANES);
      store(metric + i * LANES, m);
      metric_sum = fused(m, m, metric_sum);
    }
  }
  store(error_squares, squares);
  store(metric_squares, metric_sum);
  for (int i = s.d; i < s.wide; ++i) codes[i] = 0;
  return rounded[best];
}

// Codes [d up to 16] to bit planes, most significant plane first and the first channel in the highest bit of its byte.
static inline void pack_planes(const uint8_t* codes, int d, int bits, uint8_t* planes, int64_t stride) {
  int c = 0;
#if defined(__AVX512BW__)
  const __m512i flip = _mm512_broadcast_i32x4(_mm_set_epi8(8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  for (; c + 64 <= d; c += 64) {
    const __m512i x = _mm512_shuffle_epi8(_mm512_loadu_si512(codes + c), flip);
    for (int p = 0; p < bits; ++p) {
      const uint64_t bit = _mm512_test_epi8_mask(x, _mm512_set1_epi8((char)(1 << (bits - 1 - p))));
      memcpy(planes + p * stride + c / 8, &bit, 8);
    }
  }
#endif
  for (; c < d; c += 8)
    for (int p = 0; p < bits; ++p) {
      uint8_t byte = 0;
      for (int i = 0; i < 8 && c + i < d; ++i) byte |= (uint8_t)(((codes[c + i] >> (bits - 1 - p)) & 1) << (7 - i));
      planes[p * stride + c / 8] = byte;
    }
}

int64_t key_run_scratch(int64_t block_size, int32_t d) {
  const int64_t wide = up(d, 16);
  return 3 * block_size * wide + 6 * wide + spectral_scratch(block_size, d) + (block_size + 3) / 4 + 64;
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
    bool sound = true;
#if defined(__AVX512F__)
    sound = _mm512_test_epi32_mask((__m512i)bad, (__m512i)bad) == 0;
#else
    for (int l = 0; l < LANES; ++l) sound &= bad[l] == 0;
#endif
    if (sound) {
      valid[i] = 1;
    } else {
      broken = true;
      memset(row, 0, sizeof(float) * wide);
    }
  }
  return broken;
}

// At least the largest distance of the valid rows from `centre` (null: from zero).
static inline float reach(const float* rows, const uint8_t* valid, int n, int wide, const float* centre, float* apart, int d) {
  const double outward = 1.0 + (d + 8) * UNIT;
  float squares = 0.0f, careful = 0.0f;
  for (int i = 0; i < n; ++i) {
    if (!valid[i]) continue;
    const float* row = rows + (int64_t)i * wide;
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
  float* rest = live + 2 * wide;
  const int64_t kv_len = r.key->shape[2], bytes = (r.d + 7) / 8;
  const float infinity = __builtin_inff(), sketch_outward = (float)(1.0 + (r.d + 16) * UNIT) + 2.0f * (float)UNIT;
  Quantiser s{};
  if (r.bits) {
    s.wide = wide;
    s.d = r.d;
    s.levels = (float)((1 << r.bits) - 1);
    s.top = s.levels / 2.0f;
    clips_of(r.bits, s);
    s.scale = scale;
    s.inverse = inverse;
    for (int c = 0; c < wide; ++c) {
      scale[c] = c < r.d ? r.channel_scale[c] : 1.0f;
      if (!(scale[c] > 1e-30f && scale[c] < 1e30f)) s.extreme = true;
      inverse[c] = 1.0f / scale[c];
      const int32_t ones = c < r.d ? -1 : 0;
      memcpy(live + c, &ones, 4);
    }
    s.live = live;
  }
  uint8_t small[256];
  float partials[4 * LANES], *partial = partials;
  for (int64_t block = r.first; block < r.last; ++block) {
    const int64_t first = block * size;
    const int n = (int)(kv_len - first < size ? kv_len - first : size);
    uint8_t* valid = size <= 256 ? small : reinterpret_cast<uint8_t*>(rest + spectral_scratch(size, r.d));
    int count = 0, sound = 0;
    const bool broken = read_block(r, first, n, wide, rows, valid, &count);
    for (int i = 0; i < n; ++i) sound += valid[i];
    const float norm = reach(rows, valid, n, wide, nullptr, apart, r.d);
    const vf keys = splat(sound > 1 ? (float)sound : 1.0f);
    bool finite = !broken && norm < infinity;
    vi bad = vi{};
    for (int c = 0; c < wide; c += LANES) {
      vf total = vf{};
      for (int i = 0; i < n; ++i) total += load(rows + (int64_t)i * wide + c);
      total /= keys;
      bad |= (total - total) != vf{};
      store(centre + c, total);
    }
    for (int l = 0; l < LANES; ++l) finite &= bad[l] == 0;
    if (!finite) memset(centre, 0, sizeof(float) * wide);
    r.count[block] = count;
    r.finite[block] = finite;
    r.key_norm[block] = norm;
    memcpy(r.mean + block * r.d, centre, sizeof(float) * r.d);
    if (r.radius) r.radius[block] = reach(rows, valid, n, wide, centre, apart, r.d);
    if (r.low) {
      float* low = r.low + block * r.d;
      float* high = r.high + block * r.d;
      for (int c = 0; c < r.d; ++c) {
        float least = infinity, greatest = -infinity;
        for (int i = 0; i < n; ++i) {
          if (!valid[i]) continue;
          const float x = rows[(int64_t)i * wide + c];
          least = x < least ? x : least;
          greatest = x > greatest ? x : greatest;
        }
        low[c] = sound ? least : 0.0f;
        high[c] = sound ? greatest : 0.0f;
      }
    }
    if (!r.bits) continue;
    for (int i = 0; i < n; ++i) {
      const int64_t j = first + i;
      float* e = error + (int64_t)i * wide;
      float* m = metric + (int64_t)i * wide;
      r.scale[j] = sketch_key<Vectors, Clips, Ragged>(s, rows + (int64_t)i * wide, valid[i], codes, e, m, partial, partial + LANES);
      pack_planes(codes, r.d, r.bits, r.planes + j * bytes, r.plane_stride);
      partial += 2 * LANES;
      if (i % 2 == 0 && i + 1 < n) continue;
      // two keys at a time: each has two sums
      const bool pair = i % 2 == 1;
      partial -= pair ? 4 * LANES : 2 * LANES;
      float squares[4];
      sum_four(load(partial), load(partial + LANES), pair ? load(partial + 2 * LANES) : vf{}, pair ? load(partial + 3 * LANES) : vf{},
               squares);
      for (int p = 0; p <= pair; ++p) {
        const int at_row = i - pair + p;
        r.error[first + at_row] = error_above(squares[2 * p], error + (int64_t)at_row * wide, wide, sketch_outward);
        r.metric_error[first + at_row] = error_above(squares[2 * p + 1], metric + (int64_t)at_row * wide, wide, sketch_outward);
      }
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
