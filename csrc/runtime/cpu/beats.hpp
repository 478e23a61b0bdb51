// Beats: a heartbeat counter of this process, which advances while it runs, and the counters of its peers on
// this host. A patient wait goes on as long as the peer's counter advances. The counter of a stopped process
// does not.
#pragma once
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "fabric/cpu/futex.hpp"
#include "fabric/cpu/process.hpp"
#include "runtime/memory.hpp"

namespace moecomm {

class Beats {
 public:
  Beats();   // from here on the counter advances
  ~Beats();  // the counter stops; peers may still read it
  Beats(const Beats&) = delete;
  Beats& operator=(const Beats&) = delete;

  int fd() const { return own_->fd(); }  // of the counter's memory, for peers
  void add(int rank, int pid, int fd);   // maps a peer's counter; throws if that fails
  // Counters by rank; null: not added. Valid as long as this object.
  const std::vector<const Counter*>& words() const { return words_; }

 private:
  void advance();

  std::shared_ptr<Memory> own_;
  std::vector<std::shared_ptr<Memory>> peers_;
  std::vector<const Counter*> words_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool stopped_ = false;
  Process process_;
  std::thread thread_;
};

}  // namespace moecomm
