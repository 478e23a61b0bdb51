// The machine by itself, for tests of single operations: no kernel of moecomm's and no compiler of CUDA's is
// needed.
#include <cstring>
#include <stdexcept>

#include "checker.hpp"
#include "costs.hpp"
#include "extents.hpp"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

std::string& said() {
  thread_local std::string text;
  return text;
}

}  // namespace

EXPORT void ptx_settings(uint64_t seed, int room) {
  simt::settings().seed = seed;
  simt::settings().room = room;
}

// What the hosts have written or freed is not the kernels' any more. What a stream's copy writes must be in
// order with what kernels of other ranks have done there.
EXPORT void ptx_check(bool on) {
  simt::check_order(on);
  emulated::extents().changed = !on ? nullptr : +[](const void* p, uint64_t bytes, bool in_stream) {
    std::lock_guard lock(simt::checker()->mutex);
    if (in_stream && simt::Grid::latest_rank >= 0) simt::checker()->copied(simt::Grid::latest_rank, p, bytes);
    simt::checker()->forget(p, bytes);
  };
}

// Whether launches count what they cost (costs.hpp).
EXPORT void ptx_count_costs(bool on) { simt::count_costs(on); }

EXPORT const char* ptx_operations() {
  said().clear();
  for (const std::string& name : simt::operation_names()) said() += name + " ";
  return said().c_str();
}

// Runs a kernel of a translated module whose parameters are pointers, each with the size of its memory.
// Returns null, or what is wrong.
EXPORT const char* ptx_run(const char* path, const char* kernel, int blocks, int threads, uint64_t shared,
                           int count, const uint64_t* pointers, const uint64_t* bytes) {
  try {
    const simt::Program program = simt::load_program(path);
    simt::Launch launch{&program, kernel, blocks, threads, shared, std::vector<char>(8 * count), {}, {}, 0};
    std::memcpy(launch.parameters.data(), pointers, 8 * count);
    for (int k = 0; k < count; ++k)
      launch.extents.push_back({reinterpret_cast<const void*>(pointers[k]), bytes[k]});
    simt::Grid(launch).run();
    return nullptr;
  } catch (const std::exception& e) {
    said() = e.what();
    return said().c_str();
  }
}
