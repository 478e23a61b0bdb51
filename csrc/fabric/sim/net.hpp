// SimNet and SimFabric: the Fabric of the sim world. All ranks run in one process and one thread. A role is a
// fiber, and all its accesses to memory and links take virtual time on modeled resources.
//
// Visibility is as weak as the Fabric contract allows: a put arrives later than it was issued (its source is
// read on arrival, unless chaos reads it at once), a row stored into another rank's window may become visible
// as late as the signal that releases it, and only what the contract orders is ordered.
//
// Without payload, row bytes are neither read nor written, but counters, tables and metadata are, because the
// protocol depends on them. Times and counts are the same as with payload. Then puts are visible at once, and
// counters change at once, together with the time of the change. Runs with payload and chaos check that the
// protocol never reads anything earlier.
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

// The traffic on a rank's links, counted by the links: independent of the protocol's own counters.
struct LinkCount {
  uint64_t row_bytes = 0;    // rows: puts into staging areas; row operations between ranks of a node
  uint64_t rows = 0;         // node hop: row operations that crossed
  uint64_t other_bytes = 0;  // counts, metadata, verdicts, signals
  uint64_t messages = 0;
};

// Division by a constant, for dividends whose product with it is below 2^64.
class Divisor {
 public:
  explicit Divisor(uint64_t by = 1) : magic_(by > 1 ? ~uint64_t{0} / by + 1 : 0) {}
  uint64_t quotient(uint64_t n) const {
    return magic_ ? static_cast<uint64_t>(static_cast<unsigned __int128>(n) * magic_ >> 64) : n;
  }

 private:
  uint64_t magic_;
};

// A node window and a rail region of every rank: the counterpart of a PeerMemory in the cpu world. A cluster
// has one space for dispatch and combine, and one for decode.
struct SimSpace {
  // Records of which only the first bytes are metadata. Without payload the rest is never touched, and would
  // spread the metadata over many pages. So only the metadata of a window's records is stored, contiguously.
  // Records that are put into a region are not even copied: a table has their addresses at the sender, which
  // does not change them until they have been read. All ranks share one table, because few of a rank's many
  // slots are filled.
  struct Records {
    uint64_t begin = 0, end = 0;  // offsets
    uint64_t stride = 1;
    uint64_t kept = 0;        // window: stored bytes of a record
    uint64_t per_source = 1;  // region: consecutive records of one source
    // Set by SimNet:
    uint64_t at = 0;        // window: offset in a rank's memory
    char** sent = nullptr;  // region: by slot, rank and source, the address of the record at the sender
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
  uint64_t window_counters = 0;  // bytes of counters and faults at its beginning
  uint64_t region_bytes = 0;
  uint64_t region_counters = 0;
  uint64_t region_rows = 0;  // puts to this offset or behind carry rows
  Records window_records, region_records;
  bool one_memory = false;       // the window is also the rail region
  bool peers_are_ranks = false;  // peers are numbered by rank; else by node
  uint64_t window_at = 0;        // offsets in a rank's memory; set by SimNet
  uint64_t region_at = 0;
};

struct SimRank {
  Geometry geometry;
  Counters counters;
  Calendar node_out, node_in, rail_out, rail_in;
  std::vector<Calendar> sms;  // row operations
  LinkCount rail_sent, node_moved;
  Time landed = 0;  // when the last put of this rank arrives
  struct Waiting {
    int fiber;
    const uint64_t* counter;
    uint64_t at_least;
  };
  std::vector<Waiting> waiting;
};

// A line of the log: an action of a role, from `begin` to `end`.
enum class LogKind : int32_t { role, wait, put, signal_rail, signal_node, landed, give_up };
struct LogLine {
  Time begin, end;
  LogKind kind;
  Phase phase;
  int32_t rank, channel, peer;
  const char* role;
  uint64_t offset, value;  // of the counter or put; the number of bytes, the addend or the awaited value
};

// When a role's puts arrive, by rank. They are only appended to a list; a long list is sorted by rank when it
// is first queried.
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
  std::vector<Time> last_;  // by rank; empty until the first query of a long list
};

