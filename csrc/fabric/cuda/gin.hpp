// What a rank's kernels and its host know of NCCL's network between nodes (GIN). The only place that includes NCCL's
// headers; they are those of the version that the kernels are compiled for.
#pragma once
// Of GIN's backends, those whose requests are built in a descriptor in shared memory: IBGDA (GDAKI) and the CPU proxy.
#define NCCL_GIN_GPI_ENABLE 0
#define NCCL_GIN_EFA_GDA_ENABLE 0
#include <nccl.h>
#include <nccl_device.h>

namespace moecomm {

// In device memory. A window begins with a rank's node window; its rail region lies at DeviceLinks::region_offset.
struct GinNetwork {
  ncclDevComm comm;
  ncclWindow_t window;
  ncclTeam peers;   // whom put() names by index: the rail, or the world
};

}  // namespace moecomm
