#include "offsets.h"
namespace sieve {
void attend_wheel(const OffsetAttention& a, const Wheel&, const View& out, float* lse) { attend_offsets(a, out, lse); }
}
