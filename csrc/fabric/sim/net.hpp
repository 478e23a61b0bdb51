// SimNet and SimFabric: the Fabric of the sim world. All ranks live in one process and one thread; a role
// is a fiber, and everything that it does to memory or links takes virtual time on modelled resources.
//
// Visibility is as weak as the Fabric contract allows: a put lands later than it was issued (its source
// is read on landing, unless chaos takes it at once), a row stored into another rank's window may appear
// as late as the signal that releases it, and only what the contract orders is ordered.
//
// Without payload the row bytes are not touched; counters, tables and metadata are, since the protocol
// steers by them. Times and counts do not change. What is put is there at once then, and counters count at
// once, with their time: that the protocol lets nobody look earlier is what payload and chaos are for.
#pragma once
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "base/layout.hpp"
#include "exec/lane.hpp"
#include "fabric/cpu/rows.hpp"
#include "fabric/fabric.hpp"
#include "fabric/sim/chaos.hpp"
#include "fabric/sim/counters.hpp"
#include "fabric/sim/links.hpp"

namespace moecomm {

// What crossed a rank's links, counted where it crosses: independent of the protocol's own counters.
struct LinkCount {
  uint64_t row_bytes = 0;    // rows: puts into staging areas; row operations between ranks of a node
  uint64_t rows = 0;         // node hop: row operations that crossed
  uint64_t other_bytes = 0;  // counts, metadata, verdicts, signals
  uint64_t messages = 0;
};

// Division by a number that stays, for dividends whose product with it is below 2^64.
class Divisor {
 public:
  explicit Divisor(uint64_t by = 1) : magic_(by > 1 ? ~uint64_t{0} / by + 1 : 0) {}
  uint64_t quotient(uint64_t n) const {
    return magic_ ? static_cast<uint64_t>(static_cast<unsigned __int128>(n) * magic_ >> 64) : n;
  }

 private:
  uint64_t magic_;
};

// A node window and a rail region, of every rank: what one Reach is in the cpu world. A cluster has one for
// dispatch and combine and one for decode.
struct SimSpace {
  // Records of which only the first bytes are metadata. Without payload the rest would lie untouched between
  // them and spread them over as many pages; they are kept side by side instead. Those that were put into a
  // region are not even copied: a table says where the sender has them, who leaves them alone until they have
  // been read. It is one for all ranks, since few of each one's many slots are filled.
  struct Records {
    uint64_t begin = 0, end = 0;  // offsets
    uint64_t stride = 1;
    uint64_t kept = 0;        // of a window
    uint64_t per_source = 1;  // of a region: consecutive records of one source
    // Set by SimNet:
    uint64_t at = 0;        // of a window: offset in a rank's memory
    char** sent = nullptr;  // of a region: by slot, rank and source, where the sender has the record
    uint64_t sources = 0, ranks = 0;
    Divisor by_stride, by_source;

