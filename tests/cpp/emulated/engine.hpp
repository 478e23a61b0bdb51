// The copy engine of one warp, as free as its rules allow, by turns as lazy and as eager. A load reads its
// source when it is started, or when its barrier is waited for. A store reads its stage and writes at once,
// or reads when wait_group.read asks for it and is seen by others when a proxy fence follows wait_group.
#pragma once
#include <cstdint>
#include <deque>
#include <map>
#include <vector>

#include "trouble.hpp"

namespace emulated {

struct Engine {
  struct Load {
    void* stage;
    const void* from;
    uint32_t bytes;
    std::vector<char> early;
  };
  struct Store {
    void* to;
    const void* stage;
    uint32_t bytes;
    std::vector<char> data;
  };
  struct Group {
    std::vector<Store> stores;
    bool read = false;
  };
  std::map<uint64_t*, Load> loads;
  Group open;
  std::deque<Group> groups;
  std::vector<Store> unseen;  // complete, but no fence has followed
  bool stale = false;         // what others have stored may not have come to the engine: a fence is due
  uint64_t turns = 0;

  bool eager() { return ++turns % 3 == 0; }
  bool quiet() const { return open.stores.empty() && groups.empty() && unseen.empty(); }
  void read(Group& g) {
    if (!g.read)
      for (Store& s : g.stores)
        s.data.assign(static_cast<const char*>(s.stage), static_cast<const char*>(s.stage) + s.bytes);
    g.read = true;
  }
  bool in_use(const void* stage, uint32_t bytes) const {
    const auto* begin = static_cast<const char*>(stage);
    for (const Group& g : groups)
      for (const Store& s : g.stores)
        if (!g.read && static_cast<const char*>(s.stage) < begin + bytes &&
            begin < static_cast<const char*>(s.stage) + s.bytes)
          return true;
    return false;
  }
};

}  // namespace emulated
