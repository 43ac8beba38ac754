// The backward scan of one direction, for any cell, as one thread of its team runs it.
//
// d_state0 and d_state1 start as the gradients of the last states and end as those of the initial
// ones. They are only touched while a row is active, so rows of any length need no special case. Before a
// reset they are zero.
//
// The gradients of the gates of a chunk of steps stay in scratch, [rows of the chunk, stride], until
// products.h has made the gradients of the input and of the weights of them: written to memory for
// all of time they would take longer to store and to load than to compute. A scan may come in pieces of time, if it
// has one thread: what a chunk needs stays in its scratch from one to the next.
#pragma once

#include "loop.h"
#include "products.h"

namespace fusedrnn {
namespace {

template <class Cell, class S>
struct BackwardScan {
  using T = Acc<S>;
  using F = Factor<S>;
  using V = typename Simd<T>::V;
  static constexpr int W = Simd<T>::kWidth, G = Cell::kGates, kPer = Storage<S>::kPerFactor;

  const BackwardDirection<S>& d;
  const Part& part;
  const Shape& s = d.shape;
  const int64_t H = s.hidden, P = s.proj;
  // Strides count values; the last factor of a row may be half.
  const int64_t stride = kPer * scratch_stride(G * H, sizeof(T)), hidden_stride = kPer * scratch_stride(P, sizeof(T));
  const int64_t gate_factors = ceil_div(G * H, kPer);

  // The gradients of a chunk's rows: row i of N is at slot i - span.row_begin.
  struct Chunk {
    S* d_x_gates;  // [slots, stride]
    S* d_h_gates;  // [slots, stride], d_x_gates itself unless the cell splits them
    S* d_hidden;   // [slots, hidden_stride], null without a projection
    Span span{};
  };

  // Whether a row's step started from zeros.
  FUSEDRNN_HD bool is_fresh(int64_t row) const { return d.resets && d.resets[row]; }

  // The gradient of the hidden state of (row, b) at units u .. u + n.
  FUSEDRNN_HD V incoming(int64_t row, int64_t b, int64_t u, int n) const {
    const V through_time = load(d.d_state0 + b * P + u, n);
    return d.d_output ? through_time + load(d.d_output + row * d.d_output_stride + u, n) : through_time;
  }

  // n values of a padded scratch row. What a half-used factor of a product multiplies by zero, behind
  // the row's last value, must be a number.
  static FUSEDRNN_HD void store_factors(S* to, bool last_of_row, int n, V v) {
    if (kPer > 1 && last_of_row) {
      store(to, keep_lanes<T>(v, n));
    } else {
      store(to, v, n);
    }
  }

  // The gates of one row at one block of units; d_h is the gradient of the unprojected hidden state.
  FUSEDRNN_HD void gates(const Clock& now, const Chunk& c, int64_t b, int64_t u, int n, V d_h) const {
    const int64_t row = now.row + b, slot = row - c.span.row_begin;
    const bool first = b >= now.previous_active(), fresh = is_fresh(row);
    const int64_t before = now.previous_row() + b;
    V act[G], extra{}, prev[2], d_next[2], d_x[G], d_hg[G], d_prev[2];
    for (int g = 0; g < G; ++g) {
      act[g] = Cell::kSavesGates ? load(d.gates + row * G * H + g * H + u, n)
                                 : load(d.output + row * d.output_stride + u, n);
    }
    if constexpr (Cell::kExtra != Extra::kNone) extra = load(d.extra + row * H + u, n);
    if constexpr (Cell::kReadsPrev) {
      prev[0] = fresh   ? V{}
                : first ? load(d.initial0 + b * P + u, n)
                        : load(d.output + before * d.output_stride + u, n);
    }
    if constexpr (Cell::kStates == 2) {
      static_assert(Cell::kExtra == Extra::kState1, "the previous state 1 is read from what was saved");
      prev[1] = fresh ? V{} : first ? load(d.initial1 + b * H + u, n) : load(d.extra + before * H + u, n);
      d_next[1] = load(d.d_state1 + b * H + u, n);
    }
    d_next[0] = d_h;
    Cell::template backward<V>(act, extra, prev, d_next, d_x, d_hg, d_prev);
    for (int g = 0; g < G; ++g) {
      store_factors(c.d_x_gates + slot * stride + g * H + u, g == G - 1, n, d_x[g]);
      if constexpr (Cell::kSplitGate >= 0) {
        store_factors(c.d_h_gates + slot * stride + g * H + u, g == G - 1, n, d_hg[g]);
      }
    }
    if constexpr (Cell::kDirect) store(d.d_state0 + b * P + u, d_prev[0], n);
    if constexpr (Cell::kStates == 2) store(d.d_state1 + b * H + u, fresh ? V{} : d_prev[1], n);
  }

  static FUSEDRNN_HD const F* factors(const S* row) { return reinterpret_cast<const F*>(row); }

