// A function on a team of threads: OpenMP's, as many as get a core.
//
// Beside other work a member that has no core keeps its mates waiting for a turn of the scheduler (some milliseconds),
// at every barrier. One thread more then costs more than it brings, so teams whose members had no core become smaller
// for a while. A member that waits for one on its own core gives the core up; for one elsewhere it spins, as other work
// would keep a core that is given up for a whole turn.
#pragma once

#include <omp.h>
#include <stdint.h>

#include <algorithm>
#include <atomic>

namespace fusedrnn {

// How large teams may be. Times are nanoseconds of one clock.
class Crowd {
 public:
  // Of so many threads, those that a call takes.
  int size(int threads, int64_t now) const;
  // Whether members should say how long they had no core.
  bool is_careful() const {
    return careful_.load(std::memory_order_relaxed) > 0 || shrunk_.load(std::memory_order_relaxed) > 0;
  }
  // A call that took so long, of which the first member waited for others for so long.
  void waited(int64_t length, int64_t lost);
  // A call whose members said that one of them had no core for so long.
  void away(int64_t now, int64_t length, int64_t away);

 private:
  std::atomic<int> shrunk_{0};    // how many times teams are halved
  std::atomic<int> careful_{0};   // calls to come whose members are asked
  std::atomic<int64_t> until_{0}, pause_{0}, last_{INT64_MIN / 2};
};

Crowd& crowd();
int64_t clock_now();

// A call of a team.
class Region {
 public:
  Region(int threads, int64_t begin);
  ~Region();
  Region(const Region&) = delete;

 private:
  friend class Seat;
  friend class Wait;
  static constexpr int kSeats = 64;
  const int seats_;
  const bool careful_;
  const int64_t begin_;
  int64_t done_, lost_ = 0;           // of member 0
  std::atomic<int64_t> away_{0};      // of the member for which it was longest
  std::atomic<int16_t> cores_[kSeats];  // where a member was last seen, -1 before it has begun
};

// A member's place in a call.
class Seat {
 public:
  Seat(Region& region, int member);
  ~Seat();
  Seat(const Seat&) = delete;

 private:
  Region& region_;
  const int member_;
  int64_t core_time_ = 0;  // that this thread had used when it began
};

// One wait of a member for another.
class Wait {
 public:
  // For some hundred nanoseconds, or, where a mate is on this core, for a turn; false once it is time to sleep.
  bool once();
  ~Wait();

 private:
  int times_ = 0;
  int64_t begin_ = 0;
};

// A moment of a loop that waits.
inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// f(member, members) for the first `members` of a region's threads, after expect(members): OpenMP may give fewer than
// asked for, which expect is then told once more, before anybody begins. The region has all `threads`, torch's number, as
// OpenMP ends threads that a region leaves out, and starts others for the next of torch's own.
template <class Expect, class F>
void in_team(int threads, int members, Expect expect, F f) {
  if (members > 1) {
    const int64_t begin = clock_now();
    threads = crowd().size(threads, begin);
    members = std::min(members, threads);
    if (members > 1) {
      expect(members);
      Region region(members, begin);
#pragma omp parallel num_threads(threads)
      {
        const int me = omp_get_thread_num(), team = std::min(members, omp_get_num_threads());
        if (team < members) {
#pragma omp single
          expect(team);
        }
        if (me < team) {
          const Seat seat(region, me);
          f(me, team);
        }
      }
      return;
    }
  }
  expect(1);
  f(0, 1);
}

template <class F>
void in_team(int threads, int members, F f) {
  in_team(threads, members, [](int) {}, f);
}

// All of them.
template <class F>
void in_team(int threads, F f) {
  in_team(threads, threads, f);
}

}  // namespace fusedrnn
