// Rank threads start kernels together: the windows of the cuda world, with heap memory as device memory.
#include <cuda_runtime_api.h>

#include <atomic>
#include <chrono>

#include "check.hpp"
#include "runtime/cuda/memory.cpp"
#include "runtime/cuda/window.cpp"

namespace moecomm::cuda {

const Kernels& loopback_kernels() {
  static const Kernels none{};
  return none;
}
const DomainKernels& loopback_domain_kernels() {
  static const DomainKernels none{};
  return none;
}
const DecodeKernels& loopback_decode_kernels() {
  static const DecodeKernels none{};
  return none;
}

}  // namespace moecomm::cuda

using namespace moecomm;

namespace {

constexpr int kRanks = 3;

struct Contacts {
  Contacts() {
    std::vector<std::string> contacts;
    for (int r = 0; r < kRanks; ++r) {
      peer_access.push_back(cuda::thread_peer_access(0));
      windows.push_back(peer_access[r]->window(4096));
      contacts.push_back(windows[r]->contact());
    }
    for (int r = 0; r < kRanks; ++r) windows[r]->connect(r, contacts);
  }
  std::vector<std::shared_ptr<cuda::PeerAccess>> peer_access;
  std::vector<std::shared_ptr<cuda::DeviceWindow>> windows;
  emulated::Stream streams[kRanks];
};

double seconds_of(const std::function<void()>& work) {
  const auto begin = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

}  // namespace

TEST(none_starts_before_all_are_ready_and_none_goes_on_before_all_have_started) {
  Contacts ranks;
  std::atomic<int> ready{0}, started{0};
  std::vector<std::jthread> threads;
  for (int r = 0; r < kRanks; ++r)
    threads.emplace_back([&, r] {
      for (int call = 0; call < 50; ++call) {
        if (call % kRanks == r)
          std::this_thread::sleep_for(
              std::chrono::milliseconds(1));  // another rank is the last one each time
        ++ready;
        const Status s = ranks.windows[r]->start_together(&ranks.streams[r], 60.0, [&] {
          CHECK(ready >= kRanks * (call + 1));
          ++started;
        });
        CHECK(s.ok() && started >= kRanks * (call + 1));
      }
    });
  threads.clear();
  CHECK_EQ(started.load(), kRanks * 50);
}

TEST(a_rank_that_does_not_come_is_left_to_the_kernels) {
  Contacts ranks;
  int started = 0;
  const auto start = [&] {
    CHECK(ranks.windows[0]->start_together(&ranks.streams[0], 0.1, [&] { ++started; }).ok());
  };
  const double first = seconds_of(start), second = seconds_of(start);
  CHECK(first >= 0.1);
  CHECK(second < 0.1);  // the ranks do not wait for it again
  CHECK_EQ(started, 2);
}

TEST(who_waits_is_told_when_a_rank_has_failed) {
  Contacts ranks;
  std::jthread fails([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    ranks.peer_access[0]->abort();
  });
  const Status s = ranks.windows[0]->start_together(&ranks.streams[0], 60.0, [] { CHECK(false); });
  CHECK_EQ(s.code, Code::lost);
  CHECK_EQ(s.peer, 1);
}

TEST(no_rank_waits_for_a_rank_that_has_left) {
  Contacts ranks;
  for (int r = 1; r < kRanks; ++r) ranks.windows[r]->leave();
  int started = 0;
  for (int call = 0; call < 3; ++call)
    CHECK(seconds_of([&] {
            CHECK(ranks.windows[0]->start_together(&ranks.streams[0], 60.0, [&] { ++started; }).ok());
          }) < 30);
  CHECK_EQ(started, 3);
}

TEST(memory_of_a_gpu_that_this_process_does_not_see_is_not_opened) {
  const auto own = cuda::ipc_sample(0);
  emulated::own_gpu = 1;
  const auto peer = cuda::ipc_sample(0);
  emulated::own_gpu = 0;
  CHECK(own->opens(peer->handle()));
  emulated::hidden_gpu = 1;
  CHECK(!own->opens(peer->handle()));
  emulated::hidden_gpu = -1;
  CHECK(!own->opens(""));
}

TEST(what_is_captured_does_not_run_and_waits_for_nobody) {
  Contacts ranks;
  int started = 0;
  ranks.streams[0].capture = 5;
  CHECK(ranks.windows[0]->start_together(&ranks.streams[0], 60.0, [&] { ++started; }).ok());
  CHECK_EQ(started, 1);
}
