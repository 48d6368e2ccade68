// The largest eigenvalue of a block's error rows, rounded outward; see bounds.py.
#pragma once
#include "kernels.h"

namespace sieve {
namespace SIEVE_LEVEL {

int64_t spectral_scratch(int64_t block_size, int32_t d);  // floats
// At least ||E||_2^2 of the n rows [n][wide] of a block of `size` keys: tr(G^8)^(1/8), G their Gram matrix.
float largest_eigenvalue(const float* rows, int n, int size, int d, int wide, float* scratch);

}  // namespace SIEVE_LEVEL
}  // namespace sieve
