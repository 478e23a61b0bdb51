// Domain: owns a rank's symmetric memory and runs the verbs on it.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "runtime/cpu/peer_memory.hpp"
#include "runtime/domain.hpp"

namespace moecomm {

class Domain {
 public:
  Domain(std::shared_ptr<Communicator> comm, DomainShape shape);

  // Constructed collectively in three steps, like PeerMemory.
  std::string contact() const { return peer_memory_.contact(); }
  void connect(const std::vector<std::string>& contacts) { peer_memory_.connect(contacts); }
  void finish_connect() { peer_memory_.finish_connect(); }

  // One-sided. On return the source may be overwritten (write), or the bytes have arrived (read). counter:
  // the peer's counter to which the number of bytes is added after them; -1: none.
  Status write(int rank, Segments segments, int counter);
  Status read(int rank, Segments segments);
  Status write(int rank, const std::vector<Rows>& rows, int counter);
  Status read(int rank, const std::vector<Rows>& rows);
  Status signal(int rank, int counter, uint64_t add);
  Status wait(int source, int counter, uint64_t at_least);
  Status fence();  // waits until everything written so far is visible at the peers
  uint64_t counter(int source, int counter) const;

  // Collective, several in one call. refused: this rank only announces that it refuses its part.
  Status multicast(const std::vector<GroupCall>& calls, Why refused);
  Status reduce(const std::vector<GroupCall>& calls, Why refused);

  bool rail_is_mapped() const { return peer_memory_.rail_is_mapped(); }
  std::shared_ptr<Memory> memory() const { return peer_memory_.window(); }
  uint64_t heap() const { return view_.at.heap.value; }  // offset of the memory for tensors
  Communicator& comm() const { return peer_memory_.comm(); }
  Counters take_counters(
      std::vector<uint64_t>& links);  // and resets them; links: bytes to or from every rank
  void set_fault(Fault fault) { peer_memory_.host().fault = std::move(fault); }  // tests only

  // Runs call(fabric, view, consumed) on this rank, for user-defined roles: docs/write_a_role.md.
  template <class Call>
  Status run(const char* op, Call&& call) {
    return one_sided(op, 0, [&](auto f) { return call(f, view_, &counts_.consumed); });
  }

 private:
  // Runs call(fabric) for a one-sided verb, with the lock held.
  template <class Call>
  Status one_sided(const char* op, uint64_t bytes, Call&& call) {
    const CallScope scope(comm().calls(), op);
    if (!scope.entered()) return {Code::interrupted};
    comm().call().word = 0;  // other ranks do not make this call
    peer_memory_.begin(bytes >= kStream);
    const Status s = peer_memory_.run(false, call);
    if (peer_memory_.host().stream) peer_memory_.host().kernels->fence();
    ++peer_memory_.host().counters.calls;
    return s;
  }
  static constexpr uint64_t kStream = 7u << 20;  // calls that move more bytes use non-temporal stores
  template <class Args, class Role>
  Status together(Verb verb, const char* op, const std::vector<GroupCall>& calls, Why refused, Role&& role);

  DomainView view_;
  PeerMemory peer_memory_;
  DomainCounts counts_;
  std::vector<bool> written_;  // by rank, since the last fence
};

}  // namespace moecomm
