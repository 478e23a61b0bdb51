// Replaces nccl.cpp in builds without NCCL's headers.
#include <stdexcept>

#include "runtime/cuda/nccl.hpp"

namespace moecomm::cuda {

int nccl_headers() { return 0; }
std::string nccl_unique_id(const std::string&) { throw std::invalid_argument("this build has no NCCL"); }
std::shared_ptr<PeerAccess> nccl_peer_access(const std::string&, const Geometry&, int, const std::string&) {
  throw std::invalid_argument("this build has no NCCL");
}

}  // namespace moecomm::cuda
