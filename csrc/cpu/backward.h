// The backward scan of one direction, for any cell, as one thread of its team runs it.
//
// d_state0 and d_state1 start as the gradients of the last states and end as those of the initial
// ones. They are only touched while a row is active, so rows of any length need no special case.
// The gradients of h_gates go through two padded scratch buffers in turn: the next step may write
// one while a slower thread still multiplies the other.
#pragma once

#include "loop.h"

namespace fusedrnn {
namespace {

template <class Cell, class T>
struct BackwardScan {
  using V = typename Simd<T>::V;
  static constexpr int W = Simd<T>::kWidth, G = Cell::kGates;

  const BackwardDirection<T>& d;
  const Part& part;
  const Shape& s = d.shape;
  const int64_t H = s.hidden, P = s.proj;
  const int64_t stride = scratch_stride(G * H, sizeof(T));

  // The gradient of the hidden state of (row, b) at units u .. u + n.
  FUSEDRNN_HD V incoming(int64_t row, int64_t b, int64_t u, int n) const {
    const V through_time = load(d.d_state0 + b * P + u, n);
    return d.d_output ? through_time + load(d.d_output + row * d.d_output_stride + u, n) : through_time;
  }

  // The gates of one row at one block of units; d_h is the gradient of the unprojected hidden state.
  FUSEDRNN_HD void gates(const Clock& now, T* d_gates /*[B, stride]*/, int64_t b, int64_t u, int n,
                         V d_h) const {
    const int64_t row = now.row + b;
    const bool first = b >= now.previous_active();
    const int64_t before = now.previous_row() + b;
    V act[G], extra{}, prev[2], d_next[2], d_x[G], d_hg[G], d_prev[2];
    for (int g = 0; g < G; ++g) {
      act[g] = Cell::kSavesGates ? load(d.gates + row * G * H + g * H + u, n)
                                 : load(d.output + row * d.output_stride + u, n);
    }
    if constexpr (Cell::kExtra != Extra::kNone) extra = load(d.extra + row * H + u, n);
    if constexpr (Cell::kReadsPrev) {
      prev[0] = first ? load(d.initial0 + b * P + u, n) : load(d.output + before * d.output_stride + u, n);
    }
    if constexpr (Cell::kStates == 2) {
      static_assert(Cell::kExtra == Extra::kState1, "the previous state 1 is read from what was saved");
      prev[1] = first ? load(d.initial1 + b * H + u, n) : load(d.extra + before * H + u, n);
      d_next[1] = load(d.d_state1 + b * H + u, n);
    }
    d_next[0] = d_h;
    Cell::template backward<V>(act, extra, prev, d_next, d_x, d_hg, d_prev);
    for (int g = 0; g < G; ++g) {
      store(d.d_x_gates + row * G * H + g * H + u, d_x[g], n);
      store(d_gates + b * stride + g * H + u, d_hg[g], n);
    }
    if constexpr (Cell::kSplitGate >= 0) store(d.d_split + row * H + u, d_hg[Cell::kSplitGate], n);
    if constexpr (Cell::kDirect) store(d.d_state0 + b * P + u, d_prev[0], n);
    if constexpr (Cell::kStates == 2) store(d.d_state1 + b * H + u, d_prev[1], n);
  }

  // d_state0 = d_gates @ weight_hh, plus what the cell left there if it has a direct path.
  FUSEDRNN_HD void through_weights(const T* d_gates /*[B, stride]*/, int64_t unit_block, int64_t blocks,
                                   int64_t b0, int64_t rows) const {
    alignas(64) T acc[8 * 4 * W];  // [rows, blocks, W]
    const int64_t block = G * H * W;
    tile_for<T, 1>(rows, blocks)(G * H, d_gates + b0 * stride, stride, d.weight_hh + unit_block * block,
                                 block, acc);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < blocks; ++j) {
        const int64_t u = (unit_block + j) * W;
        const int n = static_cast<int>(smaller(W, P - u));
        T* to = d.d_state0 + (b0 + r) * P + u;
        const V sum = load(acc + (r * blocks + j) * W);
        store(to, Cell::kDirect ? sum + load(to, n) : sum, n);
      }
    }
  }

  // The whole of a step's gate phase behind a projection.
  FUSEDRNN_HD void projected_gates(const Clock& now, T* d_gates /*[B, stride]*/, int64_t unit_block,
                                   int64_t blocks, int64_t b0, int64_t rows) const {
    alignas(64) T acc[8 * 4 * W];  // [rows, blocks, W]
    const int64_t block = P * W;
    tile_for<T, 1>(rows, blocks)(P, d.d_hidden + (now.row + b0) * P, P, d.weight_hr + unit_block * block,
                                 block, acc);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < blocks; ++j) {
        const int64_t u = (unit_block + j) * W;
        gates(now, d_gates, b0 + r, u, static_cast<int>(smaller(W, H - u)),
              load(acc + (r * blocks + j) * W));
      }
    }
  }

  void run() const {
    T* d_gates = d.scratch;
    T* d_gates_other = d_gates + s.batch * stride;
    const Range units = share((H + W - 1) / W, part.member, part.members);
    const Range outputs = share((P + W - 1) / W, part.member, part.members);
    Clock now = clock_at(s, d.reverse, !d.reverse);
    for (int64_t step = 0; step < s.time; ++step) {
      const bool backwards = step & 1;
      if (d.weight_hr) {
        for_tiles(part, now.active, 1, [&](int64_t b, int64_t) {
          for (int64_t block = outputs.begin; block < outputs.end; ++block) {
            const int64_t u = block * W, row = now.row + b;
            const int n = static_cast<int>(smaller(W, P - u));
            store(d.d_hidden + row * P + u, incoming(row, b, u, n), n);
          }
        });
        if (part.barrier) barrier_wait(part.barrier);
        for_groups(units, kBlocks<1>, backwards, [&](int64_t unit_block, int64_t blocks) {
          for_tiles(part, now.active, max_rows(4), [&](int64_t b0, int64_t rows) {
            projected_gates(now, d_gates, unit_block, blocks, b0, rows);
          });
        });
      } else {
        for_tiles(part, now.active, 1, [&](int64_t b, int64_t) {
          for (int64_t block = units.begin; block < units.end; ++block) {
            const int64_t u = block * W;
            const int n = static_cast<int>(smaller(W, H - u));
            gates(now, d_gates, b, u, n, incoming(now.row + b, b, u, n));
          }
        });
      }
      if (part.barrier) barrier_wait(part.barrier);
      for_groups(outputs, kBlocks<1>, backwards, [&](int64_t unit_block, int64_t blocks) {
        for_tiles(part, now.active, max_rows(4), [&](int64_t b0, int64_t rows) {
          through_weights(d_gates, unit_block, blocks, b0, rows);
        });
      });
      if (step + 1 < s.time) advance(now, d.reverse);
      T* swap = d_gates;
      d_gates = d_gates_other;
      d_gates_other = swap;
    }
  }
};

template <class Cell, class T>
void backward_scan(const BackwardDirection<T>& d, const Part& part) {
  BackwardScan<Cell, T>{d, part}.run();
}

}  // namespace
}  // namespace fusedrnn
