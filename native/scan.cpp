// From scores to kept blocks: rank, threshold, estimated mass, or a proof; forced blocks; counts.
#include "scan.h"

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
constexpr double VAGUE = 2.0;  // mean uncertainty, in powers of two, above which keys are read for a proof
const float INFINITE = std::numeric_limits<float>::infinity();

template <class T>
T read(const View& x, int64_t b, int64_t h, int64_t i) {
  return static_cast<const T*>(x.data)[b * x.stride[1] + h * x.stride[2] + i * x.stride[3]];
}

float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Integers whose order is that of floats.
uint32_t ordered(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// What one unit keeps.
class Choice {
 public:
  Choice(const Gate& g, GateUnit& u)
      : g_(g), u_(u), k_(kernels()), n_((g.kv_len + g.kv_block - 1) / g.kv_block), rows_(u.rows.size()) {}

  void run() {
    if (rows_ == 0) {
      kept.clear();
      return;
    }
    count();
    force();
    blocks();
    chosen_.assign(n_, 0);
    switch (g_.rule) {
      case TOP_BLOCKS:
      case TARGET_SPARSITY: rank(); break;
      case THRESHOLD:
      case RELATIVE_THRESHOLD: threshold(); break;
      case MASS: mass(); break;
      case CERTIFIED: prove(); break;
    }
    for (int64_t b = 0; b < n_; ++b) chosen_[b] = (chosen_[b] | forced_[b]) && keys_[b] > 0;
    remember_rows();
    for (int64_t b = 0; b < n_; ++b) {
      visible += keys_[b];
      kept_keys += chosen_[b] ? keys_[b] : 0;
    }
    const bool may_turn = (g_.rule == MASS || g_.rule == CERTIFIED) && g_.dense_above < 1;
    if (may_turn && kept_keys > g_.dense_above * static_cast<double>(visible)) {
      dense = true;
      kept_keys = visible;
      for (int64_t b = 0; b < n_; ++b) chosen_[b] = keys_[b] > 0;
    }
    for (int64_t b = 0; b < n_; ++b)
      if (chosen_[b]) kept.push_back(static_cast<int32_t>(b));
  }

  std::vector<int32_t> kept;
  int64_t kept_keys = 0, visible = 0;
  bool dense = false;

 private:
  const Gate& g_;
  GateUnit& u_;
  const Kernels& k_;
  int64_t n_;
  size_t rows_;
  std::vector<int32_t> keys_;          // of each block, the most that a row sees
  std::vector<uint8_t> forced_, chosen_;
  Buffer<float> table_, lower_;   // [blocks][width]; for proofs upper and lower masses

  bool masked(int64_t key) const {
    return g_.key_mask.data &&
           !static_cast<const uint8_t*>(g_.key_mask.data)[u_.batch * g_.key_mask.stride[2] + key * g_.key_mask.stride[3]];
  }

  int32_t seen(int64_t from, int64_t to) const {
    if (!g_.key_mask.data) return static_cast<int32_t>(std::max<int64_t>(0, to - from));
    int32_t total = 0;
    for (int64_t j = from; j < to; ++j) total += !masked(j);
    return total;
  }

  void count() {
    keys_.assign(n_, 0);
    int64_t inner_low = 0, inner_high = g_.kv_len;
    for (const ScanRow& r : u_.rows) {
      inner_low = std::max(inner_low, r.low);
      inner_high = std::min(inner_high, r.high);
    }
    for (int64_t b = 0; b < n_; ++b) {
      const int64_t from = b * g_.kv_block, to = std::min(g_.kv_len, from + g_.kv_block);
      if (from >= inner_low && to <= inner_high) {
        keys_[b] = g_.key_mask.data ? read<int32_t>(g_.count, u_.batch, u_.kv_head, b) : static_cast<int32_t>(to - from);
        continue;
      }
      for (const ScanRow& r : u_.rows) keys_[b] = std::max(keys_[b], seen(std::max(from, r.low), std::min(to, r.high)));
    }
  }

  // Blocks that are cut by causality or window for the tile, that hold a key that is not finite, and the pattern's.
  void force() {
    forced_.assign(n_, 0);
    int64_t bottom = g_.kv_len, top = 0, inner_low = 0, inner_high = g_.kv_len;
    for (const ScanRow& r : u_.rows) {
      bottom = std::min(bottom, r.low);
      top = std::max(top, r.high);
      inner_low = std::max(inner_low, r.low);
      inner_high = std::min(inner_high, r.high);
    }
    for (int64_t b = 0; b < n_; ++b) {
      const int64_t from = b * g_.kv_block, to = std::min(g_.kv_len, from + g_.kv_block);
      const bool some = from < top && to > bottom, every = from >= inner_low && to <= inner_high;
      forced_[b] = (some && !every) || !read<uint8_t>(g_.finite, u_.batch, u_.kv_head, b);
    }
    const auto mark = [&](const ScanRow& r, int64_t from, int64_t to) {
      from = std::max(from, r.low);
      to = std::min(to, r.high);
      for (int64_t b = from / g_.kv_block; b * g_.kv_block < to; ++b)
        if (seen(std::max(r.low, b * g_.kv_block), std::min({r.high, g_.kv_len, (b + 1) * g_.kv_block}))) forced_[b] = 1;
    };
    for (const ScanRow& r : u_.rows) {
      const int64_t position = g_.kv_len - g_.q.shape[2] + r.query;
      if (g_.sinks) mark(r, 0, g_.sinks);
      if (g_.near) mark(r, position - g_.near + 1, position + g_.near);
    }
  }

  // Panels to blocks, or bounds of blocks; rows that are not numbers score lowest and prove nothing.
  void blocks() {
    const int64_t width = u_.width, each = g_.kv_block / PANEL_KEYS, panels = (g_.kv_len + PANEL_KEYS - 1) / PANEL_KEYS;
    float* mass = u_.mass.get();
    table_ = Buffer<float>(n_ * width);
    if (g_.rule == CERTIFIED) {
      lower_ = Buffer<float>(n_ * width);
      if (each == 1) {
        table_ = std::move(u_.mass);
        lower_ = std::move(u_.lower);
      } else {
        k_.fold(u_.lower.get(), panels, each, width, lower_.get());
        k_.fold(mass, panels, each, width, table_.get());
      }
      return;
    }
    if (g_.scorer == SKETCH && each > 1)
      k_.fold(mass, panels, each, width, table_.get());
    else
      std::copy_n(mass, n_ * width, table_.get());
    for (size_t r = 0; r < rows_; ++r)
      if (!u_.rows[r].sound)
        for (int64_t b = 0; b < n_; ++b)
          if (table_[b * width + r] > -INFINITE) table_[b * width + r] = LOWEST;
  }

  std::vector<float> bases(bool looked_only) {
    std::vector<float> base(u_.width);
    k_.row_mass(table_.get(), n_, u_.width, base.data());
    for (size_t r = 0; r < base.size(); ++r) {
      if (!std::isfinite(base[r])) base[r] = 0;
      if (r >= rows_ || (looked_only && !u_.rows[r].looked)) base[r] = INFINITE;
    }
    return base;
  }

  void rank() {
    const std::vector<float> base = bases(true);
    std::vector<float> best(n_);
    k_.best_row(table_.get(), base.data(), n_, u_.width, best.data());
    int64_t there = 0;
    for (int64_t b = 0; b < n_; ++b) there += keys_[b] > 0;
    int64_t k = static_cast<int64_t>(g_.amount);
    if (g_.rule == TARGET_SPARSITY)  // halves to even
      k = std::max<int64_t>(1, static_cast<int64_t>(std::nearbyint(static_cast<double>(there) * (1.0 - g_.amount))));
    k = std::min(k, there);
    // a histogram of leading bits finds the block of rank k; ties go to the smaller index
    std::vector<uint32_t> key(n_);
    std::vector<int32_t> bins(1 << 12);
    for (int64_t b = 0; b < n_; ++b) {
      key[b] = keys_[b] > 0 ? ordered(std::max(best[b], LOWEST)) : 0;
      ++bins[key[b] >> 20];
    }
    int64_t above = 0, bin = (1 << 12) - 1;
    while (bin > 0 && above + bins[bin] < k) above += bins[bin--];
    std::vector<uint64_t> close;
    for (int64_t b = 0; b < n_; ++b) {
      const int64_t own = key[b] >> 20;
      if (own > bin) chosen_[b] = 1;
      if (own == bin) close.push_back(static_cast<uint64_t>(~key[b]) << 32 | static_cast<uint64_t>(b));
    }
    const int64_t rest = std::min<int64_t>(k - above, static_cast<int64_t>(close.size()));
    if (rest <= 0) return;
    std::nth_element(close.begin(), close.begin() + (rest - 1), close.end());
    for (int64_t i = 0; i < rest; ++i) chosen_[close[i] & 0xffffffffu] = 1;
  }

  void threshold() {
    for (size_t r = 0; r < rows_; ++r) {
      float level = static_cast<float>(g_.amount * LOG2E);
      const bool relative = g_.rule == RELATIVE_THRESHOLD;
      if (relative) {
        float best = -INFINITE;
        for (int64_t b = 0; b < n_; ++b) best = std::max(best, table_[b * u_.width + r]);
        level = best - level;
      }
      for (int64_t b = 0; b < n_; ++b) {
        const float x = table_[b * u_.width + r];
        if (x == -INFINITE) continue;
        chosen_[b] |= relative ? x >= level : x > level || g_.amount == -std::numeric_limits<double>::infinity();
      }
    }
  }

  // Of every row the fewest blocks, by falling share, whose shares reach the target.
  void mass() {
    if (g_.amount >= 1) {
      for (int64_t b = 0; b < n_; ++b) chosen_[b] = keys_[b] > 0;
      return;
    }
    const std::vector<float> base = bases(true);
    const int64_t width = u_.width;
    const Buffer<float> share(n_ * width);
    std::vector<float> level(width), below(width), above(width);
    k_.powers(table_.get(), base.data(), n_, width, share.get());
    std::vector<uint32_t> low(width, 0), high(width, 0x3f900000u);  // shares are at most about 1
    for (int step = 0; step < 31; ++step) {
      for (int64_t r = 0; r < width; ++r) level[r] = bits_to_float(low[r] + (high[r] - low[r]) / 2);
      k_.split(share.get(), share.get(), level.data(), n_, width, below.data(), above.data());
      for (int64_t r = 0; r < width; ++r) {
        const uint32_t middle = low[r] + (high[r] - low[r]) / 2;
        if (above[r] < g_.amount)
          high[r] = middle;
        else
          low[r] = std::min(middle + 1, high[r]);
      }
    }
    for (int64_t r = 0; r < width; ++r) level[r] = bits_to_float(high[r]);
    k_.split(share.get(), share.get(), level.data(), n_, width, below.data(), above.data());
    for (size_t r = 0; r < rows_; ++r) {
      if (!u_.rows[r].looked) continue;
      double total = above[r];
      for (int64_t b = 0; b < n_; ++b) {
        const float x = share[b * width + r];
        if (table_[b * width + r] == -INFINITE) continue;
        if (x > level[r]) chosen_[b] = 1;
        if (x == level[r] && total < g_.amount) {
          chosen_[b] = 1;
          total += x;
        }
      }
    }
  }

  // Of every row the fewest blocks, by falling upper bound, such that the upper bounds of the rest are at most kappa times the
  // lower bounds of what is kept. The union of the rows' blocks then proves every row: more blocks never drop more mass.
  void prove() {
    std::vector<uint8_t> wanted = proved_blocks();
    if (!vague(wanted)) {
      chosen_ = wanted;
      return;
    }
    read_keys(wanted);
    chosen_ = proved_blocks();
  }

  // Whether the masses of what would be kept are so uncertain that reading its keys pays. They are mostly read again at once, so
  // that half of their cost is that of the attend stage.
  bool vague(const std::vector<uint8_t>& wanted) const {
    double gap = 0, total = 0;
    for (int64_t b = 0; b < n_; ++b) {
      if (!wanted[b] || forced_[b] || keys_[b] == 0) continue;
      float least = INFINITE;  // of the row that needs it most
      for (size_t r = 0; r < rows_; ++r)
        if (const int64_t i = b * u_.width + static_cast<int64_t>(r); u_.rows[r].sound && table_[i] > -INFINITE)
          least = std::min(least, table_[i] - lower_[i]);
      if (least == INFINITE) continue;
      gap += std::min(least, 100.0f);
      total += 1;
    }
    return gap > VAGUE * total && total > 0;
  }

  // The masses of these blocks from their keys, with the margin of rounded products. What is kept counts as it is; what is
  // dropped is bounded by the sketch alone, so that a certificate made from the sketch agrees.
  void read_keys(const std::vector<uint8_t>& wanted) {
    const int64_t width = u_.width, d = g_.q.shape[3];
    std::vector<float> dots(g_.kv_block * width), mass(width);
    for (int64_t b = 0; b < n_; ++b) {
      if (!wanted[b] || forced_[b] || keys_[b] == 0) continue;
      const int64_t from = b * g_.kv_block, to = std::min(g_.kv_len, from + g_.kv_block);
      k_.dot_rows(u_.floats.data(), static_cast<int32_t>(width), static_cast<int32_t>(d),
                  at(g_.key, u_.batch, u_.kv_head, from, 0), g_.key.dtype, g_.key.stride[2], to - from, dots.data());
      for (int64_t j = from; j < to; ++j)
        for (int64_t r = 0; r < width; ++r) {
          float& x = dots[(j - from) * width + r];
          const bool sees = j >= u_.low[r] && j < u_.high[r] && !masked(j);
          x = sees ? static_cast<float>(capped(static_cast<double>(x) * g_.scale, g_.softcap) * LOG2E) : -INFINITE;
        }
      k_.fold(dots.data(), to - from, to - from, width, mass.data());
      const double norm = read<float>(g_.key_norm, u_.batch, u_.kv_head, b);
      for (size_t r = 0; r < rows_; ++r) {
        if (!u_.rows[r].sound || mass[r] == -INFINITE) continue;
        const double terms = static_cast<double>(d + g_.kv_block + 16) * 0x1p-24;
        const float e = static_cast<float>((terms * (g_.scale * u_.rows[r].norm * norm + 1) + 0x1p-20) * LOG2E * (1 + 1e-5));
        float& low = lower_[b * width + r];
        low = std::max(low, mass[r] - e);
      }
    }
  }

  std::vector<uint8_t> proved_blocks() {
    std::vector<uint8_t> wanted(n_, 0);
    const int64_t width = u_.width;
    const double target = g_.amount * (1 - 0x1p-10), kappa = target / (1 - target);
    const Buffer<float> upper(n_ * width), lower(n_ * width);
    std::vector<float> base(width, 0.0f), level(width), below(width), above(width);
    std::vector<double> sink(width, 0.0), keep(width, 0.0);
    std::vector<uint8_t> sound(width, 1);
    double longest = 0;
    for (int64_t b = 0; b < n_; ++b)
      if (keys_[b] > 0) longest = std::max(longest, static_cast<double>(read<float>(g_.key_norm, u_.batch, u_.kv_head, b)));
    const double d = static_cast<double>(g_.q.shape[3]), terms = static_cast<double>(g_.kv_len + 4 * n_ + 16);
    for (size_t r = 0; r < rows_; ++r) {
      float most = -INFINITE;
      bool number = u_.rows[r].sound;
      for (int64_t b = 0; b < n_; ++b) {
        const float x = table_[b * width + r];
        number &= x == x;
        if (x > most && !forced_[b]) most = x;
      }
      if (most == -INFINITE)
        for (int64_t b = 0; b < n_; ++b) most = std::max(most, table_[b * width + r]);
      sound[r] = number && most < INFINITE;
      base[r] = sound[r] && most > -INFINITE ? most : 0.0f;
      if (g_.sink) sink[r] = std::exp2(g_.sink[u_.rows[r].head] * LOG2E - base[r]) * (1 - 1e-6);
      // what the kernel's own lse may lose: bounds.kept_mass
      const double margin = (d + 8) * 0x1p-24 * g_.scale * u_.rows[r].norm * longest;
      const double size = std::fabs(base[r]) + std::log2(static_cast<double>(g_.kv_len) + 1) + 2;
      const double loss = margin + terms * g_.unit + 4 * g_.unit * size + g_.exponential;
      keep[r] = std::exp(-loss) * (1 - static_cast<double>(n_ + 64) * 0x1p-24);
    }
    k_.powers(table_.get(), base.data(), n_, width, upper.get());
    k_.powers(lower_.get(), base.data(), n_, width, lower.get());
    for (int64_t b = 0; b < n_; ++b)
      for (size_t r = 0; r < rows_; ++r) {
        float& u = upper[b * width + r];
        const bool there = table_[b * width + r] != -INFINITE;
        if (forced_[b] || (!sound[r] && there)) u = INFINITE;
        if (!read<uint8_t>(g_.finite, u_.batch, u_.kv_head, b) || !sound[r]) lower[b * width + r] = 0;
        // exponents below the smallest number became zero
        if (there && u == 0) u = 0x1p-126f;
      }
    const auto proved = [&](int64_t r) {
      const double rest = below[r] * (1 + static_cast<double>(n_ + 64) * 0x1p-24);
      return rest <= kappa * (above[r] + sink[r]) * keep[r];
    };
    // levels are halved as integers, in steps that matter to no sum
    std::vector<uint32_t> low(width, 0), high(width, 0x3f800000u + (1u << 20));
    for (int step = 0; step < 18; ++step) {
      for (int64_t r = 0; r < width; ++r) level[r] = bits_to_float(low[r] + (high[r] - low[r]) / 2);
      k_.split(upper.get(), lower.get(), level.data(), n_, width, below.data(), above.data());
      for (size_t r = 0; r < rows_; ++r) (proved(static_cast<int64_t>(r)) ? low : high)[r] = low[r] + (high[r] - low[r]) / 2;
    }
    for (int64_t r = 0; r < width; ++r) level[r] = bits_to_float(low[r]);
    for (int64_t b = 0; b < n_; ++b) {
      bool need = false;
      for (size_t r = 0; r < rows_; ++r) need |= upper[b * width + r] > level[r];
      wanted[b] = need;
    }
    return wanted;
  }

  // A row of which nothing was kept keeps its best block.
  void remember_rows() {
    for (size_t r = 0; r < rows_; ++r) {
      bool has = false;
      int64_t best = -1;
      for (int64_t b = 0; b < n_ && !has; ++b) {
        const float x = table_[b * u_.width + r];
        if (x == -INFINITE) continue;
        has = chosen_[b];
        if (best < 0 || x > table_[best * u_.width + r]) best = b;
      }
      if (!has && best >= 0) extra_.push_back(best);
    }
    for (int64_t b : extra_) chosen_[b] = 1;
  }
  std::vector<int64_t> extra_;
};

}  // namespace

Chosen choose(const Gate& g) {
  std::vector<GateUnit> units = units_of(g);
  Chosen out;
  out.planes_read = score(g, units);
  std::vector<std::vector<int32_t>> kept(units.size());
  out.kept.resize(units.size());
  out.visible.resize(units.size());
  out.dense.resize(units.size());
  parallel_for(static_cast<int64_t>(units.size()), g.threads, [&](int64_t i, int) {
    Choice c(g, units[i]);
    c.run();
    kept[i] = std::move(c.kept);
    out.kept[i] = c.kept_keys;
    out.visible[i] = c.visible;
    out.dense[i] = c.dense;
  });
  out.row_ptr.push_back(0);
  for (const auto& list : kept) {
    out.block.insert(out.block.end(), list.begin(), list.end());
    out.row_ptr.push_back(static_cast<int64_t>(out.block.size()));
  }
  return out;
}

}  // namespace sieve
