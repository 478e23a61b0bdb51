// The session: every sequence of decode calls is compared with a simple record of its events, and no field of
// an argument structure is left out.
#include "check.hpp"
#include "session/arguments.hpp"
#include "session/decode_arguments.hpp"
#include "session/turns.hpp"

using namespace moecomm;

namespace {

// A structure cannot be constructed without its fields. A constructor cannot leave one out either, because
// all fields of a constant must be initialized.
static_assert(!std::is_default_constructible_v<DispatchArgs> && !std::is_aggregate_v<DispatchArgs>);
static_assert(!std::is_default_constructible_v<CombineArgs> && !std::is_aggregate_v<CombineArgs>);
static_assert(!std::is_default_constructible_v<DecodeSendArgs> && !std::is_aggregate_v<DecodeSendArgs>);
static_assert(!std::is_default_constructible_v<DecodeReceiveArgs> && !std::is_aggregate_v<DecodeReceiveArgs>);
static_assert(!std::is_default_constructible_v<DecodeCombineArgs> && !std::is_aggregate_v<DecodeCombineArgs>);
constexpr DispatchCall kCall;
constexpr DispatchArgs kDispatch = make_dispatch_args({}, {}, nullptr, {}, kCall, nullptr);
constexpr DispatchArgs kExchange = make_exchange_args({}, nullptr, {}, Why::picks, nullptr);
constexpr CombineArgs kCombine = make_combine_args({}, {}, nullptr, nullptr, {}, {});
constexpr CombineArgs kRefused = make_refused_combine_args({}, nullptr, nullptr, Why::error);
constexpr DecodeSendArgs kSend = make_decode_send_args({}, {}, kCall);
constexpr DecodeReceiveArgs kReceive = make_decode_receive_args({}, {});
constexpr DecodeCombineArgs kAnswer = make_decode_combine_args({}, {}, {}, nullptr);
// Arguments of kernels are copied as bytes.
static_assert(std::is_trivially_copyable_v<DispatchArgs> && std::is_trivially_copyable_v<CombineArgs> &&
              std::is_trivially_copyable_v<DecodeSendArgs> &&
              std::is_trivially_copyable_v<DecodeCombineArgs>);

// Every field of a call is copied to the right field of the arguments.
TEST(arguments_are_those_of_the_call) {
  char x[16], scales[16];
  int64_t ids64[1];
  int32_t ids32[1], ints[3];
  float weights[1];
  Consumed consumed;
  Offer offers[1];
  BlockLayout target[1];
  uint64_t needed[1];
  Verdict verdict[1];
  DispatchCall call;
  call.x = x;
  call.scales = scales;
  call.ids64 = ids64;
  call.ids32 = ids32;
  call.weights = weights;
  call.tokens = 5;
  call.refused = Why::error;
  call.cached = true;
  const DispatchScratch scratch{ints, ints + 1, offers, target, needed, verdict};
  const DispatchArgs a = make_dispatch_args({}, {}, &consumed, scratch, call, ints + 2);
  CHECK(a.consumed == &consumed && a.cached && !a.alone && a.refused == Why::error);
  CHECK(a.ids64 == ids64 && a.ids32 == ids32 && a.x == x && a.scales == scales && a.weights == weights);
  CHECK(a.base == ints && a.first == ints + 1 && a.logical_blocks == ints + 2);
  CHECK(a.offers == offers && a.target == target && a.needed == needed && a.verdict == verdict);
  const DecodeSendArgs send = make_decode_send_args({}, {}, call);
  CHECK(send.ids64 == ids64 && send.ids32 == ids32 && send.x == x && send.scales == scales);
  CHECK(send.weights == weights && send.refused == Why::error);

  CombineCall combine;
  RowsBoard boards[1];
  combine.y = x;
  combine.returned = weights;
  combine.bias = weights + 1;
  combine.bias_stride = 7;
  combine.wire = Wire::fp8;
  const RowsBoard board = make_board({1}, {2}, {3}, {4});
  const CombineArgs b = make_combine_args({}, {}, &consumed, boards, board, combine);
  CHECK(b.consumed == &consumed && b.boards == boards && b.y == x && b.returned == weights &&
        b.bias == weights + 1);
  CHECK(b.bias_stride == 7 && b.wire == Wire::fp8 && b.refused == Why::none);
  CHECK(b.mine.rows.value == 1 && b.mine.weights.value == 2 && b.mine.back.value == 3 &&
        b.mine.sums.value == 4);
  CHECK(kRefused.refused == Why::error && kExchange.refused == Why::picks);
}

TEST(a_reused_plan_keeps_its_tokens) {
  PlanView plan;
  DispatchCall call;
  call.tokens = 9;
  call.shape = {.layout = RowLayout::rank, .alignment = 4, .row_bytes = 32};
  open_plan(plan, call);
  CHECK(plan.tokens == 9 && plan.call.signature() == call.shape.signature());
  DispatchCall again;
  again.cached = true;
  again.shape = {.row_bytes = 16, .scale_bytes = 4, .scales = ScaleKind::f32, .scales_by_column = true};
  open_plan(plan, again);
  CHECK(plan.tokens == 9 && plan.call.layout == RowLayout::rank && plan.call.alignment == 4);
  CHECK(plan.call.row_bytes == 16 && plan.call.scale_bytes == 4 && plan.call.scales_by_column);
  again.refused = Why::arguments;
  open_plan(plan, again);
  CHECK(plan.tokens == 0 && plan.call.row_bytes == 0);
}

TEST(a_turn_says_what_the_call_is) {
  const DecodeView d =
      make_decode_view({0, 2, 2}, {.hidden = 256, .num_experts = 4, .top_k = 2, .max_tokens = 8}, false);
  DecodeTurn t;
  DecodeDispatchCall call;
  call.tokens = 3;
  call.weighted = true;
  open_turn(t, d, 7, call);
  CHECK(t.epoch == 7 && t.bank == 1 && t.tokens == 3 && t.weighted && t.mode == 4);
  CHECK(t.call.row_bytes == 512 && t.call.scale_bytes == 0);
  call.quant = ScaleKind::f32;
  open_turn(t, d, 8, call);
  CHECK(t.bank == 0 && t.mode == 5 && t.call.row_bytes == 256 && t.call.scale_bytes == 8);
  DecodeCombineCall combine;
  combine.wire = Wire::logfmt10;
  CHECK_EQ(make_decode_answer(t, combine).mode, 6);
  call.refused = Why::picks;
  open_turn(t, d, 9, call);
  CHECK(t.refused() && t.tokens == 0);
}

// The events of an epoch, in the order of the calls. Unlike the two turns, they are never overwritten.
struct Happened {
  bool sent = false, received = false, failed = false, refused = false, ended = false;
  int answered = 0, summed = 0;  // combines

