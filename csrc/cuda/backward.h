// The backward scan of a tile of the batch: from the gradient of the output to that of the gates, from which
// every other gradient is a product over all rows.
//
// What a step must cost: the same products as forward, 2 * G*H * H flops a row; of memory (SAVED + 3) * H
// values in and G*H out. What the blocks of a grid exchange is G times as much as forward, since a unit's
// gradient needs all gates of all units, and they are stored anyway. The alternative, sums of partial
// gradients of h, moves 4 bytes where this moves 2 G, but through memory that is written twice and in an
// order that must be fixed for the result to be; it would pay where this read is what a step waits for.
#pragma once

#include "forward.h"

namespace fusedrnn::cuda {
namespace {

template <class Cell, class P, template <class> class Exchange>
__global__ void __launch_bounds__(kThreads, WeightsOf<P, 1, Exchange<typename P::Storage>>::kBlocks)
    scan_backward_kernel(const FusedrnnCudaBackward a, const Tile tile) {
  using S = typename P::Storage;
  constexpr int G = Cell::kGates, kStates = Cell::kStates, kMost = Exchange<S>::kMost;
  constexpr bool kOneStep = Exchange<S>::kOneStep, kSplit = Cell::kSplitGate >= 0;
  if constexpr (Exchange<S>::kTogether == Together::kCluster && FUSEDRNN_ARCH < 900) return;
  if constexpr (kOneStep) let_next_launch_begin();
  const int64_t H = a.hidden, direction = tile.direction();
  const int first_row = tile.first_row();
  const uint8_t* resets = a.resets == nullptr ? nullptr : a.resets + direction * a.rows;
  const Steps steps(a.offsets, a.lengths, a.time, a.batch, first_row, direction == 0);
  const int64_t first = kOneStep ? tile.step : 0;
  if (kOneStep && first > steps.count()) return wait_for_last_launch();

  const S* saved = static_cast<const S*>(a.saved) + direction * a.saved_direction;
  const float* cells = a.cells + direction * a.rows * H;
  const S* cells0 = static_cast<const S*>(a.cells0) + direction * a.batch * H;
  const S* output = static_cast<const S*>(a.output) + direction * a.output_direction;
  const S* start = static_cast<const S*>(a.start) + direction * a.batch * H;
  const S* grad = static_cast<const S*>(a.grad) + direction * a.grad_direction;
  S* d_x_gates = static_cast<S*>(a.d_x_gates) + direction * a.rows * G * H;
  S* d_h_gates = static_cast<S*>(a.d_h_gates) + direction * a.rows * G * H;

  unsigned char* shared = dynamic_shared();
  float* sums = reinterpret_cast<float*>(shared + Exchange<S>::bytes(tile));
  uint4* kept = reinterpret_cast<uint4*>(shared + Exchange<S>::bytes(tile) + (kOneStep ? 0 : tile.sums_bytes(1)));
  const int pieces = static_cast<int>(ceil_div(H * sizeof(S), 16));
  const uint4* weight = static_cast<const uint4*>(a.weight) + direction * H * G * pieces;
  WeightsOf<P, 1, Exchange<S>> weights(tile, weight, H, pieces, kept);
  const Own<kMost> own(tile, a.batch, static_cast<int>(H));

  // What a step reads: of its own rows, and of those before it in the order of forward.
  S gates[kMost][G] = {}, own_extra[kMost] = {}, d_output[kMost] = {}, old_hidden[kMost] = {};
  float cell[kMost] = {}, old_cell[kMost] = {};
  const auto load = [&](const Span& span, const Span& before, unsigned reset) {
#pragma unroll
    for (int e = 0; e < kMost; ++e) {
      if (!own.runs(e, span)) continue;
      const int b = own.sequence(e);
      const int64_t row = span.first + b, source = before.first + b;
      const S* from = saved + row * a.saved_row + own.unit;
#pragma unroll
      for (int g = 0; g < G; ++g) gates[e][g] = from[g * H];
      if constexpr (kSavesOwn<Cell>) own_extra[e] = from[G * H];
      if (a.grad != nullptr) d_output[e] = grad[row * a.grad_row + own.unit];
      const bool stored = b < before.size, zero = reset >> e & 1;
      if constexpr (Cell::kReadsPrev) {
        old_hidden[e] = zero     ? from_float<S>(0.0f)
                        : stored ? output[source * a.output_row + own.unit]
                                 : start[int64_t{b} * H + own.unit];
      }
      if constexpr (kStates > 1) {
        cell[e] = cells[row * H + own.unit];
        old_cell[e] = zero ? 0.0f : stored ? cells[source * H + own.unit] : to_float(cells0[int64_t{b} * H + own.unit]);
      }
    }
  };

  Span later = steps.at(first - 1), now = steps.at(first), before = steps.at(first + 1);
  unsigned reset = own.reset(resets, now);
  load(now, before, reset);

  Exchange<S> exchange(tile, static_cast<int>(H), shared, a.counters);
  if (blockIdx.x * tile.units() >= H) return;  // there are as many blocks as a cluster must have
  // Of the states after a step, but for what comes through the weights from the step that is later in time.
  float d_states[kMost][kStates] = {};
  const auto d_state = [&](int s, int e) {
    return a.d_states + ((s * int64_t{a.directions} + direction) * a.batch + own.sequence(e)) * H + own.unit;
  };
#pragma unroll
  for (int e = 0; e < kMost; ++e) {
    for (int s = 0; s < kStates; ++s) {
      if (own.has(e)) d_states[e][s] = load_fresh(d_state(s, e));
    }
  }

  for (int64_t i = first;; ++i) {
    const Span next = steps.at(i + 2);
    const unsigned next_reset = own.reset(resets, before);
    const auto vector = [&](int row) -> const S* {
      const int b = first_row + row;
      if (b >= later.size || (resets != nullptr && resets[later.first + b] != 0)) return nullptr;
      return d_h_gates + (later.first + b) * G * H;
    };
    multiply_rows(tile, weights, exchange, i, vector, sums);
    if (!planted(Race::kNoBlockBarrier)) __syncthreads();
#pragma unroll
    for (int e = 0; e < kMost; ++e) {
      if (!own.has(e)) continue;
      float sum[1] = {};
      own.add(tile, sums, e, sum);
      d_states[e][0] += sum[0];
    }
    if (i == steps.count()) break;

    float d_x[kMost][G];
#pragma unroll
    for (int e = 0; e < kMost; ++e) {
      const bool runs = own.runs(e, now), keep = runs && !(reset >> e & 1);
      float d_h[G] = {};
      if (runs) {
        float act[G], old[2] = {}, d_next[kStates], d_old[2] = {};
#pragma unroll
        for (int g = 0; g < G; ++g) act[g] = to_float(gates[e][g]);
        if constexpr (Cell::kReadsPrev) old[0] = to_float(old_hidden[e]);
        if constexpr (kStates > 1) old[1] = old_cell[e];
#pragma unroll
        for (int s = 0; s < kStates; ++s) d_next[s] = d_states[e][s];
        if (a.grad != nullptr) d_next[0] += to_float(d_output[e]);
        const float extra = kSavesOwn<Cell> ? to_float(own_extra[e]) : cell[e];
        Cell::template backward<float>(act, extra, old, d_next, d_x[e], d_h, d_old);
        S* to = d_h_gates + (now.first + own.sequence(e)) * G * H + own.unit;
#pragma unroll
        for (int g = 0; g < G; ++g) to[g * H] = from_float<S>(d_h[g]);
#pragma unroll
        for (int s = 0; s < kStates; ++s) d_states[e][s] = keep ? d_old[s] : 0.0f;
      }
#pragma unroll
      for (int g = 0; g < G; ++g) exchange.publish(i, own.row(e), g, own.unit, from_float<S>(keep ? d_h[g] : 0.0f));
    }
    exchange.sent();

    if constexpr (kSplit) {
#pragma unroll
      for (int e = 0; e < kMost; ++e) {
        if (!own.runs(e, now)) continue;
        S* to = d_x_gates + (now.first + own.sequence(e)) * G * H + own.unit;
#pragma unroll
        for (int g = 0; g < G; ++g) to[g * H] = from_float<S>(d_x[e][g]);
      }
    }
    if (kOneStep) break;
    load(before, next, next_reset);
    later = now;
    now = before;
    before = next;
    reset = next_reset;
  }

#pragma unroll
  for (int e = 0; e < kMost; ++e) {
    for (int s = 0; s < kStates; ++s) {
      if (own.has(e)) *d_state(s, e) = d_states[e][s];
    }
  }
}

}  // namespace
}  // namespace fusedrnn::cuda
