// Decode with all ranks: one lane or a team of lanes per rank, or many groups that divide its work into
// slices. Epochs of both parities follow without a pause, and every row is compared with the definition.
#include "decode_rounds.hpp"
#include "schedule/decode_slices.hpp"

using namespace world;

namespace {

struct HostBarrier {
  std::atomic<uint64_t>* count;
  uint64_t all;
  std::chrono::steady_clock::time_point deadline;

  template <class G>
  Status wait(G g) const {
    g.sync();
    return leader(g, [&] {
      const uint64_t before = count->fetch_add(1, std::memory_order_acq_rel);
      while (count->load(std::memory_order_acquire) < (before / all + 1) * all) {
        if (std::chrono::steady_clock::now() > deadline) return Status{Code::timeout};
        std::this_thread::yield();
      }
      return Status{};
    });
  }
};

// A rank with the schedule of the cuda world: many concurrent groups with a barrier. The rank keeps the epoch
// itself.
class ManyDecode {
 public:
  DecodeTurn turn(DecodeState&, int) { return {}; }
  Status send(DecodeState& me, const DecodeCase& c, const DecodeSendArgs& a, uint64_t ticket) {
    return dispatch(me, c, {a, memory(me, c), ticket, true, false});
  }
  Status receive(DecodeState& me, const DecodeCase& c, const DecodeReceiveArgs& a) {
    return dispatch(me, c, {make_decode_send_args(a.d, a.turn, {}), memory(me, c), 0, false, true});
  }
  Status answer(DecodeState& me, const DecodeCase& c, const DecodeCombineArgs& a, const Input& in,
                uint64_t ticket) {
    const DecodeCombineWork work{a,       memory(me, c), ticket, in.ids.data(), nullptr, in.weights.data(),
                                 nullptr, true,          false};
    if (a.turn.combine > 0)
      MOE_TRY(each_group(me, c, [&](auto g, auto f, HostBarrier barrier, int i) {
        return decode_release_group(g, f, barrier, work, i, c.groups);
      }));
    return combine(me, c, work);
  }
  Status sum(DecodeState& me, const DecodeCase& c, const DecodeCombineArgs& a, uint64_t ticket) {
    return combine(me, c, {a, memory(me, c), ticket, nullptr, nullptr, nullptr, nullptr, false, true});
  }

 private:
  DecodeMemory memory(DecodeState& me, const DecodeCase& c) {
    apart_.resize(decode_scratch_ints(me.view.geometry, me.view.shape, c.groups));
    return {&clock_, me.tables.data(), me.table_bytes, apart_.data()};
  }
  Status dispatch(DecodeState& me, const DecodeCase& c, const DecodeDispatchWork& work) {
    return each_group(me, c, [&](auto g, auto f, HostBarrier barrier, int i) {
      return decode_dispatch_group(g, f, barrier, work, i, c.groups);
    });
  }
  Status combine(DecodeState& me, const DecodeCase& c, const DecodeCombineWork& work) {
    return each_group(me, c, [&](auto g, auto f, HostBarrier barrier, int i) {
      return decode_combine_group(g, f, barrier, work, i, c.groups);
    });
  }
  template <class Role>
  Status each_group(DecodeState& me, const DecodeCase& c, Role&& role) {
    std::vector<HostState> own(c.groups, me.host);
    std::vector<Status> said(c.groups);
    {
      std::vector<std::jthread> groups;
      for (int i = 0; i < c.groups; ++i)
        groups.emplace_back([&, i] {
          const HostFabric<LoopbackRail> f{&own[i], &me.loopback};
          const HostBarrier barrier{&met_, static_cast<uint64_t>(c.groups), me.host.deadline};
          said[i] = execute(c.lanes, [&](auto g) { return role(g, f, barrier, i); });
        });
    }
    for (const Status& s : said)
      if (!s.ok()) return s;
    return {};
  }

  DecodeClock clock_{};
  std::atomic<uint64_t> met_{0};
  std::vector<int32_t> apart_;

