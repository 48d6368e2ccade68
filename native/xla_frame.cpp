#include "xla_frame.h"

#include <algorithm>
#include <cstring>
#include <sstream>
#include <stdexcept>

namespace sieve {

namespace {

DType dtype_of(xla::DataType t) {
  switch (t) {
    case xla::F32_: return F32;
    case xla::F16_: return F16;
    case xla::BF16_: return BF16;
    case xla::PRED:
    case xla::U8_: return U8;
    case xla::S32: return I32;
    case xla::S64: return I64;
    default: throw std::invalid_argument("kernels know no arrays of XLA type " + std::to_string(t));
  }
}

}  // namespace

Frame::Frame(const xla::CallFrame& call) : call_(call) {
  name_all("inputs", call.args, inputs_);
  name_all("outputs", call.rets, outputs_);
  // of its own the first array of every call has 4 axes: queries or keys
  const xla::Buffer& first = *inputs_.at(0).buffer;
  const int64_t extra = first.rank - 4;
  if (extra < 0) throw std::invalid_argument("`" + inputs_[0].name + "` must have 4 axes; got " + std::to_string(first.rank));
  // results have the full length of every mapped axis
  const xla::Buffer& out = *outputs_.at(0).buffer;
  mapped_.assign(out.dims, out.dims + extra);
  for (int64_t n : mapped_) items_ *= n;
}

void Frame::name_all(const char* attribute, const xla::Args& args, std::vector<Named>& into) const {
  std::istringstream words(text(attribute));
  std::string word;
  while (words >> word) {
    if (static_cast<int64_t>(into.size()) >= args.size)
      throw std::invalid_argument(std::string("`") + attribute + "` names more arrays than there are");
    const auto* b = static_cast<const xla::Buffer*>(args.args[into.size()]);
    if (b->struct_size < sizeof(xla::Buffer))
      throw std::runtime_error("XLA's buffers are smaller than those that the kernels were written for");
    into.push_back({word, b});
  }
  if (into.empty() || static_cast<int64_t>(into.size()) != args.size)
    throw std::invalid_argument(std::string("`") + attribute + "` must name every array, got " + std::to_string(into.size()) +
                                " names for " + std::to_string(args.size));
}

const Frame::Named* Frame::find(const std::vector<Named>& from, const char* name) {
  for (const Named& n : from)
    if (n.name == name) return &n;
  return nullptr;
}

int64_t Frame::first_element(const xla::Buffer& b, int rank, int64_t item) const {
  const int64_t extra = static_cast<int64_t>(mapped_.size());
  if (b.rank != rank + extra)
    throw std::invalid_argument("an array has " + std::to_string(b.rank) + " axes where " + std::to_string(rank + extra) +
                                " belong");
  int64_t size = 1, at = 0;
  for (int64_t i = extra; i < b.rank; ++i) size *= b.dims[i];
  for (int64_t i = extra - 1; i >= 0; --i) {
    const int64_t place = item % mapped_[i];
    item /= mapped_[i];
    at += b.dims[i] == 1 ? 0 : place * size;
    size *= b.dims[i];
  }
  return at;
}

View Frame::view(const std::vector<Named>& from, const char* name, int rank, int64_t item) const {
  View v{nullptr, F32, {0, 0, 0, 0}, {0, 0, 0, 0}};
  const Named* found = find(from, name);
  if (!found) return v;
  const xla::Buffer& b = *found->buffer;
  v.dtype = dtype_of(b.dtype);
  v.data = static_cast<char*>(b.data) + first_element(b, rank, item) * dtype_bytes(v.dtype);
  int64_t stride = 1;
  for (int i = 3; i >= 0; --i) {
    const int own = rank - 4 + i;
    v.shape[i] = own < 0 ? 1 : b.dims[b.rank - rank + own];
    v.stride[i] = own < 0 ? 0 : stride;
    stride *= v.shape[i];
  }
  return v;
}

View Frame::planes(const char* name, bool is_input, int64_t item, int64_t* plane_stride) const {
  const Named* found = find(is_input ? inputs_ : outputs_, name);
  View v{nullptr, U8, {0, 0, 0, 0}, {0, 0, 0, 0}};
  if (!found) return v;
  const xla::Buffer& b = *found->buffer;
  v.data = static_cast<char*>(b.data) + first_element(b, 5, item);
  int64_t stride = 1;
  for (int i = 3; i >= 0; --i) {
    v.shape[i] = b.dims[b.rank - 4 + i];
    v.stride[i] = stride;
    stride *= v.shape[i];
  }
  *plane_stride = stride;
  return v;
}

int64_t Frame::attribute_of(const char* name) const {
  for (int64_t i = 0; i < call_.attrs.size; ++i) {
    const xla::Span& s = *call_.attrs.names[i];
    if (s.len == std::strlen(name) && std::memcmp(s.ptr, name, s.len) == 0) return i;
  }
  return -1;
}

std::string Frame::text(const char* name) const {
  const int64_t i = attribute_of(name);
  if (i < 0 || call_.attrs.types[i] != xla::ATTR_STRING)
    throw std::invalid_argument(std::string("attribute `") + name + "` must be a text");
  const auto* s = static_cast<const xla::Span*>(call_.attrs.attrs[i]);
  return std::string(s->ptr, s->len);
}

int64_t Frame::integer(const char* name) const {
  const int64_t i = attribute_of(name);
  if (i >= 0 && call_.attrs.types[i] == xla::ATTR_SCALAR) {
    const auto* s = static_cast<const xla::Scalar*>(call_.attrs.attrs[i]);
    if (s->dtype == xla::S64) return *static_cast<const int64_t*>(s->value);
  }
  throw std::invalid_argument(std::string("attribute `") + name + "` must be an int64");
}

double Frame::number(const char* name) const {
  const int64_t i = attribute_of(name);
  if (i >= 0 && call_.attrs.types[i] == xla::ATTR_SCALAR) {
    const auto* s = static_cast<const xla::Scalar*>(call_.attrs.attrs[i]);
    if (s->dtype == xla::F64_) return *static_cast<const double*>(s->value);
  }
  throw std::invalid_argument(std::string("attribute `") + name + "` must be a float64");
}

std::vector<int64_t> Frame::list(const char* name) const {
  const int64_t i = attribute_of(name);
  if (i < 0) return {};
  const auto* a = static_cast<const xla::Array*>(call_.attrs.attrs[i]);
  if (call_.attrs.types[i] != xla::ATTR_ARRAY || a->dtype != xla::S64)
    throw std::invalid_argument(std::string("attribute `") + name + "` must be a list of int64");
  const auto* from = static_cast<const int64_t*>(a->data);
  return std::vector<int64_t>(from, from + a->size);
}

}  // namespace sieve
