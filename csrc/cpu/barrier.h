// A barrier for a small team inside one parallel region.
#pragma once

#include <atomic>

namespace fusedrnn {

// One cache line: who arrives last has it already when it ends the round. With the round on a line of its own, or
// with a line per member, two threads took 310 to 370 ns a round instead of 190 (docs/performance-cpu-story.md).
struct alignas(64) Barrier {
  std::atomic<int> missing{0};   // members that have yet to arrive in this round
  std::atomic<unsigned> round{0};
  std::atomic<int> sleeping{0};  // members that wait in the kernel
  int members = 1;

  void reset(int team) {
    members = team;
    missing.store(team, std::memory_order_relaxed);
  }
};

}  // namespace fusedrnn
