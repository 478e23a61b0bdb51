#include "runtime/memory.hpp"

#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace moecomm {
namespace {

[[noreturn]] void fail(const std::string& what) {
  throw std::runtime_error(what + ": " + std::strerror(errno));
}

char* map_shared(int fd, uint64_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
  if (p == MAP_FAILED) fail("cannot map a window of " + std::to_string(bytes) + " bytes");
  madvise(p, bytes, MADV_HUGEPAGE);  // a hint: fewer faults where shared huge pages are allowed
  madvise(p, bytes, MADV_DONTFORK);  // peers' memory and network regions are of no use to a child process
  return static_cast<char*>(p);
}

// The memories that forked children inherit.
struct Inherited {
  std::mutex mutex;
  std::map<char*, std::pair<uint64_t, int>> by_address;  // bytes, descriptor
};

Inherited& inherited() {
  static Inherited* const all = [] {
    static Inherited& made =
        *new Inherited;  // never destroyed: windows may be let go of at the end of the process
    // In the child every such mapping is replaced by a private one at the same place, before any of its code
    // runs: its stores must not reach the windows that peers read. Where that fails it can only read.
    pthread_atfork([] { made.mutex.lock(); }, [] { made.mutex.unlock(); },
                   [] {
                     for (const auto& [data, rest] : made.by_address)
                       if (mmap(data, rest.first, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, rest.second, 0) == MAP_FAILED)
                         mprotect(data, rest.first, PROT_READ);
                     made.mutex.unlock();
                   });
    return &made;
  }();
  return *all;
}

}  // namespace

std::shared_ptr<Memory> Memory::create(uint64_t bytes) {
  const int fd = memfd_create("moecomm", MFD_CLOEXEC);
  if (fd < 0) fail("memfd_create");
  if (ftruncate(fd, static_cast<off_t>(bytes)) != 0) {
    close(fd);
    fail("cannot size a window of " + std::to_string(bytes) + " bytes");
  }
  return std::shared_ptr<Memory>(new Memory(map_shared(fd, bytes), bytes, fd));
}

std::shared_ptr<Memory> Memory::map(int pid, int fd, uint64_t bytes) {
  const std::string path = "/proc/" + std::to_string(pid) + "/fd/" + std::to_string(fd);
  const int own = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (own < 0)
    fail("cannot open a node peer's window at " + path +
         " (ranks of a node must share a pid namespace and a user)");
  struct stat found;
  if (fstat(own, &found) != 0 || !S_ISREG(found.st_mode) || static_cast<uint64_t>(found.st_size) != bytes) {
    close(own);
    throw std::runtime_error(
        path + " is not the window of a node peer (ranks of a node must share a pid namespace)");
  }
  char* data = map_shared(own, bytes);
  close(own);
  return std::shared_ptr<Memory>(new Memory(data, bytes, -1));
}

Memory::~Memory() {
  if (inherited_) {
    std::lock_guard lock(inherited().mutex);
    inherited().by_address.erase(data_);
  }
  if (inherited_ || process_.is_here())
    munmap(data_, bytes_);  // else, in a forked child, something else may be mapped there
  if (fd_ >= 0) close(fd_);
}

void Memory::share_with_children() {
  if (inherited_ || fd_ < 0) return;
  std::lock_guard lock(inherited().mutex);
  inherited().by_address[data_] = {bytes_, fd_};
  madvise(data_, bytes_, MADV_DOFORK);
  inherited_ = true;
}

void Memory::populate(uint64_t bytes) const {
#ifdef MADV_POPULATE_WRITE
  if (madvise(data_, bytes < bytes_ ? bytes : bytes_, MADV_POPULATE_WRITE) == 0) return;
#endif
  for (uint64_t i = 0; i < bytes && i < bytes_; i += 4096) {  // older kernels: touch without changing
    auto* word = reinterpret_cast<unsigned char*>(data_ + i);
    __atomic_fetch_add(word, 0, __ATOMIC_RELAXED);
  }
}

