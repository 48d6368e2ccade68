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
void channel_scale(const View& key, int64_t b, int64_t h, const uint8_t* part, float* out);
void summarise(const KeyRun& run);
int64_t key_run_scratch(int64_t block_size, int32_t d);
bool integer_tiles();
void expand_codes(const uint8_t* planes, int64_t plane_stride, int32_t sketch_bits, int32_t bits, int64_t keys, int32_t d,
                  int32_t wide, int8_t* out);
void read_steps(const uint16_t* scale, int64_t keys, float by, float* step, float* shift);
void prepare_lanes(const View& q, int64_t b, const int64_t* head_of, const int64_t* query_of, int32_t rows, const float* stretch,
                   bool round, int32_t d, int32_t wide, float* panel, int8_t* codes, float* step, float* norm);
void score_keys(const KeyScore& s);
int64_t key_score_scratch(int64_t block_size, int32_t wide);
void score_blocks(const BlockScore& s);
void largest_share(const float* estimate, int64_t blocks, float unit, float* best);
void largest(const float* estimate, int64_t blocks, float* best);
void mark_above(const float* estimate, int64_t blocks, float margin, uint8_t* marks);
void mark_mass(const float* estimate, int64_t blocks, float unit, float mass, int32_t lanes, uint8_t* marks,
               float* weights);
void mark_largest(float* x, int64_t n, int64_t k, uint8_t* marks);
void row_dots(const RowTask& t);
float row_attend(const RowTask& t, float sink, float* o, void* out, int64_t stride, DType dtype);
void row_slopes(const RowTask& t, float lse, float shift, const float* d_out, float* pull, float* slope);
void row_sum(const RowSource& x, const int32_t* index, const float* weight, int64_t n, bool clean, float* out, float* copy);
void row_bias(const char* bias, int64_t stride, DType dtype, const int32_t* key, int64_t n, float* out);
void top_k(const TopKTile& x);
float top_k_product(uint64_t rank);
void block_bounds(const BlockBounds& x);
void upper_bounds(const BlockBounds& x);

}  // namespace SIEVE_LEVEL
}  // namespace sieve
