// A GPU's blocks, warps and lanes as data: every lane has a program counter of its own, a register is 32
// values, and lanes that stand at the same instruction run it together. Nothing here is a thread or a fiber,
// so who goes on next is free to choose.
#pragma once
#include <array>
#include <bit>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "clocks.hpp"

namespace simt {

struct Warp;
struct Ins;
using Handler = void (*)(Warp&, const Ins&, Mask);

enum class Kind : uint8_t { plain, branch, call, leave, collective, barrier, poll };
enum class Space : uint8_t { global, shared, param, local };  // a generic address is global or shared

// What an instruction has cost while costs were counted (costs.hpp).
struct Cost {
  uint64_t runs = 0;       // by warps, or by parts of them that have parted
  uint64_t waits[2] = {};  // latencies that nothing hid: of peers' memory, of this GPU's
  uint64_t bytes[2] = {};  // loaded from there
};

struct Ins {
  Handler run = nullptr;
  Kind kind = Kind::plain;
  Order order = Order::weak;
  Scope scope = Scope::none;
  int32_t guard = -1;   // predicate * 2 + negated; -1: none
  int32_t r[7] = {};    // places
  int64_t integer = 0;  // offset, target or count
  int32_t line = 0;     // of the PTX
  int32_t file = 0, source = 0;
  uint16_t op = 0;                // index of its name
  uint8_t reads = 0, writes = 0;  // bit k: place k is a register of that kind
  mutable bool reached = false;   // has run
  mutable Cost cost;
};

struct Function {
  std::string name;
  int begin = 0, end = 0;
  bool entry = false;
  uint64_t parameter_bytes = 0;
  std::vector<std::pair<uint64_t, uint64_t>> parameters;  // of an entry: offset, bytes
};

// A translated module.
struct Program {
  std::string path;
  std::vector<Ins> code;
  std::vector<Function> functions;
  std::map<int, std::string> files;
  std::vector<std::pair<int, uint64_t>> constants;
  int slots = 0, predicates = 0;
  uint64_t local_bytes = 0, shared_bytes = 0;

  const Function& entry(const std::string& part) const;  // the one whose name has `part` in it
  std::string where(const Ins& i) const;
};
Program load_program(const std::string& path);
void mutate(Ins& i, bool drop, int order, int scope, int64_t integer);  // -1: as it is; the integer is added
const std::vector<std::string>& operation_names();

// What an operation is run by.
struct Operation {
  Handler run;
  Kind kind;
};
void add_operations(std::map<std::string, Operation>& all);  // every file's

struct Mbarrier {
  uint32_t count = 0, pending = 0, phase = 0;
  int64_t bytes = 0;
  uint64_t polls = 0;
  int maker = -1;                   // the thread of the block that has made it
  bool fenced = false;              // since then by a proxy fence of its maker: the engine knows it
  uint32_t due[2] = {};             // when its loads have come, by both clocks of costs.hpp
  Views arriving = {}, ended = {};  // in this phase; by the last one
};

struct BulkLoad {
  uint32_t to;
  const char* from;
  uint32_t bytes, barrier;
  std::vector<char> early;
  const Ins* ins;
  int lane;
  int wait;
  Agents* engine = nullptr;
  uint32_t at = 0;
};
struct BulkStore {
  char* to;
  uint32_t from;
  uint32_t bytes;
  std::vector<char> data;
  const Ins* ins;
  bool read = false;
  uint32_t read_at = 0, write_at = 0;
};
struct BulkGroup {
  std::vector<BulkStore> stores;
};

// The copy engine as one lane uses it.
struct Engine {
  std::vector<BulkStore> open;
  std::deque<BulkGroup> groups;
  std::vector<BulkStore> unseen;  // complete, but no proxy fence has followed
  bool stale = false;             // what lanes have stored may not have come to the engine: a fence is due
  bool quiet() const { return open.empty() && groups.empty() && unseen.empty(); }
};

// Two clocks of a warp: how many loads in a row it has waited for (costs.hpp).
struct WarpCosts {
  uint32_t now[2] = {}, stored[2] = {};        // stored: when its bulk stores are complete
  std::vector<std::array<uint32_t, 2>> ready;  // by register
};

// What a multiprocessor's cache holds of global memory, by 32 bytes: under a seed, ordinary loads may be
// answered from it until a lane of the block acquires (or a fence does) beyond the block.
class StaleCache {
 public:
  // Bytes as an ordinary load may see them: those in memory, or older ones.
  void read(const char* p, void* to, uint32_t bytes, bool fresh);
  void wrote(const char* p, const void* from, uint32_t bytes);  // by this block: seen by it at once
  void drop(const char* p, uint32_t bytes);                     // a strong access has gone to memory
  void empty() { lines_.clear(); }

