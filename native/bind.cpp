// The only file that knows Python, with tensor.h. Arrays come as View objects (pointer, dtype, shape, strides) that Python code
// has checked; the GIL is released while kernels run.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>

#include "attend.h"
#include "buffer.h"
#include "decode.h"
#include "gate.h"
#include "geometry.h"
#include "kernels.h"
#include "level.h"
#include "scan.h"
#include "rows.h"
#include "diagonal_scan.h"
#include "tensor.h"
#include "ternary.h"
#include "top_k.h"
#include "offsets.h"
#include "xla.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace sieve {
namespace {

const View absent{nullptr, F32, {0, 0, 0, 0}, {0, 0, 0, 0}};

template <class T>
const T* pointer(const std::optional<View>& v) {
  return v ? static_cast<const T*>(v->data) : nullptr;
}

// [batch, kv_len] came with its axes last
View first_and_last(const std::optional<View>& v) {
  if (!v) return absent;
  View moved = *v;
  moved.shape[0] = v->shape[2];
  moved.stride[0] = v->stride[2];
  return moved;
}

Attention attention(const View& q, const View& k, const View& v, std::optional<View> mask, std::optional<View> bias,
                    std::optional<View> key_mask, std::optional<View> sink, std::optional<View> edges, bool causal,
                    std::optional<int64_t> window, float scale, std::optional<float> softcap, int threads) {
  Attention a{};
  a.q = q;
  a.k = k;
  a.v = v;
  a.mask = mask.value_or(absent);
  a.bias = bias.value_or(absent);
  a.key_mask = first_and_last(key_mask);
  a.sink = pointer<float>(sink);
  a.edges = pointer<int64_t>(edges);
  a.edge_count = edges ? edges->shape[3] : 0;
  a.causal = causal;
  a.window = window.value_or(-1);
  a.scale = scale;
  a.softcap = softcap.value_or(0.0f);
  a.threads = threads;
  a.choice.prefix = k.shape[2];
  return a;
}

void choose_blocks(Attention& a, const View& row_ptr, const View& block_index, std::optional<View> row_mask, int64_t heads,
                   int64_t batch, int64_t q_block, int64_t kv_block, int64_t lead, std::optional<int64_t> kv_len) {
  // numbers come from whoever made the selection: none may point outside of the keys
  if (q_block < 1 || kv_block < 1 || lead < 0 || lead >= q_block || heads < 1 || batch < 1)
    throw std::invalid_argument("`selection` must have tiles and blocks of at least one position and a lead inside of a tile; got q_block " +
                                std::to_string(q_block) + ", kv_block " + std::to_string(kv_block) + ", lead " + std::to_string(lead) +
                                "; build it with Blocks.from_tiles");
  const int64_t tiles = (a.q.shape[2] + lead + q_block - 1) / q_block, blocks = (kv_len.value_or(a.k.shape[2]) + kv_block - 1) / kv_block;
  const int64_t *ptr = static_cast<const int64_t*>(row_ptr.data), rows = batch * heads * tiles, entries = block_index.shape[3];
  const int32_t* index = static_cast<const int32_t*>(block_index.data);
  bool fits = row_ptr.dtype == I64 && block_index.dtype == I32 && row_ptr.shape[3] == rows + 1 && ptr[0] == 0 && ptr[rows] == entries;
  for (int64_t i = 0; fits && i < rows; ++i) {
    fits = ptr[i] <= ptr[i + 1];
    for (int64_t e = ptr[i]; fits && e < ptr[i + 1]; ++e)
      fits = index[e] >= 0 && index[e] < blocks && (e == ptr[i] || index[e] > index[e - 1]);
  }
  if (!fits)
    throw std::invalid_argument("`selection` must list the blocks of every tile in increasing order, each below " +
                                std::to_string(blocks) + "; got indices outside of that; build it with Blocks.from_tiles");
  if (row_mask && (row_mask->dtype != U8 || row_mask->shape[2] != entries || row_mask->shape[3] != q_block))
    throw std::invalid_argument("`selection` must have a row_mask of booleans [" + std::to_string(entries) + ", " + std::to_string(q_block) +
                                "]; got [" + std::to_string(row_mask->shape[2]) + ", " + std::to_string(row_mask->shape[3]) +
                                "]; build it with Blocks.from_tiles");
  a.choice = Choice{};
  a.choice.row_ptr = static_cast<const int64_t*>(row_ptr.data);
  a.choice.block_index = static_cast<const int32_t*>(block_index.data);
  a.choice.row_mask = pointer<uint8_t>(row_mask);
  a.choice.batch = batch;
  a.choice.heads = heads;
  a.choice.q_block = q_block;
  a.choice.kv_block = kv_block;
  a.choice.lead = lead;
}

OffsetAttention offset_attention(const View& q, const View& k, const View& v, const View& offsets, int64_t prefix, float scale,
                                 int threads) {
  const int64_t* list = static_cast<const int64_t*>(offsets.data);
  const int64_t count = offsets.shape[3];
  for (int64_t i = 0; i < count; ++i)
    if (list[i] < (i ? list[i - 1] + 1 : 0)) throw std::invalid_argument("`offsets` must increase from 0 or above");
  // what no query reaches is left out
  const int64_t reached = std::lower_bound(list, list + count, k.shape[2]) - list;
  return {q, k, v, list, reached, std::min(prefix, k.shape[2]), scale, threads};
}

Wheel wheel(int64_t modulus, const View& residues) {
  const Wheel w{modulus, static_cast<const int64_t*>(residues.data), residues.shape[3]};
  for (int64_t i = 0; i < w.residue_count; ++i)
    if (w.residues[i] < (i ? w.residues[i - 1] + 1 : 0) || w.residues[i] >= modulus)
      throw std::invalid_argument("`residues` must increase and lie below the modulus");
  return w;
}

void choose_ranges(Attention& a, int64_t prefix, int64_t window, bool two_sided) {
  a.choice = Choice{};
  a.choice.prefix = prefix;
  a.choice.window = window;
  a.choice.two_sided = two_sided;
}

// A table may come from anywhere: no sequence may point outside of the cache.
Pages pages_of(const Attention& a, const View& table, const View& length) {
  const Pages p{static_cast<const int32_t*>(table.data), table.stride[2], static_cast<const int64_t*>(length.data)};
  const int64_t batch = a.q.shape[0], size = a.k.shape[2];
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t n = p.length[b], pages = (n + size - 1) / size;
    bool fits = n >= a.q.shape[2] && pages <= table.shape[3];
    for (int64_t i = 0; fits && i < pages; ++i) fits = p.table[b * p.table_stride + i] >= 0 && p.table[b * p.table_stride + i] < a.k.shape[0];
    if (!fits)
      throw std::invalid_argument("`block_table` must name a page of the cache, 0.." + std::to_string(a.k.shape[0] - 1) +
                                  ", for every key of every sequence, and `lengths` must count the queries; got another entry for sequence " +
                                  std::to_string(b) + "; pass the table and the lengths that the cache was written with");
  }
  return p;
}

