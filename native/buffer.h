// Scratch memory of a call: 64-byte aligned, uninitialised, freed with its owner. Large pieces are kept for the next call, up
// to a limit, because fresh pages cost more than the work on them.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sieve {

// Asks the system to put memory that nobody has written yet on large pages, where it leaves that to programs: blocks far apart are
// then found without walking through tables of pages. What is smaller than such a page, or around it, stays as it is.
void prefer_huge_pages(void* p, size_t bytes) noexcept;

void* take_memory(size_t bytes);  // throws std::bad_alloc
void give_memory(void* p, size_t bytes) noexcept;

template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count)
      : bytes_(count > 0 ? static_cast<size_t>(count) * sizeof(T) : 0),
        data_(bytes_ ? static_cast<T*>(take_memory(bytes_)) : nullptr) {}
  Buffer(Buffer&& other) noexcept : bytes_(other.bytes_), data_(other.data_) { other.data_ = nullptr; }
  Buffer& operator=(Buffer&& other) noexcept {
    if (data_) give_memory(data_, bytes_);
    bytes_ = other.bytes_;
    data_ = other.data_;
    other.data_ = nullptr;
    return *this;
  }
  ~Buffer() {
    if (data_) give_memory(data_, bytes_);
  }
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  size_t bytes_ = 0;
  T* data_ = nullptr;
};

}  // namespace sieve
