// Where lists of panels end for each few rows of a tile: along the diagonal, half of what is read is hidden.
#pragma once
#include "kernels.h"
#include "kernels/gemm.h"

namespace sieve {
namespace SIEVE_LEVEL {

// How many of some panels in turn each group of GEMM_ROWS rows sees; all panels behind them are hidden from the whole group.
struct Ends {
  int panels[(MAX_ROWS + GEMM_ROWS - 1) / GEMM_ROWS];
  bool early = false;  // whether a group ends before the last panel; else `panels` is not written

  // Of panels n..n+count-1 of the tile.
  void find(const Tile& t, int n, int count) {
    early = false;
    if (t.rows_alone || !t.masked[n + count - 1]) return;
    for (int r = 0; r < t.rows; r += GEMM_ROWS) {
      int64_t high = t.high[r];
      for (int i = r + 1; i < t.rows && i < r + GEMM_ROWS; ++i) high = t.high[i] > high ? t.high[i] : high;
      int seen = count;
      while (seen && (int64_t)t.panel[n + seen - 1] * PANEL >= high) --seen;
      panels[r / GEMM_ROWS] = seen;
      early |= seen < count;
    }
  }
  const int* given() const { return early ? panels : nullptr; }
  int of(int row, int count) const { return early ? panels[row / GEMM_ROWS] : count; }

  // act(row, rows) for the rows that read panel `p`, as long runs as there are.
  template <class Act>
  void each_run(int rows, int p, Act&& act) const {
    if (!early) return act(0, rows);
    for (int r = 0; r < rows;) {
      const int first = r;
      while (r < rows && panels[r / GEMM_ROWS] > p) r = r + GEMM_ROWS < rows ? r + GEMM_ROWS : rows;
      if (r > first)
        act(first, r - first);
      else
        r += GEMM_ROWS;
    }
  }
};

}  // namespace SIEVE_LEVEL
}  // namespace sieve
