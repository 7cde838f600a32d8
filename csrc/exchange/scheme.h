// What the schemes that send chosen entries have in common: a worker's payload of a bucket, and what it remembers of it.
#pragma once

#include <chrono>
#include <functional>
#include <vector>

#include "worker.h"

namespace regtopk {

struct Sent {
  at::Tensor payload;  // to be remembered
  at::Tensor message;  // to be sent
};

// Who receives: a worker and its plan for the bucket.
struct Receiver {
  Worker& worker;
  Plan& plan;
  at::Tensor payload;  // what it has sent
};

// Adds the seconds that it lives.
class Stopwatch {
 public:
  explicit Stopwatch(std::atomic<double>& seconds) : seconds_(seconds) {}
  ~Stopwatch() { seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

 private:
  std::atomic<double>& seconds_;
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

Selection selection_of(const Worker& worker, const Plan& plan);
Stamp stamp_of(const Worker& worker, const Plan& plan);
int64_t span_count(const Plan& plan);

// Whether a bucket goes the way of a shared support: a leader's, or all of it.
inline bool is_shared(const Worker& worker, const Plan& plan) { return worker.options.leader || plan.is_dense(); }
// What this step gives of the gradient, clipped and with momentum: the gradient itself without these options, else `room`, which may be
// the gradient's memory. Before anything else is done to the plan.
at::Tensor correct(Worker& worker, Plan& plan, const at::Tensor& gradient, const at::Tensor& room);

// Where compress will put what is sent.
Sent place_for(Plan& plan);
// The payload of this step, in a buffer of the plan, and a place for its message; the gradient is only read. A worker that does not
// `choose` keeps everything for the time being. One that is `absent` contributes nothing this time: all its residuals wait, its history
// ends, and its gradient is zero.
Sent compress(Worker& worker, Plan& plan, const at::Tensor& gradient, bool choose, bool absent);
// The message of a payload that has its values: the payload itself, or its wire form.
void write_message(const Plan& plan, const Sent& sent);

// What a rank sends of a bucket of which k entries are chosen, as the options say, and travel in `wire`.
double bytes_of_chosen(const Worker& worker, const Plan& plan, int64_t k, const Wire& wire);

// An error as other ranks are told of it: without where in the program it was raised.
std::string plain_text(const std::exception& error);

// What an operator finds wrong with received bytes, it says; a user knows the rank and the hook.
void say_who(const Worker& worker, const std::function<void()>& operation);

// Measures an average where the next step's density follows it; `payloads`, [any, bytes], have all entries that are not 0, and k entries
// take `bytes_of` k. Before the average is remembered.
void measure(
    const std::vector<Receiver>& receivers, const at::Tensor& average, const at::Tensor& payloads,
    const std::function<double(int64_t k)>& bytes_of);

// The average has come: keeps what was sent, and counts it with the bytes that it took.
void remember(const Receiver& receiver, const at::Tensor& feedback, double bytes);

// The payload reached nobody: it returns to the residual at the next step, and what the step's other buckets sent with it,
// unless an optimizer steps all the same. Of one without entries there is nothing to return.
void fail(Worker& worker, Plan& plan, const at::Tensor& payload);

}  // namespace regtopk
