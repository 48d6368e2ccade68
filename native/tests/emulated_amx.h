// Tile registers in software, put before every kernel of the amx level by -DSIEVE_EMULATE=amx or avx512: its kernels can then be
// tested on machines without AMX. Shapes that the hardware would refuse end the process.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

namespace {

struct EmulatedTiles {
  uint8_t data[8][16][64] = {};
  int rows[8] = {}, bytes[8] = {};
  bool configured = false;
};
thread_local EmulatedTiles emulated;

inline void emulated_must(bool good, const char* what) {
  if (good) return;
  fprintf(stderr, "emulated AMX: %s\n", what);
  abort();
}

inline void emulated_loadconfig(const void* p) {
  const uint8_t* c = static_cast<const uint8_t*>(p);
  emulated_must(c[0] == 1, "palette must be 1");
  emulated = EmulatedTiles();
  emulated.configured = true;
  for (int t = 0; t < 8; ++t) {
    uint16_t bytes;
    memcpy(&bytes, c + 16 + 2 * t, 2);
    emulated.bytes[t] = bytes;
    emulated.rows[t] = c[48 + t];
    emulated_must(bytes <= 64 && c[48 + t] <= 16, "a tile has at most 16 rows of 64 bytes");
  }
}

inline void emulated_release() { emulated.configured = false; }

inline void emulated_zero(int t) {
  emulated_must(emulated.configured && emulated.rows[t] > 0, "tile is not configured");
  memset(emulated.data[t], 0, sizeof(emulated.data[t]));
}

inline void emulated_loadd(int t, const void* p, int64_t stride) {
  emulated_zero(t);
  for (int r = 0; r < emulated.rows[t]; ++r) memcpy(emulated.data[t][r], static_cast<const char*>(p) + r * stride, emulated.bytes[t]);
}

inline void emulated_stored(int t, void* p, int64_t stride) {
  emulated_must(emulated.configured && emulated.rows[t] > 0, "tile is not configured");
  for (int r = 0; r < emulated.rows[t]; ++r) memcpy(static_cast<char*>(p) + r * stride, emulated.data[t][r], emulated.bytes[t]);
}

inline void emulated_shapes(int c, int a, int b) {
  emulated_must(emulated.configured, "tiles are not configured");
  emulated_must(emulated.rows[c] == emulated.rows[a], "rows of C and A differ");
  emulated_must(emulated.bytes[c] == emulated.bytes[b], "columns of C and B differ");
  emulated_must(emulated.bytes[a] == 4 * emulated.rows[b], "columns of A and rows of B differ");
}

template <class A>
inline void emulated_integers(int c, int a, int b) {
  emulated_shapes(c, a, b);
  for (int m = 0; m < emulated.rows[c]; ++m)
    for (int n = 0; n < emulated.bytes[c] / 4; ++n) {
      int32_t total;
      memcpy(&total, emulated.data[c][m] + 4 * n, 4);
      for (int k = 0; k < emulated.bytes[a]; ++k)
        total += (int32_t) static_cast<A>(emulated.data[a][m][k]) * static_cast<int8_t>(emulated.data[b][k / 4][4 * n + k % 4]);
      memcpy(emulated.data[c][m] + 4 * n, &total, 4);
    }
}

inline float emulated_bf16(const uint8_t* p) {
  uint16_t half;
  memcpy(&half, p, 2);
  const uint32_t bits = (uint32_t)half << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

inline void emulated_dpbf16ps(int c, int a, int b) {
  emulated_shapes(c, a, b);
  for (int m = 0; m < emulated.rows[c]; ++m)
    for (int n = 0; n < emulated.bytes[c] / 4; ++n) {
      float total;
      memcpy(&total, emulated.data[c][m] + 4 * n, 4);
      for (int k = 0; k < emulated.bytes[a] / 4; ++k)
        for (int e = 0; e < 4; e += 2)
          total += emulated_bf16(emulated.data[a][m] + 4 * k + e) * emulated_bf16(emulated.data[b][k] + 4 * n + e);
      memcpy(emulated.data[c][m] + 4 * n, &total, 4);
    }
}

}  // namespace

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#undef _tile_dpbusd
#define _tile_loadconfig(p) emulated_loadconfig(p)
#define _tile_release() emulated_release()
#define _tile_zero(t) emulated_zero(t)
#define _tile_loadd(t, p, stride) emulated_loadd(t, p, stride)
#define _tile_stored(t, p, stride) emulated_stored(t, p, stride)
#define _tile_dpbf16ps(c, a, b) emulated_dpbf16ps(c, a, b)
#define _tile_dpbssd(c, a, b) emulated_integers<int8_t>(c, a, b)
#define _tile_dpbusd(c, a, b) emulated_integers<uint8_t>(c, a, b)
