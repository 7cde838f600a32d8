// The CUDA operators as they are, cuda/operators.cpp and its likes, over the emulated kernels: in the place of the CPU operators, so that what
// exchanges CPU tensors takes their path, or as those of a device that has streams. Loaded by a test, after the extension. One file: it takes
// as long to compile as torch's headers do to read.
#include <torch/library.h>

#include <string>

#pragma push_macro("TORCH_LIBRARY_IMPL")
#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(name, key, library) \
  template <typename Library>                  \
  void register_operators(Library library)
#include "../../csrc/ops/checks.cpp"
#include "../../csrc/ops/operators.cpp"
#include "../../cuda/operators.cpp"
#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(name, key, library) \
  template <typename Library>                  \
  void register_lead_operators(Library library)
#include "../../cuda/lead_operators.cpp"
#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(name, key, library) \
  template <typename Library>                  \
  void register_parts_operators(Library library)
#include "../../cuda/parts_operators.cpp"
#pragma pop_macro("TORCH_LIBRARY_IMPL")

namespace {

struct Registrar {
  torch::Library& library;
  const bool copies;  // those two, which go through the CPU operators
  template <typename Function>
  void impl(const char* name, Function function) {
    if (copies || (name != std::string("encode") && name != std::string("decode"))) library.impl(name, function);
  }
};

void register_all(c10::DispatchKey key, bool copies) {
  auto* const library = new torch::Library(torch::Library::IMPL, "regtopk", key, __FILE__, __LINE__);  // as long as the process
  regtopk::register_operators(Registrar{*library, copies});
  regtopk::register_lead_operators(Registrar{*library, copies});
  regtopk::register_parts_operators(Registrar{*library, copies});
}

}  // namespace

extern "C" void regtopk_emulate_on_cpu() { register_all(c10::DispatchKey::CPU, false); }
extern "C" void regtopk_emulate_on_late_device() { register_all(c10::DispatchKey::PrivateUse1, true); }
