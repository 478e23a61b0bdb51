#include "runtime/cuda/calls.hpp"

#include <cuda_runtime_api.h>

#include <atomic>

#include "session/calls.hpp"

namespace moecomm::cuda {
namespace {

// The board: a word of each rank for what is final, and one for the call that it waits in.
Offset<FaultWord> call_words(const Geometry& g) { return Offset<FaultWord>{} + g.size; }
uint64_t board_bytes(const Geometry& g) { return align_up(2 * sizeof(FaultWord) * g.size, 4096); }

}  // namespace

DeviceCalls::DeviceCalls(int device)
    : device_(device), pinned_(std::make_unique<Pinned>(2 * sizeof(FaultRecord))) {}

void DeviceCalls::make_board(const Geometry& geometry, PeerAccess& peer_access) {
  const OnDevice on(device_);
  geometry_ = geometry;
  board_ = peer_access.window(board_bytes(geometry), Peers::world);
}

void DeviceCalls::connect(const std::vector<std::string>& contacts) {
  const OnDevice on(device_);
  const Geometry& g = geometry_;
  board_->connect(g.rank, contacts);
  detail::Cursor c;
  const auto links = c.take<DeviceLinks>(1);
  const auto clock = c.take<CallClock>(1);
  const auto windows = c.take<char*>(g.ranks_per_node), regions = c.take<char*>(g.size);
  state_ = DeviceMemory::create(device_, c.at);
  char* s = state_->data();
  std::vector<char*> near, far;
  for (int d = 0; d < g.ranks_per_node; ++d) near.push_back(board_->at(g.rank_at(g.node(), d)));
  for (int r = 0; r < g.size; ++r) far.push_back(r / g.ranks_per_node == g.node() ? nullptr : board_->at(r));
  DeviceLinks board;
  board.geometry = g;
  board.windows = windows.in(s);
  board.rail_region = board_->data();  // one memory: far ranks write what near ones do
  board.regions = regions.in(s);
  board.network = board_->network();
  board.region_peers = g.size;
  board.own_peer = g.rank;
  board.call_words = call_words(g);
  require(cudaMemcpy(board.windows, near.data(), 8 * near.size(), cudaMemcpyHostToDevice),
          "writing the windows");
  require(cudaMemcpy(board.regions, far.data(), 8 * far.size(), cudaMemcpyHostToDevice),
          "writing the regions");
  require(cudaMemcpy(links.in(s), &board, sizeof(board), cudaMemcpyHostToDevice), "writing the board");
  links_ = links.in(s);
  clock_ = clock.in(s);
}

void DeviceCalls::introduce(DeviceLinks& links, FaultRecord* refusals) const {
  links.faults[0] = refusals;
  links.faults[1] = record();
  if (geometry_.size > 1) links.own = own();
  links.board = links_;
  links.clock = clock_;
}

Status DeviceCalls::fault(FaultRecord* refusals) {
  std::lock_guard lock(mutex_);
  return taken(refusals);
}

Status DeviceCalls::late_fault(FaultRecord* refusals, bool ended) {
  std::lock_guard lock(mutex_);
  if (ended && broken_.ok() && reported(own()) == Code::ok && reported(record()) == Code::ok &&
      reported(refusals) != Code::invalid)
    return {};
  return taken(refusals);
}

Status DeviceCalls::break_with(const Status& s) {
  std::lock_guard lock(mutex_);
  if (broken_.ok()) end(s);
  return broken_;
}

uint64_t DeviceCalls::number() {
  if (!clock_) return 0;
  const OnDevice on(device_);
  CallClock c;
  require(cudaMemcpy(&c, clock_, sizeof(c), cudaMemcpyDeviceToHost), "reading the number of the latest call");
  return c.number;
}

void DeviceCalls::continue_without(const std::vector<uint8_t>& masked, uint64_t number) {
  std::lock_guard lock(mutex_);
  const OnDevice on(device_);
  broken_ = {};
  for (FaultRecord* r : {record(), own()}) std::atomic_ref(r->code).store(0, std::memory_order_release);
  if (!board_) return;
  const CallClock clock{number, 0, 0, 0};
  require(cudaMemcpy(clock_, &clock, sizeof(clock), cudaMemcpyHostToDevice), "numbering the calls");
  require(cudaMemset(board_->data(), 0, board_bytes(geometry_)), "clearing the board");
  for (size_t r = 0; r < masked.size(); ++r)
    if (masked[r])
      require(cudaMemset(board_->data() + (call_words(geometry_) + r).value, 0xff, sizeof(kMaskedWord)),
              "masking a rank");
  require(cudaDeviceSynchronize(), "clearing the board");
  board_->continue_without(masked, ++masks_);
}

// Records a final failure. From here on no rank waits for this rank's kernels to start.
void DeviceCalls::end(const Status& s) {
  broken_ = s;
  if (board_) board_->leave();
}

Status DeviceCalls::taken(FaultRecord* refusals) {
  const bool sound = broken_.ok();
  if (sound && reported(own()) != Code::ok) {  // what has ended the communicator, if anything, is its effect
    const Status s = own()->status;
    std::atomic_ref(own()->code).store(0, std::memory_order_release);
    if (geometry_.size > 1) {
      Status refused{Code::refused, s.phase, geometry_.rank};
      end_unawaited(refused, Verb::unknown);
      end(refused);
    }
    return s;
  }
  const Status s = take_fault({refusals, record()}, broken_);
  if (sound && !broken_.ok()) end(broken_);
  return s;
}

Status DeviceCalls::start_together(DeviceWindow& own, void* stream, double seconds,
                                   const std::function<void()>& start) {
  return (board_ ? *board_ : own).start_together(stream, seconds, start);
}

}  // namespace moecomm::cuda
