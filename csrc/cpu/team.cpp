#include "team.h"

#include <sched.h>
#include <time.h>

#include <chrono>

namespace fusedrnn {
namespace {

constexpr int64_t kMicrosecond = 1000, kMillisecond = 1000 * kMicrosecond, kSecond = 1000 * kMillisecond;

// Shorter than any turn of the scheduler, longer than waking a thread that sleeps.
constexpr int64_t kLong = 200 * kMicrosecond;
constexpr int kCarefulCalls = 8, kMostHalvings = 10;
constexpr int64_t kShortestPause = 20 * kMillisecond, kLongestPause = kSecond;
// So long after the last trouble the next is a new one.
constexpr int64_t kForgotten = 2 * kSecond;

// A few milliseconds, a turn of the scheduler, in pauses of the processor of which kAtOnce go by between looks around.
constexpr int kSpins = 300000, kAtOnce = 16, kYields = 8;

bool is_much(int64_t part, int64_t length) { return part > kLong && 4 * part > length; }

#if defined(__linux__)
int core_here() { return sched_getcpu(); }
int64_t core_time() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return t.tv_sec * kSecond + t.tv_nsec;
}
#else
int core_here() { return -2; }
int64_t core_time() { return 0; }
#endif

thread_local Region* region_here = nullptr;
thread_local int seat_here = 0;

}  // namespace

Crowd& crowd() {
  static Crowd one;
  return one;
}

int64_t clock_now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// ---- how large ----------------------------------------------------------------------------------------------------

int Crowd::size(int threads, int64_t now) const {
  const int halvings = shrunk_.load(std::memory_order_relaxed);
  if (halvings == 0) return threads;
  const bool tries_more = now >= until_.load(std::memory_order_relaxed);
  return std::max(1, threads >> (tries_more ? halvings - 1 : halvings));
}

void Crowd::waited(int64_t length, int64_t lost) {
  if (is_much(lost, length)) careful_.store(kCarefulCalls, std::memory_order_relaxed);
}

void Crowd::away(int64_t now, int64_t length, int64_t away) {
  const int halvings = shrunk_.load(std::memory_order_relaxed);
  if (careful_.load(std::memory_order_relaxed) > 0) careful_.fetch_sub(1, std::memory_order_relaxed);
  const bool tried_more = halvings > 0 && now >= until_.load(std::memory_order_relaxed);
  if (!is_much(away, length)) {
    if (tried_more) {
      shrunk_.store(halvings - 1, std::memory_order_relaxed);
      until_.store(now + pause_.load(std::memory_order_relaxed), std::memory_order_relaxed);
    }
    return;
  }
  const bool is_new = now - last_.load(std::memory_order_relaxed) > kForgotten;
  const int64_t before = pause_.load(std::memory_order_relaxed);
  const int64_t pause = is_new ? kShortestPause : std::clamp(2 * before, kShortestPause, kLongestPause);
  pause_.store(pause, std::memory_order_relaxed);
  last_.store(now, std::memory_order_relaxed);
  until_.store(now + pause, std::memory_order_relaxed);
  if (!tried_more) shrunk_.store(std::min(halvings + 1, kMostHalvings), std::memory_order_relaxed);
}

// ---- a call -------------------------------------------------------------------------------------------------------

Region::Region(int threads, int64_t begin)
    : seats_(std::min(threads, kSeats)), careful_(crowd().is_careful()), begin_(begin), done_(begin) {
  for (int i = 0; i < seats_; ++i) cores_[i].store(-1, std::memory_order_relaxed);
}

Region::~Region() {
  const int64_t now = clock_now(), length = now - begin_;
  crowd().waited(length, lost_ + now - done_);
  if (careful_) crowd().away(now, length, away_.load(std::memory_order_relaxed));
}

Seat::Seat(Region& region, int member) : region_(region), member_(member) {
  region_here = &region;
  seat_here = member;
  if (member < region.seats_) region.cores_[member].store(static_cast<int16_t>(core_here()), std::memory_order_relaxed);
  if (region.careful_) core_time_ = core_time();
}

Seat::~Seat() {
  region_here = nullptr;
  const int64_t now = clock_now();
  if (member_ == 0) region_.done_ = now;
  if (!region_.careful_) return;
  // From the call's begin on: a member that came late had no core either.
  const int64_t away = now - region_.begin_ - (core_time() - core_time_);
  int64_t most = region_.away_.load(std::memory_order_relaxed);
  while (away > most && !region_.away_.compare_exchange_weak(most, away, std::memory_order_relaxed)) {
  }
}

// ---- a wait -------------------------------------------------------------------------------------------------------

bool Wait::once() {
  if (times_++ == 0) begin_ = clock_now();
  if (times_ > kSpins / kAtOnce) {
    sched_yield();
    return times_ <= kSpins / kAtOnce + kYields;
  }
  bool shares = false;
  if (Region* const region = region_here) {
    const auto here = static_cast<int16_t>(core_here());
    for (int i = 0; i < region->seats_; ++i) {
      auto& core = region->cores_[i];
      if (i == seat_here) {
        if (core.load(std::memory_order_relaxed) != here) core.store(here, std::memory_order_relaxed);
      } else {
        const int16_t other = core.load(std::memory_order_relaxed);
        shares = shares || other == here || other == -1;
      }
    }
  }
  if (shares) {
    sched_yield();
  } else {
    for (int i = 0; i < kAtOnce; ++i) relax();
  }
  return true;
}

Wait::~Wait() {
  if (times_ > 0 && region_here && seat_here == 0) region_here->lost_ += clock_now() - begin_;
}

}  // namespace fusedrnn
