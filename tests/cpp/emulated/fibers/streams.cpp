// Streams, graphs and injected faults, for tests/support/emulated_gpu.py.
#include <cuda_runtime_api.h>

#include "trouble.hpp"

extern "C" {
__attribute__((visibility("default"))) void emulated_order(unsigned long long seed) {
  emulated::order_seed = seed;
}
__attribute__((visibility("default"))) void emulated_damage(int passes) { emulated::damage = passes; }
__attribute__((visibility("default"))) void emulated_global_captures(int more) {
  emulated::global_captures += more;
}
__attribute__((visibility("default"))) int emulated_refused_calls() {
  return emulated::refused_calls.exchange(0);
}
__attribute__((visibility("default"))) int emulated_launches() { return emulated::launches.exchange(0); }
__attribute__((visibility("default"))) void* emulated_stream() { return new emulated::Stream; }
__attribute__((visibility("default"))) void emulated_begin_capture(void* stream, unsigned long long id) {
  static_cast<emulated::Stream*>(stream)->capture = id;
}
__attribute__((visibility("default"))) void* emulated_end_capture(void* stream) {
  return new std::vector<std::function<void()>>(static_cast<emulated::Stream*>(stream)->end_capture());
}
__attribute__((visibility("default"))) unsigned long long emulated_nodes(void* graph) {
  return static_cast<std::vector<std::function<void()>>*>(graph)->size();
}
__attribute__((visibility("default"))) void emulated_replay(void* graph) {
  for (const auto& work : *static_cast<std::vector<std::function<void()>>*>(graph)) work();
}
}
