// Ranks make different calls: another number, or another verb. With one rank per node, every rank detects it
// by the call words of its peers, before a row is used in the wrong call.
#include "rounds.hpp"

using namespace world;

namespace {

Shape small() {
  Shape s{.hidden = 16, .dtype = DType::bf16, .num_experts = 6, .top_k = 2, .max_tokens = 4, .channels = 2};
  s.arena_bytes = 1 << 16;
  return s;
}

// Passes the arguments of a call of rank r without tokens to run(args).
template <class Run>
Status of_nothing(World& w, int r, Run run) {
  RankState& me = w.rank(r);
  Plan plan(me.view);
  const int64_t none = 0;
  DispatchCall call;
  call.ids64 = &none;
  call.shape.row_bytes = me.view.shape.combine_row_bytes();
  open_plan(plan.view, call);
  const DispatchArgs a = make_dispatch_args(me.view, plan.view, &me.consumed, plan.scratch(), call, nullptr);
  me.begin();
  return run(a);
}

Status dispatch_nothing(World& w, int r) {
  return of_nothing(w, r, [&](const DispatchArgs& a) {
    return run_dispatch(Lane{}, w.rank(r).fabric(), a, w.rank(r).arena.offer());
  });
}

Status refused_combine(World& w, int r) {
  RankState& me = w.rank(r);
  std::vector<RowsBoard> boards(me.view.geometry.ranks_per_node);
  const CombineArgs a = make_refused_combine_args(me.view, &me.consumed, boards.data(), Why::error);
  me.begin();
  return run_combine(Lane{}, me.fabric(), a);
}

}  // namespace

TEST(a_number_that_is_not_the_others) {
  World w(3, 1, small(), false);
  w.each([&](int r) {
    CHECK_EQ(dispatch_nothing(w, r).code, Code::ok);
    if (r == 1) {  // it has counted a call that the others have not made, and announces the next one
      ++w.rank(r).consumed.enter;
      of_nothing(w, r, [&](const DispatchArgs& a) {
        count_picks(Lane{}, a);
        announce(Lane{}, w.rank(r).fabric(), a, Why::none);
        return Status{};
      });
      return;
    }
    const Status s = dispatch_nothing(w, r);
    CHECK_EQ(s.code, Code::out_of_step);
    CHECK_EQ(s.peer, 1);
    CHECK(is_final(s));
  });
}

TEST(a_verb_that_is_not_the_others) {
  World w(2, 1, small(), false);
  w.each([&](int r) {
    CHECK_EQ(dispatch_nothing(w, r).code, Code::ok);
    const Status s = r ? dispatch_nothing(w, r) : refused_combine(w, r);
    CHECK_EQ(s.code, Code::out_of_step);
    CHECK_EQ(s.peer, 1 - r);
  });
}

TEST(a_refused_combine_is_every_ranks) {
  World w(2, 2, small(), false);
  w.each([&](int r) {
    for (int round = 0; round < 3; ++round) {
      const Status s = refused_combine(w, r);
      CHECK_EQ(s.code, Code::refused);
      CHECK_EQ(s.peer, 0);
      CHECK_EQ(s.detail, int(Why::error));
      CHECK_EQ(dispatch_nothing(w, r).code, Code::ok);
    }
  });
}
