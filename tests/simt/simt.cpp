#include "simt.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>

namespace simt {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr int kWarp = 32;
constexpr int kIdleRounds = 2000;  // rounds in which every thread only waits, before that counts as a deadlock

enum class State { kReady, kWaiting, kAtBlockBarrier, kAtWarpBarrier, kDone };

// A ucontext starts a fiber on a stack of its own; from then on _setjmp and _longjmp switch, ten times as fast because they
// leave the signal mask alone.
struct Fiber {
  ucontext_t context;
  jmp_buf here;
  bool started = false;
  State state = State::kReady;
};

struct Block {
  unsigned index = 0;
  std::vector<Fiber> fibers;
  std::vector<uint64_t> exchanged;
  std::vector<std::unique_ptr<uint8_t[]>> stacks;
  std::map<const void*, std::vector<uint64_t>> shared;
  int any = 0, any_arrived = 0;
};

Traffic* counted = nullptr;
ucontext_t scheduler;
jmp_buf scheduler_here;
Block* block = nullptr;
unsigned thread = 0;
const std::function<void()>* body = nullptr;

void leave(State state) {
  Fiber& fiber = block->fibers[thread];
  fiber.state = state;
  if (_setjmp(fiber.here) == 0) _longjmp(scheduler_here, 1);
}

void resume(Fiber& fiber) {
  if (_setjmp(scheduler_here) != 0) return;
  if (fiber.started) _longjmp(fiber.here, 1);
  fiber.started = true;
  swapcontext(&scheduler, &fiber.context);
}

void run_thread() {
  (*body)();
  leave(State::kDone);
}

void fail(const std::string& what) {
  if (error.empty()) {
    error = what + " (block " + std::to_string(block->index) + ", thread " + std::to_string(thread) + ")";
  }
}

void start(Block& next, unsigned index, unsigned threads) {
  next.index = index;
  next.fibers.resize(threads);
  next.exchanged.assign(threads, 0);
  next.shared.clear();
  next.any = next.any_arrived = 0;
  while (next.stacks.size() < threads) next.stacks.push_back(std::make_unique_for_overwrite<uint8_t[]>(kStackBytes));
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = next.fibers[t];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = next.stacks[t].get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &scheduler;
    fiber.state = State::kReady;
    fiber.started = false;
    makecontext(&fiber.context, run_thread, 0);
  }
}

std::vector<unsigned> ordered(unsigned count, std::mt19937_64& random) {
  std::vector<unsigned> indices(count);
  std::iota(indices.begin(), indices.end(), 0u);
  if (schedule.order == Order::kDescending) std::reverse(indices.begin(), indices.end());
  if (schedule.order == Order::kShuffled) std::shuffle(indices.begin(), indices.end(), random);
  return indices;
}

// Releases barriers that all the threads they name have reached. True if some thread may run.
bool release(Block& current) {
  bool any_ready = false, all_at_block_barrier = true;
  const unsigned threads = static_cast<unsigned>(current.fibers.size());
  for (unsigned first = 0; first < threads; first += kWarp) {
    const auto begin = current.fibers.begin() + first;
    const auto end = current.fibers.begin() + std::min(first + kWarp, threads);
    const auto at_warp_barrier = [](const Fiber& f) { return f.state == State::kAtWarpBarrier || f.state == State::kDone; };
    if (std::all_of(begin, end, at_warp_barrier)) {
      for (auto fiber = begin; fiber != end; ++fiber) {
        if (fiber->state == State::kAtWarpBarrier) fiber->state = State::kReady;
      }
    }
    for (auto fiber = begin; fiber != end; ++fiber) {
      any_ready |= fiber->state == State::kReady || fiber->state == State::kWaiting;
      all_at_block_barrier &= fiber->state == State::kAtBlockBarrier || fiber->state == State::kDone;
    }
  }
  if (!any_ready && all_at_block_barrier) {
    for (Fiber& fiber : current.fibers) {
      if (fiber.state == State::kAtBlockBarrier) fiber.state = State::kReady, any_ready = true;
    }
  }
  return any_ready;
}

// Runs each thread of a block up to its next barrier. True if one did more than wait.
bool run(Block& current, std::mt19937_64& random) {
  bool progress = false;
  block = &current;
  for (const unsigned t : ordered(static_cast<unsigned>(current.fibers.size()), random)) {
    Fiber& fiber = current.fibers[t];
    if (fiber.state != State::kReady && fiber.state != State::kWaiting) continue;
    thread = t;
    threadIdx = {t, 0, 0};
    blockIdx = {current.index, 0, 0};
    resume(fiber);
    if (!error.empty()) return true;
    progress |= fiber.state != State::kWaiting;
  }
  return progress;
}

