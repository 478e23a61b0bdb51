// The copy engine of one warp, as lazy as its rules allow: a load fills its stage when its barrier is waited for, a store
// reads its stage when wait_group.read asks for it and writes when wait_group does.
#pragma once
#include <cstdint>
#include <deque>
#include <map>
#include <vector>

namespace emulated {

struct Engine {
  struct Load { void* stage; const void* from; uint32_t bytes; };
  struct Store { void* to; const void* stage; uint32_t bytes; std::vector<char> data; };
  struct Group { std::vector<Store> stores; bool read = false; };
  std::map<uint64_t*, Load> loads;
  Group open;
  std::deque<Group> groups;

  void read(Group& g) {
    if (!g.read)
      for (Store& s : g.stores) s.data.assign(static_cast<const char*>(s.stage), static_cast<const char*>(s.stage) + s.bytes);
    g.read = true;
  }
  bool in_use(const void* stage, uint32_t bytes) const {
    const auto* begin = static_cast<const char*>(stage);
    for (const Group& g : groups)
      for (const Store& s : g.stores)
        if (!g.read && static_cast<const char*>(s.stage) < begin + bytes && begin < static_cast<const char*>(s.stage) + s.bytes) return true;
    return false;
  }
};

}  // namespace emulated
