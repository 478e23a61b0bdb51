// The runtime's Decode allocates nothing in a steady state.
#include <cstdlib>
#include <new>
#include <thread>

#include "check.hpp"
#include "runtime/cpu/decode.hpp"

using namespace moecomm;

static std::atomic<long> allocations{0};
__attribute__((noinline)) void* operator new(std::size_t bytes) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  if (void* p = std::malloc(bytes)) return p;
  throw std::bad_alloc();
}
__attribute__((noinline)) void operator delete(void* p) noexcept { std::free(p); }
__attribute__((noinline)) void operator delete(void* p, std::size_t) noexcept { std::free(p); }

namespace {

TEST(a_steady_state_allocates_nothing) {
  constexpr int kSize = 4, kHidden = 64, kTopK = 2;
  const Shape shape{
      .hidden = kHidden, .dtype = DType::bf16, .num_experts = 8, .top_k = kTopK, .max_tokens = 4};
  std::vector<std::shared_ptr<Communicator>> comms;
  std::vector<std::unique_ptr<Decode>> decodes;
  std::vector<std::string> contacts, decode_contacts;
  for (int r = 0; r < kSize; ++r) {
    comms.push_back(std::make_shared<Communicator>(Geometry{r, kSize, 2}, true, RailKind::loopback, 60.0));
    contacts.push_back(comms[r]->contact());
  }
  for (auto& c : comms) c->connect(contacts);
  for (int r = 0; r < kSize; ++r) {
    decodes.push_back(std::make_unique<Decode>(comms[r], shape, false));
    decode_contacts.push_back(decodes[r]->contact());
  }
  for (auto& d : decodes) d->connect(decode_contacts);
  std::atomic<int> warm{0}, finished{0};
  std::atomic<long> before{0};
  long after = 0;
  std::vector<std::jthread> threads;
  for (int r = 0; r < kSize; ++r)
    threads.emplace_back([&, r] {
      std::vector<char> x(4 * kHidden * 2, char(r)), y(x.size());
      std::vector<float> weights(4 * kTopK, 0.5f);
      const auto step = [&](int i) {
        std::vector<int64_t>::value_type ids[4 * kTopK];
        for (int j = 0; j < 4 * kTopK; ++j)
          ids[j] = (r + i + j * 3) % 8 == 7 ? -1 : (i + j / kTopK + 3 * (j % kTopK)) % 8;
        DecodeDispatchCall dispatch;
        dispatch.x = x.data();
        dispatch.ids64 = ids;
        dispatch.weights = weights.data();
        dispatch.weighted = i % 3 == 0;
        dispatch.tokens = (r + i) % 5;
        dispatch.receive = i % 2;
        uint64_t epoch = 0;
        CHECK(decodes[r]->dispatch(dispatch, epoch).ok());
        CHECK(decodes[r]->dispatch_receive(epoch).ok());
        DecodeCombineCall combine;
        combine.epoch = epoch;
        combine.rows = decodes[r]->rows(epoch & 1);
        combine.ids64 = ids;
        combine.weights = dispatch.weighted ? nullptr : weights.data();
        combine.y = y.data();
        CHECK(decodes[r]->combine(combine).ok());
        CHECK(decodes[r]->combine_receive(epoch).ok());
      };
      for (int i = 0; i < 10; ++i) step(i);
      if (++warm == kSize) before = allocations.load();
      while (before == 0) std::this_thread::yield();
      for (int i = 10; i < 200; ++i) step(i);
      if (++finished == kSize) after = allocations.load();
      while (finished < kSize) std::this_thread::yield();
    });
  threads.clear();
  CHECK_EQ(after, before.load());
}

}  // namespace
