// What the gate reads of a sketch: codes as bytes, scales as floats, and sixteen query rows as the kernels want them.
#include "kernels/functions.h"
#include "kernels/lanes.h"
#include "kernels/transpose.h"

namespace sieve {
namespace SIEVE_LEVEL {

#if defined(__AVX2__)
// `codes` of 32 channels and a plane's bits, first channels first, each worth `weight`
static inline __m256i add_plane(const uint8_t* at, __m256i codes, int weight) {
  int32_t four;
  memcpy(&four, at, 4);
  const __m256i byte = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
  const __m256i bit = _mm256_set1_epi64x(0x0102040810204080ll);
  const __m256i mine = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(four), byte), bit);
  return _mm256_or_si256(codes, _mm256_and_si256(_mm256_cmpeq_epi8(mine, bit), _mm256_set1_epi8((char)weight)));
}
#endif

bool plain_codes() { return PLAIN_CODES; }

void expand_codes(const uint8_t* planes, int64_t plane_stride, int32_t sketch_bits, int32_t bits, int64_t keys, int32_t d,
                  int32_t wide, int8_t* out, int32_t* origin) {
  (void)sketch_bits;  // the leading planes are the coarser copy
  const int64_t bytes = (d + 7) / 8;
  const int odd = bits == 8 ? 0 : (1 << bits) - 1;
  for (int64_t j = 0; j < keys; ++j, out += wide) {
    int c = 0;
#if defined(__AVX512BW__)
    const __m512i spread = _mm512_set_epi64(0x0707070707070707, 0x0606060606060606, 0x0505050505050505, 0x0404040404040404,
                                            0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
    const __m512i bit = _mm512_set1_epi64(0x0102040810204080);
    for (; c + 64 <= d; c += 64) {
      __m512i x = _mm512_setzero_si512();
      for (int p = 0; p < bits; ++p) {
        int64_t eight;
        memcpy(&eight, planes + p * plane_stride + j * bytes + c / 8, 8);
        const __mmask64 set = _mm512_test_epi8_mask(_mm512_shuffle_epi8(_mm512_set1_epi64(eight), spread), bit);
        x = _mm512_or_si512(x, _mm512_maskz_set1_epi8(set, (char)(1 << (bits - 1 - p))));
      }
      x = bits == 8 ? _mm512_sub_epi8(x, _mm512_set1_epi8((char)128))
                    : _mm512_sub_epi8(_mm512_add_epi8(x, x), _mm512_set1_epi8((char)odd));
      _mm512_storeu_si512(out + c, x);
    }
#elif defined(__AVX2__)
    for (; c + 32 <= d; c += 32) {
      __m256i x = _mm256_setzero_si256();
      for (int p = 0; p < bits; ++p) x = add_plane(planes + p * plane_stride + j * bytes + c / 8, x, 1 << (bits - 1 - p));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + c), x);
    }
#endif
    for (; c < d; ++c) {
      int code = 0;
      for (int p = 0; p < bits; ++p) code = code << 1 | ((planes[p * plane_stride + j * bytes + c / 8] >> (7 - c % 8)) & 1);
      out[c] = (int8_t)(PLAIN_CODES ? code : bits == 8 ? code - 128 : 2 * code - odd);
    }
    for (; c < wide; ++c) out[c] = 0;
    if (PLAIN_CODES) continue;
    int32_t bits_of_magic, total = 0;
    memcpy(&bits_of_magic, &MAGIC, 4);
    for (c = 0; c < d; ++c) total += out[c];
    origin[j] = bits_of_magic - 128 * total;
  }
}

void read_steps(const uint16_t* scale, int64_t keys, float by, float* step, float* shift) {
  for (int64_t j = 0; j < keys; ++j) {
    step[j] = from_f16(scale[j]) * by;
    shift[j] = -MAGIC * step[j];
  }
}

static inline vf floor_of(vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_roundscale_ps((__m512)x, 0x09);
#elif defined(__AVX2__)
  return (vf)_mm256_floor_ps((__m256)x);
#else
  const vf whole = __builtin_convertvector(__builtin_convertvector(x, vi), vf);  // |x| <= 128
  return whole > x ? whole - 1.0f : whole;
#endif
}

