// Coded rows: which formats there are and how a row of each is laid out. base/quantize.hpp says what
// their bits mean.
#pragma once
#include "base/types.hpp"

namespace moecomm {

// Elements that share one scale.
constexpr int64_t kTile = 128;
MOE_HD constexpr int64_t tiles_of(int64_t hidden) { return (hidden + kTile - 1) / kTile; }

// FP8 rows of dispatch: how their scales travel. f32: one float per tile. ue8m0: powers of two, one
// exponent byte per tile, four in an int32.
enum class ScaleKind : int32_t { none = 0, f32 = 1, ue8m0 = 2 };

MOE_HD constexpr int64_t scale_words(int64_t hidden, ScaleKind kind) {
  return kind == ScaleKind::none ? 0 : kind == ScaleKind::f32 ? tiles_of(hidden) : (tiles_of(hidden) + 3) / 4;
}

// Rows and columns that share a scale, where whole tensors are coded: 1x128, 128x1, 128x128.
enum class TileShape : int32_t { row = 0, column = 1, square = 2 };

// How a node's sum crosses the rail in combine. Parts of a row, each starting on 16 bytes:
//   plain     hidden elements of the buffer's dtype
//   fp8       hidden codes; one f32 scale per tile
//   logfmt10  per tile 128 bytes: the low 8 bits of the codes; per tile 32 bytes: their two high bits, those
//   of elements
//             j, j + 32, j + 64, j + 96 in byte j from the low bits up; per tile two f32: low and step
enum class Wire : int32_t { plain = 0, fp8 = 1, logfmt10 = 2 };

MOE_HD constexpr uint64_t wire_row_bytes(Wire wire, int64_t hidden, DType type) {
  switch (wire) {
    case Wire::fp8: return align16(hidden) + align16(4 * tiles_of(hidden));
    case Wire::logfmt10: return align16(tiles_of(hidden) * (kTile + kTile / 4 + 8));
    default: return hidden * element_bytes(type);
  }
}

}  // namespace moecomm
