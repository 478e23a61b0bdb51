// oneCCL's alltoallv behind three C functions, for the baseline tuned-oneccl. `make rivals` compiles it.
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <oneapi/ccl.hpp>
#include <vector>

namespace {

std::shared_ptr<ccl::kvs> store;
std::unique_ptr<ccl::communicator> communicator;

template <class Work>
int guarded(const Work& work) {
  try {
    work();
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "oneCCL: %s\n", error.what());
    return 1;
  }
}

}  // namespace

extern "C" {

// Rank 0 first: fills the address that all ranks join by. `address` has room for 4096 bytes.
int oneccl_listen(char* address) {
  return guarded([&] {
    ccl::init();
    store = ccl::create_main_kvs();
    const auto own = store->get_address();
    static_assert(sizeof own <= 4096);
    std::memcpy(address, own.data(), own.size());
  });
}

int oneccl_join(int size, int rank, const char* address) {
  return guarded([&] {
    ccl::init();
    if (!store) {
      ccl::kvs::address_type of_rank_0;
      std::memcpy(of_rank_0.data(), address, of_rank_0.size());
      store = ccl::create_kvs(of_rank_0);
    }
    communicator = std::make_unique<ccl::communicator>(ccl::create_communicator(size, rank, store));
  });
}

// Counts are bytes per rank.
int oneccl_alltoallv(const void* send, const size_t* send_counts, void* recv, const size_t* recv_counts) {
  return guarded([&] {
    const size_t size = communicator->size();
    const std::vector<size_t> sent(send_counts, send_counts + size), received(recv_counts, recv_counts + size);
    ccl::alltoallv(send, sent, recv, received, ccl::datatype::uint8, *communicator).wait();
  });
}

void oneccl_leave() {
  communicator.reset();
  store.reset();
}

}  // extern "C"
