// The forward scan of one direction, for any cell, as one thread of its team runs it.
//
// The hidden state lives in two padded scratch buffers, read from one and written to the other, so
// that threads which share the units of a step need one barrier a step (two with a projection).
// Both start as the initial state: a row that has not started reads it from either. What a reset will make
// zero is stored as zero by the step before it, which costs no barrier.
//
// The x_gates of a chunk of steps are made first, each thread those of its own rows and units, so
// they need no barrier and are read back from the cache: [ceil(H/W), rows of the chunk, G, W].
#pragma once

#include "loop.h"
#include "math.h"

namespace fusedrnn {
namespace {

template <class Cell, class S>
struct ForwardScan {
  using T = Acc<S>;
  using F = Factor<S>;
  using V = typename Simd<T>::V;
  static constexpr int W = Simd<T>::kWidth, G = Cell::kGates, kRows = max_rows(G == 1 ? 4 : G);
  static constexpr int kPer = Storage<S>::kPerFactor;
  // A cell that reads the hidden state itself needs it unrounded; each thread reads only what it wrote.
  static constexpr bool kKeepsState0 = Cell::kDirect && kPer > 1;

  const ForwardDirection<S>& d;
  const Part& part;
  const Shape& s = d.shape;
  const int64_t H = s.hidden, P = s.proj;
  const int64_t stride = scratch_stride(P, sizeof(T)), raw_stride = scratch_stride(H, sizeof(T));

  // rows @ weight.T for `blocks` blocks of the weight's units.
  template <int kGates>
  FUSEDRNN_HD void multiply(int64_t count, int64_t blocks, bool lone, int64_t k, const F* rows /*[count, k], row_stride*/,
                            int64_t row_stride, const F* weight, int64_t units, int64_t unit_block,
                            T* acc /*[count, blocks, kGates, W]*/) const {
    const int64_t factors = ceil_div(k, kPer);
    if (kPer > 1 || d.packed) {
      const int64_t block = factors * kGates * W;
      tile_for<Direct<S>, kGates>(count, blocks, lone)(factors, rows, row_stride, 1, weight + unit_block * block, block,
                                                       acc);
    } else if constexpr (kPer == 1) {
      unpacked_tile<T, kGates>(count, blocks, k, rows, row_stride, weight, units, unit_block, acc);
    }
  }

  // The x_gates of a chunk: row b of the step that is `step` after the chunk's first is at slot
  // b + base(step). Threads that share out rows move on to the next chunk without waiting, so a row
  // keeps its slots to itself; one that has all rows lays them out as they are in N.
  struct Chunk {
    T* x_gates;     // [ceil(H/W), slots, G, W]
    int64_t slots;
    bool all_rows;
    Span span{};
  };

  FUSEDRNN_HD int64_t base(const Chunk& c, const Clock& now, int64_t step) const {
    return c.all_rows ? now.row - c.span.row_begin : (step - c.span.first_step) * s.batch;
  }

  // Rows [row, row + rows) of N into slots from `slot` on, for `blocks` blocks of units.
  FUSEDRNN_HD void project_input(const Chunk& c, int64_t slot, int64_t unit_block, int64_t blocks, int64_t row,
                                 int64_t rows) const {
    alignas(64) T acc[8 * 4 * W];  // [rows, blocks, G, W]
    const int64_t I = d.inputs;
    const F* input = reinterpret_cast<const F*>(d.input + row * I);
    multiply<G>(rows, blocks, false, I, input, I / kPer, d.weight_ih, H, unit_block, acc);
    for (int64_t j = 0; j < blocks; ++j) {
      const int64_t u = (unit_block + j) * W;
      const int n = static_cast<int>(smaller(W, H - u));
      T* to = c.x_gates + ((unit_block + j) * c.slots + slot) * G * W;
      for (int g = 0; g < G; ++g) {
        V bias = d.bias_ih ? load(d.bias_ih + g * H + u, n) : V{};
        // Gates that only ever see the sum of both halves take both biases here.
        if (d.bias_hh && g != Cell::kSplitGate) bias += load(d.bias_hh + g * H + u, n);
        for (int64_t r = 0; r < rows; ++r) {
          store(to + (r * G + g) * W, load(acc + ((r * blocks + j) * G + g) * W) + bias);
        }
      }
    }
  }

