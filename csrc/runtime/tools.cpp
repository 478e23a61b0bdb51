#include "runtime/tools.hpp"

#include <algorithm>
#include <chrono>
#include <vector>

#include "exec/lane.hpp"
#include "fabric/rows.hpp"
#include "runtime/memory.hpp"

namespace moecomm {
namespace {

double median_rate(int64_t bytes, int repeats, auto&& work) {
  std::vector<double> rates;
  for (int i = 0; i < repeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    work();
    rates.push_back(bytes / std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  std::sort(rates.begin(), rates.end());
  return rates[rates.size() / 2];
}

constexpr int64_t kRow = 14336;

}  // namespace

void gather_rows(char* dst, const char* src, const int64_t* index, int64_t rows, uint64_t row_bytes, bool stream) {
  const RowKernels& k = row_kernels();
  for (int64_t i = 0; i < rows; ++i) (stream ? k.stream : k.copy)(dst + i * row_bytes, src + index[i] * row_bytes, row_bytes);
  if (stream) k.fence();
}

void sum_rows(char* dst, const char* src, const int64_t* index, const float* weights, int64_t tokens, int terms, int64_t hidden, DType type) {
  const RowKernels& k = row_kernels();
  const uint64_t row_bytes = hidden * element_bytes(type);
  TermStore stores[2];
  const auto terms_of = [&](int64_t t) {
    Terms out{&stores[t % 2]};
    for (int j = 0; t < tokens && j < terms; ++j)
      if (const int64_t r = index[t * terms + j]; r >= 0)
        out.add(Lane{}, src + r * row_bytes, [&] { return weights ? weights[t * terms + j] : 1.0f; });
    out.close_group();
    return out;
  };
  Terms next = terms_of(0);
  for (int64_t t = 0; t < tokens; ++t) {
    const Terms now = next;
    next = terms_of(t + 1);
    k.reduce(dst + t * row_bytes, now, &next, nullptr, 0, hidden, type);
  }
}

double write_rate(int64_t bytes, int repeats) {
  const auto memory = Memory::create(bytes);
  memory->populate(bytes);
  std::vector<char> row(kRow, 1);
  return median_rate(bytes / kRow * kRow, repeats, [&] {
    for (int64_t i = 0; i + kRow <= bytes; i += kRow) row_kernels().stream(memory->data() + i, row.data(), kRow);
    row_kernels().fence();
  });
}

double read_rate(int64_t bytes, int repeats) {
  const auto memory = Memory::create(bytes);
  memory->populate(bytes);
  std::vector<char> row(kRow);
  TermStore stores[2];
  // As combine reads: a few rows that lie far apart, the next ones prefetched.
  const int64_t rows = bytes / kRow, stride = rows / 5;
  const auto terms_of = [&](int64_t i) {
    Terms t{&stores[i % 2]};
    for (int j = 0; j < 5; ++j) t.add(Lane{}, memory->data() + (j * stride + i) * kRow, [] { return 1.0f; });
    t.close_group();
    return t;
  };
  return median_rate(stride * 5 * kRow, repeats, [&] {
    for (int64_t i = 0; i + 1 < stride; ++i) {
      const Terms now = terms_of(i), next = terms_of(i + 1);
      row_kernels().reduce(row.data(), now, &next, nullptr, 0, kRow / 2, DType::bf16);
    }
  });
}

}  // namespace moecomm
