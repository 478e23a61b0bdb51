#include "runtime/sim/world.hpp"

#include <algorithm>
#include <cstring>

#include "balance/route.hpp"
#include "base/checksum.hpp"
#include "runtime/replica_chooser.hpp"
#include "runtime/sim/calls.hpp"
#include "runtime/sim/concurrent_run.hpp"
#include "runtime/sim/run.hpp"
#include "session/arguments.hpp"

namespace moecomm {
namespace {

constexpr int kScribble = 0x3C;
constexpr int kMain = 0;  // the space of dispatch and combine

// Most sources have few messages for a rank, so the notes of equal slots of all sources are contiguous.
DecodeView sim_decode_view(const Geometry& g, const Shape& s) {
  DecodeView d = make_decode_view(g, s, false);
  d.note_per_source = 1;
  d.note_per_slot = g.size;
  return d;
}

SimSpace decode_space(const DecodeView& d) {
  SimSpace s;
  const uint64_t stride = decode_message_bytes(d.shape), tokens = d.shape.max_tokens;
  s.window_bytes = d.window.bytes;
  s.window_counters = d.window.wanted.value;
  s.window_records.begin = d.window.messages.value;
  s.window_records.end = d.window.messages.value + 2 * tokens * stride;
  s.window_records.stride = stride;
  s.window_records.kept = sizeof(DecodeHeader) + sizeof(DecodePick) * d.shape.top_k;
  s.region_bytes = d.region.bytes;
  s.region_counters = d.region.messages.value;
  s.region_rows = d.region.messages.value;
  s.region_records.stride = stride;
  s.region_records.per_source = tokens;
  s.region_records.begin = d.region.messages.value;
  s.region_records.end =
      d.region.messages.value + 2 * (d.geometry.size - d.geometry.ranks_per_node) * tokens * stride;
  s.peers_are_ranks = true;
  return s;
}

}  // namespace

SimCluster::SimCluster(const SimConfig& config) : config_(config) {
  const Geometry world{0, config.size, config.ranks_per_node};
  const BufferView first = make_view(world, config.shape, false);
  SimSpace main;
  main.window_bytes = first.node.bytes;
  main.window_counters = first.node.offers.value;
  main.region_bytes = first.rail.bytes;
  main.region_counters = first.rail.blocks.value;
  main.region_rows = first.rail.area_a;
  std::vector<SimSpace> spaces{main};
  if (config.decode) spaces.push_back(decode_space(sim_decode_view(world, config.shape)));
  net_ = std::make_shared<SimNet>(world, spaces, config.hardware, config.num_sms, config.payload);
  ranks_.resize(config.size);
  for (int r = 0; r < config.size; ++r) {
    RankState& rank = ranks_[r];
    rank.view = make_view({r, config.size, config.ranks_per_node}, config.shape, false);
    rank.pool = std::make_shared<PlanPool>(rank.view);
    if (config.decode)
      rank.decode = std::make_unique<SimDecode>(*net_, sim_decode_view(rank.view.geometry, config.shape),
                                                config.schedule == SimSchedule::lane ? 0 : config.workers);
  }
  reset({});
}

void SimCluster::reset(const Chaos& chaos, double lead, int poison) {
  net_->reset(chaos, lead, poison);
  for (RankState& r : ranks_) {
    r.handles.clear();
    r.arena = std::make_shared<Arena>(r.view.node.arena, r.view.node.arena + config_.shape.arena_bytes,
                                      dispatch_bound(r.view.geometry, config_.shape));
    const uint64_t per_peer = uint64_t(r.view.geometry.nodes()) * config_.shape.channels;
    r.consumed_counts.assign(2 * per_peer, 0);
    r.consumed = {};
    r.consumed.rows = r.consumed_counts.data();
    r.consumed.back = r.consumed_counts.data() + per_peer;
    if (r.decode) r.decode->reset(config_.payload);
    for (std::vector<char>& y : r.decode_y) y.clear();
    r.decode_digest = 0;
  }
}

const Plan* SimCluster::plan(int rank, int handle) const { return ranks_[rank].handles[handle].plan.get(); }
uint64_t SimCluster::rows(int rank, int handle) const { return ranks_[rank].handles[handle].rows; }
const char* SimCluster::block(int rank, int handle) const {
  return net_->window(kMain, rank) + ranks_[rank].handles[handle].piece.offset;
}

// -- one rank's calls -----------------------------------------------------------------------------

// A ReplicaChooser with the faults of mutants.
class SimCluster::MutantChooser {
 public:
  MutantChooser(ReplicaChooser& chooser, RankState& rank, const Mutation& mutation)
      : rows_follow(chooser.rows_follow), chooser_(chooser), rank_(rank), mutation_(mutation) {
    step();
  }
  template <class Picks>
  void choose(Picks picks_of) {
    chooser_.choose(picks_of);
    rank_.chosen = true;
    step();
    if (mutation_.mutant == Mutant::other_half && rank_.view.geometry.rank == 0) ++rank_.consumed.blocks;
  }
  void rows_to(int source, int32_t* rows) { chooser_.rows_to(source, rows); }