// The state of a role.
struct RoleState {
  static constexpr int kInFlight = 4;  // the most rows that it may have in flight on a link
  static constexpr int kAllSms = -1;

  const char* name = "";
  int rank = 0;
  int channel = -1;
  int sm = kAllSms;
  int next_flight = 0;
  Time flight[kInFlight] = {};
  Time stores = 0;        // when its stores to other ranks are visible
  uint64_t at_least = 0;  // the value that it waits for
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
  // Orders its next signals after the stores and puts of another role.
  void comes_after(Time other_stores, const PutTimes& other_puts) {
    stores = std::max(stores, other_stores);
    puts.add(other_puts);
  }
};

class SimNet {
 public:
  static constexpr int kPoison = 0xA5;
  // The same offset on different ranks must not map to the same sets of the caches and the TLB.
  static constexpr uint64_t kSkew = 7 * 4096 + 192;

  SimNet(Geometry world, std::vector<SimSpace> spaces, Hardware hardware, int num_sms, bool payload);
  ~SimNet();
  SimNet(const SimNet&) = delete;
  SimNet& operator=(const SimNet&) = delete;

  // Resets the clock, counters and links. lead: how far roles may run ahead, in nanoseconds. With payload,
  // staging areas are filled with kPoison, and the rest of the windows (metadata and blocks) with `poison`.
  void reset(Chaos chaos, double lead = 0, int poison = kPoison);

  void start(int rank, const char* name, int channel, int sm, std::function<void()> body);
  void run();  // until every role has ended; in a deadlock the waits give up
  bool stuck() const { return !stuck_.empty(); }
  // The states of the waiting roles when the deadlock was found.
  const std::vector<RoleState>& stuck_roles() const { return stuck_; }

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

  // For fibers that wait for something inside their rank. In a deadlock they return without it.
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

  // The operations of the Fabric, for the running role.
  void put(int space, int peer, uint64_t offset, const char* src, uint64_t bytes);
  void signal_rail(int space, int peer, uint64_t counter, uint64_t add, bool ordered = true);
  void signal_node(int space, int local, uint64_t counter, uint64_t add);
  Status wait_rail(int space, uint64_t counter, uint64_t at_least, Phase phase, int peer) {
    return wait(counters_[space].rail, region(space, role().rank), counter, at_least, phase, peer);
  }
  Status wait_node(int space, uint64_t counter, uint64_t at_least, Phase phase, int peer) {
    return wait(counters_[space].node, window(space, role().rank), counter, at_least, phase, peer);
  }
  void finish_rows();  // until the row operations of this role are complete
  void flush();        // until all puts of this rank have arrived
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
  // The rank whose memory this is, as seen from rank `me`. Memory outside its node that it reads (records at
  // their sender) counts as its own, because it was put to it.
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
  char* base_ = nullptr;  // every rank's window, rail region and private memory, at rank << shift_
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
  static constexpr bool kPutsFromAnywhere = false;  // as on a GPU: sources of puts must be registered memory
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
  template <Group G>
  void copy_row(G, char* dst, const char* src, uint64_t bytes) const {
    net->copy_row(dst, src, bytes);
  }
  template <Group G>
  void spread_row(G, char* const* targets, int count, const char* src, uint64_t bytes) const {
    for (int i = 0; i < count; ++i) net->copy_row(targets[i], src, bytes);
  }
  template <Group G>
  void finish_rows(G) const {
    net->finish_rows();
  }
  template <Group G>
  void zero_row(G, char* dst, uint64_t bytes) const {
    net->zero_row(dst, bytes);
  }
  template <Group G>
  void reduce_rows(G, char* dst, const Terms& terms, const Terms* next, const float* bias, int64_t hidden,
                   DType type) const {
    net->reduce_rows(dst, terms, next, bias, hidden, type);
  }
  template <Group G>
  void reduce_encode(G, char* dst, Wire wire, const Terms& terms, const Terms* next, int64_t hidden,
                     DType type) const {
    net->reduce_encode(dst, wire, terms, next, hidden, type);
  }
  template <Group G>
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