const std::pair<const char*, Scorer> SCORERS[] = {{"sketch", SKETCH}, {"mean", MEAN}, {"euclidean", EUCLIDEAN}};
const std::pair<const char*, KeepRule> RULES[] = {{"top_k", TOP_BLOCKS},         {"target_sparsity", TARGET_SPARSITY},
                                              {"threshold", THRESHOLD}, {"relative_threshold", RELATIVE_THRESHOLD},
                                              {"mass", MASS},           {"certified", CERTIFIED}};

Gate make_gate(const View& q, const std::string& scorer, const std::string& rule, double amount, double dense_above,
               const View& count, const View& finite, const View& key_norm, const View& mean, std::optional<View> radius,
               std::optional<View> key_mask, std::optional<View> sink, bool causal, std::optional<int64_t> window, float scale,
               std::optional<float> softcap, int64_t kv_len, int64_t kv_block, int64_t q_tile, int64_t lead, int64_t query_stride, bool share_group, int64_t sinks,
               int64_t near, double unit, double exponential, int threads) {
  Gate g{};
  g.q = q;
  g.scorer = named("scorer", SCORERS, scorer);
  g.rule = named("rule", RULES, rule);
  g.amount = amount;
  g.dense_above = dense_above;
  g.count = count;
  g.finite = finite;
  g.key_norm = key_norm;
  g.mean = mean;
  g.radius = radius.value_or(absent);
  g.key_mask = key_mask.value_or(absent);
  g.sink = pointer<float>(sink);
  g.causal = causal;
  g.window = window.value_or(-1);
  g.scale = scale;
  g.softcap = softcap.value_or(0.0f);
  g.kv_len = kv_len;
  g.kv_block = kv_block;
  g.q_tile = q_tile;
  g.lead = lead;
  g.query_stride = query_stride;
  g.share_group = share_group;
  g.sinks = sinks;
  g.near = near;
  g.unit = unit;
  g.exponential = exponential;
  g.threads = threads;
  g.digits = 1;
  return g;
}

