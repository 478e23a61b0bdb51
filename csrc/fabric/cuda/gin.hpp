// NCCL's network between nodes (GIN), as kernels and host code use it. Only this file includes NCCL's
// headers. They are those of the version that the kernels are compiled for.
#pragma once
// Enable only the backends of GIN that build requests in a descriptor in shared memory: IBGDA (GDAKI) and the
// CPU proxy.
#define NCCL_GIN_GPI_ENABLE 0
#define NCCL_GIN_EFA_GDA_ENABLE 0
#include <nccl.h>
#include <nccl_device.h>

namespace moecomm {

// The registration flags of a window with counters. A network may write the data of a put in any order, and
// may execute an atomic before earlier puts, unless the memory is registered as strictly ordered. Then no
// signal overtakes the rows before it.
constexpr int kGinWindowFlags = NCCL_WIN_COLL_SYMMETRIC | NCCL_WIN_STRICT_ORDERING;

// In device memory. A window begins with a rank's node window; its rail region is at
// DeviceLinks::region_offset.
struct GinNetwork {
  ncclDevComm comm;
  ncclWindow_t window;
  ncclTeam peers;  // the peers of put(): the rail, or all ranks
};

}  // namespace moecomm
