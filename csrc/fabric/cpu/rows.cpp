// Chooses the row kernels once per process: MOECOMM_ISA=avx512|avx2|base overrides (for tests).
#include "fabric/cpu/rows.hpp"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace moecomm {
#if defined(__x86_64__)
namespace rows_avx512 {
extern const RowKernels kKernels;
}
namespace rows_avx2 {
extern const RowKernels kKernels;
}
#endif
namespace rows_base {
extern const RowKernels kKernels;
}

const RowKernels* row_kernels_named(const char* name) {
#if defined(__x86_64__)
  if (std::strcmp(name, "avx512") == 0)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")
               ? &rows_avx512::kKernels
               : nullptr;
  if (std::strcmp(name, "avx2") == 0) return __builtin_cpu_supports("avx2") ? &rows_avx2::kKernels : nullptr;
#endif
  return std::strcmp(name, "base") == 0 ? &rows_base::kKernels : nullptr;
}

const RowKernels& row_kernels() {
  static const RowKernels* chosen = [] {
    if (const char* forced = std::getenv("MOECOMM_ISA"))
      if (const RowKernels* k = row_kernels_named(forced)) return k;
    for (const char* name : {"avx512", "avx2"})
      if (const RowKernels* k = row_kernels_named(name)) return k;
    return row_kernels_named("base");
  }();
  return *chosen;
}

}  // namespace moecomm
