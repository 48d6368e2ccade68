// Declarations of the level's kernels; see kernels.h for what each does.
#pragma once
#include "kernels.h"

namespace sieve {
namespace SIEVE_LEVEL {

bool attends_bf16();
void pack_keys(const View& k, int64_t b, int64_t h, int64_t first, int64_t last, float* out);
void pack_keys_bf16(const View& k, int64_t b, int64_t h, int64_t first, int64_t last, uint16_t* out);
void pack_values_bf16(const View& v, int64_t b, int64_t h, int64_t first, int64_t last, uint16_t* out);
void read_rows(const View& x, int64_t b, int64_t h, int64_t first, int64_t last, int64_t padded, bool clean, float* out);
void attend(const Tile& t);
void attend_bf16(const Tile& t);
int64_t tile_scratch(int32_t d, int32_t dv, bool bf16);
float finish_row(const Tile& t, int row, float sink, void* out, int64_t stride, DType dtype);
bool all_finite(const float* x, int64_t n);
void put_row(const float* x, int64_t n, void* out, int64_t stride, DType dtype);
void gradient(const TileGradient& g);
int64_t gradient_scratch(int32_t d, int32_t dv);
void attend_offsets(const OffsetTile& t);
void gradient_offsets(const OffsetGradient& g);

}  // namespace SIEVE_LEVEL
}  // namespace sieve
