// The product of a step whose weights no chip holds: they come from memory in every step.
//
// What a step must cost. All weights are read once for each tile of the batch, G*H*H values: LSTM, H = 2048 are
// 67 MB in fp32 and 34 MB in 16 bits. From memory (an H100: 3.35 TB/s) that takes 20 and 10 us; what stays in
// the 50 MB of its L2 comes at about 5.5 TB/s, 34 MB in 6 us. Beside them each block of 16 units reads the
// vectors of its rows, for 8 of them 1 / (2 G) as much forward and 1 / 2 as much backward. Products are
// 2 * G*H * H flops a row: memory is what a step waits for until fp32 on plain instructions has about 40
// rows, and tensor cores hundreds.
//
// So what counts is bytes on their way: 25 a nanosecond for each of 132 multiprocessors are 20 KB over 0.8 us
// of latency, and a block asks for up to three chunks, 36 to 144 KB, while it multiplies one. Every lane copies
// what it reads itself, so no barrier is in the way, and the warps of a block take neighbouring chunks, so that
// it reads whole rows of DRAM. From sm_90 on launches overlap: the first weights of the next one, which no step
// writes, come while this one ends.
#pragma once

#include "exchange.h"

namespace fusedrnn::cuda {
namespace {

// Nothing is exchanged: a launch takes one step and reads what those before it have stored.
template <class S>
class Stepped {
 public:
  static constexpr Together kTogether = Together::kNone;
  static constexpr bool kOneStep = true;
  static constexpr int kMost = 2;

  static __device__ __host__ int bytes(const Tile&) { return 0; }

  // From here on the stores of the launch before can be read.
  __device__ __forceinline__ Stepped(const Tile&, int, unsigned char*, uint32_t*) {
    if (!planted(Race::kOverlap)) wait_for_last_launch();
  }

  __device__ __forceinline__ void publish(int64_t, int, int, int, S) {}
  __device__ __forceinline__ void sent() {}
  __device__ __forceinline__ void finish(int64_t) {}
};

// The matrices of Weights, a warp's slice of K being every eighth chunk. A ring of chunks in shared memory, each the
// lane's pieces of the weights and of row_tiles tiles of the batch.
template <class P, int kGroups>
class Stream {
 public:
  using S = typename P::Storage;
  static constexpr int kPieces = 2 * kGroups;  // of the weights in a chunk
  // As many rows as 64 registers can sum, up to Stepped's.
  static constexpr int kSums = 64 / (P::kSumRegisters * kGroups);
  static constexpr int kRowTiles = kSums < 4 ? kSums : 4;
  static constexpr int kBlocks = kRowTiles * P::kSumRegisters * kGroups < 48 ? 2 : 1;
  static constexpr int kMostStages = 4;

  static __device__ __host__ int chunk_bytes(const Tile& tile) { return (kPieces + tile.row_tiles) * kThreads * 16; }

  // Asks for the first weights.
  __device__ __forceinline__ Stream(const Tile& tile, const uint4* weight /*[kGroups, hidden, gates of K, pieces]*/,
                                    int64_t hidden, int pieces, uint4* ring)
      : tile_(tile),
        hidden_(static_cast<int>(hidden)),
        pieces_(pieces),
        row_pieces_(static_cast<int64_t>(tile.chunks / tile.gate_chunks) * pieces),
        count_((tile.chunks - warp() + kWarps - 1) / kWarps),
        ring_(ring + threadIdx.x) {
    const int row = blockIdx.x * kWarpUnits + lane() / 4;
    rows_ = hidden_ - row;
    weight_ = weight + row * row_pieces_;
#pragma unroll 1
    for (int c = 0; c < tile.stages - 1; ++c) copy_weights(c, c);
  }

  // All threads; sums may lie where the ring does.
  template <class Source>
  __device__ __forceinline__ void multiply_rows(Source source, float* sums /*[slices, rows, sums_row]*/) {
    const S* rows[kRowTiles];
#pragma unroll
    for (int n = 0; n < kRowTiles; ++n) rows[n] = n < tile_.row_tiles ? source(n * kColumns + lane() / 4) : nullptr;
#pragma unroll 1
    for (int c = 0; c < tile_.stages - 1; ++c) {
      copy_vectors(c, c, rows);
      copies_commit();
    }

    typename P::Sum products[kRowTiles][kGroups] = {};
    int stage = 0, free = tile_.stages - 1;
#pragma unroll 1
    for (int c = 0; c < count_; ++c) {
      if (!planted(Race::kNoWait)) wait_for_first();
      warp_sync();  // other lanes have vectors of this chunk, and are done with the one before
      copy_weights(c + tile_.stages - 1, free);
      copy_vectors(c + tile_.stages - 1, free, rows);
      copies_commit();
      const uint4* from = chunk(stage);
      uint4 weights[kPieces];
#pragma unroll
      for (int p = 0; p < kPieces; ++p) weights[p] = P::prepare(from[p * kThreads]);
      from += kPieces * kThreads - lane();
#pragma unroll
      for (int n = 0; n < kRowTiles; ++n, from += kThreads) {
        if (n >= tile_.row_tiles) break;
        P::template add<kGroups>(products[n], weights, reinterpret_cast<const unsigned char*>(from), kChunkBytes);
      }
      free = stage;
      if (++stage == tile_.stages) stage = 0;
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kRowTiles; ++n) {
      if (n >= tile_.row_tiles) break;
      float result[kGroups][4];
#pragma unroll
      for (int g = 0; g < kGroups; ++g) P::finish(products[n][g], result[g]);
      put_products(tile_, n, result, sums);
    }
  }

