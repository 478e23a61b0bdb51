// Decode of whole worlds: one lane or a team of lanes per rank, epochs of both parities without a pause between them,
// every row compared with the definition.
#include "check.hpp"
#include "world.hpp"
#include "world/cpu/decode_run.hpp"

using namespace world;

namespace {

struct Case {
  int nodes = 2, per_node = 2, lanes = 0;
  bool weighted = false, check = false, quantized = false;
  int top_k = 3, experts_per_rank = 3, hidden = 40;
  int epochs = 7;
};

constexpr int kMaxTokens = 5;

// One rank's memories, in plain heap memory.
struct Seat {
  Seat(const Geometry& g, const Shape& s, bool check)
      : view(make_decode_view(g, s, check)), window(view.window.bytes), region(view.region.bytes) {
    host.geometry = g;
    host.window_faults = view.window.faults;
    host.region_faults = view.region.faults;
    host.region_outbox = view.region.outbox;
    for (int r = 0; r < g.size; ++r) host.peer_ranks.push_back(r / g.ranks_per_node == g.node() ? -1 : r);
    host.own_peer = g.rank;
    host.rail_region = region.data.get();
    host.watch = &watch;
    host.deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    for (int p = 0; p < 2; ++p) {
      tables[p].resize(place_decode_turn(view, nullptr, turns[p]));
      place_decode_turn(view, tables[p].data(), turns[p]);
    }
  }
  HostFabric<LoopbackRail> fabric() { return {&host, &loopback}; }

