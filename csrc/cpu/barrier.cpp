#include "barrier.h"

#include <sched.h>

#include "scan.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fusedrnn {
namespace {

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A few milliseconds, a turn of the scheduler: beside busy processes a member that sleeps comes back a turn
// later, at every step. One that spins loses no more than its own share, and goes on whenever its mates run too.
constexpr int kSpins = 300000;
constexpr int kYields = 8;

void sleep_until_round_ends(Barrier& b, unsigned round) {
#if defined(__linux__)
  b.sleeping.fetch_add(1, std::memory_order_seq_cst);
  // The kernel compares again: a round that ended meanwhile does not put anybody to sleep.
  syscall(SYS_futex, reinterpret_cast<unsigned*>(&b.round), FUTEX_WAIT_PRIVATE, round, nullptr, nullptr, 0);
  b.sleeping.fetch_sub(1, std::memory_order_relaxed);
#else
  sched_yield();
#endif
}

}  // namespace

void wait_a_little(int times) {
  if (times < kSpins / 16) {
    for (int i = 0; i < 16; ++i) relax();
  } else {
    sched_yield();
  }
}

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
  for (int i = 0; i < kSpins; ++i) {
    if (b.round.load(std::memory_order_acquire) != round) return;
    relax();
  }
  for (int i = 0; i < kYields; ++i) {
    sched_yield();
    if (b.round.load(std::memory_order_acquire) != round) return;
  }
  while (b.round.load(std::memory_order_acquire) == round) sleep_until_round_ends(b, round);
}

}  // namespace fusedrnn
