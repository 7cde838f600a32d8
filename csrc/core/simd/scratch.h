// Memory that a call needs for a moment, given back to the system when it ends.
//
// The heap would keep it for the process, and each thread has a heap of its own: at 25 M entries as much again as the
// payloads that are allocated after it. Small arrays do come from the heap, which is faster.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#define REGTOPK_MAPS_MEMORY
#endif

namespace regtopk {

class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(int64_t bytes) : bytes_(static_cast<size_t>(bytes)) {
#if defined(REGTOPK_MAPS_MEMORY)
    if (is_mapped()) {
      data_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (data_ == MAP_FAILED) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
      // Touching megabytes page by page takes as long as filling them.
      if (bytes_ >= size_t{4} << 20) madvise(data_, bytes_, MADV_HUGEPAGE);
#endif
      return;
    }
#endif
    data_ = std::malloc(bytes_ + 1);
    if (data_ == nullptr) throw std::bad_alloc();
  }
  Scratch(Scratch&& other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_) {}
  Scratch& operator=(Scratch&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Scratch() {
    if (data_ == nullptr) return;
#if defined(REGTOPK_MAPS_MEMORY)
    if (is_mapped()) {
      munmap(data_, bytes_);
      return;
    }
#endif
    std::free(data_);
  }

  // The elements of an array that begins `offset` bytes into the memory; not initialised.
  template <typename Element>
  Element* array(int64_t offset = 0) const {
    return reinterpret_cast<Element*>(static_cast<std::byte*>(data_) + offset);
  }

 private:
  bool is_mapped() const { return bytes_ >= size_t{1} << 18; }

  void* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace regtopk
