// Which instruction set the CPU kernels use. Every variant computes the same bytes; only the time differs.
#pragma once

#include <string>
#include <vector>

namespace regtopk {

enum class CpuVariant { kScalar, kAvx2, kAvx512 };

// The variant in use: the one that REGTOPK_CPU names, or else the widest one this machine has. The environment is read on
// the first call. Throws std::invalid_argument where REGTOPK_CPU names none, or one that this machine lacks.
CpuVariant cpu_variant();

// Replaces the variant in use, for tests and benchmarks that compare several in one process. Throws as above.
void set_cpu_variant(const std::string& name);

std::string name_of(CpuVariant variant);
// The names that set_cpu_variant accepts here, narrowest first.
std::vector<std::string> available_cpu_variants();

}  // namespace regtopk
