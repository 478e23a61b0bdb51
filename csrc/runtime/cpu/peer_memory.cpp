#include "runtime/cpu/peer_memory.hpp"

#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>

namespace moecomm {
namespace {

// What peers need to access this rank's memory. With UCX the region's key follows.
struct Contact {
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

Contact read_contact(const std::string& text) {
  Contact c;
  std::memcpy(&c, text.data(), sizeof(c));
  return c;
}

}  // namespace

PeerMemory::PeerMemory(std::shared_ptr<Communicator> comm, PeerMemoryLayout plan)
    : comm_(std::move(comm)), plan_(std::move(plan)) {
  const Geometry& g = comm_->geometry();
  if (g.ranks_per_node > static_cast<int>(std::size(host_.windows)))
    throw std::invalid_argument("too many ranks in a node");
  window_ = Memory::create(plan_.window_bytes + sizeof(Nonce));
  nonce_ = random_nonce();
  std::memcpy(window_->data() + plan_.window_bytes, nonce_.data(), sizeof(Nonce));
  if (!comm_->populates_lazily()) window_->populate(plan_.warm_bytes);
  if (comm_->rail() == RailKind::ucx) {
    std::lock_guard lock(comm_->calls());  // the rail's thread uses the same worker
    region_ = plan_.one_memory
                  ? std::make_unique<UcxRegion>(*comm_->ucx(), window_, window_->data(), plan_.region_bytes,
                                                plan_.region_counters)
                  : std::make_unique<UcxRegion>(*comm_->ucx(), plan_.region_bytes, plan_.region_counters);
    host_.rail_region = static_cast<char*>(region_->data());
    ucx_rail_.attach(comm_->ucx(), region_.get());
  } else if (plan_.one_memory) {
    host_.rail_region = window_->data();
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
  host_.beats = comm_->beats();
}

// Puts of a call that did not wait for them may still be in flight, and peers may wait for them.
PeerMemory::~PeerMemory() {
  comm_->leave(this);
  if (!region_ || !comm_->ucx()->is_here()) return;
  std::unique_lock lock(comm_->calls(), std::defer_lock);
  if (!comm_->calls().running()) lock.lock();  // make_owned() holds it already
  begin(false);
  if (comm_->broken().ok()) flush();
  region_.reset();
}

std::string PeerMemory::contact() const {
  Contact c{};
  std::memcpy(&c.pid, comm_->contact().data(), 4);
  c.fd = window_->fd();
  c.window = address_of(window_->data());
  c.rail = address_of(host_.rail_region);
  c.bytes = window_->bytes();
  c.nonce = nonce_;
  std::string contact(bytes_of(&c), sizeof(c));
  if (region_) contact += region_->key();
  return contact;
}

// With one_memory, maps the memory of ranks of other nodes on this host, like that of node peers.
std::vector<char*> PeerMemory::map_peers_on_host(const std::vector<std::string>& contacts) {
  std::vector<char*> mapped(plan_.peers.size(), nullptr);
  const char* setting = std::getenv("MOECOMM_UCX_DIRECT");
  if (!plan_.one_memory || comm_->threads() || (setting && std::strcmp(setting, "0") == 0)) return mapped;
  for (size_t i = 0; i < plan_.peers.size(); ++i) {
    const int rank = plan_.peers[i];
    if (rank < 0 || !comm_->on_this_host(rank)) continue;
    const Contact c = read_contact(contacts[rank]);
    std::shared_ptr<Memory> memory;
    try {
      memory = Memory::map(c.pid, c.fd, c.bytes);
    } catch (const std::runtime_error&) {
      continue;  // it belongs to another user: use the network
    }
    if (std::memcmp(memory->data() + c.bytes - sizeof(Nonce), c.nonce.data(), sizeof(Nonce)) != 0) continue;
    peers_.push_back(memory);
    mapped[i] = memory->data();
  }
  return mapped;
}

void PeerMemory::connect(const std::vector<std::string>& contacts) {
  const Geometry& g = comm_->geometry();
  for (int local = 0; local < g.ranks_per_node; ++local) {
    const int rank = g.rank_at(g.node(), local);
    const Contact c = read_contact(contacts[rank]);
    if (rank == g.rank) {
      host_.windows[local] = window_->data();
    } else if (comm_->threads()) {
      host_.windows[local] = memory_at(c.window);
    } else {
      peers_.push_back(Memory::map(c.pid, c.fd, c.bytes));
      if (std::memcmp(peers_.back()->data() + c.bytes - sizeof(Nonce), c.nonce.data(), sizeof(Nonce)) != 0)
        throw std::runtime_error(
            "descriptor " + std::to_string(c.fd) + " of process " + std::to_string(c.pid) +
            " is not the window of rank " + std::to_string(rank) +
            ": this pid is another process here (ranks of a node must share a pid namespace)");
      if (!comm_->populates_lazily()) peers_.back()->populate(plan_.warm_bytes);
      host_.windows[local] = peers_.back()->data();
    }
  }
  if (region_) {
    std::vector<std::string> keys;
    for (int rank : plan_.peers)
      keys.push_back(rank < 0 ? std::string() : contacts[rank].substr(sizeof(Contact)));
    std::lock_guard lock(comm_->calls());
    for (int rank : plan_.peers)
      if (rank >= 0) comm_->open_endpoint(rank);
    region_->attach(plan_.peers, keys, map_peers_on_host(contacts));
  } else {
    std::vector<char*> regions;
    for (int rank : plan_.peers)
      regions.push_back(rank < 0 ? nullptr : memory_at(read_contact(contacts[rank]).rail));
    loopback_.attach(regions);
  }
  comm_->join(this);
}

void PeerMemory::finish_connect() {
  window_->share_with_children();  // tensors may view it from here on
  number_ = comm_->number();
}

void PeerMemory::publish(FaultWord word) {
  if (region_)
    publish_word(host_, ucx_rail_, word);
  else
    publish_word(host_, loopback_, word);
}

void PeerMemory::continue_without(const std::vector<uint8_t>& masked, int peer, uint64_t calls) {
  comm_->mark_broken({Code::lost, Phase::none, peer});
  comm_->skip_calls_to(calls);
  continues_ = true;
  broken_ = {};
  host_.masked = masked;
  const Geometry& g = host_.geometry;
  for (int i = 0; i < g.ranks_per_node; ++i)
    counter_at(host_.windows[g.local()], (host_.window_faults + i).value).store(0, std::memory_order_release);
  for (int i = 0; i < static_cast<int>(host_.peer_ranks.size()); ++i)
    counter_at(host_.rail_region, (host_.region_faults + i).value).store(0, std::memory_order_release);
}

bool PeerMemory::rail_is_mapped() const {
  for (int i = 0; region_ && i < static_cast<int>(plan_.peers.size()); ++i)
    if (plan_.peers[i] >= 0 && i != plan_.own) return region_->reach(i) != nullptr;
  return false;
}

void PeerMemory::trace(bool on) {
  timeline_.clear();
  host_.timeline = on ? &timeline_ : nullptr;
}

void PeerMemory::begin(bool stream) {
  host_.stream = stream;
  host_.begin(std::chrono::duration_cast<std::chrono::steady_clock::duration>(
      std::chrono::duration<double>(comm_->timeout())));
}

Status PeerMemory::flush() {
  if (!region_) return {};
  while (!region_->flush_poll()) {
    comm_->ucx()->progress();
    sched_yield();
    if (interrupted && interrupted()) return {Code::interrupted, Phase::flush, host_.geometry.rank, 0, 1, 0};
    host_.check_absence(std::chrono::steady_clock::now());
    // UCX completes the operations for a failed peer with an error, so a peer that has left does not block
    // this loop.
    host_.check_beat(region_->slow_rank(), host_.checked);
    if (host_.checked < host_.deadline) continue;
    if (const Status self = own_absence(host_, Phase::flush, -1, 1, 0); !self.ok()) return self;
    return blame_timeout(host_, ucx_rail_, {Code::timeout, Phase::flush, region_->slow_rank(), 0, 1, 0});
  }
  return {};
}

// Reports a failure to all peers within reach, so that they raise now and not at their own deadline.
void PeerMemory::report_fault(const Status& s) {
  if (s.code == Code::out_of_step)
    // Through every PeerMemory, because other ranks may wait in another call.
    comm_->call().announce(pack_fault(s, s.reporter < 0 ? host_.geometry.rank : s.reporter).packed);
  report(s);
  if (region_) comm_->ucx()->abandon();
}

void PeerMemory::report(const Status& s) {
  if (!region_) return publish_fault(host_, loopback_, s);
  publish_fault(host_, ucx_rail_, s);
  // Bounded, because a peer that is lost or stopped never completes its puts.
  const auto enough = std::chrono::steady_clock::now() + std::chrono::milliseconds(100);
  while (!region_->flush_poll() && std::chrono::steady_clock::now() < enough) {
    if (!comm_->ucx()->progress()) sched_yield();
  }
}

}  // namespace moecomm
