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

#include "core/cpu_variant.h"
#include "frontends/ddp.h"
#include "frontends/local.h"
#include "frontends/tensors.h"
#include "ops/operators.h"
#include "transport/gloo.h"
#include "transport/stream.h"

namespace py = pybind11;

namespace regtopk {
namespace {

// The native way into the exchange, without Python in the backward pass.
class ExchangeHook : public c10d::CppCommHookInterface<std::shared_ptr<GroupExchange>> {
 public:
  using CppCommHookInterface::CppCommHookInterface;
  GroupExchange::FuturePtr runHook(c10d::GradBucket& bucket) override { return run(*state_, bucket); }
};

// The way in from Python: the same future, but of a Python object, as DDP's Python hook asserts. The object is made here, so
// that completing the future needs no GIL, and an error stays the error that it is.
std::shared_ptr<torch::jit::PythonFutureWrapper> run_from_python(GroupExchange& exchange, c10d::GradBucket& bucket) {
  GroupExchange::FuturePtr done;
  {
    const py::gil_scoped_release no_gil;
    done = run(exchange, bucket);
  }
  const at::Tensor& buffer = bucket.getBufferRef();
  auto result = c10::make_intrusive<c10::ivalue::Future>(c10::PyObjectType::get(), done->devices());
  std::vector<c10::weak_intrusive_ptr<c10::StorageImpl>> storages;
  for (const at::Tensor& part : buffer.is_sparse() ? std::vector{buffer._indices(), buffer._values()} : std::vector{buffer}) {
    storages.push_back(part.storage().getWeakStorageImpl());
  }
  // Where there is a device this is called on streams that wait for `done`.
  done->addCallback(
      [result, storages, value = torch::jit::toIValue(py::cast(buffer), c10::PyObjectType::get())](c10::ivalue::Future& completed) mutable {
        if (completed.hasError()) result->setError(completed.exception_ptr());
        else result->markCompleted(std::move(value), storages);
      });
  return std::make_shared<torch::jit::PythonFutureWrapper>(result);
}

// Every exchange that may still have a thread, to be stopped before the interpreter ends.
std::mutex open_exchanges_mutex;
std::vector<std::weak_ptr<GroupExchange>> open_exchanges;

// Ending an exchange joins its thread, and that thread may need Python: the GIL must be free.
template <typename T>
void delete_without_gil(T* object) {
  if (Py_IsInitialized() && PyGILState_Check()) {
    const py::gil_scoped_release no_gil;
    delete object;
  } else {
    delete object;
  }
}

// What Python's `open_groups` returns: the groups of payloads and of control, the exchange's own store, the timeout in seconds,
// where the model's group has a backend whose collectives are work of a stream, that, its type of device, what opens another of its kind
// among other ranks, and what gives those back; and what opens the group of a later stage.
using GroupPtr = c10::intrusive_ptr<c10d::Backend>;
using GroupTuple = std::tuple<
    GroupPtr, GroupPtr, c10::intrusive_ptr<c10d::Store>, double,
    std::optional<std::tuple<GroupPtr, std::string, std::function<GroupPtr(int64_t)>, std::function<void()>>>,
    std::function<GroupPtr(int64_t, int64_t)>>;

std::shared_ptr<GroupExchange> make_exchange(
    const Options& options, std::shared_ptr<Clock> clock, std::function<GroupTuple(const std::string& caller)> open_groups,
    std::function<double()> scale, Worker::AppliedKeys applied) {
  const auto open = [open_groups = std::move(open_groups)](
                        const std::string& caller, std::function<std::string()> own_calls) -> std::shared_ptr<Transport> {
    auto [payloads, control, store, timeout, on_stream, open_stage] = open_groups(caller);
    const std::string who = c10::str("rank ", payloads->getRank(), ": ", caller);
    const auto milliseconds = std::chrono::milliseconds(static_cast<int64_t>(timeout * 1000));
    GlooTransport::Groups groups{
        {{{0, Transport::Collective::Among::kAll}, payloads}},
        control,
        store,
        milliseconds,
        std::make_shared<std::function<GroupPtr(int64_t, int64_t)>>(std::move(open_stage))};
    std::shared_ptr<GlooTransport> gloo(
        new GlooTransport(std::move(groups), who, std::move(own_calls)), &delete_without_gil<GlooTransport>);
    if (!on_stream) return gloo;
    auto& [model, device, open_among, close] = *on_stream;
    StreamTransport::Groups of_stream{
        model, std::make_shared<std::function<GroupPtr(int64_t)>>(std::move(open_among)),
        std::make_shared<std::function<void()>>(std::move(close))};
    return {new StreamTransport(std::move(of_stream), at::Device(device).type(), std::move(gloo), who), &delete_without_gil<Transport>};
  };
  std::shared_ptr<GroupExchange> exchange(
      new GroupExchange(options, std::move(clock), {open, std::move(scale), std::move(applied)}), &delete_without_gil<GroupExchange>);
  const std::lock_guard lock(open_exchanges_mutex);
  std::erase_if(open_exchanges, [](const auto& weak) { return weak.expired(); });
  open_exchanges.push_back(exchange);
  return exchange;
}

void close_all() {
  std::vector<std::shared_ptr<GroupExchange>> exchanges;
  {
    const std::lock_guard lock(open_exchanges_mutex);
    for (const auto& weak : open_exchanges) {
      if (auto exchange = weak.lock()) exchanges.push_back(std::move(exchange));
    }
    open_exchanges.clear();
  }
  for (const auto& exchange : exchanges) exchange->close();
}

at::ScalarType dtype_of(const char* who, const py::object& dtype) {
  if (!THPDtype_Check(dtype.ptr())) {
    throw py::type_error(c10::str(who, ": expected a torch.dtype, got ", std::string(py::str(py::type::of(dtype).attr("__name__")))));
  }
  return reinterpret_cast<THPDtype*>(dtype.ptr())->scalar_type;
}

py::dict statistics_of(Worker& worker) {
  worker.hear();
  const Statistics& statistics = worker.statistics;
  const auto counters = worker.report.sums();
  py::dict result;
  result["steps"] = statistics.steps.load();
  result["void_steps"] = statistics.void_steps + (worker.report.device().is_cpu() && worker.steps.is_void() ? 1 : 0);
  result["rebuilds"] = statistics.rebuilds.load();
  result["history_dropped"] = statistics.history_dropped + counters[2];
  result["residual_dropped"] = statistics.residual_dropped.load();
  result["dense_buckets"] = statistics.dense_buckets.load();
  py::list dense;
  for (const auto& [keys, entries, why] : worker.dense_buckets()) {
    dense.append(py::dict(py::arg("parameters") = keys, py::arg("entries") = entries, py::arg("why") = why));
  }
  result["dense"] = dense;
  result["entries"] = statistics.entries.load();
  result["sent_entries"] = statistics.sent_entries.load();
  result["repeated"] = counters[0];
  result["displaced"] = counters[1];
  result["bytes_sent"] = statistics.bytes_sent.load();
  result["bytes_dense"] = statistics.bytes_dense.load();
  result["bytes_local"] = statistics.bytes_local.load();
  result["compress_seconds"] = statistics.compress_seconds.load();
  result["exchange_seconds"] = statistics.exchange_seconds.load();
  result["aggregate_seconds"] = statistics.aggregate_seconds.load();
  return result;
}

// Pieces travel as {key: (parameter, residual, sent_index, sent_value, feedback, idle, velocity)}, None for what is not there.
using OptionalTensor = std::optional<at::Tensor>;
using PieceTuple = std::tuple<OptionalTensor, at::Tensor, OptionalTensor, OptionalTensor, OptionalTensor, bool, OptionalTensor>;
using PieceTuples = std::unordered_map<ParameterKey, PieceTuple>;

PieceTuples export_pieces(Worker& worker) {
  PieceTuples result;
  for (const auto& [key, piece] : worker.copy_pieces()) {
    const bool idle = piece.idle.defined() && piece.idle.item<uint8_t>() != 0;
    result[key] = {optional(piece.owner.tensor()), piece.residual, optional(piece.sent_index), optional(piece.sent_value),
                   optional(piece.feedback),       idle,           optional(piece.velocity)};
  }
  return result;
}

void import_pieces(Worker& worker, const PieceTuples& tuples, int64_t step, const std::vector<double>& density_state) {
  Pieces pieces;
  for (const auto& [key, tuple] : tuples) {
    const auto& [parameter, residual, sent_index, sent_value, feedback, idle, velocity] = tuple;
    pieces[key] = {
        parameter ? Owner(*parameter) : Owner(),
        residual,
        velocity.value_or(at::Tensor()),
        sent_index.value_or(at::Tensor()),
        sent_value.value_or(at::Tensor()),
        feedback.value_or(at::Tensor()),
        idle ? at::ones({1}, at::kByte) : at::Tensor()};
  }
  worker.replace_pieces(std::move(pieces), step, density_state);
}

}  // namespace
}  // namespace regtopk

