// The row operations of the device fabric, run by 32 threads over an emulated copy engine: they give the bits
// of the CPU's row kernels for every type, number of terms, grouping and wire format. Copies of every length.
#include <random>

#include "fabric/cuda/ptx.cuh"  // the emulated one, before anything that includes it

#include "check.hpp"
#include "fabric/cpu/rows.hpp"
#include "fabric/cuda/device.cuh"

using namespace moecomm;

namespace {

using Bytes = std::vector<char>;
// Rows are 16-byte aligned.
struct Rows {
  explicit Rows(uint64_t bytes) : memory(bytes + 64) {}
  char* data() { return memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64; }
  Bytes memory;
};

constexpr uint32_t kStage = 256;

// Runs work(warp, fabric) on one warp with its own scratch memory.
template <class Work>
void on_warp(Work&& work) {
  alignas(128) static char shared[warp_shared_bytes(kStage)];
  static DeviceLinks links;
  char* region[2] = {nullptr, nullptr};
  emulated::run_warp([&] {
    const Warp g;
    WarpScratch* scratch = WarpScratch::open(g, shared, kStage);
    const DeviceFabric<LoopbackDeviceRail> fabric{&links, LoopbackDeviceRail{region}, scratch};
    work(g, fabric);
    fabric.finish_rows(g);
    if (g.lane() == 0) CHECK(emulated::engine().loads.empty() && emulated::engine().groups.empty());
  });
}

void fill(char* row, int64_t hidden, DType type, std::mt19937_64& random, bool odd) {
  for (int64_t i = 0; i < hidden; ++i) {
    const float v = i % 17 == 3 ? -0.0f
                                : static_cast<float>(static_cast<int>(random() % 2001) - 1000) /
                                      (1 + random() % 97) * (random() % 13 == 0 ? 1e-4f : 1.0f);
    if (type == DType::f64) {
      const double w = v * 1.000000001;
      std::memcpy(row + 8 * i, &w, 8);
    }
    if (type == DType::f32) std::memcpy(row + 4 * i, &v, 4);
    if (type == DType::f16) {
      const _Float16 h = static_cast<_Float16>(v);
      std::memcpy(row + 2 * i, &h, 2);
    }
    if (type == DType::bf16) {  // any bits: NaN and infinity too
      const uint16_t b = odd && random() % 50 == 0 ? static_cast<uint16_t>(random())
                                                   : static_cast<uint16_t>(std::bit_cast<uint32_t>(v) >> 16);
      std::memcpy(row + 2 * i, &b, 2);
    }
  }
}

struct Case {
  DType type;
  int64_t hidden;
  int terms;
  Wire coded;
  bool bias;
};

std::vector<Case> cases() {
  std::vector<Case> all;
  for (DType type : {DType::bf16, DType::f16, DType::f32, DType::f64})
    for (int64_t hidden : {int64_t{8}, int64_t{264}, int64_t{1032}})
      for (int terms : {0, 1, 7, 8, 9, 40}) all.push_back({type, hidden, terms, Wire::plain, terms % 2 == 1});
  for (DType type : {DType::bf16, DType::f16, DType::f32})
    for (Wire wire : {Wire::fp8, Wire::logfmt10})
      for (int64_t hidden : {int64_t{128}, int64_t{type == DType::f32 ? 396 : 392}, int64_t{1024}})
        all.push_back({type, hidden, 5, wire, true});
  return all;
}

// The terms of a case: some are quantized; groups end at random, and at the last term.
struct List {
  explicit List(const Case& c, std::mt19937_64& random) : rows(c.terms, Rows(8 * c.hidden + 4096)) {
    terms.store = &store;
    for (int i = 0; i < c.terms; ++i) {
      fill(rows[i].data(), c.hidden, c.type, random, true);
      store.weight[i] = static_cast<float>(random() % 1000) / 300;
      store.row[i] = rows[i].data();
      if (c.coded != Wire::plain && i % 2 == 0) {
        Terms one{&alone};
        alone.row[0] = rows[i].data();
        alone.weight[0] = 1;
        one.count = 1;
        one.group_end = 1;
        coded.push_back(Rows(wire_row_bytes(c.coded, c.hidden, c.type) + 64));
        row_kernels_named("base")->reduce_encode(coded.back().data(), c.coded, one, nullptr, 0, c.hidden,
                                                 c.hidden, c.type);
        store.row[i] = coded.back().data();
        store.weight[i] = 1;
        terms.coded |= uint64_t{1} << i;
      }
      if (random() % 3 == 0 || i + 1 == c.terms) terms.group_end |= uint64_t{1} << i;
    }
    terms.count = c.terms;
    terms.wire = c.coded;
    terms.hidden = c.hidden;
  }
  std::vector<Rows> rows;
  std::deque<Rows> coded;
  TermStore store, alone;
  Terms terms;
};

}  // namespace

