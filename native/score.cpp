// Scores of the gate: block masses from bit planes, read as far as a proof needs them, or from block means.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "scan_rows.h"
#include "level.h"
#include "parallel.h"

namespace sieve {

namespace {

constexpr double LOG2E = 1.4426950408889634;
constexpr int64_t RANGE = 128;     // panels that one thread scans at a time
constexpr int64_t SAMPLE = 16, RUN = 8;  // every 16th run of 8 chunks says what the whole may weigh
constexpr size_t TRIALS = 4;       // of that sample, every 4th also says whether a coarse look would do
const float INFINITE = std::numeric_limits<float>::infinity();

template <class T>
T* entry(const View& x, int64_t b, int64_t h, int64_t i) {
  return static_cast<T*>(x.data) + b * x.stride[1] + h * x.stride[2] + i * x.stride[3];
}

// What bounds the error of a row's masses when keys are known by some of their planes: factors, in natural units.
struct Errors {
  float scale;          // of the largest key scale: hidden planes and the rounding of the query
  float plain, metric;  // of the norms of the full sketch's errors, of which the smaller product counts
  float norm;           // of the key norm: rounded products and sums, as in bounds.logit_margin
  float rest;           // 2^-15 covers the short exponential and the logarithm, 2^-20 of a cap its tangent
  bool capped;          // logits go through a cap, which moves no two of them apart: what a key errs by counts, no more

  // How far above and below its sketched logarithm a panel's mass may lie. `share` is the 2-norm of its weights over their sum;
  // the last two bound spectral norms. As bounds.sketch_upper and sketch_lower, with log(1 + x) <= x and phi(E) as a series.
  void of(float largest, float by_plain, float by_metric, float key_norm, float share, float spectral, float metric_spectral,
          float& above, float& below) const {
    const float each = scale * largest, e = each + std::min(plain * by_plain, metric * by_metric);
    const float t = 4 * each + std::min(plain * spectral, metric * metric_spectral);  // 16 keys: the square root of their number
    const float margin = norm * (key_norm + by_plain) + rest, unit = static_cast<float>(LOG2E * (1 + 1e-6));
    if (capped) {
      above = below = (e + margin) * unit;
      return;
    }
    const float first = std::min(e, t * share);
    const float second = (0.5f + e * (1.0f / 6) + e * e * (1.0f / 12)) * std::min(e * e, t * t * share);
    above = (e < 1 ? std::min(e, first + second) : e) * unit + margin * unit;
    below = (first + margin) * unit;
  }
};

Errors errors_of(const Gate& g, const ScanRow& r, int bits) {
  const double d = static_cast<double>(g.q.shape[3]), keys = static_cast<double>(g.kv_block);
  const double levels = std::ldexp(1.0, g.sketch_bits) - 1, hidden = std::ldexp(1.0, g.sketch_bits - bits) - 1;
  const double unit = 1 + 1e-5;  // outward, for the rounding of Errors::of
  const auto outward = [&](double x) { return static_cast<float>(x * unit); };
  return {outward(g.scale * (hidden / 2 * r.step * r.size + r.rest * levels / 2 * std::sqrt(d))), outward(g.scale * r.norm),
          outward(g.scale * r.stretched), outward((d + keys + 16) * 0x1p-24 * g.scale * r.norm),
          outward((keys + 16) * 0x1p-24 + 0x1p-15 + g.softcap * 0x1p-20), g.softcap != 0.0f};
}

// A positive half, infinity included.
float half(int16_t h) {
  if (h >= 0x7c00) return INFINITE;
  const uint32_t bits = static_cast<uint32_t>(h) << 13;
  float x;
  std::memcpy(&x, &bits, 4);
  return x * 0x1p112f;  // denormal halves included
}

// The largest error of the keys of a panel. Positive halves are ordered like their bits.
float largest_half(const View& x, int64_t b, int64_t h, int64_t first, int64_t last) {
  const int16_t* from = entry<int16_t>(x, b, h, first);
  int16_t most = 0;
  if (x.stride[3] == 1 && last - first == PANEL_KEYS) {
    for (int i = 0; i < PANEL_KEYS; ++i) most = from[i] > most ? from[i] : most;
    return half(most);
  }
  if (x.stride[3] == 1)
    for (int64_t i = 0; i < last - first; ++i) most = from[i] > most ? from[i] : most;
  else
    for (int64_t i = 0; i < last - first; ++i) most = std::max(most, from[i * x.stride[3]]);
  return half(most);
}

struct Range {
  size_t unit;
  int64_t first, last;  // chunks
};

class SketchScores {
 public:
  SketchScores(const Gate& g, std::vector<GateUnit>& units) : g_(g), units_(units), k_(kernels()) {
    panels_ = (g.kv_len + PANEL_KEYS - 1) / PANEL_KEYS;
    chunks_ = (panels_ + SCAN_PANELS - 1) / SCAN_PANELS;
    proves_ = g.rule == CERTIFIED;
    stages_ = {proves_ ? g.sketch_bits : g.bits};
    if (proves_)
      for (int coarse : {4, 2})
        if (coarse < g.sketch_bits) stages_.insert(stages_.begin(), coarse);
    packed_.resize(units.size());
    errors_.resize(units.size());
    used_.resize(units.size());
    levels_.resize(units.size());
    for (size_t i = 0; i < units.size(); ++i) {
      packed_[i].resize(stages_.size());
      errors_[i].resize(stages_.size());
      for (size_t s = 0; s < stages_.size(); ++s) {
        pack(g, units[i], stages_[s], packed_[i][s]);
        for (const ScanRow& r : units[i].rows) errors_[i][s].push_back(errors_of(g, r, stages_[s]));
      }
      units[i].mass = Buffer<float>(chunks_ * SCAN_PANELS * units[i].width);
      if (proves_) units[i].lower = Buffer<float>(chunks_ * SCAN_PANELS * units[i].width);
      deepest_ = std::max(deepest_, static_cast<int64_t>(units[i].width));
    }
  }