  const bool rows_follow;

 private:
  // Makes every announcement, which counts `blocks` up, use the same half.
  void step() {
    if (mutation_.mutant == Mutant::one_half) rank_.consumed.blocks |= 1;
  }

  ReplicaChooser& chooser_;
  RankState& rank_;
  const Mutation& mutation_;
};

// The arguments of a rank's dispatch. `choice` is null if the call does not choose replicas.
DispatchCall SimCluster::call_of(int rank, const SimCall& call) {
  const SimPart& part = call.parts[rank];
  DispatchCall made;
  made.ids64 = part.ids;
  made.tokens = part.tokens;
  made.weights = part.weights;
  made.refused = part.refused;
  made.x = part.x ? part.x : net_->private_memory(rank);
  made.scales = !call.scales_given ? nullptr : part.scales ? part.scales : net_->private_memory(rank);
  made.shape = call.shape;
  made.shape.routing = part.routing;
  if (!part.slots || part.refused != Why::none) return made;
  made.policy = &choices_.at({call.mode, call.activate});
  made.slots = part.slots;
  made.counted = part.counted;
  balance::count_picks(part.ids, part.tokens, config_.shape.top_k, config_.shape.logical_experts,
                       part.counted);
  fill_logical_blocks(ranks_[rank].view, made, ranks_[rank].logical_blocks);
  return made;
}

// An exchange of picks without a dispatch.
template <Fabric<Lane> F>
Status SimCluster::choose(int rank, F fabric, const DispatchCall& call) {
  RankState& r = ranks_[rank];
  const bool chooses = call.refused == Why::none;
  if (!chooses) r.logical_blocks.assign(size_t(r.view.geometry.nodes()) * r.view.count.ints, 0);
  const DispatchArgs a =
      make_exchange_args(r.view, &r.consumed, call.shape, call.refused, r.logical_blocks.data());
  const auto exchange = [&](auto use) {
    const Status s = run_exchange(Lane{}, fabric, a, use);
    if (!is_final(s)) net_->flush();
    return s;
  };
  if (!chooses) return exchange([](auto) {});
  ReplicaChooser chooser(r.view, call, r.consumed.counts);
  MutantChooser watched(chooser, r, mutation_);
  net_->spend(config_.hardware.plan_token * call.tokens);
  return exchange([&](auto picks_of) { watched.choose(picks_of); });
}

template <Fabric<Lane> F>
Status SimCluster::dispatch(int rank, F fabric, const SimCall& call, Handle& handle) {
  RankState& r = ranks_[rank];
  const DispatchCall asked = call_of(rank, call);
  const bool groups = config_.schedule == SimSchedule::groups, lane = config_.schedule == SimSchedule::lane;
  DispatchCall made = asked;
  made.cached = !made.ids64 && handle.plan && made.refused == Why::none;
  if (!handle.plan) handle.plan = r.pool->get();
  handle.held = {};
  Plan& plan = *handle.plan;
  if (asked.policy) {
    made.ids64 = asked.slots;
    if (groups) MOE_TRY(choose(rank, fabric, asked));  // as a GPU's host does before it launches
  }
  open_plan(plan.view, made);
  const bool chooses = asked.policy && !groups;
  const DispatchArgs a = make_dispatch_args(r.view, plan.view, &r.consumed, plan.scratch(), made,
                                            chooses ? r.logical_blocks.data() : nullptr);
  const Offer offer = r.arena->offer();
  Status s;
  if (chooses) {
    ReplicaChooser chooser(r.view, asked, r.consumed.dispatches);
    MutantChooser watched(chooser, r, mutation_);
    s = lane ? lane_dispatch(*net_, fabric, a, offer, watched)
             : sim_dispatch(*net_, fabric, a, offer, watched);
  } else {
    s = lane     ? lane_dispatch(*net_, fabric, a, offer)
        : groups ? concurrent_dispatch(*net_, fabric, a, offer, config_.workers)
                 : sim_dispatch(*net_, fabric, a, offer);
  }
  // Also after a refusal, as in the cpu world: otherwise a signal of another role in the next call could
  // overtake the puts of this one.
  if (!is_final(s)) net_->flush();
  if (!s.ok()) return s;
  handle.rows = static_cast<uint64_t>(local_rows(r.view, plan.view));
  handle.piece = piece_of(r.view, plan.view.call, handle.rows, offer, rules_of(fabric));
  handle.held = hold(net_, r.arena, handle.piece);
  return s;
}

template <Fabric<Lane> F>
Status SimCluster::combine(int rank, F fabric, const SimCall& call, Handle& handle, uint64_t& digest) {
  RankState& r = ranks_[rank];
  const SimPart& part = call.parts[rank];
  Plan& plan = *handle.plan;
  const CallShape& shape = plan.view.call;
  const uint64_t row_bytes = config_.shape.combine_row_bytes();
  const OutputLayout l = output_layout(handle.rows, config_.shape);
  char* window = net_->window(kMain, rank);
  char* output = window + handle.piece.output();
  CombineCall made;
  made.wire = call.wire;
  made.bias = part.bias;
  made.bias_stride = part.bias_stride;
  made.y = part.y ? part.y : net_->private_memory(rank);
  if (config_.payload) {
    if (part.rows)
      std::memcpy(output + l.rows, part.rows, handle.rows * row_bytes);
    else
      echo(output + l.rows, row_bytes,
           window + handle.piece.offset + block_layout(handle.rows, shape, config_.shape.top_k).rows,
           shape.row_bytes, handle.rows, call.flip);
    if (!part.y) {
      r.y.assign(plan.view.tokens * row_bytes, static_cast<char>(0x5A));
      made.y = r.y.data();
    }
  }
  Offset<float> weights;
  if (part.weights || call.echo_weights) {
    const float* in =
        part.weights
            ? part.weights
            : block_layout(handle.rows, shape, config_.shape.top_k).weights.in(window + handle.piece.offset);
    std::memcpy(l.weights.in(output), in, handle.rows * 4);
    weights = l.weights.moved(output - window);
  }
  const RowsBoard board =
      make_board(l.rows.moved(output - window), weights, {}, l.sums.moved(output - window), rules_of(fabric));
  std::vector<RowsBoard> boards(r.view.geometry.ranks_per_node);
  const CombineArgs a = make_combine_args(r.view, plan.view, &r.consumed, boards.data(), board, made);
  const Status s = run_on_schedule(fabric, a);
  if (!is_final(s)) net_->flush();
  if (config_.payload) {
    digest = digest_bytes(1, made.y, plan.view.tokens * row_bytes);
    std::memset(output, kScribble, l.bytes);  // from here on the experts may overwrite their output
  }
  if (!call.keep) handle.held = {};
  return s;
}

uint64_t SimCluster::digest_block(int rank, const Handle& handle) const {
  const CallShape& shape = handle.plan->view.call;
  const BlockLayout l = block_layout(handle.rows, shape, config_.shape.top_k);
  const char* block = net_->window(kMain, rank) + handle.piece.offset;
  const uint64_t k = shape.layout == RowLayout::rank ? config_.shape.top_k : 1;
  uint64_t h = digest_bytes(handle.rows, block + l.rows, handle.rows * shape.row_bytes);
  h = digest_bytes(h, block + l.scales, handle.rows * shape.scale_bytes);
  h = digest_bytes(h, l.weights.in(block), handle.rows * 4 * k);
  if (shape.layout == RowLayout::rank) h = digest_bytes(h, l.ids.in(block), handle.rows * 8 * k);
  h = digest_bytes(h, l.source.in(block), handle.rows * 8);
  return digest_bytes(h, handle.plan->view.tokens_per_expert, 8 * ranks_[rank].view.experts_per_rank());
}

template <Fabric<Lane> F>
Status SimCluster::call_main(int rank, F fabric, const SimCall& call, SimResult& result) {
  RankState& r = ranks_[rank];
  const SimPart& part = call.parts[rank];
  const auto add_choice = [&] {
    if (!part.slots) return;
    result.digest = digest_bytes(result.digest, part.slots, uint64_t{8} * part.tokens * config_.shape.top_k);
    result.digest = digest_bytes(result.digest, part.counted, uint64_t{4} * config_.shape.logical_experts);
  };
  if (call.verb == SimVerb::choose) {
    MOE_TRY(choose(rank, fabric, call_of(rank, call)));
    add_choice();
    return {};
  }
  Handle& handle = r.handles[call.handle];
  if (part.strays && call.verb == SimVerb::dispatch) return refuse_combine(rank, fabric);
  if (part.strays) {
    SimCall other = call;
    other.parts[rank] = {};
    other.parts[rank].refused = Why::error;
    other.shape = {};
    Handle none;
    return dispatch(rank, fabric, other, none);
  }
  if (call.verb == SimVerb::dispatch) {
    MOE_TRY(dispatch(rank, fabric, call, handle));
    if (config_.payload) result.digest = handle.digest = digest_block(rank, handle);
    add_choice();
    return {};
  }
  if (!handle.held.block) {  // its dispatch was refused
    result.ran = false;
    return {};
  }
  if (part.refused != Why::none) {
    if (!call.keep) handle.held = {};
    return refuse_combine(rank, fabric);
  }
  // The block that dispatch delivered must be unchanged.
  const bool intact = !config_.payload || digest_block(rank, handle) == handle.digest;
  const Status s = combine(rank, fabric, call, handle, result.digest);
  if (!intact) result.digest = ~result.digest;
  return s;
}

uint64_t SimCluster::digest_packed(int rank) const {
  SimDecode& decode = *ranks_[rank].decode;
  const DecodeView& v = decode.view();
  const CallShape& call = decode.turn(decode.epoch()).call;
  const int parity = decode.epoch() & 1;
  const uint64_t per_expert = decode_rows_per_expert(v.geometry, v.shape);
  const auto* counts = v.counts(parity).in(decode.memory());
  uint64_t h = digest_bytes(3, counts, 8 * v.experts_per_rank());
  for (int e = 0; e < v.experts_per_rank(); ++e) {
    h = digest_bytes(h, decode.memory() + v.x(parity) + e * per_expert * call.row_bytes,
                     counts[e] * call.row_bytes);
    h = digest_bytes(h, decode.memory() + v.scales(parity, e), counts[e] * call.scale_bytes);
  }
  return h;
}

MutantFabric SimCluster::mutant(const SimFabric& fabric, const RankState& r) const {
  return {fabric,
          mutation_,
          &r.chosen,
          &r.view.rail,
          &r.view.count,
          r.view.shape.count_halves(),
          &r.consumed.blocks,
          &r.consumed.combines};
}

template <Fabric<Lane> F>
void SimCluster::run_rank(int rank, F fabric, const std::vector<SimCall>& program) {
  for (size_t i = 0; i < program.size(); ++i) {
    const SimCall& call = program[i];
    SimResult& result = results_[i * config_.size + rank];
    if (call.parts[rank].absent) {
      if (call.verb == SimVerb::decode_mask) return;
      continue;
    }
    net_->spend(call.before);
    result.begin = net_->fibers().now();
    result.ran = true;
    if (mutation_.mutant == Mutant::absent_refusal && call.parts[rank].refused != Why::none) {
      result.status.code = Code::refused;
      continue;
    }
    const bool main =
        call.verb == SimVerb::dispatch || call.verb == SimVerb::combine || call.verb == SimVerb::choose;
    ranks_[rank].chosen = false;
    fabric.space = main ? kMain : SimDecode::kSpace;
    result.status = main ? call_main(rank, fabric, call, result) : call_decode(rank, fabric, call, result);
    result.end = net_->fibers().now();
    if (is_final(result.status)) return;
  }
}

const std::vector<SimResult>& SimCluster::run(const std::vector<SimCall>& program, const Mutation& mutation) {
  results_.assign(program.size() * config_.size, {});
  rests_.clear();
  mutation_ = mutation;
  int handles = 0;
  for (const SimCall& call : program) {
    handles = std::max(handles, call.handle + 1);
    if (!config_.placement.empty())
      choices_.try_emplace({call.mode, call.activate}, config_.placement.data(), config_.shape.num_experts,
                           config_.shape.logical_experts, config_.size, config_.size / config_.ranks_per_node,
                           call.mode, call.activate);
  }
  for (int rank = 0; rank < config_.size; ++rank) {
    if (static_cast<int>(ranks_[rank].handles.size()) < handles) ranks_[rank].handles.resize(handles);
    net_->start(rank, "rank", -1, config_.schedule == SimSchedule::lane ? 0 : Role::kAllSms,
                [this, rank, &program] {
                  const SimFabric fabric{net_.get(), rank, kMain};
                  if (mutation_.mutant == Mutant::none)
                    run_rank(rank, fabric, program);
                  else
                    run_rank(rank, mutant(fabric, ranks_[rank]), program);
                });
  }
  net_->run();
  return results_;
}

}  // namespace moecomm
