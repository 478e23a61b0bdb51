// The UCX library of this process. It is not linked but opened when it is first needed: a job on one node
// needs no UCX, and any of the wheels libucx-cu12 and libucx-cu13, a system's UCX or the UCX that MPI has
// loaded can be used.
#pragma once
#include <string>
#include <vector>

namespace moecomm {

// Sets the folders in which libucp.so.0 is searched before the loader's own search, if the process has not
// loaded one yet. Call it before the first use.
void set_ucx_folders(std::vector<std::string> folders);

// Loads the library. Throws std::runtime_error with the places that were searched and what to install.
void require_ucx();

}  // namespace moecomm
