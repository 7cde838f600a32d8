// Kernels that are wrong, each in one way, so that a test can see the emulation notice it; and parts of kernels by themselves, at sizes
// that a bucket would need billions of entries for.
#include "../../cuda/look_back.cuh"
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

// Items of `blocks` blocks, each of which draws one after the other: 0, or one more than the first that got another sum than it has before
// it. Item i has i % 7 and 3 i.
uint32_t fault_sums_before(uint32_t items, uint32_t blocks) {
  using Sums = regtopk::LookBack<64, 2>;
  std::vector<uint64_t> words(2 * items);
  uint32_t tickets = 0, wrong = 0;
  simt::error.clear();
  simt::buffers.push_back({reinterpret_cast<uint8_t*>(words.data()), reinterpret_cast<uint8_t*>(words.data() + words.size()), true});
  simt::launch("sums_before", blocks, 64, [&] {
    static const char key_of_room = 0, key_of_item = 0;
    auto& room = *static_cast<Sums::Shared*>(simt::shared(&key_of_room, sizeof(Sums::Shared)));
    auto& item = *static_cast<uint32_t*>(simt::shared(&key_of_item, sizeof(uint32_t)));
    for (;;) {
      __syncthreads();
      if (threadIdx.x == 0) item = tickets++;
      __syncthreads();
      const uint32_t own = item;
      if (own >= items) return;
      const auto before = Sums{regtopk::Global<uint64_t>(words.data()), room}.before(own, {{own % 7, 3 * uint64_t{own}}});
      uint64_t first = 0;
      for (uint32_t i = 0; i < own; ++i) first += i % 7;
      if (before.of[0] != first || before.of[1] != 3 * (uint64_t{own} * (own - (own > 0)) / 2)) wrong = wrong == 0 ? own + 1 : wrong;
    }
  });
  simt::buffers.clear();
  return simt::error.empty() ? wrong : ~0u;
}

}  // extern "C"
