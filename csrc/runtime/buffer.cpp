#include "runtime/buffer.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "exec/lane.hpp"
#include "world/cpu/run.hpp"

namespace moecomm {
namespace {

// What peers need to reach this rank's memory.
struct Card {
  int32_t pid;
  int32_t fd;
  uint64_t window;      // address, for rank threads
  uint64_t rail;
  uint64_t bytes;
};

uint64_t env_bytes(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text ? std::strtoull(text, nullptr, 10) : otherwise;
}

}  // namespace

uint64_t Buffer::bytes(const Geometry& g, const Shape& s) {
  return node_layout(g, s).bytes + rail_layout(g, s).bytes;
}

Buffer::Buffer(std::shared_ptr<Communicator> comm, Shape shape, bool check) : comm_(std::move(comm)) {
  const Geometry& g = comm_->geometry();
  if (g.ranks_per_node > static_cast<int>(std::size(host_.windows))) throw std::invalid_argument("too many ranks in a node");
  view_ = make_view(g, shape, check);
  window_ = Memory::create(view_.node.bytes);
  window_->populate(warm_bytes());
  arena_ = std::make_shared<Arena>(view_.node.arena, view_.node.arena + shape.arena_bytes);
  pool_ = std::make_shared<PlanPool>(view_);
  if (comm_->rail() == RailKind::ucx) {
    std::lock_guard lock(comm_->calls());   // the rail's thread uses the same worker
    region_ = std::make_unique<UcxRegion>(*comm_->ucx(), view_.rail.bytes, view_.rail.faults);
    host_.rail_region = static_cast<char*>(region_->data());
    ucx_rail_.attach(comm_->ucx(), region_.get());
  } else {
    own_rail_ = Memory::create(view_.rail.bytes);
    own_rail_->populate(view_.rail.bytes);
    host_.rail_region = own_rail_->data();
  }
  host_.geometry = g;
  host_.node = view_.node;
  host_.rail = view_.rail;
  host_.watch = &comm_->watch();
  const uint64_t per_book = static_cast<uint64_t>(g.nodes()) * shape.channels;
  book_counts_.assign(2 * per_book, 0);
  book_.rows = book_counts_.data();
  book_.back = book_counts_.data() + per_book;
}

Buffer::~Buffer() {
  if (!region_) return;
  std::lock_guard lock(comm_->calls());
  region_.reset();
}

std::string Buffer::card() const {
  Card c{};
  int32_t pid;
  std::memcpy(&pid, comm_->card().data(), 4);
  c.pid = pid;
  c.fd = window_->fd();
  c.window = reinterpret_cast<uint64_t>(window_->data());
  c.rail = reinterpret_cast<uint64_t>(host_.rail_region);
  c.bytes = view_.node.bytes;
  std::string card(reinterpret_cast<const char*>(&c), sizeof(c));
  if (region_) card += region_->key();
  return card;
}

void Buffer::connect(const std::vector<std::string>& cards) {
  const Geometry& g = comm_->geometry();
  const auto read = [&](int rank) {
    Card c;
    std::memcpy(&c, cards[rank].data(), sizeof(c));
    return c;
  };
  for (int local = 0; local < g.ranks_per_node; ++local) {
    const int rank = g.rank_at(g.node(), local);
    const Card c = read(rank);
    if (rank == g.rank) {
      host_.windows[local] = window_->data();
    } else if (comm_->threads()) {
      host_.windows[local] = reinterpret_cast<char*>(c.window);
    } else {
      peers_.push_back(Memory::map(c.pid, c.fd, c.bytes));
      peers_.back()->populate(warm_bytes());
      host_.windows[local] = peers_.back()->data();
    }
  }
  if (region_) {
    std::vector<std::string> keys;
    for (int n = 0; n < g.nodes(); ++n) keys.push_back(cards[g.rail_rank(n)].substr(sizeof(Card)));
    std::lock_guard lock(comm_->calls());
    region_->attach(keys);
  } else {
    std::vector<char*> regions;
    for (int n = 0; n < g.nodes(); ++n) regions.push_back(reinterpret_cast<char*>(read(g.rail_rank(n)).rail));
    loopback_.attach(regions);
  }
}

// The first balanced dispatches should meet warm pages; what an extreme routing needs beyond is committed
// when it is first touched.
uint64_t Buffer::warm_bytes() const {
  const Shape& s = view_.shape;
  const uint64_t usual = 4ull * s.max_tokens * s.top_k * s.combine_row_bytes();
  const uint64_t limit = env_bytes("MOECOMM_POPULATE_BYTES", uint64_t{256} << 20);
  return std::min(view_.node.bytes, view_.node.arena + std::min(usual, limit));
}

void Buffer::connected() { window_->close_fd(); }

void Buffer::begin_call(uint64_t bytes_moved) {
  host_.stream = bytes_moved >= stream_threshold_;
  host_.deadline = std::chrono::steady_clock::now() +
                   std::chrono::duration_cast<std::chrono::steady_clock::duration>(std::chrono::duration<double>(comm_->timeout()));
  ++host_.counters.calls;
}

// Tells everyone within reach, so that they raise now instead of at their own deadline.
void Buffer::report_fault(const Status& s) {
  const Geometry& g = comm_->geometry();
  const uint64_t word = static_cast<uint64_t>(s.code) | static_cast<uint64_t>(s.peer + 1) << 8;
  for (int d = 0; d < g.ranks_per_node; ++d)
    if (d != g.local()) counter_at(host_.windows[d], view_.node.faults + 8 * g.local()).store(word, std::memory_order_release);
  auto* out = reinterpret_cast<FaultWord*>(host_.rail_region + view_.rail.outbox + sizeof(Verdict));
  out->packed = word;
  for (int n = 0; n < g.nodes(); ++n) {
    if (n == g.node()) continue;
    const uint64_t at = view_.rail.faults + 8 * g.node();
    if (region_) region_->put(n, at, out, 8);
    else loopback_.put(n, at, out, 8);
  }
  if (region_)
    for (int i = 0; i < 1000 && !region_->flush_poll(); ++i) comm_->ucx()->progress();
}

template <class Call>
Status Buffer::run(Call&& call) {
  if (const Status broken = comm_->broken(); !broken.ok()) return broken;
  Status s;
  if (region_) {
    s = call(HostFabric<UcxRail>{&host_, &ucx_rail_});
    while (s.ok() && !region_->flush_poll()) {   // sources of puts belong to the caller again
      comm_->ucx()->progress();
      sched_yield();
      if (const int node = comm_->ucx()->failed_node(); node >= 0)
        s = {Code::lost, Phase::flush, comm_->geometry().rail_rank(node), 0, 0, 0};
      else if (std::chrono::steady_clock::now() >= host_.deadline)
        s = {Code::timeout, Phase::flush, -1, 0, 0, 0};
    }
  } else {
    s = call(HostFabric<LoopbackRail>{&host_, &loopback_});
  }
  if (s.code == Code::timeout || s.code == Code::lost || s.code == Code::corrupt) {
    report_fault(s);
    comm_->mark_broken(s);
  }
  return s;
}

Status Buffer::dispatch(const DispatchCall& call, Plan& plan, std::shared_ptr<Block>& out, std::shared_ptr<Block>& output) {
  std::lock_guard lock(comm_->calls());
  Verdict verdict{};
  DispatchArgs a;
  a.b = view_;
  a.book = &book_;
  a.cached = call.cached;
  if (!call.cached) {
    plan.view.tokens = call.tokens;
    plan.view.call = call.shape;
    plan.owner = this;
  } else {
    plan.view.call.row_bytes = call.shape.row_bytes;
    plan.view.call.scale_bytes = call.shape.scale_bytes;
  }
  a.plan = plan.view;
  a.ids64 = call.ids64;
  a.ids32 = call.ids32;
  a.x = call.x;
  a.scales = call.scales;
  a.weights = call.weights;
  a.base = plan.base.data();
  a.offers = plan.offers.data();
  a.block_offset = plan.block_offset.data();
  a.needed = plan.needed.data();
  a.verdict = &verdict;
  const uint64_t copies = std::min<uint64_t>(view_.shape.top_k, view_.geometry.size);
  begin_call(call.shape.row_bytes * call.tokens * copies);
  const Offer offer = arena_->offer();
  const Status s = run([&](auto fabric) { return run_dispatch(Lane{}, fabric, a, offer); });
  if (!s.ok()) return s;
  const int me = view_.geometry.local();
  const CallShape& shape = plan.view.call;
  const uint64_t rows = shape.capacity >= 0 ? shape.capacity : plan.view.rank_rows[me];
  const uint64_t first = block_layout(rows, shape, view_.shape.top_k).bytes;
  arena_->expect(plan.needed[me]);
  out = std::make_shared<Block>(window_, arena_, plan.block_offset[me], first);
  output = std::make_shared<Block>(window_, arena_, plan.block_offset[me] + first, plan.needed[me] - first);
  return s;
}

Status Buffer::combine(const CombineCall& call, Plan& plan, const Block& output) {
  std::lock_guard lock(comm_->calls());
  const int me = view_.geometry.local();
  const uint64_t rows = plan.view.call.capacity >= 0 ? plan.view.call.capacity : plan.view.rank_rows[me];
  const OutputLayout l = output_layout(rows, view_.shape);
  CombineArgs a;
  std::vector<RowsBoard> boards(view_.geometry.ranks_per_node);
  a.b = view_;
  a.plan = plan.view;
  a.book = &book_;
  a.boards = boards.data();
  a.y = call.y;
  a.bias = call.bias;
  a.bias_stride = call.bias_stride;
  begin_call(rows * view_.shape.combine_row_bytes());
  const auto offset_of = [&](const void* p) -> int64_t {
    const char* c = static_cast<const char*>(p);
    const bool inside = c >= window_->data() && c < window_->data() + window_->bytes();
    return inside ? c - window_->data() : -1;
  };
  int64_t at = offset_of(call.rows);
  if (at < 0) {
    at = output.offset() + l.rows;
    if (rows) (host_.stream ? host_.kernels->stream : host_.kernels->copy)(window_->data() + at, call.rows, rows * view_.shape.combine_row_bytes());
    host_.counters.staged_rows += rows;
  }
  a.mine.rows = at;
  a.mine.weights = 0;
  if (call.weights) {
    int64_t w = offset_of(call.weights);
    if (w < 0) {
      w = output.offset() + l.weights;
      std::memcpy(window_->data() + w, call.weights, rows * 4);
    }
    a.mine.weights = w;
  }
  return run([&](auto fabric) { return run_combine(Lane{}, fabric, a); });
}

Counters Buffer::take_counters() {
  std::lock_guard lock(comm_->calls());
  const Counters c = host_.counters;
  host_.counters = {};
  return c;
}

}  // namespace moecomm
