// Stands in for the part of CUDA's header that device code uses, on a CPU.
#pragma once
#include <bit>
#include <cstdint>

using __half = _Float16;
inline __half __ushort_as_half(unsigned short v) { return std::bit_cast<__half>(v); }
inline unsigned short __half_as_ushort(__half v) { return std::bit_cast<unsigned short>(v); }
inline float __half2float(__half v) { return static_cast<float>(v); }
inline __half __float2half_rn(float v) { return static_cast<__half>(v); }
