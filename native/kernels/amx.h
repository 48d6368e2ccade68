// Matrix tiles of bf16 (AMX): their set-up, weights in bf16, and the product of weights and values.
#pragma once
#include "kernels/softmax.h"

#if defined(__AMX_BF16__)

namespace sieve {
namespace SIEVE_LEVEL {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

static inline void configure() {
  TileConfig c;
  for (int i = 0; i < 8; ++i) {
    c.bytes[i] = 64;
    c.rows[i] = 16;
  }
  _tile_loadconfig(&c);
}

// o [32 | 16 rows][32 | 16 channels] += weights times value pairs; `v` has one pair of panels each
template <int Rows, int Cols>
static inline void weigh(const uint16_t* p, const uint16_t* const* v, int pairs, int column, float* o, int64_t wide) {
  _tile_loadd(0, o, wide * 4);
  if constexpr (Cols > 1) _tile_loadd(1, o + 16, wide * 4);
  if constexpr (Rows > 1) _tile_loadd(2, o + 16 * wide, wide * 4);
  if constexpr (Rows > 1 && Cols > 1) _tile_loadd(3, o + 16 * wide + 16, wide * 4);
  for (int j = 0; j < pairs; ++j) {
    _tile_loadd(4, p + j * 32, CHUNK * 2);
    _tile_loadd(6, v[j] + column * 32, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (Cols > 1) {
      _tile_loadd(7, v[j] + (column + 16) * 32, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (Rows > 1) {
      _tile_loadd(5, p + 16 * CHUNK + j * 32, CHUNK * 2);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (Cols > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, o, wide * 4);
  if constexpr (Cols > 1) _tile_stored(1, o + 16, wide * 4);
  if constexpr (Rows > 1) _tile_stored(2, o + 16 * wide, wide * 4);
  if constexpr (Rows > 1 && Cols > 1) _tile_stored(3, o + 16 * wide + 16, wide * 4);
}

template <int Rows>
static inline void outputs(const uint16_t* p, const uint16_t* const* v, int pairs, float* o, int wide) {
  int c = 0;
  for (; c + 32 <= wide; c += 32) weigh<Rows, 2>(p, v, pairs, c, o + c, wide);
  if (c < wide) weigh<Rows, 1>(p, v, pairs, c, o + c, wide);
}

// One row of weights from `n` logits, rounded to bf16 for the second product; the sum takes them unrounded.
static inline void soften_bf16(const Tile& t, int r, const float* s, int n, float unit, int wide, uint16_t* p) {
  const float infinity = __builtin_inff();
  __m512 most = _mm512_loadu_ps(s);
  for (int i = 16; i < n; i += 16) most = _mm512_max_ps(_mm512_loadu_ps(s + i), most);
  const float peak = _mm512_reduce_max_ps(most), before = t.m[r];
  if (peak > before && !((peak - before) * unit <= SLACK)) {
    const float shrink = exp2_one((before - peak) * unit);
    t.m[r] = peak;
    if (before != -infinity) {
      t.l[r] *= shrink;
      float* o = t.o + (int64_t)r * wide;
      for (int i = 0; i < wide; i += 16) _mm512_storeu_ps(o + i, _mm512_loadu_ps(o + i) * _mm512_set1_ps(shrink));
    }
  }
  const __m512 base = _mm512_set1_ps(t.m[r] == -infinity ? 0.0f : t.m[r] * unit), by = _mm512_set1_ps(unit);
  __m512 total = _mm512_setzero_ps();
  int i = 0;
  for (; i + 32 <= n; i += 32) {
    const __m512 a = (__m512)exp2_<5>((vf)_mm512_fmsub_ps(_mm512_loadu_ps(s + i), by, base));
    const __m512 b = (__m512)exp2_<5>((vf)_mm512_fmsub_ps(_mm512_loadu_ps(s + i + 16), by, base));
    total = total + a + b;
    _mm512_storeu_si512(p + i, (__m512i)_mm512_cvtne2ps_pbh(b, a));
  }
  if (i < n) {
    const __m512 a = (__m512)exp2_<5>((vf)_mm512_fmsub_ps(_mm512_loadu_ps(s + i), by, base));
    total = total + a;
    _mm512_storeu_si512(p + i, (__m512i)_mm512_cvtne2ps_pbh(_mm512_setzero_ps(), a));
  }
  t.l[r] += _mm512_reduce_add_ps(total);
}

static inline void clean_pair(const Tile& t, float* marks, const float* s, int j, int wide, uint16_t* pair) {
  const float infinity = __builtin_inff();
  for (int c = 0; c < wide; ++c)
    for (int key = 0; key < 2 * PANEL; ++key) {
      uint16_t& x = pair[(c / 16) * 512 + (key / 2) * 32 + (c % 16) * 2 + (key & 1)];
      if ((x & 0x7f80u) != 0x7f80u) continue;
      for (int r = 0; r < t.rows; ++r)
        if (s[(int64_t)r * S_STRIDE + j * 32 + key] > -infinity) marks[(int64_t)r * wide + c] += from_bf16(x);
      x = 0;
    }
}

}  // namespace SIEVE_LEVEL
}  // namespace sieve

#endif