  // d_state0 (+)= d_h_gates @ weight_hh over the factors of `slab`; the first slab starts from what the
  // cell left there if it has a direct path.
  FUSEDRNN_HD void through_weights(const Clock& now, const S* d_h_gates /*[B, stride]*/, Range slab,
                                   int64_t unit_block, int64_t blocks, int64_t b0, int64_t rows) const {
    alignas(64) T acc[8 * 4 * W];  // [rows, blocks, W]
    const int64_t block = gate_factors * W;
    const F* weight = d.weight_hh + unit_block * block + slab.begin * W;
    tile_for<Direct<S>, 1>(rows, blocks, s.batch == 1)(
        slab.end - slab.begin, factors(d_h_gates + b0 * stride) + slab.begin, stride / kPer, 1, weight, block, acc);
    store_tile(acc, rows, blocks, unit_block, P, Cell::kDirect || slab.begin > 0, d.d_state0 + b0 * P, P);
    if (slab.end < gate_factors) return;
    const int64_t u = unit_block * W, end = smaller(u + blocks * W, P);
    for (int64_t b = b0; b < b0 + rows; ++b) {
      if (is_fresh(now.row + b)) __builtin_memset(d.d_state0 + b * P + u, 0, sizeof(T) * (end - u));
    }
  }

  // The whole of a step's gate phase behind a projection.
  FUSEDRNN_HD void projected_gates(const Clock& now, const Chunk& c, int64_t unit_block, int64_t blocks,
                                   int64_t b0, int64_t rows) const {
    alignas(64) T acc[8 * 4 * W];  // [rows, blocks, W]
    const int64_t k = ceil_div(P, kPer), block = k * W, slot = now.row + b0 - c.span.row_begin;
    tile_for<Direct<S>, 1>(rows, blocks, s.batch == 1)(
        k, factors(c.d_hidden + slot * hidden_stride), hidden_stride / kPer, 1, d.weight_hr + unit_block * block, block, acc);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < blocks; ++j) {
        const int64_t u = (unit_block + j) * W;
        gates(now, c, b0 + r, u, static_cast<int>(smaller(W, H - u)), load(acc + (r * blocks + j) * W));
      }
    }
  }

  FUSEDRNN_HD void step(const Clock& now, const Chunk& c, Range units, Range outputs, bool backwards) const {
    if (d.weight_hr) {
      for_tiles(part, now.active, 1, [&](int64_t b, int64_t) {
        const int64_t row = now.row + b;
        for (int64_t block = outputs.begin; block < outputs.end; ++block) {
          const int64_t u = block * W;
          const int n = static_cast<int>(smaller(W, P - u));
          store_factors(c.d_hidden + (row - c.span.row_begin) * hidden_stride + u, true, n, incoming(row, b, u, n));
        }
      });
      if (part.barrier) barrier_wait(part.barrier);
      for_groups(units, kBlocks<1>, backwards, [&](int64_t unit_block, int64_t blocks) {
        for_tiles(part, now.active, max_rows(4), [&](int64_t b0, int64_t rows) {
          projected_gates(now, c, unit_block, blocks, b0, rows);
        });
      });
    } else {
      for_tiles(part, now.active, 1, [&](int64_t b, int64_t) {
        for (int64_t block = units.begin; block < units.end; ++block) {
          const int64_t u = block * W;
          const int n = static_cast<int>(smaller(W, H - u));
          gates(now, c, b, u, n, incoming(now.row + b, b, u, n));
        }
      });
    }
    const S* d_h_gates = c.d_h_gates + (now.row - c.span.row_begin) * stride;
    if (part.barrier) {
      barrier_wait(part.barrier);
      fetch_rows(d_h_gates, now.active * stride);
    }
    for_groups(outputs, kBlocks<1>, backwards, [&](int64_t unit_block, int64_t blocks) {
      for_slabs(gate_factors, [&](Range slab) {
        for_tiles(part, now.active, max_rows(4), [&](int64_t b0, int64_t rows) {
          through_weights(now, d_h_gates, slab, unit_block, blocks, b0, rows);
        });
      });
    });
  }

  // f(i, pointer) for the rows [begin, end) of N in ascending order: the hidden state that the step of
  // row begin + i started from, null for zeros.
  template <class Call>
  FUSEDRNN_HD void previous_hidden(Clock at, int64_t begin, int64_t end, Call f) const {
    while (at.row > begin) advance(at, false);
    while (at.row + at.active <= begin) advance(at, true);
    for (int64_t row = begin; row < end; ++row) {
      while (row >= at.row + at.active) advance(at, true);
      const int64_t b = row - at.row;
      f(row - begin, is_fresh(row)               ? nullptr
                     : b >= at.previous_active() ? d.initial0 + b * P
                                                 : d.output + (at.previous_row() + b) * d.output_stride);
    }
  }

  // The gradient of the input at rows of a chunk, for which no later step waits.
  FUSEDRNN_HD void input_gradients(const Chunk& c, int64_t begin, int64_t end) const {
    if (!d.d_input) return;
    const int64_t I = d.inputs;
    multiply_rows<S>(part.team, end - begin, G * H, c.d_x_gates + (begin - c.span.row_begin) * stride, stride, d.weight_ih,
                     I, d.d_input + begin * I, I);
  }

