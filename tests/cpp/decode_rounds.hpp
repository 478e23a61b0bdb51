// Test cases of decode with all ranks, and what one rank does in an epoch. Every row and every sum is
// compared with the definition. A Runner executes a rank's four phases and determines their epoch.
#pragma once
#include "check.hpp"
#include "schedule/decode_sequential.hpp"
#include "session/decode_arguments.hpp"
#include "world.hpp"

namespace world {

struct DecodeCase {
  int nodes = 2, per_node = 2, lanes = 0;
  bool weighted = false, check = false, quantized = false;
  Wire wire = Wire::plain;
  int top_k = 3, experts_per_rank = 3, hidden = 40;
  int epochs = 7;
  int groups = 0;        // concurrent groups per rank; 0: one
  int captured = 0;      // steps of a replayed graph, in which tickets and banks repeat; 0: banks alternate
  bool overlap = false;  // a combine is sent after the next dispatch
  int squad = 1;         // warps of a group
  int combines = 1;      // of every epoch that is combined
};

constexpr int kDecodeTokens = 5;

// The memory of one rank, on the heap.
struct DecodeState {
  DecodeState(const Geometry& g, const Shape& s, bool check)
      : view(make_decode_view(g, s, check)),
        window(view.window.bytes),
        region(view.region.bytes),
        table_bytes(place_decode_turn(view, nullptr, turns[0])),
        tables(2 * table_bytes) {
    host.geometry = g;
    host.window_faults = view.window.faults;
    host.region_faults = view.region.faults;
    host.fault_out = view.region.fault_out;
    for (int r = 0; r < g.size; ++r) host.peer_ranks.push_back(r / g.ranks_per_node == g.node() ? -1 : r);
    host.own_peer = g.rank;
    host.rail_region = region.data.get();
    host.watch = &watch;
    host.deadline = std::chrono::steady_clock::now() + std::chrono::seconds(200);
    for (int p = 0; p < 2; ++p) place_decode_turn(view, tables.data() + p * table_bytes, turns[p]);
  }

