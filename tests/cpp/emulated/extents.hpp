// Which memory the emulated GPU's allocators have given, for those who check accesses.
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
  // The host writes, or frees.
  void write(const void* p, uint64_t bytes) const {
    if (const auto tell = changed.load()) tell(p, bytes);
  }
  std::atomic<void (*)(const void* p, uint64_t bytes)> changed{nullptr};
  // Changes whenever what was found may be gone.
  uint64_t version() const { return version_.load(std::memory_order_relaxed); }
  // Whether they lie in one allocation, and where it begins and ends.
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