  // Makes the x_gates of as many steps from `now` on as fit.
  FUSEDRNN_HD void next_chunk(Chunk& c, const Clock& now, int64_t step, Range units) const {
    c.span = span_from(now, step, !d.reverse, [&](const Span& longer) {
      const int64_t steps = longer.end_step - longer.first_step;
      if (longer.end_step > part.end_step) return false;
      return (c.all_rows ? longer.row_end - longer.row_begin : steps * s.batch) <= c.slots;
    });
    const int64_t rows = c.span.row_end - c.span.row_begin;
    for_groups(units, kBlocks<G>, false, [&](int64_t unit_block, int64_t blocks) {
      if (c.all_rows) {
        for_each_tile(0, rows, kRows, [&](int64_t slot, int64_t count) {
          project_input(c, slot, unit_block, blocks, c.span.row_begin + slot, count);
        });
        return;
      }
      Clock at = now;
      for (int64_t i = step; i < c.span.end_step; ++i) {
        for_tiles(part, at.active, kRows, [&](int64_t b0, int64_t rows) {
          project_input(c, base(c, at, i) + b0, unit_block, blocks, at.row + b0, rows);
        });
        if (i + 1 < c.span.end_step) advance(at, !d.reverse);
      }
    });
  }

  // One tile: gates of `blocks` blocks of units from unit_block on, of `rows` rows from b0 on.
  FUSEDRNN_HD void gates(const Clock& now, const Chunk& c, int64_t slot, const F* h /*[B, stride]*/,
                         F* h_new /*[B, stride]*/, F* raw /*[B, raw_stride]*/, int64_t ending,
                         int64_t unit_block, int64_t blocks, int64_t b0, int64_t rows) const {
    alignas(64) T acc[8 * 4 * W];  // [rows, blocks, G, W]
    // With one gate four blocks are taken at once, whose x_gates lie apart, behind a short product.
    if (G == 1 && s.batch > 1) {
      for (int64_t j = 0; j < blocks; ++j) fetch_rows(c.x_gates + ((unit_block + j) * c.slots + slot) * W, rows * W);
    }
    multiply<G>(rows, blocks, s.batch == 1, P, h + b0 * stride, stride, d.weight_hh, H, unit_block, acc);
    for (int64_t j = 0; j < blocks; ++j) {
      const int64_t u = (unit_block + j) * W;
      const int n = static_cast<int>(smaller(W, H - u));
      const T* x_at = c.x_gates + ((unit_block + j) * c.slots + slot) * G * W;
      V bias{};
      if constexpr (Cell::kSplitGate >= 0) {
        if (d.bias_hh) bias = load(d.bias_hh + Cell::kSplitGate * H + u, n);
      }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t b = b0 + r, row = now.row + b;
        const bool dropped = is_dropped(now, b);
        V x[G], hg[G], prev[2], next[2], act[G], extra;
        for (int g = 0; g < G; ++g) {
          x[g] = load(x_at + (r * G + g) * W);
          hg[g] = load(acc + ((r * blocks + j) * G + g) * W);
        }
        if constexpr (Cell::kSplitGate >= 0) hg[Cell::kSplitGate] += bias;
        if constexpr (kKeepsState0) {
          prev[0] = load(d.state0 + b * P + u, n);
        } else if constexpr (Cell::kDirect) {
          prev[0] = load(h + b * stride + u);
        }
        if constexpr (Cell::kStates == 2) prev[1] = load(d.state1 + b * H + u, n);
        Cell::template forward<V, typename StoredMath<S>::M>(x, hg, prev, next, act, extra);
        if constexpr (Cell::kStates == 2) store(d.state1 + b * H + u, dropped ? V{} : next[1], n);
        if (Cell::kSavesGates && d.gates) {
          for (int g = 0; g < G; ++g) store(d.gates + row * G * H + g * H + u, act[g], n);
        }
        if (Cell::kExtra != Extra::kNone && d.extra) store(d.extra + row * H + u, extra, n);
        if (d.weight_hr) {
          store_factors(raw + b * raw_stride, u, n, next[0]);
          if (d.raw) store(d.raw + row * H + u, next[0], n);
        } else {
          emit(row, b, u, n, ending, next[0], dropped, h_new);
        }
      }
    }
  }

