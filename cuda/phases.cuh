// Phases of one kernel that all blocks go through together, without the host and without asking that all blocks be resident.
//
// Work is given out by tickets, numbered through all phases: phase p owns a run of them, and whoever draws one beyond it
// keeps it for a later phase. A block waits only for phases before that of the ticket it holds, all tickets of those are
// held by blocks that run, and these wait for even earlier phases: so the first unfinished phase always goes on, with any
// number of blocks. The block that finishes the last item of a phase decides the next one alone, then publishes it.
//
// Memory: a block's writes come before its barrier, that before thread 0's __threadfence, and that before its atomic report;
// on the other side thread 0 sees the report, fences, and the block's reads come after the barrier. Order through barriers
// and fences adds up, so one thread's fence serves its block. Nothing here may be loaded through the read-only cache.
#pragma once

#include <cstdint>

#include "workspace.cuh"

namespace regtopk {

struct Phases {
  struct Shared {
    uint32_t ticket, last;
  };
  Global<uint32_t> counters;
  Shared& shared;

  // All threads of the block call these together.
  __device__ uint32_t draw() const {
    __syncthreads();
    if (threadIdx.x == 0) shared.ticket = counters.add(kTicket, 1);
    __syncthreads();
    return shared.ticket;
  }
  // Reports finished items; true in the block that finished the last one of the phase.
  __device__ bool finish_items(uint32_t items, uint32_t items_of_phase) const {
    __syncthreads();
    if (threadIdx.x == 0) {
      shared.last = false;
      if (items > 0) {
        __threadfence();
        shared.last = counters.add(kItemsDone, items) + items == items_of_phase;
        __threadfence();
      }
    }
    __syncthreads();
    return shared.last;
  }
  // Ends a phase, after its last block has written what the next one reads.
  __device__ void publish() const {
    __syncthreads();
    if (threadIdx.x == 0) {
      counters.store(kItemsDone, 0);
      __threadfence();
      counters.add(kPhase, 1);
    }
  }
  __device__ void wait_until(uint32_t phase) const {
    if (threadIdx.x == 0) {
      while (counters.load_fresh(kPhase) < phase) __nanosleep(64);
      __threadfence();
    }
    __syncthreads();
  }
  // Ends the kernel for a block, once it has read what it will read. The last one to leave, after which no block draws or
  // waits, zeroes the counters for the next call.
  __device__ void leave() const {
    if (threadIdx.x != 0) return;
    __threadfence();
    if (counters.add(kLeft, 1) != gridDim.x - 1) return;
    for (unsigned counter = 0; counter < kCounters; ++counter) counters.store(counter, 0);
  }
};

}  // namespace regtopk
