// The low-bit copy of keys, sixteen keys at a time: codes, scales and what the codes lose. For geometry.cpp, which is compiled
// without fused operations.
#pragma once
#include "kernels/vec.h"

namespace sieve {
namespace SIEVE_LEVEL {

constexpr int MAX_VECTORS = 512 / LANES;  // head dimensions up to 512
constexpr int GROUP = 16;  // keys that are sketched together, stage by stage: one alone waits for its own results
constexpr float LARGEST_HALF = 65504.0f;
constexpr float SAFE_SQUARE_LOW = 1e-30f, SAFE_SQUARE_HIGH = 1e38f;  // sums of squares between them lost nothing

static inline float round_up(double x) {
  const float f = (float)x;
  return (double)f < x ? __builtin_nextafterf(f, __builtin_inff()) : f;
}

static inline vf size_of(vf x) { return (vf)((vi)x & splat_int(0x7fffffff)); }
// 0 <= x < 2^31
static inline vf floor_of(vf x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return (vf)_mm256_floor_ps((__m256)x);
#else
  return __builtin_convertvector(__builtin_convertvector(x, vi), vf);
#endif
}

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

// Sums of four vectors at once: half the work of four single ones.
static inline void sum_four(vf a, vf b, vf c, vf d, float* out) {
#if defined(__AVX512F__)
  const __m512 p = (__m512)a, q = (__m512)b, r = (__m512)c, s = (__m512)d;
  const __m512 pq = _mm512_add_ps(_mm512_unpacklo_ps(p, q), _mm512_unpackhi_ps(p, q));
  const __m512 rs = _mm512_add_ps(_mm512_unpacklo_ps(r, s), _mm512_unpackhi_ps(r, s));
  const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(pq, rs, 0x44), _mm512_shuffle_ps(pq, rs, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#elif defined(__AVX2__)
  const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps((__m256)a, (__m256)b), _mm256_hadd_ps((__m256)c, (__m256)d));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
#else
  out[0] = sum(a);
  out[1] = sum(b);
  out[2] = sum(c);
  out[3] = sum(d);
#endif
}

// Adds up as sum_rows does, to the last bit.
static inline float square_sum(const float* x, int wide) {
  vf total = vf{};
  for (int i = 0; i < wide; i += LANES) {
    const vf y = load(x + i);
    total = fused(y, y, total);
  }
  float out[4];
  sum_four(total, total, total, total, out);
  return out[0];
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

// The same for `count` up to GROUP keys at once: `rows` are their errors, `wide` apart.
static inline void errors_above(const float* squares, int count, const float* rows, int wide, float outward, uint16_t* out) {
#if defined(__AVX2__)
  vi unsafe = vi{};
  for (int l = 0; l < GROUP; l += LANES) {
    const vf x = load(squares + l);
    unsafe |= ~((x >= splat(SAFE_SQUARE_LOW)) & (x <= splat(SAFE_SQUARE_HIGH)));
  }
  if (count == GROUP && !any_lane(unsafe)) {
    for (int l = 0; l < GROUP; l += 8) {
      const __m256 e = _mm256_mul_ps(_mm256_sqrt_ps(_mm256_loadu_ps(squares + l)), _mm256_set1_ps(outward));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + l), _mm256_cvtps_ph(e, _MM_FROUND_TO_POS_INF));
    }
    return;
  }
#endif
  for (int k = 0; k < count; ++k) out[k] = error_above(squares[k], rows + k * wide, wide, outward);
}

// x / a, rounded once, where y is 1 / a rounded once and nothing leaves the normal numbers: the first correction leaves an error of
// less than a unit in the last place, from which the second rounds as division does (Markstein).
static inline vf divided(vf x, vf a, vf y) {
#if defined(__AVX512F__) || defined(__AVX2__)
  vf q = x * y;
  q = fused(fused(-q, a, x), y, q);
  return fused(fused(-q, a, x), y, q);
#else
  (void)y;
  return x / a;
#endif
}

struct Quantiser {
  int wide, d;
  float top, levels;  // (2^bits - 1) / 2 and 2^bits - 1
  const float* scale;    // [wide], 1 behind the last channel
  const float* inverse;  // [wide]
  bool extreme;          // 1 / scale may leave the normal numbers: divide
  bool ordinary;         // nothing that matters leaves them when keys of ordinary length are divided by scale
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

static inline void round_to_half(vf x, uint16_t* bits, float* value) {
#if defined(__AVX512F__)
  const __m256i h = _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(bits), h);
  _mm512_storeu_ps(value, _mm512_cvtph_ps(h));
#elif defined(__AVX2__)
  const __m128i h = _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(bits), h);
  _mm256_storeu_ps(value, _mm256_cvtph_ps(h));
#else
  for (int l = 0; l < LANES; ++l) {
    bits[l] = to_f16(x[l]);
    value[l] = from_f16(bits[l]);
  }
#endif
}

