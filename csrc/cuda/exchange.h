// How the vectors that a step multiplies reach the blocks that need them: forward h, backward the gradients of
// the gates' recurrent halves. An exchange has
//
//   kTogether   which blocks have to run at once
//   kOneStep    whether a launch takes one step instead of all: then vectors come as the weights do (stream.h)
//   kMost       elements of a thread
//   kRegisters  what that leaves to a product, so that nothing spills
//   bytes(tile)             that it needs of the shared memory
//   receive(i, source)      the vectors of step i are at vectors(i). source(row) is where a row of the tile
//                           comes from in memory, [gates, H], or null for zeros
//   publish(i, row, gate, unit, value)   what a thread made for the step after i. All threads, each step, for
//                           all rows that may be theirs: zero where there is no such row or unit
//   sent()                  all threads of the block have published
//   finish(i)               nobody publishes any more; i is the step that is not taken
#pragma once

#include "product.h"

namespace fusedrnn::cuda {
namespace {

// Whether the gates of a row are whole pieces of 16 bytes.
template <class S>
__device__ __forceinline__ bool are_pieces(const S* row /*[gates, hidden]*/, int hidden) {
  return reinterpret_cast<uintptr_t>(row) % 16 == 0 && hidden * sizeof(S) % 16 == 0;
}

// Starts to copy 16 bytes of one gate's values from the k-th on. Zeros are beyond their end, and where there are none.
template <class S>
__device__ __forceinline__ void copy_piece(void* to, const S* values /*[hidden] or null*/, int k, int hidden,
                                           bool aligned) {
  if (values == nullptr || k >= hidden) {
    *static_cast<uint4*>(to) = {0, 0, 0, 0};
  } else if (aligned) {
    copy_async(to, values + k);
  } else {
    constexpr int kPer = 16 / sizeof(S);
    S piece[kPer] = {};
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      if (k + i < hidden) piece[i] = load_fresh(values + k + i);
    }
    memcpy(to, piece, sizeof piece);
  }
}

// Copies the chunks of the warp's slice from memory; the warps of one slice take turns.
template <class S, class Source>
__device__ __forceinline__ void gather(const Tile& tile, int hidden, Source source,
                                       unsigned char* vectors /*[rows, row_bytes]*/) {
  constexpr int kPer = 16 / sizeof(S);
  const int slice = warp() / tile.unit_warps, turn = warp() % tile.unit_warps;
  const int first = tile.first_chunk(slice) + turn, end = tile.first_chunk(slice + 1);
  const int first_gate = first / tile.gate_chunks;
#pragma unroll 1
  for (int n = 0; n < tile.row_tiles; ++n) {
    const int row = n * kColumns + lane() / 4;
    const S* from = source(row);
    const bool aligned = are_pieces(from, hidden);
    int gate = first_gate;
#pragma unroll 1
    for (int chunk = first; chunk < end; chunk += tile.unit_warps) {
      // A division would take longer than the rest.
      while (chunk >= (gate + 1) * tile.gate_chunks) ++gate;
      const int k = ((chunk - gate * tile.gate_chunks) * 4 + lane() % 4) * kPer;
      unsigned char* to = vectors + row * tile.row_bytes() + chunk * kChunkBytes + lane() % 4 * 16;
      copy_piece(to, from == nullptr ? nullptr : from + int64_t{gate} * hidden, k, hidden, aligned);
    }
  }
  copies_wait();
}

// One block has all units of its rows: vectors never leave its shared memory.
template <class S>
class Cta {
 public:
  static constexpr Together kTogether = Together::kNone;
  static constexpr bool kOneStep = false;
  static constexpr int kMost = 4, kRegisters = 104;

  static __device__ __host__ int bytes(const Tile& tile) { return tile.vector_bytes(); }

  __device__ __forceinline__ Cta(const Tile& tile, int hidden, unsigned char* shared, uint32_t*)
      : tile_(tile), hidden_(hidden), vectors_(shared) {}

  __device__ __forceinline__ const unsigned char* vectors(int64_t) const { return vectors_; }
  __device__ __forceinline__ void finish(int64_t) {}

  template <class Source>
  __device__ __forceinline__ void receive(int64_t i, Source source) {
    if (i > 0) return;
    gather<S>(tile_, hidden_, source, vectors_);
    __syncthreads();
  }

  __device__ __forceinline__ void publish(int64_t, int row, int gate, int unit, S value) {
    if (row >= tile_.rows() || unit >= hidden_) return;
    constexpr int kPerChunk = kChunkBytes / sizeof(S);
    reinterpret_cast<S*>(vectors_ + row * tile_.row_bytes())[gate * tile_.gate_chunks * kPerChunk + unit] = value;
  }

  __device__ __forceinline__ void sent() { __syncthreads(); }

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
  static constexpr Together kTogether = Together::kGrid;
  static constexpr bool kOneStep = false;
  static constexpr int kMost = 2, kRegisters = 136;

  static __device__ __host__ int bytes(const Tile& tile) { return tile.vector_bytes(); }