  DecodeStage stage() const {
    if (!sent || failed) return DecodeStage::idle;
    if (refused && received) return DecodeStage::over;
    if (answered > summed) return DecodeStage::answered;
    if (ended) return DecodeStage::over;
    if (summed) return DecodeStage::done;
    return received ? DecodeStage::received : DecodeStage::sent;
  }
};

constexpr int kSteps = 9;

enum class Step {
  dispatch,
  refuse,
  receive,
  receive_badly,
  combine,
  sum,
  combine_earlier,
  sum_earlier,
  refuse_combine,
  sum_badly,
  count
};

// A rank that runs phases like the cpu and sim worlds, with the state machine and with the record.
struct Rank {
  DecodeTurns turns;
  Happened epochs[kSteps + 1];
  int phases[2] = {};  // the phases that the rules ran in the latest dispatch: receives, sums

  void receive(uint64_t e, bool ok) {
    turns.received(e, ok, epochs[e].refused);
    epochs[e].received = true;
    epochs[e].failed = !ok;
  }
  void sum(uint64_t e, bool ok) {
    turns.summed(e, ok);
    ++epochs[e].summed;
    epochs[e].ended |= !ok;
  }

  bool take(Step step) {  // false: the call changes nothing
    const uint64_t last = turns.latest(), earlier = last - 1;
    switch (step) {
      case Step::dispatch: return dispatch(false);
      case Step::refuse: return dispatch(true);
      case Step::receive: return hook(last, true);
      case Step::receive_badly: return hook(last, false);
      case Step::combine: return combine(last, false);
      case Step::sum: return sum_hook(last, true);
      case Step::combine_earlier: return last > 1 && combine(earlier, false);
      case Step::sum_earlier: return last > 1 && sum_hook(earlier, true);
      case Step::refuse_combine: return combine(last, true);
      case Step::sum_badly: return sum_hook(last, false);
      default: return false;
    }
  }

