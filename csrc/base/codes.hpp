// The formats of quantized rows, and how a row of each is laid out. base/quantize.hpp defines the meaning of
// the bits.
#pragma once
#include "base/types.hpp"

namespace moecomm {

// Elements that share one scale.
constexpr int64_t kTile = 128;
MOE_HD constexpr int64_t tiles_of(int64_t hidden) { return (hidden + kTile - 1) / kTile; }

// The format of the scales of FP8 rows in dispatch. f32: one float per tile. ue8m0: powers of two, one
// exponent byte per tile, four bytes in an int32.
enum class ScaleKind : int32_t { none = 0, f32 = 1, ue8m0 = 2 };

MOE_HD constexpr int64_t scale_words(int64_t hidden, ScaleKind kind) {
  return kind == ScaleKind::none ? 0 : kind == ScaleKind::f32 ? tiles_of(hidden) : (tiles_of(hidden) + 3) / 4;
}

// Which elements share a scale when a whole tensor is quantized: tiles of 1x128, 128x1 or 128x128.
enum class TileShape : int32_t { row = 0, column = 1, square = 2 };

// The format in which a node's sum crosses the rail in combine. The parts of a row, each 16-byte aligned:
//   plain     `hidden` elements of the buffer's dtype
//   fp8       `hidden` codes; then one f32 scale per tile
//   logfmt10  128 bytes per tile: the low 8 bits of each code;
//             then 32 bytes per tile: the two high bits of each code, where byte j has those of elements
//             j, j + 32, j + 64 and j + 96, from the low bits up;
//             then two f32 per tile: low and step
enum class Wire : int32_t { plain = 0, fp8 = 1, logfmt10 = 2 };

MOE_HD constexpr uint64_t wire_row_bytes(Wire wire, int64_t hidden, DType type) {
  switch (wire) {
    case Wire::fp8: return align16(hidden) + align16(4 * tiles_of(hidden));
    case Wire::logfmt10: return align16(tiles_of(hidden) * (kTile + kTile / 4 + 8));
    default: return hidden * element_bytes(type);
  }
}

}  // namespace moecomm
