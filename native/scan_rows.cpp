// The query rows of the decoding gate: what each sees, its norms, and the integers that stand for it.
#include "scan_rows.h"

#include <algorithm>
#include <cmath>

#include "level.h"

namespace sieve {

namespace {

template <class T>
T read(const View& x, int64_t b, int64_t h, int64_t i) {
  return static_cast<const T*>(x.data)[b * x.stride[1] + h * x.stride[2] + i * x.stride[3]];
}

ScanRow read_row(const Gate& g, int64_t b, int64_t kv, int64_t head, int64_t query, float* values, float* stretched) {
  const int64_t d = g.q.shape[3], position = g.kv_len - g.q.shape[2] + query;
  ScanRow r{};
  r.head = head;
  r.query = query;
  r.low = g.window < 0 ? 0 : std::max<int64_t>(0, position - g.window + 1);
  r.high = g.causal ? position + 1 : g.window < 0 ? g.kv_len : std::min(g.kv_len, position + g.window);
  r.high = std::max(r.high, r.low);
  kernels().read_rows(g.q, b, head, query, query + 1, d, false, values);
  double square = 0, metric = 0;
  float most = 0;
  for (int64_t c = 0; c < d; ++c) {
    stretched[c] = g.scorer == SKETCH ? values[c] * read<float>(g.channel_scale, b, kv, c) : values[c];
    square += static_cast<double>(values[c]) * values[c];
    metric += static_cast<double>(stretched[c]) * stretched[c];
    most = std::max(most, std::fabs(stretched[c]));
  }
  const double outward = 1 + static_cast<double>(d) * 0x1p-23;
  r.norm = std::sqrt(square) * outward;
  r.stretched = std::sqrt(metric) * outward;
  r.sound = std::isfinite(r.norm) && std::isfinite(r.stretched);
  r.step = static_cast<double>(std::max(most, 1e-30f) / 127.0f);
  return r;
}

// `stretched` as `digits` integers a channel, each 1 / SCAN_DIGIT of the one before.
void round_row(const Gate& g, ScanRow& r, const float* stretched, int8_t* integers) {
  const int64_t d = g.q.shape[3];
  double lost = 0;
  for (int64_t c = 0; c < d && r.sound; ++c) {
    const float first = std::floor(stretched[c] / static_cast<float>(r.step) + 0.5f);
    double left = static_cast<double>(stretched[c]) / r.step, value = 0, unit = 1;
    for (int e = 0; e < g.digits; ++e, left *= SCAN_DIGIT, unit /= SCAN_DIGIT) {
      const double whole = std::clamp(e ? std::floor(left + 0.5) : static_cast<double>(first), -127.0, 127.0);
      integers[e * SCAN_ROWS * d + c] = static_cast<int8_t>(whole);
      value += whole * unit;
      left -= whole;
    }
    r.size += std::fabs(value);
    const double apart = static_cast<double>(stretched[c]) - value * r.step;
    lost += apart * apart;
  }
  r.size *= 1 + 1e-9;
  r.rest = std::sqrt(lost) * (1 + 1e-9) + 0x1p-40 * r.stretched;
}

}  // namespace

std::vector<GateUnit> units_of(const Gate& g) {
  const int64_t batch = g.q.shape[0], q_heads = g.q.shape[1], q_len = g.q.shape[2], d = g.q.shape[3];
  const int64_t kv_heads = g.count.shape[2], group = q_heads / kv_heads;
  const int64_t heads = g.share_group ? kv_heads : q_heads, each = g.share_group ? group : 1;
  const int64_t tiles = (q_len + g.lead + g.q_tile - 1) / g.q_tile;
  std::vector<GateUnit> units(static_cast<size_t>(batch * heads * tiles));
  std::vector<float> stretched(d);
  for (int64_t i = 0; i < static_cast<int64_t>(units.size()); ++i) {
    GateUnit& u = units[i];
    const int64_t head = i / tiles % heads, t = i % tiles;
    u.batch = i / tiles / heads;
    u.kv_head = g.share_group ? head : head / group;
    const int64_t from = std::max<int64_t>(0, t * g.q_tile - g.lead), to = std::min(q_len, (t + 1) * g.q_tile - g.lead);
    const int64_t n = each * std::max<int64_t>(0, to - from);
    u.width = up(std::max<int64_t>(n, 1), SCAN_ROWS);
    u.low.assign(u.width, 0);
    u.high.assign(u.width, g.kv_len);  // rows beyond the last see everything, so that nothing has to be hidden from them
    u.floats.assign(u.width * d, 0.0f);
    u.integers.assign(u.width * g.digits * d, 0);
    for (int64_t h = 0; h < each; ++h)
      for (int64_t query = from; query < to; ++query) {
        const int64_t r = static_cast<int64_t>(u.rows.size());
        ScanRow row = read_row(g, u.batch, u.kv_head, head * each + h, query, u.floats.data() + r * d, stretched.data());
        const int64_t lane = (query + g.lead) % g.q_tile;
        row.looked = lane % g.query_stride == g.query_stride - 1 || lane == g.q_tile - 1 || query == q_len - 1;
        row.looked |= g.rule == THRESHOLD || g.rule == RELATIVE_THRESHOLD || g.rule == CERTIFIED;
        if (g.scorer == SKETCH)
          round_row(g, row, stretched.data(), u.integers.data() + (r / SCAN_ROWS * g.digits * SCAN_ROWS + r % SCAN_ROWS) * d);
        u.low[r] = row.low;
        u.high[r] = row.high;
        u.rows.push_back(row);
      }
  }
  return units;
}

}  // namespace sieve
