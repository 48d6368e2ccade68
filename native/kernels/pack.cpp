// Copies of keys and values in the layouts that the inner loops read.
#include "kernels/functions.h"
#include "kernels/transpose.h"

namespace sieve {
namespace SIEVE_LEVEL {

void read_rows(const View& x, int64_t b, int64_t h, int64_t first, int64_t last, int64_t padded, bool clean, float* out) {
  const int n = (int)x.shape[3];
  for (int64_t i = first; i < last; ++i, out += padded) {
    read_row(at(x, b, h, i, 0), x.stride[3], x.dtype, n, (int)padded, out);
    if (clean)
      for (int d = 0; d < n; ++d) out[d] = out[d] - out[d] == 0.0f ? out[d] : 0.0f;
  }
}

void put_row(const float* x, int64_t n, void* out, int64_t stride, DType dtype) { write_row(x, (int)n, out, stride, dtype); }

constexpr int64_t size_of_one(DType t) { return t == F32 ? 4 : 2; }

// The first channels of 16 whole keys whose channels are consecutive, where possible in registers; how many that were.
template <DType T>
static inline int transpose_keys(const char* keys, int64_t bytes, int d, float* out) {
  int c = 0;
#if defined(__AVX512F__)
  for (; c + 16 <= d; c += 16) {
    __m512 r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = (__m512)load_as_float(keys + i * bytes, c, T);
    transpose16(r);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_storeu_ps(out + (c + i) * PANEL, r[i]);
  }
#elif defined(__AVX2__)
  for (; c + 8 <= d; c += 8)
    for (int half = 0; half < PANEL; half += 8) {
      const char* from = keys + half * bytes;
      __m256 r[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) r[i] = (__m256)load_as_float(from + i * bytes, c, T);
      transpose8(r);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) _mm256_storeu_ps(out + (c + i) * PANEL + half, r[i]);
    }
#else
  for (; c < d; ++c)
    for (int i = 0; i < PANEL; ++i) out[c * PANEL + i] = read_one(keys + i * bytes, c, T);
#endif
  return c;
}

void pack_keys(const View& k, int64_t b, int64_t h, int64_t first, int64_t last, float* out) {
  const int d = (int)k.shape[3];
  const int64_t bytes = k.stride[2] * size_of_one(k.dtype);
  for (int64_t p = first; p < last; ++p, out += (int64_t)d * PANEL) {
    const int64_t base = p * PANEL;
    const int there = (int)(k.shape[2] - base < PANEL ? k.shape[2] - base : PANEL);
    int c = 0;
    if (there == PANEL && k.stride[3] == 1) {
      const char* keys = at(k, b, h, base, 0);
      if (k.dtype == F32) c = transpose_keys<F32>(keys, bytes, d, out);
      if (k.dtype == F16) c = transpose_keys<F16>(keys, bytes, d, out);
      if (k.dtype == BF16) c = transpose_keys<BF16>(keys, bytes, d, out);
    }
    for (int i = 0; i < PANEL; ++i)
      for (int j = c; j < d; ++j) out[j * PANEL + i] = i < there ? read_one(at(k, b, h, base + i, j), 0, k.dtype) : 0.0f;
  }
}

template <DType T>
static inline void split_values(const char* values, int64_t bytes, int wide, float* out) {
  for (int c = 0; c < wide; c += PANEL)
    for (int i = 0; i < PANEL; ++i, out += PANEL)
      for (int j = 0; j < PANEL; j += LANES) store(out + j, load_as_float(values + i * bytes, c + j, T));
}

void pack_values(const View& v, int64_t b, int64_t h, int64_t first, int64_t last, float* out) {
  const int dv = (int)v.shape[3], wide = (int)up(dv, PANEL);
  const int64_t bytes = v.stride[2] * size_of_one(v.dtype);
  for (int64_t p = first; p < last; ++p, out += (int64_t)wide * PANEL) {
    const int64_t base = p * PANEL;
    if (base + PANEL <= v.shape[2] && v.stride[3] == 1 && dv == wide) {
      const char* values = at(v, b, h, base, 0);
      if (v.dtype == F32) split_values<F32>(values, bytes, wide, out);
      if (v.dtype == F16) split_values<F16>(values, bytes, wide, out);
      if (v.dtype == BF16) split_values<BF16>(values, bytes, wide, out);
      continue;
    }
    for (int c = 0; c < wide; c += PANEL)
      for (int i = 0; i < PANEL; ++i) {
        const int there = base + i < v.shape[2] ? dv - c < PANEL ? dv - c : PANEL : 0;
        read_row(there ? at(v, b, h, base + i, c) : nullptr, v.stride[3], v.dtype, there, PANEL, out + (int64_t)c * PANEL + i * PANEL);
      }
  }
}

static inline uint16_t read_bf16(const View& x, int64_t b, int64_t h, int64_t i, int64_t c) {
  return *reinterpret_cast<const uint16_t*>(at(x, b, h, i, c));
}

bool ordinary_bf16(const View& x, int64_t b, int64_t h) {
  const int n = (int)x.shape[3];
  for (int64_t i = 0; i < x.shape[2]; ++i) {
    const uint16_t* row = reinterpret_cast<const uint16_t*>(at(x, b, h, i, 0));
    uint16_t odd = 0;
    const auto look = [&](uint16_t bits) {
      const uint16_t size = bits & 0x7fffu;
      odd |= (uint16_t)((uint16_t)(size - 1) < 0x7fu) | (uint16_t)(size >= 0x5f80u);  // 1 to 0x7f are denormal, 0x5f80 is 2^64
    };
    if (x.stride[3] == 1)
      for (int c = 0; c < n; ++c) look(row[c]);
    else
      for (int c = 0; c < n; ++c) look(row[c * x.stride[3]]);
    if (odd) return false;
  }
  return true;
}

// [panel][d / 32][16 channel pairs][16 keys][2]: one tile of the second operand for every 32 channels
void pack_keys_bf16(const View& k, int64_t b, int64_t h, int64_t first, int64_t last, uint16_t* out) {
  const int d = (int)k.shape[3];
  const int64_t wide = up(d, 32);
  for (int64_t p = first; p < last; ++p, out += wide * PANEL) {
    const int64_t base = p * PANEL;
    const int there = (int)(k.shape[2] - base < PANEL ? k.shape[2] - base : PANEL);
    int c = 0;
#if defined(__AVX512F__)
    if (there == PANEL && k.stride[3] == 1) {
      for (; c + 32 <= d; c += 32) {
        __m512 r[16];  // a channel pair is 32 bits, so pairs are transposed like floats
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(at(k, b, h, base + i, c));
        transpose16(r);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) _mm512_storeu_ps(reinterpret_cast<float*>(out + (c / 2 + i) * 32), r[i]);
      }
    }
#endif
    for (int64_t j = c; j < wide; j += 2)
      for (int i = 0; i < PANEL; ++i)
        for (int e = 0; e < 2; ++e)
          out[j / 2 * 32 + i * 2 + e] = i < there && j + e < d ? read_bf16(k, b, h, base + i, j + e) : 0;
  }
}

