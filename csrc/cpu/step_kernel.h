// One time step of one layer, for any cell and storage, as one thread of its team runs it.
//
// The two halves of a gate are summed apart: each has its own scale, and a cell takes them apart.
#pragma once

#include "loop.h"
#include "step.h"

namespace fusedrnn {
namespace {

// Rows as a product P takes them: as they are. Others have their own (step_digits.h).
template <class P>
struct StepFactor {
  static int64_t bytes(int64_t, int64_t) { return 0; }
  static const StepRows& rows(const StepRows& x, int64_t, int64_t, char*) { return x; }
};

// rows @ weight.T for `blocks` blocks of the weight's units.
template <class P, int G>
FUSEDRNN_HD void step_multiply(int64_t count, int64_t blocks, bool lone, int64_t k, const StepRows& rows, int64_t first,
                               const void* weight, int64_t unit_block, float* acc /*[count, blocks, G, W]*/) {
  constexpr int W = Simd<float>::kWidth, K = P::kTogether;
  const int64_t block = (k + K - 1) / K * K * G * W;
  tile_for<P, G>(count, blocks, lone)(k, rows.data + first * rows.stride, rows.stride, rows.k_stride,
                                       static_cast<const typename P::Element*>(weight) + unit_block * block, block,
                                       acc);
}

// f(first block, blocks, first row, rows) over the part's blocks and all rows.
template <int G, class F>
FUSEDRNN_HD void for_step_tiles(int64_t units, int64_t batch, const StepPart& part, F f) {
  constexpr int W = Simd<float>::kWidth, kRows = max_rows(G == 1 ? 4 : G);
  for_groups(share((units + W - 1) / W, part.member, part.members), batch == 1 ? kLoneBlocks<G> : kBlocks<G>,
             part.backwards,
             [&](int64_t unit_block, int64_t blocks) {
               for_each_tile(0, batch, kRows,
                             [&](int64_t first, int64_t rows) { f(unit_block, blocks, first, rows); });
             });
}

template <class Cell, class P>
void step_units(const StepShape& s, const StepLayer& l, const StepRows& x, const StepPart& part) {
  using V = VecF;
  constexpr int W = Simd<float>::kWidth, G = Cell::kGates;
  const StepRows h{l.h, s.proj_stride, 1};
  const auto x_rows = StepFactor<P>::rows(x, s.batch, l.inputs, part.scratch);
  const auto h_rows = StepFactor<P>::rows(h, s.batch, s.proj, part.scratch + StepFactor<P>::bytes(s.batch, l.inputs));
  float* const to = l.raw ? l.raw : l.h_new;
  const int64_t to_stride = l.raw ? s.hidden_stride : s.proj_stride;
  const bool lone = s.batch == 1;
  for_step_tiles<G>(s.hidden, s.batch, part, [&](int64_t unit_block, int64_t blocks, int64_t first, int64_t rows) {
    alignas(64) float x_acc[8 * 4 * W], h_acc[8 * 4 * W];  // [rows, blocks, G, W]
    // Backwards too: of what the step before read, the last part is still in the cache.
    if (!part.backwards) step_multiply<P, G>(rows, blocks, lone, l.inputs, x_rows, first, l.weight_ih, unit_block, x_acc);
    step_multiply<P, G>(rows, blocks, lone, s.proj, h_rows, first, l.weight_hh, unit_block, h_acc);
    if (part.backwards) step_multiply<P, G>(rows, blocks, lone, l.inputs, x_rows, first, l.weight_ih, unit_block, x_acc);
    for (int64_t j = 0; j < blocks; ++j) {
      const int64_t u = (unit_block + j) * W, at = u * G;
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t b = first + r;
        V xg[G], hg[G], prev[2], next[2], act[G], extra;
        for (int g = 0; g < G; ++g) {
          xg[g] = load(x_acc + ((r * blocks + j) * G + g) * W);
          hg[g] = load(h_acc + ((r * blocks + j) * G + g) * W);
          if constexpr (P::kScaled) {
            xg[g] *= load(l.scale_ih + at + g * W);
            hg[g] *= load(l.scale_hh + at + g * W);
          }
          xg[g] += load(l.bias_ih + at + g * W);
          hg[g] += load(l.bias_hh + at + g * W);
        }
        if constexpr (Cell::kDirect) prev[0] = load(l.h + b * s.proj_stride + u);
        if constexpr (Cell::kStates == 2) prev[1] = load(l.c + b * s.hidden_stride + u);
        Cell::template forward<V>(xg, hg, prev, next, act, extra);
        if constexpr (Cell::kStates == 2) store(l.c + b * s.hidden_stride + u, next[1]);
        store(to + b * to_stride + u, next[0]);
      }
    }
  });
}

template <class P>
void step_project(const StepShape& s, const StepLayer& l, const StepPart& part) {
  constexpr int W = Simd<float>::kWidth;
  const auto raw = StepFactor<P>::rows({l.raw, s.hidden_stride, 1}, s.batch, s.hidden, part.scratch);
  for_step_tiles<1>(s.proj, s.batch, part, [&](int64_t unit_block, int64_t blocks, int64_t first, int64_t rows) {
    alignas(64) float acc[8 * 4 * W];  // [rows, blocks, W]
    step_multiply<P, 1>(rows, blocks, s.batch == 1, s.hidden, raw, first, l.weight_hr, unit_block, acc);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < blocks; ++j) {
        const int64_t u = (unit_block + j) * W;
        VecF h = load(acc + (r * blocks + j) * W);
        if constexpr (P::kScaled) h *= load(l.scale_hr + u);
        store(l.h_new + (first + r) * s.proj_stride + u, h);
      }
    }
  });
}

template <class Cell>
void update_cell(const CellUpdate& c) {
  using V = VecF;
  constexpr int W = Simd<float>::kWidth, G = Cell::kGates;
  const int64_t H = c.hidden;
  for (int64_t b = 0; b < c.rows; ++b) {
    for (int64_t u = 0; u < H; u += W) {
      const int n = static_cast<int>(smaller(W, H - u));
      V x[G], h[G], prev[2], next[2], act[G], extra;
      for (int g = 0; g < G; ++g) {
        x[g] = load(c.x_gates + (b * G + g) * H + u, n);
        h[g] = load(c.h_gates + (b * G + g) * H + u, n);
      }
      if constexpr (Cell::kDirect) prev[0] = load(c.h + b * c.h_stride + u, n);
      if constexpr (Cell::kStates == 2) prev[1] = load(c.c + b * c.c_stride + u, n);
      Cell::template forward<V>(x, h, prev, next, act, extra);
      if constexpr (Cell::kStates == 2) store(c.c_new + b * H + u, next[1], n);
      store(c.h_new + b * H + u, next[0], n);
      if (c.output) store(c.output + b * H + u, next[0], n);
    }
  }
}

template <class P>
constexpr StepFunctions step_functions = {
    P::kTogether, StepFactor<P>::bytes,
    {step_units<RnnTanh, P>, step_units<RnnRelu, P>, step_units<Lstm, P>, step_units<Gru, P>}, step_project<P>};

}  // namespace
}  // namespace fusedrnn
