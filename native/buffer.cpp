#include "buffer.h"

#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sieve {

namespace {

constexpr size_t LARGE = size_t{1} << 20;        // pieces from here on are worth keeping
constexpr size_t HUGE_PAGE = size_t{1} << 21;
constexpr size_t KEPT_BYTES = size_t{1} << 26;   // and this much is kept at most

size_t grain(size_t bytes) { return bytes >= LARGE ? HUGE_PAGE : 64; }
size_t rounded(size_t bytes) { return (bytes + grain(bytes) - 1) / grain(bytes) * grain(bytes); }

struct Shelf {
  struct Piece {
    void* data;
    size_t bytes;
  };
  std::mutex guard;
  std::vector<Piece> pieces;
  size_t held = 0;
};

Shelf& shelf() {
  static Shelf* one = new Shelf;  // outlives every thread
  return *one;
}

}  // namespace

void prefer_huge_pages(void* p, size_t bytes) noexcept {
#if defined(__linux__)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + bytes) / HUGE_PAGE * HUGE_PAGE;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

void* take_memory(size_t bytes) {
  const size_t size = rounded(bytes);
  if (bytes >= LARGE) {
    Shelf& s = shelf();
    std::unique_lock<std::mutex> lock(s.guard, std::try_to_lock);  // never waits: a fork may have left it locked
    if (lock)
      for (size_t i = 0; i < s.pieces.size(); ++i)
        if (s.pieces[i].bytes == size) {
          void* found = s.pieces[i].data;
          s.pieces[i] = s.pieces.back();
          s.pieces.pop_back();
          s.held -= size;
          return found;
        }
  }
  void* fresh = std::aligned_alloc(grain(bytes), size);
  if (!fresh) throw std::bad_alloc();
  if (bytes >= LARGE) prefer_huge_pages(fresh, size);
  return fresh;
}

void give_memory(void* p, size_t bytes) noexcept {
  const size_t size = rounded(bytes);
  if (bytes >= LARGE) {
    Shelf& s = shelf();
    std::unique_lock<std::mutex> lock(s.guard, std::try_to_lock);
    if (lock && s.held + size <= KEPT_BYTES && s.pieces.size() < 64) {
      try {
        s.pieces.push_back({p, size});
        s.held += size;
        return;
      } catch (const std::bad_alloc&) {
      }
    }
  }
  std::free(p);
}

}  // namespace sieve