  bool dispatch(bool refused) {
    const uint64_t e = turns.next();
    const Happened *last = e > 1 ? &epochs[e - 1] : nullptr, *before = e > 2 ? &epochs[e - 2] : nullptr;
    const bool must_receive = last && last->stage() == DecodeStage::sent,
               must_sum = before && before->stage() == DecodeStage::answered;
    phases[0] = phases[1] = 0;
    const Status s = turns.before_dispatch(
        [&](uint64_t of) {
          CHECK_EQ(of, e - 1);
          CHECK_EQ(phases[1], 0);  // receive comes before sum
          ++phases[0];
          receive(of, true);
          return Status{};
        },
        [&](uint64_t of) {
          CHECK_EQ(of, e - 2);
          ++phases[1];
          sum(of, true);
          return Status{};
        });
    CHECK(s.ok());
    CHECK_EQ(phases[0], int(must_receive));  // exactly what the rules require
    CHECK_EQ(phases[1], int(must_sum));
    turns.open();
    CHECK_EQ(turns.stage(e), DecodeStage::idle);
    turns.sent();
    epochs[e].sent = true;
    epochs[e].refused = refused;
    return true;
  }
  bool hook(uint64_t e, bool ok) {
    if (turns.stage(e) != DecodeStage::sent) return false;
    receive(e, ok);
    return true;
  }
  bool combine(uint64_t e, bool refused) {
    if (!can_combine(turns.stage(e))) return false;
    CHECK_EQ(turns.combines(e), epochs[e].answered);
    turns.answered(e, refused);
    ++epochs[e].answered;
    epochs[e].ended |= refused;
    return true;
  }
  bool sum_hook(uint64_t e, bool ok) {
    if (turns.stage(e) != DecodeStage::answered) return false;
    sum(e, ok);
    return true;
  }

