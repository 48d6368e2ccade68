// The level's table. Every function is defined in a file of this folder, inside the level's namespace.
#include "kernels.h"

#include "kernels/functions.h"

namespace sieve {
namespace SIEVE_LEVEL {

extern const Kernels table;
const Kernels table = {
    attends_bf16(), pack_keys,  pack_keys_bf16, pack_values_bf16, read_rows, attend, attend_bf16,
    tile_scratch,   finish_row, all_finite,     put_row,
    attend_lines,   attend_lines_bf16, lines_scratch, pack_rows_bf16, merge, scan_bytes, pack_scan, scan, scan_scratch,
    dot_rows, fold, row_mass, best_row, powers, split, gradient, gradient_scratch,
};

}  // namespace SIEVE_LEVEL
}  // namespace sieve
