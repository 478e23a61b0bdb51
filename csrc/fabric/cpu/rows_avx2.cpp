// The row kernels built for: avx2.
#if defined(__x86_64__)
#include <immintrin.h>

#include "fabric/cpu/rows.hpp"

#pragma GCC target("avx2,f16c")
#include "base/quantize.hpp"  // after the pragma, because its functions are inlined into the kernels
#define MOE_VECTOR 32
namespace moecomm::rows_avx2 {
#define MOE_NAME(variant) "avx2" variant
#include "fabric/cpu/impl/rows_kernels.inl"
}  // namespace moecomm::rows_avx2
#endif
