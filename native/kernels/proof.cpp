// Brackets of block masses for sixteen query rows, one a lane, and the shortest proofs that can be made of them.
#include "kernels/functions.h"
#include "kernels/gemm.h"
#include "kernels/key_rows.h"
#include "kernels/lanes.h"

namespace sieve {
namespace SIEVE_LEVEL {

constexpr int CHUNK_KEYS = 32;           // keys whose dot products are made together
constexpr float OUTWARD = 1.0f + 1e-6f;  // for the rounding of a few products
constexpr float WEIGHTS = 1.6e-4f;       // relative: what short exponentials can move a sum of weights, or of their products
constexpr float LARGEST_ERROR = 60.0f;   // natural units: beyond it only the bound key by key counts

int64_t bracket_scratch(int64_t block_size, int32_t wide) {
  const int64_t keys = up(block_size > CHUNK_KEYS ? block_size : CHUNK_KEYS, 32);
  return keys * LANE_ROWS * 4 + keys * wide + 64;
}

// (e^x - 1 - x) / x^2 for 0 <= x <= LARGEST_ERROR, rounded up
static inline vf phi(vf x) {
  vf p = splat(1.0f / 362880);
  p = p * x + 1.0f / 40320;
  p = p * x + 1.0f / 5040;
  p = p * x + 1.0f / 720;
  p = p * x + 1.0f / 120;
  p = p * x + 1.0f / 24;
  p = p * x + 1.0f / 6;
  p = p * x + 0.5f;
  const vf safe = max_(x, splat(1.0f));
  const vf large = (exp2_<6>(safe * LOG2E) - 1.0f - safe) / (safe * safe);
  return select(x < splat(1.0f), p, large) * (1.0f + 1e-5f);
}

// Logarithm of a sum of weights below and above which floats end: infinite outward where it is out of reach, or no number.
static inline vf log_above(vf x) { return select(x < splat(1e36f), log2_(max_(x, splat(1e-36f))), splat(__builtin_inff())); }
static inline vf log_below(vf x) {
  return select((x > splat(1e-36f)) & (x < splat(1e36f)), log2_(select(x < splat(1e36f), x, splat(1.0f))), splat(-__builtin_inff()));
}
static inline vf reference(vf top) {
  const float infinity = __builtin_inff();
  return select((top > splat(-infinity)) & (top < splat(infinity)), top, vf{});
}

// bounds.sketch_upper and sketch_lower of one block, all in powers of two. `x`, `high`, `low`: [n][16]; without a cap `high`
// holds the errors.
template <bool Masked>
static void bracket_block(const KeyProof& p, int64_t block, int64_t base, int n, const float* dots, float* x, float* high, float* low) {
  const KeyScore& s = p.keys;
  const Lanes& l = s.lanes;
  const float infinity = __builtin_inff(), unit = LOG2E * OUTWARD, cap = s.softcap;
  const float largest_error = [&] {
    float most = 0;
    for (int j = 0; j < n; ++j) most = p.error[base + j] > most ? p.error[base + j] : most;
    return most;
  }();
  float length = 0;
  if (p.length)
    for (int j = 0; j < n; ++j) length += p.length[base + j] * p.length[base + j];
  length = __builtin_sqrtf(length) * (1.0f + 1e-5f);
  for (int v = 0; v < PANEL_VECS; ++v) {
    const int at = v * LANES;
    const vf factor = load(s.factor + at), plain = load(p.plain + at), stretched = load(p.stretched + at), rest = load(p.rest + at);
    const vf plain2 = plain * unit, stretched2 = stretched * unit, rest2 = rest * unit;
    vi from, to, unknown = vi{}, seen = Masked ? vi{} : ~vi{};
    if (Masked)
      for (int i = 0; i < LANES; ++i) {
        const int64_t begin = l.low[at + i] - base, end = l.high[at + i] - base;
        from[i] = (int32_t)(begin < 0 ? 0 : begin < n ? begin : n);
        to[i] = (int32_t)(end < 0 ? 0 : end < n ? end : n);
      }
    vf top = splat(-infinity), top_high = top, top_low = top, most = vf{};
    for (int j = 0; j < n; ++j) {
      vi in = ~vi{};
      if (Masked) in = l.part && !l.part[base + j] ? vi{} : (splat_int(j) >= from) & (splat_int(j) < to);
      vf y = load(dots + j * LANE_ROWS + at) * s.step[base + j] * factor;
      vf e = min_(plain2 * p.error[base + j], stretched2 * p.metric_error[base + j]);
      if (p.length) e += rest2 * p.length[base + j];
      vf above = y + e, below = y - e;
      if (cap != 0.0f) {
        const float by = LN2 / cap, back = cap * LOG2E;
        y = tanh_(y * by) * back;
        above = tanh_(above * by) * back;
        below = tanh_(below * by) * back;
      }
      const vi number = (y == y) & (e == e);
      unknown |= in & ~number;
      seen |= in;
      if (Masked) {
        y = select(in, y, splat(-infinity));
        above = select(in, above, splat(-infinity));
        below = select(in, below, splat(-infinity));
        e = (vf)(in & (vi)e);
      }
      top = max_(y, top);
      top_high = max_(above, top_high);
      top_low = max_(below, top_low);
      most = max_(e, most);
      store(x + j * LANE_ROWS + at, y);
      store(high + j * LANE_ROWS + at, cap != 0.0f ? above : e);
      if (cap != 0.0f) store(low + j * LANE_ROWS + at, below);
    }
    const vf middle = reference(top), ceiling = reference(top_high), floor = reference(top_low);
    vf total = vf{}, squares = vf{}, first = vf{}, second = vf{}, upper = vf{}, lower = vf{};
    for (int j = 0; j < n; ++j) {
      const vf y = load(x + j * LANE_ROWS + at), e = load(high + j * LANE_ROWS + at), w = weight(y - middle);
      total += w;
      if (cap != 0.0f) {
        upper += weight(e - ceiling);
        lower += weight(load(low + j * LANE_ROWS + at) - floor);
        continue;
      }
      upper += weight(y + e - ceiling);
      lower += weight(y - e - floor);
      squares += w * w;
      const vf we = w * e;
      first += we;
      second += we * e;
    }
    const vf estimate = log_below(total) + middle;
    vf above = log_above(upper) + ceiling, below = log_below(lower) + floor;
    if (cap == 0.0f && p.spectral) {
      const vf t = min_(plain * p.spectral[block], stretched * p.metric_spectral[block]) + rest * length;
      const vf norm = sqrt_(squares), error = most * LN2;
      const vf slope = min_(t * norm, first * LN2), curve = min_(t * t, second * (LN2 * LN2));
      const vf spectral = log_above(total + slope + phi(min_(error, splat(LARGEST_ERROR))) * curve) + middle;
      above = select((error < splat(LARGEST_ERROR)) & (spectral < above), spectral, above);
      const vf jensen = estimate - t * norm / max_(total, splat(0.5f)) * (unit * (1.0f + 4 * WEIGHTS));
      below = select(jensen > below, jensen, below);
    }
    const vf margin = plain * (p.rounding * (p.key_norm[block] + largest_error)) + (n + 16) * 0x1p-24f + WEIGHTS + cap * 0x1p-20f;
    const vf size = (vf)((vi)estimate & splat_int(0x7fffffff));
    const vf slack = margin * unit + (1.0f + select(size < splat(infinity), size, vf{})) * 0x1p-20f;
    above += slack;
    below -= slack;
    above = select(~unknown & (above == above), above, splat(infinity));
    below = select(~unknown & (below == below) & (below < splat(infinity)), below, splat(-infinity));
    vf guess = select(~unknown & (estimate > splat(LOWEST)) & (estimate < splat(infinity)), estimate, splat(LOWEST));
    const int64_t out = (block - l.first) * LANE_ROWS + at;
    store(p.upper + out, select(seen, above, splat(-infinity)));
    store(p.lower + out, select(seen, below, splat(-infinity)));
    store(s.out + out, select(seen, guess, splat(-infinity)));
  }
}

void bracket_keys(const KeyProof& p) {
  const KeyScore& s = p.keys;
  const Lanes& l = s.lanes;
  const int64_t size = l.block_size, chunk = size >= CHUNK_KEYS ? 1 : CHUNK_KEYS / size;
  const int64_t room = up(size > CHUNK_KEYS ? size : CHUNK_KEYS, 32) * LANE_ROWS;
  float *dots = s.scratch, *x = dots + room, *high = x + room, *low = high + room, *rows = low + room;
  for (int64_t b0 = l.first; b0 < l.last; b0 += chunk) {
    const int64_t b1 = b0 + chunk < l.last ? b0 + chunk : l.last, first = b0 * size;
    const int keys = (int)((b1 * size < l.kv_len ? b1 * size : l.kv_len) - first);
    read_keys(s, first, keys, rows);
    times_panels(rows, s.wide, keys, s.d, &s.q, 1, dots, LANE_ROWS);
    for (int64_t b = b0; b < b1; ++b) {
      const int64_t base = b * size;
      const int n = (int)(l.kv_len - base < size ? l.kv_len - base : size);
      const float* at_dots = dots + (base - first) * LANE_ROWS;
      const bool whole = l.all_low <= base && base + n <= l.all_high &&
                         (!l.part || l.part_before[base + n] - l.part_before[base] == n);
      if (whole)
        bracket_block<false>(p, b, base, n, at_dots, x, high, low);
      else
        bracket_block<true>(p, b, base, n, at_dots, x, high, low);
    }
  }
}

void widen(const KeyProof& p) {
  const Lanes& l = p.keys.lanes;
  const float infinity = __builtin_inff(), unit = LOG2E * OUTWARD;
  const float sums = (float)(l.block_size + 16) * 0x1p-24f + WEIGHTS + p.keys.softcap * 0x1p-20f;
  for (int v = 0; v < PANEL_VECS; ++v) {
    const int at = v * LANES;
    const vf plain = load(p.plain + at), stretched = load(p.stretched + at), rest = load(p.rest + at);
    for (int64_t b = l.first; b < l.last; ++b) {
      const int64_t i = (b - l.first) * LANE_ROWS + at;
      const vf x = load(p.keys.out + i), size = (vf)((vi)x & splat_int(0x7fffffff));
      const vi seen = x > splat(-infinity), number = (x > splat(LOWEST)) & (x < splat(infinity));
      const vf error = min_(plain * p.error[b], stretched * p.metric_error[b]) + rest * p.length[b];
      const vf apart = (error + plain * (p.rounding * (p.key_norm[b] + p.error[b])) + sums) * unit + (1.0f + size) * 0x1p-20f;
      const vi known = number & (apart < splat(infinity));
      store(p.upper + i, select(known, x + apart, select(seen, splat(infinity), splat(-infinity))));
      store(p.lower + i, select(known, x - apart, splat(-infinity)));
    }
  }
}

// Streams of blocks ---------------------------------------------------------------------------------------------------

constexpr int32_t LAST = 0x7f7fffff;  // the largest finite priority, as bits; whatever comes first is above it

static inline vi load_int(const int32_t* p) { return *reinterpret_cast<const vi_any*>(p); }
static inline void store_int(int32_t* p, vi x) { *reinterpret_cast<vi_any*>(p) = x; }
static inline vi choose(vi where, vi yes, vi no) { return (where & yes) | (~where & no); }

void weigh(Proof& p) {
  const float infinity = __builtin_inff();
  for (int v = 0; v < PANEL_VECS; ++v) {
    const int at = v * LANES;
    vf top = splat(-infinity);
    for (int64_t b = 0; b < p.blocks; ++b) {
      const vf u = load(p.upper + b * LANE_ROWS + at);
      if (!p.first[b]) top = max_(select(u < splat(infinity), u, splat(-infinity)), top);
    }
    const vf base = reference(top);
    store(p.base + at, base);
    for (int64_t b = 0; b < p.blocks; ++b) {
      const int64_t i = b * LANE_ROWS + at;
      const vf u = load(p.upper + i), low = load(p.lower + i), e = load(p.estimate + i);
      const vi seen = u > splat(-infinity), first = p.first[b] ? ~vi{} : u == splat(infinity);
      const vf capped = min_(u - base, splat(100.0f)), middle = min_(max_(e, low), u) - base;
      const vf mass = exp2_<6>(capped);
      vi bits = (vi)(mass + exp2_<6>(min_(middle, splat(100.0f)) + p.log_kappa));
      bits = choose(first, splat_int(LAST + 1), bits);
      store_int(p.priority + i, choose(seen, bits, splat_int(-1)));
      // exponents below the smallest number became zero
      store(p.dropped + i, select(seen & ~first, max_(mass, splat(0x1p-126f)), vf{}));
      store(p.kept + i, select(seen, exp2_<6>(min_(low - base, splat(100.0f))), vf{}));
    }
  }
}

void weigh_kept(const Proof& p, const float* exact, int64_t first, int64_t last) {
  for (int64_t i = first * LANE_ROWS; i < last * LANE_ROWS; i += LANES, exact += LANES) {
    const vf x = load(exact) - load(p.base + i % LANE_ROWS) - WEIGHTS * LOG2E;
    const vf mass = exp2_<6>(min_(x, splat(100.0f)));
    store(p.kept + i, max_(select(load(exact) > splat(LOWEST), mass, vf{}), load(p.kept + i)));
  }
}

// The mass that is dropped if only greater priorities are kept, and the mass that is then kept.
static inline void split_at(const Proof& p, int at, vi level, vf& rest, vf& kept) {
  vf more_rest = vf{}, more_kept = vf{};
  rest = kept = vf{};
  int64_t b = 0;
  for (; b + 2 <= p.blocks; b += 2) {
    const int64_t i = b * LANE_ROWS + at, j = i + LANE_ROWS;
    const vi above = load_int(p.priority + i) > level, other = load_int(p.priority + j) > level;
    kept += (vf)(above & (vi)load(p.kept + i));
    more_kept += (vf)(other & (vi)load(p.kept + j));
    rest += (vf)(~above & (vi)load(p.dropped + i));
    more_rest += (vf)(~other & (vi)load(p.dropped + j));
  }
  if (b < p.blocks) {
    const int64_t i = b * LANE_ROWS + at;
    const vi above = load_int(p.priority + i) > level;
    kept += (vf)(above & (vi)load(p.kept + i));
    rest += (vf)(~above & (vi)load(p.dropped + i));
  }
  kept += more_kept;
  rest += more_rest;
}

void stop_streams(const Proof& p, int32_t lanes, bool ties, uint8_t* marks, int32_t* list) {
  for (int v = 0; v < PANEL_VECS && v * LANES < lanes; ++v) {
    const int at = v * LANES;
    const vf room = load(p.room + at), before = load(p.sink + at);
    vf rest, kept;
    vi low = splat_int(-1), high = low;
    for (int64_t b = 0; b < p.blocks; ++b) {
      const vi bits = load_int(p.priority + b * LANE_ROWS + at);
      high = choose(bits > high, bits, high);
    }
    high -= 1;  // one block is kept, even where a sink proves enough
    while (any_lane(low < high)) {
      const vi mid = low + ((high - low) >> 1) + ((high - low) & 1);
      split_at(p, at, mid, rest, kept);
      const vi proved = rest <= room * (kept + before);
      low = choose(proved, mid, low);
      high = choose(proved, high, mid - 1);
    }
    // one level higher nothing is proved: of several blocks there, the first that suffice are kept
    const vi level = ties ? low - (low < splat_int(LAST)) : low;  // a true lane is -1
    int64_t tied = 0;
    for (int64_t b = 0; b < p.blocks; ++b) {
      const vi bits = load_int(p.priority + b * LANE_ROWS + at);
      marks[b] |= any_lane(bits > level);
      if (ties && any_lane((bits == level) & (level > low))) list[tied++] = (int32_t)b;
    }
    if (!tied) continue;
    split_at(p, at, level, rest, kept);
    for (int i = 0; i < LANES && at + i < lanes; ++i) {
      if (level[i] == low[i]) continue;
      double left = 0, have = kept[i] + before[i];
      for (int64_t n = at + i; n < p.blocks * LANE_ROWS; n += LANE_ROWS) left += p.priority[n] <= level[i] ? p.dropped[n] : 0.0f;
      bool none = true;
      for (int64_t n = at + i; n < p.blocks * LANE_ROWS; n += LANE_ROWS) none &= p.priority[n] <= level[i];
      for (int64_t c = 0; c < tied && (none || left > room[i] * have); ++c) {
        const int64_t n = (int64_t)list[c] * LANE_ROWS + at + i;
        if (p.priority[n] != level[i]) continue;
        marks[list[c]] = 1;
        none = false;
        left -= p.dropped[n];
        have += p.kept[n];
      }
    }
  }
}

}  // namespace SIEVE_LEVEL
}  // namespace sieve
