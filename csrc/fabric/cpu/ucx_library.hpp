// The UCX library of this process. It is found when the first call needs it, not linked: worlds of one node
// need no UCX, and the wheels libucx-cu12 and libucx-cu13, a system's UCX and the one that MPI has loaded all
// serve.
#pragma once
#include <string>
#include <vector>

namespace moecomm {

// Folders in which libucp.so.0 is looked for where the process has none yet, before the loader's own search.
// Call it before the first use.
void set_ucx_folders(std::vector<std::string> folders);

// Loads the library. Throws std::runtime_error that says where it was looked for and what to install.
void require_ucx();

}  // namespace moecomm
