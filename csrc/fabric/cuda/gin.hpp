// What a rank's kernels and its host know of NCCL's network between nodes (GIN). The only place that includes
// NCCL's headers; they are those of the version that the kernels are compiled for.
#pragma once
// Of GIN's backends, those whose requests are built in a descriptor in shared memory: IBGDA (GDAKI) and the
// CPU proxy.
#define NCCL_GIN_GPI_ENABLE 0
#define NCCL_GIN_EFA_GDA_ENABLE 0
#include <nccl.h>
#include <nccl_device.h>

namespace moecomm {

// How a window is registered that signals add to. A network may write the data of a put in any order, and an
// atomic ahead of what was posted before it, unless the memory is registered as strictly ordered: then no
// signal overtakes the rows before it.
constexpr int kGinWindowFlags = NCCL_WIN_COLL_SYMMETRIC | NCCL_WIN_STRICT_ORDERING;

// In device memory. A window begins with a rank's node window; its rail region lies at
// DeviceLinks::region_offset.
struct GinNetwork {
  ncclDevComm comm;
  ncclWindow_t window;
  ncclTeam peers;  // whom put() names by index: the rail, or the world
};

}  // namespace moecomm
