// The diagonal recurrence h_t = a * h_(t-1) + x_t, forwards or backwards in time.
#pragma once
#include "view.h"

namespace sieve {

// x, out [1, batch, length, width] fp32 with contiguous rows; a [width]; start [batch][width]: the state before the first step.
void diagonal_scan(const View& x, const float* a, const float* start, const View& out, bool reverse, int threads);

}  // namespace sieve
