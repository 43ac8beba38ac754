// The forward scan of a tile of the batch, for any cell, product and exchange.
//
// What a step must cost where the weights fit on chip (stream.h: where not). They never move, so of memory there
// is what each row needs anyway: G*H values in, H out, and what backward wants, (SAVED + 2) * H. Of products
// there are 2 * G*H * H flops a row: LSTM, H = 1024, 8 rows on 64 blocks are 1 Mflop a block, 0.3 us at a third
// of the tensor cores' rate. So a step is latency: of one block two barriers, a chain of K / 16 / slices matrix
// instructions, a round through shared memory and three transcendental functions one after the other; of a grid
// another round through L2 (0.8 to 1.2 us). Hence what nobody waits for comes after what somebody waits for:
// saved values and the next step's x_gates move while the blocks meet.
#pragma once

#include "../cells/cell.h"
#include "rows.h"
#include "scan.h"
#include "stream.h"

namespace fusedrnn::cuda {
namespace {

template <class Cell>
constexpr bool kSavesOwn = Cell::kExtra == Extra::kOwn;

// Values that backward reads from `saved`, of a unit: the gates and the cell's own.
template <class Cell>
constexpr int kSaved = (Cell::kSavesGates ? Cell::kGates : 0) + (kSavesOwn<Cell> ? 1 : 0);

template <class Cell, class P, template <class> class Exchange>
__global__ void __launch_bounds__(kThreads, WeightsOf<P, Cell::kGates, Exchange<typename P::Storage>>::kBlocks)
    scan_forward_kernel(const FusedrnnCudaForward a, const Tile tile) {
  using S = typename P::Storage;
  constexpr int G = Cell::kGates, kStates = Cell::kStates, kMost = Exchange<S>::kMost;
  constexpr bool kOneStep = Exchange<S>::kOneStep, kDeferred = Exchange<S>::kTogether == Together::kGrid;
  if constexpr (Exchange<S>::kTogether == Together::kCluster && FUSEDRNN_ARCH < 900) return;
  if constexpr (kOneStep) let_next_launch_begin();
  const int64_t H = a.hidden, direction = tile.direction();
  const int first_row = tile.first_row();
  const uint8_t* resets = a.resets == nullptr ? nullptr : a.resets + direction * a.rows;
  const Steps steps(a.offsets, a.lengths, a.time, a.batch, first_row, direction == 1);
  const int64_t first = kOneStep ? tile.step : 0, end = kOneStep ? first + 1 : steps.count();
  if (kOneStep && first >= steps.count()) return wait_for_last_launch();

  const S* x_gates = static_cast<const S*>(a.x_gates) + direction * a.rows * G * H;
  const S* start = static_cast<const S*>(a.start) + direction * a.batch * H;
  S* output = static_cast<S*>(a.output) + direction * a.output_direction;
  S* saved = static_cast<S*>(a.saved) + direction * a.rows * kSaved<Cell> * H;
  float* cells = a.cells + direction * a.rows * H;

  unsigned char* shared = dynamic_shared();
  float* sums = reinterpret_cast<float*>(shared + Exchange<S>::bytes(tile));
  uint4* kept = reinterpret_cast<uint4*>(shared + Exchange<S>::bytes(tile) + (kOneStep ? 0 : tile.sums_bytes(G)));
  const int pieces = static_cast<int>(ceil_div(H * sizeof(S), 16));
  const uint4* weight = static_cast<const uint4*>(a.weight) + direction * G * H * pieces;
  WeightsOf<P, G, Exchange<S>> weights(tile, weight, H, pieces, kept);
  const Own<kMost> own(tile, a.batch, static_cast<int>(H));

  float bias[G] = {};
  if (a.bias != nullptr && own.unit < H) {
#pragma unroll
    for (int g = 0; g < G; ++g) bias[g] = to_float(static_cast<const S*>(a.bias)[(direction * G + g) * H + own.unit]);
  }
  S x[kMost][G] = {};
  const auto load_x = [&](const Span& span) {
#pragma unroll
    for (int e = 0; e < kMost; ++e) {
      if (!own.runs(e, span)) continue;
      const S* from = x_gates + (span.first + own.sequence(e)) * G * H + own.unit;
#pragma unroll
      for (int g = 0; g < G; ++g) x[e][g] = from[g * H];
    }
  };
  Span before = steps.at(first - 1), now = steps.at(first);
  unsigned reset = own.reset(resets, now);
  load_x(now);

  Exchange<S> exchange(tile, static_cast<int>(H), shared, a.counters);
  if (blockIdx.x * tile.units() >= H) return;  // there are as many blocks as a cluster must have
  float states[kMost][kStates] = {};
  const auto state = [&](int s, int e) {
    return a.states + ((s * int64_t{a.directions} + direction) * a.batch + own.sequence(e)) * H + own.unit;
  };
#pragma unroll
  for (int e = 0; e < kMost; ++e) {
    for (int s = 0; s < kStates; ++s) {
      if (own.has(e)) states[e][s] = load_fresh(state(s, e));
    }
  }

  for (int64_t i = first; i < end; ++i) {
    const Span next = kOneStep ? Span{0, 0} : steps.at(i + 1);
    const unsigned next_reset = own.reset(resets, next);
    // Rows that do not run have no product that anybody reads.
    const auto vector = [&](int row) -> const S* {
      const int b = first_row + row;
      if (b >= now.size || (resets != nullptr && resets[now.first + b] != 0)) return nullptr;
      return b < before.size ? output + (before.first + b) * a.output_row : start + int64_t{b} * H;
    };
    multiply_rows(tile, weights, exchange, i, vector, sums);
    if (!planted(Race::kNoBlockBarrier)) __syncthreads();

    // Backward's values of a row, where nobody waits for them.
    float gates[kMost][G], extra[kMost] = {};
    const auto save = [&](int e) {
      const int64_t row = now.first + own.sequence(e);
      if (kSaved<Cell> > 0 && a.saved != nullptr) {
        S* to = saved + row * kSaved<Cell> * H + own.unit;
#pragma unroll
        for (int g = 0; g < (Cell::kSavesGates ? G : 0); ++g) to[g * H] = from_float<S>(gates[e][g]);
        if constexpr (kSavesOwn<Cell>) to[G * H] = from_float<S>(extra[e]);
      }
      if (kStates > 1 && a.cells != nullptr) cells[row * H + own.unit] = states[e][kStates - 1];
    };
#pragma unroll
    for (int e = 0; e < kMost; ++e) {
      if (own.runs(e, now)) {
        float x_half[G], h_half[G], old[kStates], made[kStates];
#pragma unroll
        for (int g = 0; g < G; ++g) {
          x_half[g] = to_float(x[e][g]);
          h_half[g] = bias[g];
        }
        own.add(tile, sums, e, h_half);
#pragma unroll
        for (int s = 0; s < kStates; ++s) old[s] = reset >> e & 1 ? 0.0f : states[e][s];
        Cell::template forward<float>(x_half, h_half, old, made, gates[e], extra[e]);
#pragma unroll
        for (int s = 0; s < kStates; ++s) states[e][s] = made[s];
        output[(now.first + own.sequence(e)) * a.output_row + own.unit] = from_float<S>(made[0]);
      }
      // A row that does not run yet goes on from where it starts.
      exchange.publish(i, own.row(e), 0, own.unit, from_float<S>(next_reset >> e & 1 ? 0.0f : states[e][0]));
      if (!kDeferred && own.runs(e, now)) save(e);
    }
    exchange.sent();

#pragma unroll
    for (int e = 0; e < kMost; ++e) {
      if (kDeferred && own.runs(e, now)) save(e);
    }
    load_x(next);
    before = now;
    now = next;
    reset = next_reset;
  }
  exchange.finish(steps.count());

#pragma unroll
  for (int e = 0; e < kMost; ++e) {
    for (int s = 0; s < kStates; ++s) {
      if (own.has(e)) *state(s, e) = states[e][s];
    }
  }
}

}  // namespace
}  // namespace fusedrnn::cuda
