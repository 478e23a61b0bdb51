#include "runtime/cpu/reach.hpp"

#include <cstring>
#include <random>
#include <stdexcept>

namespace moecomm {
namespace {

// What peers need to reach this rank's memories; under UCX the region's key follows.
struct Card {
  int32_t pid;
  int32_t fd;
  uint64_t window;  // address, for rank threads
  uint64_t rail;
  uint64_t bytes;
  Nonce nonce;
};

Nonce random_nonce() {
  std::random_device source;
  return {uint64_t{source()} << 32 | source(), uint64_t{source()} << 32 | source()};
}

Card read_card(const std::string& text) {
  Card c;
  std::memcpy(&c, text.data(), sizeof(c));
  return c;
}

}  // namespace

Reach::Reach(std::shared_ptr<Communicator> comm, ReachPlan plan)
    : comm_(std::move(comm)), plan_(std::move(plan)) {
  const Geometry& g = comm_->geometry();
  if (g.ranks_per_node > static_cast<int>(std::size(host_.windows)))
    throw std::invalid_argument("too many ranks in a node");
  window_ = Memory::create(plan_.window_bytes + sizeof(Nonce));
  nonce_ = random_nonce();
  std::memcpy(window_->data() + plan_.window_bytes, nonce_.data(), sizeof(Nonce));
  window_->populate(plan_.warm_bytes);
  if (comm_->rail() == RailKind::ucx) {
    std::lock_guard lock(comm_->calls());  // the rail's thread uses the same worker
    region_ = std::make_unique<UcxRegion>(*comm_->ucx(), plan_.region_bytes, plan_.region_counters);
    host_.rail_region = static_cast<char*>(region_->data());
    ucx_rail_.attach(comm_->ucx(), region_.get());
  } else {
    own_rail_ = Memory::create(plan_.region_bytes);
    own_rail_->populate(plan_.region_bytes);
    host_.rail_region = own_rail_->data();
  }
  host_.geometry = g;
  host_.window_faults = plan_.window_faults;
  host_.region_faults = plan_.region_faults;
  host_.fault_out = plan_.fault_out;
  host_.peer_ranks = plan_.peers;
  host_.own_peer = plan_.own;
  host_.watch = &comm_->watch();
  host_.call = &comm_->call();
}

// Puts of a call that did not wait for them are on their way still: peers may be waiting for what they carry.
Reach::~Reach() {
  comm_->leave(this);
  if (!region_ || !comm_->ucx()->is_here()) return;
  std::unique_lock lock(comm_->calls(), std::defer_lock);
  if (!comm_->calls().running()) lock.lock();  // make_owned() holds it already
  begin(false);
  if (comm_->broken().ok()) flush();
  region_.reset();
}

std::string Reach::card() const {
  Card c{};
  std::memcpy(&c.pid, comm_->card().data(), 4);
  c.fd = window_->fd();
  c.window = reinterpret_cast<uint64_t>(window_->data());
  c.rail = reinterpret_cast<uint64_t>(host_.rail_region);
  c.bytes = window_->bytes();
  c.nonce = nonce_;
  std::string card(bytes_of(&c), sizeof(c));
  if (region_) card += region_->key();
  return card;
}

void Reach::connect(const std::vector<std::string>& cards) {
  const Geometry& g = comm_->geometry();
  for (int local = 0; local < g.ranks_per_node; ++local) {
    const int rank = g.rank_at(g.node(), local);
    const Card c = read_card(cards[rank]);
    if (rank == g.rank) {
      host_.windows[local] = window_->data();
    } else if (comm_->threads()) {
      host_.windows[local] = reinterpret_cast<char*>(c.window);
    } else {
      peers_.push_back(Memory::map(c.pid, c.fd, c.bytes));
      if (std::memcmp(peers_.back()->data() + c.bytes - sizeof(Nonce), c.nonce.data(), sizeof(Nonce)) != 0)
        throw std::runtime_error(
            "descriptor " + std::to_string(c.fd) + " of process " + std::to_string(c.pid) +
            " is not the window of rank " + std::to_string(rank) +
            ": that process is another one here (ranks of a node must share a pid namespace)");
      peers_.back()->populate(plan_.warm_bytes);
      host_.windows[local] = peers_.back()->data();
    }
  }
  if (region_) {
    std::vector<std::string> keys;
    for (int rank : plan_.peers) keys.push_back(rank < 0 ? std::string() : cards[rank].substr(sizeof(Card)));
    std::lock_guard lock(comm_->calls());
    for (int rank : plan_.peers)
      if (rank >= 0) comm_->reach(rank);
    region_->attach(plan_.peers, keys);
  } else {
    std::vector<char*> regions;
    for (int rank : plan_.peers)
      regions.push_back(rank < 0 ? nullptr : reinterpret_cast<char*>(read_card(cards[rank]).rail));
    loopback_.attach(regions);
  }
}

void Reach::connected() {
  window_->share_with_children();  // from here on tensors view it
  number_ = comm_->join(this);
}

void Reach::tell(FaultWord word) {
  if (region_)
    publish_word(host_, ucx_rail_, word);
  else
    publish_word(host_, loopback_, word);
}

bool Reach::rail_is_mapped() const {
  for (int i = 0; region_ && i < static_cast<int>(plan_.peers.size()); ++i)
    if (plan_.peers[i] >= 0 && i != plan_.own) return region_->reach(i) != nullptr;
  return false;
}

void Reach::trace(bool on) {
  timeline_.clear();
  host_.timeline = on ? &timeline_ : nullptr;
}

void Reach::begin(bool stream) {
  host_.stream = stream;
  host_.begin(std::chrono::duration_cast<std::chrono::steady_clock::duration>(
      std::chrono::duration<double>(comm_->timeout())));
}

Status Reach::flush() {
  while (!region_->flush_poll()) {
    comm_->ucx()->progress();
    sched_yield();
    if (interrupted && interrupted()) return {Code::interrupted, Phase::flush, host_.geometry.rank, 0, 1, 0};
    host_.look(std::chrono::steady_clock::now());
    // UCX completes what was meant for a failed peer, with an error, so a peer that has left does no harm
    // here.
    if (host_.looked < host_.deadline) continue;
    if (const Status self = own_absence(host_, Phase::flush, -1, 1, 0); !self.ok()) return self;
    return settle_timeout(host_, ucx_rail_, {Code::timeout, Phase::flush, region_->slow_rank(), 0, 1, 0});
  }
  return {};
}

// Tells everyone within reach, so that they raise now instead of at their own deadline.
void Reach::report_fault(const Status& s) {
  if (s.code == Code::out_of_step)
    comm_->call().tell(pack_fault(s, s.reporter < 0 ? host_.geometry.rank : s.reporter)
                           .packed);  // others may wait elsewhere
  if (!region_) return publish_fault(host_, loopback_, s);
  publish_fault(host_, ucx_rail_, s);
  // A peer that is gone or stopped never takes its word: the others have had time enough then.
  const auto enough = std::chrono::steady_clock::now() + std::chrono::milliseconds(100);
  while (!region_->flush_poll() && std::chrono::steady_clock::now() < enough) {
    if (!comm_->ucx()->progress()) sched_yield();
  }
  comm_->ucx()->abandon();
}

}  // namespace moecomm
