// A backend whose collectives are done when it pleases: it reads and writes the tensors later than a caller may hope, on a thread
// of its own, and completes in an order of its own, or with an error. What is right with it is right with any.
#include <pybind11/pybind11.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/utils/pybind.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <thread>

namespace {

using namespace std::chrono_literals;
using WorkPtr = c10::intrusive_ptr<c10d::Work>;

class LateWork : public c10d::Work {
 public:
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override { return future_; }
  bool isCompleted() override { return future_->completed(); }

 private:
  const c10::intrusive_ptr<c10::ivalue::Future> future_ =
      c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()));
};

class LateBackend : public c10d::Backend {
 public:
  // `inner` does the work. `way`: late, reversed, or failing, which is late and ends the `failing`-th with an error.
  LateBackend(c10::intrusive_ptr<c10d::Backend> inner, std::string way, int64_t failing)
      : Backend(inner->getRank(), inner->getSize()), inner_(std::move(inner)), way_(std::move(way)), failing_(failing) {}
  ~LateBackend() override {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }

  const std::string getBackendName() const override { return "late"; }

  WorkPtr _allgather_base(at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions&) override {
    return later([this, output, input]() mutable {
// torch 2.14 renamed it.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
      return inner_->_allgather_base(output, input);
#pragma GCC diagnostic pop
    });
  }
  WorkPtr allreduce(std::vector<at::Tensor>& tensors, const c10d::AllreduceOptions&) override {
    return later([this, tensors]() mutable { return inner_->allreduce(tensors); });
  }
  WorkPtr broadcast(std::vector<at::Tensor>& tensors, const c10d::BroadcastOptions& options) override {
    return later([this, tensors, options]() mutable { return inner_->broadcast(tensors, options); });
  }
  WorkPtr alltoall_base(
      at::Tensor& output, at::Tensor& input, std::vector<int64_t>& outputs, std::vector<int64_t>& inputs,
      const c10d::AllToAllOptions&) override {
    return later([this, output, input, outputs, inputs]() mutable { return inner_->alltoall_base(output, input, outputs, inputs); });
  }

 private:
  struct Task {
    std::function<WorkPtr()> begin;
    c10::intrusive_ptr<LateWork> work;
  };

  WorkPtr later(std::function<WorkPtr()> begin) {
    auto work = c10::make_intrusive<LateWork>();
    {
      const std::lock_guard lock(mutex_);
      tasks_.push_back({std::move(begin), work});
    }
    changed_.notify_all();
    return work;
  }

  void run() {
    int64_t number = 0;
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [&] { return stopping_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      // Whoever reuses a tensor too early has the time to do it now.
      while (changed_.wait_for(lock, 10ms) == std::cv_status::no_timeout && !stopping_) {
      }
      std::deque<Task> tasks = std::move(tasks_);
      tasks_.clear();
      lock.unlock();
      for (const Task& task : tasks) task.begin()->wait();  // in the order of issue, which all ranks share
      std::this_thread::sleep_for(5ms);
      const auto complete = [&](const Task& task) {
        if (way_ == "failing" && number++ == failing_) {
          task.work->getFuture()->setError(std::make_exception_ptr(std::runtime_error("the network is gone")));
        } else {
          task.work->getFuture()->markCompleted(c10::IValue(std::vector<at::Tensor>()));
        }
      };
      if (way_ == "reversed") std::for_each(tasks.rbegin(), tasks.rend(), complete);
      else std::for_each(tasks.begin(), tasks.end(), complete);
      tasks.clear();
      lock.lock();
    }
  }

  const c10::intrusive_ptr<c10d::Backend> inner_;
  const std::string way_;
  const int64_t failing_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Task> tasks_;
  bool stopping_ = false;
  std::thread thread_{&LateBackend::run, this};
};

}  // namespace

PYBIND11_MODULE(late_backend, module) {
  pybind11::module_::import("torch._C._distributed_c10d");
  module.def("make", [](c10::intrusive_ptr<c10d::Backend> inner, const std::string& way, int64_t failing) {
    return c10::intrusive_ptr<c10d::Backend>(c10::make_intrusive<LateBackend>(std::move(inner), way, failing));
  });
}