void set_sketch(Gate& g, const View& key, int bits, int sketch_bits, int digits, const View& planes, int64_t plane_stride, const View& scale,
                const View& channel_scale, const View& error, const View& metric_error, std::optional<View> spectral,
                std::optional<View> metric_spectral) {
  g.bits = bits;
  g.key = key;
  g.sketch_bits = sketch_bits;
  g.digits = digits;
  g.planes = planes;
  g.plane_stride = plane_stride;
  g.key_scale = scale;
  g.channel_scale = channel_scale;
  g.error = error;
  g.metric_error = metric_error;
  g.spectral = spectral.value_or(absent);
  g.metric_spectral = metric_spectral.value_or(absent);
}

template <class T>
void copy_to(const std::vector<T>& from, const View& to) {
  std::copy(from.begin(), from.end(), static_cast<T*>(to.data));
}

RowChoice row_choice(const Attention& a, std::optional<View> index, const std::vector<int64_t>& offsets, int64_t first_key,
                     int64_t prefix, int64_t window, bool two_sided) {
  RowChoice c;
  c.index = index.value_or(absent);
  c.offsets = offsets;
  c.first_key = first_key;
  c.prefix = prefix;
  c.window = window;
  c.two_sided = two_sided;
  check_rows(a, c);
  return c;
}

template <class T>
T* writable(const std::optional<View>& v) {
  return v ? static_cast<T*>(v->data) : nullptr;
}

void geometry(const View& key, std::optional<View> key_mask, int64_t block_size, int bits, bool scale_is_given, int threads,
              int64_t first_block, int64_t room_blocks, int64_t room_keys, const View& count, const View& finite, const View& mean, const View& key_norm, std::optional<View> radius,
              std::optional<View> low, std::optional<View> high, std::optional<View> planes, std::optional<View> scale,
              std::optional<View> error, std::optional<View> metric_error, std::optional<View> channel_scale,
              std::optional<View> spectral, std::optional<View> metric_spectral) {
  GeometryTask t{};
  t.key = key;
  t.key_mask = first_and_last(key_mask);
  t.block_size = block_size;
  t.bits = bits;
  t.scale_is_given = scale_is_given;
  t.threads = threads;
  const int64_t end = first_block * block_size + key.shape[2];
  if (room_blocks && (first_block < 0 || end > room_keys || end > room_blocks * block_size))
    throw std::invalid_argument("`room_keys` must hold the keys from `first_block` on; reserve first");
  t.first_block = room_blocks ? first_block : 0;
  t.room_blocks = room_blocks;
  t.room_keys = room_keys;
  t.count = static_cast<int32_t*>(count.data);
  t.finite = static_cast<uint8_t*>(finite.data);
  t.mean = static_cast<float*>(mean.data);
  t.key_norm = static_cast<float*>(key_norm.data);
  t.radius = writable<float>(radius);
  t.low = writable<float>(low);
  t.high = writable<float>(high);
  t.planes = writable<uint8_t>(planes);
  t.scale = writable<uint16_t>(scale);
  t.error = writable<uint16_t>(error);
  t.metric_error = writable<uint16_t>(metric_error);
  t.channel_scale = writable<float>(channel_scale);
  t.spectral = writable<float>(spectral);
  t.metric_spectral = writable<float>(metric_spectral);
  build_geometry(t);
}

