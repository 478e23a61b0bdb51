// NCCL as the cuda world's host uses it: windows that processes of one or many hosts reach, and the network
// between nodes. The library is found at run time, so the extension is not linked with it and imports without
// it.
//
// Every function that is collective blocks until all ranks have called it; whoever needs a deadline calls
// from a thread.
#pragma once
#include "base/types.hpp"
#include "runtime/cuda/window.hpp"

namespace moecomm::cuda {

// NCCL_VERSION_CODE of the headers that this build's network kernels are compiled with; 0: built without.
int nccl_headers();

// A new world's name, for rank 0 to hand out. `library` is the path of libnccl.
std::string nccl_unique_id(const std::string& library);

// Collective. Throws std::invalid_argument where this library or these links cannot carry the geometry.
std::shared_ptr<DeviceReach> reach_nccl(const std::string& library, const Geometry& geometry, int device,
                                        const std::string& unique_id);

}  // namespace moecomm::cuda
