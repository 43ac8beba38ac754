// The product of every step, W @ v: some rows of the weights by the vectors of some rows of the batch.
//
// Weights are M, 16 rows a tile; the batch is N, 8 columns a tile, so that a small batch wastes little. Both
// have K in chunks of 64 bytes: lane l has the 16 bytes l % 4 of a chunk, of a weight's rows l / 4 and
// l / 4 + 8, and of the batch's row l / 4. An instruction's k may be in any order if both factors have the
// same, so these 16 bytes are what the lane holds of two instructions' fragments: one load instead of four,
// and the same for every type.
//
// Where they fit, the weights of a warp stay on chip for all steps: in registers as far as those go, the rest
// in shared memory. Else stream.h brings them.
#pragma once

#include "device.h"

namespace fusedrnn::cuda {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kColumns = 8;    // rows of the batch in a tile
constexpr int kWarpUnits = 16;  // hidden units of a warp, each with all its gates
constexpr int kChunkBytes = 64;

__device__ __forceinline__ int lane() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp() { return threadIdx.x / 32; }
__device__ __forceinline__ uint4 load_piece(const unsigned char* from) { return *reinterpret_cast<const uint4*>(from); }

__device__ __forceinline__ float number(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
__device__ __forceinline__ uint32_t bits(float x) {
  uint32_t y;
  memcpy(&y, &x, sizeof y);
  return y;
}

// How 64 bytes of k are multiplied: sums[g] += weights[2 g] and weights[2 g + 1], the lane's pieces of two rows,
// by a chunk of 8 rows of the batch. Sum is a tile of 16 x 8; finish() leaves the lane with its part of an
// instruction's result: rows l / 4 and l / 4 + 8, columns 2 (l % 4) and 2 (l % 4) + 1. Of registers it takes
// kSumRegisters a sum, and kInFlight, shared out over the groups, for what the compiler loads ahead.

// By the instructions for matrices. Factors in fp32 are rounded to tf32, to nearest: the instruction would cut.
template <class S>
struct Matrix {
  using Storage = S;
  using Sum = float[4];
  static constexpr int kSumRegisters = 4, kInFlight = 0;

  static __device__ __forceinline__ uint4 prepare(uint4 piece) {
    if constexpr (sizeof(S) == 2) return piece;
    return {to_tf32(piece.x), to_tf32(piece.y), to_tf32(piece.z), to_tf32(piece.w)};
  }
  template <int kGroups>
  static __device__ __forceinline__ void add(Sum (&sums)[kGroups], const uint4 (&weights)[2 * kGroups],
                                             const unsigned char* chunk /*[8, stride]*/, int stride) {
    const uint4 v = prepare(load_piece(chunk + lane() / 4 * stride + lane() % 4 * 16));
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const uint4 low = weights[2 * g], high = weights[2 * g + 1];
      mma<S>(sums[g], {low.x, high.x, low.y, high.y}, {v.x, v.y});
      mma<S>(sums[g], {low.z, high.z, low.w, high.w}, {v.z, v.w});
    }
  }
  static __device__ __forceinline__ void finish(const Sum& sum, float (&result)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) result[i] = sum[i];
  }
};

// fp32 by three products in tf32. A factor is the sum of two parts, x = high + low but for 2^-23 of it; what low parts
// make of each other, 2^-22, is left out (Markidis et al., arXiv:1803.04014). The instruction cuts its sums off where
// others round them, so the large products of a chunk are summed by themselves and added as fp32 is; the small ones
// may stay (Ootomo and Yokota, arXiv:2203.03341).
struct Split {
  using Storage = float;
  using Sum = float[8];
  static constexpr int kSumRegisters = 8, kInFlight = 40;

  struct Parts {
    uint32_t high[4], low[4];
  };