  int64_t run() {
    std::vector<Range> ranges;
    for (size_t i = 0; i < units_.size(); ++i)
      for (int64_t c = 0; c < chunks_; c += RANGE / SCAN_PANELS)
        ranges.push_back({i, c, std::min(chunks_, c + RANGE / SCAN_PANELS)});
    const int64_t d = g_.q.shape[3];
    std::vector<Buffer<char>> scratch;
    for (int i = 0; i < std::max(g_.threads, 1); ++i)
      scratch.emplace_back(k_.scan_scratch(static_cast<int32_t>(d), static_cast<int32_t>(deepest_ * g_.digits)));
    std::vector<int64_t> read(ranges.size());
    if (proves_) {
      parallel_for(static_cast<int64_t>(units_.size()), g_.threads,
                   [&](int64_t i, int thread) { sample(i, scratch[thread].get()); });
    }
    parallel_for(static_cast<int64_t>(ranges.size()), g_.threads, [&](int64_t i, int thread) {
      read[i] = proves_ ? refine(ranges[i], scratch[thread].get()) : rank(ranges[i], scratch[thread].get());
    });
    int64_t total = 0;
    for (int64_t n : read) total += n;
    return total;
  }

 private:
  const Gate& g_;
  std::vector<GateUnit>& units_;
  const Kernels& k_;
  int64_t panels_, chunks_, deepest_ = 0;
  bool proves_;
  std::vector<int> stages_;
  std::vector<std::vector<Packed>> packed_;
  std::vector<std::vector<std::vector<Errors>>> errors_;  // by unit, stage and row
  std::vector<std::vector<uint8_t>> used_;                // by unit and stage
  std::vector<std::vector<float>> levels_;  // by unit and row: blocks below it need no closer look

  bool hidden(const GateUnit& u, int64_t chunk) const {
    const int64_t from = chunk * SCAN_PANELS * PANEL_KEYS, to = from + SCAN_PANELS * PANEL_KEYS;
    for (const ScanRow& r : u.rows)
      if (r.low < to && r.high > from) return false;
    return true;
  }

