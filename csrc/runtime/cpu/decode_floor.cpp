#include "runtime/cpu/decode_floor.hpp"

#include "exec/lane.hpp"
#include "schedule/decode_sequential.hpp"

namespace moecomm {

DecodeFloor::DecodeFloor(Decode& decode, const char* x, char* y)
    : decode_(decode),
      peer_memory_(decode.peer_memory()),
      view_(decode.view()),
      turn_(decode.last_turn()),
      y_(y),
      row_bytes_(view_.shape.combine_row_bytes()) {
  const int parity = turn_.parity(), me = view_.geometry.rank, own = view_.geometry.local(),
            k_max = view_.shape.top_k;
  const uint64_t header = decode_header_bytes(k_max);
  const HostState& host = peer_memory_.host();
  const auto places = [&](int owner, int token) {  // the places of this rank's picks at the owner
    return view_.places(parity, own).in(host.windows[view_.local(owner)]) + int64_t{token} * k_max;
  };
  stores_.resize(turn_.tokens);
  for (int t = 0; t < turn_.tokens; ++t) {
    DecodeHeader* message = view_.message(parity, t).in(host.windows[own]);
    staged_.push_back({message->row(k_max), x + t * row_bytes_});
    int n = 0;
    for (int k = 0; k < k_max; ++k) {
      const int64_t at = int64_t{t} * k_max + k;
      if (turn_.ids[at] < 0) continue;
      const int r = view_.owner(turn_.ids[at]);
      if (turn_.slot[at] >= 0 && !view_.same_node(r))
        messages_.push_back({r, view_.landed(parity, me, r, turn_.slot[at]).value,
                             host.windows[own] + view_.message(parity, t).value, header + row_bytes_});
      stores_[t].weight[n] = turn_.weights[at];
      stores_[t].row[n++] = view_.same_node(r)
                                ? host.windows[view_.local(r)] + view_.rows(0) + places(r, t)[k] * row_bytes_
                                : host.rail_region + view_.answer(parity, t, k);
    }
    terms_.push_back(n);
  }
  const HostFabric<LoopbackRail> memory{&peer_memory_.host(), nullptr};
  for (int s = 0; s < view_.geometry.size; ++s)
    for (int i = 0; i < turn_.got[s]; ++i) {
      int32_t* note = detail::arrived(view_, turn_, s, i);
      const int32_t* rows = detail::decode_places(memory, view_, turn_, s, note);
      const DecodeHeader* message = detail::decode_message(memory, view_, turn_, s, i, note[0]);
      for (int k = 0; k < k_max; ++k) {
        if (note[1 + k] < 0) continue;
        const int64_t place = rows[k];  // an index over both banks
        packed_.push_back({host.windows[own] + view_.x(0) + place * row_bytes_, message->row(k_max)});
        if (!view_.same_node(s))
          answers_.push_back({s, view_.answer(parity, note[0], k),
                              host.windows[own] + view_.rows(0) + place * row_bytes_, row_bytes_});
      }
    }
}

template <Fabric<Lane> F>
void DecodeFloor::signal(F f, int rank, bool answer) {
  const int parity = turn_.parity(), me = view_.geometry.rank, own = view_.geometry.local();
  uint64_t& last = (answer ? turn_.answered_flag : turn_.sent_flag)[rank];
  const uint64_t flag = make_flag(turn_.epoch, 0, 0), add = flag - last;
  last = flag;
  if (view_.same_node(rank))
    f.signal_node(view_.local(rank), answer ? view_.answered_flag(parity, own) : view_.sent_flag(parity, own),
                  add);
  else
    f.signal_rail(rank, answer ? view_.remote_answered_flag(parity, me) : view_.remote_sent_flag(parity, me),
                  add);
}

template <Fabric<Lane> F>
Status DecodeFloor::wait(F f, int rank, bool answer) {
  const int parity = turn_.parity(), local = view_.local(rank);
  const uint64_t at_least = make_flag(turn_.epoch, 0, 0);
  if (view_.same_node(rank))
    return f.wait_node(answer ? view_.answered_flag(parity, local) : view_.sent_flag(parity, local), at_least,
                       Phase::arrive, rank);
  return f.wait_rail(answer ? view_.remote_answered_flag(parity, rank) : view_.remote_sent_flag(parity, rank),
                     at_least, Phase::arrive, rank);
}

template <Fabric<Lane> F>
Status DecodeFloor::dispatch(F f) {
  const int size = view_.geometry.size;
  for (const Copy& c : staged_) f.copy_row(Lane{}, c.to, c.from, row_bytes_);
  for (const Put& p : messages_) f.put(p.rank, p.at, p.from, p.bytes);
  for (int step = 1; step <= size; ++step) signal(f, (view_.geometry.rank + step) % size, false);
  for (int r = 0; r < size; ++r) MOE_TRY(wait(f, r, false));
  peer_memory_.host().stream = decode_.streams(packed_.size() * row_bytes_);
  for (const Copy& c : packed_) f.copy_row(Lane{}, c.to, c.from, row_bytes_);
  peer_memory_.host().stream = false;
  return {};
}

template <Fabric<Lane> F>
Status DecodeFloor::combine(F f) {
  const Shape& shape = view_.shape;
  const int size = view_.geometry.size;
  for (const Put& p : answers_) f.put(p.rank, p.at, p.from, p.bytes);
  for (int step = 1; step <= size; ++step)
    if (const int r = (view_.geometry.rank + step) % size; turn_.got[r] > 0) signal(f, r, true);
  for (int r = 0; r < size; ++r)
    if (turn_.sent[r] > 0) MOE_TRY(wait(f, r, true));
  const auto terms_of = [&](int t) {
    Terms terms;
    if (t >= turn_.tokens) return terms;
    terms.store = &stores_[t];
    terms.count = terms_[t];
    terms.close_group();
    return terms;
  };
  Terms next = terms_of(0);
  for (int t = 0; t < turn_.tokens; ++t) {
    const Terms now = next;
    next = terms_of(t + 1);
    f.reduce_rows(Lane{}, y_ + t * row_bytes_, now, &next, static_cast<const float*>(nullptr), shape.hidden,
                  shape.dtype);
  }
  return {};
}

Status DecodeFloor::run(int steps) {
  std::lock_guard lock(peer_memory_.comm().calls());
  peer_memory_.begin(false);
  const Status s = peer_memory_.run(true, [&](auto fabric) {
    for (int i = 0; i < steps; ++i) {
      turn_.epoch += 2;  // one parity is enough, since every step writes the same bytes
      MOE_TRY(dispatch(fabric));
      MOE_TRY(combine(fabric));
    }
    return Status{};
  });
  decode_.skip_to(turn_.epoch);
  return s;
}

Status DecodeFloor::latency(int rounds) {
  std::lock_guard lock(peer_memory_.comm().calls());
  const int me = view_.geometry.rank, last = view_.geometry.size - 1, peer = last - me,
            parity = turn_.parity();
  const auto send = [&](auto f) {
    const char* row = f.window(view_.geometry.local()) + view_.message(parity, 0).value;
    if (view_.same_node(peer))
      f.copy_row(Lane{}, f.window(view_.local(peer), view_.sum(parity, 0, 0)), row, row_bytes_);
    else
      f.put(peer, view_.landed(parity, me, peer, 0).value, row, row_bytes_);
    signal(f, peer, false);
  };
  peer_memory_.begin(false);
  const Status s = peer_memory_.run(true, [&](auto f) {
    for (int i = 0; i < rounds; ++i) {
      turn_.epoch += 2;
      if (me == 0) send(f);
      if (me == 0 || me == last) MOE_TRY(wait(f, peer, false));
      if (me == last && me != 0) send(f);
    }
    return Status{};
  });
  decode_.skip_to(turn_.epoch);
  return s;
}

}  // namespace moecomm
