// What the machine cannot know of a launch: its stream, its rank, and the caller's tensors, which no
// allocator of the GPU has given.
#include <cuda_runtime_api.h>

#include <cstring>
#include <stdexcept>

#include "driver.hpp"
#include "runtime/cuda/kernels/decode_launch.hpp"
#include "runtime/cuda/kernels/domain_launch.hpp"

namespace simt {
namespace {

using namespace moecomm;

class Tensors {
 public:
  explicit Tensors(Launch& launch) : launch_(launch) {}
  void add(const void* p, uint64_t bytes) {
    if (p && bytes) launch_.extents.push_back({p, bytes});
  }
  void add_segments(Segments p) {
    for (int64_t i = 0; i < p.count; ++i) add(p.segment[i].here, p.segment[i].bytes);
  }
  void add_picks(const int64_t* ids64, const int32_t* ids32, const float* weights, uint64_t picks) {
    add(ids64, 8 * picks);
    add(ids32, 4 * picks);
    add(weights, 4 * picks);
  }

 private:
  Launch& launch_;
};

// Windows of other ranks, whose memory is far.
void note_peers(Launch& launch, const DeviceLinks& links) {
  const auto note = [&](const char* window) {
    uintptr_t begin = 0, end = 0;
    uint64_t version = 0;
    if (window && emulated::extents().find(reinterpret_cast<uintptr_t>(window), 1, begin, end, version))
      launch.peers.push_back({reinterpret_cast<const void*>(begin), end - begin});
  };
  for (int d = 0; d < links.geometry.ranks_per_node; ++d)
    if (d != links.geometry.local()) note(links.windows[d]);
  for (int p = 0; p < links.region_peers; ++p)
    if (p != links.own_peer) note(links.regions[p]);
}

template <class L>
const L& as(const Launch& launch) {
  if (launch.parameters.size() != sizeof(L))
    throw std::runtime_error("the PTX world: " + launch.kernel +
                             " has parameters of another size than the host's");
  return *reinterpret_cast<const L*>(launch.parameters.data());
}

}  // namespace

void enqueue(void* stream, std::function<void()> work) {
  ++emulated::launches;
  if (stream)
    static_cast<cudaStream_t>(stream)->enqueue(std::move(work));
  else
    work();
}

void describe(Launch& launch) {
  const std::string& name = launch.kernel;
  const auto is = [&](const char* part) { return name.find(part) != std::string::npos; };
  Tensors t(launch);
  if (is("decode_dispatch_kernel")) {
    const auto& l = as<cuda::DecodeDispatchLaunch>(launch);
    note_peers(launch, l.call.links);
    const DecodeSendArgs& a = l.work.args;
    const uint64_t tokens = a.turn.tokens,
                   row = a.quantizes() ? a.d.shape.combine_row_bytes() : a.turn.call.row_bytes;
    t.add_picks(a.ids64, a.ids32, a.weights, tokens * a.d.shape.top_k);
    t.add(a.x, tokens * row);
    t.add(a.scales, tokens * a.turn.call.scale_bytes);
    launch.rank = a.d.geometry.rank;
  } else if (is("decode_combine_kernel") || is("decode_release_kernel")) {
    const auto& l = as<cuda::DecodeCombineLaunch>(launch);
    note_peers(launch, l.call.links);
    const DecodeCombineArgs& a = l.work.args;
    const uint64_t tokens = a.turn.tokens, row = a.d.shape.combine_row_bytes();
    const uint64_t rows = uint64_t{static_cast<uint64_t>(a.d.shape.num_experts / a.d.geometry.size)} *
                          a.d.geometry.size * a.d.shape.max_tokens;
    t.add_picks(l.work.ids64, l.work.ids32, l.work.weights, tokens * a.d.shape.top_k);
    t.add(a.y, tokens * row);
    t.add(a.rows, rows * row);
    t.add(l.work.staged, rows * row);
    launch.rank = a.d.geometry.rank;
  } else if (is("dispatch_kernel")) {
    const auto& l = as<cuda::DispatchLaunch>(launch);
    note_peers(launch, l.call.links);
    const DispatchArgs& a = l.work.args;
    const bool quantizes = a.plan.call.scales != ScaleKind::none && !a.scales;  // then x is not in codes yet
    const uint64_t tokens = a.plan.tokens;
    t.add_picks(a.ids64, a.ids32, a.weights, tokens * a.b.shape.top_k);
    t.add(a.x, tokens * (quantizes ? a.b.shape.combine_row_bytes() : a.plan.call.row_bytes));
    t.add(a.scales, tokens * a.plan.call.scale_bytes);
    launch.rank = a.b.geometry.rank;
  } else if (is("combine_kernel")) {
    const auto& l = as<cuda::CombineLaunch>(launch);
    note_peers(launch, l.call.links);
    const CombineArgs& a = l.args;
    const uint64_t tokens = a.plan.tokens;
    t.add(a.y, tokens * a.b.shape.combine_row_bytes());
    t.add(a.returned, tokens * a.b.shape.top_k * 4);
    t.add(a.bias, 4 * (a.bias_stride * (tokens - 1) + a.b.shape.hidden));
    launch.rank = a.b.geometry.rank;
  } else if (is("domain_one_sided_kernel")) {
    const auto& l = as<cuda::OneSidedLaunch>(launch);
    t.add(l.work.only.here, l.work.only.bytes);
    t.add_segments(l.work.segments);
    launch.rank = l.work.d.geometry.rank;
  } else if (is("domain_multicast_kernel")) {
    const auto& l = as<cuda::MulticastLaunch>(launch);
    for (int i = 0; i < l.work.count; ++i) t.add_segments(l.work.args[i].segments);
    launch.rank = l.work.d.geometry.rank;
  } else if (is("domain_reduce_kernel")) {
    const auto& l = as<cuda::ReduceLaunch>(launch);
    for (int i = 0; i < l.work.count; ++i) t.add_segments(l.work.args[i].segments);
    launch.rank = l.work.d.geometry.rank;
  } else {
    describe_quant(launch);
  }
}

// Whole tensors: see csrc/runtime/cuda/kernels/quant_launch.hpp.
void describe_quant(Launch& launch) {
  struct Size {
    int64_t rows, columns;
    bool whole;
  };
  const auto& places = launch.program->entry(launch.kernel).parameters;
  const auto is = [&](const char* part) { return launch.kernel.find(part) != std::string::npos; };
  const auto take = [&]<class T>(int k, T) {
    T v;
    std::memcpy(&v, launch.parameters.data() + places.at(k).first, sizeof(T));
    return v;
  };
  const auto pointer = [&](int k) { return take(k, static_cast<const void*>(nullptr)); };
  Tensors t(launch);
  if (is("encode_rows_kernel") || is("decode_rows_kernel")) {
    const int coded = is("encode_rows_kernel") ? 0 : 1;
    const int64_t rows = take(2, int64_t{}), hidden = take(3, int64_t{});
    const auto type = take(4, DType{});
    t.add(pointer(coded), rows * wire_row_bytes(take(5, Wire{}), hidden, type));
    t.add(pointer(1 - coded), rows * hidden * element_bytes(type));
  } else if (is("transpose_kernel")) {
    const Size m = take(4, Size{});
    for (int k : {0, 2}) t.add(pointer(k), m.rows * m.columns);
    t.add(pointer(1), 4 * m.columns * tiles_of(m.rows));
    t.add(pointer(3), 4 * m.rows * tiles_of(m.columns));
  } else {
    const bool back = is("dequantize_kernel");
    const int codes = back ? 1 : 0, scales = back ? 2 : 1, x = back ? 0 : 2;
    const Size m = take(3, Size{});
    const TileShape tile = back                     ? take(5, TileShape{})
                           : is("quantize_rows")    ? TileShape::row
                           : is("quantize_columns") ? TileShape::column
                                                    : TileShape::square;
    const auto kind = back ? ScaleKind::f32 : take(5, ScaleKind{});
    t.add(pointer(codes), m.rows * m.columns);
    t.add(pointer(x), m.rows * m.columns * element_bytes(take(4, DType{})));
    t.add(pointer(scales),
          4 * (tile == TileShape::row
                   ? m.rows * scale_words(m.columns, kind)
                   : tiles_of(m.rows) * (tile == TileShape::column ? m.columns : tiles_of(m.columns))));
  }
}

}  // namespace simt