  static bool sampled(int64_t chunk) { return chunk / RUN % SAMPLE == 0; }

  void blank(GateUnit& u, int64_t chunk) const {
    std::fill_n(u.mass.get() + chunk * SCAN_PANELS * u.width, SCAN_PANELS * u.width, -INFINITE);
    if (proves_) std::fill_n(u.lower.get() + chunk * SCAN_PANELS * u.width, SCAN_PANELS * u.width, -INFINITE);
  }

  int64_t rank(const Range& range, char* scratch) {
    GateUnit& u = units_[range.unit];
    const Scan& s = packed_[range.unit][0].scan;
    float largest[RANGE];
    int64_t read = 0;
    for (int64_t c = range.first; c < range.last;) {
      if (hidden(u, c)) {
        blank(u, c++);
        continue;
      }
      int64_t end = c + 1;
      while (end < range.last && !hidden(u, end)) ++end;
      k_.scan(s, c * SCAN_PANELS, end - c, u.mass.get() + c * SCAN_PANELS * u.width, nullptr, largest, scratch);
      read += s.bits * (end - c) * SCAN_PANELS * PANEL_KEYS;
      c = end;
    }
    return read;
  }

  // Chunks first..last-1 by the planes of a stage, as bounds: upper in mass, lower beside it. `open` (cleared by the caller) is
  // set where a block of a chunk may matter to a row.
  void look(size_t unit, size_t stage, int64_t first, int64_t last, char* scratch, uint8_t* open) {
    GateUnit& u = units_[unit];
    const std::vector<Errors>& errors = errors_[unit][stage];
    const float* level = levels_[unit].data();
    const bool spectral = g_.spectral.data && stage + 1 == stages_.size();
    float largest[RANGE];
    float* mass = u.mass.get() + first * SCAN_PANELS * u.width;
    float* lower = u.lower.get() + first * SCAN_PANELS * u.width;
    k_.scan(packed_[unit][stage].scan, first * SCAN_PANELS, last - first, mass, lower, largest, scratch);
    for (int64_t p = 0; p < (last - first) * SCAN_PANELS; ++p, mass += u.width, lower += u.width) {
      const int64_t key = (first * SCAN_PANELS + p) * PANEL_KEYS, end = std::min(g_.kv_len, key + PANEL_KEYS);
      const int64_t block = std::min(key / g_.kv_block, (g_.kv_len - 1) / g_.kv_block);
      const float plain = largest_half(g_.error, u.batch, u.kv_head, key, end);
      const float metric = largest_half(g_.metric_error, u.batch, u.kv_head, key, end);
      float norm_of = 4 * plain, metric_norm_of = 4 * metric;
      if (spectral) {
        norm_of = std::sqrt(*entry<float>(g_.spectral, u.batch, u.kv_head, block)) * (1 + 1e-6f);
        metric_norm_of = std::sqrt(*entry<float>(g_.metric_spectral, u.batch, u.kv_head, block)) * (1 + 1e-6f);
      }
      const float norm = *entry<float>(g_.key_norm, u.batch, u.kv_head, block);
      bool small = true;
      for (size_t r = 0; r < u.rows.size(); ++r) {
        float above, below;
        errors[r].of(largest[p], plain, metric, norm, lower[r] * (1 + 1e-5f), norm_of, metric_norm_of, above, below);
        // where an error is no number nothing is known: a fold would take it for nothing there
        const float most = mass[r] + above, least = mass[r] - below;
        lower[r] = least == least ? least : -INFINITE;
        if (mass[r] != -INFINITE) mass[r] = most == most ? most : INFINITE;
        small &= mass[r] <= level[r];
      }
      for (int64_t r = static_cast<int64_t>(u.rows.size()); r < u.width; ++r) lower[r] = mass[r];
      if (open) open[p / SCAN_PANELS] |= !small;
    }
  }

