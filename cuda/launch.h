// The CUDA kernels as functions of raw device pointers and a stream. They allocate nothing, wait for nothing and put all
// their work on the stream, so that they can be captured in a graph; errors that the device finds are left on the device.
//
//   launch_compress   settle · sample · accumulate · finish   as regtopk::compress_ on the CPU
//                     settle · chunks                         with chunks
//                     settle · whole                          where all entries are sent, or a leader chooses
//   launch_aggregate  check · aggregate                       as regtopk::aggregate_
//   launch_measure    measure                                 as regtopk::measure_
//   launch_settle     settle                                  as regtopk::settle_, without spans as regtopk::put_back_, and of a
//                                                             velocity as regtopk::mask_
//   launch_correct    find_zeros · norm · correct             as regtopk::correct_
//   launch_judge      judge                                   as regtopk::judge_
//   launch_to_wire    copy · narrow                           as regtopk::to_wire_
//   launch_from_wire  copy · count · widen                    as regtopk::from_wire_
//   launch_take       from_wire · check · take                as regtopk::take_
//   launch_average_slice  average                             as regtopk::average_slice_
//   launch_spread     join · aggregate                        as regtopk::spread_
//                     join · lay                              of all entries
//   launch_feedback   feedback                                as regtopk::feedback_
//   launch_split      split_parts                             as regtopk::split_
//   launch_mean       mean_parts                              as regtopk::mean_
//   launch_join       join_parts                              as regtopk::join_
//   launch_mark       mark                                    as regtopk::mark_unfilled_
//
// step, plan, k and mu are arguments of the kernels: a captured graph replays those it was captured with.
// A workspace begins with bytes that are zero before the first call that uses it, and that every call leaves zero, whatever
// the bucket. One workspace serves any number of buckets, one call after the other on one stream.
#pragma once

#include <cstdint>

#include "../csrc/core/chunks.h"
#include "../csrc/core/payload.h"
#include "../csrc/core/payload_status.h"
#include "../csrc/core/score.h"
#include "../csrc/core/wire.h"
#if defined(REGTOPK_EMULATED)
#include "simt.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace regtopk {

// Gradients, residuals, payloads and workspaces begin at multiples of this many bytes.
inline constexpr int64_t kAlignment = 16;
inline bool is_misaligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kAlignment != 0; }
// Entries of a bucket are counted in 32 bits.
inline constexpr int64_t kMaxEntries = 0xffffffffll;

// How a bracket around the k-th score is found, and how many entries above its low end are kept for the exact choice.
// It decides speed alone: whatever the bracket, the payload is the same.
struct Sampling {
  int64_t sectors = 0;        // sampled runs of 8 entries; 0: no bracket, every entry is kept if the list holds them
  int64_t rank_high = 0;      // the sample of this rank, from the top, is the high end; 0: there is none
  int64_t rank_low = 0;       // and of this rank the low end; 0: there is none
  int64_t list_capacity = 0;  // entries
};
Sampling sampling_of(int64_t numel, int64_t k);

// The parameters of a bucket, and the small tensors that its stages share (csrc/ops/library.cpp); all null without spans.
struct SpansLaunch {
  const int64_t* ends = nullptr;     // in: [count + 1]
  int64_t count = 0;
  const uint8_t* idle = nullptr;     // in: [count]
  const int64_t* verdict = nullptr;  // in: the entry of sent_round; null where there is none
  int64_t sent_round = -1;
  const uint8_t* applied = nullptr;  // in: [count], or null
  int64_t* counters = nullptr;       // in and out: [3]
};
inline constexpr int64_t kMaxSpans = 65536;
// Of the counters that the operators share.
inline constexpr size_t kTotalRepeated = 0, kTotalDisplaced = 1, kHistoryDropped = 2;