PYBIND11_MODULE(_C, module) {
  using namespace regtopk;
  using release_gil = py::call_guard<py::gil_scoped_release>;
  py::module_::import("torch._C._distributed_c10d");

  module.attr("torch_version") = TORCH_VERSION;
  module.def("has_cuda_kernels", &has_cuda_kernels, "Return whether this build exchanges gradients on CUDA devices.");
  module.def(
      "payload_bytes",
      [](int64_t numel, int64_t k, const py::object& dtype, int64_t spans) {
        return payload_bytes(numel, k, dtype_of("payload_bytes", dtype), spans);
      },
      py::arg("numel"), py::arg("k"), py::arg("dtype"), py::arg("spans") = 0);
  module.def(
      "wire_bytes",
      [](int64_t numel, int64_t k, const py::object& dtype, int64_t spans, const py::object& wire_dtype, bool elias_fano) {
        return wire_bytes(numel, k, dtype_of("wire_bytes", dtype), spans, {dtype_of("wire_bytes", wire_dtype), elias_fano});
      },
      py::arg("numel"), py::arg("k"), py::arg("dtype"), py::arg("spans"), py::arg("wire_dtype"), py::arg("elias_fano") = false);
  module.def(
      "describe_statuses", &describe_statuses, py::arg("of_workers"), py::arg("in_host"), py::arg("host"), py::arg("place"),
      py::arg("host_ranks"));
  // Reads REGTOPK_CPU on the first call; ValueError where it names no instruction set of this machine.
  module.def("cpu_variant", [] { return name_of(cpu_variant()); });
  module.def("set_cpu_variant", &set_cpu_variant);
  module.def("available_cpu_variants", &available_cpu_variants);
  module.def("close_all", &close_all, release_gil());
  // Of a parameter's entries those that the rank at `place` of a host's `ranks` keeps: where they begin, and their number.
  module.def("part_of", [](int64_t numel, int64_t place, int64_t ranks) {
    const Part part = part_of(numel, place, ranks);
    return std::pair(part.begin, part.numel);
  });
  // The key under which the state of a parameter is kept.
  module.def("parameter_key", &key_of);

  py::class_<Options>(module, "Options")
      .def(
          py::init([](bool regularised, double density, double mu, std::string distortion, double decay, int64_t dense_steps,
                      const py::object& wire_dtype, bool elias_fano, bool leader, int64_t chunk, double momentum, bool nesterov,
                      bool mask_momentum, double clip_norm, std::function<double(int64_t)> schedule,
                      const std::optional<std::tuple<double, double, double, double>>& adaptive, bool dense_auto,
                      decltype(Options::dense_rule) dense_rule, int64_t host_ranks, int64_t local_rank) {
            return Options{
                .regularised = regularised,
                .density = density,
                .mu = mu,
                .distortion = std::move(distortion),
                .decay = decay,
                .dense_steps = dense_steps,
                .wire_dtype = wire_dtype.is_none() ? std::nullopt : std::optional(dtype_of("Options", wire_dtype)),
                .elias_fano = elias_fano,
                .leader = leader,
                .chunk = chunk,
                .momentum = momentum,
                .nesterov = nesterov,
                .mask_momentum = mask_momentum,
                .clip_norm = clip_norm,
                .dense_auto = dense_auto,
                .dense_rule = std::move(dense_rule),
                .host_ranks = host_ranks,
                .local_rank = local_rank,
                .schedule = std::move(schedule),
                .adaptive = adaptive ? std::optional(std::make_from_tuple<AdaptiveDensity>(*adaptive)) : std::nullopt};
          }),
          py::kw_only(), py::arg("regularised"), py::arg("density"), py::arg("mu"), py::arg("distortion"), py::arg("decay") = 1.0,
          py::arg("dense_steps") = 0, py::arg("wire_dtype") = py::none(), py::arg("elias_fano") = false, py::arg("leader") = false,
          py::arg("chunk") = 0, py::arg("momentum") = 0.0, py::arg("nesterov") = false, py::arg("mask_momentum") = false,
          py::arg("clip_norm") = 0.0, py::arg("schedule") = py::none(), py::arg("adaptive") = py::none(), py::arg("dense_auto") = false,
          py::arg("dense_rule") = py::none(), py::arg("host_ranks") = 1, py::arg("local_rank") = -1)
      .def_readonly("host_ranks", &Options::host_ranks);

  py::class_<Clock, std::shared_ptr<Clock>>(module, "Clock").def(py::init<>());

  py::enum_<Deed>(module, "Deed").value("RESET", Deed::kReset).value("LOAD", Deed::kLoad);

  py::class_<GroupExchange, std::shared_ptr<GroupExchange>>(module, "GroupExchange")
      .def(
          py::init(&make_exchange), py::arg("options"), py::arg("clock"), py::kw_only(), py::arg("open_groups"), py::arg("scale"),
          py::arg("applied"))
      .def("run", &run_from_python)
      .def(
          "register_on", [](const std::shared_ptr<GroupExchange>& exchange,
                            c10d::Reducer& reducer) { reducer.register_comm_hook(std::make_unique<ExchangeHook>(exchange)); })
      .def_property_readonly("is_open", &GroupExchange::is_open)
      .def("set_dense", &GroupExchange::set_dense)
      .def(
          "skipped", [](GroupExchange& self) { self.skipped(); }, release_gil())
      .def(
          "abort", [](GroupExchange& self) { self.skipped(Deed::kAborted); }, release_gil())
      .def("did", &GroupExchange::did)
      .def("use", &GroupExchange::use)
      .def(
          "announce_failure", [](GroupExchange& exchange, const std::string& why) { exchange.transport().announce_failure(why); },
          release_gil())
      .def("statistics", [](GroupExchange& exchange) { return statistics_of(exchange.worker()); })
      .def("last_step", [](const GroupExchange& exchange) { return exchange.worker().steps.step(); })
      .def(
          "times_given", [](const GroupExchange& exchange) { return exchange.worker().times_given(); }, release_gil())
      .def(
          "check", [](GroupExchange& exchange) { exchange.idle_worker().hear(/*wait=*/true); }, release_gil())
      .def(
          "wait_idle", [](GroupExchange& exchange) { exchange.idle_worker(); }, release_gil())
      .def(
          "residual_norm", [](GroupExchange& exchange) { return exchange.idle_worker().residual_norm(); }, release_gil())
      .def(
          "export_pieces", [](GroupExchange& exchange) { return export_pieces(exchange.idle_worker()); }, release_gil())
      .def(
          "import_pieces",
          [](GroupExchange& exchange, const PieceTuples& pieces, int64_t step, const std::vector<double>& density_state) {
            import_pieces(exchange.idle_worker(), pieces, step, density_state);
          },
          py::arg("pieces"), py::arg("step"), py::arg("density_state") = std::vector<double>(), release_gil())
      .def(
          "density_state", [](GroupExchange& exchange) { return exchange.idle_worker().density_state(); }, release_gil())
      .def(
          "clear", [](GroupExchange& exchange, const std::vector<ParameterKey>& keys) { exchange.idle_worker().clear(keys); },
          release_gil())
      .def(
          "open", [](GroupExchange& exchange) { exchange.transport(); }, release_gil())
      .def(
          "rank", [](GroupExchange& exchange) { return exchange.transport().rank(); }, release_gil())
      .def("workers", [](const GroupExchange& exchange) { return exchange.worker().ranks(); })  // known once it has been open
      .def(
          "gather_texts",
          [](GroupExchange& exchange, const std::string& own, const std::string& caller, const std::string& activity) {
            std::vector<std::string> texts;
            {
              const py::gil_scoped_release no_gil;
              Transport& transport = exchange.transport();
              transport.wait_idle();
              texts = transport.gather_texts(own, caller, activity);
            }
            return std::vector<py::bytes>(texts.begin(), texts.end());
          })
      .def(
          "agree",
          [](GroupExchange& exchange, const Fingerprint& named_values, const std::string& caller) {
            agree(exchange.transport(), caller, named_values);
          },
          release_gil())
      .def(
          "add_up",
          [](GroupExchange& exchange, const at::Tensor& tensor, const std::string& caller, const std::string& activity) {
            exchange.transport().add_up(tensor, caller, activity);
          },
          release_gil())
      .def("close", [](GroupExchange& exchange) { exchange.close(/*tells=*/true); }, release_gil());

  py::class_<Average, std::shared_ptr<Average>>(module, "Average", "An average that may be on its way.")
      .def(
          "wait", &Average::wait, release_gil(),
          "Wait for it and return the list of tensors, the same ones each time. Raises what the average would have raised.")
      .def(
          "is_void", &Average::is_void, release_gil(),
          "Wait for it and return whether the step is void on every rank: some average is not finite, or the step was aborted.")
      .def("is_completed", &Average::is_completed, "Whether wait() would return at once.");

  py::class_<TensorsExchange>(module, "TensorsExchange")
      .def(py::init<std::shared_ptr<GroupExchange>>())
      .def("average", &TensorsExchange::average, release_gil());

  py::class_<LocalExchange>(module, "LocalExchange")
      .def(py::init<Options, int64_t>())
      .def("step", &LocalExchange::step, release_gil())
      .def("skipped", &LocalExchange::skipped, release_gil())
      .def(
          "statistics",
          [](LocalExchange& exchange, int64_t rank) {
            exchange.worker(rank).hear(/*wait=*/true);  // a simulation has nothing to overlap
            return statistics_of(exchange.worker(rank));
          })
      .def("last_step", [](LocalExchange& exchange, int64_t rank) { return exchange.worker(rank).steps.step(); })
      .def(
          "residual_norm", [](LocalExchange& exchange, int64_t rank) { return exchange.worker(rank).residual_norm(); }, release_gil())
      .def(
          "export_pieces", [](LocalExchange& exchange, int64_t rank) { return export_pieces(exchange.worker(rank)); }, release_gil())
      .def(
          "import_pieces",
          [](LocalExchange& exchange, int64_t rank, const PieceTuples& pieces, int64_t step, const std::vector<double>& density_state) {
            import_pieces(exchange.worker(rank), pieces, step, density_state);
          },
          py::arg("rank"), py::arg("pieces"), py::arg("step"), py::arg("density_state") = std::vector<double>(), release_gil())
      .def("density_state", [](LocalExchange& exchange, int64_t rank) { return exchange.worker(rank).density_state(); });
}
