// A barrier for a small team inside one parallel region.
#pragma once

#include <atomic>

namespace fusedrnn {

struct alignas(64) Barrier {
  std::atomic<int> missing{0};   // members that have yet to arrive in this round
  alignas(64) std::atomic<unsigned> round{0};
  std::atomic<int> sleeping{0};  // members that wait in the kernel
  int members = 1;

  void reset(int team) {
    members = team;
    missing.store(team, std::memory_order_relaxed);
  }
};

}  // namespace fusedrnn
