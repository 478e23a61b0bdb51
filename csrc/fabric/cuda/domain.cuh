// DomainFabric: the device fabric for a Domain's verbs. It writes mapped memory of other nodes by stores,
// allows rows of any alignment and length, and can read over a network.
#pragma once
#include "fabric/cuda/device.cuh"

namespace moecomm {

// Like reduce_plain, but one element at a time, for rows that are not multiples of 16 bytes.
template <class T>
__device__ void reduce_singly(char* dst, const Terms& terms, int64_t begin, int64_t end, int lane,
                              int lanes) {
  const TermStore& list = *terms.store;
  for (int64_t e = begin + lane; e < end; e += lanes) {
    Sum<typename T::Wide, 1> sum;
    for (int i = 0; i < terms.count; ++i) {
      const typename T::Wide v = T::load_one(static_cast<const char*>(list.row[i]) + e * T::kBytes);
      sum.add(&v, list.weight[i], terms.group_end >> i & 1);
    }
    T::store_one(dst + e * T::kBytes, sum.total[0]);
  }
}

// Extra time for a node's word over the rail, so that if a rank of that node is missing, its own node reports
// it first.
constexpr uint64_t kRailGrace = 1'000'000'000;  // ns

template <DeviceRail Rail>
struct DomainFabric : DeviceFabric<Rail> {
  using Base = DeviceFabric<Rail>;

  __device__ char* reach(int peer, uint64_t offset) const {
    char* there = this->links->regions[peer];
    return there ? there + offset : nullptr;
  }
  __device__ void get(int peer, char* to, uint64_t offset, uint64_t bytes) const {
    this->complete();
    this->rail_link.get(*this->scratch, peer, to, offset, bytes);
  }
  __device__ Status wait_rail(CounterAt counter, uint64_t at_least, Phase phase, int peer) const {
    uint64_t& deadline = this->scratch->deadline;
    const uint64_t before = deadline;
    if (phase == Phase::announce) deadline += kRailGrace;
    const Status s = Base::wait_rail(counter, at_least, phase, peer);
    deadline = before;
    return s;
  }
  __device__ Status drain(Phase phase, int peer) const {
    if (ptx::nanoseconds() >= this->scratch->deadline) return {Code::timeout, phase, peer, 0, 1, 0};
    const Status unread = this->flush();
    return unread.ok() ? unread : Status{unread.code, phase, peer, 0, 1, 0};
  }

  template <Group G>
  __device__ void copy_row(G g, char* dst, const char* src, uint64_t bytes) const {
    const uint64_t odd = address_of(dst) | address_of(src) | bytes;
    if ((odd & 3) == 0) return Base::copy_row(g, dst, src, bytes);
    for (uint64_t i = g.lane(); i < bytes; i += g.size()) dst[i] = *Offset<volatile char>{i}.in(src);
  }
  template <Group G>
  __device__ void reduce_rows(G g, char* dst, const Terms& terms, const Terms*, const float*, int64_t count,
                              DType type) const {
    uint64_t odd = address_of(dst);
    for (int i = 0; i < terms.count; ++i) odd |= address_of(terms.store->row[i]);
    with_element(type, [&](auto element) {
      using T = decltype(element);
      const int64_t whole = odd & 15 ? 0 : count / T::kPerLane * T::kPerLane;
      reduce_plain<T>(dst, terms, nullptr, whole, g.lane(), g.size());
      reduce_singly<T>(dst, terms, whole, count, g.lane(), g.size());
    });
  }
};
static_assert(Fabric<DomainFabric<LoopbackDeviceRail>, Warp> &&
              ReadingFabric<DomainFabric<LoopbackDeviceRail>>);

}  // namespace moecomm
