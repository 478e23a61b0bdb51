// Owners of memory: Memory (a mapping) and Block (a held part of one).
#pragma once
#include <cstdint>
#include <memory>
#include <string>

#include "fabric/cpu/process.hpp"
#include "session/arena.hpp"

namespace moecomm {

// Zero-filled memory that node peers can map. It has no name in a file system and is identified only by a
// file descriptor, so the kernel frees it when the last process that maps it or holds the descriptor ends,
// for any reason.
class Memory {
 public:
  static std::shared_ptr<Memory> create(uint64_t bytes);                // shareable by descriptor
  static std::shared_ptr<Memory> map(int pid, int fd, uint64_t bytes);  // a peer's
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  char* data() const { return data_; }
  uint64_t bytes() const { return bytes_; }
  int fd() const { return fd_; }
  // After this call, forked children get a copy-on-write mapping: they can read tensors, and their writes are
  // private. Without it, children have no mapping. Only for memory that this process has created.
  void share_with_children();
  void populate(uint64_t bytes) const;  // fills page tables ahead of the first use

 private:
  Memory(char* data, uint64_t bytes, int fd) : data_(data), bytes_(bytes), fd_(fd) {}
  char* data_;
  uint64_t bytes_;
  int fd_;
  bool inherited_ = false;
  Process process_;
};

// A held part of a window's arena.
using Block = HeldPart<Memory>;

}  // namespace moecomm