// Up to GROUP keys [count], `pitch` apart, `usual` if their lengths are ordinary: their codes [count][wide], their scales, what the
// codes lose (`error`, also over the channel scale as `metric`) and the sums of the squares of both, key by key. Vectors is
// wide / LANES, or 0; Clips how many there are.
template <int Vectors, int Clips, bool Ragged>
static inline void sketch_keys(const Quantiser& s, const float* keys, int64_t pitch, bool usual, const uint8_t* valid, int count,
                               uint8_t* codes, float* error, float* metric, uint16_t* scales, float (*squares)[GROUP]) {
  const int n = Vectors ? Vectors : s.wide / LANES, wide = Vectors ? Vectors * LANES : s.wide;
  float peak[GROUP] = {}, steps[Clips][GROUP], inverse[Clips][GROUP], losses[GROUP][8];
  uint16_t rounded[Clips][GROUP];
  float* white = error;  // until the errors take its place
  for (int i = 0; i < count; ++i) {
    vf peaks = vf{};
    for (int v = 0; v < n; ++v) {
      const vf a = load(s.scale + v * LANES), k = load(keys + i * pitch + v * LANES);
      const vf x = usual ? divided(k, a, load(s.inverse + v * LANES)) : k / a;
      store(white + i * wide + v * LANES, x);
      peaks = max_(size_of(x), peaks);
    }
    peak[i] = lane_max(peaks);
  }
  for (int k = 0; k < Clips; ++k)
    for (int l = 0; l < GROUP; l += LANES) {
      round_to_half(min_(splat(s.clip[k]) * load(peak + l) / s.top, splat(LARGEST_HALF)), rounded[k] + l, steps[k] + l);
      const vf step = load(steps[k] + l);
      store(inverse[k] + l, 1.0f / select(step > vf{}, step, splat(1.0f)));
    }
  const vf half = splat(s.top + 0.5f), top = splat(s.top), highest = splat(s.levels);
  for (int i = 0; i < count; ++i) {
    vf x[Vectors ? Vectors : 1], lost[Clips < 4 ? 4 : Clips];
    if (Vectors)
      for (int v = 0; v < Vectors; ++v) x[v] = load(white + i * wide + v * LANES);
#pragma GCC unroll 5
    for (int k = 0; k < (Clips < 4 ? 4 : Clips); ++k) {
      lost[k] = vf{};
      if (k >= Clips) continue;
      const vf by = splat(inverse[k][i]), w = splat(steps[k][i]);
      for (int v = 0; v < n; ++v) {
        const vf y = Vectors ? x[Vectors ? v : 0] : load(white + i * wide + v * LANES);
        const vf code = floor_of(min_(max_(fused(y, by, half), vf{}), highest));
        vf apart = fused(code - top, w, -y);
        if (Ragged) apart = (vf)((vi)apart & (vi)load(s.live + v * LANES));
        lost[k] = fused(apart, apart, lost[k]);
      }
    }
    sum_four(lost[0], lost[1], lost[2], lost[3], losses[i]);
    if constexpr (Clips > 4) losses[i][4] = sum(lost[4]);
  }
  // The code is the floor of a quotient. A product by the inverse gives the same but next to an integer: there it is divided.
  const vf close = splat((s.levels + 1.0f) * 1e-6f);
  vf by_norm[GROUP], by_metric[GROUP];
  for (int i = 0; i < count; ++i) {
    float least = losses[i][0];
    int best = 0;
    for (int k = 1; k < Clips; ++k) {
      const int better = -(int)(losses[i][k] < least);  // a branch would be guessed wrong every other time
      least = losses[i][k] < least ? losses[i][k] : least;
      best = (best & ~better) | (k & better);
    }
    scales[i] = rounded[best][i];
    const vf w = splat(steps[best][i]), by = splat(inverse[best][i]);
    vf level[Vectors ? Vectors : MAX_VECTORS];
    vi doubtful = vi{};
    for (int v = 0; v < n; ++v) {
      const vf quotient = fused(load(white + i * wide + v * LANES), by, half);
      doubtful |= size_of(quotient - round_even(quotient)) < close;
      level[v] = min_(max_(quotient, vf{}), highest);
    }
    if (any_lane(doubtful)) {
      const vf divisor = select(w > vf{}, w, splat(1.0f));
      for (int v = 0; v < n; ++v) level[v] = min_(max_(load(white + i * wide + v * LANES) / divisor + half, vf{}), highest);
    }
    const vi counts = splat_int(valid[i] ? -1 : 0);
    by_norm[i] = by_metric[i] = vf{};
    for (int v = 0; v < n; ++v) {
      const vi whole = __builtin_convertvector(level[v], vi);
      uint8_t* to = codes + i * wide + v * LANES;
#if defined(__AVX512F__)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)whole));
#elif defined(__AVX2__)
      const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)whole), _mm256_extracti128_si256((__m256i)whole, 1));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
