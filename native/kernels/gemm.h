// The two inner products of attention as outer-product loops; accumulators stay in registers.
#pragma once
#include "kernels/vec.h"

namespace sieve {
namespace SIEVE_LEVEL {

#if defined(__AVX512F__)
constexpr int GEMM_ROWS = 6, GEMM_PANELS = 4;
#elif defined(__AVX2__)
constexpr int GEMM_ROWS = 6, GEMM_PANELS = 1;
#else
constexpr int GEMM_ROWS = 2, GEMM_PANELS = 1;
#endif
constexpr int GEMM_VECS = GEMM_PANELS * PANEL_VECS;
constexpr int GEMM_COLS = GEMM_VECS * LANES;

// acc[r][columns of panel q] += sum_k a[r * rs + k * ks] * panel[q][k * 16 + i]
template <int R, int Q>
static inline __attribute__((always_inline)) void add_panels(vf (&acc)[R][Q * PANEL_VECS], const float* a, int64_t rs, int64_t ks, int n,
                                                             const float* const* panel) {
  constexpr int C = Q * PANEL_VECS;
  for (int k = 0; k < n; ++k) {
    vf b[C];
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) b[j] = load(panel[j / PANEL_VECS] + (int64_t)k * PANEL + j % PANEL_VECS * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vf x = splat(a[r * rs + k * ks]);
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) acc[r][j] += x * b[j];
    }
  }
}

// c[r][q * 16 + i] = sum_k a[r * rs + k * ks] * panel[q][k * 16 + i], or += with Add
template <int R, int Q, bool Add = false>
static inline __attribute__((always_inline)) void panels_block(const float* a, int64_t rs, int64_t ks, int n,
                                                               const float* const* panel, float* c, int64_t ldc) {
  constexpr int C = Q * PANEL_VECS;
  vf acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) acc[r][j] = Add ? load(c + r * ldc + j * LANES) : vf{};
  add_panels<R, Q>(acc, a, rs, ks, n, panel);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) store(c + r * ldc + j * LANES, acc[r][j]);
}

// c[r][i] += sum_k a[r * rs + k * ks] * row[k][i]
template <int R, int C>
static inline void rows_block(const float* a, int64_t rs, int64_t ks, int n, const float* const* row, int64_t column, float* c,
                              int64_t ldc) {
  vf acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) acc[r][j] = load(c + r * ldc + j * LANES);
  for (int k = 0; k < n; ++k) {
    const float* at = row[k] + column;
    vf b[C];
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) b[j] = load(at + j * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vf x = splat(a[r * rs + k * ks]);
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) acc[r][j] += x * b[j];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) store(c + r * ldc + j * LANES, acc[r][j]);
}

template <int Q>
static inline void panels_rows(const float* a, int64_t rs, int rows, int n, const float* const* panel, float* c, int64_t ldc) {
  int r = 0;
  for (; r + GEMM_ROWS <= rows; r += GEMM_ROWS) panels_block<GEMM_ROWS, Q>(a + r * rs, rs, 1, n, panel, c + r * ldc, ldc);
  if constexpr (GEMM_ROWS > 4)
    if (r + 4 <= rows) {
      panels_block<4, Q>(a + r * rs, rs, 1, n, panel, c + r * ldc, ldc);
      r += 4;
    }
  if constexpr (GEMM_ROWS > 2)
    if (r + 2 <= rows) {
      panels_block<2, Q>(a + r * rs, rs, 1, n, panel, c + r * ldc, ldc);
      r += 2;
    }
  for (; r < rows; ++r) panels_block<1, Q>(a + r * rs, rs, 1, n, panel, c + r * ldc, ldc);
}

// c [rows][panels * 16] = a [rows][n] times packed panels [n][16]
static inline void times_panels(const float* a, int64_t rs, int rows, int n, const float* const* panel, int panels, float* c,
                                int64_t ldc) {
  int q = 0;
  for (; q + GEMM_PANELS <= panels; q += GEMM_PANELS) panels_rows<GEMM_PANELS>(a, rs, rows, n, panel + q, c + q * PANEL, ldc);
  if constexpr (GEMM_PANELS > 2)
    if (q + 2 <= panels) {
      panels_rows<2>(a, rs, rows, n, panel + q, c + q * PANEL, ldc);
      q += 2;
    }
  for (; q < panels; ++q) panels_rows<1>(a, rs, rows, n, panel + q, c + q * PANEL, ldc);
}

template <int C>
static inline void rows_columns(const float* a, int64_t rs, int64_t ks, int rows, int n, const float* const* row, int64_t column,
                                float* c, int64_t ldc) {
  int r = 0;
  for (; r + GEMM_ROWS <= rows; r += GEMM_ROWS)
    rows_block<GEMM_ROWS, C>(a + r * rs, rs, ks, n, row, column, c + r * ldc + column, ldc);
  if constexpr (GEMM_ROWS > 4)
    if (r + 4 <= rows) {
      rows_block<4, C>(a + r * rs, rs, ks, n, row, column, c + r * ldc + column, ldc);
      r += 4;
    }
  if constexpr (GEMM_ROWS > 2)
    if (r + 2 <= rows) {
      rows_block<2, C>(a + r * rs, rs, ks, n, row, column, c + r * ldc + column, ldc);
      r += 2;
    }
  for (; r < rows; ++r) rows_block<1, C>(a + r * rs, rs, ks, n, row, column, c + r * ldc + column, ldc);
}

