#include "runtime/cpu/communicator.hpp"

#include <unistd.h>

#include <climits>
#include <cstring>
#include <fstream>
#include <functional>

#include "runtime/cpu/reach.hpp"

namespace moecomm {
namespace {

// What every rank tells the others first; its UCX address follows.
struct Card {
  int32_t pid;
  uint64_t host;  // equal where pids mean the same process: one kernel, one pid namespace
};

uint64_t host_identity() {
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string boot;
  std::getline(file, boot);
  char space[PATH_MAX] = {};
  if (readlink("/proc/self/ns/pid", space, sizeof(space) - 1) < 0) return 0;
  return std::hash<std::string>()(boot + space);
}

Card read_card(const std::string& text) {
  Card c;
  std::memcpy(&c, text.data(), sizeof(c));
  return c;
}

}  // namespace

Communicator::Communicator(Geometry geometry, bool threads, RailKind rail, double timeout_seconds)
    : geometry_(geometry), threads_(threads), rail_(rail), timeout_(timeout_seconds) {
  call_.tell = [this](uint64_t word) {
    std::lock_guard lock(reaches_mutex_);
    for (Reach* reach : reaches_) reach->tell({word});
  };
  if (rail == RailKind::ucx) ucx_ = std::make_unique<UcxContext>(calls_.mutex(), geometry.size);
}

std::string Communicator::card() const {
  Card c{};
  c.pid = getpid();
  c.host = host_identity();
  std::string card(bytes_of(&c), sizeof(c));
  if (ucx_) card += ucx_->address();
  return card;
}

void Communicator::connect(const std::vector<std::string>& cards) {
  // Also the ranks of other nodes that are processes of this host: not every transport tells that they died.
  const Card mine = read_card(cards[geometry_.rank]);
  for (int r = 0; r < geometry_.size && !threads_; ++r)
    if (const Card c = read_card(cards[r]); c.host == mine.host && mine.host != 0) watch_.add(r, c.pid);
  if (!ucx_) return;
  for (const std::string& card : cards) ucx_addresses_.push_back(card.substr(sizeof(Card)));
  for (int n = 0; n < geometry_.nodes(); ++n)
    if (n != geometry_.node()) reach(geometry_.rail_rank(n));
  ucx_->serve();
}

void Communicator::reach(int rank) { ucx_->connect(rank, ucx_addresses_[rank]); }

uint64_t Communicator::join(Reach* reach) {
  std::lock_guard lock(reaches_mutex_);
  reaches_.push_back(reach);
  return ++reach_number_;
}

void Communicator::leave(Reach* reach) {
  std::lock_guard lock(reaches_mutex_);
  std::erase(reaches_, reach);
}

void Communicator::mark_broken(const Status& why) {
  std::lock_guard lock(broken_mutex_);
  if (broken_.ok()) broken_ = why;
}

Status Communicator::broken() const {
  std::lock_guard lock(broken_mutex_);
  return broken_;
}

}  // namespace moecomm