  void hold_against_the_record() const {
    const uint64_t last = turns.latest();
    for (uint64_t e = 1; e <= last; ++e)
      CHECK_EQ(turns.stage(e), e + 2 > last ? epochs[e].stage() : DecodeStage::idle);
    CHECK_EQ(turns.stage(last + 1), DecodeStage::idle);
    // (A) and (B), by the words of protocol/decode.hpp.
    for (uint64_t e = 2; e <= last; ++e) CHECK(epochs[e - 1].received);
    for (uint64_t e = 3; e <= last; ++e) CHECK_EQ(epochs[e - 2].answered, epochs[e - 2].summed);
  }
};

uint64_t walk(const Rank& rank, int left) {
  uint64_t sequences = 1;
  for (int s = 0; s < static_cast<int>(Step::count) && left > 0 && check::failures() == 0; ++s) {
    Rank next = rank;
    if (!next.take(static_cast<Step>(s))) continue;  // equivalent to a shorter sequence
    next.hold_against_the_record();
    sequences += walk(next, left - 1);
  }
  return sequences;
}

TEST(every_sequence_of_nine_calls) {
  const uint64_t sequences = walk(Rank{}, kSteps);
  CHECK(sequences > 100'000);
}

TEST(a_failed_phase_ends_the_dispatch) {
  DecodeTurns turns;
  const auto never = [](uint64_t) { return Status{Code::corrupt}; };
  turns.open();
  turns.sent();
  const Status lost = turns.before_dispatch([](uint64_t) { return Status{Code::lost}; }, never);
  CHECK_EQ(lost.code, Code::lost);
  CHECK_EQ(turns.latest(), 1u);
  CHECK_EQ(turns.stage(1), DecodeStage::sent);  // the phase did not report
}

TEST(the_combines_of_an_epoch_have_an_end) {
  DecodeTurns turns;
  turns.open();
  turns.sent();
  turns.received(1, true, false);
  while (can_combine(turns.stage(1))) {
    turns.answered(1, false);
    turns.summed(1, true);
  }
  CHECK_EQ(turns.combines(1), kMostCombines);
  CHECK(make_answer_flag(1, kMostCombines - 1, kRefusedMode, Why::grow) < make_flag(2, 0, 0));
  for (int combine : {0, 1, kMostCombines - 2}) {
    const uint64_t flag = make_answer_flag(77, combine, 6, Why::grow);
    CHECK_EQ(answer_mode(flag), 6);
    CHECK_EQ(answer_refusal(flag), int(Why::grow));
    CHECK(flag < make_answer_flag(77, combine + 1, 0, Why::none));
  }
}

TEST(findings_keep_step) {
  for (Code code : {Code::mismatch, Code::refused, Code::capacity}) CHECK(in_step({code}).ok());
  for (Code code : {Code::timeout, Code::lost, Code::corrupt, Code::out_of_step, Code::interrupted})
    CHECK_EQ(in_step({code}).code, code);
  CHECK_EQ(in_step(wrong_stage(DecodeStage::received, DecodeStage::sent)).code, Code::invalid);
}

TEST(turns_do_not_cross_a_capture) {
  DecodeTurns turns;
  const auto dispatch = [&](uint64_t capture) {
    MOE_TRY(turns.enter(capture));
    turns.open(capture);
    turns.sent();
    return Status{};
  };
  CHECK(dispatch(0).ok());
  // An epoch that was opened before the capture: neither its receipt nor its sum can be part of the graph.
  Status s = dispatch(7);
  CHECK_EQ(s.detail, number(BadInput::wrong_stage));
  CHECK_EQ(s.expected, uint64_t(DecodeStage::received));
  turns.received(1, true, false);
  turns.answered(1, false);
  s = dispatch(7);
  CHECK_EQ(s.expected, uint64_t(DecodeStage::done));
  turns.summed(1, true);
  CHECK(dispatch(7).ok());
  CHECK_EQ(turns.stage(2, 7), DecodeStage::sent);
  CHECK_EQ(turns.stage(2), DecodeStage::idle);  // a handle of the capture, outside
  CHECK_EQ(turns.stage(1, 7), DecodeStage::idle);
  CHECK(dispatch(0).ok());  // epochs that the graph left open are dropped
  CHECK_EQ(turns.stage(2, 7), DecodeStage::idle);
  turns.drop();
  CHECK_EQ(turns.stage(3), DecodeStage::idle);
}

// A rule that is left out is detected. Exploration's mutants leave out rules in this way.
struct Without {
  Rule rule;
  bool keeps(Rule r) const { return r != rule; }
};

TEST(rules_can_be_left_out) {
  for (Rule rule : {Rule::receive_last, Rule::sum_before, Rule::count_by_ones}) {
    DecodeTurns turns;
    int received = 0, summed = 0;
    const auto dispatch = [&] {
      CHECK(turns
                .before_dispatch(
                    [&](uint64_t e) {
                      ++received;
                      turns.received(e, true, false);
                      return Status{};
                    },
                    [&](uint64_t e) {
                      ++summed;
                      turns.summed(e, true);
                      return Status{};
                    },
                    Without{rule})
                .ok());
      turns.open();
      turns.sent();
    };
    dispatch();
    turns.received(1, true, false);
    turns.answered(1, false);
    dispatch();
    dispatch();
    CHECK_EQ(received, rule == Rule::sum_before);
    CHECK_EQ(summed, rule != Rule::sum_before);
  }
}

}  // namespace
