// Kernels that are wrong, each in one way, so that a test can see the emulation notice it.
#include "simt.h"

namespace {

uint32_t memory[64];

void touch(const uint32_t* address, simt::Access access) { simt::touch(address, sizeof *address, access); }

const char* run(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
  simt::error.clear();
  simt::buffers.push_back({reinterpret_cast<uint8_t*>(memory), reinterpret_cast<uint8_t*>(memory + 32), true});
  simt::buffers.push_back({reinterpret_cast<uint8_t*>(memory + 32), reinterpret_cast<uint8_t*>(memory + 64), false});
  simt::launch("faulty_kernel", blocks, threads, kernel);
  simt::buffers.clear();
  return simt::error.c_str();
}

}  // namespace

extern "C" {

const char* fault_store_outside() {
  return run(1, 32, [] { touch(memory + 64, simt::Access::kStore); });
}
const char* fault_store_to_read_only() {
  return run(1, 32, [] { touch(memory + 40, simt::Access::kStore); });
}
const char* fault_barrier_of_half_a_block() {
  return run(1, 64, [] {
    if (threadIdx.x < 40) __syncthreads();
    else __syncwarp();
  });
}
const char* fault_wait_for_nothing() {
  return run(2, 32, [] {
    while (true) __nanosleep(1);
  });
}
// Shared memory that nobody wrote is not zero.
uint32_t fault_unwritten_shared_memory() {
  uint32_t seen = 0;
  static const char key = 0;
  run(1, 1, [&] { seen = *static_cast<uint32_t*>(simt::shared(&key, 4)); });
  return seen;
}
// The block that runs last decides: with one schedule another than with another.
uint32_t fault_last_block_wins() {
  uint32_t last = 0;
  run(8, 32, [&] { last = blockIdx.x; });
  return last;
}

}  // extern "C"