  static __device__ __forceinline__ uint4 prepare(uint4 piece) { return piece; }
  // To nearest; the instruction cuts the low part off, which costs as much.
  static __device__ __forceinline__ Parts parts(uint4 piece, uint32_t half) {
    const uint32_t all[4] = {piece.x, piece.y, piece.z, piece.w};
    Parts of;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      of.high[i] = (all[i] + half) & 0xFFFFE000;
      of.low[i] = bits(number(all[i]) - number(of.high[i]));
    }
    return of;
  }
  template <int kGroups>
  static __device__ __forceinline__ void add(Sum (&sums)[kGroups], const uint4 (&weights)[2 * kGroups],
                                             const unsigned char* chunk /*[8, stride]*/, int stride) {
    // Parts of weights that stay in registers must not stay there too.
    const uint32_t half = unknown(0x1000);
    Parts v = parts(load_piece(chunk + lane() / 4 * stride + lane() % 4 * 16), half);
    // An infinite value has no low part, nor may it meet the low parts of weights, which are zero where they are exact.
    uint32_t finite[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool is = (v.high[i] & 0x7F800000) != 0x7F800000;
      v.low[i] = is ? v.low[i] : 0;
      finite[i] = is ? v.high[i] : 0;
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const Parts upper = parts(weights[2 * g], half), lower = parts(weights[2 * g + 1], half);
      float large[4] = {}, small[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) small[i] = sums[g][4 + i];
#pragma unroll
      for (int k = 0; k < 4; k += 2) {
        const uint32_t high[4] = {upper.high[k], lower.high[k], upper.high[k + 1], lower.high[k + 1]};
        const uint32_t low[4] = {upper.low[k], lower.low[k], upper.low[k + 1], lower.low[k + 1]};
        mma<float>(large, high, {v.high[k], v.high[k + 1]});
        mma<float>(small, high, {v.low[k], v.low[k + 1]});
        mma<float>(small, low, {finite[k], finite[k + 1]});
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[g][i] += large[i];
        sums[g][4 + i] = small[i];
      }
    }
  }
  static __device__ __forceinline__ void finish(const Sum& sum, float (&result)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) result[i] = sum[i] + sum[4 + i];
  }
};

// fp32 as it is, without an instruction for matrices: a lane multiplies its four k of two rows by all eight
// columns, and the four lanes of a row add theirs up in the end.
struct Strict {
  using Storage = float;
  using Sum = float[2 * kColumns];
  static constexpr int kSumRegisters = 2 * kColumns, kInFlight = 32;

  static __device__ __forceinline__ uint4 prepare(uint4 piece) { return piece; }
  static __device__ __forceinline__ float dot(float sum, uint4 a, uint4 b) {
    sum = fmaf(number(a.x), number(b.x), sum);
    sum = fmaf(number(a.y), number(b.y), sum);
    sum = fmaf(number(a.z), number(b.z), sum);
    return fmaf(number(a.w), number(b.w), sum);
  }
  template <int kGroups>
  static __device__ __forceinline__ void add(Sum (&sums)[kGroups], const uint4 (&weights)[2 * kGroups],
                                             const unsigned char* chunk /*[8, stride]*/, int stride) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const uint4 v = load_piece(chunk + n * stride + lane() % 4 * 16);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        sums[g][n] = dot(sums[g][n], weights[2 * g], v);
        sums[g][kColumns + n] = dot(sums[g][kColumns + n], weights[2 * g + 1], v);
      }
    }
  }
  // Halves what a lane has to say twice: it keeps the columns whose bit is its own and gives the others away.
  static __device__ __forceinline__ void finish(const Sum& sum, float (&result)[4]) {
    const bool upper = lane() & 2, odd = lane() & 1;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float four[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float first = sum[half * kColumns + i], second = sum[half * kColumns + 4 + i];
        four[i] = (upper ? second : first) + shuffle_xor(upper ? first : second, 2);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        result[half * 2 + i] = (odd ? four[2 + i] : four[i]) + shuffle_xor(odd ? four[i] : four[2 + i], 1);
      }
    }
  }
};

__device__ __host__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What a block has to do and where it keeps things. Of its 8 warps `unit_warps` share out the units, and as
// many as are left over share out K. In K the units of a gate fill up whole chunks: column(gate, unit).
struct Tile {
  int unit_warps;    // a power of two
  int row_tiles;     // tiles of 8 rows of the batch
  int gate_chunks;   // chunks of the units of one gate
  int chunks;        // of K
  int first_tile, first_direction;  // of the launch
  int stages;                       // of a launch that takes one step: chunks in shared memory at once
  int64_t step;                     // which step

  __device__ __forceinline__ int64_t direction() const { return first_direction + blockIdx.z; }
  __device__ __forceinline__ int first_row() const { return (first_tile + blockIdx.y) * rows(); }
  __device__ __host__ int units() const { return unit_warps * kWarpUnits; }
  __device__ __host__ int slices() const { return kWarps / unit_warps; }
  __device__ __host__ int rows() const { return row_tiles * kColumns; }
  // An odd number of chunks: the rows of a column then lie in different banks.
  __device__ __host__ int row_bytes() const { return (chunks | 1) * kChunkBytes; }
  __device__ __host__ int vector_bytes() const { return rows() * row_bytes(); }
  // Four more than a multiple of 16 for the banks again.
  __device__ __host__ int sums_row(int groups) const { return groups * units() + 4; }
  __device__ __host__ int sums_bytes(int groups) const { return slices() * rows() * sums_row(groups) * 4; }
  __device__ __host__ int first_chunk(int slice) const { return slice * chunks / slices(); }
};

