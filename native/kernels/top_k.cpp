// Fused scoring and selection: products of a block of keys meet each row's smallest kept product in registers, and only
// what beats it is stored and ranked.
#include "top_k.h"

#include "kernels/functions.h"
#include "kernels/gemm.h"
#include "kernels/logits.h"

namespace sieve {
namespace SIEVE_LEVEL {

static inline uint64_t rank_of(float x, int64_t key) {
  x += 0.0f;  // -0 is 0
  uint32_t bits;
  memcpy(&bits, &x, 4);
  bits = x != x ? 0xffffffffu : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return (uint64_t)bits << 32 | (uint32_t)~(uint32_t)key;
}

static inline float product_of(uint64_t rank) {
  const uint32_t high = (uint32_t)(rank >> 32), bits = high == 0xffffffffu ? 0x7fc00000u : high & 0x80000000u ? high & 0x7fffffffu : ~high;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

static inline void sift(uint64_t* heap, int64_t n, int64_t i) {
  const uint64_t x = heap[i];
  for (int64_t child; (child = 2 * i + 1) < n; i = child) {
    if (child + 1 < n && heap[child + 1] < heap[child]) ++child;
    if (heap[child] >= x) break;
    heap[i] = heap[child];
  }
  heap[i] = x;
}

// The keys of one panel whose bit is set, against what row `r` keeps.
static inline void offer(const TopKTile& x, int r, uint32_t bits, const float* s, int64_t base) {
  uint64_t* heap = x.best + r * x.top_k;
  for (; bits; bits &= bits - 1) {
    const int i = __builtin_ctz(bits);
    const uint64_t rank = rank_of(s[i], base + i);
    int64_t& count = x.count[r];
    if (count < x.top_k) {
      heap[count++] = rank;
      if (count < x.top_k) continue;
      for (int64_t j = count / 2; j-- > 0;) sift(heap, count, j);
    } else {
      if (rank < heap[0]) continue;
      heap[0] = rank;
      sift(heap, count, 0);
    }
    x.least[r] = product_of(heap[0]);
  }
}

// Bit i: lane i may belong to the best. Where blocks are visited out of order an equal product may have the earlier key.
template <bool InOrder>
static inline uint32_t beats(vf s, vf least) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)s, (__m512)least, InOrder ? _CMP_NLE_UQ : _CMP_NLT_UQ);
#else
  const vi hit = InOrder ? ~(s <= least) : ~(s < least);
#if defined(__AVX2__)
  return (uint32_t)_mm256_movemask_ps((__m256)hit);
#elif defined(__SSE2__)
  return (uint32_t)_mm_movemask_ps((__m128)hit);
#else
  uint32_t bits = 0;
  for (int i = 0; i < LANES; ++i) bits |= (uint32_t)(hit[i] & 1) << i;
  return bits;
#endif
#endif
}

// Rows row[0..R-1] against panels n..n+Q-1 of the list
template <int R, int Q, bool InOrder>
static inline void score(const TopKTile& x, const int32_t* row, int n) {
  const Tile& t = x.tile;
  constexpr int C = Q * PANEL_VECS;
  const float* panel[Q];
  const float* a[R];
  for (int p = 0; p < Q; ++p) panel[p] = static_cast<const float*>(t.k) + (int64_t)(t.panel[n + p] - x.k_panel) * PANEL * t.d;
  for (int r = 0; r < R; ++r) a[r] = static_cast<const float*>(t.q) + (int64_t)row[r] * t.d;
  vf acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) acc[r][j] = vf{};
  for (int k = 0; k < t.d; ++k) {
    vf b[C];
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) b[j] = load(panel[j / PANEL_VECS] + (int64_t)k * PANEL + j % PANEL_VECS * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vf q = splat(a[r][k]);
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) acc[r][j] += q * b[j];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const vf least = splat(x.least[row[r]]);
    uint64_t hits = 0;
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) hits |= (uint64_t)beats<InOrder>(acc[r][j], least) << (j * LANES);
    if (__builtin_expect(!hits, 1)) continue;
    float s[Q * PANEL];
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) store(s + j * LANES, acc[r][j]);
    for (int p = 0; p < Q; ++p) {
      uint32_t bits = (uint32_t)(hits >> (p * PANEL)) & 0xffffu;
      if (p && bits) {  // the panels before have raised the bar
        const vf raised = splat(x.least[row[r]]);
        uint32_t still = 0;
        for (int j = 0; j < PANEL_VECS; ++j) still |= beats<InOrder>(acc[r][p * PANEL_VECS + j], raised) << (j * LANES);
        bits &= still;
      }
      if (bits && t.masked[n + p]) bits &= visible_bits(t, n + p, row[r]);
      if (bits) offer(x, row[r], bits, s + p * PANEL, (int64_t)t.panel[n + p] * PANEL);
    }
  }
}

template <int Q, bool InOrder>
static inline void score_rows(const TopKTile& x, const int32_t* row, int rows, int n) {
  int r = 0;
  for (; r + GEMM_ROWS <= rows; r += GEMM_ROWS) score<GEMM_ROWS, Q, InOrder>(x, row + r, n);
  if constexpr (GEMM_ROWS > 4)
    if (r + 4 <= rows) {
      score<4, Q, InOrder>(x, row + r, n);
      r += 4;
    }
  if constexpr (GEMM_ROWS > 2)
    if (r + 2 <= rows) {
      score<2, Q, InOrder>(x, row + r, n);
      r += 2;
    }
  for (; r < rows; ++r) score<1, Q, InOrder>(x, row + r, n);
}

