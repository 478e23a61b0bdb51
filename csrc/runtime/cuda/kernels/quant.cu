// A __global__ function per kind of tile. Warps process pieces of the tensor; no two pieces write the same
// memory.
#include <cuda_runtime.h>

#include "fabric/cuda/tiles.cuh"
#include "runtime/cuda/kernels/quant_launch.hpp"

namespace moecomm::cuda {
namespace {

constexpr int kWarps = 4, kColumnsOfWarp = 256;
constexpr int64_t kMostBlocks = 4096;

// Like with_element, for the types that can be quantized.
template <class Work>
__device__ void with_narrow_element(DType type, Work&& work) {
  with_element(type, [&](auto element) {
    using T = decltype(element);
    if constexpr (T::kBytes < 8) work(element);
  });
}

// Calls work(row or block of rows, first column) for this warp's pieces.
template <class Work>
__device__ void each_piece(int64_t rows, int64_t columns, Work&& work) {
  const int64_t across = (columns + kColumnsOfWarp - 1) / kColumnsOfWarp;
  for (int64_t i = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; i < rows * across;
       i += int64_t{gridDim.x} * kWarps)
    work(i / across, i % across * kColumnsOfWarp);
}

__global__ void __launch_bounds__(32 * kWarps)
    quantize_rows_kernel(char* codes, char* scales, const char* x, Matrix m, DType type, ScaleKind kind) {
  with_narrow_element(type, [&](auto element) {
    using T = decltype(element);
    each_piece(m.rows, m.columns, [&](int64_t row, int64_t base) {
      quantize_rows<T>(codes, scales, x, m, kind, row, base, Warp::lane());
    });
  });
}

__global__ void __launch_bounds__(32 * kWarps)
    quantize_columns_kernel(char* codes, float* scales, const char* x, Matrix m, DType type, ScaleKind kind) {
  with_narrow_element(type, [&](auto element) {
    using T = decltype(element);
    each_piece(m.row_blocks(), m.columns, [&](int64_t block, int64_t base) {
      quantize_columns<T>(codes, scales, x, m, kind, block, base, Warp::lane());
    });
  });
}

__global__ void __launch_bounds__(32 * kWarps)
    quantize_squares_kernel(char* codes, float* scales, const char* x, Matrix m, DType type, ScaleKind kind) {
  __shared__ uint32_t words[16];
  const Squad g{0, kWarps, words};
  const int64_t tiles = tiles_of(m.columns);
  with_narrow_element(type, [&](auto element) {
    using T = decltype(element);
    for (int64_t i = blockIdx.x; i < m.row_blocks() * tiles; i += gridDim.x)
      quantize_square<T>(g, codes, scales, x, m, kind, i / tiles, i % tiles);
  });
}

__global__ void __launch_bounds__(32 * kWarps)
    dequantize_kernel(char* x, const char* codes, const float* scales, Matrix m, DType type, TileShape tile) {
  with_narrow_element(type, [&](auto element) {
    using T = decltype(element);
    each_piece(m.rows, m.columns, [&](int64_t row, int64_t base) {
      dequantize_rows<T>(x, codes, scales, m, tile, row, base, Warp::lane());
    });
  });
}

__global__ void __launch_bounds__(32 * kWarps)
    transpose_kernel(char* dst, float* dst_scales, const char* src, const float* src_scales, Matrix m,
                     ScaleKind kind) {
  __shared__ TransposeScratch shared;
  const Squad g{0, kWarps, shared.words};
  const int64_t tiles = tiles_of(m.columns);
  for (int64_t i = blockIdx.x; i < m.row_blocks() * tiles; i += gridDim.x)
    transpose_square(g, shared, dst, dst_scales, src, src_scales, m, kind, i / tiles, i % tiles);
}

// A list of one row, for sums of one term.
__device__ Terms one_term(TermStore* store, const char* row, Wire wire, int64_t hidden) {
  Terms terms{store};
  terms.add_wire(Warp{}, row, wire, hidden);
  terms.close_group();
  Warp::sync();
  return terms;
}

template <class Work>
__device__ void each_row(int64_t rows, Work&& work) {
  __shared__ TermStore stores[kWarps];
  for (int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; row < rows;
       row += int64_t{gridDim.x} * kWarps) {
    work(row, &stores[threadIdx.x / 32]);
    Warp::sync();  // then the list may be overwritten
  }
}

__global__ void __launch_bounds__(32 * kWarps)
    encode_rows_kernel(char* coded, const char* x, int64_t rows, int64_t hidden, DType type, Wire wire) {
  with_narrow_element(type, [&](auto element) {
    using T = decltype(element);
    each_row(rows, [&](int64_t row, TermStore* store) {
      const Terms terms = one_term(store, x + row * hidden * T::kBytes, Wire::plain, hidden);
      reduce_wire<T>(coded + row * wire_row_bytes(wire, hidden, type), wire, terms, hidden, Warp::lane(), 32);
    });
  });
}

__global__ void __launch_bounds__(32 * kWarps)
    decode_rows_kernel(char* x, const char* coded, int64_t rows, int64_t hidden, DType type, Wire wire) {
  with_narrow_element(type, [&](auto element) {
    using T = decltype(element);
    each_row(rows, [&](int64_t row, TermStore* store) {
      const Terms terms = one_term(store, coded + row * wire_row_bytes(wire, hidden, type), wire, hidden);
      reduce_coded<T>(x + row * hidden * T::kBytes, terms, nullptr, hidden, Warp::lane(), 32);
    });
  });
}

Matrix matrix(int64_t rows, int64_t columns, uint64_t row_bytes, const char* x, const char* codes) {
  return {rows, columns,
          row_bytes % 16 == 0 && columns % 4 == 0 && address_of(x) % 16 == 0 && address_of(codes) % 4 == 0};
}

// The number of blocks for `pieces` pieces, of which a block processes `per_block` at a time.
unsigned blocks(int64_t pieces, int per_block) {
  const int64_t wanted = (pieces + per_block - 1) / per_block;
  return static_cast<unsigned>(wanted < kMostBlocks ? wanted : kMostBlocks);
}
int64_t warp_pieces(int64_t rows, int64_t columns) {
  return rows * ((columns + kColumnsOfWarp - 1) / kColumnsOfWarp);
}
cudaStream_t as_stream(void* stream) { return static_cast<cudaStream_t>(stream); }

}  // namespace

int launch_quantize(char* codes, float* scales, const char* x, int64_t rows, int64_t columns, DType type,
                    TileShape tile, ScaleKind kind, void* stream) {
  if (rows == 0 || columns == 0) return cudaSuccess;
  const Matrix m = matrix(rows, columns, columns * element_bytes(type), x, codes);
  if (tile == TileShape::row)
    quantize_rows_kernel<<<blocks(warp_pieces(rows, columns), kWarps), 32 * kWarps, 0, as_stream(stream)>>>(
        codes, bytes_of(scales), x, m, type, kind);
  else if (tile == TileShape::column)
    quantize_columns_kernel<<<blocks(warp_pieces(tiles_of(rows), columns), kWarps), 32 * kWarps, 0,
                              as_stream(stream)>>>(codes, scales, x, m, type, kind);
  else
    quantize_squares_kernel<<<blocks(tiles_of(rows) * tiles_of(columns), 1), 32 * kWarps, 0,
                              as_stream(stream)>>>(codes, scales, x, m, type, kind);
  return cudaGetLastError();
}

int launch_dequantize(char* x, const char* codes, const float* scales, int64_t rows, int64_t columns,
                      DType type, TileShape tile, void* stream) {
  if (rows == 0 || columns == 0) return cudaSuccess;
  const Matrix m = matrix(rows, columns, columns * element_bytes(type), x, codes);
  dequantize_kernel<<<blocks(warp_pieces(rows, columns), kWarps), 32 * kWarps, 0, as_stream(stream)>>>(
      x, codes, scales, m, type, tile);
  return cudaGetLastError();
}

int launch_transpose_requantize(char* dst, float* dst_scales, const char* src, const float* src_scales,
                                int64_t rows, int64_t columns, ScaleKind kind, void* stream) {
  if (rows == 0 || columns == 0) return cudaSuccess;
  const Matrix m = matrix(rows, columns, 0, nullptr, src);
  transpose_kernel<<<blocks(tiles_of(rows) * tiles_of(columns), 1), 32 * kWarps, 0, as_stream(stream)>>>(
      dst, dst_scales, src, src_scales, m, kind);
  return cudaGetLastError();
}

int launch_encode_rows(char* coded, const char* x, int64_t rows, int64_t hidden, DType type, Wire wire,
                       void* stream) {
  if (rows == 0 || hidden == 0) return cudaSuccess;
  encode_rows_kernel<<<blocks(rows, kWarps), 32 * kWarps, 0, as_stream(stream)>>>(coded, x, rows, hidden,
                                                                                  type, wire);
  return cudaGetLastError();
}

int launch_decode_rows(char* x, const char* coded, int64_t rows, int64_t hidden, DType type, Wire wire,
                       void* stream) {
  if (rows == 0 || hidden == 0) return cudaSuccess;
  decode_rows_kernel<<<blocks(rows, kWarps), 32 * kWarps, 0, as_stream(stream)>>>(x, coded, rows, hidden,
                                                                                  type, wire);
  return cudaGetLastError();
}

}  // namespace moecomm::cuda
