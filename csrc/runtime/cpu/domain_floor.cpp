#include "runtime/cpu/domain_floor.hpp"

#include <cstring>

#include "exec/lane.hpp"

namespace moecomm {
namespace {

// Waits for a flag without the fabric, with a deadline.
Status bare_wait(const Counter& flag, uint64_t at_least, int peer,
                 std::chrono::steady_clock::time_point deadline) {
  for (uint64_t polls = 1; flag.load(std::memory_order_acquire) < at_least; ++polls) {
    detail::relax();
    if (polls % 16 == 0) sched_yield();
    if (polls % 4096 == 0 && std::chrono::steady_clock::now() >= deadline)
      return {Code::timeout, Phase::arrive, peer, 0, at_least, flag.load()};
  }
  return {};
}

}  // namespace

Status ping(Domain& domain, int peer, uint64_t there, char* here, uint64_t bytes, int rounds, uint64_t done,
            bool bare) {
  return domain.run("ping", [&](auto f, const DomainView& d, DomainConsumed* consumed) -> Status {
    const int me = d.geometry.rank;
    const Segment segment{there, here, bytes};
    char* memory = detail::reachable(f, d, peer, 0);
    if (bare && !memory) return {Code::invalid};
    Counter* mine = &counter_at(f.window(d.geometry.local()), d.user(peer, 0).value);
    for (int i = 0; i < rounds; ++i)
      for (int half = 0; half < 2; ++half) {
        const bool sends = (half == 0) == (me < peer);
        if (bare && sends) {
          std::memcpy(memory + there, here, bytes);
          counter_at(memory, d.user(me, 0).value).fetch_add(1, std::memory_order_release);
        } else if (bare) {
          MOE_TRY(bare_wait(*mine, done + i + 1, peer, f.s->deadline));
        } else if (sends) {
          write_segments(Lane{}, f, d, consumed, peer, Segments{&segment, 1});
          notify(Lane{}, f, d, peer, 0, 1);
        } else {
          MOE_TRY(await(Lane{}, f, d, peer, 0, done + i + 1));
        }
      }
    return d.same_node(peer) ? Status{} : f.drain(Phase::send, peer);
  });
}

Status bare_copy(Domain& domain, int peer, uint64_t there, char* here, uint64_t bytes, int times,
                 bool reads) {
  return domain.run("bare copy", [&](auto f, const DomainView& d, DomainConsumed*) -> Status {
    char* memory = detail::reachable(f, d, peer, there);
    if (!memory) return {Code::invalid};
    for (int i = 0; i < times; ++i) std::memcpy(reads ? here : memory, reads ? memory : here, bytes);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    return {};
  });
}

}  // namespace moecomm
