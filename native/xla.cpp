// The kernels as XLA calls them. A handler reads its frame, walks the axes that vmap put in front, and runs the driver on each.
#include "xla.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "attend.h"
#include "decode.h"
#include "gate.h"
#include "geometry.h"
#include "offsets.h"
#include "rows.h"
#include "scan.h"
#include "top_k.h"
#include "xla_frame.h"

namespace sieve {
namespace {

template <class T>
T* data(const View& v) {
  return static_cast<T*>(v.data);
}

// [batch, kv_len] came with its axes last
View first_and_last(View v) {
  v.shape[0] = v.shape[2];
  v.stride[0] = v.stride[2];
  return v;
}

// A mask or a bias spread over [batch, q_heads, q_len, kv_len]: stride 0 along what is shared.
View spread(View v, const Attention& a) {
  if (!v.data) return v;
  const int64_t full[4] = {a.q.shape[0], a.q.shape[1], a.q.shape[2], a.k.shape[2]};
  for (int i = 0; i < 4; ++i)
    if (v.shape[i] != full[i]) {
      v.stride[i] = 0;
      v.shape[i] = full[i];
    }
  return v;
}

// int32 offsets of packed sequences, checked: under jit nobody could before.
std::vector<int64_t> edges_of(const Frame& f, int64_t item, int64_t kv_len) {
  const View v = f.input("cu_seqlens", 1, item);
  std::vector<int64_t> edges;
  if (!v.data) return edges;
  if (v.dtype != I32) throw std::invalid_argument("`cu_seqlens` must be int32");
  edges.assign(data<int32_t>(v), data<int32_t>(v) + v.shape[3]);
  bool rises = !edges.empty() && edges.front() == 0 && edges.back() == kv_len;
  for (size_t i = 1; rises && i < edges.size(); ++i) rises = edges[i] > edges[i - 1];
  if (!rises)
    throw std::invalid_argument("`cu_seqlens` must rise from 0 to " + std::to_string(kv_len) +
                                ", no sequence empty; got other offsets; drop empty sequences and pack along the length");
  return edges;
}

// A call and what its pointers point into.
struct Prepared {
  Attention a{};
  std::vector<int64_t> edges, row_ptr;
  std::vector<int32_t> block_index;
  std::vector<uint8_t> row_mask;
  RowChoice rows;
  bool by_rows = false;
};

// How many keys of a cache of fixed size there are. The query behind the last of them is the last one.
int64_t filled(const Frame& f, int64_t item, int64_t q_len, int64_t kv_len) {
  const View v = f.input("kv_length", 0, item);
  if (!v.data) return kv_len;
  const int64_t length = v.dtype == I32 ? *data<int32_t>(v) : -1;
  if (length < q_len || length > kv_len)
    throw std::invalid_argument("`kv_length` must be an int32 in " + std::to_string(q_len) + ".." + std::to_string(kv_len) +
                                "; got " + std::to_string(length) + "; write the keys into the cache first");
  return length;
}

// Padded blocks to compressed rows. A tile that wanted more blocks than there was room for gets every block.
void choose_padded(const Frame& f, int64_t item, Prepared& p) {
  const View counts = f.input("counts", 3, item), indices = f.input("indices", 4, item);
  Choice& c = p.a.choice;
  c = Choice{};
  c.batch = indices.shape[0];
  c.heads = indices.shape[1];
  c.q_block = f.integer("q_block");
  c.kv_block = f.integer("kv_block");
  c.lead = f.integer("lead");
  const int64_t tiles = indices.shape[2], room = indices.shape[3], rows = c.batch * c.heads * tiles;
  // [batch, heads, tiles, room * q_block]: which queries of the tile keep the block
  const View lanes = f.input("rows", 4, item);
  bool fits = c.q_block >= 1 && c.kv_block >= 1 && c.lead >= 0 && c.lead < c.q_block &&
              tiles == (p.a.q.shape[2] + c.lead + c.q_block - 1) / c.q_block && counts.dtype == I32 && indices.dtype == I32 &&
              counts.shape[1] * counts.shape[2] * counts.shape[3] == rows &&
              (!lanes.data || (lanes.shape[3] == room * c.q_block && lanes.shape[0] * lanes.shape[1] * lanes.shape[2] == rows));
  const int64_t blocks = fits ? (p.a.k.shape[2] + c.kv_block - 1) / c.kv_block : 0;
  p.row_ptr.assign(1, 0);
  for (int64_t r = 0; fits && r < rows; ++r) {
    const int64_t wanted = data<int32_t>(counts)[r];
    const int32_t* index = data<int32_t>(indices) + r * room;
    if (wanted > room) {
      for (int64_t b = 0; b < blocks; ++b) p.block_index.push_back(static_cast<int32_t>(b));
      if (lanes.data) p.row_mask.insert(p.row_mask.end(), blocks * c.q_block, 1);
    } else {
      if (lanes.data && wanted > 0) {
        const uint8_t* lane = data<uint8_t>(lanes) + r * room * c.q_block;
        p.row_mask.insert(p.row_mask.end(), lane, lane + wanted * c.q_block);
      }
      fits = wanted >= 0;
      for (int64_t i = 0; fits && i < wanted; ++i) {
        fits = index[i] >= 0 && index[i] < blocks && (i == 0 || index[i] > index[i - 1]);
        p.block_index.push_back(index[i]);
      }
    }
    p.row_ptr.push_back(static_cast<int64_t>(p.block_index.size()));
  }
  if (!fits)
    throw std::invalid_argument("`selection` must list the blocks of every tile in increasing order, each below " +
                                std::to_string(blocks) + "; got others; make it with select or PaddedBlocks.from_tiles");
  c.row_ptr = p.row_ptr.data();
  c.block_index = p.block_index.data();
  c.row_mask = lanes.data ? p.row_mask.data() : nullptr;
}

void choose_positions(const Frame& f, int64_t item, Prepared& p) {
  Choice& c = p.a.choice;
  c = Choice{};
  c.prefix = f.knows("prefix") ? f.integer("prefix") : 0;
  c.window = f.knows("near") ? f.integer("near") : 0;
  c.two_sided = f.knows("two_sided") && f.integer("two_sided");
  p.by_rows = f.has("index") || f.knows("offsets");
  if (!p.by_rows) return;
  p.rows.index = f.input("index", 4, item);
  p.rows.offsets = f.list("offsets");
  p.rows.first_key = f.knows("first_key") ? f.integer("first_key") : 0;
  if (!f.has("index")) {
    p.rows.prefix = c.prefix;
    p.rows.window = c.window;
    p.rows.two_sided = c.two_sided;
  }
  check_rows(p.a, p.rows);
}

void prepare(const Frame& f, int64_t item, Prepared& p) {
  Attention& a = p.a;
  a.q = f.input("query", 4, item);
  a.k = f.input("key", 4, item);
  a.v = f.input("value", 4, item);
  a.mask = spread(f.input("mask", 4, item), a);
  a.bias = spread(f.input("bias", 4, item), a);
  a.key_mask = first_and_last(f.input("key_mask", 2, item));
  a.sink = data<float>(f.input("sink", 1, item));
  p.edges = edges_of(f, item, a.k.shape[2]);
  a.edges = p.edges.empty() ? nullptr : p.edges.data();
  a.edge_count = static_cast<int64_t>(p.edges.size());
  a.causal = f.integer("causal");
  a.window = f.integer("window");
  a.scale = static_cast<float>(f.number("scale"));
  a.softcap = static_cast<float>(f.number("softcap"));
  a.threads = static_cast<int>(f.integer("threads"));
  a.k.shape[2] = a.v.shape[2] = filled(f, item, a.q.shape[2], a.k.shape[2]);
  a.choice.prefix = a.k.shape[2];
}

void run_attend(const Frame& f, int64_t item) {
  Prepared p;
  prepare(f, item, p);
  f.has("indices") ? choose_padded(f, item, p) : choose_positions(f, item, p);
  const View out = f.output("output", 4, item);
  float* lse = data<float>(f.output("lse", 3, item));
  // a few queries read the cache where it lies
  const bool few = p.a.q.shape[2] <= MAX_DECODE_QUERIES;
  if (p.by_rows)
    attend_rows(p.a, p.rows, out, lse);
  else if (few)
    decode(p.a, nullptr, out, lse);
  else
    attend(p.a, out, lse);
}

void run_attend_backward(const Frame& f, int64_t item) {
  Prepared p;
  prepare(f, item, p);
  f.has("indices") ? choose_padded(f, item, p) : choose_positions(f, item, p);
  View d_bias = f.output("d_bias", 4, item);
  if (d_bias.data) {
    std::fill_n(data<float>(d_bias), d_bias.shape[0] * d_bias.shape[1] * d_bias.shape[2] * d_bias.shape[3], 0.0f);
    d_bias = spread(d_bias, p.a);
  }
  const Gradients g{f.input("d_output", 4, item), data<float>(f.input("lse", 3, item)), data<float>(f.input("shift", 3, item)),
                    f.output("d_query", 4, item), f.output("d_key", 4, item), f.output("d_value", 4, item), d_bias};
  if (f.has("kv_length"))
    for (const View& d : {g.dk, g.dv})
      std::memset(d.data, 0, d.shape[0] * d.shape[1] * d.shape[2] * d.shape[3] * dtype_bytes(d.dtype));
  p.by_rows ? attend_rows_backward(p.a, p.rows, g) : attend_backward(p.a, g);
}

void run_top_k(const Frame& f, int64_t item) {
  Prepared p;
  prepare(f, item, p);
  top_k_attention(p.a, f.integer("top_k"), f.output("output", 4, item), data<float>(f.output("lse", 3, item)),
                  data<int32_t>(f.output("index", 4, item)), nullptr);
}

void run_geometry(const Frame& f, int64_t item) {
  GeometryTask t{};
  t.key = f.input("key", 4, item);
  t.key_mask = first_and_last(f.input("key_mask", 2, item));
  t.block_size = f.integer("block_size");
  t.bits = static_cast<int32_t>(f.integer("bits"));
  t.threads = static_cast<int>(f.integer("threads"));
  int64_t plane_stride;
  t.count = data<int32_t>(f.output("count", 3, item));
  t.finite = data<uint8_t>(f.output("finite", 3, item));
  t.mean = data<float>(f.output("mean", 4, item));
  t.key_norm = data<float>(f.output("key_norm", 3, item));
  t.radius = data<float>(f.output("radius", 3, item));
  t.low = data<float>(f.output("low", 4, item));
  t.high = data<float>(f.output("high", 4, item));
  t.planes = data<uint8_t>(f.planes("planes", false, item, &plane_stride));
  t.scale = data<uint16_t>(f.output("scale", 3, item));
  t.error = data<uint16_t>(f.output("error", 3, item));
  t.metric_error = data<uint16_t>(f.output("metric_error", 3, item));
  t.scale_is_given = f.has("given_scale");
  t.channel_scale = data<float>(t.scale_is_given ? f.input("given_scale", 3, item) : f.output("channel_scale", 3, item));
  t.spectral = data<float>(f.output("spectral", 3, item));
  t.metric_spectral = data<float>(f.output("metric_spectral", 3, item));
  build_geometry(t);
}

// [batch, heads, n...] with everything behind the heads in one row, as the gate reads them.
View flat(const View& v, int rank) {
  View moved{v.data, v.dtype, {1, 0, 0, 0}, {0, 0, 0, 0}};
  if (!v.data) return View{nullptr, F32, {0, 0, 0, 0}, {0, 0, 0, 0}};
  const int batch = 4 - rank;
  int64_t rest = 1;
  for (int i = batch + 2; i < 4; ++i) rest *= v.shape[i];
  moved.shape[1] = v.shape[batch];
  moved.shape[2] = v.shape[batch + 1];
  moved.shape[3] = rest;
  moved.stride[1] = v.shape[batch + 1] * rest;
  moved.stride[2] = rest;
  moved.stride[3] = 1;
  return moved;
}

// What a gate kept, put into fixed places.
struct Places {
  int32_t *counts, *indices, *kept, *visible;
  uint8_t* dense;
  int64_t room;

