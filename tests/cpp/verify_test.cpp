// MOECOMM_CHECK=1 at the receiver: rows are compared with the announced counts. (Tests in Python cover
// damaged rows.)
#include "protocol/verify.hpp"
#include "check.hpp"
#include "exec/lane.hpp"
#include "runtime/plan.hpp"

using namespace moecomm;

namespace {

constexpr uint64_t kEpoch = 9;

// Rank 1 of 2 with two experts: expert 0 has two rows of rank 0, one of rank 1, and a padding row; expert 1
// has one row of rank 1.
struct Received {
  Received() {
    for (int s = 0; s < 2; ++s) {
      plan.view.announced[0 * 2 + s] = s == 0 ? 2 : 1;
      plan.view.announced[1 * 2 + s] = s;
    }
    plan.view.rows_per_expert[0] = 4;
    plan.view.rows_per_expert[1] = 1;
    const int64_t sources[5] = {0, 4, int64_t{1} << 32 | 3, -1, int64_t{1} << 32 | 2};
    for (int r = 0; r < 5; ++r) put(r, sources[r], kEpoch);
    consumed.dispatches = kEpoch;
  }
  void put(int row, int64_t source, uint64_t epoch) {
    for (int i = 0; i < 16; ++i) block[layout.rows + 16 * row + i] = static_cast<char>(source * 7 + i);
    layout.source.in(block.data())[row] = source;
    layout.sums.in(block.data())[row] =
        row_checksum(block.data() + layout.rows + 16 * row, 16,
                     checksum_seed(epoch, static_cast<int>(source >> 32), source & 0xffffffff));
  }
  // Like the receiver: first all places, then the rows without the padding.
  Status verify() {
    const DispatchArgs args = make_dispatch_args(view, plan.view, &consumed, plan.scratch(), {}, nullptr);
    Status wrong = verify::announced_rows(args, block.data(), layout);
    verify::arrived_rows(Lane{}, args, block.data(), layout, 5, 0, 3, wrong);
    verify::arrived_rows(Lane{}, args, block.data(), layout, 5, 4, 5, wrong);
    return wrong;
  }

  BufferView view =
      make_view({1, 2, 2}, Shape{.hidden = 8, .num_experts = 4, .top_k = 2, .max_tokens = 8}, true);
  Plan plan{view};
  CallShape call = plan.view.call = CallShape{.alignment = 4, .row_bytes = 16};
  BlockLayout layout = block_layout(5, call, 2);
  std::vector<char> block = std::vector<char>(layout.bytes);
  Consumed consumed;
};

}  // namespace

TEST(sound_rows_pass) { CHECK(Received().verify().ok()); }

TEST(a_row_of_another_source_in_its_place) {
  Received r;
  r.put(1, int64_t{1} << 32 | 1, kEpoch);  // the second row of rank 0 is missing
  const Status s = r.verify();
  CHECK_EQ(s.code, Code::corrupt);
  CHECK_EQ(s.phase, Phase::counts);
  CHECK_EQ(s.peer, 0);
  CHECK_EQ(s.expected, 2u);
  CHECK_EQ(s.got, 1u);
}

TEST(the_same_row_twice) {
  Received r;
  r.put(1, 0, kEpoch);
  const Status s = r.verify();
  CHECK_EQ(s.phase, Phase::counts);
  CHECK_EQ(s.detail, 0);
}

TEST(a_row_of_an_earlier_call) {
  Received r;
  r.put(4, int64_t{1} << 32 | 2, kEpoch - 1);  // of an earlier epoch; its checksum is correct
  const Status s = r.verify();
  CHECK_EQ(s.code, Code::corrupt);
  CHECK_EQ(s.phase, Phase::arrive);
  CHECK_EQ(s.peer, 1);
  CHECK_EQ(s.detail, 2);
}

TEST(every_byte_counts) {
  for (uint64_t bytes : {1, 4, 8, 13, 64}) {
    std::vector<char> row(bytes, 3);
    const uint64_t sum = row_checksum(row.data(), bytes, 5);
    CHECK(sum != row_checksum(row.data(), bytes, 6));
    for (char& c : row) {
      c ^= 1;
      CHECK(sum != row_checksum(row.data(), bytes, 5));
      c ^= 1;
    }
    CHECK_EQ(sum, row_checksum(row.data(), bytes, 5));
  }
}

TEST(fault_words_keep_what_they_carry) {
  const Status s{.code = Code::corrupt, .peer = 65000, .detail = (1 << 24) - 1};
  const Status back = unpack_fault(pack_fault(s, 1023));
  CHECK_EQ(back.code, s.code);
  CHECK_EQ(back.peer, s.peer);
  CHECK_EQ(back.detail, s.detail);
  CHECK_EQ(back.reporter, 1023);
  CHECK_EQ(unpack_fault(pack_fault({.code = Code::timeout}, 0)).peer, -1);
}
