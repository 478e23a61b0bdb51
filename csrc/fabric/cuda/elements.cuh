// Elements of rows in registers: 16 bytes per lane, unpacked to FP32 (FP64 for f64 rows) and packed with the
// rounding of the CPU's row kernels, so that both worlds give the same bits. Compile with -fmad=false.
#pragma once
#include <cuda_fp16.h>

#include "base/offset.hpp"
#include "base/quantize.hpp"
#include "fabric/cuda/ptx.cuh"

namespace moecomm {

struct DeviceBF16 {
  using Wide = float;
  static constexpr int kBytes = 2, kPerLane = 8;
  static __device__ void unpack(uint4 raw, float* v) {
    const uint32_t w[4] = {raw.x, raw.y, raw.z, raw.w};
    MOE_UNROLL(4)
    for (int i = 0; i < 4; ++i) {
      v[2 * i] = __uint_as_float(w[i] << 16);
      v[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
    }
  }
  // Rounds to nearest even. NaN becomes the quiet NaN 0x7fc0.
  static __device__ uint32_t half_of(float v) {
    const uint32_t u = __float_as_uint(v), rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return (u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded & 0xffffu;
  }
  static __device__ uint4 pack(const float* v) {
    return {half_of(v[0]) | half_of(v[1]) << 16, half_of(v[2]) | half_of(v[3]) << 16,
            half_of(v[4]) | half_of(v[5]) << 16, half_of(v[6]) | half_of(v[7]) << 16};
  }
  static __device__ float load_one(const char* p) {
    return __uint_as_float(uint32_t{*Offset<volatile uint16_t>{}.in(p)} << 16);
  }
  static __device__ void store_one(char* p, float v) {
    *Offset<uint16_t>{}.in(p) = static_cast<uint16_t>(half_of(v));
  }
};

struct DeviceF16 {
  using Wide = float;
  static constexpr int kBytes = 2, kPerLane = 8;
  static __device__ void unpack(uint4 raw, float* v) {
    const uint32_t w[4] = {raw.x, raw.y, raw.z, raw.w};
    MOE_UNROLL(4)
    for (int i = 0; i < 4; ++i) {
      v[2 * i] = __half2float(__ushort_as_half(static_cast<unsigned short>(w[i])));
      v[2 * i + 1] = __half2float(__ushort_as_half(static_cast<unsigned short>(w[i] >> 16)));
    }
  }
  static __device__ uint32_t half_of(float v) { return __half_as_ushort(__float2half_rn(v)); }
  static __device__ uint4 pack(const float* v) {
    return {half_of(v[0]) | half_of(v[1]) << 16, half_of(v[2]) | half_of(v[3]) << 16,
            half_of(v[4]) | half_of(v[5]) << 16, half_of(v[6]) | half_of(v[7]) << 16};
  }
  static __device__ float load_one(const char* p) {
    return __half2float(__ushort_as_half(*Offset<volatile unsigned short>{}.in(p)));
  }
  static __device__ void store_one(char* p, float v) {
    *Offset<uint16_t>{}.in(p) = static_cast<uint16_t>(half_of(v));
  }
};

struct DeviceF32 {
  using Wide = float;
  static constexpr int kBytes = 4, kPerLane = 4;
  static __device__ void unpack(uint4 raw, float* v) {
    v[0] = __uint_as_float(raw.x);
    v[1] = __uint_as_float(raw.y);
    v[2] = __uint_as_float(raw.z);
    v[3] = __uint_as_float(raw.w);
  }
  static __device__ uint4 pack(const float* v) {
    return {__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3])};
  }
  static __device__ float load_one(const char* p) { return *Offset<volatile float>{}.in(p); }
  static __device__ void store_one(char* p, float v) { *Offset<float>{}.in(p) = v; }
};

struct DeviceF64 {
  using Wide = double;
  static constexpr int kBytes = 8, kPerLane = 2;
  static __device__ void unpack(uint4 raw, double* v) {
    v[0] = __hiloint2double(static_cast<int>(raw.y), static_cast<int>(raw.x));
    v[1] = __hiloint2double(static_cast<int>(raw.w), static_cast<int>(raw.z));
  }
  static __device__ uint4 pack(const double* v) {
    return {static_cast<uint32_t>(__double2loint(v[0])), static_cast<uint32_t>(__double2hiint(v[0])),
            static_cast<uint32_t>(__double2loint(v[1])), static_cast<uint32_t>(__double2hiint(v[1]))};
  }
  static __device__ double load_one(const char* p) { return *Offset<volatile double>{}.in(p); }
  static __device__ void store_one(char* p, double v) { *Offset<double>{}.in(p) = v; }
};

// Calls work(T{}) with the element type of `type`.
template <class Work>
__device__ void with_element(DType type, Work&& work) {
  switch (type) {
    case DType::bf16: return work(DeviceBF16{});
    case DType::f16: return work(DeviceF16{});
    case DType::f32: return work(DeviceF32{});
    case DType::f64: return work(DeviceF64{});
  }
}

// Loads eight elements from e on, and zeros beyond the row. Rows are multiples of 16 bytes, so only an f32
// row may end within the eight.
template <class T>
__device__ void load_eight(const char* row, int64_t e, int64_t hidden, float* v) {
  MOE_UNROLL(8)
  for (int i = 0; i < 8; ++i) v[i] = 0.0f;
  MOE_UNROLL(2)
  for (int at = 0; at < 8; at += T::kPerLane)
    if (e + at < hidden) T::unpack(ptx::load16(row + (e + at) * T::kBytes), v + at);
}

template <class T>
__device__ void store_eight(char* row, int64_t e, int64_t hidden, const float* v) {
  MOE_UNROLL(2)
  for (int at = 0; at < 8; at += T::kPerLane)
    if (e + at < hidden) ptx::store16(row + (e + at) * T::kBytes, T::pack(v + at));
}

}  // namespace moecomm