#else
      for (int l = 0; l < LANES; ++l) to[l] = (uint8_t)whole[l];
#endif
      const vf a = load(s.scale + v * LANES);
      vf e = load(keys + i * pitch + v * LANES) - (__builtin_convertvector(whole, vf) - top) * w * a;
      if (Ragged) e = (vf)((vi)e & (vi)load(s.live + v * LANES));
      e = (vf)((vi)e & counts);
      store(error + i * wide + v * LANES, e);
      const vf m = __builtin_expect(s.extreme, 0) ? e / a : e * load(s.inverse + v * LANES);
      store(metric + i * wide + v * LANES, m);
      by_norm[i] = fused(e, e, by_norm[i]);
      by_metric[i] = fused(m, m, by_metric[i]);
    }
    if (Ragged)
      for (int c = s.d; c < wide; ++c) codes[i * wide + c] = 0;
  }
  for (int i = count; i < (count + 3) / 4 * 4; ++i) by_norm[i] = by_metric[i] = vf{};
  for (int i = 0; i < count; i += 4) {
    sum_four(by_norm[i], by_norm[i + 1], by_norm[i + 2], by_norm[i + 3], squares[0] + i);
    sum_four(by_metric[i], by_metric[i + 1], by_metric[i + 2], by_metric[i + 3], squares[1] + i);
  }
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
#elif defined(__AVX2__)
  const __m256i flip = _mm256_broadcastsi128_si256(_mm_set_epi8(8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  for (; c + 32 <= d; c += 32) {
    const __m256i x = _mm256_shuffle_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + c)), flip);
    for (int p = 0; p < bits; ++p) {
      const int32_t bit = _mm256_movemask_epi8(_mm256_sll_epi16(x, _mm_cvtsi32_si128(8 - bits + p)));  // the highest of each byte
      memcpy(planes + p * stride + c / 8, &bit, 4);
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

}  // namespace SIEVE_LEVEL
}  // namespace sieve
