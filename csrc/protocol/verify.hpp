// MOECOMM_CHECK=1: the additional checks of the roles.
//
//   dispatch  Every row is sent with a checksum. The gateway verifies it after the rail hop, the receiver
//             after the node hop. The receiver also compares the rows with the counts that were announced to
//             it.
//   combine   Every rank writes checksums of its rows when it publishes them, and each reader verifies them.
//             A reduced row is sent over the rail with a checksum.
//
// A seed ties each checksum to one call, source and token, so that a row left over from an earlier call is
// detected like a damaged one. A failed check gives a `corrupt` status: peer is the row's source, detail its
// token.
#pragma once
#include "base/checksum.hpp"
#include "fabric/fabric.hpp"
#include "protocol/views.hpp"

namespace moecomm::verify {

// The checksum of a row's payload and scales. step: words from one scale to the next.
MOE_HD inline uint64_t wire_checksum(const CallShape& call, const char* row, const char* scales, int64_t step,
                                     uint64_t seed) {
  uint64_t sum = row_checksum(row, call.row_bytes, seed);
  for (int64_t i = 0; i < static_cast<int64_t>(call.scale_bytes / 4); ++i)
    sum = row_checksum(scales + 4 * step * i, 4, sum);
  return sum;
}

// The same for scales that follow the row, as in staging areas.
MOE_HD inline uint64_t wire_checksum(const CallShape& call, const char* row, uint64_t seed) {
  return wire_checksum(call, row, row + align16(call.row_bytes), 1, seed);
}

MOE_HD inline Status wrong_row(Phase phase, int source, int64_t token, uint64_t want, uint64_t got) {
  return {Code::corrupt, phase, source, static_cast<int32_t>(token), want, got};
}

// Keeps how many rows of each source this rank will receive. The count tables may be overwritten by the next
// call as soon as the rows of this one have arrived.
MOE_HD inline void keep_announced(const DispatchArgs& a, const int32_t* table, int source) {
  const BufferView& b = a.b;
  const int per_rank = b.experts_per_rank(), d = b.geometry.local();
  if (a.plan.call.layout == RowLayout::rank)
    a.plan.announced[source] = table[b.count.ranks + d];
  else
    for (int e = 0; e < per_rank; ++e)
      a.plan.announced[e * b.geometry.size + source] = table[b.count.experts + d * per_rank + e];
}

// Verifies rows [begin, end) of one channel as they arrived over the rail.
template <Group G>
MOE_HD Status rail_rows(G g, const DispatchArgs& a, const RowMeta* metas, const char* area, uint64_t stride,
                        int begin, int end, int source) {
  Status wrong;
  for (int i = begin + g.lane(); i < end && wrong.ok(); i += g.size()) {
    const RowMeta* meta = moved(metas, i * meta_bytes(a.b.shape.top_k));
    const char* row = area + i * stride;
    const uint64_t got =
        wire_checksum(a.plan.call, row, checksum_seed(a.consumed->dispatches, source, meta->token));
    if (got != meta->checksum) wrong = wrong_row(Phase::forward, source, meta->token, meta->checksum, got);
  }
  return first_failure(g, wrong);
}

// Verifies that the rows of a block are in the announced order of sources, and in token order for each
// source.
MOE_HD inline Status announced_rows(const DispatchArgs& a, const char* window, const BlockLayout& l) {
  const int64_t* source = l.source.in(window);
  const int size = a.b.geometry.size,
            segments = a.plan.call.layout == RowLayout::rank ? 1 : a.b.experts_per_rank();
  int64_t first = 0;
  for (int e = 0; e < segments; ++e) {
    int64_t row = first, before = -1;
    for (int s = 0; s < size; ++s) {
      const int64_t announced = a.plan.announced[e * size + s];
      for (int64_t found = 0; found < announced; ++found, ++row) {
        if (source[row] >> 32 != s || source[row] <= before)
          return wrong_row(Phase::counts, s, source[row] & 0xffffffff, announced, found);
        before = source[row];
      }
    }
    if (a.plan.call.layout == RowLayout::expert) first += a.plan.rows_per_expert[e];
  }
  return {};
}

// Verifies rows [begin, end) of a block of `rows` rows; none of them is padding. `wrong` keeps the first
// failure.
template <Group G>
MOE_HD void arrived_rows(G g, const DispatchArgs& a, const char* window, const BlockLayout& l, int64_t rows,
                         int64_t begin, int64_t end, Status& wrong) {
  const CallShape& call = a.plan.call;
  const int64_t* source = l.source.in(window);
  const uint64_t* sums = l.sums.in(window);
  for (int64_t r = begin + g.lane(); r < end && wrong.ok(); r += g.size()) {
    const int64_t token = source[r] & 0xffffffff;
    const int from = static_cast<int>(source[r] >> 32);
    const char* scales = l.scales.in(window) + r * (call.scales_by_column ? 4 : call.scale_bytes);
    const uint64_t got = wire_checksum(call, l.rows.in(window) + r * call.row_bytes, scales,
                                       call.scales_by_column ? scale_column(rows) : 1,
                                       checksum_seed(a.consumed->dispatches, from, token));
    if (got != sums[r]) wrong = wrong_row(Phase::arrive, from, token, sums[r], got);
  }
}

// Combine: writes checksums of the rows that this rank publishes.
template <Group G, Fabric<G> F>
MOE_HD void sign_rows(G g, F f, const CombineArgs& a) {
  const Geometry& geo = a.b.geometry;
  const uint64_t bytes = a.b.shape.combine_row_bytes();
  const char* rows = f.window(geo.local(), a.mine.rows);
  uint64_t* sums = f.window(geo.local(), a.mine.sums);
  for (int64_t r = g.lane(); r < a.plan.rank_rows[geo.local()]; r += g.size())
    sums[r] = row_checksum(rows + r * bytes, bytes, checksum_seed(a.consumed->combines, geo.rank, r));
}

// Verifies one published row before it is summed. `token`: the source's token that it belongs to.
template <LaneFabric F>
MOE_HD Status published_row(F f, const CombineArgs& a, Place p, Phase phase, int64_t token) {
  const uint64_t bytes = a.b.shape.combine_row_bytes();
  const RowsBoard& board = a.boards[p.local];
  const int rank = a.b.geometry.rank_at(a.b.geometry.node(), p.local);
  const uint64_t got = row_checksum(f.window(p.local, board.rows + p.row * bytes), bytes,
                                    checksum_seed(a.consumed->combines, rank, p.row));
  const uint64_t want = f.window(p.local, board.sums)[p.row];
  return want == got ? Status{} : wrong_row(phase, rank, token, want, got);
}

// Verifies the rows that this node contributes to row i of source node n, before they are summed.
template <Group G, Fabric<G> F>
MOE_HD Status published_rows(G g, F f, const CombineArgs& a, int n, int i, Phase phase) {
  const int64_t at = a.b.row_index(n, i);
  const Place* place = a.plan.place + at * a.b.shape.top_k;
  Status wrong;
  for (int j = g.lane(); j < a.plan.row_picks[at] && wrong.ok(); j += g.size())
    wrong = published_row(f, a, place[j], phase, a.plan.row_token[at]);
  return first_failure(g, wrong);
}

// The checksum of token t's row, as it was staged or as the caller has it; 0 if checks are off.
MOE_HD inline uint64_t source_checksum(const DispatchArgs& a, const char* staged, int t) {
  if (!a.b.check) return 0;
  const CallShape& call = a.plan.call;
  const uint64_t seed = checksum_seed(a.consumed->dispatches, a.b.geometry.rank, t);
  return staged ? wire_checksum(call, staged, seed)
                : wire_checksum(call, a.x + t * call.row_bytes, a.scales + t * call.scale_bytes, 1, seed);
}

}  // namespace moecomm::verify
