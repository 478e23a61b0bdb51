#include "runtime/communicator.hpp"

#include <unistd.h>

#include <cstring>

namespace moecomm {

Communicator::Communicator(Geometry geometry, bool threads, RailKind rail, double timeout_seconds)
    : geometry_(geometry), threads_(threads), rail_(rail), timeout_(timeout_seconds) {
  if (rail == RailKind::ucx) ucx_ = std::make_unique<UcxContext>(calls_, geometry.size);
}

std::string Communicator::card() const {
  const int32_t pid = getpid();
  std::string card(reinterpret_cast<const char*>(&pid), 4);
  if (ucx_) card += ucx_->address();
  return card;
}

void Communicator::connect(const std::vector<std::string>& cards) {
  for (int r = 0; r < geometry_.size; ++r) {
    int32_t pid;
    std::memcpy(&pid, cards[r].data(), 4);
    const bool same_node = r / geometry_.ranks_per_node == geometry_.node();
    if (!threads_ && same_node) watch_.add(r, pid);
  }
  if (!ucx_) return;
  for (const std::string& card : cards) ucx_addresses_.push_back(card.substr(4));
  for (int n = 0; n < geometry_.nodes(); ++n)
    if (n != geometry_.node()) reach(geometry_.rail_rank(n));
  ucx_->serve();
}

void Communicator::reach(int rank) { ucx_->connect(rank, ucx_addresses_[rank]); }

void Communicator::mark_broken(const Status& why) {
  std::lock_guard lock(broken_mutex_);
  if (broken_.ok()) broken_ = why;
}

Status Communicator::broken() const {
  std::lock_guard lock(broken_mutex_);
  return broken_;
}

}  // namespace moecomm
