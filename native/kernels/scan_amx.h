// Integer dots of rounded queries with the codes of keys by tiles (AMX). Included by scan.cpp alone.
#pragma once
#include "kernels/four.h"

namespace sieve {
namespace SIEVE_LEVEL {

// Where the codes of channels lie once planes are turned: `width` bits a code, so 8 / width codes a byte. Chunk `c` of 128
// channels gives 8 vectors; lane `i` of 16 of vector `v` holds this channel.
static inline int channel_at(int width, int c, int v, int i) {
  const int fields = 8 / width, vectors = 8 / fields;  // vectors before the fields are taken apart
  const int source = v / fields, field = v % fields;
  // byte groups of the source vector: two quad words of 8 / width bytes each
  const int byte = source * 2 * fields + i / 8 * fields + field;
  (void)vectors;
  return c * 128 + byte * 8 + i % 8;
}

static inline int width_of(int bits) { return bits <= 1 ? 1 : bits <= 2 ? 2 : bits <= 4 ? 4 : 8; }

// whether planes must lie without gaps from key to key
static inline bool without_gaps(const Scan&) { return false; }
// whether two digits of a query are multiplied as one number
static inline bool two_in_one(const Scan&) { return false; }
int64_t scan_bytes(int32_t d, int32_t rows) { return up(d, 128) / 16 * 1024 * (rows / SCAN_ROWS); }

// Four keys are the four lanes of a vector, so the second operand is diagonal: columns 4 k .. 4 k + 3 see lane k only.
void pack_scan(const int8_t* q, int32_t d, int32_t rows, int32_t, int32_t bits, void* out) {
  int8_t* to = static_cast<int8_t*>(out);
  memset(to, 0, scan_bytes(d, rows));
  const int width = width_of(bits);
  for (int g = 0; g < rows; g += SCAN_ROWS)
    for (int c = 0; c * 128 < d; ++c)
      for (int v = 0; v < 8; ++v, to += 1024)
        for (int slot = 0; slot < 64; ++slot) {
          const int channel = channel_at(width, c, v, slot % 16);
          if (channel >= d) continue;
          for (int r = 0; r < SCAN_ROWS; ++r)
            to[slot / 4 * 64 + (slot / 16 * SCAN_ROWS + r) * 4 + slot % 4] = q[(int64_t)(g + r) * d + channel];
        }
}

struct alignas(64) ScanConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Bytes 16 c .. 16 c + 15 of four keys, one key a lane.
static inline __m512i four_keys(const uint8_t* at, int64_t stride, int bytes) {
  if (stride == 16 && bytes == 16) return _mm512_loadu_si512(at);
  const __mmask16 here = (__mmask16)((1u << bytes) - 1u);
  __m512i x = _mm512_castsi128_si512(_mm_maskz_loadu_epi8(here, at));
  x = _mm512_inserti32x4(x, _mm_maskz_loadu_epi8(here, at + stride), 1);
  x = _mm512_inserti32x4(x, _mm_maskz_loadu_epi8(here, at + 2 * stride), 2);
  return _mm512_inserti32x4(x, _mm_maskz_loadu_epi8(here, at + 3 * stride), 3);
}

// Codes of four keys and 128 channels from their planes: bytes of the planes meet in quad words, which are then transposed.
template <int Width>
static inline void turn_planes(const __m512i* p, uint8_t* to) {
  const __m512i turn = _mm512_set1_epi64(0x0102040810204080ll);
  const auto put = [&](int v, __m512i x) { _mm512_store_si512(to + v * 1024, x); };
  if constexpr (Width == 8) {
    __m512i a[8], b[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      a[i] = _mm512_unpacklo_epi8(p[2 * i], p[2 * i + 1]);
      a[4 + i] = _mm512_unpackhi_epi8(p[2 * i], p[2 * i + 1]);
    }
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h)
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        b[4 * h + i] = _mm512_unpacklo_epi16(a[4 * h + 2 * i], a[4 * h + 2 * i + 1]);
        b[4 * h + 2 + i] = _mm512_unpackhi_epi16(a[4 * h + 2 * i], a[4 * h + 2 * i + 1]);
      }
#pragma GCC unroll 4
    for (int h = 0; h < 4; ++h) {
      put(2 * h, _mm512_gf2p8affine_epi64_epi8(turn, _mm512_unpacklo_epi32(b[2 * h], b[2 * h + 1]), 0));
      put(2 * h + 1, _mm512_gf2p8affine_epi64_epi8(turn, _mm512_unpackhi_epi32(b[2 * h], b[2 * h + 1]), 0));
    }
  } else if constexpr (Width == 4) {
    const __m512i low = _mm512_set1_epi8(15);
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m512i a = h ? _mm512_unpackhi_epi8(p[0], p[1]) : _mm512_unpacklo_epi8(p[0], p[1]);
      const __m512i b = h ? _mm512_unpackhi_epi8(p[2], p[3]) : _mm512_unpacklo_epi8(p[2], p[3]);
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const __m512i x = _mm512_gf2p8affine_epi64_epi8(turn, i ? _mm512_unpackhi_epi16(a, b) : _mm512_unpacklo_epi16(a, b), 0);
        put(4 * h + 2 * i, _mm512_and_si512(_mm512_srli_epi16(x, 4), low));
        put(4 * h + 2 * i + 1, _mm512_and_si512(x, low));
      }
    }
  } else if constexpr (Width == 2) {
    const __m512i low = _mm512_set1_epi8(3);
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m512i both = h ? _mm512_unpackhi_epi8(p[0], p[1]) : _mm512_unpacklo_epi8(p[0], p[1]);
      const __m512i x = _mm512_gf2p8affine_epi64_epi8(turn, both, 0);
#pragma GCC unroll 4
      for (int f = 0; f < 4; ++f) put(4 * h + f, _mm512_and_si512(_mm512_srli_epi16(x, 6 - 2 * f), low));
    }
  } else {
    const __m512i x = _mm512_gf2p8affine_epi64_epi8(turn, p[0], 0);
#pragma GCC unroll 8
    for (int f = 0; f < 8; ++f) put(f, _mm512_and_si512(_mm512_srli_epi16(x, 7 - f), _mm512_set1_epi8(1)));
  }
}

