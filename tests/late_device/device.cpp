// A device of torch's, PrivateUse1 and "late" in Python, over streams.h: what torch asks of a CUDA device, on this machine's memory. Tensors'
// operators are those of the CPU. What only writes to tensors that are there goes onto the current stream, as a kernel would, and holds none
// of them; what makes tensors or tells the host something waits for the stream first.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <mutex>
#include <set>
#include <string>

#include "../simt/simt.h"
#include "streams.h"

namespace late {
namespace {

constexpr c10::DeviceType kType = c10::kPrivateUse1;
const c10::Device kDevice(kType, 0);
thread_local StreamId current = kMainStream;

// Guards

c10::Stream as_torch(StreamId stream) { return c10::Stream(c10::Stream::UNSAFE, kDevice, stream); }

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Stream getStream(c10::Device) const override { return as_torch(current); }
  c10::Stream getDefaultStream(c10::Device) const override { return as_torch(kMainStream); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return as_torch(next_of_pool()); }
  c10::Stream getNewStream(c10::Device, int) const override { return as_torch(next_of_pool()); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return as_torch(std::exchange(current, stream.id())); }
  void destroyEvent(void* event, c10::DeviceIndex) const noexcept override { delete static_cast<MarkPtr*>(event); }
  void record(void** event, const c10::Stream& stream, c10::DeviceIndex, c10::EventFlag) const override {
    if (*event == nullptr) *event = new MarkPtr;
    *static_cast<MarkPtr*>(*event) = mark(stream.id());
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event != nullptr) wait_on(stream.id(), *static_cast<MarkPtr*>(event));
  }
  bool queryEvent(void* event) const override { return event == nullptr || has_passed(*static_cast<MarkPtr*>(event)); }
  void synchronizeEvent(void* event) const override {
    if (event != nullptr) wait_for(*static_cast<MarkPtr*>(event));
  }
  bool queryStream(const c10::Stream& stream) const override { return is_done(stream.id()); }
  void synchronizeStream(const c10::Stream& stream) const override { finish(stream.id()); }
  void synchronizeDevice(c10::DeviceIndex) const override { finish_all(); }
  void recordDataPtrOnStream(const c10::DataPtr& pointer, const c10::Stream& stream) const override;
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// Memory

void let_go_of(void* block) { let_go(static_cast<Block*>(block)); }

void Guard::recordDataPtrOnStream(const c10::DataPtr& pointer, const c10::Stream& stream) const {
  if (pointer.get_deleter() == &let_go_of && pointer.get_context() != nullptr)
    record_use(static_cast<Block*>(pointer.get_context()), stream.id());
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, kDevice};
    Block* const block = late::allocate(bytes, current);
    return {address_of(block), block, &let_go_of, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Allocator* allocator() {
  static auto* const made = new Allocator;
  return made;
}

// Memory of the host that copies may go on with after the call.
struct Pinned final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* const address = std::aligned_alloc(64, (bytes + 64) / 64 * 64);
    const std::lock_guard lock(mutex());
    all().insert(address);
    return {address, address, raw_deleter(), c10::kCPU};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return [](void* address) {
      {
        const std::lock_guard lock(mutex());
        all().erase(address);
      }
      std::free(address);
    };
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
  static bool has(const void* address) {
    const std::lock_guard lock(mutex());
    return all().contains(const_cast<void*>(address));
  }

 private:
  static std::mutex& mutex() {
    static auto* const mutex = new std::mutex;
    return *mutex;
  }
  static std::set<void*>& all() {
    static auto* const all = new std::set<void*>;
    return *all;
  }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  bool isPinnedPtr(const void* address) const override { return Pinned::has(address); }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    static auto* const made = new Pinned;
    return made;
  }
};

// Operators

bool is_late(const at::Tensor& tensor) { return tensor.defined() && tensor.device().type() == kType; }

// The same memory as a tensor of the CPU, which does not keep it.
at::Tensor on_host(const at::Tensor& tensor) {
  if (!is_late(tensor)) return tensor;
  return at::from_blob(
      const_cast<void*>(tensor.const_data_ptr()), tensor.sizes(), tensor.strides(), at::TensorOptions().dtype(tensor.scalar_type()));
}

at::Tensor from_host(const at::Tensor& tensor) {
  if (!tensor.defined() || is_late(tensor)) return tensor;
  at::Tensor result = at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(kDevice).pinned_memory(false));
  if (tensor.numel() > 0) on_host(result).copy_(tensor);  // new memory, and the stream is done
  return result;
}

