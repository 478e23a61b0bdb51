// Between nvcc's host code and the machine.
#pragma once
#include <functional>

#include "machine.hpp"

namespace simt {

constexpr int kSharedBytes = 232448;  // of a block, as on an H100

void load_kernels(const std::string& path);
void enqueue(void* stream, std::function<void()> work);  // on an emulated stream
void describe(Launch& launch);  // whose it is, and the memory that only its arguments name
void describe_quant(Launch& launch);

}  // namespace simt
