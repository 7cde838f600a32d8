// The C functions of driver.cpp and their arguments: the launchers of cuda/launch.h for callers that know no C++ of ours.
#pragma once

#include <cstdint>

extern "C" {

struct SamplingNumbers {
  int64_t sectors, rank_high, rank_low, list_capacity;
};

struct CompressCall {
  int64_t type, numel, k;
  const void* gradient;
  void* residual;
  uint8_t* payload;
  uint64_t step, plan;
  const uint8_t* sent;
  int64_t sent_bytes;
  const void* feedback;
  int64_t feedback_entries, distortion;
  double mu;
  SamplingNumbers sampling;
  void *workspace, *stream;
};

struct AggregateCall {
  int64_t type, numel, k;
  const uint8_t* payloads;
  int64_t workers;
  void* gradient;
  void* feedback;
  int64_t first_feedback_worker, feedback_workers, distortion;
  uint64_t step, plan;
  unsigned long long* worst_status;
  void *workspace, *stream;
};

int64_t call_payload_bytes(int64_t numel, int64_t k, int64_t type);
void call_sampling(int64_t numel, int64_t k, SamplingNumbers* out);
int64_t call_zeroed_bytes();
int64_t call_compress_workspace(const CompressCall* call);
// An error's text, empty if there was none.
const char* call_compress(const CompressCall* call);
const char* call_aggregate(const AggregateCall* call);
const char* call_put_back(int64_t type, int64_t numel, const uint8_t* payload, int64_t payload_bytes, void* residual, void* stream);

}  // extern "C"
