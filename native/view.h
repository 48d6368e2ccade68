// Plain descriptions of arrays: a pointer, a dtype, shapes and strides in elements. Shared by every level, so no inline members.
#pragma once
#include <cstdint>

namespace sieve {

enum DType : int32_t { F32 = 0, F16 = 1, BF16 = 2, U8 = 3, I32 = 4, I64 = 5 };

struct View {
  void* data;  // null where an optional array is absent
  DType dtype;
  int64_t shape[4];
  int64_t stride[4];  // elements; 0 along broadcast axes
};

static inline int64_t dtype_bytes(DType t) { return t == F32 || t == I32 ? 4 : t == U8 ? 1 : t == I64 ? 8 : 2; }

static inline char* at(const View& x, int64_t a, int64_t b, int64_t c, int64_t d) {
  return static_cast<char*>(x.data) + (a * x.stride[0] + b * x.stride[1] + c * x.stride[2] + d * x.stride[3]) * dtype_bytes(x.dtype);
}

}  // namespace sieve
