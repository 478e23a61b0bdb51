#include "runtime/tools.hpp"

#include <algorithm>
#include <chrono>
#include <vector>

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
  Terms now, next;
  const auto terms_of = [&](int64_t t, Terms& out) {
    out.clear();
    for (int j = 0; j < terms; ++j)
      if (const int64_t r = index[t * terms + j]; r >= 0) out.add(src + r * row_bytes, weights ? weights[t * terms + j] : 1.0f);
    out.close_group();
  };
  next.clear();
  if (tokens > 0) terms_of(0, next);
  for (int64_t t = 0; t < tokens; ++t) {
    now = next;
    next.clear();
    if (t + 1 < tokens) terms_of(t + 1, next);
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
  Terms now, next;
  // As combine reads: a few rows that lie far apart, the next ones prefetched.
  const int64_t rows = bytes / kRow, stride = rows / 5;
  const auto set = [&](Terms& t, int64_t i) {
    t.clear();
    for (int j = 0; j < 5; ++j) t.add(memory->data() + (j * stride + i) * kRow, 1.0f);
    t.close_group();
  };
  return median_rate(stride * 5 * kRow, repeats, [&] {
    for (int64_t i = 0; i + 1 < stride; ++i) {
      set(now, i);
      set(next, i + 1);
      row_kernels().reduce(row.data(), now, &next, nullptr, 0, kRow / 2, DType::bf16);
    }
  });
}

}  // namespace moecomm
