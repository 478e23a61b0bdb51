// Conversion of whole tensors to and from FP8 tiles. Matrices are row-major with any number of columns.
// `whole`: rows are multiples of 16 bytes; else elements are copied one by one. base/quantize.hpp defines the
// codes.
#pragma once
#include "fabric/cuda/reduce.cuh"
#include "fabric/cuda/squad.cuh"

namespace moecomm {

struct Matrix {
  int64_t rows;
  int64_t columns;
  bool whole;

  __device__ int64_t row_blocks() const { return tiles_of(rows); }
  __device__ int64_t block_end(int64_t block) const {
    return (block + 1) * kTile < rows ? (block + 1) * kTile : rows;
  }
};

// -- eight adjacent elements of a row ------------------------------------------------------------------

template <class Unit>
__device__ uint4 gather_units(const char* p, int64_t units) {
  uint32_t w[4] = {};
  constexpr int kPerWord = 4 / sizeof(Unit);
  MOE_UNROLL(8)
  for (int i = 0; i < static_cast<int>(16 / sizeof(Unit)); ++i)
    if (i < units)
      w[i / kPerWord] |= uint32_t{*as<const volatile Unit>(p + i * sizeof(Unit))} << i % kPerWord * 16;
  return {w[0], w[1], w[2], w[3]};
}

template <class Unit>
__device__ void scatter_units(char* p, uint4 v, int64_t units) {
  const uint32_t w[4] = {v.x, v.y, v.z, v.w};
  constexpr int kPerWord = 4 / sizeof(Unit);
  MOE_UNROLL(8)
  for (int i = 0; i < static_cast<int>(16 / sizeof(Unit)); ++i)
    if (i < units) *as<Unit>(p + i * sizeof(Unit)) = static_cast<Unit>(w[i / kPerWord] >> i % kPerWord * 16);
}

template <int kBytes>
struct UnitOf {
  using type = uint32_t;
};
template <>
struct UnitOf<2> {
  using type = uint16_t;
};

template <class T>
__device__ void load_any_eight(const char* row, int64_t e, const Matrix& m, float* v) {
  if (m.whole) return load_eight<T>(row, e, m.columns, v);
  MOE_UNROLL(2)
  for (int at = 0; at < 8; at += T::kPerLane)
    T::unpack(gather_units<typename UnitOf<T::kBytes>::type>(row + (e + at) * T::kBytes, m.columns - e - at),
              v + at);
}

template <class T>
__device__ void store_any_eight(char* row, int64_t e, const Matrix& m, const float* v) {
  if (m.whole) return store_eight<T>(row, e, m.columns, v);
  MOE_UNROLL(2)
  for (int at = 0; at < 8; at += T::kPerLane)
    scatter_units<typename UnitOf<T::kBytes>::type>(row + (e + at) * T::kBytes, T::pack(v + at),
                                                    m.columns - e - at);
}

__device__ inline void store_codes(char* row, int64_t e, const Matrix& m, EightBytes codes) {
  if (e >= m.columns) return;
  if (m.whole) return store_bytes(row + e, codes, e + 4 < m.columns);
  MOE_UNROLL(8)
  for (int i = 0; i < 8; ++i)
    if (e + i < m.columns) row[e + i] = static_cast<char>(byte_of(codes, i));
}

__device__ inline EightBytes load_codes(const char* row, int64_t e, const Matrix& m) {
  if (e >= m.columns) return {};
  if (m.whole) return load_bytes(row + e, e + 4 < m.columns);
  uint32_t code[8];
  MOE_UNROLL(8)
  for (int i = 0; i < 8; ++i)
    code[i] = e + i < m.columns ? uint32_t{*as<const volatile uint8_t>(row + e + i)} : 0u;
  return pack_bytes(code);
}

// -- tiles of rows: a warp processes two, 256 columns from `base` on -----------------------------------

template <class T>
__device__ void quantize_rows(char* codes, char* scales, const char* x, const Matrix& m, ScaleKind kind,
                              int64_t row, int64_t base, int lane) {
  const int64_t e = base + int64_t{lane} * 8, tile = e / kTile, tiles = tiles_of(m.columns);
  float v[8];
  load_any_eight<T>(x + row * m.columns * T::kBytes, e, m, v);
  const float scale = encode_fp8(
      v, kind, [&](const uint32_t* code) { store_codes(codes + row * m.columns, e, m, pack_bytes(code)); });
  if (lane % 16 || tile >= tiles) return;
  char* own = scales + row * 4 * scale_words(m.columns, kind);
  if (kind == ScaleKind::f32) {
    as<float>(own)[tile] = scale;
  } else {
    own[tile] = static_cast<char>(ue8m0_encode(scale));
    for (int64_t i = tile + 1; tile + 1 == tiles && i % 4; ++i) own[i] = 0;  // pads the last int32
  }
}

// -- tiles of columns: a warp processes 256 columns of a block of rows ---------------------------------

template <class T>
__device__ void quantize_columns(char* codes, float* scales, const char* x, const Matrix& m, ScaleKind kind,
                                 int64_t block, int64_t base, int lane) {
  const int64_t e = base + int64_t{lane} * 8;
  if (e >= m.columns) return;
  uint32_t most[8] = {};
  float v[8];
  for (int64_t r = block * kTile; r < m.block_end(block); ++r) {
    load_any_eight<T>(x + r * m.columns * T::kBytes, e, m, v);
    MOE_UNROLL(8)
    for (int i = 0; i < 8; ++i) {
      const uint32_t magnitude = finite_magnitude<uint32_t>(v[i]);
      most[i] = most[i] > magnitude ? most[i] : magnitude;
    }
  }
  float inverse[8];
  MOE_UNROLL(8)
  for (int i = 0; i < 8; ++i) {
    const auto s = tile_scale<uint32_t>(__uint_as_float(most[i]), kind);
    inverse[i] = s.inverse;
    if (e + i < m.columns) scales[block * m.columns + e + i] = s.scale;
  }
  for (int64_t r = block * kTile; r < m.block_end(block); ++r) {
    load_any_eight<T>(x + r * m.columns * T::kBytes, e, m, v);
    uint32_t code[8];
    MOE_UNROLL(8)
    for (int i = 0; i < 8; ++i) code[i] = e4m3_encode<uint32_t>(v[i] * inverse[i]);
    store_codes(codes + r * m.columns, e, m, pack_bytes(code));
  }
}

// -- squares: a squad processes one, half a warp a row of it --------------------------------------------

// The largest value of all lanes. Uses the `words` of the squad.
__device__ inline uint32_t squad_max(Squad g, uint32_t v) {
  v = half_max(v);
  const uint32_t other = __shfl_xor_sync(~0u, v, 16);
  if (g.lane() % 32 == 0) g.words[g.lane() / 32] = v > other ? v : other;
  g.sync();
  v = 0;
  for (int i = 0; i < g.warps; ++i) v = v > g.words[i] ? v : g.words[i];
  g.sync();
  return v;
}

template <class T>
__device__ void quantize_square(Squad g, char* codes, float* scales, const char* x, const Matrix& m,
                                ScaleKind kind, int64_t block, int64_t tile) {
  const int64_t e = tile * kTile + g.lane() % 16 * 8;
  uint32_t most = 0;
  float v[8];
  for (int64_t r = block * kTile + g.lane() / 16; r < m.block_end(block) && e < m.columns;
       r += g.size() / 16) {
    load_any_eight<T>(x + r * m.columns * T::kBytes, e, m, v);
    MOE_UNROLL(8)
    for (int i = 0; i < 8; ++i) {
      const uint32_t magnitude = finite_magnitude<uint32_t>(v[i]);
      most = most > magnitude ? most : magnitude;
    }
  }
  const auto s = tile_scale<uint32_t>(__uint_as_float(squad_max(g, most)), kind);
  if (g.lane() == 0) scales[block * tiles_of(m.columns) + tile] = s.scale;
  for (int64_t r = block * kTile + g.lane() / 16; r < m.block_end(block) && e < m.columns;
       r += g.size() / 16) {
    load_any_eight<T>(x + r * m.columns * T::kBytes, e, m, v);
    uint32_t code[8];
    MOE_UNROLL(8)
    for (int i = 0; i < 8; ++i) code[i] = e4m3_encode<uint32_t>(v[i] * s.inverse);
    store_codes(codes + r * m.columns, e, m, pack_bytes(code));
  }
}

// -- dequantization -------------------------------------------------------------------------------------

template <class T>
__device__ void dequantize_rows(char* x, const char* codes, const float* scales, const Matrix& m,
                                TileShape tile, int64_t row, int64_t base, int lane) {
  const int64_t e = base + int64_t{lane} * 8, tiles = tiles_of(m.columns);
  if (e >= m.columns) return;
  const EightBytes coded = load_codes(codes + row * m.columns, e, m);
  const float* own =
      scales + (tile == TileShape::row ? row : row / kTile) * (tile == TileShape::column ? m.columns : tiles);
  float v[8];
  MOE_UNROLL(8)
  for (int i = 0; i < 8; ++i) {
    const float scale = tile != TileShape::column ? own[e / kTile] : e + i < m.columns ? own[e + i] : 0.0f;
    v[i] = e4m3_decode<float>(byte_of(coded, i)) * scale;
  }
  store_any_eight<T>(x + row * m.columns * T::kBytes, e, m, v);
}

// -- 1x128 tiles to 1x128 tiles of the transposed matrix: a squad of four warps processes a square ------

struct TransposeScratch {
  static constexpr int kPitch = 132;  // adjacent rows start in adjacent banks
  char in[kTile * kPitch];
  char out[kTile * kPitch];
  uint32_t words[16];
};

__device__ inline void transpose_square(Squad g, TransposeScratch& shared, char* dst, float* dst_scales,
                                        const char* src, const float* src_scales, const Matrix& m,
                                        ScaleKind kind, int64_t block, int64_t tile) {
  constexpr int kPitch = TransposeScratch::kPitch;
  const int64_t first_row = block * kTile, first_column = tile * kTile, tiles = tiles_of(m.columns);
  const int rows = static_cast<int>(m.block_end(block) - first_row);
  const int columns = static_cast<int>(m.columns - first_column < kTile ? m.columns - first_column : kTile);
  for (int r = g.lane() / 16; r < rows; r += g.size() / 16) {
    const int c = g.lane() % 16 * 8;
    const EightBytes codes = load_codes(src + (first_row + r) * m.columns, first_column + c, m);
    auto* to = as<uint32_t>(shared.in + r * kPitch + c);
    to[0] = codes.low;
    to[1] = codes.high;
  }
  g.sync();
  const int c = g.lane();  // one column per lane
  const auto value = [&](int r) {
    const uint32_t code = static_cast<uint8_t>(shared.in[r * kPitch + c]);
    return e4m3_decode<float>(code) * src_scales[(first_row + r) * tiles + tile];
  };
  uint32_t most = 0;
  for (int r = 0; r < rows; ++r) {
    const uint32_t magnitude = finite_magnitude<uint32_t>(value(r));
    most = most > magnitude ? most : magnitude;
  }
  const auto s = tile_scale<uint32_t>(__uint_as_float(most), kind);
  for (int r = 0; r < rows; r += 4) {
    uint32_t word = 0;
    MOE_UNROLL(4)
    for (int i = 0; i < 4; ++i)
      if (r + i < rows) word |= e4m3_encode<uint32_t>(value(r + i) * s.inverse) << 8 * i;
    *as<uint32_t>(shared.out + c * kPitch + r) = word;
  }
  if (c < columns) dst_scales[(first_column + c) * m.row_blocks() + block] = s.scale;
  g.sync();
  for (int i = g.lane() / 32; i < columns; i += g.warps) {
    char* to = dst + (first_column + i) * m.rows + first_row;
    const int r = g.lane() % 32 * 4;
    if (m.rows % 4 == 0) {
      if (r < rows) *as<uint32_t>(to + r) = *as<uint32_t>(shared.out + i * kPitch + r);
    } else {
      for (int j = r; j < r + 4 && j < rows; ++j) to[j] = shared.out[i * kPitch + j];
    }
  }
  g.sync();  // then the scratch may be overwritten
}

}  // namespace moecomm
