// Where the process has GNU's OpenMP, as every process with PyTorch does, its threads do the work. They keep spinning for
// milliseconds after each of PyTorch's own operators: threads of ours would share the cores with them, and would have to be
// started besides. Elsewhere, and after fork(), which leaves OpenMP without its threads, a call starts threads and joins them.
#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <fstream>
#include <mutex>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace sieve {

namespace {

using Team = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

#if defined(__linux__)
// Whether this process came from fork() without exec(), by the flag that Linux keeps of it
bool came_from_fork() {
  std::ifstream file("/proc/self/stat");
  std::string line;
  std::getline(file, line);
  std::istringstream fields(line.substr(std::min(line.size(), line.rfind(')') + 1)));
  std::string state;
  long long skipped, flags = 0;
  fields >> state >> skipped >> skipped >> skipped >> skipped >> skipped >> flags;
  return (flags & 0x40) != 0;
}
std::atomic<bool> forked{came_from_fork()};
[[maybe_unused]] const int watching = pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });

// What a `#pragma omp parallel` compiles to, from the runtime that the process has by now; null without one
Team openmp() {
  static std::atomic<Team> known{nullptr};
  if (forked.load(std::memory_order_relaxed)) return nullptr;
  Team team = known.load(std::memory_order_relaxed);
  if (!team) known.store(team = reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel")), std::memory_order_relaxed);
  return team;
}
#else
Team openmp() { return nullptr; }
#endif

class Loop {
 public:
  Loop(int64_t items, const std::function<void(int64_t, int)>& work) : items_(items), work_(work) {}

  // What each thread runs; however many come, every item is done once
  void run() {
    const int thread = threads_.fetch_add(1, std::memory_order_relaxed);
    try {
      for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < items_;) work_(i, thread);
    } catch (...) {
      std::lock_guard<std::mutex> lock(guard_);
      if (!failure_) failure_ = std::current_exception();
      next_.store(items_, std::memory_order_relaxed);
    }
  }
  void finish() const {
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  const int64_t items_;
  const std::function<void(int64_t, int)>& work_;
  std::atomic<int64_t> next_{0};
  std::atomic<int> threads_{0};
  std::exception_ptr failure_;
  std::mutex guard_;
};

}  // namespace

void parallel_for(int64_t items, int threads, const std::function<void(int64_t, int)>& work) {
  const int used = static_cast<int>(std::min<int64_t>(std::max(threads, 1), items));
  if (used <= 1) {
    for (int64_t i = 0; i < items; ++i) work(i, 0);
    return;
  }
  Loop loop(items, work);
  if (const Team team = openmp()) {
    team([](void* loop) { static_cast<Loop*>(loop)->run(); }, &loop, static_cast<unsigned>(used), 0);
    return loop.finish();
  }
  std::vector<std::thread> others;
  try {
    for (int t = 1; t < used; ++t) others.emplace_back([&] { loop.run(); });
  } catch (const std::system_error&) {
    // the machine gives no more threads: the ones we have do the work
  }
  loop.run();
  for (auto& t : others) t.join();
  loop.finish();
}

}  // namespace sieve
