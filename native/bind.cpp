// The only file that knows Python. Arrays come as View objects (pointer, dtype, shape, strides) that Python code has checked;
// the GIL is released while kernels run.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>

#include "attend.h"
#include "kernels.h"
#include "level.h"
#include "rows.h"
#include "scan.h"
#include "ternary.h"
#include "top_k.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace sieve {
namespace {

DType dtype_named(const std::string& name) {
  static const std::pair<const char*, DType> known[] = {{"float32", F32}, {"float16", F16}, {"bfloat16", BF16},
                                                        {"bool", U8},     {"uint8", U8},    {"int32", I32},
                                                        {"int64", I64}};
  for (const auto& [n, t] : known)
    if (name == n) return t;
  throw std::invalid_argument("`dtype` must be one that kernels know; got '" + name + "'; convert the array first");
}

// Up to four axes; missing ones come first, with size 1.
View make_view(uintptr_t pointer, const std::string& dtype, const std::vector<int64_t>& shape, const std::vector<int64_t>& stride) {
  if (shape.size() > 4 || stride.size() != shape.size()) throw std::invalid_argument("`shape` must have at most 4 axes, each with its stride");
  View v{reinterpret_cast<void*>(pointer), dtype_named(dtype), {1, 1, 1, 1}, {0, 0, 0, 0}};
  std::copy_backward(shape.begin(), shape.end(), v.shape + 4);
  std::copy_backward(stride.begin(), stride.end(), v.stride + 4);
  return v;
}

const View absent{nullptr, F32, {0, 0, 0, 0}, {0, 0, 0, 0}};

template <class T>
const T* pointer(const std::optional<View>& v) {
  return v ? static_cast<const T*>(v->data) : nullptr;
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
  a.key_mask = key_mask.value_or(absent);
  if (key_mask) {  // [batch, kv_len] came with its axes last
    a.key_mask.shape[0] = key_mask->shape[2];
    a.key_mask.stride[0] = key_mask->stride[2];
  }
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
                   int64_t batch, int64_t q_block, int64_t kv_block, int64_t lead) {
  // numbers come from whoever made the selection: none may point outside of the keys
  if (q_block < 1 || kv_block < 1 || lead < 0 || lead >= q_block || heads < 1 || batch < 1)
    throw std::invalid_argument("`selection` must have tiles and blocks of at least one position and a lead inside of a tile; got q_block " +
                                std::to_string(q_block) + ", kv_block " + std::to_string(kv_block) + ", lead " + std::to_string(lead) +
                                "; build it with Blocks.from_tiles");
  const int64_t tiles = (a.q.shape[2] + lead + q_block - 1) / q_block, blocks = (a.k.shape[2] + kv_block - 1) / kv_block;
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

void choose_ranges(Attention& a, int64_t prefix, int64_t window, bool two_sided) {
  a.choice = Choice{};
  a.choice.prefix = prefix;
  a.choice.window = window;
  a.choice.two_sided = two_sided;
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

}  // namespace
}  // namespace sieve

NB_MODULE(_native, m) {
  using namespace sieve;
  m.doc() = "Kernels of sieve_attn. Private: call sieve_attn.attend.native and its neighbours.";
  nb::class_<View>(m, "View").def("__init__",
                                  [](View* self, uintptr_t p, const std::string& t, const std::vector<int64_t>& shape,
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
           "kv_block"_a, "lead"_a)
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
  m.def("ternary_linear",
        [](const View& codes, const View& alpha, int64_t rows, int64_t columns, const View& x, bool int8, const View& out,
           int threads) {
          ternary_linear(TernaryWeights{static_cast<const int32_t*>(codes.data), rows, columns, static_cast<const float*>(alpha.data),
                                        alpha.shape[3] > 1 ? 1 : 0},
                         x, int8, out, threads);
        },
        "codes"_a, "alpha"_a, "rows"_a, "columns"_a, "x"_a, "int8"_a, "out"_a, "threads"_a,
        nb::call_guard<nb::gil_scoped_release>());
  m.def("diagonal_scan",
        [](const View& x, const View& a, const View& start, const View& out, bool reverse, int threads) {
          diagonal_scan(x, static_cast<const float*>(a.data), static_cast<const float*>(start.data), out, reverse, threads);
        },
        "x"_a, "a"_a, "start"_a, "out"_a, "reverse"_a, "threads"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def("level", &level);
  m.def("levels", &levels);
  m.def("force_level", &force_level);
}