uint64_t dispatch_bound(const Geometry& g, const Shape& s) {
  const uint64_t rows = uint64_t(g.size) * s.max_tokens * std::min(s.top_k, s.num_experts / g.size),
                 hidden = s.hidden;
  const uint64_t coded = hidden + 4 * ((hidden + 127) / 128) + 16;
  return rows * (2 * std::max(s.combine_row_bytes(), coded) + 16 * s.top_k + 64) + 65536;
}

Arena::Arena(uint64_t begin, uint64_t end, uint64_t bound)
    : begin_(begin),
      end_(end),
      slot_(bound / 256 * 256),
      slots_(slot_ ? std::max<uint64_t>(1, (end - begin) / slot_) : 1) {
  free_[begin] = end - begin;
}

uint64_t Arena::boundary_after(uint64_t at) const {
  const uint64_t slot = slots_ == 1 ? 0 : std::min((at - begin_) / slot_, slots_ - 1);
  return slot + 1 == slots_ ? end_ : begin_ + (slot + 1) * slot_;
}

Offer Arena::offer() const {
  std::lock_guard lock(mutex_);
  Offer o{};
  uint64_t anywhere = 0, largest = 0;
  for (const auto& [offset, bytes] : free_) {
    if (bytes > largest) {
      anywhere = offset;
      largest = bytes;
    }
    const uint64_t end = offset + bytes;
    for (uint64_t at = offset; at < end && o.bytes[0] == 0; at = boundary_after(at)) {  // inside a slot
      const uint64_t here = std::min(end, boundary_after(at)) - at;
      if (here >= largest_) {
        o.offset[0] = at;
        o.bytes[0] = here;
      }
    }
    const uint64_t first = offset == begin_ ? offset : boundary_after(offset - 1);
    // From the beginning of a free slot to the end of the free ones behind it.
    if (first < end && boundary_after(first) <= end && end - first > o.bytes[1]) {
      o.offset[1] = first;
      o.bytes[1] = end - first;
    }
  }
  if (o.bytes[1] == 0) {
    o.offset[1] = anywhere;
    o.bytes[1] = largest;
  }  // as many are held as were promised
  return o;
}

void Arena::take(uint64_t offset, uint64_t bytes) {
  if (bytes == 0) return;
  std::lock_guard lock(mutex_);
  auto it = std::prev(free_.upper_bound(offset));
  const uint64_t start = it->first, size = it->second;
  if (offset < start || offset + bytes > start + size) throw std::logic_error("arena piece is not free");
  free_.erase(it);
  if (offset > start) free_[start] = offset - start;
  if (offset + bytes < start + size) free_[offset + bytes] = start + size - offset - bytes;
  held_[offset] = bytes;
}

void Arena::expect(uint64_t bytes) {
  std::lock_guard lock(mutex_);
  if (bytes > largest_) largest_ = bytes;
}

void Arena::release(uint64_t offset) {
  std::lock_guard lock(mutex_);
  const auto held = held_.find(offset);
  if (held == held_.end()) return;
  uint64_t start = held->first, size = held->second;
  held_.erase(held);
  auto next = free_.lower_bound(start);
  if (next != free_.end() && start + size == next->first) {
    size += next->second;
    next = free_.erase(next);
  }
  if (next != free_.begin()) {
    auto before = std::prev(next);
    if (before->first + before->second == start) {
      start = before->first;
      size += before->second;
      free_.erase(before);
    }
  }
  free_[start] = size;
}

uint64_t Arena::held_bytes() const {
  std::lock_guard lock(mutex_);
  uint64_t sum = 0;
  for (const auto& [offset, bytes] : held_) sum += bytes;
  return sum;
}

int Arena::held_blocks() const {
  std::lock_guard lock(mutex_);
  return static_cast<int>(held_.size());
}

Block::Block(std::shared_ptr<Memory> memory, std::shared_ptr<Arena> arena, uint64_t offset, uint64_t bytes)
    : memory_(std::move(memory)), arena_(std::move(arena)), offset_(offset), bytes_(bytes) {
  arena_->take(offset, bytes);
}

Block::~Block() {
  if (bytes_) arena_->release(offset_);
}

}  // namespace moecomm
