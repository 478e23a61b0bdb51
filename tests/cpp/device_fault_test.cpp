// The fault records of a failing rank: kernels write them and the host reads them.
#include "fabric/cuda/ptx.cuh"  // the emulated one, before anything that includes it

#include <cuda_runtime_api.h>

#include "check.hpp"
#include "fabric/cuda/device.cuh"
#include "runtime/cuda/memory.cpp"

using namespace moecomm;

namespace {

const Status kFull{Code::capacity, Phase::counts, 1, 0, 20, 10},
    kLate{Code::timeout, Phase::arrive, 1, 0, 3, 2};
const Status kOther{Code::mismatch, Phase::announce, 1, 0, 5, 6};

// One of the two ranks of a node.
struct Rank {
  uint64_t own[8] = {}, peer[8] = {}, failed[3] = {};
  char* windows[2] = {reinterpret_cast<char*>(own), reinterpret_cast<char*>(peer)};
  FaultRecord faults[kFaultRecords] = {}, wrong{};
  Status broken;
  DeviceLinks links{.geometry = {0, 2, 2},
                    .windows = windows,
                    .region_peers = 1,
                    .failed = failed,
                    .faults = {faults, faults + 1}};

  void fail(const Status& s) {
    on_device([&](auto fabric) { fabric.fail(s); });
  }
  void note(const Status& s) {
    on_device([&](auto fabric) { fabric.note(s.detail, s.expected, s.got); });
  }
  template <class Step>
  void on_device(Step step) {
    alignas(128) static char shared[warp_shared_bytes(256)];
    char* region[1] = {};
    emulated::run_warp([&] {
      const Warp g;
      WarpScratch* scratch = WarpScratch::open(g, shared, 256);
      if (g.lane() == 0) step(DeviceFabric<LoopbackDeviceRail>{&links, LoopbackDeviceRail{region}, scratch});
    });
  }
  void next_call() { std::memset(failed, 0, sizeof(failed)); }
  Status told() { return cuda::take_fault({faults, faults + 1}, broken); }
};

}  // namespace

TEST(a_refusal_hides_nothing_that_is_final) {
  Rank r;
  r.fail(kFull);
  CHECK_EQ(r.failed[0], uint64_t{0});  // the call is still completed
  r.fail(kLate);
  CHECK_EQ(r.failed[0], uint64_t{1});                // this rank's other warps end
  CHECK_EQ(r.peer[0], pack_fault(kLate, 0).packed);  // and the failure is reported to its peer
  CHECK_EQ(r.told().code, Code::timeout);
  CHECK_EQ(r.told().code, Code::timeout);  // a final failure is not cleared
}

TEST(a_refusal_is_told_once) {
  Rank r;
  r.fail(kFull);
  r.fail(kOther);  // of the same call: the first counts
  CHECK_EQ(r.told().code, Code::capacity);
  CHECK(r.told().ok());
  r.next_call();
  r.fail(kOther);
  CHECK_EQ(r.told().code, Code::mismatch);
}

TEST(a_record_is_not_written_while_the_host_may_read_it) {
  Rank r;
  r.fail(kFull);
  r.next_call();  // enqueued before the host has read the record
  r.fail(kOther);
  const Status s = r.told();
  CHECK_EQ(s.code, Code::capacity);
  CHECK_EQ(s.expected, kFull.expected);
}

TEST(a_later_call_of_a_broken_rank_ends_too) {
  Rank r;
  r.fail(kLate);
  r.next_call();
  r.fail({Code::lost, Phase::arrive, 1, 0, 0, 0});
  CHECK_EQ(r.failed[0], uint64_t{1});
  CHECK_EQ(r.told().code, Code::timeout);  // the first
}

TEST(a_wrong_argument_is_known_before_what_follows_from_it) {
  Rank r;
  const Status bad = bad_pick(BadInput::id_out_of_range, 3, 99);
  r.note(bad);  // a host waits for the call: its role returns it
  CHECK_EQ(r.wrong.code, uint64_t{0});
  CHECK_EQ(r.failed[1], uint64_t{0});
  r.links.own = &r.wrong;
  r.note(bad);
  CHECK_EQ(r.wrong.code, static_cast<uint64_t>(Code::invalid));
  CHECK_EQ(r.wrong.status.got, uint64_t{99});
  CHECK_EQ(r.peer[0], uint64_t{0});  // no other rank has been told
  r.note(bad_pick(BadInput::id_twice, 4, 1));
  CHECK_EQ(r.wrong.status.got, uint64_t{99});  // the first counts
  r.fail(bad);                                 // the role's own, later: told already
  CHECK(r.told().ok());
}

TEST(a_call_out_of_turn_ends_the_warps_also_after_a_refusal) {
  Rank r;
  r.fail(bad_pick(BadInput::id_twice, 4, 1));  // of decode's dispatch; in a replay its combine follows
  r.fail(bad_pick(BadInput::wrong_stage, 2, 4));
  CHECK_EQ(r.failed[0], uint64_t{1});
  CHECK_EQ(r.told().detail, number(BadInput::id_twice));
}