struct CompressLaunch {
  PayloadLayout layout;
  const void* gradient = nullptr;    // in: [J] of the value type
  void* residual = nullptr;          // in and out: [J] of the accumulate type
  uint8_t* payload = nullptr;        // out: layout.bytes
  uint64_t step = 0, plan = 0;
  SpansLaunch spans;                 // as many as layout.spans
  double scale = 1.0;                // of the exchange part, like deed; without spans not used
  uint64_t deed = 0;
  // The last step's own payload or null. Where its header is not that of a payload of this bucket, the payload written has
  // no magic number, so that every receiver rejects it.
  const uint8_t* sent = nullptr;
  int64_t sent_bytes = 0;
  const void* feedback = nullptr;    // in: [feedback_entries], for the entries of `sent`, or null: Top-k
  int64_t feedback_entries = 0;
  Distortion distortion = Distortion::kPrevious;
  double mu = 1.0;
  double decay = 1.0;
  Chunks chunks = {};                // of at most kLargestChunkOfDevice entries
  bool choose = true;                // false: nothing is sent for the time being, as regtopk::compress_ without `choose`
  bool is_whole() const { return !choose || layout.k == layout.numel; }
  Sampling sampling;                 // used where the bucket as a whole chooses
  void* workspace = nullptr;         // compress_workspace_bytes; of these the first kZeroedBytes are zero before and after
};
inline constexpr int64_t kZeroedBytes = 8256 + kMaxSpans / 8;
int64_t compress_workspace_bytes(const PayloadLayout& layout, bool has_feedback, const Sampling& sampling);
cudaError_t launch_compress(const CompressLaunch& arguments, cudaStream_t stream);

// The dense variant, for a bucket whose masked gradient is to be all-reduced, is this with the own payload and N = 1: it
// writes v at the entries sent and 0 elsewhere, in the one write of the bucket that any form of it needs.
struct AggregateLaunch {
  PayloadLayout layout;
  const uint8_t* payloads = nullptr;  // in: [workers, layout.bytes], not trusted
  int64_t workers = 0;
  void* gradient = nullptr;           // out: [J] of the value type; NaN if a payload is not valid
  void* feedback = nullptr;           // out: [feedback_workers, k] of the accumulate type, or null; NaN likewise
  int64_t first_feedback_worker = 0, feedback_workers = 0;
  Distortion distortion = Distortion::kPrevious;
  uint64_t step = 0, plan = 0;        // expected in every header
  const int64_t* span_ends = nullptr;  // in: [layout.spans + 1], or null without spans
  uint8_t* idle = nullptr;            // out: [layout.spans]; not written if a payload is not valid
  // out: the verdict's entry of this round becomes its number where an average is not finite, or a payload not valid; or null
  int64_t* verdict = nullptr;
  int64_t round = -1;
  void* workspace = nullptr;          // aggregate_workspace_bytes; of these the first kAggregateZeroedBytes are zero before and after
  // in and out: the lowest status of all calls so far, kPayloadsValid to begin with; or null. The host may copy it whenever
  // it waits for the stream anyway, and raise the error then.
  unsigned long long* worst_status = nullptr;
};
inline constexpr int64_t kAggregateZeroedBytes = 32;
int64_t aggregate_workspace_bytes(const PayloadLayout& layout);
cudaError_t launch_aggregate(const AggregateLaunch& arguments, cudaStream_t stream);

// Of what launch_aggregate, or launch_spread of the one own payload, has written.
struct MeasureLaunch {
  PayloadLayout layout;
  const uint8_t* payloads = nullptr;  // in: [workers, layout.bytes], not trusted
  int64_t workers = 0;
  const void* gradient = nullptr;     // in: [J] of the value type
  double* squared_norm = nullptr;     // out: [1]
  void* workspace = nullptr;          // measure_workspace_bytes; of these the first kMeasureZeroedBytes are zero before and after
};
inline constexpr int64_t kMeasureZeroedBytes = 64;
int64_t measure_workspace_bytes(const PayloadLayout& layout);
cudaError_t launch_measure(const MeasureLaunch& arguments, cudaStream_t stream);

// Layouts that belong together: WireLayout::of(layout, ...).
struct ToWireLaunch {
  PayloadLayout layout;
  WireLayout wire;
  uint8_t* payload = nullptr;  // in: as launch_compress wrote it; out: its values are what the wire carries
  void* residual = nullptr;    // in and out: [J] of the accumulate type
  uint8_t* bytes = nullptr;    // out: wire.bytes
  void* workspace = nullptr;   // to_wire_workspace_bytes
};
int64_t to_wire_workspace_bytes(const PayloadLayout& layout, const WireLayout& wire);
cudaError_t launch_to_wire(const ToWireLaunch& arguments, cudaStream_t stream);

