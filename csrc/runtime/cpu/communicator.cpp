#include "runtime/cpu/communicator.hpp"

#include <unistd.h>
#include <algorithm>

#include <climits>
#include <cstring>
#include <fstream>
#include <functional>

#include "runtime/cpu/peer_memory.hpp"

namespace moecomm {
namespace {

// The first thing that every rank sends to the others; its UCX address follows.
struct Contact {
  int32_t pid;
  int32_t beat;   // Beats::fd(), or -1
  uint64_t host;  // equal if pids mean the same processes: one kernel and one pid namespace
};

uint64_t host_identity() {
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string boot;
  std::getline(file, boot);
  char space[PATH_MAX] = {};
  if (readlink("/proc/self/ns/pid", space, sizeof(space) - 1) < 0) return 0;
  return std::hash<std::string>()(boot + space);
}

Contact read_contact(const std::string& text) {
  Contact c;
  std::memcpy(&c, text.data(), sizeof(c));
  return c;
}

}  // namespace

Communicator::Communicator(Geometry geometry, bool threads, RailKind rail, double timeout_seconds,
                           bool patient, Communicator* previous)
    : geometry_(geometry),
      threads_(threads),
      rail_(rail),
      timeout_(timeout_seconds),
      populates_lazily_(previous != nullptr),
      waits_(geometry.size) {
  call_.waits = &waits_;
  call_.announce = [this](uint64_t word) {
    std::lock_guard lock(memories_mutex_);
    for (PeerMemory* memory : memories_) memory->publish({word});
  };
  if (patient && geometry.size > 1) beats_ = std::make_unique<Beats>();
  if (rail != RailKind::ucx) return;
  if (previous) {
    std::lock_guard lock(previous->spare_mutex_);  // another thread may be making it
    ucx_ = std::move(previous->spare_);
  }
  if (!ucx_ || !ucx_->is_here()) ucx_ = std::make_unique<UcxContext>();
  ucx_->enter(calls_.mutex(), geometry.size);
}

uint64_t Communicator::take_populated(uint64_t wanted, uint64_t limit) {
  uint64_t before = populated_, taken;
  do taken = std::min(wanted, limit - std::min(before, limit));
  while (!populated_.compare_exchange_weak(before, before + taken));
  return taken;
}

void Communicator::prepare_next() {
  std::lock_guard lock(spare_mutex_);
  if (rail_ == RailKind::ucx && !spare_) spare_ = std::make_unique<UcxContext>();
}

std::string Communicator::contact() const {
  Contact c{};
  c.pid = getpid();
  c.beat = beats_ ? beats_->fd() : -1;
  c.host = host_identity();
  std::string contact(bytes_of(&c), sizeof(c));
  if (ucx_) contact += ucx_->address();
  return contact;
}

void Communicator::connect(const std::vector<std::string>& contacts) {
  // Also watches ranks of other nodes that are processes on this host: not every transport reports their
  // death.
  const Contact mine = read_contact(contacts[geometry_.rank]);
  here_.assign(geometry_.size, threads_);
  for (int r = 0; r < geometry_.size && !threads_; ++r)
    if (const Contact c = read_contact(contacts[r]); c.host == mine.host && mine.host != 0) {
      here_[r] = true;
      watch_.add(r, c.pid);
      if (beats_ && r != geometry_.rank && c.beat >= 0) beats_->add(r, c.pid, c.beat);
    }
  if (!ucx_) return;
  for (const std::string& contact : contacts) ucx_addresses_.push_back(contact.substr(sizeof(Contact)));
  for (int n = 0; n < geometry_.nodes(); ++n)
    if (n != geometry_.node()) open_endpoint(geometry_.rail_rank(n));
  ucx_->serve();
}

void Communicator::open_endpoint(int rank) { ucx_->connect(rank, ucx_addresses_[rank]); }

void Communicator::join(PeerMemory* memory) {
  std::lock_guard lock(memories_mutex_);
  memories_.push_back(memory);
}

uint64_t Communicator::number() {
  std::lock_guard lock(memories_mutex_);
  return ++memory_number_;
}

void Communicator::leave(PeerMemory* memory) {
  std::lock_guard lock(memories_mutex_);
  std::erase(memories_, memory);
}

void Communicator::mark_broken(const Status& why) {
  std::lock_guard lock(broken_mutex_);
  if (broken_.ok()) broken_ = why;
}

void Communicator::leave_calls(int peer) {
  if (!broken().ok() || !calls_.is_here()) return;
  std::lock_guard lock(calls_);
  std::lock_guard all(memories_mutex_);
  for (PeerMemory* memory : memories_) memory->report({Code::lost, Phase::none, peer});
}

Status Communicator::broken() const {
  std::lock_guard lock(broken_mutex_);
  return broken_;
}

}  // namespace moecomm
