// The extension module: the only file that sees Python.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/distributed/c10d/reducer.hpp>
#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <algorithm>
#include <mutex>

#include "exchange/exchange.h"
#include "exchange/local_exchange.h"
#include "ops/operators.h"

namespace py = pybind11;

namespace regtopk {
namespace {

// The native way into the exchange, without Python in the backward pass.
class ExchangeHook : public c10d::CppCommHookInterface<std::shared_ptr<Exchange>> {
 public:
  using CppCommHookInterface::CppCommHookInterface;
  Exchange::FuturePtr runHook(c10d::GradBucket& bucket) override { return state_->run(bucket); }
};

// Every exchange that may still have a thread, to be stopped before the interpreter ends.
std::mutex open_exchanges_mutex;
std::vector<std::weak_ptr<Exchange>> open_exchanges;

// Ending an exchange joins its thread, and that thread may be running a Python callback: the GIL must be free.
void delete_without_gil(Exchange* exchange) {
  if (Py_IsInitialized() && PyGILState_Check()) {
    const py::gil_scoped_release no_gil;
    delete exchange;
  } else {
    delete exchange;
  }
}

std::shared_ptr<Exchange> open_exchange(
    const c10::intrusive_ptr<c10d::ProcessGroup>& payload_group, const c10::intrusive_ptr<c10d::ProcessGroup>& control_group,
    const Options& options, double timeout_seconds, Exchange::Scale scale) {
  const auto timeout = std::chrono::milliseconds(static_cast<int64_t>(timeout_seconds * 1000));
  std::shared_ptr<Exchange> exchange(new Exchange(payload_group, control_group, options, timeout, std::move(scale)), &delete_without_gil);
  const std::lock_guard lock(open_exchanges_mutex);
  std::erase_if(open_exchanges, [](const auto& weak) { return weak.expired(); });
  open_exchanges.push_back(exchange);
  return exchange;
}

void shutdown_all() {
  std::vector<std::shared_ptr<Exchange>> exchanges;
  {
    const std::lock_guard lock(open_exchanges_mutex);
    for (const auto& weak : open_exchanges) {
      if (auto exchange = weak.lock()) exchanges.push_back(std::move(exchange));
    }
    open_exchanges.clear();
  }
  for (const auto& exchange : exchanges) exchange->shutdown();
}

py::dict to_dict(const Statistics& statistics) {
  py::dict result;
  result["steps"] = statistics.steps;
  result["void_steps"] = statistics.void_steps;
  result["rebuilds"] = statistics.rebuilds;
  result["history_dropped"] = statistics.history_dropped;
  result["dense_buckets"] = statistics.dense_buckets;
  result["entries"] = statistics.entries;
  result["sent_entries"] = statistics.sent_entries;
  result["repeated"] = statistics.repeated;
  result["displaced"] = statistics.displaced;
  result["bytes_sent"] = statistics.bytes_sent;
  result["bytes_dense"] = statistics.bytes_dense;
  result["compress_seconds"] = statistics.compress_seconds;
  result["exchange_seconds"] = statistics.exchange_seconds;
  result["aggregate_seconds"] = statistics.aggregate_seconds;
  return result;
}

// Pieces travel as {key: (residual, sent_index, sent_value, feedback)}, None for what is not there.
using PieceTuple = std::tuple<at::Tensor, std::optional<at::Tensor>, std::optional<at::Tensor>, std::optional<at::Tensor>>;

std::unordered_map<ParameterKey, PieceTuple> export_pieces(Worker& worker) {
  const auto optional = [](const at::Tensor& tensor) { return tensor.defined() ? std::optional(tensor) : std::nullopt; };
  std::unordered_map<ParameterKey, PieceTuple> result;
  for (const auto& [key, piece] : worker.export_pieces()) {
    result[key] = {piece.residual, optional(piece.sent_index), optional(piece.sent_value), optional(piece.feedback)};
  }
  return result;
}

void import_pieces(Worker& worker, const std::unordered_map<ParameterKey, PieceTuple>& tuples, int64_t step) {
  std::unordered_map<ParameterKey, Piece> pieces;
  for (const auto& [key, tuple] : tuples) {
    const auto& [residual, sent_index, sent_value, feedback] = tuple;
    pieces[key] = {residual, sent_index.value_or(at::Tensor()), sent_value.value_or(at::Tensor()), feedback.value_or(at::Tensor())};
  }
  worker.import_pieces(std::move(pieces));
  worker.set_step(step);
}

}  // namespace
}  // namespace regtopk