  // Looks closely at every SAMPLE-th run. What is far below the mass that this suggests need not be known closely, and a stage
  // that would not settle a third of the sample is passed over. Only which planes are read depends on it: whatever was read, its
  // error is known.
  void sample(size_t i, char* scratch) {
    GateUnit& u = units_[i];
    const size_t last = stages_.size() - 1;
    levels_[i].assign(u.width, -INFINITE);
    used_[i].assign(stages_.size(), 1);
    std::vector<double> most(u.rows.size(), -1e300), total(u.rows.size(), 0.0);
    std::vector<int64_t> looked;
    for (int64_t c = 0; c < chunks_;) {
      int64_t end = c;
      while (end < chunks_ && sampled(end) && !hidden(u, end)) ++end;
      if (end == c) {
        ++c;
        continue;
      }
      looked.push_back(c);
      look(i, last, c, end, scratch, nullptr);
      const float *mass = u.lower.get() + c * SCAN_PANELS * u.width, *stop = u.lower.get() + end * SCAN_PANELS * u.width;
      for (; mass < stop; mass += u.width)
        for (size_t r = 0; r < u.rows.size(); ++r) {
          const double x = mass[r];
          if (!(x > -1e30)) continue;
          if (x > most[r]) {
            total[r] *= std::exp2(most[r] - x);
            most[r] = x;
          }
          total[r] += std::exp2(x - most[r]);
        }
      c = end;
    }
    const double share = g_.amount / (1 - g_.amount) / 4 / static_cast<double>(std::max<int64_t>(panels_, 1));
    for (size_t r = 0; r < u.rows.size(); ++r)
      if (total[r] > 0) levels_[i][r] = static_cast<float>(most[r] + std::log2(total[r] * static_cast<double>(SAMPLE) * share));
    for (size_t s = 0; s < last; ++s) {
      int64_t tried = 0, settled = 0;
      for (size_t n = 0; n < looked.size(); n += TRIALS) {  // a neighbour, which is looked at again with all the others
        const int64_t c = looked[n] + RUN + static_cast<int64_t>(s);
        if (c >= chunks_ || hidden(u, c)) continue;
        uint8_t open = 0;
        look(i, s, c, c + 1, scratch, &open);
        ++tried;
        settled += !open;
      }
      used_[i][s] = settled * 3 > tried;
    }
  }

