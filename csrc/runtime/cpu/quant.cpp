#include "runtime/cpu/quant.hpp"

#include <algorithm>

#include "exec/lane.hpp"
#include "fabric/cpu/rows.hpp"

namespace moecomm {
namespace {

const RowKernels* kernels(const std::string& isa) {
  return isa.empty() ? &row_kernels() : row_kernels_named(isa.c_str());
}

int64_t block_end(int64_t row, int64_t rows) { return std::min(rows, row + kTile); }

}  // namespace

bool quantize(char* codes, float* scales, const char* x, int64_t rows, int64_t columns, DType type,
              TileShape tile, ScaleKind kind, const std::string& isa) {
  const RowKernels* k = kernels(isa);
  if (!k) return false;
  const int64_t row_bytes = columns * element_bytes(type), tiles = tiles_of(columns);
  if (tile == TileShape::row) {
    for (int64_t r = 0; r < rows; ++r)
      k->quantize(codes + r * columns, scales + r * scale_words(columns, kind), x + r * row_bytes, 0, columns,
                  columns, type, kind);
    return true;
  }
  const bool square = tile == TileShape::square;
  for (int64_t r = 0; r < rows; r += kTile)
    k->quantize_block(codes + r * columns, scales + r / kTile * (square ? tiles : columns), x + r * row_bytes,
                      block_end(r, rows) - r, columns, type, kind, square);
  return true;
}

bool dequantize(char* x, const char* codes, const float* scales, int64_t rows, int64_t columns, DType type,
                TileShape tile, const std::string& isa) {
  const RowKernels* k = kernels(isa);
  if (!k) return false;
  const int64_t row_bytes = columns * element_bytes(type),
                per_row = tile == TileShape::column ? columns : tiles_of(columns);
  for (int64_t r = 0; r < rows; ++r)
    k->dequantize(x + r * row_bytes, codes + r * columns,
                  scales + (tile == TileShape::row ? r : r / kTile) * per_row, columns, type,
                  tile == TileShape::column);
  return true;
}

bool transpose_requantize(char* dst, float* dst_scales, const char* src, const float* src_scales,
                          int64_t rows, int64_t columns, ScaleKind kind, const std::string& isa) {
  const RowKernels* k = kernels(isa);
  if (!k) return false;
  for (int64_t r = 0; r < rows; r += kTile)
    k->transpose_requantize(dst + r, dst_scales + r / kTile, src + r * columns,
                            src_scales + r * tiles_of(columns), block_end(r, rows) - r, columns, rows,
                            tiles_of(rows), kind);
  return true;
}

bool encode_rows(char* coded, const char* x, int64_t rows, int64_t hidden, DType type, Wire wire,
                 const std::string& isa) {
  const RowKernels* k = kernels(isa);
  if (!k) return false;
  TermStore store;
  for (int64_t r = 0; r < rows; ++r) {
    Terms terms{&store};
    terms.add_wire(Lane{}, x + r * hidden * element_bytes(type), Wire::plain, hidden);
    terms.close_group();
    k->reduce_encode(coded + r * wire_row_bytes(wire, hidden, type), wire, terms, nullptr, 0, hidden, hidden,
                     type);
  }
  return true;
}

bool decode_rows(char* x, const char* coded, int64_t rows, int64_t hidden, DType type, Wire wire,
                 const std::string& isa) {
  const RowKernels* k = kernels(isa);
  if (!k) return false;
  TermStore store;
  for (int64_t r = 0; r < rows; ++r) {
    Terms terms{&store};
    terms.add_wire(Lane{}, coded + r * wire_row_bytes(wire, hidden, type), wire, hidden);
    terms.close_group();
    k->reduce(x + r * hidden * element_bytes(type), terms, nullptr, nullptr, 0, hidden, type, false);
  }
  return true;
}

}  // namespace moecomm
