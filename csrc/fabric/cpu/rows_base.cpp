// The row kernels built for: base.
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "base/quantize.hpp"
#include "fabric/cpu/rows.hpp"

#define MOE_VECTOR 16
namespace moecomm::rows_base {
#define MOE_NAME(variant) "base" variant
#include "fabric/cpu/impl/rows_kernels.inl"
}  // namespace moecomm::rows_base
