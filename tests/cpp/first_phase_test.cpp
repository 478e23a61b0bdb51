// FirstPhase: who waits sees what was written before `placed`, in every repetition of the call, and its end.
#include "runtime/cpu/first_phase.hpp"

#include <thread>
#include <vector>

#include "check.hpp"

using namespace moecomm;
using State = FirstPhase::State;

namespace {

// A call that is repeated `repetitions` times; its counts are those of the last one.
void rounds(bool fails, int repetitions) {
  FirstPhase phase;
  int counts = 0;
  std::vector<std::thread> waiting;
  for (int i = 0; i < 3; ++i)
    waiting.emplace_back([&] {
      State s = State::running;
      while ((s = phase.wait_for(1)) == State::running) std::this_thread::yield();
      CHECK(s == (fails ? State::over : State::placed));
      CHECK(fails || counts == repetitions);
    });
  for (int r = 1; r <= repetitions; ++r) {
    phase.begin();
    counts = r;
  }
  if (!fails) phase.placed();
  phase.end();
  for (std::thread& t : waiting) t.join();
  CHECK(phase.wait_for(0) == (fails ? State::over : State::placed));  // it stays
}

}  // namespace

TEST(waiting_threads_see_what_was_written) {
  for (int i = 0; i < 200; ++i) rounds(i % 2, 1 + i % 3);
}

TEST(waits_no_longer_than_asked) {
  FirstPhase never;
  CHECK(never.wait_for(1) == State::running);
}
