// Scores of key blocks for sixteen query rows at a time, one row a lane, and what selectors make of them.
#include "kernels/functions.h"
#include "kernels/gemm.h"
#include "kernels/key_rows.h"
#include "kernels/lanes.h"
#include "kernels/logits.h"

namespace sieve {
namespace SIEVE_LEVEL {

constexpr int CHUNK_KEYS = 32;  // keys whose dot products are made together
constexpr float SUM_LOW = 8.6736174e-19f, SUM_HIGH = 1.2676506e30f;  // 2^-60, 2^100: sums between them lost nothing

// Bits of the codes that rounded queries may meet in integer products. Where they are added in 16 bits, a pair of 8 bits does not fit.
#if defined(__AMX_INT8__) || defined(__AVX512VNNI__)
#define SIEVE_INTEGERS
int32_t integer_bits() { return 8; }
#elif defined(SIEVE_PAIRS)
#define SIEVE_INTEGERS
int32_t integer_bits() { return 7; }
#else
int32_t integer_bits() { return 0; }
#endif

// Scores of keys ------------------------------------------------------------------------------------------------------

int64_t key_score_scratch(int64_t block_size, int32_t wide) {
  const int64_t keys = up(block_size > CHUNK_KEYS ? block_size : CHUNK_KEYS, 32);
  return keys * LANE_ROWS * 3 + keys * wide + LANE_ROWS * 8 + 64;
}

// One block with its masks and its cap: by `reference` [16] where that serves, else by the block's own maximum. Equal keys give
// equal bits on every path, since both references are integers. `dots` [n][16]: products as floats (Tiles: as integers above
// MAGIC). Returns the lanes, as bits, that `reference` did not serve.
template <bool Tiles, bool Eight>
static uint32_t careful(const KeyScore& s, int64_t base, int n, const float* dots, const float* reference, float* logits, float* out) {
  const Lanes& l = s.lanes;
  const float infinity = __builtin_inff();
  uint32_t unserved = 0;
  for (int v = 0; v < PANEL_VECS; ++v) {
    const vf factor = load(s.factor + v * LANES), usual = load(reference + v * LANES);
    vi from, to, seen = vi{};
    for (int i = 0; i < LANES; ++i) {
      const int64_t low = l.low[v * LANES + i] - base, high = l.high[v * LANES + i] - base;
      from[i] = (int32_t)(low < 0 ? 0 : low < n ? low : n);
      to[i] = (int32_t)(high < 0 ? 0 : high < n ? high : n);
    }
    vf top = splat(-infinity), total = vf{};
    vi unknown = vi{};
    for (int j = 0; j < n; ++j) {
      float* keep = logits + j * LANE_ROWS + v * LANES;
      if (l.part && !l.part[base + j]) {
        store(keep, splat(-infinity));
        continue;
      }
      const vi in = (splat_int(j) >= from) & (splat_int(j) < to);
      vf x = load(dots + j * LANE_ROWS + v * LANES);
      if (Tiles)
        x = x * s.step[base + j] + s.shift[base + j] + (Eight ? load(s.half + v * LANES) * s.step[base + j] : vf{});
      else if (s.step)
        x = x * s.step[base + j];
      seen |= in;
      if (s.softcap == 0.0f) total += (vf)(in & (vi)weight(x * factor - usual));
      x = x * factor;
      if (s.softcap != 0.0f) x = tanh_(x * (LN2 / s.softcap)) * (s.softcap * LOG2E);
      unknown |= in & (x != x);
      x = select(in & (x == x), x, splat(-infinity));
      top = x > top ? x : top;
      store(keep, x);
    }
    const vi served = (total >= splat(SUM_LOW)) & (total <= splat(SUM_HIGH));
    vf result = short_log2(select(served, total, splat(1.0f))) + usual;
    const vi off = seen & ~served;
    if (any_lane(off)) {
      const vf own = select((top > splat(-1e30f)) & (top < splat(1e30f)), round_even(top), vf{});
      total = vf{};
      for (int j = 0; j < n; ++j) {
        const vf x = load(logits + j * LANE_ROWS + v * LANES) - own;
        total += weight(x > splat(-100.0f) ? (x < splat(1.0f) ? x : splat(1.0f)) : splat(-100.0f));
      }
      vf other = select(top > splat(-infinity), own + short_log2(max_(total, splat(1e-30f))), splat(-infinity));
      other = select(top == splat(infinity), splat(infinity), other);
      other = select(unknown | (other < splat(LOWEST)), splat(LOWEST), other);
      result = select(off, other, result);
      for (int i = 0; i < LANES; ++i) unserved |= (uint32_t)(off[i] != 0) << (v * LANES + i);
    }
    store(out + v * LANES, select(seen, result, splat(-infinity)));
  }
  return unserved;
}

#if defined(SIEVE_INTEGERS) && !defined(SIEVE_PAIRS) && !defined(__AMX_INT8__)
static inline void make_unsigned(const int8_t* q, int64_t n, uint8_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = (uint8_t)(q[i] ^ -128);
}
#endif

#if defined(SIEVE_PAIRS)
// What the products of a row begin with: the bits of MAGIC, less what codes count too much where twice their level is meant.
static inline void row_origins(const int8_t* q, int64_t wide, int bits, int32_t* origin) {
  int32_t magic;
  memcpy(&magic, &MAGIC, 4);
  for (int i = 0; i < LANE_ROWS; ++i) origin[i] = magic;
  for (int64_t c = 0; c < wide; c += 4)
    for (int i = 0; i < LANE_ROWS; ++i, q += 4) origin[i] -= ((1 << bits) - 1) * (q[0] + q[1] + q[2] + q[3]);
}

// dots [keys up to 4][16] = twice the codes times queries, as integers on top of `origin` [16]. `Steps` pairs of products are added in
// 16 bits before they are widened.
template <int Steps>
static inline void paired_dots(const int8_t* codes, int64_t wide, const int8_t* q, const int32_t* origin, int keys, float* dots) {
  constexpr int CHAINS = 4;  // queries are loaded once for all; their sums wait in memory meanwhile
  for (int j = 0; j < keys; j += CHAINS) {
    __m256i_u* sum = reinterpret_cast<__m256i_u*>(dots + (int64_t)j * LANE_ROWS);
    for (int64_t c = 0; c < wide; c += 4 * Steps) {
      const int8_t *key = codes + j * wide + c, *four_channels = q + c * LANE_ROWS;
      __m256i part[CHAINS][PANEL_VECS];
#pragma GCC unroll 8
      for (int p = 0; p < Steps; ++p)
#pragma GCC unroll 2
        for (int v = 0; v < PANEL_VECS; ++v) {
          const __m256i rows = _mm256_load_si256(reinterpret_cast<const __m256i*>(four_channels + 4 * p * LANE_ROWS + v * LANES * 4));
#pragma GCC unroll 4
          for (int i = 0; i < CHAINS; ++i) {
            int32_t four;
            memcpy(&four, key + i * wide + 4 * p, 4);
            const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi32(four), rows);
            part[i][v] = p ? _mm256_add_epi16(part[i][v], pairs) : pairs;
            asm("" : "+x"(part[i][v]));  // added one after the other: as a tree they would not fit the registers
          }
        }
#pragma GCC unroll 4
      for (int i = 0; i < CHAINS; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < PANEL_VECS; ++v) {
          const __m256i before = c ? sum[i * PANEL_VECS + v] : _mm256_load_si256(reinterpret_cast<const __m256i*>(origin + v * LANES));
          sum[i * PANEL_VECS + v] = _mm256_add_epi32(before, _mm256_madd_epi16(part[i][v], _mm256_set1_epi16(2)));
        }
    }
  }
}
#elif defined(SIEVE_INTEGERS) && !defined(__AMX_INT8__)
// dots [keys up to 8][16] = codes times queries, as integers above the bits of MAGIC. Queries are unsigned, 128 too large; what
// that adds is taken off beforehand.
static inline void unsigned_dots(const int8_t* codes, int64_t wide, const uint8_t* q, const int32_t* origin, int keys, float* dots) {
  constexpr int CHAINS = 8;  // one alone waits for its own results
  for (int j = 0; j < keys; j += CHAINS) {
    const int8_t* key = codes + (int64_t)j * wide;
    __m512i sum[CHAINS];
#pragma GCC unroll 8
    for (int i = 0; i < CHAINS; ++i) sum[i] = _mm512_set1_epi32(origin[j + i]);
    for (int64_t c = 0; c < wide; c += 4) {
      const __m512i rows = _mm512_load_si512(q + c * LANE_ROWS);
#pragma GCC unroll 8
      for (int i = 0; i < CHAINS; ++i) {
        int32_t four;
        memcpy(&four, key + i * wide + c, 4);
        sum[i] = _mm512_dpbusd_epi32(sum[i], rows, _mm512_set1_epi32(four));
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < CHAINS; ++i) _mm512_storeu_si512(dots + (int64_t)(j + i) * LANE_ROWS, sum[i]);
  }
}
#endif

#if defined(__AMX_INT8__)
struct alignas(64) IntegerTiles {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// dots [keys up to 32][16] = codes times queries, as integers above the bits of MAGIC; tiles 4 and 5 hold the first queries.
// Two chains at a time: one alone waits for its own results.
template <int Steps>
static inline void tile_dots(const int8_t* codes, int64_t wide, int steps, const int8_t* q, const int32_t* magic, int keys, float* dots) {
  for (int j = 0; j < keys; j += 32) {
    _tile_loadd(0, magic, 64);
    _tile_loadd(1, magic, 64);
    const int8_t* at_key = codes + (int64_t)j * wide;
    const int8_t* next = at_key + 16 * wide;
    if constexpr (Steps == 0) {
      for (int c = 0; c < steps; ++c) {
        _tile_loadd(6, q + c * 1024, 64);
        _tile_loadd(2, at_key + c * 64, wide);
        _tile_dpbssd(0, 2, 6);
        _tile_loadd(3, next + c * 64, wide);
        _tile_dpbssd(1, 3, 6);
      }
    } else {
      _tile_loadd(2, at_key, wide);
      _tile_dpbssd(0, 2, 4);
      _tile_loadd(3, next, wide);
      _tile_dpbssd(1, 3, 4);
      if constexpr (Steps > 1) {
        _tile_loadd(6, at_key + 64, wide);
        _tile_dpbssd(0, 6, 5);
        _tile_loadd(7, next + 64, wide);
        _tile_dpbssd(1, 7, 5);
      }
    }
    _tile_stored(0, dots + (int64_t)j * LANE_ROWS, 64);
    _tile_stored(1, dots + (int64_t)(j + 16) * LANE_ROWS, 64);
  }
}
#endif

template <bool Tiles, bool Eight>
static void score_keys_by(const KeyScore& s) {
  const Lanes& l = s.lanes;
  const int64_t size = l.block_size;
  const int chunk = size >= CHUNK_KEYS ? 1 : (int)(CHUNK_KEYS / size);  // blocks
  const int64_t room = up(size > CHUNK_KEYS ? size : CHUNK_KEYS, 32);
  float* dots[2] = {s.scratch, s.scratch + room * LANE_ROWS};
  float* logits = dots[1] + room * LANE_ROWS;
  float* rows = logits + room * LANE_ROWS;
  float base_of[LANE_ROWS] = {};
  uint32_t based = 0;
#if defined(__AMX_INT8__)
  alignas(64) int32_t magic[256];
  const int steps = s.wide / 64;
  if (Tiles) {
    IntegerTiles c;
    for (int i = 0; i < 8; ++i) {
      c.bytes[i] = 64;
      c.rows[i] = 16;
    }
    _tile_loadconfig(&c);
    int32_t bits;
    memcpy(&bits, &MAGIC, 4);
    for (int i = 0; i < 256; ++i) magic[i] = bits;
    _tile_loadd(4, s.q_codes, 64);
    if (steps > 1) _tile_loadd(5, s.q_codes + 1024, 64);
  }
#elif defined(SIEVE_PAIRS)
  alignas(64) int32_t origin[LANE_ROWS];
  if (Tiles) row_origins(s.q_codes, s.wide, s.bits, origin);
#elif defined(SIEVE_INTEGERS)
  alignas(64) uint8_t unsigned_q[LANE_ROWS * (MOST_CHANNELS + 64)];
  if (Tiles) make_unsigned(s.q_codes, s.wide * LANE_ROWS, unsigned_q);
#endif
  auto multiply = [&](int64_t b0, float* out) {
    const int64_t b1 = b0 + chunk < l.last ? b0 + chunk : l.last, first = b0 * size;
    const int keys = (int)((b1 * size < l.kv_len ? b1 * size : l.kv_len) - first);
    if (Tiles) {
#if defined(__AMX_INT8__)
      const int8_t* codes = s.codes + first * s.wide;
      if (steps == 1)
        tile_dots<1>(codes, s.wide, 1, s.q_codes, magic, keys, out);
      else if (steps == 2)
        tile_dots<2>(codes, s.wide, 2, s.q_codes, magic, keys, out);
      else
        tile_dots<0>(codes, s.wide, steps, s.q_codes, magic, keys, out);
#elif defined(SIEVE_PAIRS)
      // a pair of products is at most 2 * 127 * code: 8, 4, 2 and 1 of them fit 16 bits
      const auto dots_by = s.bits <= 4 ? paired_dots<8> : s.bits == 5 ? paired_dots<4> : s.bits == 6 ? paired_dots<2> : paired_dots<1>;
      dots_by(s.codes + first * s.wide, s.wide, s.q_codes, origin, keys, out);
#elif defined(SIEVE_INTEGERS)
      unsigned_dots(s.codes + first * s.wide, s.wide, unsigned_q, s.origin + first, keys, out);
#endif
    } else {
      read_keys(s, first, keys, rows);
      times_panels(rows, s.wide, keys, s.d, &s.q, 1, out, LANE_ROWS);
    }
  };
  // sums wait here until their logarithms are taken together: one after the other, each would wait for the last
  int64_t waiting = l.first;
  auto finish = [&](int64_t until) {
    for (; waiting < until; ++waiting) {
      float* out = s.out + (waiting - l.first) * LANE_ROWS;
      for (int v = 0; v < PANEL_VECS; ++v) store(out + v * LANES, short_log2(load(out + v * LANES)) + load(base_of + v * LANES));
    }
  };
  multiply(l.first, dots[0]);
  int turn = 0;
  for (int64_t b0 = l.first; b0 < l.last; b0 += chunk, turn ^= 1) {
    const int64_t b1 = b0 + chunk < l.last ? b0 + chunk : l.last, first = b0 * size;
    // the next products are begun before these are used: they take their time in a unit of their own
    if (b1 < l.last) multiply(b1, dots[turn ^ 1]);
    for (int64_t b = b0; b < b1; ++b) {
      const int64_t base = b * size;
      const int n = (int)(l.kv_len - base < size ? l.kv_len - base : size);
      const float* at_dots = dots[turn] + (base - first) * LANE_ROWS;
      float* out = s.out + (b - l.first) * LANE_ROWS;
      const bool plain = s.step && s.softcap == 0.0f && l.all_low <= base && base + n <= l.all_high &&
                         (!l.part || l.part_before[base + n] - l.part_before[base] == n);
      if (plain) {
        const float* step = s.step + base;
        const float* shift = s.shift + base;
        const auto factor = [&](int v) { return load(s.factor + v * LANES); };
        const auto reference = [&](int v) { return load(base_of + v * LANES); };
        const auto one = [&](int j, int v) {
          const vf x = load(at_dots + j * LANE_ROWS + v * LANES);
          // the product with a half has at most 24 bits, so one fused operation removes MAGIC exactly
          vf y = Tiles ? x * step[j] + shift[j] : x * step[j];
          if (Eight) y += load(s.half + v * LANES) * step[j];
          return weight(y * factor(v) - reference(v));
        };
        vf total[PANEL_VECS] = {}, other[PANEL_VECS] = {};
        constexpr int AT_ONCE = PANEL_VECS > 1 ? 1 : 4;  // independent weights: more of them would not fit what waits for its turn
        int j = 0;
        for (; j + AT_ONCE <= n; j += AT_ONCE)
#pragma GCC unroll 4
          for (int v = 0; v < PANEL_VECS; ++v) {
            if constexpr (AT_ONCE == 1) {
              total[v] += one(j, v);
            } else {
              total[v] += one(j, v) + one(j + 1, v);
              other[v] += one(j + 2, v) + one(j + 3, v);
            }
          }
        for (; j < n; ++j)
          for (int v = 0; v < PANEL_VECS; ++v) total[v] += one(j, v);
        vi off = vi{};
#pragma GCC unroll 4
        for (int v = 0; v < PANEL_VECS; ++v) {
          total[v] += other[v];
          off |= ~((total[v] >= splat(SUM_LOW)) & (total[v] <= splat(SUM_HIGH)));
          store(out + v * LANES, total[v]);
        }
        if (!any_lane(off)) continue;
      }
      finish(b);
      // a row whose numbers are out of reach gets a reference of its own, once
      uint32_t unserved = careful<Tiles, Eight>(s, base, n, at_dots, base_of, logits, out) & ~based;
      for (; unserved; unserved &= unserved - 1) {
        const int i = __builtin_ctz(unserved);
        if (!(out[i] > LOWEST && out[i] < -LOWEST)) continue;
        base_of[i] = __builtin_rintf(out[i]);
        based |= 1u << i;
      }
      waiting = b + 1;
    }
  }
  finish(l.last);
#if defined(__AMX_INT8__)
  if (Tiles) _tile_release();
#endif
}

void score_keys(const KeyScore& s) {
#if defined(SIEVE_INTEGERS)
  if (s.q_codes && s.codes) return s.bits == 8 ? score_keys_by<true, true>(s) : score_keys_by<true, false>(s);
#endif
  score_keys_by<false, false>(s);
}

// Scores of block means -----------------------------------------------------------------------------------------------

void score_blocks(const BlockScore& s) {
  const Lanes& l = s.lanes;
  const float infinity = __builtin_inff();
  times_panels(s.mean + l.first * s.d, s.d, (int)(l.last - l.first), s.d, &s.q, 1, s.out, LANE_ROWS);
  for (int64_t b = l.first; b < l.last; ++b) {
    float* out = s.out + (b - l.first) * LANE_ROWS;
    const int64_t base = b * l.block_size, end = base + l.block_size < l.kv_len ? base + l.block_size : l.kv_len;
    const bool whole = l.all_low <= base && end <= l.all_high;
    const bool there = !l.part || l.part_before[end] > l.part_before[base];
    for (int v = 0; v < PANEL_VECS; ++v) {
      vf x = load(out + v * LANES) * s.scale;
      if (s.radius) x += load(s.reach + v * LANES) * s.radius[b];
      if (s.softcap != 0.0f) x = tanh_(x / s.softcap) * s.softcap;
      if (s.addend) x += s.addend[b];
      x = select(x > splat(LOWEST), x, splat(LOWEST));
      if (!there) x = splat(-infinity);
      if (there && !whole) {
        vi full, some;
        for (int i = 0; i < LANES; ++i) {
          const int64_t low = l.low[v * LANES + i], high = l.high[v * LANES + i];
          const int64_t from = low > base ? low : base, to = high < end ? high : end;
          bool any = from < to;
          if (any && l.part) any = l.part_before[to] > l.part_before[from];
          some[i] = any ? -1 : 0;
          full[i] = low <= base && end <= high ? -1 : 0;
        }
        x = select(some, select(full, x, splat(LOWEST)), splat(-infinity));
      }
      store(out + v * LANES, x);
    }
  }
}

}  // namespace SIEVE_LEVEL
}  // namespace sieve
