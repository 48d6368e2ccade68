// Threads for one call.
#pragma once
#include <cstdint>
#include <functional>

namespace sieve {

// Runs work(item, thread) for every item in 0..items-1 on up to `threads` threads; items are handed out in order.
// The first exception is rethrown here once every thread has stopped. Concurrent calls and calls after fork() need no care.
void parallel_for(int64_t items, int threads, const std::function<void(int64_t item, int thread)>& work);

}  // namespace sieve
