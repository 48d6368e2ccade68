// Summaries of random keys in memory between guard pages, and what a sketch says of a key.
#pragma once
#include "geometry.h"
#include "test.h"

enum KeyKind { GAUSSIAN, OUTLIERS, EQUAL, RUNS, ZERO, LARGE, SMALL, BROKEN, KEY_KINDS };

void fill_keys(Random& random, Array& key, KeyKind kind);
// The same elements in memory of their own; the last axis side by side unless STRIDED.
Array moved(Random& random, const Array& x, Layout layout);
template <class T>
T& entry(const Array& x, int64_t a, int64_t b, int64_t c, int64_t d) {
  return *reinterpret_cast<T*>(at(x.view, a, b, c, d));
}
// Numbers up to the last byte before a page that must not be touched.
template <class T>
struct Row {
  Guarded memory;
  int64_t size;
  explicit Row(int64_t n) : memory(n * static_cast<int64_t>(sizeof(T)), true), size(n) {}
  T* get() const { return reinterpret_cast<T*>(memory.data()); }
  T& operator[](int64_t i) const { return get()[i]; }
};

double log_sum(const std::vector<double>& x);  // base 2; no number if one is none
bool same_bits(const Array& x, const Array& y);

struct Summary {
  // key_mask [batch, 1, 1, kv_len], data null if absent; bits 0: no sketch
  Summary(Random& random, const sieve::View& key, const sieve::View& key_mask, int64_t block_size, int bits, bool spectral);

  sieve::GeometryTask task{};
  int64_t batch, heads, kv_len, d, size, blocks;
  int bits;
  Array mean, low, high;                      // [batch, heads, blocks, d]
  Array count, finite, key_norm, radius;      // [1, batch, heads, blocks]
  Array spectral, metric_spectral;
  Array planes;                               // [bits, batch, heads, kv_len * bytes]
  Array scale, error, metric_error;           // [1, batch, heads, kv_len]
  Array channel_scale;                        // [1, batch, heads, d]

  std::vector<const Array*> arrays() const;   // those that are there
  int code(int64_t b, int64_t h, int64_t j, int64_t c, int leading) const;
  float decoded(int64_t b, int64_t h, int64_t j, int64_t c) const;                 // in fp32, rounding by rounding
  double known(int64_t b, int64_t h, int64_t j, int64_t c, int leading) const;     // by the leading planes
};
