// Quantization of whole tensors to FP8 tiles by the code of the cuda world, with a thread per lane: it gives
// the codes and scales of the CPU's row kernels for every type, kind of tile, and number of rows and columns.
#include <random>

#include "fabric/cuda/ptx.cuh"  // the emulated one, before anything that includes it

#include "check.hpp"
#include "fabric/cuda/tiles.cuh"
#include "runtime/cpu/quant.hpp"

using namespace moecomm;

namespace {

constexpr int kWarps = 4;

struct Case {
  DType type = DType::bf16;
  int64_t rows = 3, columns = 264;
};

// A matrix whose rows are 16-byte aligned if possible.
struct Tensor {
  explicit Tensor(uint64_t bytes) : memory(bytes + 64) {}
  char* data() { return memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64; }
  float* floats() { return reinterpret_cast<float*>(data()); }
  std::vector<char> memory;
};

Matrix matrix_of(const Case& c) {
  return {c.rows, c.columns, c.columns * element_bytes(c.type) % 16 == 0 && c.columns % 4 == 0};
}

void fill(char* x, const Case& c, std::mt19937_64& random) {
  for (int64_t i = 0; i < c.rows * c.columns; ++i) {
    const float v = random() % 40 == 0 ? 0.0f
                                       : static_cast<float>(static_cast<int>(random() % 4001) - 2000) /
                                             static_cast<float>(1 + random() % 300);
    if (c.type == DType::f32) std::memcpy(x + 4 * i, &v, 4);
    if (c.type == DType::f16) {
      const _Float16 h = static_cast<_Float16>(v);
      std::memcpy(x + 2 * i, &h, 2);
    }
    if (c.type == DType::bf16) {  // NaN and infinity too
      const uint16_t b = random() % 90 == 0 ? static_cast<uint16_t>(random())
                                            : static_cast<uint16_t>(std::bit_cast<uint32_t>(v) >> 16);
      std::memcpy(x + 2 * i, &b, 2);
    }
  }
}

uint64_t scale_count(const Case& c, TileShape tile) {
  if (tile == TileShape::row) return c.rows * tiles_of(c.columns);
  return tiles_of(c.rows) * (tile == TileShape::column ? c.columns : tiles_of(c.columns));
}

// Runs work(squad) on one squad of four warps.
template <class Work>
void on_squad(Work&& work) {
  static uint32_t words[16];
  emulated::run_block(kWarps, kWarps, [&] { work(Squad{0, kWarps, words}); });
}

template <class T>
void quantize_all(Squad g, char* codes, char* scales, const char* x, const Matrix& m, TileShape tile,
                  ScaleKind kind) {
  auto* floats = reinterpret_cast<float*>(scales);
  const int warp = g.lane() / 32;
  if (tile == TileShape::square) {
    for (int64_t i = 0; i < m.row_blocks() * tiles_of(m.columns); ++i)
      quantize_square<T>(g, codes, floats, x, m, kind, i / tiles_of(m.columns), i % tiles_of(m.columns));
    return;
  }
  const int64_t across = (m.columns + 255) / 256, down = tile == TileShape::row ? m.rows : m.row_blocks();
  for (int64_t i = warp; i < down * across; i += kWarps) {
    if (tile == TileShape::row)
      quantize_rows<T>(codes, scales, x, m, kind, i / across, i % across * 256, Warp::lane());
    else
      quantize_columns<T>(codes, floats, x, m, kind, i / across, i % across * 256, Warp::lane());
  }
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (DType type : {DType::bf16, DType::f16, DType::f32})
    for (auto [rows, columns] : {std::pair{1, 128}, {3, 48}, {2, 300}, {130, 17}, {257, 204}, {5, 392}})
      all.push_back({type, rows, columns});
  return all;
}

}  // namespace

TEST_CASES(tiles, cases()) {
  std::mt19937_64 random(value.rows * 1000 + value.columns);
  const Matrix m = matrix_of(value);
  const uint64_t count = value.rows * value.columns;
  Tensor x(4 * count);
  fill(x.data(), value, random);
  for (TileShape tile : {TileShape::row, TileShape::column, TileShape::square})
    for (ScaleKind kind : {ScaleKind::f32, ScaleKind::ue8m0}) {
      const uint64_t scale_bytes = tile == TileShape::row ? 4 * value.rows * scale_words(value.columns, kind)
                                                          : 4 * scale_count(value, tile);
      Tensor want(count), got(count), want_scales(scale_bytes), got_scales(scale_bytes), values(4 * count),
          back(4 * count);
      std::memset(got.data(), 0x11, count);
      std::memset(got_scales.data(), 0x11, scale_bytes);
      CHECK(quantize(want.data(), want_scales.floats(), x.data(), value.rows, value.columns, value.type, tile,
                     kind, "base"));
      on_squad([&](Squad g) {
        with_element(value.type, [&](auto element) {
          using T = decltype(element);
          if constexpr (T::kBytes < 8)
            quantize_all<T>(g, got.data(), got_scales.data(), x.data(), m, tile, kind);
        });
      });
      CHECK(std::memcmp(want.data(), got.data(), count) == 0);
      CHECK(std::memcmp(want_scales.data(), got_scales.data(), scale_bytes) == 0);
      if (kind != ScaleKind::f32) continue;
      CHECK(dequantize(values.data(), want.data(), want_scales.floats(), value.rows, value.columns,
                       value.type, tile, "base"));
      on_squad([&](Squad g) {
        with_element(value.type, [&](auto element) {
          using T = decltype(element);
          const int64_t across = (m.columns + 255) / 256;
          if constexpr (T::kBytes < 8)
            for (int64_t i = g.lane() / 32; i < m.rows * across; i += kWarps)
              dequantize_rows<T>(back.data(), want.data(), want_scales.floats(), m, tile, i / across,
                                 i % across * 256, Warp::lane());
        });
      });
      CHECK(std::memcmp(values.data(), back.data(), count * element_bytes(value.type)) == 0);
    }
}

TEST_CASES(transposed, cases()) {
  if (value.type != DType::bf16) return;
  std::mt19937_64 random(value.rows);
  const Matrix m{value.rows, value.columns, value.columns % 16 == 0};
  const uint64_t count = value.rows * value.columns, tiles = value.columns * tiles_of(value.rows);
  Tensor x(2 * count), codes(count), want(count), got(count), scales(4 * scale_count(value, TileShape::row)),
      want_scales(4 * tiles), got_scales(4 * tiles);
  fill(x.data(), value, random);
  CHECK(quantize(codes.data(), scales.floats(), x.data(), value.rows, value.columns, value.type,
                 TileShape::row, ScaleKind::f32, "base"));
  for (ScaleKind kind : {ScaleKind::f32, ScaleKind::ue8m0}) {
    CHECK(transpose_requantize(want.data(), want_scales.floats(), codes.data(), scales.floats(), value.rows,
                               value.columns, kind, "base"));
    static TransposeScratch shared;
    emulated::run_block(kWarps, kWarps, [&] {
      const Squad g{0, kWarps, shared.words};
      for (int64_t i = 0; i < m.row_blocks() * tiles_of(m.columns); ++i)
        transpose_square(g, shared, got.data(), got_scales.floats(), codes.data(), scales.floats(), m, kind,
                         i / tiles_of(m.columns), i % tiles_of(m.columns));
    });
    CHECK(std::memcmp(want.data(), got.data(), count) == 0);
    CHECK(std::memcmp(want_scales.data(), got_scales.data(), 4 * tiles) == 0);
  }
}