static inline void add_tile(int32_t* to, const int32_t* more) {
#pragma GCC unroll 16
  for (int i = 0; i < 256; i += 16)
    _mm512_storeu_si512(to + i, _mm512_add_epi32(_mm512_loadu_si512(to + i), _mm512_loadu_si512(more + i)));
}

// Groups of rows against the codes of 128 channels, added to what the channels before gave. Products that wait for each other
// would take longer than everything else, so every sum is kept in two parts.
static inline void products(const uint8_t* codes, const int8_t* q, bool first, int32_t* to) {
  alignas(64) int32_t part[256];
  if (first)
    _tile_zero(0);
  else
    _tile_loadd(0, to, 64);
  _tile_zero(1);
#define SIEVE_PRODUCT(C, A, B, v)            \
  _tile_loadd(A, codes + (v) * 1024, 64);    \
  _tile_loadd(B, q + (v) * 1024, 64);        \
  _tile_dpbusd(C, A, B);
  SIEVE_PRODUCT(0, 2, 3, 0)
  SIEVE_PRODUCT(1, 4, 5, 1)
  SIEVE_PRODUCT(0, 6, 7, 2)
  SIEVE_PRODUCT(1, 2, 3, 3)
  SIEVE_PRODUCT(0, 4, 5, 4)
  SIEVE_PRODUCT(1, 6, 7, 5)
  SIEVE_PRODUCT(0, 2, 3, 6)
  SIEVE_PRODUCT(1, 4, 5, 7)
#undef SIEVE_PRODUCT
  _tile_stored(0, to, 64);
  _tile_stored(1, part, 64);
  add_tile(to, part);
}

template <int Width>
static inline void dots_of(const Scan& s, const uint8_t* const* planes, int64_t stride, int32_t* dots, uint8_t* codes) {
  const int chunks = (int)((s.d + 127) / 128), groups = s.groups * s.digits, missing = Width - s.bits;
  const int8_t* query = static_cast<const int8_t*>(s.query);
  for (int c = 0; c < chunks; ++c) {
    const int left = (s.d + 7) / 8 - 16 * c, bytes = left < 16 ? left : 16;
    for (int i = 0; i < SCAN_CHUNK / 4; ++i) {
      __m512i p[Width];
#pragma GCC unroll 8
      for (int b = 0; b < Width; ++b) {
        if (b < missing) {
          p[b] = _mm512_setzero_si512();
          continue;
        }
        const uint8_t* at = planes[b - missing] + 4 * i * stride + 16 * c;
        p[b] = four_keys(at, stride, bytes);
        __builtin_prefetch(at + 4096);
      }
      turn_planes<Width>(p, codes + i * 64);
    }
    for (int g = 0; g < groups; ++g)
      products(codes, query + ((int64_t)g * chunks + c) * 8 * 1024, c == 0, dots + g * SCAN_CHUNK * SCAN_ROWS);
  }
}

static inline void integer_dots(const Scan& s, const uint8_t* const* planes, int64_t stride, int32_t* dots, void* scratch) {
  uint8_t* codes = static_cast<uint8_t*>(scratch);
  switch (width_of(s.bits)) {
    case 1: dots_of<1>(s, planes, stride, dots, codes); break;
    case 2: dots_of<2>(s, planes, stride, dots, codes); break;
    case 4: dots_of<4>(s, planes, stride, dots, codes); break;
    default: dots_of<8>(s, planes, stride, dots, codes);
  }
}

static inline void begin() {
  const ScanConfig config;
  _tile_loadconfig(&config);
}
static inline void end() { _tile_release(); }

}  // namespace SIEVE_LEVEL
}  // namespace sieve
