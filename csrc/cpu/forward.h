// The forward scan of one direction, for any cell, as one thread of its team runs it.
//
// The hidden state lives in two padded scratch buffers, read from one and written to the other, so
// that threads which share the units of a step need one barrier a step (two with a projection).
// Both start as the initial state: a row that has not started reads it from either.
#pragma once

#include "loop.h"

namespace fusedrnn {
namespace {

template <class Cell, class T>
struct ForwardScan {
  using V = typename Simd<T>::V;
  static constexpr int W = Simd<T>::kWidth, G = Cell::kGates;

  const ForwardDirection<T>& d;
  const Part& part;
  const Shape& s = d.shape;
  const int64_t H = s.hidden, P = s.proj;
  const int64_t stride = scratch_stride(P, sizeof(T)), raw_stride = scratch_stride(H, sizeof(T));

  // One tile: gates of `blocks` blocks of units from `unit_block` on, of `rows` rows from b0 on.
  FUSEDRNN_HD void gates(const Clock& now, const T* h /*[B, stride]*/, T* h_new /*[B, stride]*/,
                         T* raw /*[B, raw_stride]*/, int64_t ending, int64_t unit_block, int64_t blocks,
                         int64_t b0, int64_t rows) const {
    alignas(64) T acc[8 * 4 * W];  // [rows, blocks, G, W]
    const int64_t block = P * G * W;
    tile_for<T, G>(rows, blocks)(P, h + b0 * stride, stride, d.weight_hh + unit_block * block, block, acc);
    for (int64_t j = 0; j < blocks; ++j) {
      const int64_t u = (unit_block + j) * W;
      const int n = static_cast<int>(smaller(W, H - u));
      V bias[G];
      for (int g = 0; g < G; ++g) bias[g] = d.bias_hh ? load(d.bias_hh + g * H + u, n) : V{};
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t b = b0 + r, row = now.row + b;
        V x[G], hg[G], prev[2], next[2], act[G], extra;
        for (int g = 0; g < G; ++g) {
          x[g] = load(d.x_gates + row * G * H + g * H + u, n);
          hg[g] = load(acc + ((r * blocks + j) * G + g) * W) + bias[g];
        }
        if constexpr (Cell::kDirect) prev[0] = load(h + b * stride + u);
        if constexpr (Cell::kStates == 2) prev[1] = load(d.state1 + b * H + u, n);
        Cell::template forward<V>(x, hg, prev, next, act, extra);
        if constexpr (Cell::kStates == 2) store(d.state1 + b * H + u, next[1], n);
        if (Cell::kSavesGates && d.gates) {
          for (int g = 0; g < G; ++g) store(d.gates + row * G * H + g * H + u, act[g], n);
        }
        if (Cell::kExtra != Extra::kNone && d.extra) store(d.extra + row * H + u, extra, n);
        if (d.weight_hr) {
          store(raw + b * raw_stride + u, next[0]);
          if (d.raw) store(d.raw + row * H + u, next[0], n);
        } else {
          store(h_new + b * stride + u, next[0]);
          emit(row, b, u, n, ending, next[0]);
        }
      }
    }
  }

  // A new hidden state leaves for the output, and for the last state where its row ends.
  FUSEDRNN_HD void emit(int64_t row, int64_t b, int64_t u, int n, int64_t ending, V h) const {
    store(d.output + row * d.output_stride + u, h, n);
    if (b >= ending) store(d.state0 + b * P + u, h, n);
  }

  FUSEDRNN_HD void project(const Clock& now, const T* raw /*[B, raw_stride]*/, T* h_new /*[B, stride]*/,
                           int64_t ending, int64_t unit_block, int64_t blocks, int64_t b0,
                           int64_t rows) const {
    alignas(64) T acc[8 * 4 * W];  // [rows, blocks, W]
    const int64_t block = H * W;
    tile_for<T, 1>(rows, blocks)(H, raw + b0 * raw_stride, raw_stride, d.weight_hr + unit_block * block,
                                 block, acc);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < blocks; ++j) {
        const int64_t b = b0 + r, u = (unit_block + j) * W;
        const V h = load(acc + (r * blocks + j) * W);
        store(h_new + b * stride + u, h);
        emit(now.row + b, b, u, static_cast<int>(smaller(W, P - u)), ending, h);
      }
    }
  }

  void run() const {
    T* h = d.scratch;
    T* h_new = h + s.batch * stride;
    T* raw = h_new + s.batch * stride;
    const Range units = share((H + W - 1) / W, part.member, part.members);
    const Range outputs = share((P + W - 1) / W, part.member, part.members);
    Clock now = clock_at(s, d.reverse, d.reverse);
    for (int64_t step = 0; step < s.time; ++step) {
      // Rows from `ending` on have their last step now.
      const int64_t ending = d.reverse ? (now.t == 0 ? 0 : now.active) : now.size(now.t + 1);
      const bool backwards = step & 1;
      for_groups(units, kBlocks<G>, backwards, [&](int64_t unit_block, int64_t blocks) {
        for_tiles(part, now.active, max_rows(static_cast<int>(G == 1 ? 4 : G)),
                  [&](int64_t b0, int64_t rows) {
                    gates(now, h, h_new, raw, ending, unit_block, blocks, b0, rows);
                  });
      });
      if (d.weight_hr) {
        if (part.barrier) barrier_wait(part.barrier);
        for_groups(outputs, kBlocks<1>, backwards, [&](int64_t unit_block, int64_t blocks) {
          for_tiles(part, now.active, max_rows(4), [&](int64_t b0, int64_t rows) {
            project(now, raw, h_new, ending, unit_block, blocks, b0, rows);
          });
        });
      }
      if (part.barrier && step + 1 < s.time) barrier_wait(part.barrier);
      if (step + 1 < s.time) advance(now, !d.reverse);
      T* swap = h;
      h = h_new;
      h_new = swap;
    }
  }
};

template <class Cell, class T>
void forward_scan(const ForwardDirection<T>& d, const Part& part) {
  ForwardScan<Cell, T>{d, part}.run();
}

}  // namespace
}  // namespace fusedrnn