PYBIND11_MODULE(_C, module) {
  using namespace regtopk;
  using release_gil = py::call_guard<py::gil_scoped_release>;
  py::module_::import("torch._C._distributed_c10d");

  module.attr("torch_version") = TORCH_VERSION;
  module.def("payload_bytes", [](int64_t numel, int64_t k, const py::object& dtype) {
    return payload_bytes(numel, k, reinterpret_cast<THPDtype*>(dtype.ptr())->scalar_type);
  });
  // Reads REGTOPK_CPU on the first call; ValueError where it names no instruction set of this machine.
  module.def("cpu_variant", [] { return name_of(cpu_variant()); });
  module.def("set_cpu_variant", &set_cpu_variant);
  module.def("available_cpu_variants", &available_cpu_variants);
  module.def("force_bracket", &force_bracket);
  module.def("shutdown_all", &shutdown_all, release_gil());
  // The key under which the state of a parameter is kept.
  module.def("parameter_key", [](const at::Tensor& parameter) { return reinterpret_cast<ParameterKey>(parameter.unsafeGetTensorImpl()); });

  py::class_<Options>(module, "Options")
      .def(py::init([](bool regularised, double density, double mu, std::string distortion) {
             return Options{regularised, density, mu, std::move(distortion)};
           }),
           py::kw_only(), py::arg("regularised"), py::arg("density"), py::arg("mu"), py::arg("distortion"));

  py::class_<Exchange, std::shared_ptr<Exchange>>(module, "Exchange")
      .def(py::init(&open_exchange), py::arg("payload_group"), py::arg("control_group"), py::arg("options"), py::arg("timeout_seconds"),
           py::arg("scale"))
      .def("run", [](Exchange& exchange, c10d::GradBucket& bucket) {
        Exchange::FuturePtr future;
        {
          const py::gil_scoped_release no_gil;
          future = exchange.run(bucket);
        }
        return std::make_shared<torch::jit::PythonFutureWrapper>(future);
      })
      .def("register_on", [](const std::shared_ptr<Exchange>& exchange, c10d::Reducer& reducer) {
        reducer.register_comm_hook(std::make_unique<ExchangeHook>(exchange));
      })
      .def("set_dense", &Exchange::set_dense)
      .def_property_readonly("dense", &Exchange::dense)
      .def("statistics", [](const Exchange& exchange) { return to_dict(exchange.statistics()); })
      .def("residual_norm", [](Exchange& exchange) { return exchange.idle_worker().residual_norm(); }, release_gil())
      .def("step", [](Exchange& exchange) { return exchange.idle_worker().step(); }, release_gil())
      .def("export_pieces", [](Exchange& exchange) { return export_pieces(exchange.idle_worker()); }, release_gil())
      .def("import_pieces",
           [](Exchange& exchange, const std::unordered_map<ParameterKey, PieceTuple>& pieces, int64_t step) {
             import_pieces(exchange.idle_worker(), pieces, step);
           },
           release_gil())
      .def("shutdown", &Exchange::shutdown, release_gil());

  py::class_<LocalExchange>(module, "LocalExchange")
      .def(py::init<Options, int64_t>())
      .def("step", &LocalExchange::step, release_gil())
      .def("statistics", [](LocalExchange& exchange, int64_t rank) { return to_dict(exchange.worker(rank).statistics()); })
      .def("residual_norm", [](LocalExchange& exchange, int64_t rank) { return exchange.worker(rank).residual_norm(); }, release_gil())
      .def("last_step", [](LocalExchange& exchange, int64_t rank) { return exchange.worker(rank).step(); })
      .def("export_pieces", [](LocalExchange& exchange, int64_t rank) { return export_pieces(exchange.worker(rank)); }, release_gil())
      .def("import_pieces",
           [](LocalExchange& exchange, int64_t rank, const std::unordered_map<ParameterKey, PieceTuple>& pieces, int64_t step) {
             import_pieces(exchange.worker(rank), pieces, step);
           },
           release_gil());
}
