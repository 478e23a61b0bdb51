// Stands in for NCCL's headers on a CPU: the functions that host code of the cuda world calls
// (tests/cpp/nccl_host_test.cpp implements them), and the types that kernels use (nccl_device.h).
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#define NCCL_VERSION_CODE 23203
#define NCCL_WIN_COLL_SYMMETRIC 0x01
#define NCCL_WIN_STRICT_ORDERING 0x02
#define NCCL_WIN_REQUIRED_ALIGNMENT 4096
#define NCCL_DEV_COMM_REQUIREMENTS_INITIALIZER \
  {}
#define NCCL_COMM_PROPERTIES_INITIALIZER \
  {}

enum ncclResult_t { ncclSuccess = 0, ncclInvalidUsage = 5, ncclTimeout = 8 };
enum ncclGinConnectionType_t { NCCL_GIN_CONNECTION_NONE, NCCL_GIN_CONNECTION_FULL, NCCL_GIN_CONNECTION_RAIL };
enum ncclGinType_t { NCCL_GIN_TYPE_NONE = 0, NCCL_GIN_TYPE_PROXY = 2, NCCL_GIN_TYPE_GDAKI = 3 };

// A window: the addresses of every rank's memory, and its registration flags.
struct ncclWindow_vidmem {
  std::vector<char*> base;
  int flags;
};
using ncclWindow_t = ncclWindow_vidmem*;
struct ncclComm;
using ncclComm_t = ncclComm*;
struct ncclUniqueId {
  char internal[128];
};
struct ncclTeam {
  int nRanks, rank, stride;
};
using ncclTeam_t = ncclTeam;
struct ncclDevComm;
using ncclDevComm_t = ncclDevComm;
struct ncclCommProperties {
  bool deviceApiSupport;
  ncclGinType_t ginType, railedGinType;
  bool ginSupport[4];
};
struct ncclDevCommRequirements {
  int ginContextCount;
  ncclGinType_t ginType;
  ncclGinConnectionType_t ginConnectionType;
};

extern "C" {
ncclResult_t ncclGetUniqueId(ncclUniqueId*);
ncclResult_t ncclCommInitRank(ncclComm_t*, int ranks, ncclUniqueId, int rank);
ncclResult_t ncclCommAbort(ncclComm_t);
const char* ncclGetErrorString(ncclResult_t);
ncclResult_t ncclMemAlloc(void**, size_t);
ncclResult_t ncclMemFree(void*);
ncclResult_t ncclCommWindowRegister(ncclComm_t, void*, size_t, ncclWindow_t*, int flags);
ncclResult_t ncclCommWindowDeregister(ncclComm_t, ncclWindow_t);
ncclTeam_t ncclTeamLsa(ncclComm_t);
ncclResult_t ncclGetLsaDevicePointer(ncclWindow_t, size_t offset, int rank, void**);
ncclResult_t ncclCommQueryProperties(ncclComm_t, ncclCommProperties*);
ncclResult_t ncclDevCommCreate(ncclComm_t, const ncclDevCommRequirements*, ncclDevComm_t*);
ncclResult_t ncclDevCommDestroy(ncclComm_t, const ncclDevComm_t*);
}