    bool has(uint64_t offset) const { return offset >= begin && offset < end; }
    uint64_t within(uint64_t offset) const {
      return offset - begin - by_stride.quotient(offset - begin) * stride;
    }
    uint64_t place(uint64_t offset) const {
      const uint64_t index = by_stride.quotient(offset - begin);
      return at + index * kept + (offset - begin - index * stride);
    }
    char*& sent_from(int rank, uint64_t offset) const {
      const uint64_t index = by_stride.quotient(offset - begin), source = by_source.quotient(index);
      return sent[((index - source * per_source) * ranks + rank) * sources + source];
    }
    uint64_t sent_bytes() const { return sources * per_source * ranks * sizeof(char*); }
  };
  uint64_t window_bytes = 0;
  uint64_t window_counters = 0;  // bytes at its start that hold counters and faults
  uint64_t region_bytes = 0;
  uint64_t region_counters = 0;
  uint64_t region_rows = 0;  // puts from here on carry rows
  Records window_records, region_records;
  bool peers_are_ranks = false;  // how the fabric's peers are numbered: by node (the rail) or by rank
  uint64_t window_at = 0;        // offsets in a rank's memory; set by SimNet
  uint64_t region_at = 0;
};

struct SimRank {
  Geometry geometry;
  Counters counters;
  Calendar node_out, node_in, rail_out, rail_in;
  std::vector<Calendar> sms;  // row operations
  LinkCount rail_sent, node_moved;
  Time landed = 0;  // every put of this rank has landed by then
  struct Waiting {
    int fiber;
    const uint64_t* counter;
    uint64_t at_least;
  };
  std::vector<Waiting> waiting;
};

// A line of the log: what a role did, from `begin` to `end`.
enum class Did : int32_t { role, wait, put, signal_rail, signal_node, landed, give_up };
struct LogLine {
  Time begin, end;
  Did did;
  Phase phase;
  int32_t rank, channel, peer;
  const char* role;
  uint64_t offset, value;  // counter or place, and bytes or the value waited for
};

// When a role's puts have landed, by rank. Noted in turn; sorted by rank where there are many and somebody
// asks.
class PutTimes {
 public:
  explicit PutTimes(int ranks = 0) : ranks_(ranks) {}
  void note(int rank, Time landed) { notes_.push_back({rank, landed}); }
  Time last(int rank) {  // to that rank
    if (last_.empty() && notes_.size() <= kFew) {
      Time last = 0;
      for (const Note& n : notes_)
        if (n.rank == rank) last = std::max(last, n.landed);
      return last;
    }
    sort();
    return last_[rank];
  }
  void add(const PutTimes& other) {
    notes_.insert(notes_.end(), other.notes_.begin(), other.notes_.end());
    for (size_t rank = 0; rank < other.last_.size(); ++rank)
      if (other.last_[rank]) notes_.push_back({static_cast<int>(rank), other.last_[rank]});
  }
  void clear(int ranks) {
    ranks_ = ranks;
    notes_.clear();
    last_.clear();
  }

 private:
  struct Note {
    int rank;
    Time landed;
  };
  static constexpr size_t kFew = 64;
  void sort() {
    if (last_.empty()) last_.assign(ranks_, 0);
    for (const Note& n : notes_) last_[n.rank] = std::max(last_[n.rank], n.landed);
    notes_.clear();
  }
  int ranks_;
  std::vector<Note> notes_;
  std::vector<Time> last_;  // empty until somebody asks
};

// What a role has under way; all of it ends with the role.
struct RoleState {
  static constexpr int kInFlight = 4;  // rows that it may have under way on a link
  static constexpr int kAllSms = -1;

  const char* name = "";
  int rank = 0;
  int channel = -1;
  int sm = kAllSms;
  int next_flight = 0;
  Time flight[kInFlight] = {};
  Time stores = 0;        // its stores to other ranks are visible by then
  uint64_t at_least = 0;  // what it waits for
  Time since = 0;
  Phase phase = Phase::none;
  int peer = -1;
  bool given_up = false;
};

// A role, as a fiber.
struct Role : RoleState {
  std::function<void()> body;
  PutTimes puts;
  TermStore terms[2];
  char* targets[kMaxTopK];

  void begin(const RoleState& state, std::function<void()> run, int ranks) {
    static_cast<RoleState&>(*this) = state;
    body = std::move(run);
    puts.clear(ranks);
  }
  // Its next signals come after what the other stored and put.
  void comes_after(Time other_stores, const PutTimes& other_puts) {
    stores = std::max(stores, other_stores);
    puts.add(other_puts);
  }
};

class SimNet {
 public:
  static constexpr int kPoison = 0xA5;
  static constexpr uint64_t kSkew =
      7 * 4096 + 192;  // equal offsets of ranks fall into different sets of the caches and of the TLB

  SimNet(Geometry world, std::vector<SimSpace> spaces, Hardware hardware, int num_sms, bool payload);
  ~SimNet();
  SimNet(const SimNet&) = delete;
  SimNet& operator=(const SimNet&) = delete;

  // A clean start: clock, counters, links. `lead` in nanoseconds: how far roles may run ahead. With payload,
  // staging holds what no call would leave there, and the rest of the windows (metadata and blocks) bytes of
  // `poison`.
  void reset(Chaos chaos, double lead = 0, int poison = kPoison);

  void start(int rank, const char* name, int channel, int sm, std::function<void()> body);
  void run();  // until every role has ended; waits that nobody would end give up
  bool stuck() const { return !stuck_.empty(); }
  const std::vector<RoleState>& stuck_roles() const {
    return stuck_;
  }  // as they were when nobody could go on

