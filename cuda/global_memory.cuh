// Global memory, reached through Global alone: on a device it costs nothing, in the emulation every byte is counted and
// checked against the buffers of the call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../csrc/core/value_types.h"
#include "platform.cuh"

namespace regtopk {

// Four consecutive entries, loaded and stored as one access of at most 16 bytes (two for fp64).
inline constexpr int kVectorEntries = 4;
template <typename T>
struct alignas(kVectorEntries * sizeof(T) < 16 ? kVectorEntries * sizeof(T) : 16) Vector {
  T entry[kVectorEntries];
};

// T may be const. Values written by other blocks of a running kernel are seen only after the waits of phases.cuh.
template <typename T>
class Global {
  using Value = std::remove_const_t<T>;

 public:
  Global() = default;
  explicit REGTOPK_HOST_DEVICE Global(T* pointer) : pointer_(pointer) {}

  // To a Global of const values, as pointers do.
  template <typename U>
    requires std::is_same_v<const U, T>
  REGTOPK_HOST_DEVICE Global(const Global<U>& other) : pointer_(other.pointer_) {}
  explicit REGTOPK_HOST_DEVICE operator bool() const { return pointer_ != nullptr; }
  REGTOPK_HOST_DEVICE Global offset(size_t index) const { return Global(pointer_ + index); }
  // The bytes from `byte` on as values of another type.
  template <typename U>
  REGTOPK_HOST_DEVICE Global<U> at_byte(size_t byte) const {
    return Global<U>(reinterpret_cast<U*>(pointer_ + byte));
  }

  __device__ Value load(size_t index) const {
    count(index, 1, Kind::kLoad);
    return pointer_[index];
  }
  // Where all lanes of a warp load the same value: one access, which the hardware hands to every lane.
  __device__ Value load_uniform(size_t index) const {
    if (threadIdx.x % 32 == 0) count(index, 1, Kind::kLoad);
    return pointer_[index];
  }
  // Never from a register or a cache of this multiprocessor: for loops that wait.
  __device__ Value load_fresh(size_t index) const {
    count(index, 1, Kind::kLoad);
    return *static_cast<const volatile Value*>(pointer_ + index);
  }
  __device__ void store(size_t index, Value value) const {
    count(index, 1, Kind::kStore);
    pointer_[index] = value;
  }
  // For whoever loads so.
  __device__ void store_fresh(size_t index, Value value) const {
    count(index, 1, Kind::kStore);
    *static_cast<volatile Value*>(pointer_ + index) = value;
  }
  // index is a multiple of kVectorEntries.
  __device__ Vector<Value> load_vector(size_t index) const {
    count(index, kVectorEntries, Kind::kLoad);
    return *reinterpret_cast<const Vector<Value>*>(pointer_ + index);
  }
  __device__ void store_vector(size_t index, const Vector<Value>& vector) const {
    count(index, kVectorEntries, Kind::kStore);
    *reinterpret_cast<Vector<Value>*>(pointer_ + index) = vector;
  }
  __device__ Value add(size_t index, Value value) const {
    count(index, 1, Kind::kUpdate);
    return atomicAdd(pointer_ + index, value);
  }
  __device__ Value take_minimum(size_t index, Value value) const {
    count(index, 1, Kind::kUpdate);
    return atomicMin(pointer_ + index, value);
  }
  __device__ Value take_maximum(size_t index, Value value) const {
    count(index, 1, Kind::kUpdate);
    return atomicMax(pointer_ + index, value);
  }
  __device__ Value set_bits(size_t index, Value bits) const {
    count(index, 1, Kind::kUpdate);
    return atomicOr(pointer_ + index, bits);
  }

 private:
#if defined(__CUDACC__)
  enum class Kind { kLoad, kStore, kUpdate };
  __device__ void count(size_t, size_t, Kind) const {}
#else
  using Kind = simt::Access;
  void count(size_t index, size_t entries, Kind kind) const { simt::touch(pointer_ + index, entries * sizeof(T), kind); }
#endif

  T* pointer_ = nullptr;
  template <typename>
  friend class Global;
};

}  // namespace regtopk