struct FromWireLaunch {
  PayloadLayout layout;
  WireLayout wire;
  const uint8_t* bytes = nullptr;  // in: [workers, wire.bytes], not trusted
  int64_t workers = 0;
  uint8_t* payloads = nullptr;     // out: [workers, layout.bytes]; without the magic number where the bytes are no wire form
  bool has_values = true;  // false, of one worker: the payload ends where its values would begin, and those of the wire are not read
  void* workspace = nullptr;  // from_wire_workspace_bytes
};
int64_t from_wire_workspace_bytes(const PayloadLayout& layout, const WireLayout& wire, int64_t workers);
cudaError_t launch_from_wire(const FromWireLaunch& arguments, cudaStream_t stream);

// Of a support that a leader has chosen (csrc/core/lead.h).
struct TakeLaunch {
  PayloadLayout layout;
  WireLayout wire;
  const uint8_t* lead = nullptr;  // in: wire.bytes, not trusted; the values are not read
  int64_t leader = 0;
  uint64_t step = 0, plan = 0;  // expected in its header
  // in: as launch_compress without `choose` wrote it; out: with entries, or where the lead is not valid none and kFlagUnfilled.
  uint8_t* payload = nullptr;
  void* residual = nullptr;  // in and out: [J] of the accumulate type
  const int64_t* span_ends = nullptr;  // in: [layout.spans + 1], or null without spans
  const uint8_t* idle = nullptr;  // in: [layout.spans]
  unsigned long long* worst_status = nullptr;  // as of an aggregate
  void* workspace = nullptr;  // that of an aggregate
  void* room = nullptr;  // take_room_bytes
};
int64_t take_room_bytes(const PayloadLayout& layout, const WireLayout& wire);
cudaError_t launch_take(const TakeLaunch& arguments, cudaStream_t stream);

struct AverageSliceLaunch {
  PayloadLayout layout;
  WireLayout wire;
  const uint8_t* rows = nullptr;  // in: [workers, row_bytes], not trusted
  int64_t workers = 0, row_bytes = 0;
  uint64_t step = 0, plan = 0;  // expected in every head
  uint8_t* averages = nullptr;  // out: kMarkBytes, zeros where a head is not valid, and the entries of a row; NaN likewise
  unsigned long long* worst_status = nullptr;
};
cudaError_t launch_average_slice(const AverageSliceLaunch& arguments, cudaStream_t stream);

// What all workers have sent: heads, which launch_average_slice has checked, and averages, which are not trusted.
struct AveragesLaunch {
  const uint8_t* rows = nullptr;  // in: [workers, row_bytes]
  const uint8_t* averages = nullptr;  // in: [workers, averages_bytes], of as many entries each, a multiple of 4
  int64_t workers = 0, row_bytes = 0, averages_bytes = 0;
  uint64_t step = 0;  // expected in every mark
};

struct SpreadLaunch {
  PayloadLayout layout;
  AveragesLaunch received;
  const uint8_t* payload = nullptr;  // in: this worker's own; its values are not read
  void* gradient = nullptr;  // these as of an aggregate
  const int64_t* span_ends = nullptr;
  uint8_t* idle = nullptr;
  int64_t* verdict = nullptr;
  int64_t round = -1;
  unsigned long long* worst_status = nullptr;
  void* workspace = nullptr;  // that of an aggregate
  void* room = nullptr;  // spread_room_bytes
};
int64_t spread_room_bytes(const PayloadLayout& layout);
cudaError_t launch_spread(const SpreadLaunch& arguments, cudaStream_t stream);

struct FeedbackLaunch {
  PayloadLayout layout;
  AveragesLaunch received;
  const uint8_t* payload = nullptr;  // in: this worker's own
  const int64_t* span_ends = nullptr;
  const uint8_t* idle = nullptr;  // in: as launch_spread left it
  Distortion distortion = Distortion::kPrevious;
  void* feedback = nullptr;  // out: [k] of the accumulate type; NaN where averages are not those of the step
};
cudaError_t launch_feedback(const FeedbackLaunch& arguments, cudaStream_t stream);

