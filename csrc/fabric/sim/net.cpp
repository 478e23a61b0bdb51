#include "fabric/sim/net.hpp"

#include <sys/mman.h>

#include <bit>
#include <stdexcept>

namespace moecomm {
namespace {

constexpr uint64_t kSignalBytes = 8;
constexpr uint64_t kPrivateBytes = uint64_t{1} << 34;  // addresses for inputs and outputs without payload

// Reserves zeroed memory; pages are committed when they are touched. dense: the touched bytes are mostly
// contiguous.
char* reserve(uint64_t bytes, bool dense) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED)
    throw std::runtime_error("cannot reserve " + std::to_string(bytes) +
                             " bytes of addresses for the simulated windows");
  if (dense) madvise(p, bytes, MADV_HUGEPAGE);  // a hint
  return static_cast<char*>(p);
}

}  // namespace

SimNet::SimNet(Geometry world, std::vector<SimSpace> spaces, Hardware hardware, int num_sms, bool payload)
    : world_(world),
      spaces_(std::move(spaces)),
      hardware_(hardware),
      payload_(payload),
      kernels_(&row_kernels()),
      fibers_(this, &SimNet::on_event),
      num_sms_(num_sms),
      node_latency_(picoseconds(hardware.node_latency)),
      rail_latency_(picoseconds(hardware.rail_latency)),
      message_(picoseconds(hardware.rail_message)),
      put_(picoseconds(hardware.put)),
      poll_(picoseconds(hardware.poll)),
      node_rate_(hardware.node_rate),
      rail_rate_(hardware.rail_rate),
      sm_read_(hardware.sm_read),
      sm_write_(hardware.sm_write) {
  detail::Cursor c;
  for (SimSpace& s : spaces_) {
    s.window_at = c.take(s.window_bytes, 4096);
    s.region_at = s.one_memory ? s.window_at : c.take(s.region_bytes, 4096);
    for (SimSpace::Records* r : {&s.window_records, &s.region_records}) {
      if (payload) r->end = r->begin;  // all records are where the layout puts them
      r->by_stride = Divisor(r->stride);
    }
    SimSpace::Records &own = s.window_records, &landed = s.region_records;
    own.at = c.take((own.end - own.begin) / own.stride * own.kept + own.stride,
                    4096);  // the rest of the last record needs an address too
    landed.by_source = Divisor(landed.per_source);
    landed.sources = (landed.end - landed.begin) / landed.stride / landed.per_source;
    landed.ranks = world.size;
    if (landed.sources) landed.sent = Offset<char*>{}.in(reserve(landed.sent_bytes(), true));
  }
  counters_.resize(spaces_.size());
  for (size_t i = 0; i < spaces_.size(); ++i) {
    counters_[i].node.resize(world.size, spaces_[i].window_counters / 8);
    counters_[i].rail.resize(world.size, spaces_[i].region_counters / 8);
  }
  private_at_ = c.take(payload ? 0 : kPrivateBytes, 4096);
  c.take(kSkew * world.size);
  shift_ = std::bit_width(c.at - 1);
  bytes_ = uint64_t(world.size) << shift_;
  base_ = reserve(bytes_, false);
  ranks_.resize(world.size);
  for (int r = 0; r < world.size; ++r) {
    ranks_[r].geometry = {r, world.size, world.ranks_per_node};
    ranks_[r].sms.resize(num_sms);
  }
}

SimNet::~SimNet() {
  munmap(base_, bytes_);
  for (const SimSpace& s : spaces_)
    if (s.region_records.sent) munmap(s.region_records.sent, s.region_records.sent_bytes());
}

void SimNet::reset(Chaos chaos, double lead, int poison) {
  chaos_ = chaos;
  fibers_.restart(picoseconds(lead));
  stuck_.clear();
  log_.clear();
  for (SpaceCounters& c : counters_) {
    c.node.clear();
    c.rail.clear();
  }
  for (SimRank& r : ranks_) {
    r.counters = {};
    r.node_out.clear();
    r.rail_out.clear();
    r.node_in.clear();
    r.rail_in.clear();
    for (Calendar& sm : r.sms) sm.clear();
    r.rail_sent = r.node_moved = {};
    r.landed = 0;
    for (const SimSpace& s : spaces_) {
      char *window = memory(r.geometry.rank) + s.window_at, *region = memory(r.geometry.rank) + s.region_at;
      std::memset(window, 0, s.window_counters);
      std::memset(region, 0, s.region_counters);
      if (!payload_) continue;
      std::memset(window + s.window_counters, poison, s.window_bytes - s.window_counters);
      std::memset(region + s.region_counters, poison, s.region_rows - s.region_counters);
      std::memset(region + s.region_rows, kPoison, s.region_bytes - s.region_rows);
    }
  }
}

