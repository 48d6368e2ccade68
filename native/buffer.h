// Scratch memory of a call: 64-byte aligned, freed with its owner, large ones on huge pages where the system has them.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sieve {

template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) {
    if (count <= 0) return;
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    const size_t grain = bytes >= (1u << 22) ? 1u << 21 : 64;
    data_ = static_cast<T*>(std::aligned_alloc(grain, (bytes + grain - 1) / grain * grain));
    if (!data_) throw std::bad_alloc();
#if defined(__linux__)
    if (grain > 64) madvise(data_, bytes, MADV_HUGEPAGE);
#endif
  }
  Buffer(Buffer&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  Buffer& operator=(Buffer&& other) noexcept {
    std::free(data_);
    data_ = other.data_;
    other.data_ = nullptr;
    return *this;
  }
  ~Buffer() { std::free(data_); }
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_ = nullptr;
};

}  // namespace sieve