template <bool InOrder>
static inline void visit(const TopKTile& x, const int32_t* row, int rows, int from, int to) {
  const Tile& t = x.tile;
  int n = from;
  for (; n + GEMM_PANELS <= to; n += GEMM_PANELS) score_rows<GEMM_PANELS, InOrder>(x, row, rows, n);
  for (; n < to; ++n) score_rows<1, InOrder>(x, row, rows, n);
  int plain = 0;
  for (n = from; n < to; ++n) {
    plain += !t.masked[n];
    if (t.masked[n])
      for (int r = 0; r < rows; ++r) x.computed[row[r]] += __builtin_popcount(visible_bits(t, n, row[r]));
  }
  for (int r = 0; r < rows; ++r) x.computed[row[r]] += plain * PANEL;
}

void top_k(const TopKTile& x) {
  const Tile& t = x.tile;
  if (!t.panels) return;
  int32_t row[MAX_ROWS];
  for (int r = 0; r < t.rows; ++r) row[r] = r;
  const int first = t.panel[0];
  for (int i = 0; i < x.blocks; ++i) {
    const int block = x.order ? x.order[i] : x.first_block + i;
    const int low = block * BLOCK_PANELS - first, high = low + BLOCK_PANELS;
    int rows = t.rows;
    if (x.upper) {
      const float* upper = x.upper + (int64_t)(block - x.first_block) * MAX_ROWS;
      rows = 0;
      for (int r = 0; r < t.rows; ++r) {
        row[rows] = r;
        rows += !(upper[r] < x.least[r]);
      }
    }
    if (!rows) continue;
    const int from = low < 0 ? 0 : low, to = high > t.panels ? t.panels : high;
    if (x.order)
      visit<false>(x, row, rows, from, to);
    else
      visit<true>(x, row, rows, from, to);
  }
}

float top_k_product(uint64_t rank) { return product_of(rank); }

void block_bounds(const BlockBounds& x) {
  const double unit = 5.9604644775390625e-8;
  for (int64_t block = x.first; block < x.last; ++block) {
    const int64_t base = block * BLOCK_PANELS * PANEL;
    const int n = (int)(x.kv_len - base < BLOCK_PANELS * PANEL ? x.kv_len - base : BLOCK_PANELS * PANEL);
    const float* keys = x.k + base * x.d;
    float* centre = x.centre + block * x.d;
    double apart[BLOCK_PANELS * PANEL] = {}, size[BLOCK_PANELS * PANEL] = {};
    for (int c = 0; c < x.d; ++c) {
      double total = 0;  // keys behind the end are zeros
      for (int p = 0; p * PANEL < n; ++p) {
        const float* at_c = keys + (int64_t)p * PANEL * x.d + c * PANEL;
        for (int i = 0; i < PANEL; ++i) total += at_c[i];
      }
      centre[c] = (float)(total / n);
      for (int p = 0; p * PANEL < n; ++p) {
        const float* at_c = keys + (int64_t)p * PANEL * x.d + c * PANEL;
        for (int i = 0; i < PANEL; ++i) {
          const double y = at_c[i], z = y - (double)centre[c];
          apart[p * PANEL + i] += z * z;
          size[p * PANEL + i] += y * y;
        }
      }
    }
    double far = 0, large = 0;
    bool finite = true;
    for (int i = 0; i < n; ++i) {
      finite &= apart[i] - apart[i] == 0.0 && size[i] - size[i] == 0.0;
      far = apart[i] > far ? apart[i] : far;
      large = size[i] > large ? size[i] : large;
    }
    // both products are rounded d times, and the bound itself a few times more
    const double reach = __builtin_sqrt(far) * (1.0 + 1e-6) + 2.0 * (x.d + 32) * unit * __builtin_sqrt(large);
    x.reach[block] = finite ? (float)(reach * (1.0 + 1e-6)) + 1e-44f : __builtin_inff();
  }
}

void upper_bounds(const BlockBounds& x) {
  const float* panel[MAX_ROWS / PANEL];
  for (int p = 0; p < MAX_ROWS / PANEL; ++p) panel[p] = x.q_panels + (int64_t)p * PANEL * x.d;
  const int64_t blocks = x.last - x.first;
  times_panels(x.centre + x.first * x.d, x.d, (int)blocks, x.d, panel, MAX_ROWS / PANEL, x.upper, MAX_ROWS);
  const vf infinity = splat(__builtin_inff());
  float inverse[MAX_ROWS];
  for (int r = 0; r < MAX_ROWS; ++r) inverse[r] = x.q_norm[r] > 1e-30f && x.q_norm[r] < 1e30f ? 1.0f / x.q_norm[r] : 0.0f;
  for (int64_t i = 0; i < blocks; ++i) {
    float* upper = x.upper + i * MAX_ROWS;
    const float reach = x.reach[x.first + i];
    vf most = splat(-__builtin_inff());
    for (int r = 0; r < MAX_ROWS; r += LANES) {
      const vf c = load(upper + r);
      vf u = c + load(x.q_norm + r) * reach + 1e-36f;  // products that underflow
      u = select((c - c) == vf{}, u, infinity);
      store(upper + r, u);
      most = max_(u * load(inverse + r), most);
    }
    x.priority[i] = top(most);
  }
}

}  // namespace SIEVE_LEVEL
}  // namespace sieve
