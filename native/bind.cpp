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
#include "offsets.h"

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
  // indices come from whoever made the selection: none may point outside of the keys
  const int64_t tiles = (a.q.shape[2] + lead + q_block - 1) / q_block, blocks = (a.k.shape[2] + kv_block - 1) / kv_block;
  const int64_t *ptr = static_cast<const int64_t*>(row_ptr.data), rows = batch * heads * tiles, entries = block_index.shape[3];
  const int32_t* index = static_cast<const int32_t*>(block_index.data);
  bool fits = row_ptr.shape[3] == rows + 1 && ptr[0] == 0 && ptr[rows] == entries;
  for (int64_t i = 0; fits && i < rows; ++i) {
    fits = ptr[i] <= ptr[i + 1];
    for (int64_t e = ptr[i]; fits && e < ptr[i + 1]; ++e)
      fits = index[e] >= 0 && index[e] < blocks && (e == ptr[i] || index[e] > index[e - 1]);
  }
  if (!fits)
    throw std::invalid_argument("`selection` must list the blocks of every tile in increasing order, each below " +
                                std::to_string(blocks) + "; got indices outside of that; build it with Blocks.from_tiles");
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

void choose_ranges(Attention& a, int64_t prefix, int64_t window, bool two_sided) {
  a.choice = Choice{};
  a.choice.prefix = prefix;
  a.choice.window = window;
  a.choice.two_sided = two_sided;
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
          const Wheel w{modulus, static_cast<const int64_t*>(residues.data), residues.shape[3]};
          for (int64_t i = 0; i < w.residue_count; ++i)
            if (w.residues[i] < (i ? w.residues[i - 1] + 1 : 0) || w.residues[i] >= modulus)
              throw std::invalid_argument("`residues` must increase and lie below the modulus");
          attend_wheel(offset_attention(q, k, v, offsets, prefix, scale, threads), w, out, static_cast<float*>(lse.data));
        },
        released);
  m.def("attend_offsets_backward",
        [](const View& q, const View& k, const View& v, const View& offsets, int64_t prefix, float scale, int threads,
           const View& d_out, const View& lse, const View& shift, const View& dq, const View& dk, const View& dv) {
          attend_offsets_backward(offset_attention(q, k, v, offsets, prefix, scale, threads),
                                  OffsetGradients{d_out, static_cast<float*>(lse.data), static_cast<float*>(shift.data), dq, dk, dv});
        },
        released);
  m.def("level", &level);
  m.def("levels", &levels);
  m.def("force_level", &force_level);
}
