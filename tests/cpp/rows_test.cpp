// Sums of rows: every build of the kernels this machine has against scalar code, bit for bit, whatever the
// length of a row, the number of terms and their groups, weights, a bias, and where the result goes. Nothing
// outside the row is written.
#include <cmath>
#include <cstdint>
#include <random>

#include "check.hpp"
#include "fabric/cpu/rows.hpp"

using namespace moecomm;

namespace {

std::vector<const char*> builds() { return {"avx512", "avx2", "base"}; }

template <class T>
T read(const char* p) {
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

float element(const char* row, int64_t i, DType type) {
  switch (type) {
    case DType::bf16: {
      const uint32_t bits = uint32_t{read<uint16_t>(row + 2 * i)} << 16;
      return read<float>(reinterpret_cast<const char*>(&bits));
    }
    case DType::f16: return static_cast<float>(read<_Float16>(row + 2 * i));
    default: return read<float>(row + 4 * i);
  }
}

// Rounded to nearest even, as it lies in memory; every NaN is the same one.
uint32_t rounded(float v, DType type) {
  if (std::isnan(v)) return ~0u;
  if (type == DType::f32) return read<uint32_t>(reinterpret_cast<const char*>(&v));
  if (type == DType::f16) {
    const _Float16 h = static_cast<_Float16>(v);
    return read<uint16_t>(reinterpret_cast<const char*>(&h));
  }
  const uint32_t bits = read<uint32_t>(reinterpret_cast<const char*>(&v)), kept = bits >> 16,
                 lost = bits & 0xffff;
  return kept + (lost > 0x8000 || (lost == 0x8000 && (kept & 1)));
}

uint32_t stored(const char* row, int64_t i, DType type) {
  if (std::isnan(element(row, i, type))) return ~0u;
  return type == DType::f32 ? read<uint32_t>(row + 4 * i) : read<uint16_t>(row + 2 * i);
}

float sum(const Terms& terms, const float* bias, int64_t i, DType type) {
  float total = 0, part = 0;
  bool first_group = true, first_term = true;
  for (int t = 0; t < terms.count; ++t) {
    const float product =
        element(static_cast<const char*>(terms.store->row[t]), i, type) * terms.store->weight[t];
    part = first_term ? product : part + product;
    first_term = false;
    if (!(terms.group_end >> t & 1)) continue;
    total = first_group ? part : total + part;
    first_group = false;
    first_term = true;
  }
  return bias ? total + bias[i] : total;
}

}  // namespace

TEST_CASES(sums_equal_scalar_code, builds()) {
  const RowKernels* kernels = row_kernels_named(value);
  if (!kernels) SKIP(std::string("this machine has no ") + value);
  std::mt19937_64 random(std::random_device{}());
  const auto pick = [&](int n) { return static_cast<int>(random() % n); };
  constexpr DType kTypes[] = {DType::bf16, DType::f16, DType::f32};
  alignas(64) static char out[8192];
  for (int round = 0; round < 3000; ++round) {
    const DType type = kTypes[pick(3)];
    const int bytes = type == DType::f32 ? 4 : 2, count = pick(9), offset = 16 * pick(5);
    const int64_t hidden = (16 / bytes) * (1 + pick(90)), begin = hidden > kTile && pick(2) ? kTile : 0;
    // Any bits (NaN, infinities, subnormals), or small numbers whose sums meet ties of the rounding.
    std::vector<char> rows(count * hidden * bytes);
    const bool any = pick(2);
    for (size_t i = 0; i < rows.size(); i += bytes) {
      const float small = (pick(512) - 256) / 64.0f;
      const uint32_t bits = any ? static_cast<uint32_t>(random()) : rounded(small, type);
      std::memcpy(rows.data() + i, &bits, bytes);
    }
    std::vector<float> biases(hidden);
    for (float& b : biases) b = (pick(2000) - 1000) / 512.0f;
    TermStore store;
    Terms terms{&store};
    for (int t = 0; t < count; ++t) {
      store.row[t] = rows.data() + t * hidden * bytes;
      store.weight[t] = pick(2) ? 1.0f : (pick(64) - 32) / 8.0f;
      ++terms.count;
      if (pick(2)) terms.close_group();
    }
    terms.close_group();
    const float* bias = pick(2) ? biases.data() : nullptr;
    std::memset(out, 0x5a, sizeof out);
    char* row = out + 64 + offset;
    kernels->reduce(row, terms, pick(2) ? &terms : nullptr, bias, begin, hidden, type, pick(2));
    kernels->fence();
    for (int64_t i = begin; i < hidden; ++i)
      CHECK_EQ(stored(row, i, type), rounded(sum(terms, bias, i, type), type));
    for (const char* p = out; p < out + sizeof out; ++p)
      if (p < row + begin * bytes || p >= row + hidden * bytes) CHECK(*p == 0x5a);
  }
}
