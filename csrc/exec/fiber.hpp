// Fibers: many roles in one thread, ordered by a virtual clock.
//
// Whoever is earliest runs: a fiber that advances past another one gives way to it, so everything that
// happens, happens in the order of virtual time; ties go to who came first. Nothing else decides, so a
// run is a pure function of what the fibers do. Events are callbacks at a time; they run on the stack of
// whoever gave way and must not advance or block.
//
// With a lead, a fiber may advance past others by up to the lead before it gives way, and fibers that it
// starts or wakes go on before others: fewer switches, and one rank's data stays in the caches. It must then
// meet() the others before it looks at anything that they or events write; what it does itself carries its
// own time and is not affected.
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

  // From anywhere. A fiber's number is free again once its body has returned.
  int spawn(Time at, std::function<void()> body);
  void post(Time at, uint32_t event) { push({at, next_order_++, event | kEvent}); }
  void wake(int fiber, Time at) {
    push({at, next_order_++, static_cast<uint32_t>(fiber)});
  }  // ends its block()

  // From the running fiber.
  int current() const { return current_; }
  Time now() const { return now_; }
  Time floor() const { return floor_; }  // no fiber that can go on is behind it
  void advance(Time to) {                // the clock moves on; others may run in between
    if (to < now_) to = now_;
    if (may_go_on(to))
      now_ = to;
    else
      give_way(to);
  }
  void meet() {  // nothing earlier than now is left to happen
    if (!heap_.empty() && heap_[0].at < now_) give_way(now_);
  }
  void wake_follower(int fiber, Time at) {
    follow({at, next_order_++, static_cast<uint32_t>(fiber)});
  }  // a role of the same rank
  void block() { switch_to(next()); }  // until wake()

  // Runs until nobody can go on. Fibers that are still blocked then are blocked for ever, unless woken.
  void run();
  void restart(Time lead) {
    now_ = floor_ = 0;
    next_order_ = 0;
    lead_ = lead;
  }  // the clock; only when no fiber is alive
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
    void* stack = nullptr;  // from its first instruction to its last
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
  std::vector<Item> followers_;  // with a lead: in the order in which they were started or woken
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
