// Owners of memory: Memory (a mapping), Arena (who holds which piece of it), Block (one piece).
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "base/shape.hpp"
#include "base/wire.hpp"
#include "fabric/cpu/process.hpp"

namespace moecomm {

// Zero-filled memory that node peers can map. It has no name in any file system: a descriptor is its
// only handle, so the kernel frees it when the last process that maps or holds it ends, however it ends.
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
  // A forked child of this process gets a copy of its own, page by page as it writes: tensors are read there,
  // and what is written there stays there. Else there is no such mapping in a child. Of memory that was
  // created here.
  void share_with_children();
  void populate(uint64_t bytes) const;  // page tables filled ahead of first use

 private:
  Memory(char* data, uint64_t bytes, int fd) : data_(data), bytes_(bytes), fd_(fd) {}
  char* data_;
  uint64_t bytes_;
  int fd_;
  bool inherited_ = false;
  Process process_;
};

// Bytes that one dispatch needs at most, without padding: all tokens of all ranks at one rank (arena_size of
// moecomm/shapes.py).
uint64_t dispatch_bound(const Geometry& g, const Shape& s);

// Pieces of [begin, end) of a window. Thread-safe: tensors are freed by any thread.
//
// The promise: an arena of n * bound bytes takes the next dispatch, of any size up to `bound`, whenever fewer
// than n are held, whatever the order of sizes and frees. First fit over the whole arena does not keep it:
// small pieces that are freed between large ones leave holes that add up to enough, but none of which is. So
// the arena is divided into n slots of `bound` bytes (the last one has the remainder too), and no dispatch up
// to `bound` lies across the boundary of two of them: it is placed first-fit inside a slot, or at the
// beginning of a free one. Then k held dispatches touch at most k slots, and with k < n one is free. What is
// larger than `bound` (a generous capacity, padding) and what comes while n are held already may lie
// anywhere: they are beyond the promise, which counts again when they are gone.
class Arena {
 public:
  Arena(uint64_t begin, uint64_t end, uint64_t bound);
  Offer offer() const;
  void take(uint64_t offset, uint64_t bytes);  // inside an offered piece
  void expect(uint64_t bytes);                 // a call needed this much: offer low pieces only from here up
  void release(uint64_t offset);
  uint64_t held_bytes() const;
  int held_blocks() const;
  uint64_t capacity() const { return end_ - begin_; }

 private:
  mutable std::mutex mutex_;
  uint64_t boundary_after(uint64_t at) const;  // the first one > at
  uint64_t begin_, end_;
  uint64_t slot_, slots_;
  uint64_t largest_ = 0;               // the most that a call needed so far
  std::map<uint64_t, uint64_t> free_;  // offset -> bytes
  std::map<uint64_t, uint64_t> held_;
};

// A held piece: freed with its last reference. Keeps the window mapped.
class Block {
 public:
  Block(std::shared_ptr<Memory> memory, std::shared_ptr<Arena> arena, uint64_t offset, uint64_t bytes);
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  char* data() const { return memory_->data() + offset_; }
  uint64_t offset() const { return offset_; }
  uint64_t bytes() const { return bytes_; }

 private:
  std::shared_ptr<Memory> memory_;
  std::shared_ptr<Arena> arena_;
  uint64_t offset_, bytes_;
};

}  // namespace moecomm
