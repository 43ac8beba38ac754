// How the vectors that a step multiplies reach the blocks that need them: forward h, backward the gradients of
// the gates' recurrent halves. An exchange has
//
//   kTogether   whether the blocks of a launch have to run at once
//   kMost       elements of a thread
//   receive(i, source)      the vectors of step i are at vectors(). source(row) is where a row of the tile
//                           comes from in memory, [gates, H], or null for zeros
//   publish(row, gate, unit, value)   what a thread made for the next step, in every step of all its rows
//   sent(i)     all threads of the block have published for the step after i
#pragma once

#include "product.h"

namespace fusedrnn::cuda {
namespace {

// Copies the chunks of the warp's slice from memory; the warps of one slice take turns.
template <class S, class Source>
__device__ __forceinline__ void gather(const Tile& tile, int hidden, Source source,
                                       unsigned char* vectors /*[rows, row_bytes]*/) {
  constexpr int kPer = 16 / sizeof(S);
  const int slice = warp() / tile.unit_warps, turn = warp() % tile.unit_warps;
  const int first = tile.first_chunk(slice), end = tile.first_chunk(slice + 1);
  for (int n = 0; n < tile.row_tiles; ++n) {
    const int row = n * kColumns + lane() / 4;
    const S* from = source(row);
    const bool aligned = reinterpret_cast<uintptr_t>(from) % 16 == 0 && hidden % kPer == 0;
    for (int chunk = first + turn; chunk < end; chunk += tile.unit_warps) {
      unsigned char* to = vectors + row * tile.row_bytes() + chunk * kChunkBytes + lane() % 4 * 16;
      const int gate = chunk / tile.gate_chunks;
      const int k = ((chunk - gate * tile.gate_chunks) * 4 + lane() % 4) * kPer;
      const bool any = from != nullptr && k < hidden;
      const S* piece = from + static_cast<int64_t>(gate) * hidden + k;
      if (aligned || !any) {
        copy_async(to, any ? piece : nullptr);
      } else {
        S values[kPer] = {};
#pragma unroll
        for (int i = 0; i < kPer; ++i) {
          if (k + i < hidden) values[i] = load_fresh(piece + i);
        }
        memcpy(to, values, sizeof values);
      }
    }
  }
  copies_wait();
}

// One block has all units of its rows: vectors never leave its shared memory.
template <class S>
class Cta {
 public:
  static constexpr bool kTogether = false;
  static constexpr int kMost = 4;

  __device__ __forceinline__ Cta(const Tile& tile, int hidden, unsigned char* shared, uint32_t*)
      : tile_(tile), hidden_(hidden), vectors_(shared) {}

  __device__ __forceinline__ const unsigned char* vectors() const { return vectors_; }

  template <class Source>
  __device__ __forceinline__ void receive(int64_t i, Source source) {
    if (i > 0) return;
    gather<S>(tile_, hidden_, source, vectors_);
    __syncthreads();
  }

  __device__ __forceinline__ void publish(int row, int gate, int unit, S value) {
    constexpr int kPerChunk = kChunkBytes / sizeof(S);
    reinterpret_cast<S*>(vectors_ + row * tile_.row_bytes())[gate * tile_.gate_chunks * kPerChunk + unit] = value;
  }

  __device__ __forceinline__ void sent(int64_t) { __syncthreads(); }

 private:
  const Tile& tile_;
  int hidden_;
  unsigned char* vectors_;  // [rows, row_bytes]
};

// The units are split over the blocks of a row of the grid, which read through L2 what all of them have
// stored for good, so publishing is storing. Each row is stored once and read only afterwards: one barrier a
// step is enough. Its counter is the block row's own, so that tiles of the batch do not wait for each other.
template <class S>
class Grid {
 public:
  static constexpr bool kTogether = true;
  static constexpr int kMost = 2;

  __device__ __forceinline__ Grid(const Tile& tile, int hidden, unsigned char* shared, uint32_t* counters)
      : tile_(tile), hidden_(hidden), vectors_(shared), counter_(counters + blockIdx.z * gridDim.y + blockIdx.y) {}

  __device__ __forceinline__ const unsigned char* vectors() const { return vectors_; }

  template <class Source>
  __device__ __forceinline__ void receive(int64_t i, Source source) {
    if (threadIdx.x == 0 && !planted(Race::kNoWait)) wait(counter_, static_cast<uint32_t>(i) * gridDim.x);
    __syncthreads();
    gather<S>(tile_, hidden_, source, vectors_);
    // A warp that has a slice to itself reads only what it copied.
    if (tile_.unit_warps == 1) {
      warp_sync();
    } else {
      __syncthreads();
    }
  }

  __device__ __forceinline__ void publish(int, int, int, S) {}

  __device__ __forceinline__ void sent(int64_t) {
    if (!planted(Race::kEarlyArrival)) __syncthreads();
    if (threadIdx.x == 0) arrive(counter_);
  }

 private:
  const Tile& tile_;
  int hidden_;
  unsigned char* vectors_;  // [rows, row_bytes]
  uint32_t* counter_;
};

}  // namespace
}  // namespace fusedrnn::cuda
