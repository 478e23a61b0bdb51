#include "fabric/cpu/ucx_library.hpp"

#include <dlfcn.h>
#include <ucp/api/ucp.h>

#include <mutex>
#include <stdexcept>

namespace moecomm {
namespace {

constexpr const char* kName = "libucp.so.0";

std::vector<std::string>& folders() {
  static std::vector<std::string> list;
  return list;
}

// One UCX per process: a second copy would conflict with the first one over signals and memory hooks.
void* open_library(std::string& tried) {
  if (void* loaded = dlopen(kName, RTLD_NOW | RTLD_NOLOAD)) return loaded;
  for (const std::string& folder : folders()) {
    const std::string path = folder + "/" + kName;
    if (void* found = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) return found;
    tried += path + ", ";
  }
  return dlopen(kName, RTLD_NOW | RTLD_LOCAL);
}

void* library() {
  static std::mutex mutex;
  static void* handle = nullptr;
  std::lock_guard lock(mutex);
  if (handle) return handle;
  std::string tried;
  handle = open_library(tried);
  if (handle) return handle;
  const char* why = dlerror();
  throw std::runtime_error("several nodes need UCX, but libucp.so.0 was not found (searched: " + tried +
                           "the system's libraries; " + (why ? why : "") +
                           "): pip install libucx-cu12 or libucx-cu13, or install UCX 1.15 or newer");
}

template <class Function>
Function* find(const char* name) {
  void* found = dlsym(library(), name);
  if (!found)
    throw std::runtime_error(std::string("UCX: ") + kName + " lacks " + name +
                             "; expected UCX 1.15 or newer");
  return reinterpret_cast<Function*>(found);
}

}  // namespace

void set_ucx_folders(std::vector<std::string> list) { folders() = std::move(list); }

void require_ucx() { library(); }

}  // namespace moecomm

// UCX's functions under their own names, hidden in this library. Each one looks up the real function once.
// UcxContext's constructor calls require_ucx() first, so the lookup cannot fail on the data path, which must
// not throw.
#define MOE_UCX(result, name, parameters, ...)                      \
  extern "C" result name parameters {                               \
    static auto* const call = moecomm::find<decltype(name)>(#name); \
    return call(__VA_ARGS__);                                       \
  }

// Requests the version that this code needs, not that of the headers it was compiled with, so that older
// libraries work too.
extern "C" ucs_status_t ucp_init_version(unsigned, unsigned, const ucp_params_t* params,
                                         const ucp_config_t* config, ucp_context_h* context) {
  static auto* const call = moecomm::find<decltype(ucp_init_version)>("ucp_init_version");
  return call(1, 15, params, config, context);
}

MOE_UCX(ucs_status_t, ucp_config_read, (const char* prefix, const char* file, ucp_config_t** config), prefix,
        file, config)
MOE_UCX(void, ucp_config_release, (ucp_config_t * config), config)
MOE_UCX(void, ucp_cleanup, (ucp_context_h context), context)
MOE_UCX(const char*, ucp_get_version_string, (void))
MOE_UCX(ucs_status_t, ucp_worker_create,
        (ucp_context_h context, const ucp_worker_params_t* params, ucp_worker_h* worker), context, params,
        worker)
MOE_UCX(void, ucp_worker_destroy, (ucp_worker_h worker), worker)
MOE_UCX(ucs_status_t, ucp_worker_get_address, (ucp_worker_h worker, ucp_address_t** address, size_t* bytes),
        worker, address, bytes)
MOE_UCX(void, ucp_worker_release_address, (ucp_worker_h worker, ucp_address_t* address), worker, address)
MOE_UCX(ucs_status_t, ucp_worker_get_efd, (ucp_worker_h worker, int* descriptor), worker, descriptor)
MOE_UCX(ucs_status_t, ucp_worker_arm, (ucp_worker_h worker), worker)
MOE_UCX(unsigned, ucp_worker_progress, (ucp_worker_h worker), worker)
MOE_UCX(ucs_status_t, ucp_ep_create, (ucp_worker_h worker, const ucp_ep_params_t* params, ucp_ep_h* endpoint),
        worker, params, endpoint)
MOE_UCX(ucs_status_ptr_t, ucp_ep_close_nbx, (ucp_ep_h endpoint, const ucp_request_param_t* param), endpoint,
        param)
MOE_UCX(ucs_status_ptr_t, ucp_ep_flush_nbx, (ucp_ep_h endpoint, const ucp_request_param_t* param), endpoint,
        param)
MOE_UCX(ucs_status_ptr_t, ucp_put_nbx,
        (ucp_ep_h endpoint, const void* source, size_t bytes, uint64_t address, ucp_rkey_h key,
         const ucp_request_param_t* param),
        endpoint, source, bytes, address, key, param)
MOE_UCX(ucs_status_ptr_t, ucp_get_nbx,
        (ucp_ep_h endpoint, void* buffer, size_t bytes, uint64_t address, ucp_rkey_h key,
         const ucp_request_param_t* param),
        endpoint, buffer, bytes, address, key, param)
MOE_UCX(ucs_status_t, ucp_request_check_status, (void* request), request)
MOE_UCX(void, ucp_request_free, (void* request), request)
MOE_UCX(ucs_status_t, ucp_mem_map,
        (ucp_context_h context, const ucp_mem_map_params_t* params, ucp_mem_h* memory), context, params,
        memory)
MOE_UCX(ucs_status_t, ucp_mem_unmap, (ucp_context_h context, ucp_mem_h memory), context, memory)
MOE_UCX(ucs_status_t, ucp_mem_query, (const ucp_mem_h memory, ucp_mem_attr_t* attributes), memory, attributes)
MOE_UCX(ucs_status_t, ucp_rkey_pack, (ucp_context_h context, ucp_mem_h memory, void** packed, size_t* bytes),
        context, memory, packed, bytes)
MOE_UCX(void, ucp_rkey_buffer_release, (void* packed), packed)
MOE_UCX(ucs_status_t, ucp_ep_rkey_unpack, (ucp_ep_h endpoint, const void* packed, ucp_rkey_h* key), endpoint,
        packed, key)
MOE_UCX(ucs_status_t, ucp_rkey_ptr, (ucp_rkey_h key, uint64_t address, void** local), key, address, local)
MOE_UCX(void, ucp_rkey_destroy, (ucp_rkey_h key), key)
MOE_UCX(const char*, ucs_status_string, (ucs_status_t status), status)
