// Attention over lists of single keys: the lists are made row by row, gradients of keys and values are sums over the inverted
// lists, so that they are the same on any number of threads.
#include "rows.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "buffer.h"
#include "level.h"
#include "parallel.h"
#include "plan.h"

namespace sieve {

namespace {

constexpr int64_t STEP = 32;  // queries, or keys, that are handed to a thread at a time

int64_t index_at(const RowChoice& c, int64_t b, int64_t h, int64_t i, int64_t j) {
  const char* p = at(c.index, b, h, i, j);
  return c.index.dtype == I64 ? *reinterpret_cast<const int64_t*>(p) : *reinterpret_cast<const int32_t*>(p);
}

int64_t longest(const RowChoice& c, const Plan& plan) {
  const int64_t listed = c.index.data ? c.index.shape[3] : 0;
  const int64_t window = c.two_sided ? 2 * c.window : c.window;
  return std::min<int64_t>(plan.kv_len, listed + static_cast<int64_t>(c.offsets.size()) + c.prefix + window);
}

// The keys that one query keeps and sees, increasing.
void list_row(const Attention& a, const Plan& plan, const RowChoice& c, int64_t b, int64_t head, int64_t query,
              std::vector<int32_t>& out) {
  out.clear();
  int64_t low, high;
  plan.interval(query, low, high);
  const int64_t position = plan.offset + query;
  const auto take = [&](int64_t j) {
    if (j >= low && j < high) out.push_back(static_cast<int32_t>(j));
  };
  for (int64_t j = low; j < std::min(high, c.prefix); ++j) take(j);
  if (c.window > 0) {
    const int64_t stop = std::min(high, c.two_sided ? position + c.window : position + 1);
    for (int64_t j = std::max(low, position - c.window + 1); j < stop; ++j) take(j);
  }
  for (const int64_t offset : c.offsets)
    if (position - offset >= c.first_key) take(position - offset);
  if (c.index.data) {
    const int64_t batch = c.index.shape[0] == 1 ? 0 : b, heads = c.index.shape[1];
    const int64_t h = heads == 1 ? 0 : heads == plan.q_heads ? head : head / plan.group;
    for (int64_t j = 0; j < c.index.shape[3]; ++j) take(index_at(c, batch, h, query, j));
  }
  if (!std::is_sorted(out.begin(), out.end())) std::sort(out.begin(), out.end());
  out.erase(std::unique(out.begin(), out.end()), out.end());
  if (a.mask.data || a.key_mask.data)
    out.erase(std::remove_if(out.begin(), out.end(), [&](int32_t j) {
      return (a.mask.data && !*at(a.mask, b, head, query, j)) || (a.key_mask.data && !*at(a.key_mask, b, 0, 0, j));
    }), out.end());
}

struct Workspace {
  Workspace(const Attention& a, int64_t most) {
    const int64_t wide = up(std::max(a.k.shape[3], a.v.shape[3]), 16), n = up(most, 16);
    q = Buffer<float>(wide);
    pull = Buffer<float>(wide);
    o = Buffer<float>(wide);
    row = Buffer<float>(wide);
    s = Buffer<float>(n);
    bias = Buffer<float>(n);
    slope = Buffer<float>(n);
    d_logit = Buffer<float>(n);
  }
  Buffer<float> q, pull, o, row, s, bias, slope, d_logit;
  std::vector<int32_t> list;
};

RowTask task_of(const Attention& a, const Plan& plan, const Kernels& k, int64_t b, int64_t head, int64_t query, Workspace& w,
                const int32_t* key, int64_t count) {
  RowTask t{};
  t.count = count;
  t.key = key;
  t.k = rows_of(a.k, b, head / plan.group);
  t.v = rows_of(a.v, b, head / plan.group);
  t.q = w.q.get();
  t.scale = a.scale;
  t.softcap = a.softcap;
  t.s = w.s.get();
  t.row = w.row.get();
  k.read_rows(a.q, b, head, query, query + 1, a.q.shape[3], false, w.q.get());
  k.row_dots(t);
  if (a.bias.data) {
    k.row_bias(at(a.bias, b, head, query, 0), a.bias.stride[3], a.bias.dtype, key, count, w.bias.get());
    t.bias = w.bias.get();
  }
  return t;
}

std::vector<Workspace> workspaces(const Attention& a, const RowChoice& choice, const Plan& plan) {
  std::vector<Workspace> spaces;
  for (int i = 0; i < std::max(a.threads, 1); ++i) spaces.emplace_back(a, longest(choice, plan));
  return spaces;
}

}  // namespace

RowSource rows_of(const View& x, int64_t b, int64_t h) {
  return RowSource{at(x, b, h, 0, 0), x.stride[2], x.stride[3], x.dtype, static_cast<int32_t>(x.shape[3])};
}

void check_rows(const Attention& a, const RowChoice& c) {
  const int64_t kv_len = a.k.shape[2];
  for (int64_t b = 0; c.index.data && b < c.index.shape[0]; ++b)
    for (int64_t h = 0; h < c.index.shape[1]; ++h)
      for (int64_t i = 0; i < c.index.shape[2]; ++i)
        for (int64_t j = 0; j < c.index.shape[3]; ++j)
          if (index_at(c, b, h, i, j) >= kv_len)
            throw std::invalid_argument("`selection` must hold key indices below " + std::to_string(kv_len) + "; got " +
                                        std::to_string(index_at(c, b, h, i, j)) + "; use -1 where a query keeps fewer");
}

void attend_rows(const Attention& a, const RowChoice& choice, const View& out, float* lse) {
  const Plan plan(a);
  const Kernels& k = kernels();
  std::vector<Workspace> spaces = workspaces(a, choice, plan);
  const int64_t steps = (plan.q_len + STEP - 1) / STEP;
  parallel_for(plan.batch * plan.q_heads * steps, a.threads, [&](int64_t item, int thread) {
    Workspace& w = spaces[thread];
    const int64_t b = item / steps / plan.q_heads, head = item / steps % plan.q_heads, first = item % steps * STEP;
    const float sink = a.sink ? a.sink[head] : -std::numeric_limits<float>::infinity();
    for (int64_t i = first; i < std::min(plan.q_len, first + STEP); ++i) {
      list_row(a, plan, choice, b, head, i, w.list);
      const RowTask t = task_of(a, plan, k, b, head, i, w, w.list.data(), static_cast<int64_t>(w.list.size()));
      lse[(b * plan.q_heads + head) * plan.q_len + i] =
          k.row_attend(t, sink, w.o.get(), at(out, b, head, i, 0), out.stride[3], out.dtype);
    }
  });
}

void attend_rows_backward(const Attention& a, const RowChoice& choice, const Gradients& g) {
  const Plan plan(a);
  const Kernels& k = kernels();
  const int64_t d = a.k.shape[3], dv = a.v.shape[3], most = longest(choice, plan), n = plan.q_len;
  const int64_t* along = g.d_bias.stride;
  const bool shared_bias = g.d_bias.data && (along[0] == 0 || along[1] == 0 || along[2] == 0);
  const int threads = shared_bias ? 1 : a.threads;  // rows that add to one bias entry take turns
  std::vector<Workspace> spaces = workspaces(a, choice, plan);
  // of one query head: its lists with the weight and the slope of each entry, then the same by key
  Buffer<int32_t> key(n * most), query_of(n * most);
  Buffer<float> weight(n * most), slope(n * most), weight_of(n * most), slope_of(n * most);
  Buffer<float> dk(plan.kv_len * d), dv_sum(plan.kv_len * dv);
  std::vector<int64_t> count(n), begin(plan.kv_len + 1);
  const int64_t steps = (n + STEP - 1) / STEP, key_steps = (plan.kv_len + STEP - 1) / STEP;
  for (int64_t b = 0; b < plan.batch; ++b)
    for (int64_t kv = 0; kv < plan.kv_heads; ++kv) {
      std::fill_n(dk.get(), plan.kv_len * d, 0.0f);
      std::fill_n(dv_sum.get(), plan.kv_len * dv, 0.0f);
      for (int64_t head = kv * plan.group; head < (kv + 1) * plan.group; ++head) {
        parallel_for(steps, threads, [&](int64_t step, int thread) {
          Workspace& w = spaces[thread];
          for (int64_t i = step * STEP; i < std::min(n, (step + 1) * STEP); ++i) {
            list_row(a, plan, choice, b, head, i, w.list);
            count[i] = static_cast<int64_t>(w.list.size());
            std::copy(w.list.begin(), w.list.end(), key.get() + i * most);
            const RowTask t = task_of(a, plan, k, b, head, i, w, w.list.data(), count[i]);
            k.read_rows(g.d_out, b, head, i, i + 1, dv, false, w.pull.get());
            const int64_t flat = (b * plan.q_heads + head) * n + i;
            k.row_slopes(t, g.lse[flat], g.shift[flat], w.pull.get(), w.d_logit.get(), w.slope.get());
            std::copy_n(t.s, count[i], weight.get() + i * most);
            std::copy_n(w.slope.get(), count[i], slope.get() + i * most);
            if (g.d_bias.data)
              for (int64_t j = 0; j < count[i]; ++j)
                *reinterpret_cast<float*>(at(g.d_bias, b, head, i, w.list[j])) += w.d_logit[j];
            std::fill_n(w.o.get(), d, 0.0f);
            k.row_sum(t.k, w.list.data(), w.slope.get(), count[i], true, w.o.get(), w.row.get());
            k.write_row(w.o.get(), d, at(g.dq, b, head, i, 0), g.dq.stride[3], g.dq.dtype);
          }
        });
        std::fill(begin.begin(), begin.end(), int64_t{0});
        for (int64_t i = 0; i < n; ++i)
          for (int64_t j = 0; j < count[i]; ++j) ++begin[key[i * most + j] + 1];
        for (int64_t j = 0; j < plan.kv_len; ++j) begin[j + 1] += begin[j];
        for (int64_t i = 0; i < n; ++i)
          for (int64_t j = 0; j < count[i]; ++j) {
            const int64_t e = begin[key[i * most + j]]++;
            query_of[e] = static_cast<int32_t>(i);
            weight_of[e] = weight[i * most + j];
            slope_of[e] = slope[i * most + j];
          }
        const RowSource queries = rows_of(a.q, b, head), pulls = rows_of(g.d_out, b, head);
        parallel_for(key_steps, a.threads, [&](int64_t step, int thread) {
          float* copy = spaces[thread].row.get();
          for (int64_t j = step * STEP; j < std::min(plan.kv_len, (step + 1) * STEP); ++j) {
            const int64_t from = j ? begin[j - 1] : 0, entries = begin[j] - from;
            k.row_sum(queries, query_of.get() + from, slope_of.get() + from, entries, true, dk.get() + j * d, copy);
            k.row_sum(pulls, query_of.get() + from, weight_of.get() + from, entries, false, dv_sum.get() + j * dv, copy);
          }
        });
      }
      parallel_for(key_steps, a.threads, [&](int64_t step, int) {
        for (int64_t j = step * STEP; j < std::min(plan.kv_len, (step + 1) * STEP); ++j) {
          k.write_row(dk.get() + j * d, d, at(g.dk, b, kv, j, 0), g.dk.stride[3], g.dk.dtype);
          k.write_row(dv_sum.get() + j * dv, dv, at(g.dv, b, kv, j, 0), g.dv.stride[3], g.dv.dtype);
        }
      });
    }
}

}  // namespace sieve
