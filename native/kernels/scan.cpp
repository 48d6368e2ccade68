// Integer dot products of rounded queries with bit planes of keys, and the log mass of every 16 keys.
#include "kernels/functions.h"
#include "kernels/four.h"

namespace sieve {
namespace SIEVE_LEVEL {

constexpr int KEYS = SCAN_PANELS * PANEL;
constexpr int CHUNK_VECS = PANEL * SCAN_ROWS / LANES;  // vectors of one panel's logits: rows lie side by side

#if defined(__AMX_INT8__) && defined(__GFNI__)

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

int64_t scan_bytes(int32_t d, int32_t rows) { return up(d, 128) / 16 * 1024 * (rows / SCAN_ROWS); }

// Four keys are the four lanes of a vector, so the second operand is diagonal: columns 4 k .. 4 k + 3 see lane k only.
void pack_scan(const int8_t* q, int32_t d, int32_t rows, int32_t bits, void* out) {
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
    for (int i = 0; i < KEYS / 4; ++i) {
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
      products(codes, query + ((int64_t)g * chunks + c) * 8 * 1024, c == 0, dots + g * KEYS * SCAN_ROWS);
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

#else

int64_t scan_bytes(int32_t d, int32_t rows) { return up(d, 32) * rows * 2; }

void pack_scan(const int8_t* q, int32_t d, int32_t rows, int32_t, void* out) {
  int16_t* to = static_cast<int16_t*>(out);
  const int64_t wide = up(d, 32);
  memset(to, 0, scan_bytes(d, rows));
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < d; ++c) to[r * wide + c] = q[(int64_t)r * d + c];
}

// The bits of a byte as eight bytes, the most significant first in memory.
static inline uint64_t spread(uint8_t byte) {
  const uint64_t one = 0x0101010101010101ull;
  return ((byte * one & 0x0102040810204080ull) + 0x7f7f7f7f7f7f7f7full) >> 7 & one;
}

static inline void integer_dots(const Scan& s, const uint8_t* const* planes, int64_t stride, int32_t* dots, void* scratch) {
  const int64_t wide = up(s.d, 32), bytes = (s.d + 7) / 8;
  const int16_t* query = static_cast<const int16_t*>(s.query);
  int16_t* codes = static_cast<int16_t*>(scratch);
  const int rows = s.groups * s.digits * SCAN_ROWS;
  for (int64_t c = bytes * 8; c < wide; ++c) codes[c] = 0;
  for (int key = 0; key < KEYS; ++key) {
    for (int64_t i = 0; i < bytes; ++i) {
      uint64_t eight = 0;
      for (int b = 0; b < s.bits; ++b) eight = (eight << 1) + spread(planes[b][key * stride + i]);
      uint8_t code[8];
      memcpy(code, &eight, 8);
      for (int j = 0; j < 8; ++j) codes[i * 8 + j] = code[j];
    }
    for (int r = 0; r < rows; ++r) {
      const int16_t* q = query + r * wide;
      int32_t total = 0;
      for (int64_t c = 0; c < wide; ++c) total += (int32_t)codes[c] * q[c];
      dots[((r / SCAN_ROWS) * KEYS + key) * SCAN_ROWS + r % SCAN_ROWS] = total;
    }
  }
}

static inline void begin() {}
static inline void end() {}

#endif

int64_t scan_scratch(int32_t d, int32_t rows) {
  const int64_t logits = KEYS * SCAN_ROWS * 4, dots = logits * (rows / SCAN_ROWS);
  return 2 * logits + 2 * dots + 8192 + up(d, 32) * 4 + 8 * KEYS * up(d, 128) / 8 + KEYS * 2 + 4096;
}

// Every key's scale once for each of four rows, and the largest of each panel.
static inline void spread_scales(const Scan& s, int64_t base, int there, float* scale, float* largest) {
#if defined(__AVX512F__)
  if (there == KEYS && s.scale_stride == 1) {
    const __m512i lane = _mm512_srli_epi32((__m512i)iota(), 2);
    for (int p = 0; p < SCAN_PANELS; ++p) {
      const __m512 t = (__m512)load_as_float(s.scale, base + p * PANEL, F16);
      largest[p] = _mm512_reduce_max_ps(t);
      for (int i = 0; i < 4; ++i)
        _mm512_storeu_ps(scale + (p * 4 + i) * 16, _mm512_permutexvar_ps(_mm512_add_epi32(lane, _mm512_set1_epi32(4 * i)), t));
    }
    return;
  }
#endif
  for (int p = 0; p < SCAN_PANELS; ++p) largest[p] = 0.0f;
  for (int i = 0; i < KEYS; ++i) {
    const float t = i < there ? from_f16(s.scale[(base + i) * s.scale_stride]) : 0.0f;
    for (int r = 0; r < SCAN_ROWS; ++r) scale[i * SCAN_ROWS + r] = t;
    largest[i / PANEL] = t > largest[i / PANEL] ? t : largest[i / PANEL];
  }
}

// Integer dots of one chunk; nothing behind the last key is read.
static inline void chunk_dots(const Scan& s, int64_t first, int32_t* dots, uint8_t* codes, uint8_t* copy) {
  const int64_t base = first * PANEL, left = s.kv_len - base, bytes = (s.d + 7) / 8;
  const int there = (int)(left < KEYS ? left : KEYS);
  const uint8_t* planes[8];
  int64_t stride = s.key_stride;
  for (int b = 0; b < s.bits; ++b) planes[b] = s.planes[b] + base * s.key_stride;
  if (there < KEYS) {
    stride = bytes;
    for (int b = 0; b < s.bits; ++b) {
      uint8_t* to = copy + b * KEYS * bytes;
      for (int i = 0; i < KEYS; ++i) {
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
  const int64_t base = first * PANEL, left = s.kv_len - base;
  const int there = (int)(left < KEYS ? left : KEYS);

  spread_scales(s, base, there, scale, largest);

  for (int g = 0; g < s.groups; ++g) {
    bool whole = there == KEYS && !s.key_mask;
    for (int r = 0; r < SCAN_ROWS; ++r) whole &= s.low[g * SCAN_ROWS + r] <= base && s.high[g * SCAN_ROWS + r] >= base + KEYS;
    for (int e = 0; e < s.digits; ++e) {
      const int at = (g * s.digits + e) * SCAN_ROWS;
      const vf factor = four(s.factor + at);
      const vi centre = four_integers(s.centre + at);
      const int32_t* from = dots + (int64_t)at * KEYS;
      const bool ends = e + 1 == s.digits;
      for (int i = 0; i < KEYS * SCAN_ROWS; i += LANES) {
        const vi twice = *reinterpret_cast<const vi_any*>(from + i) * 2 - centre;
        vf x = __builtin_convertvector(twice, vf) * factor;
        if (e) x += load(logits + i);
        store(logits + i, ends ? x * load(scale + i) : x);
      }
    }
    if (!whole)
      for (int i = 0; i < KEYS; ++i) {
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
  float* logits = scale + KEYS * SCAN_ROWS;
  const int64_t size = KEYS * SCAN_ROWS * s.groups * s.digits;
  int32_t* dots = reinterpret_cast<int32_t*>(logits + KEYS * SCAN_ROWS);
  uint8_t* codes = reinterpret_cast<uint8_t*>(dots + 2 * size);
  uint8_t* copy = codes + 8192 + up(s.d, 32) * 4;
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