  // The gradients that are sums over the rows of a chunk.
  FUSEDRNN_HD void weight_gradients(const Clock& now, const Chunk& c, F* pairs, F* hidden_pairs, F* panel) const {
    const int64_t begin = c.span.row_begin, rows = c.span.row_end - begin, I = d.inputs;
    const bool first = c.span.first_step == 0;
    // Every thread makes panels of its own: sharing them would cost a barrier each.
    const int64_t slabs = ceil_div(rows, kSlabRows);
    for (int64_t i = 0; i < slabs; ++i) {
      const Range slab = share(rows, static_cast<int>(i), static_cast<int>(slabs));
      const int64_t count = slab.end - slab.begin, row = begin + slab.begin;
      const bool add = !first || i > 0;
      const S* d_x_gates = c.d_x_gates + slab.begin * stride;
      const S* d_h_gates = c.d_h_gates + slab.begin * stride;
      if (d.d_weight_ih) {
        multiply_transposed<S>(part.team, count, G * H, d_x_gates, stride, I, pairs, panel, add, d.d_weight_ih,
                               [&](auto copy) {
                                 for (int64_t r = 0; r < count; ++r) copy(r, d.input + (row + r) * I);
                               });
      }
      if (d.d_weight_hh) {
        multiply_transposed<S>(part.team, count, G * H, d_h_gates, stride, P, pairs, panel, add, d.d_weight_hh,
                               [&](auto copy) { previous_hidden(now, row, row + count, copy); });
      }
      if (d.d_weight_hr) {
        multiply_transposed<S>(part.team, count, P, c.d_hidden + slab.begin * hidden_stride, hidden_stride, H,
                               hidden_pairs, panel, add, d.d_weight_hr, [&](auto copy) {
                                 for (int64_t r = 0; r < count; ++r) copy(r, d.raw + (row + r) * H);
                               });
      }
      const bool one_sum = Cell::kSplitGate < 0 && d.d_bias_ih;
      if (d.d_bias_ih) {
        sum_rows<S>(part.team, count, G * H, d_x_gates, stride, add, d.d_bias_ih, one_sum ? d.d_bias_hh : nullptr);
      }
      if (d.d_bias_hh && !one_sum) sum_rows<S>(part.team, count, G * H, d_h_gates, stride, add, d.d_bias_hh);
    }
  }

  void run() const {
    const int64_t slots = backward_chunk_rows(s);
    S* next = reinterpret_cast<S*>(d.scratch);
    const auto take = [&](int64_t values) {
      S* taken = next;
      next += values;
      return taken;
    };
    Chunk c{};
    c.d_x_gates = c.d_h_gates = take(slots * stride);
    if constexpr (Cell::kSplitGate >= 0) c.d_h_gates = take(slots * stride);
    if (d.weight_hr) c.d_hidden = take(slots * hidden_stride);
    F* pairs = reinterpret_cast<F*>(kPer > 1 ? take(kSlabRows / 2 * stride) : next);
    F* hidden_pairs = reinterpret_cast<F*>(kPer > 1 && d.weight_hr ? take(kSlabRows / 2 * hidden_stride) : next);
    F* panel = reinterpret_cast<F*>(next) + part.team.member * panel_scratch(sizeof(T));
    const Range units = share(ceil_div(H, W), part.member, part.members);
    const Range outputs = share(ceil_div(P, W), part.member, part.members);
    Clock now = clock_at(s, d.reverse, !d.reverse);
    const int64_t end_step = smaller(s.time, part.end_step);
    // To the chunk that a piece is of: pieces are dense, so that chunks are of one size.
    int64_t i = 0;
    if (part.first_step > 0) i = part.first_step / (slots / s.batch) * (slots / s.batch);
    leap(now, i, d.reverse);
    while (i < end_step) {
      c.span = span_from(now, i, d.reverse,
                         [&](const Span& longer) { return longer.row_end - longer.row_begin <= slots; });
      Span made{i, i, s.rows, 0};  // of this chunk, now
      for (;;) {
        if (i >= part.first_step) {
          if (part.steps) step(now, c, units, outputs, i & 1);
          made.row_begin = smaller(made.row_begin, now.row);
          if (now.row + now.active > made.row_end) made.row_end = now.row + now.active;
        }
        if (++i == c.span.end_step || i == end_step) break;
        advance(now, d.reverse);
      }
      if (made.row_begin < made.row_end) {
        // The products read all rows and units of the chunk, and the next chunk takes its place.
        if (part.team.barrier) barrier_wait(part.team.barrier);
        if (part.steps) input_gradients(c, made.row_begin, made.row_end);
        if (part.sums && i == c.span.end_step) weight_gradients(now, c, pairs, hidden_pairs, panel);
        if (part.team.barrier && i < s.time) barrier_wait(part.team.barrier);
      }
      if (i < end_step) advance(now, d.reverse);
    }
  }
};

template <class Cell, class S>
void backward_scan(const BackwardDirection<S>& d, const Part& part) {
  BackwardScan<Cell, S>{d, part}.run();
}

}  // namespace
}  // namespace fusedrnn