void SimNet::start(int rank, const char* name, int channel, int sm, std::function<void()> body) {
  const Time at = fibers_.now() + (chaos_.on() ? chaos_.delay(0) : 0);
  const int fiber = fibers_.spawn(at, [this] {
    Role& r = role();
    const Time begin = fibers_.now();
    r.body();
    r.body = nullptr;
    log({begin, fibers_.now(), LogKind::role, Phase::none, r.rank, r.channel, -1, r.name, 0, 0});
  });
  if (static_cast<size_t>(fiber) >= roles_.size()) roles_.resize(fiber + 1);
  if (!roles_[fiber]) roles_[fiber] = std::make_unique<Role>();
  RoleState state;
  state.name = name;
  state.rank = rank;
  state.channel = channel;
  state.sm = sm < 0 ? Role::kAllSms : sm % num_sms_;
  roles_[fiber]->begin(state, std::move(body), world_.size);
}

void SimNet::run() {
  fibers_.run();
  while (fibers_.alive() > 0) {
    // A deadlock: keep the states of the waiting roles, then let their waits fail so that every role returns.
    std::vector<int> blocked;
    for (SimRank& r : ranks_) {
      for (const auto& w : r.waiting) blocked.push_back(w.fiber);
      r.waiting.clear();
    }
    const bool first = stuck_.empty();
    for (int fiber : blocked) {
      if (first) stuck_.push_back(*roles_[fiber]);
      roles_[fiber]->given_up = true;
      fibers_.wake(fiber, fibers_.now());
    }
    if (blocked.empty()) {  // other roles of the ranks still wait for roles that gave up
      blocked.swap(parked_);
      for (int fiber : blocked) {
        roles_[fiber]->given_up = true;
        fibers_.wake(fiber, fibers_.now());
      }
    }
    if (blocked.empty()) throw std::logic_error("a simulated role is blocked on nothing");
    fibers_.run();
  }
}

// -- links ----------------------------------------------------------------------------------------

Time SimNet::cross_node(int from, int to, uint64_t bytes) {
  if (chaos_.on()) return fibers_.now() + chaos_.delay(node_latency_);
  const Time work = node_rate_.time(bytes);
  const Time left = ranks_[from].node_out.take(fibers_.now(), work);
  return ranks_[to].node_in.take(left - work + node_latency_, work);
}

void SimNet::put(int space, int to_peer, uint64_t offset, const char* src, uint64_t bytes) {
  Role& r = role();
  SimRank& from = ranks_[r.rank];
  const int peer = peer_rank(space, from.geometry, to_peer);
  SimRank& to = ranks_[peer];
  const Time begin = fibers_.now();
  Time landed;
  if (chaos_.on()) {
    landed = begin + chaos_.delay(rail_latency_);
  } else {
    to.rail_in.expect(begin + rail_latency_);
    const Time work = std::max(rail_rate_.time(bytes), message_);
    // After the rows that this role has in flight.
    const Time left = from.rail_out.take(std::max(begin, r.stores), work);
    landed = to.rail_in.take(left - work + rail_latency_, work);
  }
  r.puts.note(peer, landed);
  from.landed = std::max(from.landed, landed);
  const bool rows = offset >= spaces_[space].region_rows;
  (rows ? from.rail_sent.row_bytes : from.rail_sent.other_bytes) += bytes;
  ++from.rail_sent.messages;
  if (payload_ || (!rows && !at_once())) {
    post_bytes(landed, peer, region(space, peer, offset), src, bytes, chaos_.coin());
  } else if (!rows) {
    std::memcpy(region(space, peer, offset), src, bytes);
  } else if (spaces_[space].region_records.has(offset)) {
    spaces_[space].region_records.sent_from(peer, offset) = const_cast<char*>(src);
  }
  log({begin, landed, LogKind::put, Phase::none, r.rank, r.channel, peer, r.name, offset, bytes});
  fibers_.advance(begin + put_ + chaos_.pause());
}

void SimNet::signal_rail(int space, int to_peer, uint64_t counter, uint64_t add, bool ordered) {
  Role& r = role();
  SimRank& from = ranks_[r.rank];
  const int peer = peer_rank(space, from.geometry, to_peer);
  const Time begin = fibers_.now();
  Time landed = begin + chaos_.delay(rail_latency_);
  if (!chaos_.on()) landed = from.rail_out.take(begin, message_) + rail_latency_;
  if (ordered) landed = std::max(landed, r.puts.last(peer));
  from.landed = std::max(from.landed, landed);
  from.rail_sent.other_bytes += kSignalBytes;
  ++from.rail_sent.messages;
  count(counters_[space].rail, landed, peer, region(space, peer), counter, add);
  log({begin, landed, LogKind::signal_rail, Phase::none, r.rank, r.channel, peer, r.name, counter, add});
  fibers_.advance(begin + put_ + chaos_.pause());
}

