// A launch as coroutines of one CPU thread, for tests.
//
// Every thread of every block is a fiber. One runs until it has to wait for others: at a barrier, in an
// instruction of a whole warp, for a counter. Who goes on is up to the order, so that races show: in `eager`
// one block runs as far ahead as it can, in `random` any fiber that can goes next. Shared memory starts as
// NaN. A launch in which all wait for each other ends as an error. Of several launches the next one begins with its
// predecessor, after all before that have ended.
#pragma once

#include <setjmp.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <map>
#include <memory>
#include <random>
#include <unordered_map>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace fusedrnn::cuda {

enum Order { kForward, kReversed, kRandom, kEager, kLagging };

// The machine that a test asks for.
struct Machine {
  Order order = kForward;
  unsigned seed = 0;
  int multiprocessors = 16, shared_bytes = 227 << 10;
  int race = 0;  // device.h
};
inline Machine machine;

constexpr int kWarpSize = 32;
constexpr size_t kStackBytes = 128 << 10;

struct Warp {
  const void* in[kWarpSize];
  void* out[kWarpSize];
  int arrived = 0;
  uint32_t done = 0;
};

struct alignas(128) Line {
  unsigned char bytes[128];
};

struct Block {
  std::vector<Line> shared;
  std::vector<Warp> warps;
  int threads, arrived = 0, cluster_arrived = 0;
  uint32_t passed = 0, cluster_passed = 0;
};

struct Copy {
  void* to;
  const void* from;
};

struct Fiber {
  ucontext_t context;
  jmp_buf at;
  bool started = false;
  int64_t number;  // in all launches
  int64_t launch;
  dim3 thread, block;
  Block* of;
  std::vector<Copy> copies;
  std::vector<size_t> groups;  // where each ends in `copies`
  uint32_t target;  // of the counter that it waits for
};

struct Launch {
  jmp_buf scheduler;
  Fiber* current = nullptr;
  dim3 grid;
  std::function<void(int64_t)> body;
  uint32_t fibers_each;         // of a launch
  std::vector<uint32_t> ended;  // fibers of each launch
  int64_t made_ready = 0;
  std::multimap<int64_t, Fiber*> ready;
  std::unordered_map<const uint32_t*, std::vector<Fiber*>> waiting;
  std::mt19937 random;
};
inline Launch* launched;

// ---- scheduling ----------------------------------------------------------------------------------------------

// The least key goes next.
inline int64_t key(const Fiber& fiber) {
  const int64_t latest = ++launched->made_ready;
  switch (machine.order) {
    case kReversed: return -latest;
    case kRandom: return launched->random();
    case kEager: return fiber.number;
    case kLagging: return -fiber.number;
    default: return latest;
  }
}

inline void make_ready(Fiber* fiber) { launched->ready.emplace(key(*fiber), fiber); }

inline Fiber* next_ready() {
  const auto first = launched->ready.begin();
  Fiber* fiber = first->second;
  launched->ready.erase(first);
  return fiber;
}

__attribute__((noinline)) inline void suspend() {
  if (_setjmp(launched->current->at) == 0) _longjmp(launched->scheduler, 1);
}

// Lets others run first, where the order does.
inline void yield() {
  make_ready(launched->current);
  suspend();
}

inline bool reached(uint32_t now, uint32_t target) { return static_cast<int32_t>(now - target) >= 0; }

inline void wait_for(const uint32_t* counter, uint32_t target) {
  while (!reached(*counter, target)) {
    launched->current->target = target;
    launched->waiting[counter].push_back(launched->current);
    suspend();
  }
}

inline void count(uint32_t* counter) {
  ++*counter;
  const auto found = launched->waiting.find(counter);
  if (found == launched->waiting.end()) return;
  std::vector<Fiber*> still;
  for (Fiber* fiber : found->second) {
    if (reached(*counter, fiber->target)) {
      make_ready(fiber);
    } else {
      still.push_back(fiber);
    }
  }
  if (still.empty()) {
    launched->waiting.erase(found);
  } else {
    found->second.swap(still);
  }
}

// Until all of a launch has ended.
inline void wait_for_launch(int64_t launch) {
  if (launch >= 0) wait_for(&launched->ended[launch], launched->fibers_each);
}

inline void run_body() {
  const int64_t launch = launched->current->launch;
  launched->body(launch);
  count(&launched->ended[launch]);
  _longjmp(launched->scheduler, 1);
}

__attribute__((noinline)) inline void resume(Fiber* fiber) {
  launched->current = fiber;
  if (_setjmp(launched->scheduler) != 0) return;
  if (fiber->started) _longjmp(fiber->at, 1);
  fiber->started = true;
  setcontext(&fiber->context);
}

// Until all of a launch has ended, or nobody is left who could go on.
__attribute__((noinline)) inline void run_until_ended(int64_t launch) {
  while (launched->ended[launch] < launched->fibers_each && !launched->ready.empty()) resume(next_ready());
}

inline std::unique_ptr<char[]>& stack(size_t number) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() <= number) stacks.emplace_back(new char[kStackBytes]);
  return stacks[number];
}

__attribute__((noinline)) inline void make_context(Fiber& fiber, size_t stack_number) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack(stack_number).get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_body, 0);
}

// The blocks and fibers of one launch.
struct Running {
  std::vector<Block> blocks;
  std::vector<std::unique_ptr<Fiber>> fibers;

  Running(int64_t launch, int64_t count, int threads, int shared) : blocks(count) {
    const dim3 grid = launched->grid;
    for (int64_t i = 0; i < count; ++i) {
      blocks[i].threads = threads;
      blocks[i].warps.resize(threads / kWarpSize);
      blocks[i].shared.resize((shared + sizeof(Line) - 1) / sizeof(Line));
      memset(blocks[i].shared.data(), 0xFF, blocks[i].shared.size() * sizeof(Line));
      for (int j = 0; j < threads; ++j) {
        fibers.push_back(std::make_unique<Fiber>());
        Fiber& fiber = *fibers.back();
        fiber.number = (launch * count + i) * threads + j;
        fiber.launch = launch;
        fiber.thread = dim3(j, 0, 0);
        fiber.block = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
        fiber.of = &blocks[i];
        make_context(fiber, fiber.number % (2 * count * threads));
        make_ready(&fiber);
      }
    }
  }
};

// Whether all of it came to an end.
inline bool run(dim3 grid, int threads, int shared, int64_t launches, std::function<void(int64_t)> body) {
  Launch state;
  launched = &state;
  state.grid = grid;
  state.body = std::move(body);
  state.random.seed(machine.seed);
  const int64_t blocks = int64_t{grid.x} * grid.y * grid.z;
  state.fibers_each = blocks * threads;
  state.ended.resize(launches);
  std::unique_ptr<Running> now, next;
  for (int64_t i = 0; i < launches; ++i) {
    now = i == 0 ? std::make_unique<Running>(0, blocks, threads, shared) : std::move(next);
    if (i + 1 < launches) next = std::make_unique<Running>(i + 1, blocks, threads, shared);
    run_until_ended(i);
    if (state.ended[i] < state.fibers_each) break;
  }
  launched = nullptr;
  return state.ended.back() == state.fibers_each;
}

}  // namespace fusedrnn::cuda
