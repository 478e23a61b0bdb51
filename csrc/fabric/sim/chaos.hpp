// Chaos: the random decisions that make schedules differ. A pure function of its seed.
#pragma once
#include "exec/fiber.hpp"
#include "fabric/sim/links.hpp"

namespace moecomm {

// Off: delays have their usual values. On: up to `budget` delays are drawn at random, and all later ones have
// their usual values. Reducing the budget reduces a failing schedule to the perturbations that matter.
class Chaos {
 public:
  Chaos() = default;
  Chaos(uint64_t seed, uint64_t budget)
      : on_(true), budget_(budget), state_(seed * 0x9E3779B97F4A7C15ull + 0x1234567) {}

  bool on() const { return on_; }
  uint64_t drawn() const { return drawn_; }

  uint64_t below(uint64_t n) { return n ? next() % n : 0; }

  // The delay of something that usually takes `usual`: often short, sometimes many times as long.
  Time delay(Time usual) {
    if (!perturb()) return usual;
    switch (next() & 7) {
      case 0: return 0;
      case 1:
      case 2:
      case 3: return below(2 * usual + 1);
      case 4:
      case 5:
      case 6: return below(picoseconds(20'000));
      default: return below(picoseconds(300'000));
    }
  }
  // A rare pause of a rank, at any step.
  Time pause() { return on_ && (next() & 63) == 0 && perturb() ? below(picoseconds(100'000)) : 0; }
  bool coin() { return on_ && (next() & 1); }

 private:
  bool perturb() {
    if (!on_ || drawn_ >= budget_) return false;
    ++drawn_;
    return true;
  }
  uint64_t next() {  // splitmix64
    uint64_t z = (state_ += 0x9E3779B97F4A7C15ull);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
  }
  bool on_ = false;
  uint64_t budget_ = 0;
  uint64_t drawn_ = 0;
  uint64_t state_ = 0;
};

}  // namespace moecomm
