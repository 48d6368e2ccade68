// Attention of one query over a list of keys, and sums of listed rows. Rows are read where they lie.
#include "rows.h"

#include "kernels/functions.h"
#include "kernels/logits.h"

namespace sieve {
namespace SIEVE_LEVEL {

// Row `i` as fp32: in place where it lies so, else through `copy`.
static inline const float* fetch(const RowSource& x, int64_t i, float* copy) {
  const char* from = x.data + i * x.stride * dtype_bytes(x.dtype);
  if (x.dtype == F32 && x.channel == 1) return reinterpret_cast<const float*>(from);
  read_row(from, x.channel, x.dtype, x.width, x.width, copy);
  return copy;
}

static inline vf clean_(vf x) { return select((x - x) == vf{}, x, vf{}); }

template <bool Clean>
static inline float dot(const float* a, const float* b, int n) {
  vf first = vf{}, second = vf{};
  int i = 0;
  for (; i + 2 * LANES <= n; i += 2 * LANES) {
    const vf x = load(b + i), y = load(b + i + LANES);
    first += load(a + i) * (Clean ? clean_(x) : x);
    second += load(a + i + LANES) * (Clean ? clean_(y) : y);
  }
  for (; i + LANES <= n; i += LANES) {
    const vf x = load(b + i);
    first += load(a + i) * (Clean ? clean_(x) : x);
  }
  float total = sum(first + second);
  for (; i < n; ++i) {
    const float x = b[i];
    total += a[i] * (!Clean || x - x == 0.0f ? x : 0.0f);
  }
  return total;
}

void row_dots(const RowTask& t) {
  for (int64_t j = 0; j < t.count; ++j) t.s[j] = dot<false>(t.q, fetch(t.k, t.key[j], t.row), t.k.width);
}

template <bool Clean>
static inline void add(const float* row, float weight, int n, float* out) {
  int i = 0;
  for (; i + LANES <= n; i += LANES) {
    const vf x = load(row + i);
    store(out + i, load(out + i) + (Clean ? clean_(x) : x) * weight);
  }
  for (; i < n; ++i) {
    const float x = row[i];
    out[i] += weight * (!Clean || x - x == 0.0f ? x : 0.0f);
  }
}

void row_sum(const RowSource& x, const int32_t* index, const float* weight, int64_t n, bool clean, float* out, float* copy) {
  for (int64_t j = 0; j < n; ++j) {
    if (weight[j] == 0.0f) continue;
    const float* row = fetch(x, index[j], copy);
    if (clean)
      add<true>(row, weight[j], x.width, out);
    else
      add<false>(row, weight[j], x.width, out);
  }
}

void row_bias(const char* bias, int64_t stride, DType dtype, const int32_t* key, int64_t n, float* out) {
  for (int64_t j = 0; j < n; ++j) out[j] = read_one(bias, key[j] * stride, dtype);
}

// Scale, cap and bias: products become base-2 exponents, padded with -inf; capped natural logits where asked.
static inline void shape(const RowTask& t, float* capped) {
  const float infinity = __builtin_inff();
  const int64_t wide = up(t.count, 16);
  for (int64_t j = t.count; j < wide; ++j) t.s[j] = 0.0f;
  for (int64_t j = 0; j < wide; j += LANES) {
    vf x = load(t.s + j) * t.scale;
    if (t.softcap != 0.0f) x = tanh_(x / t.softcap) * t.softcap;
    if (capped) store(capped + j, x);
    store(t.s + j, x * LOG2E);
  }
  if (t.bias)
    for (int64_t j = 0; j < t.count; ++j) t.s[j] = t.bias[j] == -infinity ? -infinity : t.s[j] + t.bias[j] * LOG2E;
  for (int64_t j = t.count; j < wide; ++j) t.s[j] = -infinity;
}

// What is attended to at all keeps a weight above zero, so that a value that is not finite shows.
static inline vf weigh(vf s, float base) {
  const vf p = exp2_<6>(s - base), least = splat(1.17549435e-38f);
  return select(s == splat(-__builtin_inff()), vf{}, p < least ? least : p);
}

float row_attend(const RowTask& t, float sink, float* o, void* out, int64_t stride, DType dtype) {
  const float infinity = __builtin_inff();
  const int64_t wide = up(t.count, 16);
  shape(t, nullptr);
  vf most = splat(-infinity);
  for (int64_t j = 0; j < wide; j += LANES) most = max_(load(t.s + j), most);
  const float m = top(most), base = m == -infinity ? 0.0f : m;
  vf total = vf{};
  for (int64_t j = 0; j < wide; j += LANES) {
    const vf p = weigh(load(t.s + j), base);
    store(t.s + j, p);
    total += p;
  }
  const float l = sum(total);
  const bool empty = l == 0.0f;
  float lse = empty ? -infinity : base * LN2 + __builtin_logf(l), share = empty ? 0.0f : 1.0f / l;
  if (sink > -infinity || sink != sink) {
    if (empty) {
      lse = sink;
    } else {
      const float high = lse > sink ? lse : sink, low = lse > sink ? sink : lse;
      const float both = high + __builtin_log1pf(__builtin_expf(low - high));
      share *= __builtin_expf(lse - both);
      lse = both;
    }
  }
  const int n = t.v.width;
  for (int i = 0; i < n; ++i) o[i] = 0.0f;
  row_sum(t.v, t.key, t.s, t.count, false, o, t.row);
  for (int i = 0; i < n; ++i) o[i] *= share;
  write_row(o, n, out, stride, dtype);
  return lse;
}

// s: products, then weights; pull: dP of every key, with its bias' gradient left there; slope: gradient of the product.
void row_slopes(const RowTask& t, float lse, float shift, const float* d_out, float* pull, float* slope) {
  float base = lse == -__builtin_inff() ? 0.0f : lse * LOG2E;
  const int64_t wide = up(t.count, 16);
  for (int64_t j = 0; j < t.count; ++j) pull[j] = dot<true>(d_out, fetch(t.v, t.key[j], t.row), t.v.width);
  for (int64_t j = t.count; j < wide; ++j) pull[j] = 0.0f;
  shape(t, slope);
  if (is_far(base)) {
    // lse is rounded by more than an exponent may be: what the row's own keys say of it counts, unless a sink holds the mass
    vf most = splat(-__builtin_inff()), total = vf{};
    for (int64_t j = 0; j < wide; j += LANES) most = max_(load(t.s + j), most);
    const float peak = top(most);
    if (base < peak + 24.0f + __builtin_fabsf(peak) * 0x1p-22f) {
      base = close_base(t.s, (int)wide, peak, peak);
      for (int64_t j = 0; j < wide; j += LANES) total += exp2_<6>(load(t.s + j) - base);
      base += __builtin_log2f(sum(total));
    }
  }
  for (int64_t j = 0; j < wide; j += LANES) {
    const vf p = exp2_<6>(load(t.s + j) - base);
    const vi none = p == vf{};
    const vf d = select(none, vf{}, p * (load(pull + j) + shift));
    vf x = d * t.scale;
    if (t.softcap != 0.0f) {
      const vf c = load(slope + j) / t.softcap;
      x = select(none, vf{}, x * (1.0f - c * c));
    }
    store(t.s + j, p);
    store(pull + j, d);
    store(slope + j, x);
  }
}

}  // namespace SIEVE_LEVEL
}  // namespace sieve
