// Declarations of the level's kernels; see kernels.h for what each does.
#pragma once
#include "kernels.h"

namespace sieve {
namespace SIEVE_LEVEL {

bool multiplies_bf16();
bool bf16_lines();
bool value_panels();
void pack_keys(const View& k, int64_t b, int64_t h, int64_t first, int64_t last, float* out);
void pack_keys_bf16(const View& k, int64_t b, int64_t h, int64_t first, int64_t last, uint16_t* out);
void pack_values_bf16(const View& v, int64_t b, int64_t h, int64_t first, int64_t last, uint16_t* out);
bool ordinary_bf16(const View& x, int64_t b, int64_t h);
void pack_values(const View& v, int64_t b, int64_t h, int64_t first, int64_t last, float* out);
void read_rows(const View& x, int64_t b, int64_t h, int64_t first, int64_t last, int64_t padded, bool clean, float* out);
void attend(const Tile& t);
void attend_part(const Tile& t, bool begins, bool ends);
void attend_bf16(const Tile& t);
int64_t tile_scratch(int32_t d, int32_t dv, bool bf16);
float finish_row(const Tile& t, int row, float sink, void* out, int64_t stride, DType dtype);
bool all_finite(const float* x, int64_t n);
void put_row(const float* x, int64_t n, void* out, int64_t stride, DType dtype);
void attend_lines(const LineTile& t);
void attend_lines_bf16(const LineTile& t);
int64_t lines_scratch(int32_t d, int32_t dv);
void pack_rows_bf16(const View& q, int64_t b, const int64_t* head, const int64_t* query, int rows, uint16_t* out);
void merge(const Tile& t, int parts, float* o, float* m, float* l);
int64_t scan_bytes(int32_t d, int32_t rows);
void pack_scan(const int8_t* q, int32_t d, int32_t rows, int32_t digits, int32_t bits, void* out);
void scan(const Scan& s, int64_t first, int64_t chunks, float* mass, float* norms, float* largest, void* scratch);
int64_t scan_scratch(int32_t d, int32_t rows);
void dot_rows(const float* q, int32_t rows, int32_t d, const void* items, DType dtype, int64_t stride, int64_t count, float* out);
void fold(const float* mass, int64_t n, int64_t each, int64_t rows, float* out);
void row_mass(const float* mass, int64_t n, int64_t rows, float* out);
void best_row(const float* mass, const float* base, int64_t n, int64_t rows, float* out);
void powers(const float* mass, const float* base, int64_t n, int64_t rows, float* out);
void split(const float* upper, const float* lower, const float* level, int64_t n, int64_t rows, float* below, float* above);
void gradient(const TileGradient& g);
int64_t gradient_scratch(int32_t d, int32_t dv);
void row_dots(const RowTask& t);
float row_attend(const RowTask& t, float sink, float* o, void* out, int64_t stride, DType dtype);
void row_slopes(const RowTask& t, float lse, float shift, const float* d_out, float* pull, float* slope);
void row_sum(const RowSource& x, const int32_t* index, const float* weight, int64_t n, bool clean, float* out, float* copy);
void row_bias(const char* bias, int64_t stride, DType dtype, const int32_t* key, int64_t n, float* out);
void top_k(const TopKTile& x);
float top_k_product(uint64_t rank);
void block_bounds(const BlockBounds& x);
void upper_bounds(const BlockBounds& x);
bool ternary_tiles();
int64_t ternary_few_tokens();
int64_t ternary_many_blocks();
int64_t ternary_scratch_floats();
int64_t ternary_table_floats(int64_t groups);
void ternary_tables(const float* x, int64_t groups, int64_t fewest, float* tables);
void ternary_few(const TernaryTask& t);
void ternary_split(const float* x, int64_t stride, int64_t rows, int64_t groups, int64_t parts, uint16_t* out);
void ternary_many(const TernaryTask& t);
float ternary_round(const float* x, int64_t n, int8_t* q);
void ternary_write(const void* sums, bool integer, int64_t n, const float* alpha, int64_t alpha_stride, float scale, float* line,
                   void* out, int64_t stride, DType dtype);
void ternary_few_int8(const TernaryTask& t);
void ternary_many_int8(const TernaryTask& t);
void diagonal_scan(const float* x, int64_t x_step, const float* a, const float* start, float* out, int64_t out_step, int64_t length,
                   int64_t channels);
void channel_scale(const View& key, int64_t b, int64_t h, const uint8_t* part, float* out);
void summarise(const KeyRun& run);
int64_t key_run_scratch(int64_t block_size, int32_t d);
int32_t integer_bits();
bool plain_codes();
void expand_codes(const uint8_t* planes, int64_t plane_stride, int32_t sketch_bits, int32_t bits, int64_t keys, int32_t d,
                  int32_t wide, int8_t* out, int32_t* origin);
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
void bracket_keys(const KeyProof& p);
int64_t bracket_scratch(int64_t block_size, int32_t wide);
void widen(const KeyProof& p);
void weigh(Proof& p);
void weigh_kept(const Proof& p, const float* exact, int64_t first, int64_t last);
void stop_streams(const Proof& p, int32_t lanes, bool ties, uint8_t* marks, int32_t* list);
void attend_offsets(const OffsetTile& t);
void gradient_offsets(const OffsetGradient& g);

}  // namespace SIEVE_LEVEL
}  // namespace sieve
