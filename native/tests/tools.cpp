// Random numbers, guarded memory and arrays for the tests. Conversions are written apart from those of the kernels.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "level.h"
#include "test.h"

using namespace sieve;

uint64_t Random::next() {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state;
}

double Random::normal() {
  return std::sqrt(-2.0 * std::log(uniform() + 1e-300)) * std::cos(6.283185307179586 * uniform());
}

Guarded::Guarded(int64_t bytes, bool guard_after) {
  const int64_t page = sysconf(_SC_PAGESIZE), room = (std::max<int64_t>(bytes, 1) + page - 1) / page * page;
  size_ = room + 2 * page;
  map_ = static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  CHECK(map_ != MAP_FAILED);
  CHECK(mprotect(map_, page, PROT_NONE) == 0);
  CHECK(mprotect(map_ + page + room, page, PROT_NONE) == 0);
  data_ = guard_after ? map_ + page + room - bytes : map_ + page;
}

Guarded::~Guarded() { munmap(map_, size_); }

static double half_to_double(uint16_t h) {
  const int exponent = (h >> 10) & 31, fraction = h & 1023;
  const double sign = h & 0x8000 ? -1.0 : 1.0;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24));
}

static uint16_t double_to_half(double x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  x = std::fabs(x);
  if (std::isnan(x)) return 0x7e00;
  if (x >= 65520.0) return sign | 0x7c00;
  if (x == 0.0) return sign;  // it has no exponent
  int exponent;
  std::frexp(x, &exponent);
  exponent = std::max(exponent, -13);  // below, the grid no longer gets finer
  const double steps = std::nearbyint(std::ldexp(x, 11 - exponent));
  return sign | static_cast<uint16_t>(steps + (exponent + 13) * 1024.0);
}

double Array::get(int64_t a, int64_t b, int64_t c, int64_t d) const {
  const char* p = at(view, a, b, c, d);
  if (view.dtype == F32) {
    float x;
    std::memcpy(&x, p, 4);
    return x;
  }
  uint16_t h;
  if (view.dtype == U8) return *p;
  std::memcpy(&h, p, 2);
  if (view.dtype == F16) return half_to_double(h);
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

void Array::set(int64_t a, int64_t b, int64_t c, int64_t d, double value) {
  char* p = at(view, a, b, c, d);
  const float x = static_cast<float>(value);
  if (view.dtype == U8) {
    *p = value != 0;
  } else if (view.dtype == F32) {
    std::memcpy(p, &x, 4);
  } else {
    uint16_t h = double_to_half(value);
    if (view.dtype == BF16) {
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      h = static_cast<uint16_t>(bits >> 16);  // towards zero: any bf16 number serves
    }
    std::memcpy(p, &h, 2);
  }
}

Array make(Random& random, DType dtype, std::vector<int64_t> shape, Layout layout) {
  Array x;
  x.view.dtype = dtype;
  std::copy(shape.begin(), shape.end(), x.view.shape);
  int64_t* s = x.view.stride;
  int64_t row = shape[3];
  s[3] = 1;
  if (layout == STRIDED) {
    s[3] = random.between(2, 3);
    row *= s[3];
  }
  if (layout == PADDED) row += random.between(1, 5);
  if (layout == TRANSPOSED) {  // [batch, len, heads, dim] in memory
    s[1] = row;
    s[2] = row * shape[1];
    s[0] = s[2] * shape[2];
  } else {
    s[2] = row;
    s[1] = layout == SHARED_HEADS ? 0 : row * shape[2];
    s[0] = layout == SHARED_HEADS ? 0 : s[1] * shape[1];
  }
  int64_t last = 0;
  for (int i = 0; i < 4; ++i) last += std::max<int64_t>(shape[i] - 1, 0) * s[i];
  x.memory = std::make_shared<Guarded>((last + 1) * dtype_bytes(dtype), random.chance(0.5));
  x.view.data = x.memory->data();
  if (layout == REVERSED) {
    x.view.data = static_cast<char*>(x.view.data) + (shape[2] - 1) * s[2] * dtype_bytes(dtype);
    s[2] = -s[2];
  }
  return x;
}

void fill(Random& random, Array& x, double size) {
  const int64_t* n = x.view.shape;
  for (int64_t a = 0; a < n[0]; ++a)
    for (int64_t b = 0; b < n[1]; ++b)
      for (int64_t c = 0; c < n[2]; ++c)
        for (int64_t d = 0; d < n[3]; ++d) x.set(a, b, c, d, random.normal() * size);
}

void each_level(const std::function<void(const std::string&)>& body) {
  for (const std::string& name : levels()) {
    force_level(name);
    body(name);
  }
  force_level("");
}
