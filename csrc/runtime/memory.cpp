#include "runtime/memory.hpp"

#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <map>
#include <mutex>
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
  madvise(p, bytes, MADV_HUGEPAGE);  // a hint: fewer page faults if shared huge pages are allowed
  madvise(p, bytes, MADV_DONTFORK);  // a child process needs neither peers' memory nor network regions
  return static_cast<char*>(p);
}

// The Memory objects that forked children inherit.
struct Inherited {
  std::mutex mutex;
  std::map<char*, std::pair<uint64_t, int>> by_address;  // bytes, descriptor
};

Inherited& inherited() {
  static Inherited* const all = [] {
    static Inherited& made =
        *new Inherited;  // never destroyed: a window may be freed at the end of the process
    // In the child, before any of its code runs, every such mapping is replaced by a private one at the same
    // address, because its stores must not reach the windows that peers read. If this fails, the mapping
    // becomes read-only.
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
    munmap(data_, bytes_);  // not in a forked child, where other memory may be mapped there
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
  for (uint64_t i = 0; i < bytes && i < bytes_;
       i += 4096) {  // older kernels: touch each page without changing it
    __atomic_fetch_add(data_ + i, 0, __ATOMIC_RELAXED);
  }
}

}  // namespace moecomm
