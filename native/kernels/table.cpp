// The level's table. Every function is defined in a file of this folder, inside the level's namespace.
#include "kernels.h"

#include "kernels/functions.h"

namespace sieve {
namespace SIEVE_LEVEL {

extern const Kernels table;
const Kernels table = {
    attends_bf16(), pack_keys,  pack_keys_bf16, pack_values_bf16, read_rows, attend, attend_bf16,
    tile_scratch,   finish_row, all_finite,     put_row,          gradient,  gradient_scratch,
    attend_offsets, gradient_offsets,
};

}  // namespace SIEVE_LEVEL
}  // namespace sieve