 public:
  ManyDecode() = default;
  ManyDecode(const ManyDecode&) {}  // a copy has its initial state
};

const std::vector<DecodeCase> kCases = {
    {1, 1},
    {1, 3},
    {2, 2},
    {3, 1},
    {.weighted = true},
    {.check = true},
    {.quantized = true},
    {.wire = Wire::fp8},
    {.weighted = true, .wire = Wire::logfmt10},
    {.lanes = 3},
    {.nodes = 1, .per_node = 2, .lanes = 2},
    {.lanes = 2, .weighted = true, .check = true},
    {.lanes = 3, .quantized = true, .hidden = 160},
    {.overlap = true},
    {.combines = 3},
    {.weighted = true, .check = true, .combines = 2},
};

TEST_CASES(every_row_arrives_and_every_sum_is_right, kCases) {
  run_decode_case(value, std::vector<SoloDecode>(value.nodes * value.per_node));
}

const std::vector<DecodeCase> kShared = {
    {.groups = 1},
    {.groups = 3},
    {.nodes = 1, .per_node = 3, .groups = 9, .overlap = true},
    {.groups = 5, .overlap = true},
    {.groups = 3, .combines = 3},
    {.weighted = true, .check = true, .groups = 5, .combines = 2},
    {.weighted = true, .wire = Wire::fp8, .groups = 5},
    {.quantized = true, .wire = Wire::logfmt10, .groups = 13},
    {.lanes = 3, .groups = 2, .overlap = true},
    {.nodes = 1, .per_node = 2, .lanes = 32, .hidden = 160, .epochs = 3, .groups = 2},
};

TEST_CASES(groups_share_a_rank, kShared) {
  run_decode_case(value, std::vector<ManyDecode>(value.nodes * value.per_node));
}

// Replayed graphs of one and of three steps: every replay begins with another parity than the previous one,
// and the same bank is used twice in a row.
const std::vector<DecodeCase> kReplayed = {
    {.epochs = 303, .groups = 3, .captured = 3},
    {.nodes = 1, .per_node = 3, .epochs = 303, .groups = 2, .captured = 3, .overlap = true},
    {.nodes = 1, .per_node = 2, .epochs = 101, .groups = 2, .captured = 1},
    {.weighted = true, .epochs = 101, .groups = 2, .captured = 3},
};

TEST_CASES(a_captured_graph_is_replayed, kReplayed) {
  run_decode_case(value, std::vector<ManyDecode>(value.nodes * value.per_node));
}

// A call that violates a rule is refused before anything moves.
TEST(wrong_stage) {
  DecodeClock clock{};
  const auto needs = [&](uint64_t epoch, int bank) { return detail::check_turns(clock, epoch, bank); };
  CHECK(needs(1, 1).ok());
  clock = {1, {{}, {7, DecodeStage::sent, 1}}};
  CHECK_EQ(needs(2, 0).code, Code::invalid);  // (A)
  clock.turn[1].stage = DecodeStage::received;
  CHECK(needs(2, 0).ok() && needs(2, 1).ok());
  clock.turn[1].stage = DecodeStage::answered;
  CHECK(needs(2, 0).ok());
  CHECK_EQ(needs(2, 1).detail, number(BadInput::wrong_stage));  // (C)
  clock = {2, {{8, DecodeStage::received, 0}, {7, DecodeStage::answered, 1}}};
  CHECK_EQ(needs(3, 1).expected, static_cast<uint64_t>(DecodeStage::done));  // (B)
}

TEST(layouts_hold_what_they_say) {
  for (int size : {1, 4, 320}) {
    const Geometry g{0, size, size > 4 ? 8 : 2 > size ? 1 : 2};
    const Shape s{.hidden = 7168, .dtype = DType::bf16, .num_experts = size, .top_k = 1, .max_tokens = 32};
    const DecodeView d = make_decode_view(g, s, false);
    CHECK(d.message(1, s.max_tokens - 1).value + decode_message_bytes(s) <= d.window.sums);
    CHECK(d.sum(1, s.max_tokens - 1, 0) + s.combine_row_bytes() <= d.window.x);
    CHECK(d.x(1) + d.packed_rows() * s.combine_row_bytes() <= d.window.scales);
    CHECK(d.scales(1, d.experts_per_rank() - 1) + decode_scale_area(g, s) <= d.window.rows);
    CHECK(d.rows(1) + d.packed_rows() * s.combine_row_bytes() <= d.window.coded);
    if (size > 1 && g.nodes() > 1) {
      CHECK(d.landed(1, size - 1, 0, s.max_tokens - 1).value + decode_message_bytes(s) <= d.region.answers);
      CHECK(d.answer(1, s.max_tokens - 1, 0) + s.slot_bytes() <= d.region.bytes);
      CHECK(d.coded(1, size - 1, s.max_tokens - 1, decode_picks_per_rank(g, s) - 1) + s.slot_bytes() <=
            d.window.bytes);
    }
  }
}

TEST(flags_grow_and_carry_their_count) {
  CHECK(make_flag(7, 7, kDecodeMaxTokens) < make_flag(8, 0, 0));
  CHECK_EQ(flag_count(make_flag(123456789, 5, kDecodeMaxTokens)), kDecodeMaxTokens);
  CHECK_EQ(flag_mode(make_flag(123456789, 5, 77)), 5);
}

}  // namespace