template <typename Change>
c10::IValue changed(const c10::IValue& value, const Change& change) {
  if (value.isTensor()) return change(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(change(tensor));
    return list;
  }
  if (value.isList() && value.toListRef().size() > 0 &&
      value.type()->cast<c10::ListType>()->getElementType()->kind() == c10::OptionalType::Kind) {
    c10::List<std::optional<at::Tensor>> list;
    for (const c10::IValue& element : value.toListRef()) {
      if (element.isNone()) list.push_back(std::nullopt);
      else list.push_back(change(element.toTensor()));
    }
    return list;
  }
  return value.isDevice() && value.toDevice().type() == kType ? c10::IValue(c10::Device(c10::kCPU)) : value;
}

void call_on_host(const c10::OperatorHandle& operation, torch::jit::Stack& stack) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  operation.callBoxed(&stack);
}

// Every operator that is not below.
void any(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
  const c10::FunctionSchema& schema = operation.schema();
  const size_t count = schema.arguments().size();
  const std::vector<c10::IValue> arguments(stack->end() - static_cast<ptrdiff_t>(count), stack->end());
  const auto is_written = [](const c10::Argument& argument) {
    return argument.alias_info() != nullptr && argument.alias_info()->isWrite();
  };

  torch::jit::Stack host;
  std::vector<std::pair<at::Tensor, at::Tensor>> to_resize;  // what is written and has no entries yet, and what the CPU makes of it
  for (size_t i = 0; i < count; ++i) {
    host.push_back(changed(arguments[i], on_host));
    if (!is_written(schema.arguments()[i]) || !arguments[i].isTensor() || !is_late(arguments[i].toTensor())) continue;
    const at::Tensor written = arguments[i].toTensor();
    if (written.numel() > 0 || schema.name().ends_with('_')) continue;
    to_resize.emplace_back(written, at::empty({0}, written.options().device(c10::kCPU)));
    host.back() = to_resize.back().second;
  }
  const auto& returns = schema.returns();
  const bool makes_nothing = std::all_of(returns.begin(), returns.end(), is_written) &&
                             std::any_of(schema.arguments().begin(), schema.arguments().end(), is_written);
  if (makes_nothing && to_resize.empty()) {
    put(current, [operation, host]() mutable { call_on_host(operation, host); });
  } else {
    finish(current);
    call_on_host(operation, host);
    for (const auto& [written, made] : to_resize) {
      if (made.numel() == 0) continue;
      written.resize_(made.sizes());
      on_host(written).copy_(made);
    }
  }

  torch::jit::drop(*stack, count);
  for (size_t r = 0; r < returns.size(); ++r) {
    if (!is_written(returns[r])) {
      stack->push_back(changed(host[r], from_host));
      continue;
    }
    for (size_t i = 0; i < count; ++i) {
      const c10::Argument& argument = schema.arguments()[i];
      if (is_written(argument) && argument.alias_info()->beforeSet() == returns[r].alias_info()->beforeSet()) {
        stack->push_back(arguments[i]);
        break;
      }
    }
  }
}

