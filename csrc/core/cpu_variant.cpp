#include "cpu_variant.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace regtopk {
namespace {

constexpr CpuVariant kAll[] = {CpuVariant::kScalar, CpuVariant::kAvx2, CpuVariant::kAvx512};

bool is_available(CpuVariant variant) {
#if defined(REGTOPK_X86_KERNELS)
  if (variant == CpuVariant::kAvx2) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("popcnt") &&
           __builtin_cpu_supports("bmi");
  }
  if (variant == CpuVariant::kAvx512) {
    return is_available(CpuVariant::kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
#endif
  return variant == CpuVariant::kScalar;
}

CpuVariant widest() {
  CpuVariant result = CpuVariant::kScalar;
  for (const CpuVariant variant : kAll) {
    if (is_available(variant)) result = variant;
  }
  return result;
}

CpuVariant variant_of(const std::string& name) {
  for (const CpuVariant variant : kAll) {
    if (name_of(variant) != name) continue;
    if (is_available(variant)) return variant;
    throw std::invalid_argument(
        "REGTOPK_CPU: expected an instruction set of this machine, got '" + name + "'; unset it, or set it to " + name_of(widest()));
  }
  throw std::invalid_argument("REGTOPK_CPU: expected avx512, avx2 or scalar, got '" + name + "'; unset it to use the widest one here");
}

std::atomic<CpuVariant>& current() {
  static std::atomic<CpuVariant> variant = [] {
    const char* const name = std::getenv("REGTOPK_CPU");
    return name == nullptr ? widest() : variant_of(name);
  }();
  return variant;
}

}  // namespace

CpuVariant cpu_variant() { return current(); }

void set_cpu_variant(const std::string& name) { current() = variant_of(name); }

std::string name_of(CpuVariant variant) {
  switch (variant) {
    case CpuVariant::kScalar:
      return "scalar";
    case CpuVariant::kAvx2:
      return "avx2";
    case CpuVariant::kAvx512:
      return "avx512";
  }
  throw std::invalid_argument("name_of: expected a known CPU variant");
}

std::vector<std::string> available_cpu_variants() {
  std::vector<std::string> names;
  for (const CpuVariant variant : kAll) {
    if (is_available(variant)) names.push_back(name_of(variant));
  }
  return names;
}

}  // namespace regtopk
