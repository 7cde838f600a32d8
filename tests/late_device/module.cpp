// What Python has of the device, and collectives in the order of its streams, as NCCL's: a call puts them on a stream of their own behind the
// current one, and returns a future that is complete, for whoever works on a stream. gloo moves the bytes.
#include <pybind11/pybind11.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <utility>
#include <vector>

#include <c10/core/StreamGuard.h>

#include "streams.h"

namespace late {

at::Tensor memory_on_host(const at::Tensor& tensor);
StreamId current_stream();
c10::Device device();
c10::Stream stream_as_torch(StreamId stream);

namespace {

using Tensors = std::vector<at::Tensor>;
using WorkPtr = c10::intrusive_ptr<c10d::Work>;

Tensors on_host(const Tensors& tensors) {
  Tensors host;
  for (const at::Tensor& tensor : tensors) host.push_back(memory_on_host(tensor));
  return host;
}

class StreamWork final : public c10d::Work {
 public:
  StreamWork(StreamId stream, Tensors results)
      : future_(
            c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()), std::vector<c10::Device>{device()})),
        end_(mark(stream)) {
    const c10::StreamGuard guard(stream_as_torch(stream));
    future_->markCompleted(c10::IValue(std::move(results)));
  }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override { return future_; }
  bool isCompleted() override { return has_passed(end_); }
  bool isSuccess() const override { return true; }
  bool wait(std::chrono::milliseconds) override {
    wait_on(current_stream(), end_);
    return true;
  }
  void synchronize() override { wait(kNoTimeout); }

 private:
  const c10::intrusive_ptr<c10::ivalue::Future> future_;
  const MarkPtr end_;
};

class StreamBackend final : public c10d::Backend {
 public:
  explicit StreamBackend(c10::intrusive_ptr<c10d::Backend> gloo) : Backend(gloo->getRank(), gloo->getSize()), gloo_(std::move(gloo)) {}
  ~StreamBackend() override { finish(stream_); }
  const std::string getBackendName() const override { return "streams"; }

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"  // torch 2.14 renamed some
  WorkPtr _allgather_base(at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& options) override {
    return on_stream({output}, [gloo = gloo_, out = memory_on_host(output), in = memory_on_host(input), options]() mutable {
      return gloo->_allgather_base(out, in, options);
    });
  }
#pragma GCC diagnostic pop
  WorkPtr allgather(std::vector<Tensors>& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override {
    std::vector<Tensors> host;
    for (const Tensors& each : outputs) host.push_back(on_host(each));
    return on_stream(
        outputs.front(), [gloo = gloo_, host, in = on_host(inputs), options]() mutable { return gloo->allgather(host, in, options); });
  }
  WorkPtr allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    return on_stream(tensors, [gloo = gloo_, host = on_host(tensors), options]() mutable { return gloo->allreduce(host, options); });
  }
  WorkPtr broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
    return on_stream(tensors, [gloo = gloo_, host = on_host(tensors), options]() mutable { return gloo->broadcast(host, options); });
  }
  WorkPtr alltoall_base(
      at::Tensor& output, at::Tensor& input, std::vector<int64_t>& outputs, std::vector<int64_t>& inputs,
      const c10d::AllToAllOptions& options) override {
    return on_stream(
        {output}, [gloo = gloo_, out = memory_on_host(output), in = memory_on_host(input), outputs, inputs, options]() mutable {
          return gloo->alltoall_base(out, in, outputs, inputs, options);
        });
  }
  WorkPtr barrier(const c10d::BarrierOptions& options) override { return gloo_->barrier(options); }

 private:
  template <typename Begin>
  WorkPtr on_stream(Tensors results, Begin begin) {
    wait_on(stream_, mark(current_stream()));
    put(stream_, [begin = std::move(begin)]() mutable { begin()->wait(); });
    return c10::make_intrusive<StreamWork>(stream_, std::move(results));
  }

  const c10::intrusive_ptr<c10d::Backend> gloo_;
  const StreamId stream_ = make_stream(kOfCollectives);
};

}  // namespace
}  // namespace late

PYBIND11_MODULE(late_device, module) {
  pybind11::module_::import("torch._C._distributed_c10d");
  using pybind11::gil_scoped_release;
  module.def("backend", [](c10::intrusive_ptr<c10d::Backend> gloo) {
    return c10::intrusive_ptr<c10d::Backend>(c10::make_intrusive<late::StreamBackend>(std::move(gloo)));
  });
  module.def("set_pace", [](const std::string& kind, int64_t microseconds) {
    late::set_pace(kind == "main" ? late::kMain : kind == "pool" ? late::kOfPool : late::kOfCollectives, microseconds);
  });
  module.def("finish_and_check_memory", [] {
    const gil_scoped_release released;
    late::finish_all();
    late::check_memory();
  });
}
