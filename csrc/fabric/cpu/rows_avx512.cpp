// The row kernels built for: avx512.
#if defined(__x86_64__)
// The header of g++ 12 itself converts from an uninitialized register.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "fabric/cpu/rows.hpp"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c")
#include "base/quantize.hpp"  // after the pragma, because its functions are inlined into the kernels
#define MOE_VECTOR 64
namespace moecomm::rows_avx512 {
#define MOE_NAME(variant) "avx512" variant
#include "fabric/cpu/impl/rows_kernels.inl"
}  // namespace moecomm::rows_avx512
#endif
