// The row kernels built for: base.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "fabric/rows.hpp"
#include "base/quantize.hpp"

#define MOE_VECTOR 16
namespace moecomm::rows_base {
static constexpr const char* kName = "base";
#include "fabric/impl/rows_kernels.inl"
}  // namespace moecomm::rows_base