  Places(const Frame& f, int64_t item) {
    const View v = f.output("indices", 4, item);
    room = v.shape[3];
    indices = data<int32_t>(v);
    counts = data<int32_t>(f.output("counts", 3, item));
    kept = data<int32_t>(f.output("kept", 3, item));
    visible = data<int32_t>(f.output("visible", 3, item));
    dense = data<uint8_t>(f.output("dense", 3, item));
  }

  void put(int64_t row, const int32_t* block, int64_t n, int64_t keys_kept, int64_t keys_visible, bool turned) const {
    const int64_t fit = std::min(n, room);
    std::copy(block, block + fit, indices + row * room);
    std::fill(indices + row * room + fit, indices + (row + 1) * room, -1);
    counts[row] = static_cast<int32_t>(n);
    kept[row] = static_cast<int32_t>(keys_kept);
    visible[row] = static_cast<int32_t>(keys_visible);
    dense[row] = turned;
  }
};

void run_select(const Frame& f, int64_t item) {
  GateTask t{};
  t.q = f.input("query", 4, item);
  t.key = f.input("key", 4, item);
  t.key_mask = first_and_last(f.input("key_mask", 2, item));
  const std::vector<int64_t> edges = edges_of(f, item, t.key.shape[2]);
  t.edges = edges.empty() ? nullptr : edges.data();
  t.edge_count = static_cast<int64_t>(edges.size());
  t.causal = f.integer("causal");
  t.window = f.integer("window");
  t.scale = static_cast<float>(f.number("scale"));
  t.softcap = static_cast<float>(f.number("softcap"));
  t.scoring = static_cast<Scoring>(f.integer("scoring"));
  int64_t plane_stride = 0;
  View planes = f.planes("planes", true, item, &plane_stride);
  if (planes.data) {
    t.bits = static_cast<int32_t>(f.integer("bits"));
    t.sketch_bits = static_cast<int32_t>(f.integer("sketch_bits"));
    t.round_queries = f.integer("round_queries");
    // [bits, batch, kv_heads, kv_len * bytes]
    const int64_t row = planes.shape[2] * planes.shape[3];
    t.planes = View{planes.data, U8, {t.sketch_bits, planes.shape[0], planes.shape[1], row},
                    {plane_stride, planes.shape[1] * row, row, 1}};
  }
  t.key_scale = flat(f.input("key_scale", 3, item), 3);
  t.channel_scale = flat(f.input("channel_scale", 3, item), 3);
  t.mean = flat(f.input("mean", 4, item), 4);
  t.radius = flat(f.input("radius", 3, item), 3);
  t.count = flat(f.input("count", 3, item), 3);
  t.finite = flat(f.input("finite", 3, item), 3);
  t.error = flat(f.input("error", 3, item), 3);
  t.metric_error = flat(f.input("metric_error", 3, item), 3);
  t.spectral = flat(f.input("spectral", 3, item), 3);
  t.metric_spectral = flat(f.input("metric_spectral", 3, item), 3);
  t.key_norm = flat(f.input("key_norm", 3, item), 3);
  t.sink = data<float>(f.input("sink", 1, item));
  t.rule = static_cast<Rule>(f.integer("rule"));
  t.level = f.number("level");
  t.blocks = f.integer("blocks");
  t.block_size = f.integer("block_size");
  t.query_tile = f.integer("query_tile");
  t.stride = f.integer("stride");
  t.heads = f.integer("heads");
  t.sinks = f.integer("sinks");
  t.near = f.integer("near");
  t.dense_above = f.number("dense_above");
  t.threads = static_cast<int>(f.integer("threads"));
  const Gated found = gate(t);
  const Places places(f, item);
  for (size_t r = 0; r < found.list.size(); ++r)
    places.put(static_cast<int64_t>(r), found.list[r].data(), static_cast<int64_t>(found.list[r].size()), found.kept[r],
               found.visible[r], found.dense[r]);
}

void run_scan(const Frame& f, int64_t item) {
  Gate g{};
  g.q = f.input("query", 4, item);
  g.scorer = static_cast<Scorer>(f.integer("scorer"));
  g.rule = static_cast<KeepRule>(f.integer("rule"));
  g.amount = f.number("amount");
  g.dense_above = f.number("dense_above");
  g.count = f.input("count", 3, item);
  g.finite = f.input("finite", 3, item);
  g.key_norm = f.input("key_norm", 3, item);
  g.mean = f.input("mean", 4, item);
  g.radius = f.input("radius", 3, item);
  g.key_mask = f.input("key_mask", 2, item);
  g.sink = data<float>(f.input("sink", 1, item));
  g.causal = f.integer("causal");
  g.window = f.integer("window");
  g.scale = static_cast<float>(f.number("scale"));
  g.softcap = static_cast<float>(f.number("softcap"));
  g.kv_len = filled(f, item, g.q.shape[2], f.integer("kv_len"));
  g.kv_block = f.integer("block_size");
  g.q_tile = f.integer("query_tile");
  g.lead = f.integer("lead");
  g.query_stride = f.integer("stride");
  g.share_group = f.integer("share_group");
  g.sinks = f.integer("sinks");
  g.near = f.integer("near");
  g.unit = f.number("unit");
  g.exponential = f.number("exponential");
  g.threads = static_cast<int>(f.integer("threads"));
  g.digits = 1;
  int64_t plane_stride = 0;
  const View planes = f.planes("planes", true, item, &plane_stride);
  if (planes.data) {
    g.key = f.input("key", 4, item);
    g.bits = static_cast<int>(f.integer("bits"));
    g.sketch_bits = static_cast<int>(f.integer("sketch_bits"));
    g.digits = static_cast<int>(f.integer("digits"));
    g.planes = planes;
    g.plane_stride = plane_stride;
    g.key_scale = f.input("key_scale", 3, item);
    g.channel_scale = f.input("channel_scale", 3, item);
    g.error = f.input("error", 3, item);
    g.metric_error = f.input("metric_error", 3, item);
    g.spectral = f.input("spectral", 3, item);
    g.metric_spectral = f.input("metric_spectral", 3, item);
  }
  const Chosen found = choose(g);
  const Places places(f, item);
  for (size_t r = 0; r + 1 < found.row_ptr.size(); ++r)
    places.put(static_cast<int64_t>(r), found.block.data() + found.row_ptr[r], found.row_ptr[r + 1] - found.row_ptr[r],
               found.kept[r], found.visible[r], found.dense[r]);
}

OffsetAttention offsets_of(const Frame& f, int64_t item, const std::vector<int64_t>& list) {
  for (size_t i = 0; i < list.size(); ++i)
    if (list[i] < (i ? list[i - 1] + 1 : 0)) throw std::invalid_argument("`offsets` must increase from 0 or above");
  const View q = f.input("query", 4, item), k = f.input("key", 4, item), v = f.input("value", 4, item);
  const int64_t reached = std::lower_bound(list.begin(), list.end(), k.shape[2]) - list.begin();
  return {q, k, v, list.data(), reached, std::min(f.integer("prefix"), k.shape[2]), static_cast<float>(f.number("scale")),
          static_cast<int>(f.integer("threads"))};
}

void run_offsets(const Frame& f, int64_t item) {
  const std::vector<int64_t> list = f.list("offsets"), residues = f.list("residues");
  const OffsetAttention a = offsets_of(f, item, list);
  const View out = f.output("output", 4, item);
  float* lse = data<float>(f.output("lse", 3, item));
  if (residues.empty()) return attend_offsets(a, out, lse);
  attend_wheel(a, Wheel{f.integer("modulus"), residues.data(), static_cast<int64_t>(residues.size())}, out, lse);
}

void run_offsets_backward(const Frame& f, int64_t item) {
  const std::vector<int64_t> list = f.list("offsets");
  const OffsetGradients g{f.input("d_output", 4, item), data<float>(f.input("lse", 3, item)),
                          data<float>(f.input("shift", 3, item)), f.output("d_query", 4, item), f.output("d_key", 4, item),
                          f.output("d_value", 4, item)};
  attend_offsets_backward(offsets_of(f, item, list), g);
}

xla::Error* fail(const xla::CallFrame& call, xla::ErrorCode code, const std::string& why) {
  const std::string text = "sieve_attn: " + why;
  xla::ErrorCreateArgs args{sizeof(xla::ErrorCreateArgs), nullptr, text.c_str(), code};
  return call.api->create_error(&args);
}

// XLA asks a handler once for the version that it was written against, then calls it.
template <void (*run)(const Frame&, int64_t)>
xla::Error* handle(xla::CallFrame* call) {
  if (call->extension_start && call->extension_start->type == xla::METADATA) {
    xla::Metadata* told = reinterpret_cast<xla::MetadataExtension*>(call->extension_start)->metadata;
    told->api_version = {sizeof(xla::Version), nullptr, xla::MAJOR, xla::MINOR};
    told->traits = 0;
    told->state_type_id = 0;
    return nullptr;
  }
  const xla::Version& theirs = call->api->api_version;
  if (theirs.major_version != xla::MAJOR || theirs.minor_version < xla::MINOR)
    return fail(*call, xla::FAILED_PRECONDITION,
                "the kernels were written for XLA's foreign function interface " + std::to_string(xla::MAJOR) + "." +
                    std::to_string(xla::MINOR) + " and this jaxlib has " + std::to_string(theirs.major_version) + "." +
                    std::to_string(theirs.minor_version) + "; install jax>=0.10 or use backend='gather'");
  if (call->stage != xla::EXECUTE) return fail(*call, xla::INVALID_ARGUMENT, "handlers execute and do nothing else");
  try {
    const Frame frame(*call);
    for (int64_t item = 0; item < frame.items(); ++item) run(frame, item);
    return nullptr;
  } catch (const std::invalid_argument& why) {
    return fail(*call, xla::INVALID_ARGUMENT, why.what());
  } catch (const std::bad_alloc&) {
    return fail(*call, xla::RESOURCE_EXHAUSTED, "no memory for the kernels' scratch arrays");
  } catch (const std::exception& why) {
    return fail(*call, xla::INTERNAL, why.what());
  }
}

}  // namespace

const NamedHandler xla_handlers[XLA_HANDLERS] = {
    {"attend", &handle<run_attend>},   {"attend_backward", &handle<run_attend_backward>},
    {"geometry", &handle<run_geometry>}, {"select", &handle<run_select>},
    {"scan", &handle<run_scan>},       {"top_k", &handle<run_top_k>},
    {"offsets", &handle<run_offsets>}, {"offsets_backward", &handle<run_offsets_backward>},
};

}  // namespace sieve
