// The CUDA operators as they are, cuda/operators.cpp and its likes, over the emulated kernels and in the place of the CPU operators: what
// exchanges CPU tensors then takes the device's path. Loaded by a test, after the extension. One file: it takes as long to
// compile as torch's headers do to read.
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

struct AllButCopies {
  torch::Library& library;
  template <typename Function>
  void impl(const char* name, Function function) {
    // Those two go through the CPU operators.
    if (name != std::string("encode") && name != std::string("decode")) library.impl(name, function);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(regtopk, CPU, library) {
  regtopk::register_operators(AllButCopies{library});
  regtopk::register_lead_operators(AllButCopies{library});
  regtopk::register_parts_operators(AllButCopies{library});
}
