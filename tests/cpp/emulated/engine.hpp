// The copy engine of one warp. It uses all freedom that its rules allow, and is alternately as lazy and as
// eager as possible. A load reads its source when it is started, or only when its barrier is awaited. A store
// reads its stage and writes at once; or it reads only at wait_group.read, and becomes visible only at a
// proxy fence after wait_group.
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
  bool stale = false;         // the engine may not see the stores of others: a fence is needed
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
