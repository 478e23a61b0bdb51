// Bookkeeping of a window's arena: which parts are free and which are held. The runtime owns the memory.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

#include "base/shape.hpp"
#include "base/wire.hpp"
#include "session/piece.hpp"

namespace moecomm {

// The most bytes that one dispatch without padding needs: every token of every rank goes to one rank. The
// same formula as arena_size in moecomm/shapes.py.
uint64_t dispatch_bound(const Geometry& g, const Shape& s);

// The free and the held parts of bytes [begin, end) of a window. Thread-safe, because any thread may free a
// tensor.
//
// Guarantee: an arena of n * bound bytes has room for the next dispatch of at most `bound` bytes whenever
// fewer than n dispatches are held, for any order of sizes and frees. First fit over the whole arena does not
// give this guarantee: small parts that are freed between large ones leave holes, and although the holes add
// up to enough, no single one is large enough. Therefore the arena is divided into n sections of `bound`
// bytes (the last one also has the remainder). A dispatch of at most `bound` bytes never crosses a section
// boundary: it is placed first-fit inside a section, or at the beginning of a free section. So k held
// dispatches touch at most k sections, and with k < n at least one section is free. A dispatch larger than
// `bound` (a large capacity, padding), or one made while n are held already, may be placed anywhere. The
// guarantee does not cover these; it holds again once they are freed.
class Arena {
 public:
  Arena(uint64_t begin, uint64_t end, uint64_t bound);
  Offer offer() const;
  void take(uint64_t offset, uint64_t bytes);  // inside an offered piece
  void expect(uint64_t bytes);                 // a call needed this much: do not offer a low piece below it
  void release(uint64_t offset);
  uint64_t held_bytes() const;
  int held_blocks() const;
  uint64_t capacity() const { return end_ - begin_; }

 private:
  mutable std::mutex mutex_;
  uint64_t boundary_after(uint64_t at) const;  // the first section boundary > at
  uint64_t begin_, end_;
  uint64_t section_, sections_;        // bytes of a section, number of sections
  uint64_t largest_ = 0;               // the most bytes that a call needed so far
  std::map<uint64_t, uint64_t> free_;  // offset -> bytes
  std::map<uint64_t, uint64_t> held_;
};

// A held part of the arena. It is freed with its last reference and keeps the window alive.
template <class Window>
class HeldPart {
 public:
  HeldPart(std::shared_ptr<Window> window, std::shared_ptr<Arena> arena, uint64_t offset, uint64_t bytes)
      : window_(std::move(window)), arena_(std::move(arena)), offset_(offset), bytes_(bytes) {
    arena_->take(offset, bytes);
  }
  ~HeldPart() {
    if (bytes_) arena_->release(offset_);
  }
  HeldPart(const HeldPart&) = delete;
  HeldPart& operator=(const HeldPart&) = delete;
  char* data() const { return window_->data() + offset_; }
  uint64_t offset() const { return offset_; }
  uint64_t bytes() const { return bytes_; }

 private:
  std::shared_ptr<Window> window_;
  std::shared_ptr<Arena> arena_;
  uint64_t offset_, bytes_;
};

// The parts that a dispatch holds until its tensors are freed: the delivered rows, and room for the experts'
// output.
template <class Window>
struct HeldPiece {
  std::shared_ptr<HeldPart<Window>> block, output;
};

template <class Window>
HeldPiece<Window> hold(const std::shared_ptr<Window>& window, const std::shared_ptr<Arena>& arena,
                       const Piece& piece) {
  arena->expect(piece.bytes);
  return {std::make_shared<HeldPart<Window>>(window, arena, piece.offset, piece.block),
          std::make_shared<HeldPart<Window>>(window, arena, piece.output(), piece.bytes - piece.block)};
}

}  // namespace moecomm
