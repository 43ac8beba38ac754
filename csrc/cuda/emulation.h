// What device.h offers, over fibers (fibers.h): asynchronous copies arrive as late as they may, matrix
// instructions have the fragments of PTX. What cannot show: stores that other SMs see in another order, and
// reads that L1 keeps.
#pragma once

#include <cmath>

#include "scan.h"

#define FUSEDRNN_ARCH 1000
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

#define threadIdx (::fusedrnn::cuda::launched->current->thread)
#define blockIdx (::fusedrnn::cuda::launched->current->block)
#define gridDim (::fusedrnn::cuda::launched->grid)

namespace fusedrnn::cuda {

inline void __syncthreads() {
  Block& block = *launched->current->of;
  const uint32_t target = block.passed + 1;
  if (++block.arrived == block.threads) {
    block.arrived = 0;
    count(&block.passed);
    yield();
  } else {
    wait_for(&block.passed, target);
  }
}

// An instruction of a whole warp: the last lane that arrives executes it for all.
template <class In, class Out>
void together(const In& in, Out& out, void (*execute)(const In* const (&in)[32], Out* const (&out)[32])) {
  const int number = static_cast<int>(threadIdx.x);
  Warp& warp = launched->current->of->warps[number / kWarpSize];
  const uint32_t target = warp.done + 1;
  warp.in[number % kWarpSize] = &in;
  warp.out[number % kWarpSize] = &out;
  if (++warp.arrived < kWarpSize) return wait_for(&warp.done, target);
  warp.arrived = 0;
  const In* all_in[kWarpSize];
  Out* all_out[kWarpSize];
  for (int i = 0; i < kWarpSize; ++i) {
    all_in[i] = static_cast<const In*>(warp.in[i]);
    all_out[i] = static_cast<Out*>(warp.out[i]);
  }
  execute(all_in, all_out);
  count(&warp.done);
}

inline void warp_sync() {
  int nothing = 0;
  together<int, int>(nothing, nothing, [](const int* const (&)[32], int* const (&)[32]) {});
}

template <class T>
struct Exchanged {
  T value;
  int lane;
};

template <class T>
T shuffle(T value, int lane) {
  const Exchanged<T> in{value, lane};
  T out;
  together<Exchanged<T>, T>(in, out, [](const Exchanged<T>* const(&in)[32], T* const(&out)[32]) {
    for (int i = 0; i < kWarpSize; ++i) *out[i] = in[in[i]->lane]->value;
  });
  return out;
}
inline float shuffle_xor(float value, int mask) {
  return shuffle(value, static_cast<int>(threadIdx.x % kWarpSize) ^ mask);
}

inline bool planted(Race race) { return static_cast<int>(race) == machine.race; }

template <class To, class From>
To cast_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

inline float to_float(float x) { return x; }
inline float to_float(Bf16 x) { return cast_bits<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(Half x) { return static_cast<float>(cast_bits<_Float16>(x.bits)); }

template <class S>
S from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline Bf16 from_float<Bf16>(float x) {
  const uint32_t bits = cast_bits<uint32_t>(x);
  if (x != x) return {0x7FFF};
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
template <>
inline Half from_float<Half>(float x) {
  return {cast_bits<uint16_t>(static_cast<_Float16>(x))};
}

inline uint32_t to_tf32(uint32_t bits) {
  const bool finite = (bits & 0x7F800000) != 0x7F800000;
  return finite ? (bits + 0x1000) & 0xFFFFE000 : bits;
}

inline uint32_t unknown(uint32_t value) { return value; }

inline unsigned char* dynamic_shared() { return launched->current->of->shared.front().bytes; }

template <class S>
S load_fresh(const S* from) {
  return *from;
}

inline void copy_async(void* shared, const void* global) {
  memset(shared, 0xFF, 16);
  launched->current->copies.push_back({shared, global});
}
// The first of those asked for arrive.
inline void copies_arrive(size_t count) {
  yield();
  std::vector<Copy>& copies = launched->current->copies;
  for (size_t i = 0; i < count; ++i) memcpy(copies[i].to, copies[i].from, 16);
  copies.erase(copies.begin(), copies.begin() + count);
  for (size_t& end : launched->current->groups) end -= end < count ? end : count;
}
inline void copies_wait() { copies_arrive(launched->current->copies.size()); }
inline void copies_commit() { launched->current->groups.push_back(launched->current->copies.size()); }
template <int kGroups>
void copies_wait_but() {
  const std::vector<size_t>& groups = launched->current->groups;
  if (groups.size() > kGroups) copies_arrive(groups[groups.size() - 1 - kGroups]);
}

inline void let_next_launch_begin() {}
inline void wait_for_last_launch() { wait_for_launch(launched->current->launch - 1); }

inline void arrive(uint32_t* counter) {
  count(counter);
  yield();
}
inline void wait(const uint32_t* counter, uint32_t target) {
  yield();
  wait_for(counter, target);
}

// Of a cluster: the blocks of a row of the grid.
inline Block& peer_block(int peer) {
  return *(launched->current->of - static_cast<int>(blockIdx.x) + peer);
}

inline void cluster_sync() {
  __syncthreads();
  if (threadIdx.x == 0) {
    Block& first = peer_block(0);
    const uint32_t target = first.cluster_passed + 1;
    if (++first.cluster_arrived == static_cast<int>(gridDim.x)) {
      first.cluster_arrived = 0;
      count(&first.cluster_passed);
    }
    wait_for(&first.cluster_passed, target);
  }
  __syncthreads();
}

struct Arrivals {
  uint32_t over;    // phases
  int32_t pending;  // twice the bytes that are announced and missing, plus 1 if they are announced
};
static_assert(sizeof(Arrivals) == 8);

inline void arrivals_change(Arrivals* arrivals, int32_t pending) {
  arrivals->pending += pending;
  if (arrivals->pending != 1) return;
  arrivals->pending = 0;
  count(&arrivals->over);
}
inline void arrivals_init(Arrivals* arrivals) { *arrivals = {0, 0}; }
inline void arrivals_expect(Arrivals* arrivals, int bytes) { arrivals_change(arrivals, 2 * bytes + 1); }
inline void arrivals_wait(Arrivals* arrivals, int parity) {
  yield();
  if (static_cast<int>(arrivals->over & 1) == parity) wait_for(&arrivals->over, arrivals->over + 1);
}
inline void push(int peer, void* shared, uint4 value, Arrivals* arrivals) {
  unsigned char* here = dynamic_shared();
  unsigned char* there = peer_block(peer).shared.front().bytes;
  memcpy(there + (static_cast<unsigned char*>(shared) - here), &value, sizeof value);
  arrivals_change(reinterpret_cast<Arrivals*>(there + (reinterpret_cast<unsigned char*>(arrivals) - here)), -32);
}

// The fragments of PTX: lane l has of a the rows l / 4 and l / 4 + 8, of b the column l / 4, each with the
// 4 bytes l % 4 of both halves of k; of c the columns 2 (l % 4) and 2 (l % 4) + 1 of its two rows.
struct Factors {
  uint32_t a[4], b[2];
};

template <class S>
double element(uint32_t word, int i) {
  if constexpr (sizeof(S) == 4) {
    return cast_bits<float>(word & 0xFFFFE000);
  } else {
    return to_float(S{static_cast<uint16_t>(word >> 16 * i)});
  }
}

template <class S>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const Factors in{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  together<Factors, float[4]>(in, c, [](const Factors* const(&in)[32], float(*const(&out)[32])[4]) {
    constexpr int kPer = 4 / sizeof(S), kDepth = 8 * kPer;
    double rows[16][kDepth], columns[8][kDepth];
    for (int l = 0; l < kWarpSize; ++l) {
      for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < kPer; ++i) {
          const int k = half * 4 * kPer + l % 4 * kPer + i;
          rows[l / 4][k] = element<S>(in[l]->a[2 * half], i);
          rows[l / 4 + 8][k] = element<S>(in[l]->a[2 * half + 1], i);
          columns[l / 4][k] = element<S>(in[l]->b[half], i);
        }
      }
    }
    for (int l = 0; l < kWarpSize; ++l) {
      for (int i = 0; i < 4; ++i) {
        double sum = (*out[l])[i];
        for (int k = 0; k < kDepth; ++k) sum += rows[l / 4 + i / 2 * 8][k] * columns[l % 4 * 2 + i % 2][k];
        (*out[l])[i] = static_cast<float>(sum);
      }
    }
  });
}

// ---- host ----------------------------------------------------------------------------------------------------

inline const char* error_text(int) { return "none over fibers"; }

inline bool runs_no_code(int) { return false; }

inline int device(Device& found) {
  found = {machine.multiprocessors, machine.shared_bytes};
  return 0;
}

template <class... Args>
int compiled_for(void (*)(Args...), int& capability) {
  capability = 90;
  return 0;
}

template <class... Args>
int fits(void (*)(Args...), const Config& c, const Device& on, bool& fit) {
  const int64_t blocks = int64_t{c.grid.x} * (c.together == Together::kGrid ? c.grid.y * c.grid.z : 1);
  fit = c.together == Together::kNone || blocks <= on.multiprocessors;
  return 0;
}

template <class... Args>
int launch(void (*kernel)(Args...), const Config& c, Args... args) {
  return run(c.grid, c.threads, c.shared, 1, [=](int64_t) { kernel(args...); }) ? 0 : kFusedrnnCudaDeadlock;
}

template <class Arguments, class Tile>
int launch_steps(void (*kernel)(Arguments, Tile), const Config& c, int64_t count, const Arguments& arguments,
                 const Tile& tile) {
  const auto body = [=](int64_t step) {
    Tile of_step = tile;
    of_step.step = step;
    kernel(arguments, of_step);
  };
  return run(c.grid, c.threads, c.shared, count, body) ? 0 : kFusedrnnCudaDeadlock;
}

}  // namespace fusedrnn::cuda