at::Tensor empty(
    c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>,
    std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(
      size, allocator(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(
      size, stride, allocator(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

at::Tensor view_of(const at::Tensor& tensor, c10::IntArrayRef size, c10::IntArrayRef stride, int64_t offset) {
  auto view =
      at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(tensor.storage()), tensor.key_set(), tensor.dtype());
  view.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return view;
}

at::Tensor as_strided(const at::Tensor& tensor, c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<int64_t> offset) {
  return view_of(tensor, size, stride, offset.value_or(tensor.storage_offset()));
}

at::Tensor view(const at::Tensor& tensor, c10::IntArrayRef size) {
  // What the CPU makes of the same sizes and strides.
  const at::Tensor host =
      at::from_blob(
          const_cast<void*>(tensor.const_data_ptr()), tensor.sizes(), tensor.strides(), at::TensorOptions().dtype(tensor.scalar_type()))
          .view(size);
  return view_of(tensor, host.sizes(), host.strides(), tensor.storage_offset());
}

at::Tensor reshape_alias(const at::Tensor& tensor, c10::IntArrayRef size, c10::IntArrayRef stride) {
  return view_of(tensor, size, stride, tensor.storage_offset());
}

const at::Tensor& resize(const at::Tensor& tensor, c10::IntArrayRef size, std::optional<at::MemoryFormat>) {
  auto* const impl = tensor.unsafeGetTensorImpl();
  const size_t bytes = static_cast<size_t>(c10::multiply_integers(size)) * tensor.element_size();
  if (bytes > tensor.storage().nbytes()) {
    impl->set_storage_keep_dtype(c10::Storage(c10::Storage::use_byte_size_t(), bytes, allocator()->allocate(bytes), allocator(), true));
  }
  impl->set_sizes_contiguous(size);
  return tensor;
}

at::Tensor& set(at::Tensor& tensor, at::Storage storage, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  auto* const impl = tensor.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  if (stride.empty() && !size.empty()) {
    impl->set_storage_offset(offset);
    impl->set_sizes_contiguous(size);
  } else {
    impl->set_sizes_and_strides(size, stride, offset);
  }
  return tensor;
}

at::Tensor& set_whole(at::Tensor& tensor, at::Storage storage) {
  const auto entries = static_cast<int64_t>(storage.nbytes() / tensor.element_size());
  return set(tensor, std::move(storage), 0, {entries}, {});
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  const at::Tensor host_from = on_host(from), host_to = on_host(to);
  const auto is_free = [&](const at::Tensor& tensor) { return is_late(tensor) || (non_blocking && Pinned::has(tensor.storage().data())); };
  if (is_free(from) && is_free(to)) {
    // A copy keeps memory of the host that it uses, as torch's allocator of such memory does.
    put(current, [host_from, host_to] { host_to.copy_(host_from); });
  } else if (is_late(to)) {
    put(current, [host_from = host_from.clone(), host_to] { host_to.copy_(host_from); });
  } else {
    finish(current);
    host_to.copy_(host_from);
  }
  return to;
}

at::Scalar item(const at::Tensor& tensor) {
  finish(current);
  return on_host(tensor).item();
}

at::Tensor convolution(
    const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias, c10::SymIntArrayRef stride,
    c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef output_padding, c10::SymInt groups) {
  finish(current);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return from_host(
      at::convolution_symint(
          on_host(input), on_host(weight), bias ? on_host(*bias) : at::Tensor(), stride, padding, dilation, transposed, output_padding,
          groups));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& output, const at::Tensor& input, const at::Tensor& weight, c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
    c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef output_padding, c10::SymInt groups, std::array<bool, 3> mask) {
  finish(current);
  const at::AutoDispatchBelowADInplaceOrView guard;
  const c10::SymInt of_bias[] = {weight.sym_size(0)};
  const auto [of_input, of_weight, bias] = at::convolution_backward_symint(
      on_host(output), on_host(input), on_host(weight), c10::SymIntArrayRef(of_bias), stride, padding, dilation, transposed, output_padding,
      groups, mask);
  return {from_host(of_input), from_host(of_weight), from_host(bias)};
}

void record_stream(at::Tensor& tensor, c10::Stream stream) { Guard().recordDataPtrOnStream(tensor.storage().data_ptr(), stream); }

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&any>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("as_strided", &as_strided);
  library.impl("view", &view);
  library.impl("_reshape_alias", &reshape_alias);
  library.impl("resize_", &resize);
  library.impl("set_.source_Storage_storage_offset", &set);
  library.impl("set_.source_Storage", &set_whole);
  library.impl("_copy_from", &copy_from);
  library.impl("_local_scalar_dense", &item);
  library.impl("record_stream", &record_stream);
  library.impl("convolution_overrideable", &convolution);
  library.impl("convolution_backward_overrideable", &convolution_backward);
}

const bool is_registered = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  c10::SetAllocator(kType, allocator());
  simt::put_on_stream = [](cudaStream_t stream, std::function<void()> kernel) {
    put(reinterpret_cast<intptr_t>(stream) - 1, [kernel = std::move(kernel)] {
      static auto* const mutex = new std::mutex;
      const std::lock_guard lock(*mutex);  // the emulation runs one at a time
      simt::buffers = {{nullptr, reinterpret_cast<const uint8_t*>(~uintptr_t{0}), true}};
      kernel();
      if (!simt::error.empty()) throw std::runtime_error(simt::error);
    });
  };
  return true;
}();

}  // namespace

at::Tensor memory_on_host(const at::Tensor& tensor) { return on_host(tensor); }
StreamId current_stream() { return current; }
c10::Device device() { return kDevice; }
c10::Stream stream_as_torch(StreamId stream) { return as_torch(stream); }

}  // namespace late
