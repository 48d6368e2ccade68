// What kernels on tile registers (AMX) share: their set-up.
#pragma once
#include "kernels/bf16.h"

#if defined(__AMX_BF16__)

namespace sieve {
namespace SIEVE_LEVEL {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

}  // namespace SIEVE_LEVEL
}  // namespace sieve

#endif
