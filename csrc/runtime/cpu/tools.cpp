#include "runtime/cpu/tools.hpp"

#include <cstring>

#include "exec/lane.hpp"
#include "fabric/cpu/rows.hpp"

namespace moecomm {

void gather_rows(char* dst, const char* src, const int64_t* index, int64_t rows, uint64_t row_bytes,
                 bool stream) {
  const RowKernels& k = row_kernels();
  for (int64_t i = 0; i < rows; ++i)
    (stream ? k.stream : k.copy)(dst + i * row_bytes, src + index[i] * row_bytes, row_bytes);
  if (stream) k.fence();
}

void sum_rows(char* dst, const char* src, const int64_t* index, const float* weights, int64_t tokens,
              int terms, int64_t hidden, DType type) {
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
    k.reduce(dst + t * row_bytes, now, &next, nullptr, 0, hidden, type, true);
  }
}

int64_t count_different(const char* got, const char* want, const int64_t* index, int64_t rows,
                        int64_t row_elements, int64_t element_bytes) {
  const int64_t row_bytes = row_elements * element_bytes;
  int64_t different = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const char* a = got + i * row_bytes;
    const char* b = want + index[i] * row_bytes;
    if (std::memcmp(a, b, row_bytes) == 0) continue;
    for (int64_t j = 0; j < row_elements; ++j)
      different += std::memcmp(a + j * element_bytes, b + j * element_bytes, element_bytes) != 0;
  }
  return different;
}

RateProbe::RateProbe(int64_t bytes) : rows_(bytes / kRow), memory_(Memory::create(rows_ * kRow)) {
  memory_->populate(rows_ * kRow);
}

void RateProbe::write() {
  alignas(64) char row[kRow];
  std::memset(row, 1, kRow);
  for (int64_t i = 0; i < rows_; ++i) row_kernels().stream(memory_->data() + i * kRow, row, kRow);
  row_kernels().fence();
}

uint64_t RateProbe::read() {
  typedef uint64_t Line __attribute__((vector_size(64)));
  const Line* at = static_cast<const Line*>(static_cast<const void*>(memory_->data()));
  Line sum[4] = {};
  for (int64_t i = 0; i < rows_ * kRow / 64; i += 4)
    for (int j = 0; j < 4; ++j) sum[j] ^= at[i + j];
  const Line all = sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
  return all[0] ^ all[1] ^ all[2] ^ all[3] ^ all[4] ^ all[5] ^ all[6] ^ all[7];
}

}  // namespace moecomm