void SimNet::signal_node(int space, int local, uint64_t counter, uint64_t add) {
  Role& r = role();
  SimRank& from = ranks_[r.rank];
  const int peer = from.geometry.rank_at(from.geometry.node(), local);
  const Time begin = fibers_.now();
  const Time landed = std::max(begin + (peer == r.rank ? 0 : chaos_.delay(node_latency_)), r.stores);
  if (peer != r.rank) {
    from.node_moved.other_bytes += kSignalBytes;
    ++from.node_moved.messages;
  }
  count(counters_[space].node, landed, peer, window(space, peer), counter, add);
  log({begin, landed, LogKind::signal_node, Phase::none, r.rank, r.channel, peer, r.name, counter, add});
  fibers_.advance(begin + put_ + chaos_.pause());
}

void SimNet::finish_rows() {
  const Role& r = role();
  fibers_.advance(std::max(fibers_.now(), *std::max_element(r.flight, r.flight + Role::kInFlight)));
}

void SimNet::flush() {
  fibers_.advance(std::max(fibers_.now(), ranks_[role().rank].landed));
  if (!at_once()) fibers_.meet();
}

// -- visibility -----------------------------------------------------------------------------------

uint32_t SimNet::new_landing() {
  if (idle_landings_.empty()) {
    landings_.emplace_back();
    return static_cast<uint32_t>(landings_.size() - 1);
  }
  const uint32_t i = idle_landings_.back();
  idle_landings_.pop_back();
  return i;
}

void SimNet::count(CounterTimes& times, Time at, int rank, char* memory, uint64_t offset, uint64_t add) {
  if (at_once()) {
    if (times.enter(rank, offset / 8, add, at, fibers_.floor()))
      wake_waiting(rank, CounterAt{offset}.in(memory), times.value(rank, offset / 8), at);
    return;
  }
  const uint32_t i = new_landing();
  Landing& l = landings_[i];
  l.dst = memory + offset;
  l.bytes = 0;
  l.add = add;
  l.rank = rank;
  fibers_.post(at, i);
}

void SimNet::post_bytes(Time at, int rank, char* dst, const char* src, uint64_t bytes, bool keep_now) {
  const uint32_t i = new_landing();
  Landing& l = landings_[i];
  l.dst = dst;
  l.src = src;
  l.bytes = bytes;
  l.rank = rank;
  if (keep_now) {
    l.copy.reset(new char[bytes]);
    std::memcpy(l.copy.get(), src, bytes);
    l.src = l.copy.get();
  }
  fibers_.post(at, i);
}

void SimNet::land(uint32_t event) {
  Landing& l = landings_[event];
  if (l.bytes) {
    std::memcpy(l.dst, l.src, l.bytes);
    l.copy.reset();
  } else {
    uint64_t* counter = CounterAt{}.in(l.dst);
    *counter += l.add;
    wake_waiting(l.rank, counter, *counter, fibers_.now());
  }
  idle_landings_.push_back(event);
}

void SimNet::wake_waiting(int rank, const uint64_t* counter, uint64_t value, Time changed) {
  auto& waiting = ranks_[rank].waiting;
  for (size_t i = 0; i < waiting.size();) {
    const SimRank::Waiting& w = waiting[i];
    if (w.counter == counter && value >= w.at_least) {
      // A waiting role that is ahead of the clock continues at its own time.
      const Time since = roles_[w.fiber]->since;
      fibers_.wake(w.fiber, changed < since ? since : changed + chaos_.delay(poll_));
      waiting[i] = waiting.back();
      waiting.pop_back();
    } else {
      ++i;
    }
  }
}

