// The meaning of the bits of quantized rows. The scalar functions are the definition. Every world compiles
// the same source, so every world computes the same bits. Nothing here calls libm: logarithm and power are
// polynomials with a fixed order of operations. Compile without fused multiply-add (-ffp-contract=off,
// nvcc -fmad=false) and without flushing subnormals to zero.
//
// F is float and U uint32_t, or both are vectors of them (GCC's vector extension; comparisons then give
// masks, and `?:` selects by lane): the CPU's row kernels are instantiations of the same functions.
//
// A number that is not finite becomes a NaN code. It does not affect the scale of its tile.
#pragma once
#include "base/codes.hpp"

namespace moecomm {

template <class To, class From>
MOE_INLINE To bits_as(From v) {
  return __builtin_bit_cast(To, v);
}

namespace detail {
constexpr uint32_t kMagnitude = 0x7fffffffu, kInfinity = 0x7f800000u, kNaN = 0x7fc00000u,
                   kSmallestNormal = 0x00800000u;
// 1.5 * 2^23. Adding it rounds a float to the nearest even integer, which then is in the low bits.
constexpr float kRound = 12582912.0f;
constexpr uint32_t kRoundBits = 0x4b400000u;
}  // namespace detail

// The magnitude's bits where v is finite, else 0: as integers they are ordered like the numbers.
template <class U, class F>
MOE_INLINE U finite_magnitude(F v) {
  const U a = bits_as<U>(v) & detail::kMagnitude;
  return a < detail::kInfinity ? a : U{};
}

// -- FP8 e4m3 (fn: no infinity; 448 is the largest number, 0x7f is NaN) -----------------------------

// Round to nearest even; finite values saturate; NaN and infinity become 0x7f.
template <class U, class F>
MOE_INLINE U e4m3_encode(F v) {
  const U u = bits_as<U>(v), a = u & detail::kMagnitude;
  const U normal = (a - 0x3c000000u + 0x7ffffu + ((a >> 20) & 1u)) >>
                   20;  // 3 of 23 bits stay; the bias goes from 127 to 7
  const U small =
      bits_as<U>(bits_as<F>(a) + 16384.0f) - 0x46800000u;  // below 2^-6: units of 2^-9, rounded by the sum
  const U code = a < 0x3c800000u ? small : normal;
  const U signed_code = (code < 0x7eu ? code : U{} + 0x7eu) | (u >> 24 & 0x80u);
  return a < detail::kInfinity ? signed_code : U{} + 0x7fu;
}

template <class F, class U>
MOE_INLINE F e4m3_decode(U code) {
  const U a = code & 0x7fu;
  const U normal = (a << 20) + 0x3c000000u;
  const U small = bits_as<U>(bits_as<F>(a + 0x46800000u) - 16384.0f);
  const U magnitude = a < 8u ? small : normal;
  return bits_as<F>(a < 0x7fu ? magnitude | (code & 0x80u) << 24 : U{} + detail::kNaN);
}

// -- Scales of a tile ---------------------------------------------------------------------------------

template <class F>
struct TileScale {
  F scale;    // value = code * scale
  F inverse;  // code = e4m3(value * inverse)
};

// f32: scale = amax / 448, inverse = 448 / amax. ue8m0: the least power of two that is not below amax / 448.
// An amax below 448 * 2^-126 is raised to that value, so that a scale is always a normal number. The scale of
// a tile of zeros is 2^-126.
template <class U, class F>
MOE_INLINE TileScale<F> tile_scale(F amax, ScaleKind kind) {
  const F least = F{} + 0x1.cp-118f, most = F{} + 448.0f;
  const F a = amax > least ? amax : least;
  const F scale = a / most;
  if (kind == ScaleKind::f32) return {scale, most / a};
  const U exponent = (bits_as<U>(scale) + 0x007fffffu) >> 23;
  return {bits_as<F>(exponent << 23), bits_as<F>((254u - exponent) << 23)};
}

// The exponent byte of a power of two, and back.
MOE_INLINE uint8_t ue8m0_encode(float scale) { return static_cast<uint8_t>(bits_as<uint32_t>(scale) >> 23); }
MOE_INLINE float ue8m0_decode(uint8_t code) { return bits_as<float>(uint32_t{code} << 23); }

// -- LogFMT-10: a sign and a 9-bit code for the logarithm's place between a tile's least and largest --------
//
// low = max(log2 of the least nonzero magnitude, log2 of the largest - 32); step = (log2 of the largest -
// low) / 510. Code k in 1..511 stands for 2^(low + (k - 1) * step); 0 is zero; 0x200 (a negative zero) is
// NaN. A value takes the nearest code in *linear* space: that rounding is unbiased, whereas rounding the
// logarithm is not. The midpoint of 2^y and 2^(y + step) is step * ln2 / 8 code units above half way (next
// term: < 5e-7 units), so one subtraction corrects it. Values below half the smallest level become zero.
// Subnormal numbers are treated as zero.

// For positive normal numbers; |error| < 1e-7, or half a unit in the last place of the result.
template <class U, class F>
MOE_INLINE F log2_of(F v) {
  const U b = bits_as<U>(v) + 0x004afb0du;  // mantissa in [sqrt(1/2), sqrt(2)): 0x3f800000 - 0x3f3504f3
  const F f = bits_as<F>((b & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  const F exponent = bits_as<F>((b >> 23) + detail::kRoundBits) - (detail::kRound + 127.0f);
  F p = f * -0.145757511f + 0.236882478f;
  p = p * f + -0.250061184f;
  p = p * f + 0.286708534f;
  p = p * f + -0.36008811f;
  p = p * f + 0.480939388f;
  p = p * f + -0.721357107f;
  p = p * f + 1.44269478f;
  return exponent + p * f;
}

// For y in [-126, 128); |relative error| < 2e-7.
template <class U, class F>
MOE_INLINE F exp2_of(F v) {
  const F least = F{} + -126.0f, most = F{} + 0x1.fffffep6f;
  const F low = v > least ? v : least, y = low < most ? low : most;
  const F whole = y + detail::kRound;
  const F f = y - (whole - detail::kRound);
  F p = f * 0.000154762791f + 0.00134002347f;
  p = p * f + 0.00961800385f;
  p = p * f + 0.055503279f;
  p = p * f + 0.240226507f;
  p = p * f + 0.693147182f;
  p = p * f + 1.0f;
  return bits_as<F>(bits_as<U>(p) + ((bits_as<U>(whole) - detail::kRoundBits) << 23));
}

struct LogTile {
  float low;
  float step;
};

// least, largest: the extreme nonzero finite normal magnitudes of a tile; both 0 if it has none.
MOE_INLINE LogTile log_tile(float least, float largest) {
  if (largest == 0.0f) return {0.0f, 0.0f};
  const float top = log2_of<uint32_t>(largest), bottom = log2_of<uint32_t>(least);
  const float low = bottom > top - 32.0f ? bottom : top - 32.0f;
  return {low, (top > low ? top - low : 0.0f) / 510.0f};
}

// inverse: 1 / step, or 0 where step is 0.
template <class U, class F>
MOE_INLINE U log_encode(F v, LogTile t, float inverse) {
  const U u = bits_as<U>(v), a = u & detail::kMagnitude;
  const F level = log2_of<U>(bits_as<F>(a));
  const F place = (level - t.low) * inverse - t.step * 0.0866433976f, last = F{} + 510.0f;
  const F above = place > F{} ? place : F{};
  const U k = bits_as<U>((above < last ? above : last) + detail::kRound) - (detail::kRoundBits - 1u);
  const U code = k | (u >> 22 & 0x200u);
  const U normal = level < F{} + (t.low - 1.0f) ? U{} : code;
  const U number = a < detail::kSmallestNormal ? U{} : normal;
  return a < detail::kInfinity ? number : U{} + 0x200u;
}

template <class F, class U>
MOE_INLINE F log_decode(U code, LogTile t) {
  const U k = code & 0x1ffu, sign = code & 0x200u;
  const F place = bits_as<F>(k + detail::kRoundBits) - (detail::kRound + 1.0f);
  const U magnitude = bits_as<U>(exp2_of<U>(place * t.step + t.low));
  const U none = sign == 0u ? U{} : U{} + detail::kNaN;
  return bits_as<F>(k == 0u ? none : magnitude | sign << 22);
}

}  // namespace moecomm
