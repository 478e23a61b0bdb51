#include "runtime/sim/domain.hpp"

#include <algorithm>

#include "base/checksum.hpp"
#include "schedule/domain.hpp"

namespace moecomm {
namespace {

constexpr int kCounters = 1;

SimSpace space_of(const DomainLayout& l) {
  SimSpace s;
  s.window_bytes = s.region_bytes = l.bytes;
  s.window_counters = s.region_counters = l.warm;
  s.region_rows = l.slots.value;
  s.peers_are_ranks = s.one_memory = true;
  return s;
}

bool is_odd(const SimDomainCall& c, int rank) { return c.odd == 1 + rank; }
bool refuses(const SimDomainCall& c, int rank) { return c.odd == 129 + rank; }

}  // namespace

SimDomain::SimDomain(const SimDomainConfig& config) : config_(config), ranks_(config.size) {
  for (int r = 0; r < config.size; ++r)
    ranks_[r].view =
        make_domain_view({r, config.size, config.ranks_per_node}, {config.heap_bytes, kCounters});
  net_ = std::make_unique<SimNet>(ranks_[0].view.geometry, std::vector<SimSpace>{space_of(ranks_[0].view.at)},
                                  config.hardware, config.num_sms, config.payload);
}

void SimDomain::reset(const Chaos& chaos) {
  net_->reset(chaos);
  for (int r = 0; r < config_.size; ++r) {
    ranks_[r].counts = std::make_unique<DomainCounts>(ranks_[r].view.geometry);
    ranks_[r].rung = 0;
    if (!config_.payload) continue;
    float* numbers = Offset<float>{}.in(heap(r));
    uint64_t state = r + 1;
    for (uint64_t i = 0; i < config_.heap_bytes / 4; ++i) {
      state = state * 6364136223846793005ull + 1442695040888963407ull;
      numbers[i] = static_cast<float>(state >> 52);
    }
  }
}

std::vector<Segment> SimDomain::segments(int rank, const SimGroup& g, bool here) {
  Rows rows;
  rows.there = view(rank).at.heap.value + g.shared;
  rows.here = here ? net_->window(0, rank, view(rank).at.heap.value + g.own) : nullptr;
  rows.bytes = rows.there_stride = rows.here_stride = g.bytes;
  rows.count = g.count;
  return segments_of({rows}, kSlotBytes);
}

template <Fabric<Lane> F>
Status SimDomain::ring(int rank, F f, const SimGroup& g) {
  RankState& r = ranks_[rank];
  const int size = config_.size, to = (rank + g.root) % size, from = (rank + size - g.root % size) % size;
  const std::vector<Segment> p = segments(rank, g, true);
  write_segments(Lane{}, f, r.view, &r.counts->consumed, to, {p.data(), static_cast<int64_t>(p.size())});
  notify(Lane{}, f, r.view, to, 0, p.size());
  // All rings from one source use the same counter, so its value counts the segments of earlier rings too.
  r.rung += p.size();
  return await(Lane{}, f, r.view, from, 0, r.rung);
}

template <Fabric<Lane> F>
Status SimDomain::call(int rank, F f, const SimDomainCall& c) {
  RankState& r = ranks_[rank];
  std::vector<std::vector<Segment>> kept;
  std::vector<MulticastArgs> multicasts;
  std::vector<ReduceArgs> reductions;
  Signature signature;
  signature.add(static_cast<uint64_t>(c.verb) + 100 * is_odd(c, rank));
  for (const SimGroup& g : c.groups) {
    kept.push_back(segments(rank, g, rank == g.root));
    const Segments p{kept.back().data(), static_cast<int64_t>(kept.back().size())};
    const Ranks ranks{g.ranks.data(), static_cast<int32_t>(g.ranks.size())};
    multicasts.push_back({r.view, g.root, ranks, p, &r.counts->consumed});
    reductions.push_back({r.view, g.root, ranks, p, DType::f32, &r.counts->consumed});
    for (const Segment& segment : kept.back()) signature.add(segment.there ^ segment.bytes << 40);
  }
  net_->spend(net_->hardware().launch);
  MOE_TRY(agree(Lane{}, f, r.view, &r.counts->consumed, signature.value(),
                refuses(c, rank) ? Why::arguments : Why::none));
  const int n = static_cast<int>(c.groups.size());
  Status s;
  if (c.verb == SimDomainVerb::multicast) s = run_multicast(Lane{}, f, multicasts.data(), n);
  if (c.verb == SimDomainVerb::reduce) s = run_reduce(Lane{}, f, reductions.data(), n);
  if (c.verb == SimDomainVerb::ring) s = ring(rank, f, c.groups[0]);
  f.finish_rows(Lane{});
  if (s.ok()) net_->flush();
  net_->fibers().advance(net_->fibers().now() + 1);  // data that arrives at this moment has been read
  return s;
}

// After the call this rank's source memory may be overwritten. Exploration does so, to find late reads.
void SimDomain::overwrite(int rank, const SimDomainCall& c) {
  for (const SimGroup& g : c.groups) {
    const bool reduces = c.verb == SimDomainVerb::reduce;
    const bool gave = reduces ? std::find(g.ranks.begin(), g.ranks.end(), rank) != g.ranks.end()
                              : c.verb == SimDomainVerb::ring || rank == g.root;
    float* numbers = Offset<float>{reduces ? g.shared : g.own}.in(heap(rank));
    for (uint64_t k = 0; gave && k < g.bytes * g.count / 4; ++k) numbers[k] += 1.0f;
  }
}

template <Fabric<Lane> F>
void SimDomain::run_rank(int rank, F f, const std::vector<SimDomainCall>& program) {
  for (size_t i = 0; i < program.size(); ++i) {
    SimDomainResult& result = results_[i * config_.size + rank];
    result.begin = net_->fibers().now();
    result.status = call(rank, f, program[i]);
    result.end = net_->fibers().now();
    if (config_.payload) {
      result.digest = row_checksum(heap(rank), config_.heap_bytes, 1);
      overwrite(rank, program[i]);
    }
    if (is_final(result.status)) return;
  }
}

const std::vector<SimDomainResult>& SimDomain::run(const std::vector<SimDomainCall>& program,
                                                   const Mutation& mutation) {
  results_.assign(program.size() * config_.size, {});
  const bool chosen = true;
  for (int rank = 0; rank < config_.size; ++rank)
    net_->start(rank, "rank", -1, Role::kAllSms, [this, rank, &program, &mutation, &chosen] {
      const SimFabric fabric{net_.get(), rank, 0};
      if (mutation.mutant == Mutant::none)
        run_rank(rank, fabric, program);
      else
        run_rank(rank, MutantFabric{fabric, mutation, &chosen, nullptr, nullptr, 1, nullptr, nullptr},
                 program);
    });
  net_->run();
  return results_;
}

SimDomainFinding SimDomain::explore(const std::vector<SimDomainCall>& program, const Mutation& mutation,
                                    uint64_t first_seed, uint64_t count) {
  reset({});
  const std::vector<SimDomainResult> want = run(program);
  SimDomainFinding f;
  for (f.seed = first_seed; f.seed < first_seed + count; ++f.seed) {
    ++f.schedules;
    reset(Chaos(f.seed, ~uint64_t{0}));
    const std::vector<SimDomainResult>& got = run(program, mutation);
    for (size_t i = 0; i < got.size(); ++i) {
      const bool stuck = net_->stuck() && got[i].status.code == Code::timeout;
      const char* what = stuck                                       ? "deadlock"
                         : got[i].status.code != want[i].status.code ? "another status than without chaos"
                         : got[i].digest != want[i].digest           ? "other bytes than without chaos"
                                                                     : nullptr;
      if (!what) continue;
      f.found = true;
      f.call = static_cast<int>(i) / config_.size;
      f.rank = static_cast<int>(i) % config_.size;
      f.what = what;
      return f;
    }
  }
  return f;
}

}  // namespace moecomm
