#include "runtime/cpu/beats.hpp"

#include <chrono>

namespace moecomm {
namespace {

constexpr std::chrono::milliseconds kPeriod{50};
constexpr uint64_t kBytes = 64;

}  // namespace

Beats::Beats() : own_(Memory::create(kBytes)), thread_([this] { advance(); }) {}

Beats::~Beats() {
  if (!process_.is_here()) {  // a forked child: the thread exists only in the parent
    new std::thread(std::move(thread_));
    return;
  }
  {
    std::lock_guard lock(mutex_);
    stopped_ = true;
  }
  changed_.notify_one();
  thread_.join();
}

void Beats::add(int rank, int pid, int fd) {
  peers_.push_back(Memory::map(pid, fd, kBytes));
  if (rank >= static_cast<int>(words_.size())) words_.resize(rank + 1, nullptr);
  words_[rank] = &counter_at(peers_.back()->data(), 0);
}

void Beats::advance() {
  Counter& word = counter_at(own_->data(), 0);
  std::unique_lock lock(mutex_);
  while (!changed_.wait_for(lock, kPeriod, [this] { return stopped_; }))
    word.fetch_add(1, std::memory_order_relaxed);
}

}  // namespace moecomm
