// Integer dots of rounded queries with the codes of keys, on any machine. Included by scan.cpp alone.
#pragma once
#include "kernels/four.h"

namespace sieve {
namespace SIEVE_LEVEL {

// whether planes must lie without gaps from key to key
static inline bool without_gaps(const Scan&) { return false; }
// whether two digits of a query are multiplied as one number
static inline bool two_in_one(const Scan&) { return false; }
int64_t scan_bytes(int32_t d, int32_t rows) { return up(d, 32) * rows * 2; }

void pack_scan(const int8_t* q, int32_t d, int32_t rows, int32_t, int32_t, void* out) {
  int16_t* to = static_cast<int16_t*>(out);
  const int64_t wide = up(d, 32);
  memset(to, 0, scan_bytes(d, rows));
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < d; ++c) to[r * wide + c] = q[(int64_t)r * d + c];
}

// The bits of a byte as eight bytes, the most significant first in memory.
static inline uint64_t spread(uint8_t byte) {
  const uint64_t one = 0x0101010101010101ull;
  return ((byte * one & 0x0102040810204080ull) + 0x7f7f7f7f7f7f7f7full) >> 7 & one;
}

static inline void integer_dots(const Scan& s, const uint8_t* const* planes, int64_t stride, int32_t* dots, void* scratch) {
  const int64_t wide = up(s.d, 32), bytes = (s.d + 7) / 8;
  const int16_t* query = static_cast<const int16_t*>(s.query);
  int16_t* codes = static_cast<int16_t*>(scratch);
  const int rows = s.groups * s.digits * SCAN_ROWS;
  for (int64_t c = bytes * 8; c < wide; ++c) codes[c] = 0;
  for (int key = 0; key < SCAN_CHUNK; ++key) {
    for (int64_t i = 0; i < bytes; ++i) {
      uint64_t eight = 0;
      for (int b = 0; b < s.bits; ++b) eight = (eight << 1) + spread(planes[b][key * stride + i]);
      uint8_t code[8];
      memcpy(code, &eight, 8);
      for (int j = 0; j < 8; ++j) codes[i * 8 + j] = code[j];
    }
    for (int r = 0; r < rows; ++r) {
      const int16_t* q = query + r * wide;
      int32_t total = 0;
      for (int64_t c = 0; c < wide; ++c) total += (int32_t)codes[c] * q[c];
      dots[((r / SCAN_ROWS) * SCAN_CHUNK + key) * SCAN_ROWS + r % SCAN_ROWS] = total;
    }
  }
}

static inline void begin() {}
static inline void end() {}

}  // namespace SIEVE_LEVEL
}  // namespace sieve
