// The C functions of driver.cpp and their arguments: the launchers of cuda/launch.h for callers that know no C++ of ours.
#pragma once

#include <cstdint>

extern "C" {

struct SamplingNumbers {
  int64_t sectors, rank_high, rank_low, list_capacity;
};

// As SpansLaunch.
struct SpansCall {
  const int64_t* ends;
  int64_t count;
  const uint8_t* idle;
  const int64_t* verdict;
  int64_t sent_round;
  const uint8_t* applied;
  int64_t* counters;
};

struct CompressCall {
  int64_t type, numel, k;
  const void* gradient;
  void* residual;
  uint8_t* payload;
  uint64_t step, plan;
  SpansCall spans;
  double scale;
  uint64_t deed;
  const uint8_t* sent;
  int64_t sent_bytes;
  const void* feedback;
  int64_t feedback_entries, distortion;
  double mu, decay;
  SamplingNumbers sampling;
  int64_t chunk, chunk_k, choose;
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
  const int64_t* span_ends;
  int64_t spans;
  uint8_t* idle;
  int64_t* verdict;
  int64_t round;
  unsigned long long* worst_status;
  void *workspace, *stream;
};

struct MeasureCall {
  int64_t type, numel, k, spans;
  const uint8_t* payloads;
  int64_t workers;
  const void* gradient;
  double* squared_norm;
  void *workspace, *stream;
};

struct SettleCall {
  int64_t type, numel;
  uint8_t* sent;
  int64_t sent_bytes;
  void* residual;
  SpansCall spans;
  int64_t masks;
  void* stream;
};

struct CorrectCall {
  int64_t type, numel;
  const void* gradient;
  void *given, *velocity;
  const int64_t* span_ends;
  int64_t spans;
  double momentum;
  int64_t nesterov;
  double largest_norm;
  void *workspace, *stream;
};

struct JudgeCall {
  int64_t type, numel;
  const void* values;
  int64_t* verdict;
  int64_t round;
  void* stream;
};

struct WireCall {
  int64_t type, wire_type, elias_fano, numel, k, spans, workers;
  uint8_t* payloads;
  void* residual;
  uint8_t* wire;
  void *workspace, *stream;
};

// Of a support that a leader has chosen. `type` and `wire_type` are those of values.
struct TakeCall {
  WireCall wire;  // of the lead; the payload and the residual are this worker's
  int64_t leader;
  uint64_t step, plan;
  const int64_t* span_ends;
  const uint8_t* idle;
  unsigned long long* worst_status;
  void* room;
};

struct AverageSliceCall {
  WireCall wire;  // of these, sizes and types alone
  const uint8_t* rows;
  int64_t row_bytes;
  uint64_t step, plan;
  uint8_t* averages;
  int64_t averages_bytes;
  unsigned long long* worst_status;
  void* stream;
};

// As SpreadLaunch, and where there is feedback as FeedbackLaunch.
struct SpreadCall {
  int64_t type, numel, k, spans;
  const uint8_t *rows, *averages;
  int64_t workers, row_bytes, averages_bytes;
  uint64_t step;
  const uint8_t* payload;
  void* gradient;
  const int64_t* span_ends;
  uint8_t* idle;
  int64_t* verdict;
  int64_t round;
  unsigned long long* worst_status;
  int64_t distortion;
  void* feedback;
  void *workspace, *room, *stream;
};

// Of parts between the ranks of a host.
struct PartsCall {
  int64_t type, numel;
  const int64_t* ends;
  int64_t parameters, ranks, row_bytes;
  uint64_t step, plan;
  double scale;
  uint64_t deed;
  void* gradient;  // of a mean none
  uint8_t* rows;
  uint8_t* row;    // these of a mean
  int64_t entries;
  unsigned long long* found;
  int64_t* verdict;  // these of a join
  int64_t round;
  unsigned long long* worst_status;
  void* stream;
};

int64_t call_payload_bytes(int64_t numel, int64_t k, int64_t type, int64_t spans);
void call_sampling(int64_t numel, int64_t k, SamplingNumbers* out);
int64_t call_zeroed_bytes();
int64_t call_aggregate_workspace(const AggregateCall* call);
int64_t call_compress_workspace(const CompressCall* call);
// An error's text, empty if there was none.
const char* call_compress(const CompressCall* call);
const char* call_aggregate(const AggregateCall* call);
int64_t call_measure_zeroed_bytes();
int64_t call_measure_workspace(const MeasureCall* call);
const char* call_measure(const MeasureCall* call);
const char* call_settle(const SettleCall* call);
int64_t call_correct_zeroed_bytes();
int64_t call_correct_workspace(const CorrectCall* call);
const char* call_correct(const CorrectCall* call);
const char* call_judge(const JudgeCall* call);
int64_t call_wire_bytes(const WireCall* call);
int64_t call_to_wire_workspace(const WireCall* call);
int64_t call_from_wire_workspace(const WireCall* call);
const char* call_to_wire(const WireCall* call);
const char* call_from_wire(const WireCall* call);
int64_t call_take_room(const TakeCall* call);
int64_t call_spread_room(const SpreadCall* call);
const char* call_take(const TakeCall* call);
const char* call_average_slice(const AverageSliceCall* call);
const char* call_spread(const SpreadCall* call);
const char* call_feedback(const SpreadCall* call);
const char* call_split(const PartsCall* call);
const char* call_mean(const PartsCall* call);
const char* call_join(const PartsCall* call);
const char* call_mark(uint8_t* message, int64_t bytes, const unsigned long long* found, unsigned long long* worst_status, void* stream);

}  // extern "C"
