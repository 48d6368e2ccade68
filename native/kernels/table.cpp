// The level's table. Every function is defined in a file of this folder, inside the level's namespace.
#include "kernels.h"

#include "kernels/functions.h"

namespace sieve {
namespace SIEVE_LEVEL {

extern const Kernels table;
// clang-format off
const Kernels table = {
    multiplies_bf16(), bf16_lines(), value_panels(), pack_keys, pack_values, pack_keys_bf16, pack_values_bf16, ordinary_bf16, read_rows, attend, attend_part, attend_bf16,
    tile_scratch,   finish_row, all_finite,     put_row,
    attend_lines, attend_lines_bf16, lines_scratch, pack_rows_bf16, merge, scan_bytes, pack_scan, scan, scan_scratch,
    dot_rows, fold, row_mass, best_row, powers, split, gradient, gradient_scratch,
    row_dots,       row_attend, row_slopes,     row_sum,          row_bias,
    top_k,          top_k_product, block_bounds, upper_bounds,
    ternary_tiles(), ternary_few_tokens(), ternary_many_blocks(), ternary_scratch_floats(), ternary_table_floats, ternary_tables,
    ternary_few, ternary_split, ternary_many, ternary_round, ternary_write, ternary_few_int8, ternary_many_int8,
    diagonal_scan,
    channel_scale, summarise, key_run_scratch,
    integer_bits(), plain_codes(), expand_codes, read_steps, prepare_lanes, score_keys, key_score_scratch, score_blocks,
    largest_share, largest, mark_above, mark_mass, mark_largest,
    bracket_keys, bracket_scratch, widen, weigh, weigh_kept, stop_streams,
    attend_offsets, gradient_offsets,
};
// clang-format on

}  // namespace SIEVE_LEVEL
}  // namespace sieve
