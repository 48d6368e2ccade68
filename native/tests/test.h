// A small test main's tools: named tests, checks that say where they failed, random numbers, and memory between guard pages.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "view.h"

struct Test {
  const char* name;
  void (*run)();
};
std::vector<Test>& tests();
struct Register {
  Register(const char* name, void (*run)()) { tests().push_back({name, run}); }
};
#define TEST(name)                         \
  static void name();                      \
  static Register register_##name(#name, name); \
  static void name()

// What the running case is; printed with a failure.
void note(const std::string& text);
[[noreturn]] void fail(const char* file, int line, const std::string& what);
#define CHECK(condition) \
  if (!(condition)) fail(__FILE__, __LINE__, #condition)

struct Random {
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed * 0x9e3779b97f4a7c15ull + 1) {}
  uint64_t next();
  int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
  int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }
  bool chance(double p) { return uniform() < p; }
  double uniform() { return static_cast<double>(next() >> 11) / 9007199254740992.0; }
  double normal();
};

// Bytes that end, or begin, right at a page that must not be touched.
class Guarded {
 public:
  Guarded(int64_t bytes, bool guard_after);
  ~Guarded();
  Guarded(const Guarded&) = delete;
  char* data() const { return data_; }

 private:
  char *map_, *data_;
  int64_t size_;
};

// An array with its memory; elements are read and written as doubles.
struct Array {
  sieve::View view{nullptr, sieve::F32, {1, 1, 1, 1}, {0, 0, 0, 0}};
  std::shared_ptr<Guarded> memory;
  double get(int64_t a, int64_t b, int64_t c, int64_t d) const;
  void set(int64_t a, int64_t b, int64_t c, int64_t d, double x);
};

enum Layout { CONTIGUOUS, TRANSPOSED, PADDED, STRIDED, REVERSED, SHARED_HEADS, LAYOUTS };

// Exactly the bytes that the layout spans, guarded on a random side. SHARED_HEADS has stride 0 along batch and heads.
Array make(Random& random, sieve::DType dtype, std::vector<int64_t> shape, Layout layout);
void fill(Random& random, Array& x, double size = 1.0);

// Runs `body` once for every level that this machine has.
void each_level(const std::function<void(const std::string&)>& body);
