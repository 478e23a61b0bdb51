#include "runtime/sim.hpp"

#include <cstring>

#include "base/checksum.hpp"
#include "world/sim/run.hpp"

namespace moecomm {
namespace {

constexpr int kMain = 0;   // the space of dispatch and combine

uint64_t digest_bytes(uint64_t h, const void* p, uint64_t bytes) {
  h = row_checksum(p, bytes, h);
  uint64_t tail = 0;
  std::memcpy(&tail, static_cast<const char*>(p) + bytes / 8 * 8, bytes % 8);
  return (h ^ tail) * 0x9E3779B97F4A7C15ull;
}

}  // namespace

SimCluster::SimCluster(const SimConfig& config) : config_(config) {
  const Geometry world{0, config.size, config.ranks_per_node};
  const BufferView first = make_view(world, config.shape, false);
  SimSpace main;
  main.window_bytes = first.node.bytes;
  main.window_counters = first.node.offers;
  main.region_bytes = first.rail.bytes;
  main.region_counters = first.rail.blocks;
  main.region_rows = first.rail.area_a;
  net_ = std::make_unique<SimNet>(world, std::vector<SimSpace>{main}, config.hardware, config.num_sms, config.payload);
  ranks_.resize(config.size);
  for (int r = 0; r < config.size; ++r) {
    RankState& rank = ranks_[r];
    rank.view = make_view({r, config.size, config.ranks_per_node}, config.shape, false);
    rank.pool = std::make_shared<PlanPool>(rank.view);
  }
  reset({});
}

void SimCluster::reset(const Chaos& chaos, int poison) {
  net_->reset(chaos, poison);
  for (RankState& r : ranks_) {
    r.handles.clear();
    r.arena = std::make_unique<Arena>(r.view.node.arena, r.view.node.arena + config_.shape.arena_bytes);
    const uint64_t per_book = uint64_t(r.view.geometry.nodes()) * config_.shape.channels;
    r.book_counts.assign(2 * per_book, 0);
    r.book = {};
    r.book.rows = r.book_counts.data();
    r.book.back = r.book_counts.data() + per_book;
  }
}

const Plan* SimCluster::plan(int rank, int handle) const { return ranks_[rank].handles[handle].plan.get(); }
uint64_t SimCluster::rows(int rank, int handle) const { return ranks_[rank].handles[handle].rows; }
const char* SimCluster::block(int rank, int handle) const {
  return net_->window(kMain, rank) + ranks_[rank].handles[handle].offset;
}

void SimCluster::release(RankState& r, Handle& handle) {
  if (handle.bytes) r.arena->release(handle.offset);
  handle.bytes = 0;
}

// -- one rank's calls -----------------------------------------------------------------------------

template <class F>
Status SimCluster::dispatch(int rank, F fabric, const SimCall& call, Handle& handle) {
  RankState& r = ranks_[rank];
  const SimPart& part = call.parts[rank];
  const bool cached = part.ids == nullptr && handle.plan;
  if (!handle.plan) handle.plan = r.pool->get();
  release(r, handle);
  Plan& plan = *handle.plan;
  Verdict verdict{};
  if (!cached) {
    plan.view.tokens = part.tokens;
    plan.view.call = call.shape;
  } else {
    plan.view.call.row_bytes = call.shape.row_bytes;
    plan.view.call.scale_bytes = call.shape.scale_bytes;
  }
  DispatchArgs a;
  a.b = r.view;
  a.plan = plan.view;
  a.book = &r.book;
  a.cached = cached;
  a.ids64 = part.ids;
  a.x = part.x ? part.x : net_->private_memory(rank);
  a.scales = !call.shape.scale_bytes ? nullptr : part.scales ? part.scales : net_->private_memory(rank);
  a.weights = part.weights;
  a.base = plan.base.data();
  a.offers = plan.offers.data();
  a.target = plan.target.data();
  a.first = plan.first.data();
  a.needed = plan.needed.data();
  a.verdict = &verdict;
  const Status s = sim_dispatch(*net_, fabric, a, r.arena->offer());
  net_->flush();
  if (!s.ok()) return s;
  const int me = r.view.geometry.local();
  const CallShape& shape = plan.view.call;
  handle.rows = shape.capacity >= 0 ? shape.capacity : plan.view.rank_rows[me];
  handle.first = block_layout(handle.rows, shape, config_.shape.top_k).bytes;
  handle.offset = plan.target[me].rows;
  handle.bytes = plan.needed[me];
  r.arena->expect(handle.bytes);
  r.arena->take(handle.offset, handle.bytes);
  return s;
}

template <class F>
Status SimCluster::combine(int rank, F fabric, const SimCall& call, Handle& handle, uint64_t& digest) {
  RankState& r = ranks_[rank];
  const SimPart& part = call.parts[rank];
  Plan& plan = *handle.plan;
  const CallShape& shape = plan.view.call;
  const uint64_t row_bytes = config_.shape.combine_row_bytes();
  const OutputLayout l = output_layout(handle.rows, config_.shape);
  char* window = net_->window(kMain, rank);
  char* output = window + handle.offset + handle.first;
  CombineArgs a;
  std::vector<RowsBoard> boards(r.view.geometry.ranks_per_node);
  a.b = r.view;
  a.plan = plan.view;
  a.book = &r.book;
  a.boards = boards.data();
  a.bias = part.bias;
  a.bias_stride = part.bias_stride;
  a.mine.rows = output + l.rows - window;
  a.mine.weights = 0;
  a.y = part.y ? part.y : net_->private_memory(rank);
  if (config_.payload) {
    const char* in = part.rows ? part.rows : window + handle.offset + block_layout(handle.rows, shape, config_.shape.top_k).rows;
    const uint64_t in_bytes = part.rows ? row_bytes : shape.row_bytes;
    for (uint64_t i = 0; i < handle.rows; ++i)   // quantized rows are echoed as they are, repeated
      for (uint64_t at = 0; at < row_bytes; at += in_bytes)
        std::memcpy(output + l.rows + i * row_bytes + at, in + i * in_bytes, std::min(in_bytes, row_bytes - at));
    if (!part.y) {
      r.y.assign(plan.view.tokens * row_bytes, static_cast<char>(0x5A));
      a.y = r.y.data();
    }
  }
  if (part.weights || call.echo_weights) {
    const float* in = part.weights ? part.weights
                                   : reinterpret_cast<const float*>(window + handle.offset + block_layout(handle.rows, shape, config_.shape.top_k).weights);
    std::memcpy(output + l.weights, in, handle.rows * 4);
    a.mine.weights = output + l.weights - window;
  }
  const Status s = sim_combine(*net_, fabric, a);
  net_->flush();
  if (config_.payload) digest = digest_bytes(1, a.y, plan.view.tokens * row_bytes);
  if (!call.keep) release(r, handle);
  return s;
}

uint64_t SimCluster::digest_block(int rank, const Handle& handle) const {
  const CallShape& shape = handle.plan->view.call;
  const BlockLayout l = block_layout(handle.rows, shape, config_.shape.top_k);
  const char* block = net_->window(kMain, rank) + handle.offset;
  const uint64_t k = shape.layout == RowLayout::rank ? config_.shape.top_k : 1;
  uint64_t h = digest_bytes(handle.rows, block + l.rows, handle.rows * shape.row_bytes);
  h = digest_bytes(h, block + l.scales, handle.rows * shape.scale_bytes);
  h = digest_bytes(h, block + l.weights, handle.rows * 4 * k);
  if (shape.layout == RowLayout::rank) h = digest_bytes(h, block + l.ids, handle.rows * 8 * k);
  h = digest_bytes(h, block + l.source, handle.rows * 8);
  return digest_bytes(h, handle.plan->view.tokens_per_expert, 8 * ranks_[rank].view.experts_per_rank());
}

template <class F>
void SimCluster::run_rank(int rank, F fabric, const std::vector<SimCall>& program) {
  for (size_t i = 0; i < program.size(); ++i) {
    const SimCall& call = program[i];
    SimResult& result = results_[i * config_.size + rank];
    Handle& handle = ranks_[rank].handles[call.handle];
    net_->spend(call.before);
    result.begin = net_->fibers().now();
    if (call.verb == SimVerb::dispatch) {
      result.status = dispatch(rank, fabric, call, handle);
      if (result.status.ok() && config_.payload) result.digest = handle.digest = digest_block(rank, handle);
    } else {
      if (!handle.bytes) continue;   // its dispatch was refused
      // What dispatch delivered must still be there: nobody may have written into it since.
      const bool intact = !config_.payload || digest_block(rank, handle) == handle.digest;
      result.status = combine(rank, fabric, call, handle, result.digest);
      if (!intact) result.digest = ~result.digest;
    }
    result.end = net_->fibers().now();
    result.ran = true;
    if (result.status.code == Code::timeout) return;
  }
}

const std::vector<SimResult>& SimCluster::run(const std::vector<SimCall>& program, const Mutation& mutation) {
  results_.assign(program.size() * config_.size, {});
  int handles = 0;
  for (const SimCall& call : program) handles = std::max(handles, call.handle + 1);
  for (int rank = 0; rank < config_.size; ++rank) {
    if (static_cast<int>(ranks_[rank].handles.size()) < handles) ranks_[rank].handles.resize(handles);
    net_->start(rank, "rank", -1, Role::kAllSms, [this, rank, &program, &mutation] {
      const SimFabric fabric{net_.get(), rank, kMain};
      if (mutation.flaw == Flaw::none) run_rank(rank, fabric, program);
      else run_rank(rank, MutantFabric{fabric, mutation}, program);
    });
  }
  net_->run();
  return results_;
}

// -- exploration ----------------------------------------------------------------------------------

namespace {

struct Difference {
  bool found = false;
  int call = -1, rank = -1;
  std::string what;
};

Difference compare(SimCluster& cluster, const std::vector<SimResult>& got, const std::vector<SimResult>& want) {
  const int size = cluster.config().size;
  const auto at = [&](size_t i, std::string what) { return Difference{true, static_cast<int>(i) / size, static_cast<int>(i) % size, std::move(what)}; };
  if (cluster.net().stuck()) {
    for (size_t i = 0; i < got.size(); ++i)
      if (got[i].status.code == Code::timeout) return at(i, "deadlock");
    return at(0, "deadlock");
  }
  for (size_t i = 0; i < got.size(); ++i) {
    if (got[i].status.code != want[i].status.code || got[i].ran != want[i].ran) return at(i, "another status than without chaos");
    if (got[i].digest != want[i].digest) return at(i, "delivered something else than without chaos");
  }
  return {};
}

}  // namespace

Finding explore(SimCluster& cluster, const std::vector<SimCall>& program, const Mutation& mutation, uint64_t first_seed, uint64_t count) {
  constexpr uint64_t kNoLimit = ~uint64_t{0};
  cluster.reset({});
  const std::vector<SimResult> want = cluster.run(program);
  // A flawed protocol that reads poison as an index would crash instead of being found.
  const auto attempt = [&](uint64_t seed, uint64_t budget) {
    cluster.reset(Chaos(seed, budget), mutation.flaw == Flaw::none && seed % 2 ? SimNet::kPoison : 0);
    return compare(cluster, cluster.run(program, mutation), want);
  };
  Finding f;
  for (uint64_t seed = first_seed; seed < first_seed + count; ++seed) {
    ++f.schedules;
    if (!attempt(seed, kNoLimit).found) continue;
    // The fewest perturbations that still fail: halve while that works, then one by one.
    uint64_t budget = cluster.net().chaos().drawn();
    for (uint64_t step = budget / 2; step > 0;) {
      if (budget >= step && attempt(seed, budget - step).found) budget -= step;
      else step /= 2;
    }
    cluster.net().set_log(true);
    const Difference d = attempt(seed, budget);
    f.found = true;
    f.seed = seed;
    f.perturbations = budget;
    f.call = d.call;
    f.rank = d.rank;
    f.what = d.what;
    f.log = cluster.net().log_lines();
    f.stuck = cluster.net().stuck_roles();
    cluster.net().set_log(false);
    return f;
  }
  return f;
}

}  // namespace moecomm