// The weights of a warp: kGroups matrices, of each the rows of 16 units. Forward those are the gates, K the
// units; backward it is one, of the transposed weights, K all gates of all units. A product may have kRegisters of
// the 255 that a thread has.
template <class P, int kGroups, int kRegisters>
class Weights {
 public:
  using S = typename P::Storage;
  static constexpr int kPieces = 2 * kGroups;  // of a chunk
  static constexpr int kBlocks = 1;            // that a multiprocessor has room for
  static constexpr int kRegisterChunks =
      (kRegisters - P::kInFlight / kGroups - P::kSumRegisters * kGroups) / (4 * kPieces);

  __device__ __forceinline__ Weights(const Tile& tile, const uint4* weight /*[kGroups, hidden, gates of K, pieces]*/,
                                     int64_t hidden, int pieces, uint4* shared)
      : first_(tile.first_chunk(warp() / tile.unit_warps)),
        count_(tile.first_chunk(warp() / tile.unit_warps + 1) - first_),
        shared_(shared + threadIdx.x) {
    const int unit = (blockIdx.x * tile.unit_warps + warp() % tile.unit_warps) * kWarpUnits + lane() / 4;
    const int gates = tile.chunks / tile.gate_chunks;
    const auto fetch = [&](int c, int p) {
      const int chunk = first_ + c, gate = chunk / tile.gate_chunks, row = unit + p % 2 * 8;
      const int piece = (chunk - gate * tile.gate_chunks) * 4 + lane() % 4;
      if (c >= count_ || row >= hidden || piece >= pieces) return uint4{0, 0, 0, 0};
      return P::prepare(weight[((p / 2 * hidden + row) * gates + gate) * pieces + piece]);
    };
#pragma unroll
    for (int c = 0; c < kRegisterChunks; ++c) {
#pragma unroll
      for (int p = 0; p < kPieces; ++p) held_[c][p] = fetch(c, p);
    }
    for (int c = kRegisterChunks; c < count_; ++c) {
#pragma unroll
      for (int p = 0; p < kPieces; ++p) shared_[((c - kRegisterChunks) * kPieces + p) * kThreads] = fetch(c, p);
    }
  }

  // The products of 8 rows of the batch with the warp's slice of K.
  __device__ __forceinline__ void multiply(const unsigned char* vectors /*[8, row_bytes]*/, int row_bytes,
                                           float (&result)[kGroups][4]) const {
    typename P::Sum sums[kGroups] = {};
    vectors += first_ * kChunkBytes;
#pragma unroll
    for (int c = 0; c < kRegisterChunks; ++c) {
      if (c < count_) P::template add<kGroups>(sums, held_[c], vectors + c * kChunkBytes, row_bytes);
    }
    const uint4* from = shared_;
#pragma unroll 1
    for (int c = kRegisterChunks; c < count_; ++c, from += kPieces * kThreads) {
      uint4 pieces[kPieces];
#pragma unroll
      for (int p = 0; p < kPieces; ++p) pieces[p] = from[p * kThreads];
      P::template add<kGroups>(sums, pieces, vectors + c * kChunkBytes, row_bytes);
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g) P::finish(sums[g], result[g]);
  }

 private:
  int first_, count_;  // chunks
  uint4* shared_;      // [count - kRegisterChunks, kPieces, kThreads]: each lane its own
  uint4 held_[kRegisterChunks][kPieces];
};

// Puts the products of the block's n-th 8 rows where the threads that own their elements find them.
template <int kGroups>
__device__ __forceinline__ void put_products(const Tile& tile, int n, const float (&result)[kGroups][4],
                                             float* sums /*[slices, rows, sums_row]*/) {
  const int slice = warp() / tile.unit_warps, unit = warp() % tile.unit_warps * kWarpUnits + lane() / 4;
  const int stride = tile.sums_row(kGroups);
  float* to = sums + (slice * tile.rows() + n * kColumns + lane() % 4 * 2) * stride + unit;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i % 2 * stride + g * tile.units() + i / 2 * 8] = result[g][i];
  }
}

}  // namespace
}  // namespace fusedrnn::cuda
