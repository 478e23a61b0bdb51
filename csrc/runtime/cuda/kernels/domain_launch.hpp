// The kernels of a Domain of the cuda world, for the host.
#pragma once
#include "runtime/cuda/kernels/launch.hpp"
#include "schedule/domain_concurrent.hpp"

namespace moecomm::cuda {

struct OneSidedLaunch {
  Call call;
  OneSidedWork work;
};
struct MulticastLaunch {
  Call call;
  CollectiveWork<MulticastArgs> work;
};
struct ReduceLaunch {
  Call call;
  CollectiveWork<ReduceArgs> work;
};

// Like Kernels. In a collective call every warp runs one channel.
struct DomainKernels {
  int (*prepare)();
  int (*one_sided)(const OneSidedLaunch& launch, void* stream);
  int (*multicast)(const MulticastLaunch& launch, void* stream);
  int (*reduce)(const ReduceLaunch& launch, void* stream);
};
const DomainKernels& loopback_domain_kernels();
const DomainKernels& gin_domain_kernels();  // only in builds with NCCL's headers

}  // namespace moecomm::cuda