bool done(const Block& current) {
  return std::all_of(current.fibers.begin(), current.fibers.end(), [](const Fiber& f) { return f.state == State::kDone; });
}

}  // namespace

void launch(const char* kernel, unsigned blocks, unsigned threads, const std::function<void()>& kernel_body) {
  if (!error.empty()) return;
  std::string name(kernel);
  name = name.substr(0, name.find('<'));
  name.erase(0, name.find_first_not_of('('));
  counted = &traffic[name];
  gridDim = {blocks, 1, 1};
  blockDim = {threads, 1, 1};
  body = &kernel_body;
  std::mt19937_64 random(schedule.seed);
  const std::vector<unsigned> order = ordered(blocks, random);

  static std::vector<std::unique_ptr<Block>> pool;
  const size_t slots = std::min<size_t>(static_cast<size_t>(schedule.resident_blocks), blocks);
  while (pool.size() < slots) pool.push_back(std::make_unique<Block>());
  std::vector<Block*> resident;
  size_t started = 0;
  for (; started < slots; ++started) {
    start(*pool[started], order[started], threads);
    resident.push_back(pool[started].get());
  }
  int idle = 0;
  for (size_t turn = 0; !resident.empty() && error.empty(); ++turn) {
    const size_t slot = (schedule.order == Order::kShuffled ? random() : turn) % resident.size();
    Block& current = *resident[slot];
    idle = run(current, random) ? 0 : idle + 1;
    if (!error.empty()) break;
    if (done(current)) {
      if (started < order.size()) start(current, order[started++], threads);
      else resident.erase(resident.begin() + static_cast<std::ptrdiff_t>(slot));
    } else if (!release(current)) {
      fail("a barrier was reached by only part of a block or warp");
    } else if (idle > kIdleRounds * static_cast<int>(slots)) {
      fail("every resident block waits for another");
    }
  }
  if (!error.empty() && error.find(name) == std::string::npos) error = name + ": " + error;
}

void touch(const void* address, size_t bytes, Access access) {
  if (access != Access::kStore) counted->loaded += static_cast<int64_t>(bytes);
  if (access != Access::kLoad) counted->stored += static_cast<int64_t>(bytes);
  const uint8_t* const first = static_cast<const uint8_t*>(address);
  for (const Buffer& buffer : buffers) {
    if (first >= buffer.begin && first + bytes <= buffer.end) {
      if (access != Access::kLoad && !buffer.writable) break;
      if (reinterpret_cast<uintptr_t>(address) % std::min<size_t>(bytes, 16) != 0 && (bytes & (bytes - 1)) == 0) break;
      return;
    }
  }
  fail("access of " + std::to_string(bytes) + " bytes outside the buffers of the call, misaligned, or to a read-only one");
  leave(State::kDone);  // the scheduler sees the error and never comes back
}

void* shared(const void* key, size_t bytes) {
  auto [found, fresh] = block->shared.try_emplace(key);
  if (fresh) found->second.assign((bytes + 7) / 8 + 1, 0xcdcdcdcdcdcdcdcdull);
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(found->second.data()) + 15) & ~uintptr_t{15});
}

void block_barrier() { leave(State::kAtBlockBarrier); }
void warp_barrier() { leave(State::kAtWarpBarrier); }
void wait() { leave(State::kWaiting); }

int block_or(int value) {
  if (block->any_arrived++ == 0) block->any = 0;
  block->any |= value != 0;
  block_barrier();
  const int result = block->any;
  block->any_arrived = 0;
  block_barrier();
  return result;
}

uint64_t exchange(uint64_t value, int source_lane) {
  block->exchanged[thread] = value;
  warp_barrier();
  const uint64_t result = block->exchanged[(thread & ~31u) + static_cast<unsigned>(source_lane)];
  warp_barrier();
  return result;
}

unsigned ballot(bool value) {
  block->exchanged[thread] = value;
  warp_barrier();
  unsigned result = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane) result |= static_cast<unsigned>(block->exchanged[(thread & ~31u) + lane]) << lane;
  warp_barrier();
  return result;
}

}  // namespace simt