// [pair of panels][dv / 16][16 key pairs][16 channels][2]; `first` is even, `out` is that of panel `first`
void pack_values_bf16(const View& v, int64_t b, int64_t h, int64_t first, int64_t last, uint16_t* out) {
  const int dv = (int)v.shape[3];
  const int64_t wide = up(dv, 16);
  for (int64_t p = first; p < last; p += 2, out += 2 * wide * PANEL) {
    for (int pair = 0; pair < PANEL; ++pair) {
      const int64_t key = p * PANEL + 2 * pair;
      const bool both = key + 1 < v.shape[2];
      for (int64_t c = 0; c < wide; c += 16) {
        uint16_t* to = out + (c / 16) * 512 + pair * 32;
#if defined(__AVX512BW__)
        if (both && v.stride[3] == 1 && c + 16 <= dv) {
          const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at(v, b, h, key, c)));
          const __m256i y = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at(v, b, h, key + 1, c)));
          const __m512i wide_x = _mm512_cvtepu16_epi32(x), wide_y = _mm512_cvtepu16_epi32(y);
          _mm512_storeu_si512(to, _mm512_or_si512(wide_x, _mm512_slli_epi32(wide_y, 16)));
          continue;
        }
#endif
        for (int i = 0; i < 16; ++i) {
          const bool in = c + i < dv;
          to[2 * i] = in && key < v.shape[2] ? read_bf16(v, b, h, key, c + i) : 0;
          to[2 * i + 1] = in && both ? read_bf16(v, b, h, key + 1, c + i) : 0;
        }
      }
    }
  }
}

}  // namespace SIEVE_LEVEL
}  // namespace sieve