 private:
  static constexpr uintptr_t kLine = 32;
  std::unordered_map<uintptr_t, std::array<char, kLine>> lines_;
};

struct Grid;
struct Block;

struct Warp {
  Grid* grid = nullptr;
  Block* block = nullptr;
  int index = 0;               // in the block
  std::vector<uint64_t> file;  // [slots][32]
  std::vector<Mask> predicates;
  std::vector<char> locals;  // [32][local_bytes]
  int pc[kLanes] = {};
  std::vector<int> back[kLanes];  // return addresses
  Mask exited = 0, collecting = 0,
       waiting = 0;  // lanes; collecting: at a collective; waiting: at a barrier of the block
  std::unique_ptr<Engine> engines[kLanes];
  WarpOrder order;
  WarpCosts costs;

  uint64_t* reg(int slot) { return file.data() + int64_t{slot} * kLanes; }
  Mask pred(int p) const { return p >= 0 ? predicates[p] : p == -2 ? kAll : 0; }
  Engine& engine(int lane) {
    if (!engines[lane]) engines[lane] = std::make_unique<Engine>();
    return *engines[lane];
  }
  bool done() const { return exited == kAll; }
  bool is_parameter(const char* p) const;  // of the launch: nothing writes them
  // Where an address lies on this machine, after checks of alignment and bounds.
  char* at(const Ins& i, int lane, Space space, uint64_t address, uint32_t bytes);
  // Runs until it has nothing to do or `budget` instructions have run; whether anything but polls has
  // happened.
  bool step(int budget);
  [[noreturn]] void fault(const Ins& i, int lane, const std::string& what) const;

 private:
  Mask choose(int& at);
  bool meet(const Ins& i, int at, Mask lanes);
  bool meet_block(const Ins& i, Mask lanes);
  uintptr_t known_begin_ = 0, known_end_ = 0;
  uint64_t known_version_ = 0;
};

struct NamedBarrier {
  int expected = 0, arrived = 0;
  std::vector<std::pair<Warp*, Mask>> lanes;
};

struct Block {
  int index = 0;
  std::unique_ptr<char, void (*)(void*)> shared{nullptr, nullptr};
  uint64_t shared_bytes = 0;
  NamedBarrier barriers[16];
  std::map<uint32_t, Mbarrier> mbarriers;
  std::vector<BulkLoad> loads;  // under way
  std::deque<Warp> warps;

  StaleCache cache;

  bool is_shared(uint64_t address) const {
    return address - reinterpret_cast<uintptr_t>(shared.get()) < shared_bytes;
  }
  bool done() const {
    for (const Warp& w : warps)
      if (!w.done()) return false;
    return true;
  }
};

struct Extent {
  const void* begin;
  uint64_t bytes;
};  // memory of a launch that no allocator of the GPU has given

struct Launch {
  const Program* program;
  std::string kernel;  // part of its name
  int blocks, threads;
  uint64_t shared_bytes;  // dynamic
  std::vector<char> parameters;
  std::vector<Extent> extents;
  std::vector<Extent> peers;  // windows of other ranks
  int rank = -1;
};

// How launches are run: by every launch of this process.
struct Settings {
  uint64_t seed = 0;  // 0: warps in turn, lanes as together as they can be
  int room = 132;     // blocks that are resident at once, over all ranks
};
Settings& settings();

struct Grid {
  explicit Grid(const Launch& launch);
  void run();  // to its end; throws std::runtime_error with what a check has found

  const Launch& launch;
  const Program& program;
  const Function& kernel;
  const uint64_t seed;  // 0: see Settings
  std::mt19937_64 random;
  std::deque<Block> resident;
  static thread_local int latest_rank;  // of the kernels that this thread has run; -1: none
  Shared before, after;                 // of memory: what the rank's kernels had done, what this one has done
  uint64_t turns = 0;

  bool chance(int of) { return seed ? random() % of == 0 : ++turns % of == 0; }

 private:
  Block& open_block(int index);
};

inline bool Warp::is_parameter(const char* p) const {
  const auto& all = grid->launch.parameters;
  return p >= all.data() && p < all.data() + all.size();
}

// A value of type T in a register, and back.
template <class T>
inline T get(uint64_t v) {
  if constexpr (std::is_same_v<T, float>)
    return std::bit_cast<float>(static_cast<uint32_t>(v));
  else if constexpr (std::is_same_v<T, double>)
    return std::bit_cast<double>(v);
  else
    return static_cast<T>(v);
}
template <class T>
inline uint64_t bits(T v) {
  if constexpr (std::is_same_v<T, float>)
    return std::bit_cast<uint32_t>(v);
  else if constexpr (std::is_same_v<T, double>)
    return std::bit_cast<uint64_t>(v);
  else
    return static_cast<std::make_unsigned_t<T>>(v);
}

template <class F>
inline void each(Mask m, F&& f) {
  if (m == kAll)
    for (int l = 0; l < kLanes; ++l) f(l);
  else
    for (; m; m &= m - 1) f(std::countr_zero(m));
}

}  // namespace simt
