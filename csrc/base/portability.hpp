// The only file that asks which compiler this is. Everything else in base/, exec/group.hpp and
// protocol/ is plain C++20, the same for g++, nvcc's host pass and nvcc's device pass.
#pragma once

#if defined(__CUDACC__)
#define MOE_HD __host__ __device__
#else
#define MOE_HD
#endif

#define MOE_INLINE MOE_HD inline __attribute__((always_inline))
// Not inlined: code that is rarely needed must not cost its callers registers.
#define MOE_OUTLINE MOE_HD inline __attribute__((noinline))

// nvcc ignores `#pragma GCC unroll`, g++ ignores `#pragma unroll`: spelled through _Pragma once.
#define MOE_PRAGMA(x) _Pragma(#x)
#if defined(__CUDACC__)
#define MOE_UNROLL(n) MOE_PRAGMA(unroll n)
#else
#define MOE_UNROLL(n) MOE_PRAGMA(GCC unroll n)
#endif
