#include "barrier.h"

#include "scan.h"
#include "team.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fusedrnn {
namespace {

// Some microseconds, as most waits are.
constexpr int kSpins = 1000;

void sleep_until_round_ends(Barrier& b, unsigned round) {
#if defined(__linux__)
  b.sleeping.fetch_add(1, std::memory_order_seq_cst);
  // The kernel compares again: a round that ended meanwhile does not put anybody to sleep.
  syscall(SYS_futex, reinterpret_cast<unsigned*>(&b.round), FUTEX_WAIT_PRIVATE, round, nullptr, nullptr, 0);
  b.sleeping.fetch_sub(1, std::memory_order_relaxed);
#endif
}

}  // namespace

void barrier_wait(Barrier* barrier) {
  Barrier& b = *barrier;
  const unsigned round = b.round.load(std::memory_order_relaxed);
  if (b.missing.fetch_sub(1, std::memory_order_acq_rel) == 1) {
    b.missing.store(b.members, std::memory_order_relaxed);
    b.round.store(round + 1, std::memory_order_seq_cst);
#if defined(__linux__)
    if (b.sleeping.load(std::memory_order_seq_cst) != 0) {
      syscall(SYS_futex, reinterpret_cast<unsigned*>(&b.round), FUTEX_WAKE_PRIVATE, b.members, nullptr, nullptr, 0);
    }
#endif
    return;
  }
  const auto is_over = [&] { return b.round.load(std::memory_order_acquire) != round; };
  for (int i = 0; i < kSpins; ++i) {
    if (is_over()) return;
    relax();
  }
  // A member that sleeps comes back a turn of the scheduler later, beside busy processes, and that at every step. One
  // that spins loses no more than its own share, and goes on whenever its mates run too.
  Wait wait;
  while (!is_over()) {
    if (!wait.once()) sleep_until_round_ends(b, round);
  }
}

}  // namespace fusedrnn
