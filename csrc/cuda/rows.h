// Which rows of N a step has, and which of them a thread updates.
#pragma once

#include "product.h"

namespace fusedrnn::cuda {
namespace {

// The rows of one step: first + b for the sequences b < size.
struct Span {
  int64_t first;
  int size;
};

// The steps of a tile of the batch in the order in which a scan takes them; before and after them nothing runs.
class Steps {
 public:
  __device__ __forceinline__ Steps(const int64_t* offsets, const int64_t* lengths, int64_t time, int64_t batch,
                                   int64_t first_row, bool flipped)
      : offsets_(offsets), batch_(batch), count_(lengths ? lengths[first_row] : time), flipped_(flipped) {}

  __device__ __forceinline__ int64_t count() const { return count_; }

  __device__ __forceinline__ Span at(int64_t i) const {
    if (i < 0 || i >= count_) return {0, 0};
    const int64_t t = flipped_ ? count_ - 1 - i : i;
    if (offsets_ == nullptr) return {t * batch_, static_cast<int>(batch_)};
    return {offsets_[t], static_cast<int>(offsets_[t + 1] - offsets_[t])};
  }

 private:
  const int64_t* offsets_;
  int64_t batch_, count_;
  bool flipped_;
};

// A thread has one unit of up to kMost rows, with all its gates and states. Neighbours have neighbouring
// units, so that what they load and store lies side by side.
template <int kMost>
class Own {
 public:
  __device__ __forceinline__ Own(const Tile& tile, int64_t batch, int hidden)
      : local_unit(threadIdx.x % tile.units()),
        unit(blockIdx.x * tile.units() + local_unit),
        first_(threadIdx.x / tile.units()),
        every_(kThreads / tile.units()),
        first_row_(tile.first_row()) {
    const int64_t left = batch - first_row_;
    rows_ = unit >= hidden ? 0 : left < tile.rows() ? static_cast<int>(left) : tile.rows();
  }

  __device__ __forceinline__ bool has(int e) const { return row(e) < rows_; }
  __device__ __forceinline__ int row(int e) const { return first_ + e * every_; }  // in the tile
  __device__ __forceinline__ int sequence(int e) const { return first_row_ + row(e); }
  __device__ __forceinline__ bool runs(int e, const Span& span) const { return has(e) && sequence(e) < span.size; }

  // Bit e: the states of row e are zero before this step.
  __device__ __forceinline__ unsigned reset(const uint8_t* resets, const Span& span) const {
    unsigned bits = 0;
    if (resets == nullptr) return bits;
#pragma unroll
    for (int e = 0; e < kMost; ++e) {
      if (runs(e, span) && resets[span.first + sequence(e)] != 0) bits |= 1u << e;
    }
    return bits;
  }

  // total += the products of row e, over the slices of K.
  template <int kGroups>
  __device__ __forceinline__ void add(const Tile& tile, const float* sums, int e, float (&total)[kGroups]) const {
    const float* from = sums + row(e) * tile.sums_row(kGroups) + local_unit;
    for (int s = 0; s < tile.slices(); ++s, from += tile.rows() * tile.sums_row(kGroups)) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) total[g] += from[g * tile.units()];
    }
  }

  const int local_unit;
  const int unit;

 private:
  int first_, every_, first_row_, rows_;
};

}  // namespace
}  // namespace fusedrnn::cuda