void prepare_lanes(const View& q, int64_t b, const int64_t* head_of, const int64_t* query_of, int32_t rows, const float* stretch,
                   bool round, int32_t d, int32_t wide, float* panel, int8_t* codes, float* step, float* norm) {
  const float infinity = __builtin_inff();
  const int padded = (int)up(d, 16);
  alignas(64) float all[LANE_ROWS * (MOST_CHANNELS + 16)];
  alignas(64) float factors[MOST_CHANNELS + 16];
  if (stretch)
    for (int c = 0; c < padded; ++c) factors[c] = c < d ? stretch[c] : 0.0f;
  float largest[LANE_ROWS];
  bool known[LANE_ROWS];
  // stage by stage over all rows: one alone waits for its own results
  for (int i = 0; i < LANE_ROWS; ++i) {
    const int r = i < rows ? i : rows - 1;
    float* row = all + i * padded;
    read_row(at(q, b, head_of[r], query_of[r], 0), q.stride[3], q.dtype, d, padded, row);
    if (norm) {
      vf squares = vf{};
      for (int c = 0; c < padded; c += LANES) squares += load(row + c) * load(row + c);
      const float total = sum(squares);
      norm[i] = __builtin_sqrtf(total);
      if (!(total > 1e-30f && total < 1e38f)) {
        double exact = 0;
        for (int c = 0; c < d; ++c) exact += (double)row[c] * row[c];
        norm[i] = (float)__builtin_sqrt(exact);
      }
    }
    step[i] = 1.0f;
    if (!stretch) continue;
    vf most = vf{};
    vi bad = vi{};
    for (int c = 0; c < padded; c += LANES) {
      const vf x = load(row + c) * load(factors + c);
      const vf size = (vf)((vi)x & splat_int(0x7fffffff));
      bad |= ~(size < splat(infinity));
      most = max_(size, most);
      store(row + c, x);
    }
    known[i] = !any_lane(bad);
    largest[i] = lane_max(most);
  }
  for (int i = 0; i < LANE_ROWS; ++i) {
    float* row = all + i * padded;
    if (stretch) {
      if (round) {
        step[i] = (largest[i] > 1e-30f ? largest[i] : 1e-30f) / 127.0f;
        for (int c = 0; c < padded; c += LANES)
          store(row + c, known[i] ? floor_of(load(row + c) / step[i] + 0.5f) : vf{});
      }
      if (!known[i]) step[i] = __builtin_nanf("");
    }
    if (codes) {
      int8_t whole[MOST_CHANNELS + 64];
      int c = 0;
#if defined(__AVX512F__)
      for (; c + 16 <= d; c += 16) {
        const __m128i x = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_loadu_ps(row + c)));
        int8_t* to = codes + c * LANE_ROWS + i * 4;
        const int32_t four[4] = {_mm_cvtsi128_si32(x), _mm_extract_epi32(x, 1), _mm_extract_epi32(x, 2), _mm_extract_epi32(x, 3)};
        for (int e = 0; e < 4; ++e) memcpy(to + e * 64, four + e, 4);
      }
#elif defined(__AVX2__)
      for (; c + 8 <= d; c += 8) {
        const __m256i x = _mm256_cvtps_epi32(_mm256_loadu_ps(row + c));
        const __m128i y = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)), z = _mm_packs_epi16(y, y);
        int8_t* to = codes + c * LANE_ROWS + i * 4;
        const int32_t two[2] = {_mm_cvtsi128_si32(z), _mm_extract_epi32(z, 1)};
        for (int e = 0; e < 2; ++e) memcpy(to + e * 64, two + e, 4);
      }
#endif
      for (int e = c; e < wide; ++e) whole[e] = e < d ? (int8_t)row[e] : 0;
      for (; c < wide; c += 4) memcpy(codes + c * LANE_ROWS + i * 4, whole + c, 4);
    }
  }
  if (!panel) return;
  int c = 0;
#if defined(__AVX512F__)
  for (; c < padded; c += 16) {  // the panel has room for channels up to a multiple of 64
    __m512 r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = _mm512_load_ps(all + i * padded + c);
    transpose16(r);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_storeu_ps(panel + (c + i) * LANE_ROWS, r[i]);
  }
#elif defined(__AVX2__)
  for (; c < padded; c += 8)
    for (int half = 0; half < LANE_ROWS; half += 8) {
      __m256 r[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) r[i] = _mm256_load_ps(all + (half + i) * padded + c);
      transpose8(r);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) _mm256_storeu_ps(panel + (c + i) * LANE_ROWS + half, r[i]);
    }
#endif
  for (; c < d; ++c)
    for (int i = 0; i < LANE_ROWS; ++i) panel[c * LANE_ROWS + i] = all[i * padded + c];
}

}  // namespace SIEVE_LEVEL
}  // namespace sieve
