// Buffer: owns a rank's windows and runs its calls. One lock per Communicator: calls do not interleave.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "fabric/host.hpp"
#include "fabric/loopback.hpp"
#include "fabric/ucx_rail.hpp"
#include "runtime/communicator.hpp"
#include "runtime/memory.hpp"
#include "runtime/plan.hpp"

namespace moecomm {

struct DispatchCall {
  const char* x = nullptr;
  const char* scales = nullptr;
  const int64_t* ids64 = nullptr;
  const int32_t* ids32 = nullptr;
  const float* weights = nullptr;
  int32_t tokens = 0;
  bool cached = false;
  CallShape shape;
};

struct CombineCall {
  const char* rows = nullptr;       // in this rank's window, or anywhere: then it is staged once
  const float* weights = nullptr;
  char* y = nullptr;
  const float* bias = nullptr;
  int64_t bias_stride = 0;
};

class Buffer {
 public:
  Buffer(std::shared_ptr<Communicator> comm, Shape shape, bool check);
  ~Buffer();
  static uint64_t bytes(const Geometry& g, const Shape& s);   // of node window and rail region

  std::string card() const;
  void connect(const std::vector<std::string>& cards);
  void connected();               // after a barrier: everybody has mapped everything

  std::shared_ptr<Plan> new_plan() { return pool_->get(); }
  // On ok, `out` holds the dispatched rows and `output` the place for the experts' rows.
  Status dispatch(const DispatchCall& call, Plan& plan, std::shared_ptr<Block>& out, std::shared_ptr<Block>& output);
  Status combine(const CombineCall& call, Plan& plan, const Block& output);

  const BufferView& view() const { return view_; }
  const Arena& arena() const { return *arena_; }
  Counters take_counters();       // and reset
  void set_stream_threshold(uint64_t bytes) { stream_threshold_ = bytes; }
  void corrupt_next_row(int64_t row) { corrupt_row_ = row; }   // tests of MOECOMM_CHECK

 private:
  template <class Call> Status run(Call&& call);
  void report_fault(const Status& s);
  void begin_call(uint64_t bytes_moved);
  uint64_t warm_bytes() const;

  std::shared_ptr<Communicator> comm_;
  BufferView view_;
  std::shared_ptr<Memory> window_;
  std::vector<std::shared_ptr<Memory>> peers_;
  std::shared_ptr<Memory> own_rail_;                 // loopback; under UCX the region owns its memory
  std::unique_ptr<UcxRegion> region_;
  std::shared_ptr<Arena> arena_;
  std::shared_ptr<PlanPool> pool_;
  HostState host_;
  LoopbackRail loopback_;
  UcxRail ucx_rail_;
  Book book_;
  std::vector<uint64_t> book_counts_;
  uint64_t stream_threshold_ = 7u << 20;
  int64_t corrupt_row_ = -1;
};

}  // namespace moecomm
