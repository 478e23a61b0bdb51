// Parts of SimCluster's calls: those of the decode path, and those that a rank refuses. Included by sim.cpp
// alone.
#pragma once
#include <cstring>

#include "base/checksum.hpp"
#include "runtime/sim/run.hpp"
#include "runtime/sim/seats_run.hpp"
#include "runtime/sim/world.hpp"

namespace moecomm {

inline uint64_t digest_bytes(uint64_t h, const void* p, uint64_t bytes) {
  h = row_checksum(p, bytes, h);
  uint64_t tail = 0;
  std::memcpy(&tail, static_cast<const char*>(p) + bytes / 8 * 8, bytes % 8);
  return (h ^ tail) * 0x9E3779B97F4A7C15ull;
}

// The experts of exploration hand back what they got, with some bits turned so that calls differ.
// Quantized rows are repeated to the length of the others.
inline void echo(char* out, uint64_t out_bytes, const char* in, uint64_t in_bytes, uint64_t rows,
                 uint8_t flip) {
  for (uint64_t r = 0; r < rows; ++r)
    for (uint64_t i = 0; i < out_bytes; ++i) out[r * out_bytes + i] = in[r * in_bytes + i % in_bytes] ^ flip;
}

template <class F>
Status SimCluster::refuse_combine(int rank, F fabric) {
  RankState& r = ranks_[rank];
  std::vector<RowsBoard> boards(r.view.geometry.ranks_per_node);
  CombineArgs a;
  a.b = r.view;
  a.book = &r.book;
  a.boards = boards.data();
  a.mine = {};
  a.refused = Why::arguments;
  const Status s = run_on_schedule(fabric, a);
  if (!is_final(s)) net_->flush();
  return s;
}

template <class F>
Status SimCluster::run_on_schedule(F fabric, const CombineArgs& a) {
  return config_.schedule == SimSchedule::lane    ? lane_combine(*net_, fabric, a)
         : config_.schedule == SimSchedule::seats ? seats_combine(*net_, fabric, a, config_.workers)
                                                  : sim_combine(*net_, fabric, a);
}

template <class F>
Status SimCluster::call_decode(int rank, F fabric, const SimCall& call, SimResult& result) {
  RankState& r = ranks_[rank];
  SimDecode& decode = *r.decode;
  const SimPart& part = call.parts[rank];
  const uint64_t epoch = decode.epoch() - call.handle, row_bytes = config_.shape.combine_row_bytes();
  const int parity = epoch & 1;
  switch (call.verb) {
    case SimVerb::decode_dispatch: {
      SimDecodeDispatch d;
      d.tokens = part.tokens;
      d.ids = part.ids;
      d.weights = part.weights;
      d.x = part.x ? part.x : net_->private_memory(rank);
      d.scales = !call.scales_given ? nullptr : part.scales ? part.scales : net_->private_memory(rank);
      d.shape = call.shape;
      d.refused = part.refused;
      if (d.refused != Why::none) d.tokens = 0;
      return decode.dispatch(fabric, d);
    }
    case SimVerb::decode_receive:
      MOE_TRY(decode.receive(fabric, epoch));
      if (config_.payload) result.digest = r.decode_digest = digest_packed(rank);
      return {};
    case SimVerb::decode_combine: {
      if (decode.stage(epoch) != SimDecode::Stage::received) {  // its dispatch was refused
        result.ran = false;
        return {};
      }
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
      MOE_TRY(decode.combine(fabric, epoch, part.weights, call.wire, y, part.refused));
      result.digest = !intact;
      return {};
    }
    default:
      MOE_TRY(decode.sum(fabric, epoch));
      if (config_.payload && !r.decode_y[parity].empty())
        result.digest = digest_bytes(1, r.decode_y[parity].data(), r.decode_y[parity].size());
      return {};
  }
}

}  // namespace moecomm
