#include "exec/fiber.hpp"

#include <sys/mman.h>

#include <cstring>
#include <new>
#include <utility>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace moecomm {
namespace {

constexpr size_t kGuard = 4096;
constexpr size_t kStack = (128u << 10) - kGuard;  // touched pages alone cost memory
constexpr int kStacksPerChunk = 64;
constexpr size_t kGuardedChunks = 64;  // a guard costs two mappings, and their number per process is limited
thread_local Fibers* running = nullptr;  // handed to a fiber's first instruction

void unmap_stacks(void* chunk) {
  constexpr size_t kBytes = kStacksPerChunk * (kStack + kGuard);
#if defined(__SANITIZE_ADDRESS__)
  // Frames of fibers that have not ended leave their marks. The next mapping at this address would inherit
  // them.
  __asan_unpoison_memory_region(chunk, kBytes);
#endif
  munmap(chunk, kBytes);
}

}  // namespace

#if defined(__x86_64__)
// Saves the callee-saved registers, switches the stack, and restores them. ucontext would add two system
// calls for the signal mask, which would dominate the cost of a switch.
extern "C" void moecomm_switch_stack(void** save, void* load);
asm(R"(
.text
.globl moecomm_switch_stack
.hidden moecomm_switch_stack
.type moecomm_switch_stack,@function
moecomm_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size moecomm_switch_stack,.-moecomm_switch_stack
)");

namespace {
void* first_context(void* stack, void (*entry)()) {
  void** top = static_cast<void**>(static_cast<void*>(static_cast<char*>(stack) + kStack));
  *--top = nullptr;  // a return address for the entry, and its alignment
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  return top;
}
void swap(void** save, void* load) { moecomm_switch_stack(save, load); }
void free_context(void*) {}
}  // namespace
#else
namespace {
void* first_context(void* stack, void (*entry)()) {
  auto* c = new ucontext_t;
  getcontext(c);
  c->uc_stack.ss_sp = stack;
  c->uc_stack.ss_size = kStack;
  c->uc_link = nullptr;
  makecontext(c, entry, 0);
  return c;
}
void swap(void** save, void* load) {
  if (!*save) *save = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(*save), static_cast<ucontext_t*>(load));
}
void free_context(void* c) { delete static_cast<ucontext_t*>(c); }
}  // namespace
#endif

Fibers::~Fibers() {
#if !defined(__x86_64__)
  for (const auto& f : fibers_) free_context(f->context);
  free_context(main_.context);
#endif
  for (void* chunk : chunks_) unmap_stacks(chunk);
}

void Fibers::push(Item item) {
  heap_.push_back(item);
  size_t i = heap_.size() - 1;
  while (i > 0) {
    const size_t parent = (i - 1) / 4;
    if (!item.before(heap_[parent])) break;
    heap_[i] = heap_[parent];
    i = parent;
  }
  heap_[i] = item;
}

Fibers::Item Fibers::pop() {
  const Item top = heap_[0], last = heap_.back();
  heap_.pop_back();
  const size_t n = heap_.size();
  if (n == 0) return top;
  size_t i = 0;
  for (;;) {
    const size_t first = 4 * i + 1;
    if (first >= n) break;
    size_t least = first;
    const size_t end = first + 4 < n ? first + 4 : n;
    for (size_t c = first + 1; c < end; ++c)
      if (heap_[c].before(heap_[least])) least = c;
    if (!heap_[least].before(last)) break;
    heap_[i] = heap_[least];
    i = least;
  }
  heap_[i] = last;
  return top;
}

int Fibers::spawn(Time at, std::function<void()> body) {
  int id;
  if (idle_.empty()) {
    id = static_cast<int>(fibers_.size());
    fibers_.push_back(std::make_unique<Fiber>());
  } else {
    id = idle_.back();
    idle_.pop_back();
  }
  fibers_[id]->body = std::move(body);
  ++alive_;
  follow({at, next_order_++, static_cast<uint32_t>(id)});
  return id;
}

void* Fibers::take_stack() {
  if (idle_stacks_.empty()) {
    void* chunk = mmap(nullptr, kStacksPerChunk * (kStack + kGuard), PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (chunk == MAP_FAILED) throw std::bad_alloc();
    chunks_.push_back(chunk);
    for (int i = 0; i < kStacksPerChunk; ++i) {
      char* guard = static_cast<char*>(chunk) + i * (kStack + kGuard);
      if (chunks_.size() <= kGuardedChunks) mprotect(guard, kGuard, PROT_NONE);  // an overflow stops here
      idle_stacks_.push_back(guard + kGuard);
    }
  }
  void* stack = idle_stacks_.back();
  idle_stacks_.pop_back();
  return stack;
}

void Fibers::give_way(Time to) {
  push({to, next_order_++, static_cast<uint32_t>(current_)});
  switch_to(next());
}

int Fibers::next() {
  while (next_follower_ < followers_.size()) {
    const Item item = followers_[next_follower_++];
    if (next_follower_ == followers_.size()) {
      followers_.clear();
      next_follower_ = 0;
    }
    if (heap_.empty() || heap_[0].at + lead_ >= item.at) {
      now_ = item.at;
      return static_cast<int>(item.what);
    }
    push(item);
  }
  while (!heap_.empty()) {
    const Item item = pop();
    now_ = floor_ = item.at;
    if (!(item.what & kEvent)) return static_cast<int>(item.what);
    on_event_(self_, item.what & ~kEvent);
  }
  return -1;
}

void Fibers::switch_to(int fiber) {
  if (fiber == current_) return;
  Fiber& from = current_ < 0 ? main_ : *fibers_[current_];
  Fiber& to = fiber < 0 ? main_ : *fibers_[fiber];
  if (fiber >= 0 && !to.stack) {
    to.stack = take_stack();
    free_context(to.context);
    to.context = first_context(to.stack, &Fibers::entry);
  }
  current_ = fiber;
  ++switches_;
  running = this;
  swap(&from.context, to.context);
}

// When a fiber ends and the next one has not started yet, the next one runs on the same stack. So most fibers
// never need a stack of their own.
void Fibers::entry() {
  Fibers& self = *running;
  for (;;) {
    Fiber& ended = *self.fibers_[self.current_];
    ended.body();
    ended.body = nullptr;
    void* stack = std::exchange(ended.stack, nullptr);
    self.idle_.push_back(self.current_);
    --self.alive_;
    const int next = self.next();
    if (next < 0 || self.fibers_[next]->stack) {
      self.idle_stacks_.push_back(stack);  // free once this has switched away
      self.switch_to(next);
      __builtin_unreachable();
    }
    self.fibers_[next]->stack = stack;
    self.current_ = next;
  }
}

void Fibers::run() { switch_to(next()); }

}  // namespace moecomm