Gated choose_prefill(const View& q, const View& key, std::optional<View> key_mask, std::optional<View> edges, bool causal,
             std::optional<int64_t> window, float scale, std::optional<float> softcap, int scoring, int bits, int sketch_bits,
             bool round_queries, std::optional<View> planes, std::optional<View> key_scale, std::optional<View> channel_scale,
             std::optional<View> mean, std::optional<View> radius, const View& count, const View& finite,
             std::optional<View> error, std::optional<View> metric_error, std::optional<View> spectral,
             std::optional<View> metric_spectral, std::optional<View> key_norm, std::optional<View> sink, int rule, double level,
             int64_t blocks, int64_t block_size, int64_t query_tile, int64_t stride, int64_t heads, int64_t sinks, int64_t near,
             double dense_above, int threads) {
  GateTask t{};
  t.q = q;
  t.key = key;
  t.key_mask = first_and_last(key_mask);
  t.edges = pointer<int64_t>(edges);
  t.edge_count = edges ? edges->shape[3] : 0;
  t.causal = causal;
  t.window = window.value_or(-1);
  t.scale = scale;
  t.softcap = softcap.value_or(0.0f);
  t.scoring = static_cast<Scoring>(scoring);
  t.bits = bits;
  t.sketch_bits = sketch_bits;
  t.round_queries = round_queries;
  t.planes = planes.value_or(absent);
  t.key_scale = key_scale.value_or(absent);
  t.channel_scale = channel_scale.value_or(absent);
  t.mean = mean.value_or(absent);
  t.radius = radius.value_or(absent);
  t.count = count;
  t.finite = finite;
  t.error = error.value_or(absent);
  t.metric_error = metric_error.value_or(absent);
  t.spectral = spectral.value_or(absent);
  t.metric_spectral = metric_spectral.value_or(absent);
  t.key_norm = key_norm.value_or(absent);
  t.sink = pointer<float>(sink);
  t.rule = static_cast<Rule>(rule);
  t.level = level;
  t.blocks = blocks;
  t.block_size = block_size;
  t.query_tile = query_tile;
  t.stride = stride;
  t.heads = heads;
  t.sinks = sinks;
  t.near = near;
  t.dense_above = dense_above;
  t.threads = threads;
  return gate(t);
}

// Writes what was kept as compressed rows; each array contiguous.
void read_gated(const Gated& g, const View& row_ptr, const View& block_index, const View& kept, const View& visible,
                const View& dense, const View& computed) {
  int64_t* ptr = static_cast<int64_t*>(row_ptr.data);
  int32_t* index = static_cast<int32_t*>(block_index.data);
  ptr[0] = 0;
  for (size_t i = 0; i < g.list.size(); ++i) {
    std::copy(g.list[i].begin(), g.list[i].end(), index + ptr[i]);
    ptr[i + 1] = ptr[i] + static_cast<int64_t>(g.list[i].size());
  }
  std::copy(g.kept.begin(), g.kept.end(), static_cast<int64_t*>(kept.data));
  std::copy(g.visible.begin(), g.visible.end(), static_cast<int64_t*>(visible.data));
  std::copy(g.dense.begin(), g.dense.end(), static_cast<uint8_t*>(dense.data));
  std::copy(g.computed.begin(), g.computed.end(), static_cast<int64_t*>(computed.data));
}

}  // namespace
}  // namespace sieve