TEST_CASES(sums, cases()) {
  std::mt19937_64 random(value.hidden * 64 + value.terms);
  List list(value, random);
  const uint64_t bytes = value.hidden * element_bytes(value.type);
  Rows want(bytes), got(bytes);
  std::vector<float> bias(value.hidden);
  for (float& b : bias) b = static_cast<float>(random() % 100) / 7;
  row_kernels_named("base")->reduce(want.data(), list.terms, nullptr, value.bias ? bias.data() : nullptr, 0,
                                    value.hidden, value.type, false);
  on_warp([&](Warp g, auto fabric) {
    fabric.reduce_rows(g, got.data(), list.terms, nullptr, value.bias ? bias.data() : nullptr, value.hidden,
                       value.type);
  });
  CHECK(std::memcmp(want.data(), got.data(), bytes) == 0);
}

TEST_CASES(coded_sums, cases()) {
  if (value.type == DType::f64 || value.terms == 0) return;
  std::mt19937_64 random(value.hidden + value.terms);
  List list(value, random);
  for (Wire wire : {Wire::fp8, Wire::logfmt10}) {
    const uint64_t bytes = wire_row_bytes(wire, value.hidden, value.type);
    Rows want(bytes), got(bytes);
    row_kernels_named("base")->reduce_encode(want.data(), wire, list.terms, nullptr, 0, value.hidden,
                                             value.hidden, value.type);
    on_warp([&](Warp g, auto fabric) {
      fabric.reduce_encode(g, got.data(), wire, list.terms, nullptr, value.hidden, value.type);
    });
    CHECK(std::memcmp(want.data(), got.data(), bytes) == 0);
  }
}

TEST(quantized_rows) {
  std::mt19937_64 random(3);
  for (DType type : {DType::bf16, DType::f16, DType::f32})
    for (ScaleKind kind : {ScaleKind::f32, ScaleKind::ue8m0})
      for (int64_t hidden : {16, 128, 144, 1168}) {
        Rows row(hidden * 4), want(hidden), got(hidden), want_scales(4 * tiles_of(hidden) + 16),
            got_scales(4 * tiles_of(hidden) + 16);
        fill(row.data(), hidden, type, random, true);
        row_kernels_named("base")->quantize(want.data(), want_scales.data(), row.data(), 0, hidden, hidden,
                                            type, kind);
        on_warp([&](Warp g, auto fabric) {
          fabric.quantize_row(g, got.data(), got_scales.data(), row.data(), hidden, type, kind);
        });
        CHECK(std::memcmp(want.data(), got.data(), hidden) == 0);
        CHECK(std::memcmp(want_scales.data(), got_scales.data(), 4 * scale_words(hidden, kind)) == 0);
      }
}

TEST(copies) {
  std::mt19937_64 random(5);
  const std::vector<uint64_t> lengths{
      4,    16,   48,   1008, 1024, 1028,
      1040, 1300, 1536, 2560, 4112};  // eleven: each by copy_row and by spread_row
  std::deque<Rows> from, to;
  for (int i = 0; i < 60; ++i) {
    from.emplace_back(4112);
    for (int b = 0; b < 4112; ++b) from.back().data()[b] = static_cast<char>(random());
    to.emplace_back(3 * 4112 + 128);
  }
  // Many operations without a pause between them: stages are reused while stores are in flight.
  on_warp([&](Warp g, auto fabric) {
    for (int i = 0; i < 60; ++i) {
      const uint64_t bytes = lengths[i % lengths.size()];
      if (g.lane() == 0)
        for (int t = 0; t < 3; ++t) fabric.targets()[t] = to[i].data() + t * 4112;
      g.sync();
      if (i % 4 == 0)
        fabric.copy_row(g, to[i].data(), from[i].data(), bytes);
      else
        fabric.spread_row(g, fabric.targets(), i % 4, from[i].data(), bytes);
      g.sync();
    }
  });
  for (int i = 0; i < 60; ++i) {
    const uint64_t bytes = lengths[i % lengths.size()];
    for (int t = 0; t < 3; ++t) {
      const char* row = to[i].data() + t * 4112;
      const bool written = t < std::max(1, i % 4);
      CHECK(std::memcmp(row, from[i].data(), bytes) == 0 || !written);
      CHECK(std::count(row + (written ? bytes : 0), row + 4112, 0) ==
            static_cast<int64_t>(4112 - (written ? bytes : 0)));
    }
  }
}

TEST(zeros) {
  Rows row(1100);
  std::memset(row.data(), 1, 1100);
  on_warp([&](Warp g, auto fabric) {
    fabric.zero_row(g, row.data(), 1024);
    fabric.zero_row(g, row.data() + 1028, 20);
  });
  CHECK_EQ(std::count(row.data(), row.data() + 1024, 0), 1024);
  CHECK_EQ(std::count(row.data() + 1024, row.data() + 1028, 1), 4);
  CHECK_EQ(std::count(row.data() + 1028, row.data() + 1048, 0), 20);
}