  // Units u .. u + n of a padded scratch row. Behind the last unit there is no number when weights of
  // zero have met an infinite input; the half-used factor of a product must have one.
  static FUSEDRNN_HD void store_factors(F* row, int64_t u, int n, V v) {
    store(reinterpret_cast<S*>(row) + u, kPer > 1 ? keep_lanes<T>(v, n) : v);
  }

  // Whether the next step of a row starts from zeros, not from what this one makes.
  FUSEDRNN_HD bool is_dropped(const Clock& now, int64_t b) const {
    return d.resets && b < now.next_active() && d.resets[now.next_row() + b];
  }

  // A new hidden state leaves for the output and the next step, and for the last state where its row ends.
  FUSEDRNN_HD void emit(int64_t row, int64_t b, int64_t u, int n, int64_t ending, V h, bool dropped,
                        F* h_new /*[B, stride]*/) const {
    store(d.output + row * d.output_stride + u, h, n);
    if (dropped) h = V{};
    store_factors(h_new + b * stride, u, n, h);
    if (kKeepsState0 || b >= ending) store(d.state0 + b * P + u, h, n);
  }

  FUSEDRNN_HD void project(const Clock& now, const F* raw /*[B, raw_stride]*/, F* h_new /*[B, stride]*/,
                           int64_t ending, int64_t unit_block, int64_t blocks, int64_t b0,
                           int64_t rows) const {
    alignas(64) T acc[8 * 4 * W];  // [rows, blocks, W]
    multiply<1>(rows, blocks, s.batch == 1, H, raw + b0 * raw_stride, raw_stride, d.weight_hr, P, unit_block, acc);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < blocks; ++j) {
        const int64_t b = b0 + r, u = (unit_block + j) * W;
        const V h = load(acc + (r * blocks + j) * W);
        const int n = static_cast<int>(smaller(W, P - u));
        emit(now.row + b, b, u, n, ending, h, is_dropped(now, b), h_new);
      }
    }
  }

  void run() const {
    F* h = reinterpret_cast<F*>(d.scratch);
    F* h_new = h + s.batch * stride;
    F* raw = h_new + s.batch * stride;
    Chunk chunk{reinterpret_cast<T*>(raw + (d.weight_hr ? s.batch * raw_stride : 0)), chunk_rows(s, sizeof(T), G),
                part.row_count >= s.batch};
    const Range units = share((H + W - 1) / W, part.member, part.members);
    const Range outputs = share((P + W - 1) / W, part.member, part.members);
    const auto swap_states = [&] {
      F* swap = h;
      h = h_new;
      h_new = swap;
    };
    Clock now = clock_at(s, d.reverse, d.reverse);
    leap(now, part.first_step, !d.reverse);  // pieces are dense
    if (part.first_step & 1) swap_states();
    chunk.span.end_step = part.first_step;
    for (int64_t step = part.first_step; step < smaller(s.time, part.end_step); ++step) {
      // Rows from `ending` on have their last step now.
      const int64_t ending = d.reverse ? (now.t == 0 ? 0 : now.active) : now.size(now.t + 1);
      const bool backwards = step & 1;
      if (step == chunk.span.end_step) next_chunk(chunk, now, step, units);
      const int64_t slots = base(chunk, now, step);
      for_groups(units, s.batch == 1 ? kLoneBlocks<G> : kBlocks<G>, backwards, [&](int64_t unit_block, int64_t blocks) {
        for_tiles(part, now.active, kRows, [&](int64_t b0, int64_t rows) {
          gates(now, chunk, slots + b0, h, h_new, raw, ending, unit_block, blocks, b0, rows);
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
      if (part.barrier && step + 1 < s.time) {
        barrier_wait(part.barrier);
        fetch_rows(h_new, s.batch * stride);
      }
      if (step + 1 < s.time) advance(now, !d.reverse);
      swap_states();
    }
  }
};

template <class Cell, class S>
void forward_scan(const ForwardDirection<S>& d, const Part& part) {
  ForwardScan<Cell, S>{d, part}.run();
}

}  // namespace
}  // namespace fusedrnn
