// The allocations of the emulated GPU, for checks of accesses.
#pragma once
#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>

namespace emulated {

class Extents {
 public:
  void add(const void* p, uint64_t bytes) {
    std::lock_guard lock(mutex_);
    all_[reinterpret_cast<uintptr_t>(p)] = bytes;
  }
  void remove(const void* p) {
    std::lock_guard lock(mutex_);
    const auto found = all_.find(reinterpret_cast<uintptr_t>(p));
    if (found == all_.end()) return;
    write(p, found->second);
    all_.erase(found);
    ++version_;
  }
  // The host writes or frees memory; in_stream: after the work of a stream, as a kernel would.
  void write(const void* p, uint64_t bytes, bool in_stream = false) const {
    if (const auto tell = changed.load()) tell(p, bytes, in_stream);
  }
  std::atomic<void (*)(const void* p, uint64_t bytes, bool in_stream)> changed{nullptr};
  // Changes whenever an allocation that was found may have been freed.
  uint64_t version() const { return version_.load(std::memory_order_relaxed); }
  // Whether the bytes are in one allocation, and its begin and end.
  bool find(uintptr_t at, uint64_t bytes, uintptr_t& begin, uintptr_t& end, uint64_t& version) {
    std::lock_guard lock(mutex_);
    auto next = all_.upper_bound(at);
    if (next == all_.begin()) return false;
    --next;
    if (at + bytes > next->first + next->second) return false;
    begin = next->first;
    end = begin + next->second;
    version = version_;
    return true;
  }
  std::string nearest(uintptr_t at) {
    std::lock_guard lock(mutex_);
    auto next = all_.upper_bound(at);
    if (next == all_.begin()) return "no allocation lies below";
    --next;
    return std::to_string(at - next->first - next->second) + " bytes behind the end of an allocation of " +
           std::to_string(next->second);
  }

 private:
  std::mutex mutex_;
  std::map<uintptr_t, uint64_t> all_;
  std::atomic<uint64_t> version_{1};
};

inline Extents& extents() {
  static Extents all;
  return all;
}

}  // namespace emulated
