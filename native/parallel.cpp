#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace sieve {

void parallel_for(int64_t items, int threads, const std::function<void(int64_t, int)>& work) {
  const int used = static_cast<int>(std::min<int64_t>(std::max(threads, 1), items));
  if (used <= 1) {
    for (int64_t i = 0; i < items; ++i) work(i, 0);
    return;
  }
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;
  std::mutex guard;
  auto run = [&](int thread) {
    try {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) work(i, thread);
    } catch (...) {
      std::lock_guard<std::mutex> lock(guard);
      if (!failure) failure = std::current_exception();
      next.store(items, std::memory_order_relaxed);
    }
  };
  std::vector<std::thread> others;
  try {
    for (int t = 1; t < used; ++t) others.emplace_back(run, t);
  } catch (const std::system_error&) {
    // the machine gives no more threads: the ones we have do the work
  }
  run(0);
  for (auto& t : others) t.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace sieve
