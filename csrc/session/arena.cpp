#include "session/arena.hpp"

#include <algorithm>
#include <iterator>
#include <stdexcept>

namespace moecomm {

uint64_t dispatch_bound(const Geometry& g, const Shape& s) {
  const uint64_t rows = uint64_t(g.size) * s.max_tokens * std::min(s.top_k, s.num_experts / g.size),
                 hidden = s.hidden;
  const uint64_t coded = hidden + 4 * ((hidden + 127) / 128) + 16;
  return rows * (2 * std::max(s.combine_row_bytes(), coded) + 16 * s.top_k + 64) + 65536;
}

Arena::Arena(uint64_t begin, uint64_t end, uint64_t bound)
    : begin_(begin),
      end_(end),
      section_(bound / 256 * 256),
      sections_(section_ ? std::max<uint64_t>(1, (end - begin) / section_) : 1) {
  free_[begin] = end - begin;
}

uint64_t Arena::boundary_after(uint64_t at) const {
  const uint64_t section = sections_ == 1 ? 0 : std::min((at - begin_) / section_, sections_ - 1);
  return section + 1 == sections_ ? end_ : begin_ + (section + 1) * section_;
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
    for (uint64_t at = offset; at < end && o.bytes[0] == 0; at = boundary_after(at)) {  // inside a section
      const uint64_t here = std::min(end, boundary_after(at)) - at;
      if (here >= largest_) {
        o.offset[0] = at;
        o.bytes[0] = here;
      }
    }
    const uint64_t first = offset == begin_ ? offset : boundary_after(offset - 1);
    // From the beginning of a free section to the end of the free sections behind it.
    if (first < end && boundary_after(first) <= end && end - first > o.bytes[1]) {
      o.offset[1] = first;
      o.bytes[1] = end - first;
    }
  }
  if (o.bytes[1] == 0) {  // no section is free
    o.offset[1] = anywhere;
    o.bytes[1] = largest;
  }
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

}  // namespace moecomm
