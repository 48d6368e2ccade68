// Integer dot products of rounded queries with bit planes of keys, and the log mass of every 16 keys.
#include "kernels/functions.h"
#include "kernels/four.h"
#include "kernels/logits.h"
#if defined(__AMX_INT8__) && defined(__GFNI__)
#include "kernels/scan_amx.h"
#elif defined(__AVX2__)
#include "kernels/scan_vectors.h"
#else
#include "kernels/scan_plain.h"
#endif

namespace sieve {
namespace SIEVE_LEVEL {

constexpr int CHUNK_VECS = PANEL * SCAN_ROWS / LANES;  // vectors of one panel's logits: rows lie side by side

int64_t scan_scratch(int32_t d, int32_t rows) {
  const int64_t logits = SCAN_CHUNK * SCAN_ROWS * 4, dots = logits * (rows / SCAN_ROWS);
  return 2 * logits + 2 * dots + 8192 + 8 * up(d, 64) + 8 * SCAN_CHUNK * up(d, 128) / 8 + SCAN_CHUNK * 2 + 4096;
}

// Every key's scale once for each of four rows, and the largest of each panel.
static inline void spread_scales(const Scan& s, int64_t base, int there, float* scale, float* largest) {
#if defined(__AVX512F__)
  if (there == SCAN_CHUNK && s.scale_stride == 1) {
    const __m512i lane = _mm512_srli_epi32((__m512i)iota(), 2);
    for (int p = 0; p < SCAN_PANELS; ++p) {
      const __m512 t = (__m512)load_as_float(s.scale, base + p * PANEL, F16);
      largest[p] = _mm512_reduce_max_ps(t);
      for (int i = 0; i < 4; ++i)
        _mm512_storeu_ps(scale + (p * 4 + i) * 16, _mm512_permutexvar_ps(_mm512_add_epi32(lane, _mm512_set1_epi32(4 * i)), t));
    }
    return;
  }
#elif defined(__AVX2__)
  if (there == SCAN_CHUNK && s.scale_stride == 1) {
    const __m256i lane = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    for (int p = 0; p < SCAN_PANELS; ++p) {
      const vf low = load_as_float(s.scale, base + p * PANEL, F16), high = load_as_float(s.scale, base + p * PANEL + LANES, F16);
      const float most = top(max_(select(low == low, low, vf{}), select(high == high, high, vf{})));
      largest[p] = most > 0.0f ? most : 0.0f;
      for (int i = 0; i < 4; ++i) {
        const __m256i two = _mm256_add_epi32(lane, _mm256_set1_epi32(2 * i));
        float* to = scale + (p * PANEL + 2 * i) * SCAN_ROWS;
        _mm256_storeu_ps(to, _mm256_permutevar8x32_ps((__m256)low, two));
        _mm256_storeu_ps(to + LANES * SCAN_ROWS, _mm256_permutevar8x32_ps((__m256)high, two));
      }
    }
    return;
  }
#endif
  for (int p = 0; p < SCAN_PANELS; ++p) largest[p] = 0.0f;
  for (int i = 0; i < SCAN_CHUNK; ++i) {
    const float t = i < there ? from_f16(s.scale[(base + i) * s.scale_stride]) : 0.0f;
    for (int r = 0; r < SCAN_ROWS; ++r) scale[i * SCAN_ROWS + r] = t;
    largest[i / PANEL] = t > largest[i / PANEL] ? t : largest[i / PANEL];
  }
}

// Integer dots of one chunk; nothing behind the last key is read.
static inline void chunk_dots(const Scan& s, int64_t first, int32_t* dots, uint8_t* codes, uint8_t* copy) {
  const int64_t base = first * PANEL, left = s.kv_len - base, bytes = (s.d + 7) / 8;
  const int there = (int)(left < SCAN_CHUNK ? left : SCAN_CHUNK);
  const uint8_t* planes[8];
  int64_t stride = s.key_stride;
  for (int b = 0; b < s.bits; ++b) planes[b] = s.planes[b] + base * s.key_stride;
  if (there < SCAN_CHUNK || (without_gaps(s) && stride != bytes)) {
    stride = bytes;
    for (int b = 0; b < s.bits; ++b) {
      uint8_t* to = copy + b * SCAN_CHUNK * bytes;
      for (int i = 0; i < SCAN_CHUNK; ++i) {
        if (i < there)
          memcpy(to + i * bytes, planes[b] + i * s.key_stride, bytes);
        else
          memset(to + i * bytes, 0, bytes);
      }
      planes[b] = to;
    }
  }
  integer_dots(s, planes, stride, dots, codes);
}

// From integer dots to the log masses of the chunk's panels.
static inline void chunk_masses(const Scan& s, int64_t first, const int32_t* dots, float* scale, float* logits,
                                float* mass, float* norms, float* largest) {
  const float infinity = __builtin_inff();
  typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
  const int64_t base = first * PANEL, left = s.kv_len - base;
  const int there = (int)(left < SCAN_CHUNK ? left : SCAN_CHUNK);

  spread_scales(s, base, there, scale, largest);

  for (int g = 0; g < s.groups; ++g) {
    bool whole = there == SCAN_CHUNK && !s.key_mask;
    for (int r = 0; r < SCAN_ROWS; ++r) whole &= s.low[g * SCAN_ROWS + r] <= base && s.high[g * SCAN_ROWS + r] >= base + SCAN_CHUNK;
    const int digits = two_in_one(s) ? 1 : s.digits;
    for (int e = 0; e < digits; ++e) {
      const int at = (g * s.digits + e) * SCAN_ROWS;
      vf factor = four(s.factor + at);
      vu centre = (vu)four_integers(s.centre + at);
      if (digits < s.digits) {
        factor = four(s.factor + at + SCAN_ROWS);
        centre = centre * (uint32_t)SCAN_DIGIT + (vu)four_integers(s.centre + at + SCAN_ROWS);
      }
      const int32_t* from = dots + (int64_t)(g * digits + e) * SCAN_ROWS * SCAN_CHUNK;
      const bool ends = e + 1 == digits;
      for (int i = 0; i < SCAN_CHUNK * SCAN_ROWS; i += LANES) {
        const vi twice = (vi)((vu)*reinterpret_cast<const vi_any*>(from + i) * 2u - centre);  // twice the dot alone may not fit
        vf x = __builtin_convertvector(twice, vf) * factor;
        if (e) x += load(logits + i);
        store(logits + i, ends ? x * load(scale + i) : x);
      }
    }
    if (s.softcap != 0.0f)
      for (int i = 0; i < SCAN_CHUNK * SCAN_ROWS; i += LANES)
        store(logits + i, tanh_(load(logits + i) * (LN2 / s.softcap)) * (s.softcap * LOG2E));
    if (!whole)
      for (int i = 0; i < SCAN_CHUNK; ++i) {
        const int64_t key = base + i;
        const bool hidden = i >= there || (s.key_mask && !s.key_mask[key * s.key_mask_stride]);
        for (int r = 0; r < SCAN_ROWS; ++r)
          if (hidden || key < s.low[g * SCAN_ROWS + r] || key >= s.high[g * SCAN_ROWS + r]) logits[i * SCAN_ROWS + r] = -infinity;
      }
    alignas(64) float most_of[SCAN_PANELS * LANES], sum_of[SCAN_PANELS * LANES], square_of[SCAN_PANELS * LANES];
    for (int p = 0; p < SCAN_PANELS; ++p) {
      const float* x = logits + p * PANEL * SCAN_ROWS;
      vf most = load(x);
      for (int i = 1; i < CHUNK_VECS; ++i) most = max_(load(x + i * LANES), most);
      most = over_keys(most, true);
      const vf safe = select(most > splat(-infinity), most, vf{});
      vf total = vf{}, squares = vf{};
      for (int i = 0; i < CHUNK_VECS; ++i) {
        const vf w = exp2_<5>(load(x + i * LANES) - safe);
        total += w;
        squares += w * w;
      }
      if (norms) store(square_of + p * LANES, over_keys(squares, false));
      store(most_of + p * LANES, safe);
      store(sum_of + p * LANES, over_keys(total, false));
    }
    if (norms)
      for (int p = 0; p < SCAN_PANELS; ++p)
        for (int r = 0; r < SCAN_ROWS; ++r) {
          const float total = sum_of[p * LANES + r];
          norms[(p * s.groups + g) * SCAN_ROWS + r] = total > 0.0f ? __builtin_sqrtf(square_of[p * LANES + r]) / total : 0.0f;
        }
    // one logarithm for all panels and rows
    alignas(64) float sums[SCAN_PANELS * SCAN_ROWS], tops[SCAN_PANELS * SCAN_ROWS];
    for (int p = 0; p < SCAN_PANELS; ++p) {
      memcpy(sums + p * SCAN_ROWS, sum_of + p * LANES, sizeof(float) * SCAN_ROWS);
      memcpy(tops + p * SCAN_ROWS, most_of + p * LANES, sizeof(float) * SCAN_ROWS);
    }
    for (int i = 0; i < SCAN_PANELS * SCAN_ROWS; i += LANES) store(sums + i, log_(load(sums + i)) * LOG2E + load(tops + i));
    for (int p = 0; p < SCAN_PANELS; ++p)
      memcpy(mass + (p * s.groups + g) * SCAN_ROWS, sums + p * SCAN_ROWS, sizeof(float) * SCAN_ROWS);
  }
}

void scan(const Scan& s, int64_t first, int64_t chunks, float* mass, float* norms, float* largest, void* scratch) {
  float* scale = static_cast<float*>(scratch);  // every key's scale, once for each row
  float* logits = scale + SCAN_CHUNK * SCAN_ROWS;
  const int64_t size = SCAN_CHUNK * SCAN_ROWS * s.groups * s.digits;
  int32_t* dots = reinterpret_cast<int32_t*>(logits + SCAN_CHUNK * SCAN_ROWS);
  uint8_t* codes = reinterpret_cast<uint8_t*>(dots + 2 * size);
  uint8_t* copy = codes + 8192 + 8 * up(s.d, 64);
  begin();
  // dots of the next chunk are under way while this one's become masses: products wait long for each other
  for (int64_t i = 0; i <= chunks; ++i) {
    if (i < chunks) chunk_dots(s, first + i * SCAN_PANELS, dots + i % 2 * size, codes, copy);
    if (i == 0) continue;
    const int64_t done = i - 1;
    chunk_masses(s, first + done * SCAN_PANELS, dots + done % 2 * size, scale, logits,
                 mass + done * SCAN_PANELS * s.groups * SCAN_ROWS,
                 norms ? norms + done * SCAN_PANELS * s.groups * SCAN_ROWS : nullptr, largest + done * SCAN_PANELS);
  }
  end();
}

void dot_rows(const float* q, int32_t rows, int32_t d, const void* items, DType dtype, int64_t stride, int64_t count,
              float* out) {
  const int step = (int)up(rows, SCAN_ROWS);
  const int64_t size = dtype_bytes(dtype);
  for (int64_t i = 0; i < count; ++i) {
    const char* x = static_cast<const char*>(items) + i * stride * size;
    for (int r = 0; r < rows; r += SCAN_ROWS) {
      vf total[SCAN_ROWS] = {};
      const int some = rows - r < SCAN_ROWS ? rows - r : SCAN_ROWS;
      int c = 0;
      if (some == SCAN_ROWS) {
        for (; c + LANES <= d; c += LANES) {
          const vf y = load_as_float(x, c, dtype);
#pragma GCC unroll 4
          for (int j = 0; j < SCAN_ROWS; ++j) total[j] += y * load(q + (int64_t)(r + j) * d + c);
        }
      }
      for (int j = 0; j < some; ++j) {
        float left = sum(total[j]);
        for (int n = c; n < d; ++n) left += read_one(x, n, dtype) * q[(int64_t)(r + j) * d + n];
        out[i * step + r + j] = left;
      }
      for (int j = some; j < SCAN_ROWS; ++j) out[i * step + r + j] = 0.0f;
    }
  }
}

}  // namespace SIEVE_LEVEL
}  // namespace sieve