// c [rows][columns] += a times rows of numbers; `columns` is a multiple of 16, a(r, k) = a[r * rs + k * ks]
static inline void times_rows(const float* a, int64_t rs, int64_t ks, int rows, int n, const float* const* row, int columns,
                              float* c, int64_t ldc) {
  int64_t j = 0;
  for (; j + GEMM_COLS <= columns; j += GEMM_COLS) rows_columns<GEMM_VECS>(a, rs, ks, rows, n, row, j, c, ldc);
  for (; j + PANEL <= columns; j += PANEL) rows_columns<PANEL_VECS>(a, rs, ks, rows, n, row, j, c, ldc);
}

// c[r][i] += sum_k a[r * rs + k] * panel[k / 16][from + k % 16 * 16 + i] over 16 columns of values that lie in panels
template <int R>
static inline void value_block(const float* a, int64_t rs, int panels, const float* const* panel, int64_t from, float* c, int64_t ldc) {
  vf acc[R][PANEL_VECS];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < PANEL_VECS; ++j) acc[r][j] = load(c + r * ldc + j * LANES);
  for (int p = 0; p < panels; ++p, a += PANEL) {
    const float* at = panel[p] + from;
    add_panels<R, 1>(acc, a, rs, 1, PANEL, &at);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < PANEL_VECS; ++j) store(c + r * ldc + j * LANES, acc[r][j]);
}

// c [rows][columns] += a [rows][panels * 16] times panels of values [columns / 16][16][16]. With `ends`, every GEMM_ROWS rows read so
// many panels. The columns come outermost: 16 of them stay in the first cache while every row of `a` passes.
static inline void times_values(const float* a, int64_t rs, int rows, const float* const* panel, int panels, const int* ends, int columns,
                                float* c, int64_t ldc) {
  const auto length = [&](int r) { return ends ? ends[r / GEMM_ROWS] : panels; };
  for (int j = 0; j < columns; j += PANEL) {
    const int64_t from = (int64_t)j * PANEL;
    int r = 0;
    for (; r + GEMM_ROWS <= rows; r += GEMM_ROWS) value_block<GEMM_ROWS>(a + r * rs, rs, length(r), panel, from, c + r * ldc + j, ldc);
    if constexpr (GEMM_ROWS > 4)
      for (; r + 4 <= rows; r += 4) value_block<4>(a + r * rs, rs, length(r), panel, from, c + r * ldc + j, ldc);
    for (; r + 2 <= rows; r += 2) value_block<2>(a + r * rs, rs, length(r), panel, from, c + r * ldc + j, ldc);
    for (; r < rows; ++r) value_block<1>(a + r * rs, rs, length(r), panel, from, c + r * ldc + j, ldc);
  }
}

constexpr int64_t GATHERED_BYTES = 16384;  // half of the first cache of machines with 8 lanes

// 16 columns of all rows side by side: rows that are a power of two apart share few sets of the cache, and where many read them
// they would come again and again from behind it. Here that pays; elsewhere the cache has more ways.
constexpr bool gathering(int readers) { return LANES == 8 && readers >= 2 * GEMM_ROWS; }

static inline void gather_columns(const float* const* row, int n, int columns, float* out) {
  for (int j = 0; j < columns; j += PANEL)
    for (int i = 0; i < n; ++i, out += PANEL)
      for (int e = 0; e < PANEL; e += LANES) store(out + e, load(row[i] + j + e));
}

// `apart`: rows that were gathered side by side, of which n are read
template <int R>
static inline void gathered_rows(const float* a, int64_t rs, int64_t ks, int n, const float* gathered, int apart, int columns, float* c,
                                 int64_t ldc) {
  for (int j = 0; j < columns; j += PANEL, gathered += (int64_t)apart * PANEL)
    panels_block<R, 1, true>(a, rs, ks, n, &gathered, c + j, ldc);
}

// times_rows from gathered columns; sums are the same to the bit. With `panels`, every GEMM_ROWS rows of `a` end after so many
// panels of 16, of which `before` numbers lie before a.
static inline void times_columns(const float* a, int64_t rs, int64_t ks, int rows, int n, const float* gathered, int apart, int columns,
                                 float* c, int64_t ldc, const int* panels = nullptr, int before = 0) {
  const auto length = [&](int r) {
    const int own = panels ? panels[r / GEMM_ROWS] * PANEL - before : n;
    return own < 0 ? 0 : own < n ? own : n;
  };
  int r = 0;
  for (; r + GEMM_ROWS <= rows; r += GEMM_ROWS)
    gathered_rows<GEMM_ROWS>(a + r * rs, rs, ks, length(r), gathered, apart, columns, c + r * ldc, ldc);
  if constexpr (GEMM_ROWS > 4)
    for (; r + 4 <= rows; r += 4) gathered_rows<4>(a + r * rs, rs, ks, length(r), gathered, apart, columns, c + r * ldc, ldc);
  for (; r + 2 <= rows; r += 2) gathered_rows<2>(a + r * rs, rs, ks, length(r), gathered, apart, columns, c + r * ldc, ldc);
  for (; r < rows; ++r) gathered_rows<1>(a + r * rs, rs, ks, length(r), gathered, apart, columns, c + r * ldc, ldc);
}

// times_rows with ks = 1 from copies of a few rows at a time. `gathered` has room for GATHERED_BYTES or 16 rows; `panels` as above.
static inline void times_gathered(const float* a, int64_t rs, int rows, int n, const int* panels, const float* const* row, int columns,
                                  float* gathered, float* c, int64_t ldc) {
  const int64_t most = GATHERED_BYTES / 4 / columns / PANEL * PANEL;
  const int step = most < PANEL ? PANEL : (int)most;
  for (int k = 0; k < n; k += step) {
    const int some = n - k < step ? n - k : step;
    gather_columns(row + k, some, columns, gathered);
    times_columns(a + k, rs, 1, rows, some, gathered, some, columns, c, ldc, panels, k);
  }
}

}  // namespace SIEVE_LEVEL
}  // namespace sieve
