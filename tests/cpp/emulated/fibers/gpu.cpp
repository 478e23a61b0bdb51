// The extension of the cuda world without a GPU: its runtime and its kernels' own code over emulated memory,
// streams and lanes. tests/support/emulated_gpu.py builds it with the unchanged rest of the extension.
#include "fabric/cuda/ptx.cuh"  // the emulated one, before anything that includes it

#include <cuda_runtime_api.h>

#include <memory>

#include "fabric/cuda/domain.cuh"
#include "runtime/cuda/kernels/decode_launch.hpp"
#include "runtime/cuda/kernels/domain_launch.hpp"
#include "runtime/cuda/kernels/quant_launch.hpp"
#include "runtime/cuda/kernels/run_group.cuh"

namespace moecomm::cuda {
namespace {

constexpr int kSharedBytes = 232448, kMultiprocessors = 132;

// Shared memory of a grid's warps or squads.
class Shared {
 public:
  Shared(int pieces, uint64_t bytes)
      : bytes_(align_up(bytes, 4096)),
        data_(static_cast<char*>(std::aligned_alloc(4096, pieces * bytes_)), std::free) {}
  char* piece(int i) const { return data_.get() + i * bytes_; }

 private:
  uint64_t bytes_;
  std::unique_ptr<char, void (*)(void*)> data_;
};

template <class Launch, class Role>
int run_warps(const Launch& launch, void* stream, Role role) {
  ++emulated::launches;
  static_cast<cudaStream_t>(stream)->enqueue([launch, role] {
    const Spread& s = launch.call.spread;
    const Shared shared(s.sms * s.warps, warp_shared_bytes(s.stage_bytes, s.stages));
    emulated::run_grid(s.sms, s.warps, s.warps, [&](int block) {
      const int index = static_cast<int>(threadIdx.x) / 32 * s.sms + block;
      run_as_warp(launch.call, LoopbackDeviceRail::of(launch.call.links, index), index, s.sms * s.warps,
                  shared.piece(index), [&](Warp g, auto fabric, auto latches, GroupIndex at) {
                    return role(g, fabric, latches, at, launch);
                  });
    });
  });
  return cudaSuccess;
}

template <class Launch, class Role>
int run_squads(const Launch& launch, void* stream, Role role) {
  ++emulated::launches;
  static_cast<cudaStream_t>(stream)->enqueue([launch, role] {
    const Spread& s = launch.call.spread;
    const int squads = s.warps / launch.squad, all = squads * s.sms;
    const Shared shared(all, launch.squad * warp_shared_bytes(s.stage_bytes, s.stages));
    emulated::run_grid(s.sms, s.warps, launch.squad, [&](int block) {
      const int squad = static_cast<int>(threadIdx.x) / 32 / launch.squad, index = squad * s.sms + block;
      const Squad g{squad * launch.squad, launch.squad,
                    reinterpret_cast<WarpScratch*>(shared.piece(index))->words};
      run_as_squad(launch.call, LoopbackDeviceRail::of(launch.call.links, 0), g, index, all,
                   shared.piece(index), [&](Squad group, auto fabric, auto barrier, int i) {
                     return role(group, fabric, barrier, launch.work, i, all);
                   });
    });
  });
  return cudaSuccess;
}

int nothing() { return cudaSuccess; }

}  // namespace

const Kernels& loopback_kernels() {
  static const Kernels kernels{
      nothing,
      [](const DispatchLaunch& launch, void* stream) {
        return run_warps(launch, stream,
                         [](Warp g, auto fabric, auto latches, GroupIndex self, const DispatchLaunch& l) {
                           return dispatch_group(g, fabric, latches, l.work, self, [&] {
                             if (g.lane() == 0 && l.placed) tell_placed(l);
                           });
                         });
      },
      [](const CombineLaunch& launch, void* stream) {
        return run_warps(launch, stream,
                         [](Warp g, auto fabric, auto latches, GroupIndex self, const CombineLaunch& l) {
                           return combine_group(g, fabric, latches, l.args, self);
                         });
      }};
  return kernels;
}

const DecodeKernels& loopback_decode_kernels() {
  static const DecodeKernels kernels{
      nothing,
      [](const DecodeDispatchLaunch& l, void* stream) {
        return run_squads(l, stream, [](auto... a) { return decode_dispatch_group(a...); });
      },
      [](const DecodeCombineLaunch& l, void* stream) {
        return run_squads(l, stream, [](auto... a) { return decode_combine_group(a...); });
      },
      [](const DecodeCombineLaunch& l, void* stream) {
        return run_squads(l, stream, [](auto... a) { return decode_release_group(a...); });
      }};
  return kernels;
}

const DomainKernels& loopback_domain_kernels() {
  static const auto over = [](auto fabric) { return DomainFabric<LoopbackDeviceRail>{fabric}; };
  static const DomainKernels kernels{
      nothing,
      [](const OneSidedLaunch& launch, void* stream) {
        return run_warps(
            launch, stream, [](Warp g, auto fabric, auto latches, GroupIndex self, const OneSidedLaunch& l) {
              return one_sided_group(g, over(fabric), latches, l.work, self.index, self.workers + 1);
            });
      },
      [](const MulticastLaunch& launch, void* stream) {
        return run_warps(launch, stream,
                         [](Warp g, auto fabric, auto latches, GroupIndex self, const MulticastLaunch& l) {
                           return multicast_group(g, over(fabric), latches, l.work, self.index);
                         });
      },
      [](const ReduceLaunch& launch, void* stream) {
        return run_warps(launch, stream,
                         [](Warp g, auto fabric, auto latches, GroupIndex self, const ReduceLaunch& l) {
                           return reduce_group(g, over(fabric), latches, l.work, self.index);
                         });
      }};
  return kernels;
}

int shared_bytes_limit(int* bytes, int* sms) {
  *bytes = kSharedBytes;
  *sms = kMultiprocessors;
  return cudaSuccess;
}
uint32_t shared_bytes(const Spread& spread) {
  return spread.warps * warp_shared_bytes(spread.stage_bytes, spread.stages);
}
const char* error_text(int) { return "not emulated"; }

// Quantization of whole tensors: the tensors are on the CPU here, so moecomm uses its CPU code for them.
int launch_quantize(char*, float*, const char*, int64_t, int64_t, DType, TileShape, ScaleKind, void*) {
  return cudaErrorNotSupported;
}
int launch_dequantize(char*, const char*, const float*, int64_t, int64_t, DType, TileShape, void*) {
  return cudaErrorNotSupported;
}
int launch_transpose_requantize(char*, float*, const char*, const float*, int64_t, int64_t, ScaleKind,
                                void*) {
  return cudaErrorNotSupported;
}
int launch_encode_rows(char*, const char*, int64_t, int64_t, DType, Wire, void*) {
  return cudaErrorNotSupported;
}
int launch_decode_rows(char*, const char*, int64_t, int64_t, DType, Wire, void*) {
  return cudaErrorNotSupported;
}

}  // namespace moecomm::cuda