  DecodeView view;
  Heap window, region;
  HostState host;
  LoopbackRail loopback;
  Watch watch;
  std::vector<char> tables[2];
  DecodeTurn turns[2];
};

std::vector<std::unique_ptr<Seat>> make_seats(const Case& c, const Shape& shape) {
  std::vector<std::unique_ptr<Seat>> seats;
  const int size = c.nodes * c.per_node;
  for (int r = 0; r < size; ++r) seats.push_back(std::make_unique<Seat>(Geometry{r, size, c.per_node}, shape, c.check));
  for (auto& seat : seats) {
    const Geometry& g = seat->host.geometry;
    std::vector<char*> regions;
    for (int r = 0; r < size; ++r) regions.push_back(seat->view.near(r) ? nullptr : seats[r]->region.data.get());
    for (int l = 0; l < c.per_node; ++l) seat->host.windows[l] = seats[g.rank_at(g.node(), l)]->window.data.get();
    seat->loopback.attach(regions);
  }
  return seats;
}

Input make_input(const Case& c, int r, int epoch) {
  std::mt19937_64 random(1000 * epoch + r);
  Input in;
  in.tokens = static_cast<int>(random() % (kMaxTokens + 1));
  const int experts = c.nodes * c.per_node * c.experts_per_rank;
  for (int t = 0; t < in.tokens; ++t) {
    std::vector<int64_t> ids(experts);
    for (int e = 0; e < experts; ++e) ids[e] = e;
    std::shuffle(ids.begin(), ids.end(), random);
    for (int k = 0; k < c.top_k; ++k) {
      in.ids.push_back(k >= experts || random() % 5 == 0 ? -1 : ids[k]);
      in.weights.push_back(value_of(epoch, 100 * r + t, k));
    }
    for (int i = 0; i < c.hidden; ++i) {
      in.x.resize(in.x.size() + 2);
      store(in.x.data() + int64_t{t} * c.hidden * 2, i, DType::bf16, value_of(epoch, r, t * 1000 + i));
    }
  }
  return in;
}

// The output of expert e for token t of rank s.
float expert_value(int epoch, int e, int s, int t, int i) { return rounded(value_of(epoch * 31 + e, s, t * 1000 + i), DType::bf16); }

void one_epoch(Seat& me, const Case& c, int epoch, const std::vector<Input>& in) {
  const DecodeView& d = me.view;
  const int r = d.geometry.rank, parity = epoch & 1, k_max = c.top_k;
  const Input& own = in[r];
  DecodeTurn& turn = me.turns[parity];
  turn.epoch = epoch;
  turn.bank = parity;
  turn.tokens = own.tokens;
  turn.weighted = c.weighted;
  turn.mode = 1;
  turn.call.row_bytes = c.quantized ? c.hidden : c.hidden * 2;
  turn.call.scales = c.quantized ? ScaleKind::f32 : ScaleKind::none;
  turn.call.scale_bytes = 4 * scale_words(c.hidden, turn.call.scales);
  DecodeSendArgs send{d, turn};
  send.ids64 = own.ids.data();
  send.x = own.x.data();
  send.weights = c.weighted ? own.weights.data() : nullptr;
  const auto f = me.fabric();
  CHECK(execute(c.lanes, [&](auto g) { return decode_list(g, send, 0, send.turn.tokens, send.turn.sent); }).ok());
  CHECK(execute(c.lanes, [&](auto g) { return run_decode_send(g, f, send); }).ok());
  const Status received = execute(c.lanes, [&](auto g) { return run_decode_receive(g, f, DecodeReceiveArgs{d, turn}); });
  if (!CHECK_EQ(static_cast<int>(received.code), 0)) return;

  char* window = me.window.data.get();
  const int64_t* counts = reinterpret_cast<const int64_t*>(window + d.counts(parity));
  char* rows = window + d.rows(parity);
  const int64_t per_expert = d.geometry.size * kMaxTokens;
  for (int e = 0; e < c.experts_per_rank; ++e) {
    const int expert = r * c.experts_per_rank + e;
    int n = 0;
    for (int s = 0; s < d.geometry.size; ++s)
      for (int t = 0; t < in[s].tokens; ++t)
        for (int k = 0; k < k_max; ++k) {
          if (in[s].ids[t * k_max + k] != expert) continue;
          const char* sent = in[s].x.data() + int64_t{t} * c.hidden * 2;
          const char* got = window + d.x(parity) + (e * per_expert + n) * turn.call.row_bytes;
          if (!c.quantized) {
            CHECK(std::memcmp(got, sent, c.hidden * 2) == 0);
          } else {
            std::vector<char> codes(c.hidden);
            float scale[2];
            row_kernels().quantize(codes.data(), reinterpret_cast<char*>(scale), sent, 0, c.hidden, c.hidden, DType::bf16, ScaleKind::f32);
            CHECK(std::memcmp(got, codes.data(), c.hidden) == 0);
            CHECK_EQ(reinterpret_cast<const float*>(window + d.scales(parity, e))[n * turn.call.scale_bytes / 4], scale[0]);
          }
          for (int i = 0; i < c.hidden; ++i) store(rows + (e * per_expert + n) * c.hidden * 2, i, DType::bf16, expert_value(epoch, expert, s, t, i));
          ++n;
        }
    CHECK_EQ(counts[e], n);
  }
  if (epoch % 3 == 0) return;   // no combine this time

  std::copy(own.weights.begin(), own.weights.end(), turn.weights);
  std::vector<char> y(own.tokens * c.hidden * 2 + 1, 0x55);
  DecodeCombineArgs combine{d, turn, 2, Wire::plain, rows, y.data()};
  CHECK(execute(c.lanes, [&](auto g) { return run_decode_combine_send(g, f, combine); }).ok());
  CHECK(execute(c.lanes, [&](auto g) { return run_decode_combine_receive(g, f, combine); }).ok());
  for (int t = 0; t < own.tokens; ++t)
    for (int i = 0; i < c.hidden; i += 7) {
      std::vector<std::pair<int, float>> parts;   // by rank where weights travel, else all in one
      for (int k = 0; k < k_max; ++k) {
        const int64_t e = own.ids[t * k_max + k];
        if (e < 0) continue;
        const float term = expert_value(epoch, e, r, t, i) * own.weights[t * k_max + k];
        const int key = c.weighted ? d.owner(e) : 0;
        auto part = std::find_if(parts.begin(), parts.end(), [&](auto& p) { return p.first == key; });
        if (part == parts.end()) parts.push_back({key, term});
        else part->second += term;
      }
      float want = 0;
      for (size_t p = 0; p < parts.size(); ++p) {
        const float v = c.weighted ? rounded(parts[p].second, DType::bf16) : parts[p].second;
        want = p ? want + v : v;
      }
      CHECK_EQ(load(y.data() + int64_t{t} * c.hidden * 2, i, DType::bf16), rounded(want, DType::bf16));
    }
}

void run_case(const Case& c) {
  const Shape shape{.hidden = c.hidden, .dtype = DType::bf16, .num_experts = c.nodes * c.per_node * c.experts_per_rank, .top_k = c.top_k,
                    .max_tokens = kMaxTokens};
  auto seats = make_seats(c, shape);
  const int size = static_cast<int>(seats.size());
  std::vector<std::vector<Input>> inputs;
  for (int e = 1; e <= c.epochs; ++e) {
    inputs.emplace_back();
    for (int r = 0; r < size; ++r) inputs.back().push_back(make_input(c, r, e));
  }
  std::vector<std::jthread> threads;
  for (int r = 0; r < size; ++r)
    threads.emplace_back([&, r] {
      for (int e = 1; e <= c.epochs; ++e) one_epoch(*seats[r], c, e, inputs[e - 1]);
    });
}

const std::vector<Case> kCases = {
    {1, 1}, {1, 3}, {2, 2}, {3, 1}, {.weighted = true}, {.check = true}, {.quantized = true},
    {.lanes = 3}, {.nodes = 1, .per_node = 2, .lanes = 2}, {.lanes = 2, .weighted = true, .check = true}, {.lanes = 3, .quantized = true, .hidden = 160},
};

TEST_CASES(every_row_arrives_and_every_sum_is_right, kCases) { run_case(value); }

TEST(layouts_hold_what_they_say) {
  for (int size : {1, 4, 320}) {
    const Geometry g{0, size, size > 4 ? 8 : 2 > size ? 1 : 2};
    const Shape s{.hidden = 7168, .dtype = DType::bf16, .num_experts = size, .top_k = 1, .max_tokens = 32};
    const DecodeView d = make_decode_view(g, s, false);
    CHECK(d.message(1, s.max_tokens - 1) + decode_message_bytes(s) <= d.window.sums);
    CHECK(d.sum(1, s.max_tokens - 1, 0) + s.combine_row_bytes() <= d.window.x);
    CHECK(d.x(1) + d.packed_rows() * s.combine_row_bytes() <= d.window.scales);
    CHECK(d.scales(1, d.experts_per_rank() - 1) + decode_scale_area(g, s) <= d.window.rows);
    CHECK(d.rows(1) + d.packed_rows() * s.combine_row_bytes() <= d.window.coded);
    if (size > 1 && g.nodes() > 1) {
      CHECK(d.landed(1, size - 1, 0, s.max_tokens - 1) + decode_message_bytes(s) <= d.region.answers);
      CHECK(d.answer(1, s.max_tokens - 1, 0) + s.slot_bytes() <= d.region.bytes);
      CHECK(d.coded(1, size - 1, s.max_tokens - 1, decode_picks_per_rank(g, s) - 1) + s.slot_bytes() <= d.window.bytes);
    }
  }
}

TEST(flags_grow_and_carry_their_count) {
  CHECK(make_flag(7, 7, kDecodeMaxTokens) < make_flag(8, 0, 0));
  CHECK_EQ(flag_count(make_flag(123456789, 5, kDecodeMaxTokens)), kDecodeMaxTokens);
  CHECK_EQ(flag_mode(make_flag(123456789, 5, 77)), 5);
}

}  // namespace
