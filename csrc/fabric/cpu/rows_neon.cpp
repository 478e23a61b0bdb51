// The row kernels built for: neon.
#if defined(__aarch64__)
#include <arm_neon.h>

#include "base/quantize.hpp"
#include "fabric/cpu/rows.hpp"

#define MOE_VECTOR 16
namespace moecomm::rows_neon {
#define MOE_NAME(variant) "neon" variant
#include "fabric/cpu/impl/rows_kernels.inl"
}  // namespace moecomm::rows_neon
#endif