 private:
  __device__ __forceinline__ uint4* chunk(int stage) const {
    return ring_ + (planted(Race::kOneBuffer) ? 0 : stage) * (kPieces + tile_.row_tiles) * kThreads;
  }

  // The instruction takes a constant.
  __device__ __forceinline__ void wait_for_first() const {
    switch (tile_.stages) {
      case 2: return copies_wait_but<0>();
      case 3: return copies_wait_but<1>();
      default: return copies_wait_but<kMostStages - 2>();
    }
  }

  // Of the warp's c-th chunk: its gate of K, and the lane's piece of that gate.
  __device__ __forceinline__ int place(int c, int& gate) const {
    const int number = c * kWarps + warp();
    gate = number / tile_.gate_chunks;
    return (number - gate * tile_.gate_chunks) * 4 + lane() % 4;
  }

  __device__ __forceinline__ void copy_weights(int c, int stage) const {
    if (c >= count_) return;
    int gate;
    const int piece = place(c, gate);
    const uint4* from = weight_ + int64_t{gate} * pieces_ + piece;
    uint4* to = chunk(stage);
#pragma unroll
    for (int p = 0; p < kPieces; ++p, to += kThreads) {
      if (p % 2 * 8 < rows_ && piece < pieces_) {
        copy_async(to, from + (int64_t{p / 2} * hidden_ + p % 2 * 8) * row_pieces_);
      } else {
        *to = {0, 0, 0, 0};
      }
    }
  }

  __device__ __forceinline__ void copy_vectors(int c, int stage, const S* const (&rows)[kRowTiles]) const {
    if (c >= count_) return;
    int gate;
    const int k = place(c, gate) * static_cast<int>(16 / sizeof(S));
    uint4* to = chunk(stage) + kPieces * kThreads;
#pragma unroll
    for (int n = 0; n < kRowTiles; ++n, to += kThreads) {
      if (n >= tile_.row_tiles) break;
      const S* values = rows[n] == nullptr ? nullptr : rows[n] + int64_t{gate} * hidden_;
      copy_piece(to, values, k, hidden_, are_pieces(rows[n], hidden_));
    }
  }

  const Tile& tile_;
  int hidden_, pieces_;  // pieces of a gate of K
  int64_t row_pieces_;   // of a row of the weights
  int count_;            // chunks of the warp
  uint4* ring_;          // [stages, kPieces + row_tiles, kThreads]: from here each lane its own
  const uint4* weight_;  // the lane's first row, of which
  int rows_;             // so many are left
};

// How a scan comes by its weights.
template <class P, int kGroups, class Exchange>
struct Means {
  using Type = Weights<P, kGroups, Exchange::kRegisters>;
};
template <class P, int kGroups, class S>
struct Means<P, kGroups, Stepped<S>> {
  using Type = Stream<P, kGroups>;
};
template <class P, int kGroups, class Exchange>
using WeightsOf = typename Means<P, kGroups, Exchange>::Type;

// The products of step i with the vectors at source(row), a row of the tile.
template <class P, int kGroups, int kRegisters, class Exchange, class Source>
__device__ __forceinline__ void multiply_rows(const Tile& tile, const Weights<P, kGroups, kRegisters>& weights,
                                              Exchange& exchange, int64_t i, Source source, float* sums) {
  exchange.receive(i, source);
  const unsigned char* vectors = exchange.vectors(i);
  for (int n = 0; n < tile.row_tiles; ++n) {
    float result[kGroups][4];
    weights.multiply(vectors + n * kColumns * tile.row_bytes(), tile.row_bytes(), result);
    put_products(tile, n, result, sums);
  }
}
template <class P, int kGroups, class S, class Source>
__device__ __forceinline__ void multiply_rows(const Tile&, Stream<P, kGroups>& weights, Stepped<S>&, int64_t,
                                              Source source, float* sums) {
  weights.multiply_rows(source, sums);
}

}  // namespace
}  // namespace fusedrnn::cuda