  DecodeView view;
  Heap window, region;
  HostState host;
  LoopbackRail loopback;
  Watch watch;
  std::vector<char*> regions;  // by rank; null for ranks of this node
  DecodeTurn turns[2];
  uint64_t table_bytes;
  std::vector<char> tables;
};

inline std::vector<std::unique_ptr<DecodeState>> make_decode_states(const DecodeCase& c, const Shape& shape) {
  std::vector<std::unique_ptr<DecodeState>> states;
  const int size = c.nodes * c.per_node;
  for (int r = 0; r < size; ++r)
    states.push_back(std::make_unique<DecodeState>(Geometry{r, size, c.per_node}, shape, c.check));
  for (auto& state : states) {
    const Geometry& g = state->host.geometry;
    for (int r = 0; r < size; ++r)
      state->regions.push_back(state->view.same_node(r) ? nullptr : states[r]->region.data.get());
    for (int l = 0; l < c.per_node; ++l)
      state->host.windows[l] = states[g.rank_at(g.node(), l)]->window.data.get();
    state->loopback.attach(state->regions);
  }
  return states;
}

// One rank runs its phases one after another, like the cpu world, and numbers its epochs itself.
struct SoloDecode {
  DecodeTurn& turn(DecodeState& me, int epoch) {
    me.turns[epoch & 1].epoch = epoch;
    return me.turns[epoch & 1];
  }
  Status send(DecodeState& me, const DecodeCase& c, const DecodeSendArgs& a, uint64_t) {
    const HostFabric<LoopbackRail> f{&me.host, &me.loopback};
    const Status listed =
        execute(c.lanes, [&](auto g) { return decode_list(g, a, 0, a.turn.tokens, a.turn.sent); });
    return listed.ok() ? execute(c.lanes, [&](auto g) { return run_decode_send(g, f, a); }) : listed;
  }
  Status receive(DecodeState& me, const DecodeCase& c, const DecodeReceiveArgs& a) {
    const HostFabric<LoopbackRail> f{&me.host, &me.loopback};
    return execute(c.lanes, [&](auto g) { return run_decode_receive(g, f, a); });
  }
  Status answer(DecodeState& me, const DecodeCase& c, const DecodeCombineArgs& a, const Input& in, uint64_t) {
    std::copy(in.weights.begin(), in.weights.end(), a.turn.weights);
    const HostFabric<LoopbackRail> f{&me.host, &me.loopback};
    if (a.turn.combine > 0)
      MOE_TRY(execute(c.lanes, [&](auto g) { return run_decode_release(g, f, a.d, a.turn); }));
    return execute(c.lanes, [&](auto g) { return run_decode_combine_send(g, f, a); });
  }
  Status sum(DecodeState& me, const DecodeCase& c, const DecodeCombineArgs& a, uint64_t) {
    const HostFabric<LoopbackRail> f{&me.host, &me.loopback};
    return execute(c.lanes, [&](auto g) { return run_decode_combine_receive(g, f, a); });
  }
};

inline Input make_decode_input(const DecodeCase& c, int r, int epoch) {
  std::mt19937_64 random(1000 * epoch + r);
  Input in;
  in.tokens = static_cast<int>(random() % (kDecodeTokens + 1));
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
inline float expert_value(int epoch, int e, int s, int t, int i) {
  return rounded(value_of(epoch * 31 + e, s, t * 1000 + i), DType::bf16);
}

class DecodeRank {
 public:
  DecodeRank(DecodeState& state, const DecodeCase& c) : me_(state), c_(c) {}
  template <class Runner>
  void run(Runner& runner, const std::vector<std::vector<Input>>& inputs);

 private:
  // Of a step: the ticket and the bank that a captured call contains.
  uint64_t ticket(int epoch) const { return 1 + (c_.captured ? (epoch - 1) % c_.captured : epoch - 1); }
  int bank(int epoch) const { return c_.captured ? (epoch - 1) % c_.captured % 2 : epoch & 1; }
  const DecodeTurn& turn(int epoch) const { return turns_[epoch & 1]; }

  template <class Runner>
  bool send(Runner& runner, int epoch, const Input& own) {
    DecodeTurn& turn = turns_[epoch & 1] = runner.turn(me_, epoch);
    DecodeDispatchCall call;
    call.ids64 = own.ids.data();
    call.x = own.x.data();
    call.weights = c_.weighted ? own.weights.data() : nullptr;
    call.tokens = own.tokens;
    call.weighted = c_.weighted;
    call.quant = c_.quantized ? ScaleKind::f32 : ScaleKind::none;
    open_turn(turn, me_.view, turn.epoch, call);
    turn.bank = bank(epoch);
    std::memset(me_.window.data.get() + me_.view.x(turn.bank), 0xee,
                me_.view.packed_rows() * me_.view.shape.combine_row_bytes());
    const DecodeSendArgs args = make_decode_send_args(me_.view, turn, call);
    return CHECK_EQ(runner.send(me_, c_, args, ticket(epoch)).code, Code::ok);
  }
  template <class Runner>
  bool receive(Runner& runner, int epoch, const std::vector<Input>& in) {
    return CHECK_EQ(runner.receive(me_, c_, make_decode_receive_args(me_.view, turn(epoch))).code,
                    Code::ok) &&
           received_is_right(epoch, in);
  }
  bool received_is_right(int epoch, const std::vector<Input>& in);  // and runs the experts
  DecodeCombineArgs combine_args(int epoch) {
    DecodeCombineCall call;
    call.wire = c_.wire;
    call.y = y_[epoch & 1].data();
    return make_decode_combine_args(me_.view, turn(epoch), make_decode_answer(turn(epoch), call),
                                    me_.window.data.get() + me_.view.rows(bank(epoch)));
  }
  template <class Runner>
  bool answer(Runner& runner, int epoch, const Input& own) {
    y_[epoch & 1].assign(own.tokens * c_.hidden * 2 + 1, 0x55);
    return CHECK_EQ(runner.answer(me_, c_, combine_args(epoch), own, ticket(epoch)).code, Code::ok);
  }
  template <class Runner>
  bool sum(Runner& runner, int epoch, const Input& own) {
    return CHECK_EQ(runner.sum(me_, c_, combine_args(epoch), ticket(epoch)).code, Code::ok) &&
           sums_are_right(epoch, own);
  }
  bool sums_are_right(int epoch, const Input& own);
  // Replaces a row of rank `from` by its values when it is summed: rounded, or in the wire format between
  // nodes.
  void cross(std::vector<float>& row, int from) const {
    const Wire wire = me_.view.same_node(from) ? Wire::plain : c_.wire;
    for (int at = 0; at < c_.hidden; at += kTile)
      scalar_cross(row.data() + at, std::min<int>(kTile, c_.hidden - at), wire, DType::bf16);
  }

  DecodeState& me_;
  DecodeCase c_;
  DecodeTurn turns_[2];
  std::vector<char> y_[2];
};

template <class Runner>
void DecodeRank::run(Runner& runner, const std::vector<std::vector<Input>>& inputs) {
  const int rank = me_.view.geometry.rank;
  const auto own = [&](int epoch) -> const Input& { return inputs[epoch - 1][rank]; };
  int pending = 0;  // the epoch whose combine has not been sent yet
  for (int e = 1; e <= c_.epochs; ++e) {
    if (rank == 0 && e % 7 == 3)
      std::this_thread::sleep_for(std::chrono::milliseconds(2));  // the others run ahead
    if (!send(runner, e, own(e))) return;
    if (pending && !answer(runner, pending, own(pending))) return;
    if (!receive(runner, e, inputs[e - 1])) return;
    if (pending && !sum(runner, pending, own(pending))) return;
    pending = 0;
    if (e % 3 == 0) continue;  // no combine this time
    // By rule (C) not if the next epoch has the same bank.
    if (c_.overlap && e < c_.epochs && bank(e) != bank(e + 1)) {
      pending = e;
    } else {
      for (int n = 0; n < c_.combines; ++n) {
        turns_[e & 1].combine = n;
        if (!answer(runner, e, own(e)) || !sum(runner, e, own(e))) return;
      }
    }
  }
}

inline bool DecodeRank::received_is_right(int epoch, const std::vector<Input>& in) {
  const DecodeView& d = me_.view;
  const DecodeTurn& now = turn(epoch);
  const int r = d.geometry.rank, k_max = c_.top_k;
  char* window = me_.window.data.get();
  const int64_t* counts = d.counts(now.bank).in(window);
  char* rows = window + d.rows(now.bank);
  const int64_t per_expert = d.geometry.size * kDecodeTokens;
  bool right = true;
  for (int e = 0; e < c_.experts_per_rank; ++e) {
    const int expert = r * c_.experts_per_rank + e;
    int n = 0;
    for (int s = 0; s < d.geometry.size; ++s)
      for (int t = 0; t < in[s].tokens; ++t)
        for (int k = 0; k < k_max; ++k) {
          if (in[s].ids[t * k_max + k] != expert) continue;
          const char* sent = in[s].x.data() + int64_t{t} * c_.hidden * 2;
          const char* got = window + d.x(now.bank) + (e * per_expert + n) * now.call.row_bytes;
          if (!c_.quantized) {
            right &= CHECK_EQ(std::memcmp(got, sent, c_.hidden * 2), 0);
          } else {
            std::vector<char> codes(c_.hidden);
            std::vector<float> scales(tiles_of(c_.hidden));
            row_kernels().quantize(codes.data(), reinterpret_cast<char*>(scales.data()), sent, 0, c_.hidden,
                                   c_.hidden, DType::bf16, ScaleKind::f32);
            right &= CHECK_EQ(std::memcmp(got, codes.data(), c_.hidden), 0);
            right &= CHECK_EQ(std::memcmp(window + d.scales(now.bank, e) + n * now.call.scale_bytes,
                                          scales.data(), now.call.scale_bytes),
                              0);
          }
          for (int i = 0; i < c_.hidden; ++i)
            store(rows + (e * per_expert + n) * c_.hidden * 2, i, DType::bf16,
                  expert_value(epoch, expert, s, t, i));
          ++n;
        }
    right &= CHECK_EQ(counts[e], n);
  }
  return right;
}

inline bool DecodeRank::sums_are_right(int epoch, const Input& own) {
  const DecodeView& d = me_.view;
  const int r = d.geometry.rank, k_max = c_.top_k;
  bool right = true;
  for (int t = 0; t < own.tokens; ++t) {
    struct Part {
      int rank;
      std::vector<float> sum;
    };
    std::vector<Part> parts;  // by rank if weights are sent, else one part
    for (int k = 0; k < k_max; ++k) {
      const int e = static_cast<int>(own.ids[t * k_max + k]);
      if (e < 0) continue;
      std::vector<float> term(c_.hidden);
      for (int i = 0; i < c_.hidden; ++i) term[i] = expert_value(epoch, e, r, t, i);
      // Each row is sent separately if weights are not sent.
      if (!c_.weighted && !d.same_node(d.owner(e)) && c_.wire != Wire::plain) cross(term, d.owner(e));
      const float weight = own.weights[t * k_max + k];
      const int key = c_.weighted ? d.owner(e) : 0;
      auto part = std::find_if(parts.begin(), parts.end(), [&](const Part& p) { return p.rank == key; });
      if (part == parts.end()) {
        for (float& v : term) v *= weight;
        parts.push_back({key, term});
      } else {
        for (int i = 0; i < c_.hidden; ++i) part->sum[i] += term[i] * weight;
      }
    }
    std::vector<float> want(c_.hidden);
    for (size_t p = 0; p < parts.size(); ++p) {
      if (c_.weighted) cross(parts[p].sum, parts[p].rank);
      for (int i = 0; i < c_.hidden; ++i) want[i] = p ? want[i] + parts[p].sum[i] : parts[p].sum[i];
    }
    for (int i = 0; i < c_.hidden; ++i)
      right &= CHECK_EQ(load(y_[epoch & 1].data() + int64_t{t} * c_.hidden * 2, i, DType::bf16),
                        rounded(want[i], DType::bf16));
  }
  return right;
}

template <class Runner>
void run_decode_case(const DecodeCase& c, std::vector<Runner> runners) {
  const int size = c.nodes * c.per_node;
  const Shape shape{.hidden = c.hidden,
                    .dtype = DType::bf16,
                    .num_experts = size * c.experts_per_rank,
                    .top_k = c.top_k,
                    .max_tokens = kDecodeTokens};
  auto states = make_decode_states(c, shape);
  std::vector<std::vector<Input>> inputs;
  for (int e = 1; e <= c.epochs; ++e) {
    inputs.emplace_back();
    for (int r = 0; r < size; ++r) inputs.back().push_back(make_decode_input(c, r, e));
    // The number of tokens of a captured step is fixed.
    if (c.captured && e > c.captured)
      for (int r = 0; r < size; ++r) {
        Input& now = inputs[e - 1][r];
        const int tokens = inputs[e - 1 - c.captured][r].tokens;
        for (int seed = 1; now.tokens != tokens; ++seed) now = make_decode_input(c, r, e + 1000 * seed);
      }
  }
  {
    std::vector<std::jthread> threads;
    for (int r = 0; r < size; ++r)
      threads.emplace_back([&, r] { DecodeRank(*states[r], c).run(runners[r], inputs); });
  }
  if (check::failures())
    std::printf(
        "  ... in %dx%d lanes %d groups %d squad %d captured %d overlap %d weighted %d check %d quantized %d "
        "wire %d hidden %d\n",
        c.nodes, c.per_node, c.lanes, c.groups, c.squad, c.captured, c.overlap, c.weighted, c.check,
        c.quantized, int(c.wire), c.hidden);
}

}  // namespace world
