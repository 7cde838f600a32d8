// What the kernel of settle.cu reads and writes: by itself, or as the first of a compress.
#pragma once

#include <cstdint>

#include "bucket_spans.cuh"
#include "launch.h"
#include "payload_reader.cuh"
#include "span_marks.cuh"

namespace regtopk {

template <typename T>
struct SettleDevice {
  using Accumulate = typename Traits<T>::Accumulate;
  explicit SettleDevice(const PayloadLayout& bucket) : layout(bucket) {}

  PayloadLayout layout;  // of the payload that the compress writes
  SentPayload<T> sent;
  Global<uint8_t> sent_again;  // the same bytes, to zero the values that return, or null
  Global<Accumulate> residual;
  DeviceSpans spans;  // none: everything returns
  Global<const uint8_t> idle, applied;
  Global<unsigned long long> counters;

  bool masks = false;  // the residual is a velocity, and what does not return is set to 0 there

  SpanMarks<T> marks;  // none: nothing is found out and nothing of the following is used
  Global<uint8_t> payload;
  double scale = 1.0;
  uint64_t deed = 0;
  Global<uint32_t> done;      // the counters of the compress
  Global<uint32_t> idle_now;  // a bit per span
  Global<uint32_t> any_idle;
  Global<uint32_t> first_span;  // of each block tile

  void set_spans(const SpansLaunch& of_launch) {
    sent.verdict = Global(of_launch.verdict);
    sent.round = of_launch.sent_round;
    spans = {Global(of_launch.ends), static_cast<uint32_t>(of_launch.count), static_cast<uint32_t>(sent.numel)};
    idle = Global(of_launch.idle);
    applied = Global(of_launch.applied);
    counters = Global(reinterpret_cast<unsigned long long*>(of_launch.counters));
  }
};

template <typename T>
void launch_settle(const SettleDevice<T>& device, cudaStream_t stream);

}  // namespace regtopk