  Fibers& fibers() { return fibers_; }
  Role& role() { return *roles_[fibers_.current()]; }
  SimRank& rank(int r) { return ranks_[r]; }
  char* window(int space, int r, uint64_t offset = 0) const {
    const SimSpace& s = spaces_[space];
    return memory(r) + (s.window_records.has(offset) ? s.window_records.place(offset) : s.window_at + offset);
  }
  char* region(int space, int r, uint64_t offset = 0) const {
    const SimSpace& s = spaces_[space];
    return s.region_records.has(offset)
               ? s.region_records.sent_from(r, offset) + s.region_records.within(offset)
               : memory(r) + s.region_at + offset;
  }
  int size() const { return world_.size; }
  const Hardware& hardware() const { return hardware_; }
  bool payload() const { return payload_; }
  Chaos& chaos() { return chaos_; }
  int owner_of(const void* p) { return owner(p, role().rank); }
  char* private_memory(int r) const { return memory(r) + private_at_; }

  // Fibers that wait for something inside their rank, and return without it where nobody can go on.
  void park(int fiber) {
    parked_.push_back(fiber);
    roles_[fiber]->given_up = false;
  }
  bool unpark(int fiber) {
    std::erase(parked_, fiber);
    return !roles_[fiber]->given_up;
  }

  void set_log(bool on) {
    logging_ = on;
    log_.clear();
  }
  void log(LogLine line) {
    if (logging_) log_.push_back(line);
  }
  const std::vector<LogLine>& log_lines() const { return log_; }

  // The Fabric's verbs, for the role that runs.
  void put(int space, int peer, uint64_t offset, const char* src, uint64_t bytes);
  void signal_rail(int space, int peer, uint64_t counter, uint64_t add, bool ordered = true);
  void signal_node(int space, int local, uint64_t counter, uint64_t add);
  Status wait_rail(int space, uint64_t counter, uint64_t at_least, Phase phase, int peer) {
    return wait(counters_[space].rail, region(space, role().rank), counter, at_least, phase, peer);
  }
  Status wait_node(int space, uint64_t counter, uint64_t at_least, Phase phase, int peer) {
    return wait(counters_[space].node, window(space, role().rank), counter, at_least, phase, peer);
  }
  void settle();  // until the row operations of this role are complete
  void flush();   // until all puts of this rank have landed
  void copy_row(char* dst, const char* src, uint64_t bytes);
  void zero_row(char* dst, uint64_t bytes);
  void reduce_rows(char* dst, const Terms& terms, const Terms* next, const float* bias, int64_t hidden,
                   DType type);
  void reduce_encode(char* dst, Wire wire, const Terms& terms, const Terms* next, int64_t hidden, DType type);
  void quantize_row(char* codes, char* scales, const char* row, int64_t hidden, DType type, ScaleKind kind);
  void spend(double nanoseconds) { fibers_.advance(fibers_.now() + chaos_.delay(picoseconds(nanoseconds))); }

 private:
  struct Landing {
    char* dst;
    const char* src;
    uint64_t bytes;  // 0: a counter
    uint64_t add;
    int rank;
    std::unique_ptr<char[]> copy;
  };
  struct SpaceCounters {
    CounterTimes node, rail;
  };
  bool at_once() const { return !payload_ && !chaos_.on(); }
  Status wait(CounterTimes& times, char* memory, uint64_t offset, uint64_t at_least, Phase phase, int peer);
  void count(CounterTimes& times, Time at, int rank, char* memory, uint64_t offset, uint64_t add);
  void wake_waiting(int rank, const uint64_t* counter, uint64_t value, Time changed);
  static void on_event(void* self, uint32_t event) { static_cast<SimNet*>(self)->land(event); }
  void land(uint32_t event);
  uint32_t new_landing();
  void post_bytes(Time at, int rank, char* dst, const char* src, uint64_t bytes, bool keep_now);
  // Whose memory it is, seen from rank `me`: where no load or store of its reaches it is what has been put to
  // it.
  int owner(const void* p, int me) const {
    const uint64_t offset = static_cast<uint64_t>(static_cast<const char*>(p) - base_);
    if (offset >= bytes_) return me;
    const int rank = static_cast<int>(offset >> shift_),
              first = ranks_[me].geometry.rank_at(ranks_[me].geometry.node(), 0);
    return rank >= first && rank < first + world_.ranks_per_node ? rank : me;
  }
  char* memory(int rank) const {
    return base_ + ((static_cast<uint64_t>(rank) << shift_) + static_cast<uint64_t>(rank) * kSkew);
  }
  int peer_rank(int space, const Geometry& g, int peer) const {
    return spaces_[space].peers_are_ranks ? peer : g.rail_rank(peer);
  }
  Time cross_node(int from, int to, uint64_t bytes);
  void sum_operation(const Terms& terms, int64_t hidden, DType type, uint64_t written);
  void row_operation(Role& r, uint64_t read, uint64_t written, Time link);

