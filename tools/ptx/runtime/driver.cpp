// What nvcc's host code calls of CUDA: the kernels' own launch functions run as they are, and a launch
// becomes a grid of the machine. Without CUDA's header, whose emulated twin defines the same names for the
// rest of the runtime.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

#include "driver.hpp"

namespace simt {
namespace {

struct Kernels {
  std::mutex mutex;
  std::map<const void*, std::string> by_stub;
  std::vector<std::unique_ptr<Program>> programs;
  std::vector<std::vector<Ins>> originals;  // of their code
};
Kernels& kernels() {
  static Kernels all;
  return all;
}
std::string& last_error() {
  thread_local std::string text;
  return text;
}

struct Configuration {
  unsigned grid[3], block[3];
  size_t shared;
  void* stream;
};
thread_local std::vector<Configuration> configurations;

const Program& program_of(const std::string& kernel) {
  std::lock_guard lock(kernels().mutex);
  for (const auto& p : kernels().programs)
    for (const Function& f : p->functions)
      if (f.entry && f.name == kernel) return *p;
  throw std::runtime_error("the PTX world: no PTX has been loaded for " + kernel);
}

}  // namespace

void load_kernels(const std::string& path) {
  auto p = std::make_unique<Program>(load_program(path));
  std::lock_guard lock(kernels().mutex);
  kernels().originals.push_back(p->code);
  kernels().programs.push_back(std::move(p));
}

}  // namespace simt

extern "C" {

struct dim3_ {
  unsigned x, y, z;
};

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, void*, void*, void*,
                            void*, int*) {
  simt::kernels().by_stub[stub] = name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

unsigned __cudaPushCallConfiguration(dim3_ grid, dim3_ block, size_t shared, void* stream) {
  simt::configurations.push_back({{grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared, stream});
  return 0;
}
int __cudaPopCallConfiguration(dim3_* grid, dim3_* block, size_t* shared, void* stream) {
  const simt::Configuration c = simt::configurations.back();
  simt::configurations.pop_back();
  *grid = {c.grid[0], c.grid[1], c.grid[2]};
  *block = {c.block[0], c.block[1], c.block[2]};
  *shared = c.shared;
  *static_cast<void**>(stream) = c.stream;
  return 0;
}

int cudaLaunchKernel(const void* stub, dim3_ grid, dim3_ block, void** arguments, size_t shared,
                     void* stream) {
  const std::string name = simt::kernels().by_stub.at(stub);
  auto launch = std::make_shared<simt::Launch>();
  launch->program = &simt::program_of(name);
  launch->kernel = name;
  launch->blocks = static_cast<int>(grid.x);
  launch->threads = static_cast<int>(block.x);
  launch->shared_bytes = shared;
  if (grid.y * grid.z * block.y * block.z != 1 || block.x % simt::kLanes || shared > simt::kSharedBytes ||
      block.x > 1024)
    throw std::runtime_error(
        "the PTX world: a launch that a GPU would refuse, or of more dimensions than one: " + name);
  const simt::Function& f = launch->program->entry(name);
  launch->parameters.resize(f.parameter_bytes);
  for (size_t k = 0; k < f.parameters.size(); ++k)
    std::memcpy(launch->parameters.data() + f.parameters[k].first, arguments[k], f.parameters[k].second);
  launch->extents.push_back({launch->parameters.data(), f.parameter_bytes});
  simt::describe(*launch);
  simt::enqueue(stream, [launch] { simt::Grid(*launch).run(); });
  return 0;
}
int __cudaLaunchKernel(const void* stub, dim3_ grid, dim3_ block, void** arguments, size_t shared,
                       void* stream) {
  return cudaLaunchKernel(stub, grid, block, arguments, shared, stream);
}
int __cudaGetKernel(void** kernel, const void* stub) {
  *kernel = const_cast<void*>(stub);
  return 0;
}
int cudaGetLastError() { return 0; }
int cudaGetDevice(int* device) {
  *device = 0;
  return 0;
}
int cudaFuncSetAttribute(const void*, int, int) { return 0; }
const char* cudaGetErrorString(int) { return "no error of the PTX world"; }
int cudaDeviceGetAttribute(int* value, int what, int) {
  constexpr int kMultiprocessors = 16, kSharedOptin = 97;
  if (what != kMultiprocessors && what != kSharedOptin) return 1;
  *value = what == kMultiprocessors ? simt::settings().room : simt::kSharedBytes;
  return 0;
}

// For tests/support/emulated_gpu.py: null, or what is wrong.
__attribute__((visibility("default"))) const char* ptx_load(const char* path) {
  try {
    simt::load_kernels(path);
    return nullptr;
  } catch (const std::exception& e) {
    simt::last_error() = e.what();
    return simt::last_error().c_str();
  }
}

// One instruction of the program that has this function is changed; -1: there is no such function.
__attribute__((visibility("default"))) int64_t ptx_mutate(const char* function, int row, int drop, int order,
                                                          int scope, int64_t integer) {
  std::lock_guard lock(simt::kernels().mutex);
  for (const auto& p : simt::kernels().programs)
    for (const simt::Function& f : p->functions)
      if (f.name == function) {
        simt::mutate(p->code.at(row), drop, order, scope, integer);
        return 0;
      }
  return -1;
}
// Everything as it was.
__attribute__((visibility("default"))) void ptx_restore() {
  std::lock_guard lock(simt::kernels().mutex);
  for (size_t k = 0; k < simt::kernels().programs.size(); ++k)
    simt::kernels().programs[k]->code = simt::kernels().originals[k];
}
// What the rows of a program have cost since ptx_restore: five numbers each.
__attribute__((visibility("default"))) int64_t ptx_costs(const char* function, uint64_t* costs,
                                                         int64_t count) {
  std::lock_guard lock(simt::kernels().mutex);
  for (const auto& p : simt::kernels().programs)
    for (const simt::Function& f : p->functions)
      if (f.name == function) {
        for (int64_t k = 0; k < count && k < static_cast<int64_t>(p->code.size()); ++k) {
          const simt::Cost& c = p->code[k].cost;
          const uint64_t all[] = {c.runs, c.waits[0], c.waits[1], c.bytes[0], c.bytes[1]};
          std::memcpy(costs + 5 * k, all, sizeof(all));
        }
        return static_cast<int64_t>(p->code.size());
      }
  return -1;
}
// Marks in `rows` what a program's launches have run since they were last asked.
__attribute__((visibility("default"))) int64_t ptx_reached(const char* function, char* rows, int64_t count) {
  std::lock_guard lock(simt::kernels().mutex);
  for (const auto& p : simt::kernels().programs)
    for (const simt::Function& f : p->functions)
      if (f.name == function) {
        for (int64_t k = 0; k < count && k < static_cast<int64_t>(p->code.size()); ++k)
          rows[k] = p->code[k].reached;
        return static_cast<int64_t>(p->code.size());
      }
  return -1;
}
}