// Of parts between the ranks of a host (csrc/core/parts.h).
struct PartsLaunch {
  ValueType type = ValueType::kFloat32;
  int64_t numel = 0;             // of the bucket
  const int64_t* ends = nullptr;  // in: [1 + ranks, parameters + 1], of the parameters and of their parts in each row
  int64_t parameters = 0, ranks = 0, row_bytes = 0;
  uint64_t step = 0, plan = 0;   // of every head
};
struct SplitLaunch {
  PartsLaunch parts;
  const void* gradient = nullptr;  // in: [J] of the value type
  uint8_t* rows = nullptr;         // out: [ranks, row_bytes]; what is behind a row's parts is left as it is
  double scale = 1.0;              // of the heads, like deed
  uint64_t deed = 0;
};
cudaError_t launch_split(const SplitLaunch& arguments, cudaStream_t stream);

struct MeanLaunch {
  ValueType type = ValueType::kFloat32;
  const uint8_t* rows = nullptr;  // in: [ranks, row_bytes], not trusted
  int64_t ranks = 0, row_bytes = 0, entries = 0;
  uint64_t step = 0, plan = 0;    // expected in every head, and written like scale and deed
  double scale = 1.0;
  uint64_t deed = 0;
  uint8_t* row = nullptr;         // out: a head and the entries; NaN where a head is not valid
  unsigned long long* found = nullptr;  // out: kPayloadsValid and the lowest status of the heads
};
cudaError_t launch_mean(const MeanLaunch& arguments, cudaStream_t stream);

struct JoinLaunch {
  PartsLaunch parts;
  const uint8_t* rows = nullptr;  // in: [ranks, row_bytes], not trusted
  void* gradient = nullptr;       // out: [J] of the value type; NaN where a head is not valid
  int64_t* verdict = nullptr;     // these as of an aggregate
  int64_t round = -1;
  unsigned long long* worst_status = nullptr;
};
cudaError_t launch_join(const JoinLaunch& arguments, cudaStream_t stream);

struct MarkLaunch {
  uint8_t* message = nullptr;  // in and out: of a header, the flags
  const unsigned long long* found = nullptr;   // in: [2]
  unsigned long long* worst_status = nullptr;  // in and out: [2], or null
};
cudaError_t launch_mark(const MarkLaunch& arguments, cudaStream_t stream);

struct SettleLaunch {
  uint8_t* sent = nullptr;  // in: an own payload; nothing returns where its header is not that of the bucket.
  int64_t sent_bytes = 0;  // out, with spans: the values that returned are 0
  ValueType type = ValueType::kFloat32;
  int64_t numel = 0;
  void* residual = nullptr;  // in and out: [J] of the accumulate type
  SpansLaunch spans;  // none: everything returns
  bool masks = false;  // the residual is a velocity: nothing returns, and what does not return is set to 0
};
cudaError_t launch_settle(const SettleLaunch& arguments, cudaStream_t stream);

struct CorrectLaunch {
  ValueType type = ValueType::kFloat32;
  int64_t numel = 0;
  const void* gradient = nullptr;      // in: [J] of the value type
  void* given = nullptr;               // out: the same; may be the gradient
  void* velocity = nullptr;            // in and out: [J] of the accumulate type, or null
  const int64_t* span_ends = nullptr;  // in: [spans + 1]
  int64_t spans = 0;
  double momentum = 0;
  bool nesterov = false;
  double largest_norm = 0;             // 0: any
  void* workspace = nullptr;           // correct_workspace_bytes; of these the first kCorrectZeroedBytes are zero before and after
};
inline constexpr int64_t kCorrectZeroedBytes = 64 + kMaxSpans / 8;
int64_t correct_workspace_bytes(int64_t numel);
cudaError_t launch_correct(const CorrectLaunch& arguments, cudaStream_t stream);

struct JudgeLaunch {
  const void* values = nullptr;  // in: [numel] of the value type
  int64_t numel = 0;
  ValueType type = ValueType::kFloat32;
  int64_t* verdict = nullptr;  // out: the verdict's entry of the round becomes its number where a value is not finite
  int64_t round = 0;
};
cudaError_t launch_judge(const JudgeLaunch& arguments, cudaStream_t stream);

}  // namespace regtopk
