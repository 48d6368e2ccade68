// The two inner products of attention in bf16 on tile registers (AMX).
#pragma once
#include "kernels/amx.h"

#if defined(__AMX_BF16__)

namespace sieve {
namespace SIEVE_LEVEL {

constexpr bool VALUE_PAIRS = true;  // a product takes two panels of values at a time, side by side

static inline void begin_products() {
  TileConfig c;
  for (int i = 0; i < 8; ++i) {
    c.bytes[i] = 64;
    c.rows[i] = 16;
  }
  _tile_loadconfig(&c);
}

// Two sets of accumulators (tiles 0-1 and 2-3, one tile per 16 rows) take turns: a finished set is stored between the
// products of the next one, which hides the stores. Tiles 4 to 6 are operands. The compiler wants tile numbers as literals.
#define SIEVE_PRODUCTS(A, B, C, D, STORE, left, right)                              \
  {                                                                                 \
    _tile_loadd(4, right, 64);                                                      \
    _tile_loadd(5, left, left_stride);                                              \
    _tile_dpbf16ps(A, 5, 4);                                                        \
    if (STORE) _tile_stored(C, last, out_stride);                                   \
    if constexpr (Rows > 1) {                                                       \
      _tile_loadd(6, left + 16 * (left_stride / 2), left_stride);                   \
      _tile_dpbf16ps(B, 6, 4);                                                      \
      if (STORE) _tile_stored(D, last + 16 * (out_stride / 4), out_stride);         \
    }                                                                               \
  }

// s [32 | 16 rows][count * 16 keys] from queries and packed key panels
template <int Rows>
static inline void tile_dots(const uint16_t* q, int64_t stride, int64_t wide, const uint16_t* const* panel, int count, float* s) {
  const int64_t left_stride = stride * 2, out_stride = S_STRIDE * 4;
  float* last = s;
#define SIEVE_PANEL(A, B, C, D)                                                     \
  {                                                                                 \
    _tile_zero(A);                                                                  \
    if constexpr (Rows > 1) _tile_zero(B);                                          \
    SIEVE_PRODUCTS(A, B, C, D, i > 0, q, panel[i])                                  \
    for (int64_t c = 32; c < wide; c += 32) SIEVE_PRODUCTS(A, B, C, D, false, (q + c), (panel[i] + c * PANEL)) \
    last = s + i * PANEL;                                                           \
  }
  int i = 0;
  for (; i + 1 < count; ++i) {
    SIEVE_PANEL(0, 1, 2, 3)
    ++i;
    SIEVE_PANEL(2, 3, 0, 1)
  }
  if (i < count) {
    SIEVE_PANEL(0, 1, 2, 3)
    _tile_stored(0, last, out_stride);
    if constexpr (Rows > 1) _tile_stored(1, last + 16 * S_STRIDE, out_stride);
  } else {
    _tile_stored(2, last, out_stride);
    if constexpr (Rows > 1) _tile_stored(3, last + 16 * S_STRIDE, out_stride);
  }
#undef SIEVE_PANEL
}

// o [32 | 16 rows][columns from `column` to `end`] += weights times value pairs; `v` has one pair of panels each
template <int Rows>
static inline void tile_weigh(const uint16_t* p, const uint16_t* const* v, int pairs, int column, int end, float* o, int64_t wide) {
  const int64_t left_stride = CHUNK * 2, out_stride = wide * 4;
  float* last = o;
#define SIEVE_COLUMN(A, B, C, D)                                                    \
  {                                                                                 \
    _tile_loadd(A, o + i, out_stride);                                              \
    if constexpr (Rows > 1) _tile_loadd(B, o + i + 16 * wide, out_stride);          \
    SIEVE_PRODUCTS(A, B, C, D, i > column, p, (v[0] + i * 32))                      \
    for (int j = 1; j < pairs; ++j) SIEVE_PRODUCTS(A, B, C, D, false, (p + j * 32), (v[j] + i * 32)) \
    last = o + i;                                                                   \
  }
  int i = column;
  for (; i + 16 < end; i += 16) {
    SIEVE_COLUMN(0, 1, 2, 3)
    i += 16;
    SIEVE_COLUMN(2, 3, 0, 1)
  }
  if (i < end) {
    SIEVE_COLUMN(0, 1, 2, 3)
    _tile_stored(0, last, out_stride);
    if constexpr (Rows > 1) _tile_stored(1, last + 16 * wide, out_stride);
  } else {
    _tile_stored(2, last, out_stride);
    if constexpr (Rows > 1) _tile_stored(3, last + 16 * wide, out_stride);
  }
#undef SIEVE_COLUMN
}
#undef SIEVE_PRODUCTS

static inline void end_products() { _tile_release(); }

// s [rows][count * 16 keys] from queries, of which whole sixteens are there, and packed key panels
static inline void dots(const uint16_t* q, int64_t stride, int rows, int64_t wide, const uint16_t* const* panel, int count, float* s) {
  if (rows > 16) tile_dots<2>(q, stride, wide, panel, count, s);
  else tile_dots<1>(q, stride, wide, panel, count, s);
}

// o [rows][columns from `column` to `end`] += weights times values; `half` are the panels
static inline void weigh(const uint16_t* p, int rows, const uint16_t* const* half, int count, int column, int end, float* o, int64_t wide) {
  const uint16_t* pair[CHUNK_PANELS / 2];
  for (int j = 0; 2 * j < count; ++j) pair[j] = half[2 * j];
  if (rows > 16) tile_weigh<2>(p, pair, (count + 1) / 2, column, end, o, wide);
  else tile_weigh<1>(p, pair, (count + 1) / 2, column, end, o, wide);
}

}  // namespace SIEVE_LEVEL
}  // namespace sieve

#endif
