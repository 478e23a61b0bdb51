// Calls that are not the same on all ranks: a number that is not that of the others, a verb that is not
// theirs. Every rank of a world of one rank per node finds it by the words of its peers, before any row is
// taken for another call's.
#include "rounds.hpp"

using namespace world;

namespace {

Shape small() {
  Shape s{.hidden = 16, .dtype = DType::bf16, .num_experts = 6, .top_k = 2, .max_tokens = 4, .channels = 2};
  s.arena_bytes = 1 << 16;
  return s;
}

// A call with no tokens by rank r, given to run(args).
template <class Run>
Status of_nothing(World& w, int r, Run run) {
  RankState& me = w.rank(r);
  Plan plan(me.view);
  Verdict verdict{};
  const int64_t none = 0;
  DispatchArgs a;
  a.b = me.view;
  plan.view.tokens = 0;
  plan.view.call.row_bytes = me.view.shape.combine_row_bytes();
  a.plan = plan.view;
  a.book = &me.book;
  a.ids64 = &none;
  a.base = plan.base.data();
  a.offers = plan.offers.data();
  a.target = plan.target.data();
  a.first = plan.first.data();
  a.needed = plan.needed.data();
  a.verdict = &verdict;
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
  CombineArgs a;
  a.b = me.view;
  a.book = &me.book;
  a.boards = boards.data();
  a.mine = {};
  a.refused = Why::error;
  me.begin();
  return run_combine(Lane{}, me.fabric(), a);
}

}  // namespace

TEST(a_number_that_is_not_the_others) {
  World w(3, 1, small(), false);
  w.each([&](int r) {
    CHECK_EQ(dispatch_nothing(w, r).code, Code::ok);
    if (r == 1) {  // has counted a call that the others have not made, and announces the one after it
      ++w.rank(r).book.enter;
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
