// NCCL for the host side of the cuda world: windows that processes of one or several hosts can access, and
// the network between nodes. The library is opened at run time, so the extension is not linked with it and
// can be imported without it.
//
// A collective function blocks until all ranks have called it. A caller that needs a deadline calls it in a
// thread.
#pragma once
#include "base/types.hpp"
#include "runtime/cuda/window.hpp"

namespace moecomm::cuda {

// NCCL_VERSION_CODE of the headers that this build's network kernels are compiled with; 0: built without.
int nccl_headers();

// A unique id for a new communicator; rank 0 sends it to all ranks. library: the path of libnccl.
std::string nccl_unique_id(const std::string& library);

// Collective. Throws std::invalid_argument if this library or the hardware does not support the geometry.
std::shared_ptr<PeerAccess> nccl_peer_access(const std::string& library, const Geometry& geometry, int device,
                                             const std::string& unique_id);

}  // namespace moecomm::cuda
