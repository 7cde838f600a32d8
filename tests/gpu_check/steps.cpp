// Steps of two workers through the launchers alone, without torch: what compute-sanitizer and ncu look at.
//
//   steps NUMEL DENSITY TYPE STEPS MISSED        TYPE as in csrc/core/value_types.h; MISSED 1 forces the bracket to miss
//
// Linked with the library of tests/simt/host.py. With REGTOPK_EMULATED the memory is the host's.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#if !defined(REGTOPK_EMULATED)
#include <cuda_runtime.h>
#endif

#include "../../tests/simt/calls.h"

namespace {

#if defined(REGTOPK_EMULATED)
void* allocate(size_t bytes) { return std::aligned_alloc(16, (bytes + 15) / 16 * 16); }
void to_device(void* there, const void* here, size_t bytes) { std::memcpy(there, here, bytes); }
void to_host(void* here, const void* there, size_t bytes) { std::memcpy(here, there, bytes); }
#else
void expect(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "steps: expected CUDA to work, got %s\n", cudaGetErrorString(error));
  std::exit(1);
}
void* allocate(size_t bytes) {
  void* memory = nullptr;
  expect(cudaMalloc(&memory, bytes));
  return memory;
}
void to_device(void* there, const void* here, size_t bytes) { expect(cudaMemcpy(there, here, bytes, cudaMemcpyHostToDevice)); }
void to_host(void* here, const void* there, size_t bytes) { expect(cudaMemcpy(here, there, bytes, cudaMemcpyDeviceToHost)); }
#endif

void expect(const char* error) {
  if (*error == 0) return;
  std::fprintf(stderr, "steps: expected the launchers to run, got %s\n", error);
  std::exit(1);
}

void* zeros(size_t bytes) {
  void* const memory = allocate(bytes);
  to_device(memory, std::vector<uint8_t>(bytes).data(), bytes);
  return memory;
}

// Normal enough, the same in every run.
std::vector<uint8_t> gradient_of(int64_t numel, int64_t type, uint64_t seed) {
  const int64_t size = type == 0 ? 8 : type == 1 ? 4 : 2;
  std::vector<uint8_t> bytes(static_cast<size_t>(numel * size));
  uint64_t state = seed * 0x9e3779b97f4a7c15ull + 1;
  for (int64_t i = 0; i < numel; ++i) {
    double sum = -6;
    for (int j = 0; j < 12; ++j) {
      state = state * 6364136223846793005ull + 1442695040888963407ull;
      sum += static_cast<double>(state >> 11) * 0x1p-53;
    }
    const float value = static_cast<float>(sum);
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (type == 0) std::memcpy(bytes.data() + i * 8, &sum, 8);
    else if (type == 1) std::memcpy(bytes.data() + i * 4, &value, 4);
    // bf16 is the upper half; read as fp16 the same bits are numbers too, or now and then none.
    else
      bytes[static_cast<size_t>(i * 2)] = static_cast<uint8_t>(bits >> 16),
                                    bytes[static_cast<size_t>(i * 2 + 1)] = static_cast<uint8_t>(bits >> 24);
  }
  return bytes;
}

}  // namespace

int main(int count, char** words) {
  if (count != 6) {
    std::fprintf(stderr, "steps: expected NUMEL DENSITY TYPE STEPS MISSED, got %d arguments\n", count - 1);
    return 2;
  }
  const int64_t numel = std::atoll(words[1]), type = std::atoll(words[3]), steps = std::atoll(words[4]);
  const int64_t k = std::max<int64_t>(1, static_cast<int64_t>(std::atof(words[2]) * static_cast<double>(numel) + 0.5)), workers = 2;
  const int64_t wide = type == 0 ? 8 : 4, size = type == 0 ? 8 : type == 1 ? 4 : 2, payload_bytes = call_payload_bytes(numel, k, type, 0);

  void* const gradient = allocate(static_cast<size_t>(numel * size));
  std::vector<void*> residuals, payloads;
  for (int64_t worker = 0; worker < workers; ++worker) residuals.push_back(zeros(static_cast<size_t>(numel * wide)));
  for (int turn = 0; turn < 2; ++turn) payloads.push_back(zeros(static_cast<size_t>(workers * payload_bytes)));
  void* const feedback = zeros(static_cast<size_t>(workers * k * wide));
  void* const status = allocate(8);
  const uint64_t valid = ~0ull;
  to_device(status, &valid, 8);

  CompressCall compress{};
  compress.type = type, compress.numel = numel, compress.k = k;
  compress.choose = 1, compress.mu = compress.decay = compress.scale = 1.0;
  call_sampling(numel, k, &compress.sampling);
  if (std::atoi(words[5]) != 0) compress.sampling.rank_high = compress.sampling.rank_low = 1;
  compress.feedback = feedback;
  compress.workspace = zeros(static_cast<size_t>(call_compress_workspace(&compress)));
  AggregateCall aggregate{};
  aggregate.type = type, aggregate.numel = numel, aggregate.k = k, aggregate.workers = aggregate.feedback_workers = workers;
  aggregate.gradient = gradient, aggregate.feedback = feedback;
  aggregate.workspace = zeros(static_cast<size_t>(call_aggregate_workspace(&aggregate))),
  aggregate.worst_status = static_cast<unsigned long long*>(status);

  MeasureCall measure{};
  measure.type = type, measure.numel = numel, measure.k = k, measure.workers = workers, measure.gradient = gradient;
  measure.squared_norm = static_cast<double*>(allocate(8));
  measure.workspace = zeros(static_cast<size_t>(call_measure_workspace(&measure)));

  for (int64_t step = 0; step < steps; ++step) {
    uint8_t* const now = static_cast<uint8_t*>(payloads[static_cast<size_t>(step % 2)]);
    uint8_t* const before = static_cast<uint8_t*>(payloads[static_cast<size_t>((step + 1) % 2)]);
    for (int64_t worker = 0; worker < workers; ++worker) {
      const std::vector<uint8_t> values = gradient_of(numel, type, static_cast<uint64_t>(worker) + 1);
      to_device(gradient, values.data(), values.size());
      compress.gradient = gradient, compress.residual = residuals[static_cast<size_t>(worker)];
      compress.payload = now + worker * payload_bytes, compress.step = static_cast<uint64_t>(step);
      compress.sent = step == 0 ? nullptr : before + worker * payload_bytes, compress.sent_bytes = step == 0 ? 0 : payload_bytes;
      compress.feedback = step == 0 ? nullptr : static_cast<uint8_t*>(feedback) + worker * k * wide;
      compress.feedback_entries = step == 0 ? 0 : k;
      expect(call_compress(&compress));
    }
    aggregate.payloads = now, aggregate.step = static_cast<uint64_t>(step);
    expect(call_aggregate(&aggregate));
    measure.payloads = now;
    expect(call_measure(&measure));
    SettleCall put_back{};
    put_back.type = type, put_back.numel = numel, put_back.sent = now, put_back.sent_bytes = payload_bytes;
    put_back.residual = residuals[0];
    expect(call_settle(&put_back));
  }
  uint64_t found = 0;
  to_host(&found, status, 8);
  if (found != valid) {
    std::fprintf(stderr, "steps: expected valid payloads, got status %llu\n", static_cast<unsigned long long>(found));
    return 1;
  }
  std::printf(
      "steps: %lld steps of %lld entries of type %lld\n", static_cast<long long>(steps), static_cast<long long>(numel),
      static_cast<long long>(type));
}