  int64_t refine(const Range& range, char* scratch) {
    GateUnit& u = units_[range.unit];
    const size_t last = stages_.size() - 1;
    uint8_t open[RANGE / SCAN_PANELS];
    int64_t read = 0;
    for (int64_t c = range.first; c < range.last; ++c) {
      const bool nothing = hidden(u, c);
      if (nothing) blank(u, c);
      open[c - range.first] = !nothing && !sampled(c);
      read += !nothing && sampled(c) ? stages_[last] * SCAN_PANELS * PANEL_KEYS : 0;
    }
    for (size_t s = 0; s <= last; ++s) {
      if (!used_[range.unit][s]) continue;
      for (int64_t c = range.first; c < range.last;) {
        int64_t end = c;
        while (end < range.last && open[end - range.first]) open[end++ - range.first] = 0;
        if (end == c) {
          ++c;
          continue;
        }
        look(range.unit, s, c, end, scratch, open + (c - range.first));
        read += stages_[s] * (end - c) * SCAN_PANELS * PANEL_KEYS;
        c = end;
      }
    }
    return read;
  }
};

int64_t score_means(const Gate& g, std::vector<GateUnit>& units) {
  const Kernels& k = kernels();
  const int64_t d = g.q.shape[3], blocks = g.mean.shape[2], step = 256;
  const int64_t parts = (blocks + step - 1) / step;
  for (GateUnit& u : units) u.mass = Buffer<float>(blocks * u.width);
  parallel_for(static_cast<int64_t>(units.size()) * parts, g.threads, [&](int64_t item, int) {
    GateUnit& u = units[item / parts];
    const int64_t first = item % parts * step, last = std::min(blocks, first + step);
    float* mass = u.mass.get() + first * u.width;
    k.dot_rows(u.floats.data(), static_cast<int32_t>(u.width), static_cast<int32_t>(d),
               at(g.mean, u.batch, u.kv_head, first, 0), F32, g.mean.stride[2], last - first, mass);
    for (int64_t b = first; b < last; ++b, mass += u.width) {
      const int64_t from = b * g.kv_block, to = std::min(g.kv_len, from + g.kv_block);
      const int32_t count = *entry<int32_t>(g.count, u.batch, u.kv_head, b);
      const auto sees = [&](int64_t low, int64_t high) {
        while (g.key_mask.data && low < high && !*entry<uint8_t>(g.key_mask, 0, u.batch, low)) ++low;
        return low < high;
      };
      const double size = g.scorer == MEAN ? std::log2(static_cast<double>(count)) : 0.0;
      const double reach = g.scorer == EUCLIDEAN ? g.scale * *entry<float>(g.radius, u.batch, u.kv_head, b) : 0.0;
      for (int64_t r = 0; r < u.width; ++r) {
        if (!sees(std::max(from, u.low[r]), std::min(to, u.high[r]))) {
          mass[r] = -INFINITE;
          continue;
        }
        const double norm = r < static_cast<int64_t>(u.rows.size()) ? u.rows[r].norm : 0.0;
        const double x = capped(g.scale * static_cast<double>(mass[r]) + reach * norm, g.softcap) * LOG2E + size;
        // keys after the query are in the summary of a block that is cut: it is kept anyway and must not rank others down
        mass[r] = u.low[r] > from || u.high[r] < to || !(x > -1e30) ? -1e30f : static_cast<float>(x);
      }
    }
  });
  return 0;
}

}  // namespace

void pack(const Gate& g, const GateUnit& u, int bits, Packed& out) {
  const Kernels& k = kernels();
  const int32_t d = static_cast<int32_t>(g.q.shape[3]), groups = static_cast<int32_t>(u.width / SCAN_ROWS);
  const int32_t rows = groups * g.digits * SCAN_ROWS;
  out.query = Buffer<char>(k.scan_bytes(d, rows));
  k.pack_scan(u.integers.data(), d, rows, g.digits, bits, out.query.get());
  out.factor.assign(rows, 0.0f);
  out.centre.assign(rows, 0);
  for (int32_t i = 0; i < rows; ++i) {
    const size_t r = static_cast<size_t>(i / (g.digits * SCAN_ROWS) * SCAN_ROWS + i % SCAN_ROWS);
    const int32_t digit = i / SCAN_ROWS % g.digits;
    int32_t sum = 0;
    for (int32_t c = 0; c < d; ++c) sum += u.integers[static_cast<size_t>(i) * d + c];
    out.centre[i] = ((1 << bits) - 1) * sum;
    if (r < u.rows.size())
      out.factor[i] = static_cast<float>(g.scale * LOG2E * u.rows[r].step * std::ldexp(0.5, g.sketch_bits - bits) /
                                         std::pow(SCAN_DIGIT, digit));
  }
  Scan& s = out.scan;
  s = Scan{};
  s.d = d;
  s.groups = groups;
  s.rows = static_cast<int32_t>(u.rows.size());
  s.digits = g.digits;
  s.bits = bits;
  s.query = out.query.get();
  s.factor = out.factor.data();
  s.centre = out.centre.data();
  for (int b = 0; b < bits; ++b)
    s.planes[b] = reinterpret_cast<uint8_t*>(at(g.planes, u.batch, u.kv_head, 0, 0)) + b * g.plane_stride;
  s.key_stride = g.planes.stride[2];
  s.scale = entry<uint16_t>(g.key_scale, u.batch, u.kv_head, 0);
  s.scale_stride = g.key_scale.stride[3];
  s.softcap = g.softcap;
  s.kv_len = g.kv_len;
  s.low = u.low.data();
  s.high = u.high.data();
  s.key_mask = g.key_mask.data ? static_cast<const uint8_t*>(g.key_mask.data) + u.batch * g.key_mask.stride[2] : nullptr;
  s.key_mask_stride = g.key_mask.stride[3];
}

int64_t score(const Gate& g, std::vector<GateUnit>& units) {
  return g.scorer == SKETCH ? SketchScores(g, units).run() : score_means(g, units);
}

}  // namespace sieve
