// Fibers: many roles in one thread, ordered by a virtual clock.
//
// The earliest fiber runs. A fiber that advances past another one yields to it, so everything happens in the
// order of virtual time; ties are broken by the order of insertion. Nothing else has an influence, so a run
// is a pure function of what the fibers do. Events are callbacks at a given time. They run on the stack of
// the fiber that yielded, and must not advance or block.
//
// With a lead, a fiber may advance past others by up to the lead before it yields, and fibers that it starts
// or wakes run before others. This saves switches and keeps one rank's data in the caches. The fiber must
// then call meet() before it reads anything that other fibers or events write. Its own actions carry their
// own time and are not affected.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

namespace moecomm {

using Time = uint64_t;  // virtual picoseconds

class Fibers {
 public:
  using OnEvent = void (*)(void* self, uint32_t event);
  Fibers(void* self, OnEvent on_event) : self_(self), on_event_(on_event) {}
  ~Fibers();
  Fibers(const Fibers&) = delete;
  Fibers& operator=(const Fibers&) = delete;

  // May be called anywhere. A fiber's number is reused after its body has returned.
  int spawn(Time at, std::function<void()> body);
  void post(Time at, uint32_t event) { push({at, next_order_++, event | kEvent}); }
  // Ends the fiber's block().
  void wake(int fiber, Time at) { push({at, next_order_++, static_cast<uint32_t>(fiber)}); }

  // For the running fiber.
  int current() const { return current_; }
  Time now() const { return now_; }
  Time floor() const { return floor_; }  // no fiber that can run is earlier than this
  void advance(Time to) {                // moves the clock; other fibers may run in between
    if (to < now_) to = now_;
    if (may_go_on(to))
      now_ = to;
    else
      give_way(to);
  }
  void meet() {  // returns when everything before now() has happened
    if (!heap_.empty() && heap_[0].at < now_) give_way(now_);
  }
  // As wake(), for a fiber of the same rank.
  void wake_follower(int fiber, Time at) { follow({at, next_order_++, static_cast<uint32_t>(fiber)}); }
  void block() { switch_to(next()); }  // until wake()

  // Runs until no fiber can run. Fibers that are blocked then stay blocked unless they are woken.
  void run();
  // Resets the clock. Only when no fiber is alive.
  void restart(Time lead) {
    now_ = floor_ = 0;
    next_order_ = 0;
    lead_ = lead;
  }
  int alive() const { return alive_; }
  uint64_t switches() const { return switches_; }

 private:
  static constexpr uint32_t kEvent = 1u << 31;
  struct Item {
    Time at;
    uint32_t order;
    uint32_t what;  // fiber, or kEvent | event
    bool before(const Item& o) const { return at != o.at ? at < o.at : order < o.order; }
  };
  struct Fiber {
    void* stack = nullptr;  // only while its body runs
    void* context = nullptr;
    std::function<void()> body;
  };
  void push(Item item);
  Item pop();
  void follow(Item item) {
    if (lead_ > 0 && current_ >= 0)
      followers_.push_back(item);
    else
      push(item);
  }
  bool may_go_on(Time to) const {
    return (heap_.empty() || heap_[0].at + lead_ >= to) &&
           (next_follower_ == followers_.size() || followers_[next_follower_].at + lead_ >= to);
  }
  void give_way(Time to);
  int next();  // the earliest fiber, after the events before it; -1: none
  void switch_to(int fiber);
  void* take_stack();
  static void entry();

  void* self_;
  OnEvent on_event_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<int> idle_;
  std::vector<Item> heap_;       // 4-ary
  std::vector<Item> followers_;  // with a lead: fibers in the order in which they were started or woken
  size_t next_follower_ = 0;
  std::vector<void*> chunks_;  // memory of the stacks
  std::vector<void*> idle_stacks_;
  Fiber main_;
  int current_ = -1;
  int alive_ = 0;
  Time now_ = 0;
  Time floor_ = 0;
  Time lead_ = 0;
  uint32_t next_order_ = 0;
  uint64_t switches_ = 0;
};

}  // namespace moecomm
