// Test cases with all ranks, and what one rank does in a round. There are several rounds without a pause
// between them, and every byte is compared with the oracle in world.hpp.
#pragma once
#include "check.hpp"
#include "concurrent.hpp"
#include "session/arguments.hpp"
#include "world.hpp"

namespace world {

struct Case {
  int nodes = 2, per_node = 2, lanes = 0;
  RowLayout layout = RowLayout::expert;
  int alignment = 1;
  int spare = -1;  // with a capacity: spare rows beyond those of the fullest rank; -1: no capacity
  int top_k = 3, experts_per_rank = 3, channels = 2, hidden = 40;
  DType type = DType::bf16;
  bool quantized = false, check = false, weights = true;
  ScaleKind fused = ScaleKind::none;  // dispatch quantizes the rows
  bool by_column = false;             // layout of their scales at the receiver
  Wire wire = Wire::plain;            // of combine, on two of three ranks
  int skew = 0;                       // 1: all tokens to one expert, 2: odd ranks are empty
  int rounds = 3;
  int chunk_rows = 16, stages = 3;
  int workers = 0, senders = 0;  // concurrent groups per rank besides a coordinator; 0: one group
  int chosen = 0;  // ids depend on the picks of all ranks. 1: what other ranks send follows from these; 2: it
                   // needs another exchange
};

inline bool has_codes(const Case& c) { return c.quantized || c.fused != ScaleKind::none; }
inline uint64_t scale_bytes(const Case& c) {
  return 4 * scale_words(c.hidden, c.quantized ? ScaleKind::f32 : c.fused);
}
inline Wire wire_of(const Case& c, int rank) { return rank % 3 == 2 ? Wire::plain : c.wire; }

inline void fill_arriving(const Case& c, Input& in) {
  in.arriving = in.x;
  in.arriving_scales = in.scales;
  if (c.fused == ScaleKind::none) return;
  in.arriving.assign(in.tokens * c.hidden, 0);
  in.arriving_scales.assign(in.tokens * scale_bytes(c), 0);
  for (int t = 0; t < in.tokens; ++t)
    for (int at = 0; at < c.hidden; at += kTile) {
      float v[kTile];
      const int n = std::min<int>(kTile, c.hidden - at), tile = at / kTile;
      for (int i = 0; i < n; ++i)
        v[i] = load(in.x.data() + int64_t{t} * c.hidden * element_bytes(c.type), at + i, c.type);
      const float scale = scalar_fp8(
          v, n, c.fused, reinterpret_cast<uint8_t*>(in.arriving.data()) + int64_t{t} * c.hidden + at);
      char* scales = in.arriving_scales.data() + t * scale_bytes(c);
      if (c.fused == ScaleKind::ue8m0)
        scales[tile] = static_cast<char>(ue8m0_encode(scale));
      else
        std::memcpy(scales + 4 * tile, &scale, 4);
    }
}

inline std::vector<Input> make_inputs(const Case& c, int max_tokens, uint64_t seed) {
  std::mt19937_64 random(seed);
  const int size = c.nodes * c.per_node, experts = size * c.experts_per_rank;
  std::vector<Input> all(size);
  for (int r = 0; r < size; ++r) {
    Input& in = all[r];
    in.tokens = c.skew == 2 && r % 2 ? 0 : static_cast<int>(random() % (max_tokens + 1));
    for (int t = 0; t < in.tokens; ++t) {
      std::vector<int64_t> ids(experts);
      for (int e = 0; e < experts; ++e) ids[e] = e;
      std::shuffle(ids.begin(), ids.end(), random);
      for (int k = 0; k < c.top_k; ++k) {
        const bool masked = k >= experts || random() % 5 == 0;
        in.ids.push_back(c.skew == 1 ? (k == t % c.top_k ? experts - 1 : -1) : masked ? -1 : ids[k]);
        in.weights.push_back(value_of(seed, r * 1000 + t, k));
      }
    }
    const int64_t row_bytes = c.quantized ? c.hidden : c.hidden * element_bytes(c.type);
    in.x.resize(in.tokens * row_bytes);
    for (char& b : in.x) b = static_cast<char>(random());
    if (c.quantized) {
      in.scales.resize(in.tokens * ((c.hidden + 127) / 128 * 4));
      for (char& b : in.scales) b = static_cast<char>(random());
    }
    fill_arriving(c, in);
  }
  return all;
}

// The number of picks of every id by one source.
inline std::vector<int32_t> picks_by(const Input& in, int experts) {
  std::vector<int32_t> picks(experts, 0);
  for (const int64_t id : in.ids)
    if (id >= 0) ++picks[id];
  return picks;
}

// Stands in for a choice of replicas: compares the counts of the exchange with the inputs, and then sets the
// ids.
struct ReplicaChooser {
  const std::vector<Input>& in;
  const Geometry& geometry;
  int experts;
  bool rows_follow;
  std::vector<int64_t>& ids;  // out; random before
  int rank;