  Geometry world_;
  std::vector<SimSpace> spaces_;
  std::vector<SpaceCounters> counters_;  // by space
  Hardware hardware_;
  bool payload_;
  const RowKernels* kernels_;
  Fibers fibers_;
  Chaos chaos_;
  int num_sms_;
  char* base_ = nullptr;  // every rank's window, rail region and private room, at rank << shift_
  uint64_t bytes_ = 0;
  int shift_ = 0;
  uint64_t private_at_ = 0;
  std::vector<SimRank> ranks_;
  std::vector<std::unique_ptr<Role>> roles_;  // by fiber
  std::vector<Landing> landings_;
  std::vector<uint32_t> idle_landings_;
  std::vector<RoleState> stuck_;
  std::vector<int> parked_;
  bool logging_ = false;
  std::vector<LogLine> log_;
  Time node_latency_, rail_latency_, message_, put_, poll_;
  Rate node_rate_, rail_rate_, sm_read_, sm_write_;
};

struct SimFabric {
  static constexpr bool kPutsFromAnywhere = false;  // as on the GPU: puts leave from registered memory
  SimNet* net;
  int me;
  int space;

  char* window(int local) const { return window(local, Offset<char>{}); }
  template <class T>
  T* window(int local, Offset<T> at) const {
    const Geometry& g = net->rank(me).geometry;
    return Offset<T>{}.in(net->window(space, g.rank_at(g.node(), local), at.value));
  }
  template <class T>
  T* rail(Offset<T> at) const {
    return Offset<T>{}.in(net->region(space, me, at.value));
  }
  void put(int peer, uint64_t offset, const char* src, uint64_t bytes) const {
    net->put(space, peer, offset, src, bytes);
  }
  void signal_rail(int peer, CounterAt counter, uint64_t add) const {
    net->signal_rail(space, peer, counter.value, add);
  }
  void signal_node(int local, CounterAt counter, uint64_t add) const {
    net->signal_node(space, local, counter.value, add);
  }
  Status wait_rail(CounterAt counter, uint64_t at_least, Phase phase, int peer) const {
    return net->wait_rail(space, counter.value, at_least, phase, peer);
  }
  Status wait_node(CounterAt counter, uint64_t at_least, Phase phase, int peer) const {
    return net->wait_node(space, counter.value, at_least, phase, peer);
  }
  template <class G>
  void copy_row(G, char* dst, const char* src, uint64_t bytes) const {
    net->copy_row(dst, src, bytes);
  }
  template <class G>
  void spread_row(G, char* const* targets, int count, const char* src, uint64_t bytes) const {
    for (int i = 0; i < count; ++i) net->copy_row(targets[i], src, bytes);
  }
  template <class G>
  void settle(G) const {
    net->settle();
  }
  template <class G>
  void zero_row(G, char* dst, uint64_t bytes) const {
    net->zero_row(dst, bytes);
  }
  template <class G>
  void reduce_rows(G, char* dst, const Terms& terms, const Terms* next, const float* bias, int64_t hidden,
                   DType type) const {
    net->reduce_rows(dst, terms, next, bias, hidden, type);
  }
  template <class G>
  void reduce_encode(G, char* dst, Wire wire, const Terms& terms, const Terms* next, int64_t hidden,
                     DType type) const {
    net->reduce_encode(dst, wire, terms, next, hidden, type);
  }
  template <class G>
  void quantize_row(G, char* codes, char* scales, const char* row, int64_t hidden, DType type,
                    ScaleKind kind) const {
    net->quantize_row(codes, scales, row, hidden, type, kind);
  }
  Counters& counters() const { return net->rank(me).counters; }
  TermStore& terms(int which) const { return net->role().terms[which]; }
  char** targets() const { return net->role().targets; }
  static constexpr bool replicates(int) { return false; }  // ranks of a node have a link between them
};
static_assert(Fabric<SimFabric, Lane>);

}  // namespace moecomm