Status SimNet::wait(CounterTimes& times, char* memory, uint64_t offset, uint64_t at_least, Phase phase,
                    int peer) {
  uint64_t* counter = CounterAt{offset}.in(memory);
  const uint64_t which = offset / 8;
  Role& r = role();
  const Time begin = fibers_.now();
  // The role may read the counter itself, but only after it has waited for it.
  if (at_once()) *counter = times.value(r.rank, which);
  if (*counter >= at_least) {
    if (!at_once()) return {};  // correct also if the role is ahead of the clock: the change is in its past
    const Time reached = times.reached(r.rank, which, at_least);
    if (reached <= begin) return {};
    fibers_.advance(reached + poll_);
  } else {
    r.at_least = at_least;
    r.phase = phase;
    r.peer = peer;
    r.given_up = false;
    r.since = begin;
    times.watch(r.rank, which, 1);
    ranks_[r.rank].waiting.push_back({fibers_.current(), counter, at_least});
    fibers_.block();
    times.watch(r.rank, which, -1);
    if (at_once()) *counter = times.value(r.rank, which);
  }
  log({begin, fibers_.now(), r.given_up ? LogKind::give_up : LogKind::wait, phase, r.rank, r.channel, peer,
       r.name, offset, at_least});
  return r.given_up ? Status{Code::timeout, phase, peer, 0, at_least, *counter} : Status{};
}

// -- row operations -------------------------------------------------------------------------------

void SimNet::row_operation(Role& r, uint64_t read, uint64_t written, Time link) {
  r.stores = std::max(r.stores, link);
  if (chaos_.on()) {
    fibers_.advance(fibers_.now() + chaos_.pause());
    return;
  }
  const Time now = fibers_.now();
  const Time work = std::max(sm_read_.time(read), sm_write_.time(written));
  Time done = r.sm == Role::kAllSms ? now + work / num_sms_ : ranks_[r.rank].sms[r.sm].take(now, work);
  done = std::max(done, r.flight[r.next_flight]);  // the number of rows in flight is bounded
  r.flight[r.next_flight] = link;
  r.next_flight = (r.next_flight + 1) % Role::kInFlight;
  fibers_.advance(done);
}

void SimNet::copy_row(char* dst, const char* src, uint64_t bytes) {
  Role& r = role();
  const int to = owner(dst, r.rank), from = owner(src, r.rank);
  LinkCount& moved = ranks_[r.rank].node_moved;
  Time link = 0;
  if (to != r.rank) link = cross_node(r.rank, to, bytes);
  if (from != r.rank) link = std::max(link, cross_node(from, r.rank, bytes));
  if (to != r.rank || from != r.rank) {
    moved.row_bytes += bytes;
    ++moved.rows;
  }
  if (payload_) {
    if (chaos_.on() && to != r.rank)
      post_bytes(link, to, dst, src, bytes, true);
    else
      kernels_->copy(dst, src, bytes);
  }
  row_operation(r, bytes, bytes, link);
}

void SimNet::zero_row(char* dst, uint64_t bytes) {
  if (payload_) kernels_->zero(dst, bytes);
  row_operation(role(), 0, bytes, 0);
}

// Takes the time to fetch the terms from other ranks and to sum them.
void SimNet::sum_operation(const Terms& terms, int64_t hidden, DType type, uint64_t written) {
  Role& r = role();
  LinkCount& moved = ranks_[r.rank].node_moved;
  const uint64_t plain = static_cast<uint64_t>(hidden) * element_bytes(type),
                 coded = wire_row_bytes(terms.wire, hidden, type);
  uint64_t read = 0;
  Time link = 0;
  for (int i = 0; i < terms.count; ++i) {
    const uint64_t bytes = terms.coded >> i & 1 ? coded : plain;
    read += bytes;
    const int from = owner(terms.store->row[i], r.rank);
    if (from == r.rank) continue;
    link = std::max(link, cross_node(from, r.rank, bytes));
    moved.row_bytes += bytes;
    ++moved.rows;
  }
  row_operation(r, read, written, link);
}

void SimNet::reduce_rows(char* dst, const Terms& terms, const Terms* next, const float* bias, int64_t hidden,
                         DType type) {
  if (payload_) kernels_->reduce(dst, terms, next, bias, 0, hidden, type, false);
  sum_operation(terms, hidden, type, static_cast<uint64_t>(hidden) * element_bytes(type));
}

void SimNet::reduce_encode(char* dst, Wire wire, const Terms& terms, const Terms* next, int64_t hidden,
                           DType type) {
  if (payload_) kernels_->reduce_encode(dst, wire, terms, next, 0, hidden, hidden, type);
  sum_operation(terms, hidden, type, wire_row_bytes(wire, hidden, type));
}

void SimNet::quantize_row(char* codes, char* scales, const char* row, int64_t hidden, DType type,
                          ScaleKind kind) {
  if (payload_) kernels_->quantize(codes, scales, row, 0, hidden, hidden, type, kind);
  row_operation(role(), static_cast<uint64_t>(hidden) * element_bytes(type),
                hidden + 4 * scale_words(hidden, kind), 0);
}

}  // namespace moecomm