  __device__ __forceinline__ Grid(const Tile& tile, int hidden, unsigned char* shared, uint32_t* counters)
      : tile_(tile), hidden_(hidden), vectors_(shared), counter_(counters + blockIdx.z * gridDim.y + blockIdx.y) {}

  __device__ __forceinline__ const unsigned char* vectors(int64_t) const { return vectors_; }
  __device__ __forceinline__ void finish(int64_t) {}

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

  __device__ __forceinline__ void publish(int64_t, int, int, int, S) {}

  __device__ __forceinline__ void sent() {
    if (!planted(Race::kEarlyArrival)) __syncthreads();
    if (threadIdx.x == 0) arrive(counter_);
  }

 private:
  const Tile& tile_;
  int hidden_;
  unsigned char* vectors_;  // [rows, row_bytes]
  uint32_t* counter_;
};

// The units are split over a cluster, whose blocks write what they made straight into each other's shared
// memory: 16 bytes at a time, from as many lanes as have a value of them, each to some of the blocks. Whoever
// publishes for step i + 2 has received all of step i + 1, which every block sent after reading step i: two
// buffers are enough, and no barrier but the one that counts the bytes. A block without units sends nothing, so
// it must not receive anything either.
template <class S>
class Cluster {
 public:
  static constexpr Together kTogether = Together::kCluster;
  static constexpr bool kOneStep = false;
  static constexpr int kMost = 2, kRegisters = 144;

  static __device__ __host__ int bytes(const Tile& tile) { return 2 * tile.vector_bytes() + 2 * sizeof(Arrivals); }

  __device__ __forceinline__ Cluster(const Tile& tile, int hidden, unsigned char* shared, uint32_t*)
      : tile_(tile), hidden_(hidden), peers_(ceil_div(hidden, tile.units())), vectors_(shared) {
    const int units = peers_ * tile.units(), gates = tile.chunks / tile.gate_chunks;
    step_bytes_ = tile.rows() * gates * (units < columns() ? units : columns()) * static_cast<int>(sizeof(S));
    for (int at = threadIdx.x * 16; at < 2 * tile.vector_bytes(); at += kThreads * 16) {
      *reinterpret_cast<uint4*>(shared + at) = {0, 0, 0, 0};
    }
    if (threadIdx.x == 0) {
      for (int i = 0; i < 2; ++i) {
        arrivals_init(arrivals(i));
        arrivals_expect(arrivals(i), step_bytes_);
      }
    }
    cluster_sync();
  }

  __device__ __forceinline__ const unsigned char* vectors(int64_t i) const { return buffer(i); }

  template <class Source>
  __device__ __forceinline__ void receive(int64_t i, Source source) {
    if (i == 0) {
      gather<S>(tile_, hidden_, source, buffer(0));
      __syncthreads();
      return;
    }
    finish(i);
    if (threadIdx.x == 0) arrivals_expect(arrivals(i), step_bytes_);
    warp_sync();  // matrix instructions are the whole warp's
  }

  __device__ __forceinline__ void publish(int64_t i, int row, int gate, int unit, S value) {
    constexpr int kShare = 16 / sizeof(S);
    const int first = lane() / kShare * kShare;
    uint32_t word = 0;
    memcpy(&word, &value, sizeof value);
    if constexpr (sizeof(S) == 2) word |= shuffle(word, lane() | 1) << 16;
    const uint4 piece{shuffle(word, first), shuffle(word, first + kShare / 4), shuffle(word, first + kShare / 2),
                      shuffle(word, first + kShare / 4 * 3)};
    const int column = unit - (lane() - first);
    if (row >= tile_.rows() || column >= columns()) return;
    unsigned char* to = buffer(i + 1) + row * tile_.row_bytes() + gate * tile_.gate_chunks * kChunkBytes +
                        column * sizeof(S);
    for (int peer = lane() - first; peer < peers_; peer += kShare) {
      push(peer, to, piece, arrivals(i + 1));
    }
  }

  __device__ __forceinline__ void sent() {}

  // A block must not end while others write to it.
  __device__ __forceinline__ void finish(int64_t i) {
    if (!planted(Race::kNoWait)) arrivals_wait(arrivals(i), (i - 1) / 2 % 2);
  }

 private:
  // Of a gate in a vector.
  __device__ __forceinline__ int columns() const {
    return tile_.gate_chunks * kChunkBytes / static_cast<int>(sizeof(S));
  }
  __device__ __forceinline__ unsigned char* buffer(int64_t i) const {
    return vectors_ + (planted(Race::kOneBuffer) ? 0 : i % 2 * tile_.vector_bytes());
  }
  __device__ __forceinline__ Arrivals* arrivals(int64_t i) const {
    return reinterpret_cast<Arrivals*>(vectors_ + 2 * tile_.vector_bytes()) + i % 2;
  }

  const Tile& tile_;
  int hidden_, peers_, step_bytes_;
  unsigned char* vectors_;  // [2, rows, row_bytes], then two Arrivals
};

}  // namespace
}  // namespace fusedrnn::cuda
