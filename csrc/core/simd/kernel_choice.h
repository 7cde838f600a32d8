#pragma once

#include "../cpu_variant.h"
#include "kernels.h"
#include "../value_types.h"

namespace regtopk {

// The kernels of the variant in use; null where it has none for that type: fp64, and everything in the scalar variant.
inline const Kernels* kernels_for(ValueType type) {
#if defined(REGTOPK_X86_KERNELS)
  const CpuVariant variant = cpu_variant();
  if (variant == CpuVariant::kScalar) return nullptr;
  const bool wide = variant == CpuVariant::kAvx512;
  switch (type) {
    case ValueType::kFloat32:
      return wide ? &kAvx512Float32 : &kAvx2Float32;
    case ValueType::kBFloat16:
      return wide ? &kAvx512BFloat16 : &kAvx2BFloat16;
    case ValueType::kFloat16:
      return wide ? &kAvx512Float16 : &kAvx2Float16;
    default:
      return nullptr;
  }
#endif
  static_cast<void>(type);
  return nullptr;
}

}  // namespace regtopk