NB_MODULE(_native, m) {
  using namespace sieve;
  m.doc() = "Kernels of sieve_attn. Private: call sieve_attn.attend.native and its neighbours.";
  nb::class_<View>(m, "View")
      .def("__init__", [](View* self, nb::handle tensor) { new (self) View(tensor_view(tensor)); })
      .def("__init__", [](View* self, uintptr_t p, const std::string& t, const std::vector<int64_t>& shape,
                          const std::vector<int64_t>& stride) { new (self) View(make_view(p, t, shape, stride)); });
  nb::class_<Attention>(m, "Attention")
      .def("__init__",
           [](Attention* self, const View& q, const View& k, const View& v, std::optional<View> mask, std::optional<View> bias,
              std::optional<View> key_mask, std::optional<View> sink, std::optional<View> edges, bool causal,
              std::optional<int64_t> window, float scale, std::optional<float> softcap, int threads) {
             new (self) Attention(attention(q, k, v, mask, bias, key_mask, sink, edges, causal, window, scale, softcap, threads));
           },
           "q"_a, "k"_a, "v"_a, "mask"_a.none(), "bias"_a.none(), "key_mask"_a.none(), "sink"_a.none(), "edges"_a.none(),
           "causal"_a, "window"_a.none(), "scale"_a, "softcap"_a.none(), "threads"_a)
      .def("choose_blocks", &choose_blocks, "row_ptr"_a, "block_index"_a, "row_mask"_a.none(), "heads"_a, "batch"_a, "q_block"_a,
           "kv_block"_a, "lead"_a, "kv_len"_a.none() = nb::none())
      .def("choose_ranges", &choose_ranges, "prefix"_a, "window"_a, "two_sided"_a);
  m.def("attend",
        [](const Attention& a, const View& out, const View& lse) { attend(a, out, static_cast<float*>(lse.data)); },
        nb::call_guard<nb::gil_scoped_release>());
  m.def("attend_backward",
        [](const Attention& a, const View& d_out, const View& lse, const View& shift, const View& dq, const View& dk,
           const View& dv, std::optional<View> d_bias) {
          attend_backward(a, Gradients{d_out, static_cast<float*>(lse.data), static_cast<float*>(shift.data), dq, dk, dv,
                                       d_bias.value_or(absent)});
        },
        "a"_a, "d_out"_a, "lse"_a, "shift"_a, "dq"_a, "dk"_a, "dv"_a, "d_bias"_a.none(),
        nb::call_guard<nb::gil_scoped_release>());
  m.def("decode",
        [](const Attention& a, std::optional<View> table, std::optional<View> length, const View& out, const View& lse) {
          if (!table) return decode(a, nullptr, out, static_cast<float*>(lse.data));
          const Pages pages = pages_of(a, *table, *length);
          decode(a, &pages, out, static_cast<float*>(lse.data));
        },
        "a"_a, "table"_a.none(), "length"_a.none(), "out"_a, "lse"_a, nb::call_guard<nb::gil_scoped_release>());
  nb::class_<Gate>(m, "Gate")
      .def("__init__", [](Gate* self, const View& q, const std::string& scorer, const std::string& rule, double amount,
                          double dense_above, const View& count, const View& finite, const View& key_norm, const View& mean,
                          std::optional<View> radius, std::optional<View> key_mask, std::optional<View> sink, bool causal,
                          std::optional<int64_t> window, float scale, std::optional<float> softcap, int64_t kv_len,
                          int64_t kv_block, int64_t q_tile, int64_t lead, int64_t query_stride, bool share_group, int64_t sinks, int64_t near, double unit, double exponential,
                          int threads) {
             new (self) Gate(make_gate(q, scorer, rule, amount, dense_above, count, finite, key_norm, mean, radius, key_mask, sink,
                                       causal, window, scale, softcap, kv_len, kv_block, q_tile, lead, query_stride, share_group,
                                       sinks, near, unit, exponential, threads));
           },
           "q"_a, "scorer"_a, "rule"_a, "amount"_a, "dense_above"_a, "count"_a, "finite"_a, "key_norm"_a, "mean"_a,
           "radius"_a.none(), "key_mask"_a.none(), "sink"_a.none(), "causal"_a, "window"_a.none(), "scale"_a,
           "softcap"_a.none(), "kv_len"_a, "kv_block"_a, "q_tile"_a, "lead"_a, "query_stride"_a, "share_group"_a, "sinks"_a, "near"_a, "unit"_a, "exponential"_a,
           "threads"_a)
      .def("set_sketch", &set_sketch, "key"_a, "bits"_a, "sketch_bits"_a, "digits"_a, "planes"_a, "plane_stride"_a, "scale"_a,
           "channel_scale"_a, "error"_a, "metric_error"_a,
           "spectral"_a.none(), "metric_spectral"_a.none());
  nb::class_<Chosen>(m, "Chosen")
      .def_prop_ro("entries", [](const Chosen& c) { return c.block.size(); })
      .def_ro("planes_read", &Chosen::planes_read)
      .def("write", [](const Chosen& c, const View& row_ptr, const View& block, const View& kept, const View& visible,
                       const View& dense) {
        copy_to(c.row_ptr, row_ptr);
        copy_to(c.block, block);
        copy_to(c.kept, kept);
        copy_to(c.visible, visible);
        copy_to(c.dense, dense);
      });
  m.def("choose", &choose, "gate"_a, nb::call_guard<nb::gil_scoped_release>());
  nb::class_<RowChoice>(m, "RowChoice")
      .def("__init__",
           [](RowChoice* self, const Attention& a, std::optional<View> index, const std::vector<int64_t>& offsets, int64_t first_key,
              int64_t prefix, int64_t window, bool two_sided) {
             new (self) RowChoice(row_choice(a, index, offsets, first_key, prefix, window, two_sided));
           },
           "a"_a, "index"_a.none() = nb::none(), "offsets"_a = std::vector<int64_t>{}, "first_key"_a = 0, "prefix"_a = 0,
           "window"_a = 0, "two_sided"_a = false);
  m.def("attend_rows",
        [](const Attention& a, const RowChoice& c, const View& out, const View& lse) {
          attend_rows(a, c, out, static_cast<float*>(lse.data));
        },
        nb::call_guard<nb::gil_scoped_release>());
  m.def("attend_rows_backward",
        [](const Attention& a, const RowChoice& c, const View& d_out, const View& lse, const View& shift, const View& dq,
           const View& dk, const View& dv, std::optional<View> d_bias) {
          attend_rows_backward(a, c, Gradients{d_out, static_cast<float*>(lse.data), static_cast<float*>(shift.data), dq, dk, dv,
                                               d_bias.value_or(absent)});
        },
        "a"_a, "choice"_a, "d_out"_a, "lse"_a, "shift"_a, "dq"_a, "dk"_a, "dv"_a, "d_bias"_a.none(),
        nb::call_guard<nb::gil_scoped_release>());
  m.def("top_k_attention",
        [](const Attention& a, int64_t top_k, const View& out, const View& lse, const View& index, std::optional<View> counts) {
          top_k_attention(a, top_k, out, static_cast<float*>(lse.data), static_cast<int32_t*>(index.data),
                          counts ? static_cast<int64_t*>(counts->data) : nullptr);
        },
        "a"_a, "top_k"_a, "out"_a, "lse"_a, "index"_a, "counts"_a.none(), nb::call_guard<nb::gil_scoped_release>());
  nb::class_<TernaryWeights>(m, "TernaryWeights")
      .def("__init__",
           [](TernaryWeights* self, const View& codes, const View& alpha, int64_t rows, int64_t columns, bool counted) {
             const uint8_t* c = static_cast<const uint8_t*>(codes.data);
             nb::gil_scoped_release unlocked;
             new (self) TernaryWeights{c, rows, columns, static_cast<const float*>(alpha.data), alpha.shape[3] > 1 ? 1 : 0,
                                       counted ? ternary_fewest(c, rows, columns) : 0};
           },
           "codes"_a, "alpha"_a, "rows"_a, "columns"_a, "counted"_a)
      .def_ro("fewest", &TernaryWeights::fewest)
      // tensors as they are: between products that stream weights through the caches, an object of Python costs several times its time
      .def("multiply", [](const TernaryWeights& w, nb::handle x, nb::handle out, bool int8, int threads) {
        const View from = tensor_view(x), to = tensor_view(out);
        if (from.shape[3] != w.columns || to.shape[3] != w.rows) throw std::invalid_argument("`x` must have as many channels as the matrix has columns");
        nb::gil_scoped_release unlocked;
        ternary_linear(w, from, int8, to, threads);
      });
  m.def("diagonal_scan",
        [](const View& x, const View& a, const View& start, const View& out, bool reverse, int threads) {
          diagonal_scan(x, static_cast<const float*>(a.data), static_cast<const float*>(start.data), out, reverse, threads);
        },
        "x"_a, "a"_a, "start"_a, "out"_a, "reverse"_a, "threads"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def("geometry", &geometry, "key"_a, "key_mask"_a.none(), "block_size"_a, "bits"_a, "scale_is_given"_a, "threads"_a,
        "first_block"_a, "room_blocks"_a, "room_keys"_a, "count"_a, "finite"_a, "mean"_a, "key_norm"_a, "radius"_a.none(), "low"_a.none(), "high"_a.none(), "planes"_a.none(),
        "scale"_a.none(), "error"_a.none(), "metric_error"_a.none(), "channel_scale"_a.none(), "spectral"_a.none(),
        "metric_spectral"_a.none(), nb::call_guard<nb::gil_scoped_release>());
  nb::class_<Gated>(m, "Gated").def_ro("entries", &Gated::entries).def_ro("tiles", &Gated::tiles).def("read", &read_gated);
  m.def("select", &choose_prefill, "q"_a, "key"_a, "key_mask"_a.none(), "edges"_a.none(), "causal"_a, "window"_a.none(), "scale"_a,
        "softcap"_a.none(), "scoring"_a, "bits"_a, "sketch_bits"_a, "round_queries"_a, "planes"_a.none(), "key_scale"_a.none(),
        "channel_scale"_a.none(), "mean"_a.none(), "radius"_a.none(), "count"_a, "finite"_a, "error"_a.none(),
        "metric_error"_a.none(), "spectral"_a.none(), "metric_spectral"_a.none(), "key_norm"_a.none(), "sink"_a.none(), "rule"_a,
        "level"_a, "blocks"_a,
        "block_size"_a, "query_tile"_a, "stride"_a, "heads"_a, "sinks"_a, "near"_a, "dense_above"_a, "threads"_a,
        nb::call_guard<nb::gil_scoped_release>());
  const auto released = nb::call_guard<nb::gil_scoped_release>();
  m.def("attend_offsets",
        [](const View& q, const View& k, const View& v, const View& offsets, int64_t prefix, float scale, int threads,
           const View& out, const View& lse) {
          attend_offsets(offset_attention(q, k, v, offsets, prefix, scale, threads), out, static_cast<float*>(lse.data));
        },
        released);
  m.def("attend_wheel",
        [](const View& q, const View& k, const View& v, const View& offsets, int64_t prefix, float scale, int threads,
           int64_t modulus, const View& residues, const View& out, const View& lse) {
          attend_wheel(offset_attention(q, k, v, offsets, prefix, scale, threads), wheel(modulus, residues), out,
                       static_cast<float*>(lse.data));
        },
        released);
  m.def("attend_offsets_backward",
        [](const View& q, const View& k, const View& v, const View& offsets, int64_t prefix, float scale, int threads,
           const View& d_out, const View& lse, const View& shift, const View& dq, const View& dk, const View& dv) {
          attend_offsets_backward(offset_attention(q, k, v, offsets, prefix, scale, threads),
                                  OffsetGradients{d_out, static_cast<float*>(lse.data), static_cast<float*>(shift.data), dq, dk, dv});
        },
        released);
  m.def("attend_wheel_backward",
        [](const View& q, const View& k, const View& v, const View& offsets, int64_t prefix, float scale, int threads,
           int64_t modulus, const View& residues, const View& d_out, const View& lse, const View& shift, const View& dq,
           const View& dk, const View& dv) {
          attend_wheel_backward(offset_attention(q, k, v, offsets, prefix, scale, threads), wheel(modulus, residues),
                                OffsetGradients{d_out, static_cast<float*>(lse.data), static_cast<float*>(shift.data), dq, dk, dv});
        },
        released);
  m.def("xla_handlers", [] {
    nb::dict found;
    for (const NamedHandler& h : xla_handlers)
      found[h.name] = nb::steal(PyCapsule_New(reinterpret_cast<void*>(h.run), "xla._CUSTOM_CALL_TARGET", nullptr));
    return found;
  });
  m.def("prefer_huge_pages", [](uintptr_t p, size_t bytes) { prefer_huge_pages(reinterpret_cast<void*>(p), bytes); }, "pointer"_a, "bytes"_a);
  m.def("level", &level);
  m.def("halves_vectors", &halves_vectors);
  m.def("levels", &levels);
  m.def("force_level", &force_level);
}