  template <class Picks>
  void choose(Picks picks_of) {
    for (int s = 0; s < static_cast<int>(in.size()); ++s) {
      const std::vector<int32_t> want = picks_by(in[s], experts);
      CHECK(std::equal(want.begin(), want.end(), picks_of(s)));
    }
    std::copy(in[rank].ids.begin(), in[rank].ids.end(), ids.begin());
  }
  void rows_to(int source, int32_t* rows) const {
    const std::vector<int32_t> picks = picks_by(in[source], experts);
    const int per_node = experts / geometry.nodes();
    std::copy_n(picks.begin() + geometry.node() * per_node, per_node, rows);
  }
};

// One round of one rank, on the rank's thread.
template <class Runner>
void one_round(World& w, Runner& runner, const Case& c, const Shape& shape, int r, int round,
               const std::vector<Input>& in, Plan& plan) {
  RankState& me = w.rank(r);
  const Geometry& g = me.host.geometry;
  const bool cached =
      round == c.rounds - 1 && round > 0;  // the last round reuses the plan of the previous one
  std::vector<Expected> expected;
  int64_t most = 0;
  for (int d = 0; d < w.size(); ++d) {
    expected.push_back(expected_rows(in, d, c.experts_per_rank, c.top_k, c.layout, c.alignment));
    most = std::max<int64_t>(most, expected[d].rows.size());
  }
  DispatchCall asked;
  asked.cached = cached;
  asked.tokens = in[r].tokens;
  asked.ids64 = in[r].ids.data();
  asked.x = in[r].x.data();
  asked.scales = c.quantized ? in[r].scales.data() : nullptr;
  asked.weights = c.weights ? in[r].weights.data() : nullptr;
  asked.shape = CallShape{.layout = c.layout,
                          .alignment = c.alignment,
                          .capacity = c.spare < 0 ? -1 : most + c.spare,
                          .row_bytes = has_codes(c) ? uint64_t(c.hidden) : shape.combine_row_bytes(),
                          .scale_bytes = scale_bytes(c),
                          .scales = c.quantized ? ScaleKind::f32 : c.fused,
                          .scales_by_column = c.by_column};
  open_plan(plan.view, asked);
  const DispatchArgs a = make_dispatch_args(me.view, plan.view, &me.consumed, plan.scratch(), asked, nullptr);
  std::memset(me.window.data.get() + me.view.node.arena, 0xee,
              shape.arena_bytes);  // no part is held
  me.begin();
  const Offer offer = me.arena.offer();
  std::vector<int32_t> channel_counts(c.channels * c.nodes * me.view.count.ints);
  const DispatchWork work{a, offer, channel_counts.data()};
  std::vector<int64_t> slots(in[r].ids.size(), 1 << 20);
  std::vector<int32_t> picks;
  const auto choosing = [&] {
    const std::vector<int32_t> mine = picks_by(in[r], shape.num_experts);
    picks.assign(c.nodes * me.view.count.ints, 0);
    for (int n = 0; n < c.nodes; ++n)
      std::copy(mine.begin(), mine.end(), picks.begin() + n * me.view.count.ints + me.view.count.picks);
    DispatchCall made = asked;
    made.ids64 = slots.data();
    const DispatchArgs by_choice =
        make_dispatch_args(me.view, plan.view, &me.consumed, plan.scratch(), made, picks.data());
    ReplicaChooser chooser{in, g, shape.num_experts, c.chosen == 1, slots, r};
    if (round % 2) {  // also an exchange without a dispatch
      const Status alone = execute(c.lanes, [&](auto group) {
        return run_exchange(group, me.fabric(), by_choice, [&](auto picks_of) {
          if (group.lane() == 0) chooser.choose(picks_of);
        });
      });
      CHECK_EQ(alone.code, Code::ok);
      std::fill(slots.begin(), slots.end(), 1 << 20);
    }
    return execute(c.lanes,
                   [&](auto group) { return run_dispatch(group, me.fabric(), by_choice, offer, chooser); });
  };
  const Status s = c.chosen && !cached ? choosing() : runner.dispatch(w, r, c, work);
  if (!CHECK_EQ(s.code, Code::ok)) return;

  const CallShape& call = plan.view.call;
  const std::vector<Wanted>& rows = expected[r].rows;
  CHECK_EQ(plan.view.rank_rows[g.local()], int64_t(rows.size()));
  for (int e = 0; e < c.experts_per_rank; ++e) {
    CHECK_EQ(plan.view.tokens_per_expert[e], expected[r].tokens_per_expert[e]);
    CHECK_EQ(plan.view.rows_per_expert[e], expected[r].rows_per_expert[e]);
  }
  const int64_t all_rows = call.capacity >= 0 ? call.capacity : rows.size();
  const BlockLayout l = block_layout(all_rows, call, c.top_k);
  char* block = me.window.data.get() + plan.target[g.local()].rows;
  const float* weights = l.weights.in(block);
  const int64_t* ids = l.ids.in(block);
  const int64_t* source = l.source.in(block);
  const std::vector<char> zeros(std::max<uint64_t>(call.row_bytes, 64));
  for (int64_t i = 0; i < all_rows; ++i) {
    const Wanted none, &want = i < int64_t(rows.size()) ? rows[i] : none;
    const bool padding = want.token < 0;
    const Input& from = in[padding ? 0 : want.source];
    CHECK(std::memcmp(block + l.rows + i * call.row_bytes,
                      padding ? zeros.data() : from.arriving.data() + want.token * call.row_bytes,
                      call.row_bytes) == 0);
    const int64_t words = call.scale_bytes / 4;
    for (int64_t w = 0; w < words; ++w) {
      const char* got = block + l.scales + 4 * (c.by_column ? w * scale_column(all_rows) + i : i * words + w);
      CHECK(std::memcmp(got,
                        padding ? zeros.data() : from.arriving_scales.data() + 4 * (want.token * words + w),
                        4) == 0);
    }
    CHECK_EQ(source[i], padding ? -1 : int64_t{want.source} << 32 | want.token);
    const auto weight_of = [&](int k) { return c.weights ? from.weights[want.token * c.top_k + k] : 1.0f; };
    if (c.layout == RowLayout::expert) {
      CHECK_EQ(weights[i], padding ? 0.0f : weight_of(want.slots[0]));
    } else {
      for (int k = 0; k < c.top_k; ++k) {
        const bool served = std::find(want.slots.begin(), want.slots.end(), k) != want.slots.end();
        CHECK_EQ(ids[i * c.top_k + k],
                 served ? from.ids[want.token * c.top_k + k] - r * c.experts_per_rank : -1);
        CHECK_EQ(weights[i * c.top_k + k], served ? weight_of(k) : 0.0f);
      }
    }
  }

  // The value of every row of the experts' output depends on its rank, its index and the round.
  const auto output_of = [&](int rank, int row, int64_t i) {
    return rounded(value_of(rank + 100 * round, row, i), c.type);
  };
  const bool weigh = c.weights && c.layout == RowLayout::expert;
  const OutputLayout o = output_layout(all_rows, shape);
  const uint64_t output = plan.target[g.local()].rows + l.bytes;
  char* out_rows = me.window.data.get() + output + o.rows;
  for (int64_t i = 0; i < all_rows; ++i)
    for (int64_t h = 0; h < c.hidden; ++h)
      store(out_rows + i * shape.combine_row_bytes(), h, c.type, output_of(r, static_cast<int>(i), h));
  std::vector<char> y(in[r].tokens * shape.combine_row_bytes(), char(0xcc));
  std::vector<float> bias(c.hidden);
  for (int h = 0; h < c.hidden; ++h) bias[h] = value_of(7, 7, h);
  std::vector<RowsBoard> boards(c.per_node);
  CombineCall made;
  made.y = y.data();
  made.bias = bias.data();
  made.wire = wire_of(c, r);
  const Offset<float> out_weights = weigh ? l.weights.moved(plan.target[g.local()].rows) : Offset<float>{};
  const RowsBoard board = make_board(o.rows.moved(output), out_weights, {}, o.sums.moved(output));
  const CombineArgs b = make_combine_args(me.view, plan.view, &me.consumed, boards.data(), board, made);
  me.begin();
  const Status back = runner.combine(w, r, c, b);
  if (!CHECK_EQ(back.code, Code::ok)) return;
  const auto weight_of = [&](int rank, int row) {
    const Wanted& wanted = expected[rank].rows[row];
    return weigh ? in[wanted.source].weights[wanted.token * c.top_k + wanted.slots[0]] : 1.0f;
  };
  const auto cross = [&](std::vector<float>& part) {
    for (int at = 0; at < c.hidden; at += kTile)
      scalar_cross(part.data() + at, std::min<int>(kTile, c.hidden - at), b.wire, c.type);
  };
  for (int t = 0; t < in[r].tokens; ++t) {
    const std::vector<float> want =
        expected_sum(expected, r, t, c.per_node, bias, output_of, weight_of, cross);
    for (int h = 0; h < c.hidden; ++h)
      CHECK_EQ(load(y.data() + t * shape.combine_row_bytes(), h, c.type), rounded(want[h], c.type));
  }
}

// Runs the rounds of a case. A Runner executes a rank's calls.
template <class Runner>
void run_case(const Case& c, Runner runner) {
  const int max_tokens = 19, size = c.nodes * c.per_node;
  Shape shape{.hidden = c.hidden,
              .dtype = c.type,
              .num_experts = size * c.experts_per_rank,
              .top_k = c.top_k,
              .max_tokens = max_tokens,
              .channels = c.channels,
              .chunk_rows = c.chunk_rows};
  if (c.chosen) shape.logical_experts = shape.num_experts;
  const uint64_t most =
      size * max_tokens * std::min(c.top_k, c.experts_per_rank) + c.experts_per_rank * c.alignment + 64;
  shape.arena_bytes = most * (2 * shape.slot_bytes() + 12 * c.top_k + 64) + 4096;
  World w(c.nodes, c.per_node, shape, c.check);
  std::vector<std::vector<Input>> inputs;
  for (int round = 0; round < c.rounds; ++round) {
    inputs.push_back(make_inputs(c, max_tokens, round * 31 + size));
    // A reused plan moves new rows and weights to the same places.
    if (round == c.rounds - 1 && round > 0)
      for (int r = 0; r < size; ++r) {
        Input fresh = inputs[round - 1][r];
        for (char& b : fresh.x) b = static_cast<char>(b * 5 + 1);
        fill_arriving(c, fresh);
        for (float& v : fresh.weights) v += 1;
        inputs[round][r] = fresh;
      }
  }
  w.each([&](int r) {
    Plan plan(w.rank(r).view);
    for (int round = 0; round < c.rounds; ++round)
      one_round(w, runner, c, shape, r, round, inputs[round], plan);
  });
  if (check::failures())
    std::printf(
        "  ... in %dx%d lanes %d layout %d alignment %d spare %d top_k %d channels %d quantized %d fused %d "
        "wire %d check %d skew %d chosen %d\n",
        c.nodes, c.per_node, c.lanes, int(c.layout), c.alignment, c.spare, c.top_k, c.channels, c.quantized,
        int(c.fused), int(c.wire), c.check, c.skew, c.chosen);
}

}  // namespace world
