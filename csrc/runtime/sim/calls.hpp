// Parts of SimCluster's calls: decode, and combines that a rank refuses. Included by world.cpp only.
#pragma once
#include <algorithm>
#include <cstring>

#include "base/checksum.hpp"
#include "runtime/sim/concurrent_run.hpp"
#include "runtime/sim/run.hpp"
#include "runtime/sim/world.hpp"

namespace moecomm {

inline uint64_t digest_bytes(uint64_t h, const void* p, uint64_t bytes) {
  h = row_checksum(p, bytes, h);
  uint64_t tail = 0;
  std::memcpy(&tail, static_cast<const char*>(p) + bytes / 8 * 8, bytes % 8);
  return (h ^ tail) * 0x9E3779B97F4A7C15ull;
}

// The experts of exploration return the rows that they got, with some bits flipped so that calls differ.
// Quantized rows are repeated to the length of the output rows.
inline void echo(char* out, uint64_t out_bytes, const char* in, uint64_t in_bytes, uint64_t rows,
                 uint8_t flip) {
  for (uint64_t r = 0; r < rows; ++r)
    for (uint64_t i = 0; i < out_bytes; ++i) out[r * out_bytes + i] = in[r * in_bytes + i % in_bytes] ^ flip;
}

// Digest of the results of decode's combines of one parity.
inline uint64_t digest_sums(const std::vector<char>& y) {
  return y.empty() ? 0 : digest_bytes(1, y.data(), y.size());
}

template <Fabric<Lane> F>
Status SimCluster::refuse_combine(int rank, F fabric) {
  RankState& r = ranks_[rank];
  std::vector<RowsBoard> boards(r.view.geometry.ranks_per_node);
  const CombineArgs a = make_refused_combine_args(r.view, &r.consumed, boards.data(), Why::arguments);
  const Status s = run_on_schedule(fabric, a);
  if (!is_final(s)) net_->flush();
  return s;
}

template <Fabric<Lane> F>
Status SimCluster::run_on_schedule(F fabric, const CombineArgs& a) {
  return config_.schedule == SimSchedule::lane     ? lane_combine(*net_, fabric, a)
         : config_.schedule == SimSchedule::groups ? concurrent_combine(*net_, fabric, a, config_.workers)
                                                   : sim_combine(*net_, fabric, a);
}

// Barriers of the remaining ranks: before any rank changes its epoch, and before any rank continues.
struct SimCluster::Rest {
  explicit Rest(SimNet& net) : resting(net), masked(net) {}
  Milestone resting, masked;
  int rest = 0, done = 0;
  uint64_t latest = 0;
};

// In place of the exchange that the runtimes make over their bootstrap, outside of the Fabric.
template <Fabric<Lane> F>
void SimCluster::mask(int rank, F fabric, const SimCall& call) {
  SimDecode& decode = *ranks_[rank].decode;
  std::vector<uint8_t> masked;
  for (const SimPart& part : call.parts) masked.push_back(part.absent);
  const int left = config_.size - static_cast<int>(std::count(masked.begin(), masked.end(), 1));
  std::shared_ptr<Rest>& made = rests_[&call];
  if (!made) made = std::make_shared<Rest>(*net_);
  const std::shared_ptr<Rest> all = made;
  net_->finish_rows();
  net_->fibers().advance(std::max(net_->fibers().now(), net_->role().stores));
  net_->flush();
  all->latest = std::max(all->latest, decode.epoch());
  if (++all->rest == left) all->resting.open(1);
  all->resting.wait(1);
  decode.mask(fabric, masked, all->latest);
  if (++all->done == left) all->masked.open(1);
  all->masked.wait(1);
}

template <Fabric<Lane> F>
Status SimCluster::call_decode(int rank, F fabric, const SimCall& call, SimResult& result) {
  RankState& r = ranks_[rank];
  SimDecode& decode = *r.decode;
  const SimPart& part = call.parts[rank];
  const uint64_t epoch = decode.epoch() - call.handle, row_bytes = config_.shape.combine_row_bytes();
  const int parity = epoch & 1;
  switch (call.verb) {
    case SimVerb::decode_mask: mask(rank, fabric, call); return {};
    case SimVerb::decode_dispatch: {
      DecodeDispatchCall d;
      d.tokens = part.tokens;
      d.ids64 = part.ids;
      d.weights = part.weights;
      d.weighted = part.weights != nullptr;
      d.x = part.x ? part.x : net_->private_memory(rank);
      d.scales = !call.scales_given ? nullptr : part.scales ? part.scales : net_->private_memory(rank);
      d.quant = call.shape.scales;
      d.refused = part.refused;
      MOE_TRY(decode.dispatch(fabric, d));
      // A combine whose receive phase was left out is complete now, by rule (B).
      if (config_.payload) result.digest = digest_sums(r.decode_y[decode.epoch() & 1]);
      return {};
    }
    case SimVerb::decode_receive:
      MOE_TRY(decode.receive(fabric, epoch));
      if (config_.payload) result.digest = r.decode_digest = digest_packed(rank);
      return {};
    case SimVerb::decode_combine: {
      if (!can_combine(decode.stage(epoch))) {  // its dispatch was refused
        result.ran = false;
        return {};
      }
      DecodeCombineCall c;
      c.epoch = epoch;
      c.rows = decode.memory() + decode.view().rows(parity);
      c.weights = part.weights;
      c.wire = call.wire;
      c.refused = part.refused;
      MOE_TRY(decode.begin_combine(fabric, epoch));
      bool intact = true;
      char* y = part.y ? part.y : net_->private_memory(rank);
      if (config_.payload) {
        intact = digest_packed(rank) == r.decode_digest;
        const DecodeView& v = decode.view();
        const uint64_t in_bytes = decode.turn(epoch).call.row_bytes,
                       per_expert = decode_rows_per_expert(v.geometry, v.shape);
        const auto* counts = v.counts(parity).in(decode.memory());
        for (int e = 0; e < v.experts_per_rank(); ++e) {
          char* out = decode.memory() + v.rows(parity) + e * per_expert * row_bytes;
          if (part.rows)
            std::memcpy(out, part.rows + e * per_expert * row_bytes, counts[e] * row_bytes);
          else
            echo(out, row_bytes, decode.memory() + v.x(parity) + e * per_expert * in_bytes, in_bytes,
                 counts[e], call.flip);
        }
        if (!part.y) {
          r.decode_y[parity].assign(decode.turn(epoch).tokens * row_bytes, static_cast<char>(0x5A));
          y = r.decode_y[parity].data();
        }
      }
      c.y = y;
      MOE_TRY(decode.combine(fabric, c));
      result.digest = !intact;
      return {};
    }
    default:
      MOE_TRY(decode.sum(fabric, epoch));
      if (config_.payload) result.digest = digest_sums(r.decode_y[parity]);
      return {};
  }
}

}  // namespace moecomm
