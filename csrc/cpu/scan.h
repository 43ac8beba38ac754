// The CPU scan: what the ISA-specific files offer, and what they are given. Nothing here has code.
//
// Rows are packed by time: step t owns batch_sizes[t] rows, non-increasing in t; a dense batch is
// the case of equal sizes. N is their sum. A forward direction goes t = 0 .. T-1 and row b ends at
// its own last step; a reverse direction goes t = T-1 .. 0 and row b starts there.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "step.h"

namespace fusedrnn {

struct Barrier;
void barrier_wait(Barrier* barrier);

constexpr int kCells = 4;  // rnn_tanh, rnn_relu, lstm, gru, in this order everywhere

// bf16: the upper half of a float. Products take two at once, the first in the lower half.
struct Bf16 {
  uint16_t bits;
};
struct Bf16Pair {
  uint32_t bits;
};
// fp16: attention's kernels alone read and write it.
struct Half {
  uint16_t bits;
};

// How values of a storage type are computed with: sums, gates and states in Acc; the factors of a
// product as Factor, kPerFactor values each. Acc and Factor are of one size.
template <class S>
struct Storage {
  using Acc = S;
  using Factor = S;
  static constexpr int kPerFactor = 1;
};
template <>
struct Storage<Bf16> {
  using Acc = float;
  using Factor = Bf16Pair;
  static constexpr int kPerFactor = 2;
};
template <>
struct Storage<Half> {
  using Acc = float;
};
template <class S>
using Acc = typename Storage<S>::Acc;
template <class S>
using Factor = typename Storage<S>::Factor;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Shape {
  int64_t time;                // T
  int64_t batch;               // B
  int64_t hidden;              // H
  int64_t proj;                // P, H without a projection
  int64_t rows;                // N
  const int64_t* batch_sizes;  // [T], or null when every step has B rows
};

// The threads that work on one direction.
struct Team {
  int member, size;
  Barrier* barrier;  // null for a team of one
};

// The share of one thread in a step: some rows and some units of one direction. Rows come as segments
// [row_first + i * row_step, + row_count); units as the member-th of `members` equal shares.
struct Part {
  int64_t row_first, row_count, row_step;
  int member, members;
  Barrier* barrier;  // null when no other thread works on the same rows
  Team team;
  // The steps, in the order of the scan: one thread's may come in pieces, one after the other.
  int64_t first_step = 0, end_step = INT64_MAX;
  // Of a backward: the steps with the gradient of the input, and, where a chunk of them ends, the sums over its rows.
  bool steps = true, sums = true;
};

// Weights are packed by Functions; k pads to whole factors, K = ceil(k / kPerFactor).
template <class S>
struct ForwardDirection {
  using T = Acc<S>;
  Shape shape;
  bool reverse;
  const S* input;            // [N, I], I a multiple of kPerFactor
  int64_t inputs;            // I
  bool packed;               // whether the weights are packed, or as torch stores them (fp32, fp64)
  const Factor<S>* weight_ih;  // packed [ceil(H/W), K(I), G, W], or [G*H, I]
  const Factor<S>* weight_hh;  // packed [ceil(H/W), K(P), G, W], or [G*H, P]
  const T* bias_ih;          // [G*H] or null
  const T* bias_hh;          // [G*H] or null
  const Factor<S>* weight_hr;  // packed [ceil(P/W), K(H), W], or [P, H]; null without a projection
  S* output;                 // [N, P], row stride output_stride
  int64_t output_stride;
  T* state0;                 // [B, P] in: initial hidden state; out: last
  T* state1;                 // [B, H] likewise for state 1, null for cells with one state
  T* gates;                  // [N, G*H] activated gates, null when not saved
  T* extra;                  // [N, H] the cell's extra saved value, null when not saved
  T* raw;                    // [N, H] hidden state before the projection, null when not saved
  const bool* resets;        // [N] whether the states are zero before a row's step; null when none are
  T* scratch;                // forward_scratch() elements
};

// Outputs that are null are not wanted; the others need no initial value unless said so.
template <class S>
struct BackwardDirection {
  using T = Acc<S>;
  Shape shape;
  bool reverse;
  const S* input;            // [N, I]
  int64_t inputs;            // I
  const Factor<S>* weight_ih;  // packed [ceil(I/W), K(G*H), W], null if d_input is
  const Factor<S>* weight_hh;  // packed [ceil(P/W), K(G*H), W]
  const Factor<S>* weight_hr;  // packed [ceil(H/W), K(P), W], null without a projection
  const T* gates;            // [N, G*H], null if the cell does not save them
  const T* extra;            // [N, H] or null
  const T* raw;              // [N, H], null without a projection
  const S* output;           // [N, P], row stride output_stride
  int64_t output_stride;
  const S* initial0;         // [B, P]
  const T* initial1;         // [B, H] or null
  const S* d_output;         // [N, P], row stride d_output_stride; null when it is zero
  int64_t d_output_stride;
  T* d_state0;               // [B, P] in: gradient of the last hidden state; out: of the initial one
  T* d_state1;               // [B, H] likewise, or null
  S* d_input;                // [N, I]
  T* d_weight_ih;            // [G*H, I]
  T* d_weight_hh;            // [G*H, P]
  T* d_bias_ih;              // [G*H]
  T* d_bias_hh;              // [G*H]
  T* d_weight_hr;            // [P, H]
  const bool* resets;        // [N] or null
  T* scratch;                // backward_scratch() elements
};

template <class S>
struct Functions {
  void (*forward[kCells])(const ForwardDirection<S>&, const Part&);
  void (*backward[kCells])(const BackwardDirection<S>&, const Part&);
  // packed[b][k][g][l] = weight[g * n + b * W + l][k], zero where b * W + l >= n; begin <= b < end
  void (*pack_rows)(const S* weight /*[G*n, k], k a multiple of kPerFactor*/, int64_t gates, int64_t n, int64_t k,
                    int64_t begin, int64_t end, Factor<S>* packed);
  // packed[b][k][l] = weight[k][b * W + l], zero where b * W + l >= n; begin <= b < end
  void (*pack_columns)(const S* weight /*[k, n]*/, int64_t k, int64_t n, int64_t begin, int64_t end,
                       Factor<S>* packed);
  int width;         // W
  int rows[kCells];  // batch rows that the forward tile of a cell takes at once
};

// out = x @ weight.T + bias, for many rows. All rows are contiguous.
struct LinearForward {
  int64_t rows, inputs, outputs;  // R, I, O
  const float* x;                 // [R, I]
  const float* weight;            // packed by rows, [ceil(O/W), I, W]
  const float* bias;              // [O] or null
  float* out;                     // [R, O]
};

// Gradients that are null are not wanted.
struct LinearBackward {
  int64_t rows, inputs, outputs;  // R, I, O
  const float* x;                 // [R, I]
  const float* d_out;             // [R, O]
  const float* weight;            // packed by columns, [ceil(I/W), O, W]; null if d_x is
  float* d_x;                     // [R, I]
  float* d_weight;                // [O, I]
  float* d_bias;                  // [O]
  float* panels;                  // panel_scratch() of each thread
};

// The plain read (cpu/read.h) takes multiples of this.
constexpr int64_t kReadBytes = 512;

struct AttendKernels;

struct Kernels {
  const char* name;
  const Functions<float>& f32;
  const Functions<double>& f64;
  const Functions<Bf16>& bf16;
  // The cells' sigmoid (0) and tanh (1), for tests.
  void (*math32)(int function, const float* in /*[n]*/, float* out /*[n]*/, int64_t n);
  void (*math64)(int function, const double* in /*[n]*/, double* out /*[n]*/, int64_t n);
  const StepFunctions* step;  // [kStorages]
  void (*const* update)(const CellUpdate&);  // [kCells]
  void (*linear_forward)(const LinearForward&, const Team&);
  void (*linear_backward)(const LinearBackward&, const Team&);
  uint64_t (*fingerprint)(const void* data, size_t bytes);  // a hash of all bytes
  uint64_t (*read)(const void* data, size_t bytes);         // bytes: a multiple of kReadBytes
  const AttendKernels& attend;
};

extern const Kernels kPortableKernels, kAvx2Kernels, kAvx512Kernels, kAvx512Bf16Kernels;

// Scratch rows are padded to whole vectors and away from multiples of 4096 bytes, where the rows
// of a tile would share one set of the first-level cache. Rows of 64 bytes serve every ISA level.
constexpr int64_t scratch_stride(int64_t columns, int64_t element_bytes) {
  const int64_t per_line = 64 / element_bytes;
  const int64_t lines = (columns + per_line - 1) / per_line;
  return (lines | 1) * per_line;
}
// The x_gates of a chunk of time are made at once: few enough rows to stay in the cache until the
// scan reads them, enough for the product to be worth it, and more where reading the weights once more
// costs more than reading x_gates from the next cache. 24 is a multiple of every tile.
constexpr int64_t chunk_rows(const Shape& s, int64_t element_bytes, int64_t gates) {
  const int64_t row_bytes = scratch_stride(gates * s.hidden, element_bytes) * element_bytes;
  const int64_t a_quarter = s.hidden / 4 * row_bytes;
  const int64_t fit = (a_quarter > (int64_t{512} << 10) ? a_quarter : int64_t{512} << 10) / row_bytes;
  const int64_t rows = fit < 24 ? 24 : fit > 192 ? 192 : fit / 24 * 24;
  const int64_t needed = s.rows < rows ? s.rows : rows;
  return needed > s.batch ? needed : s.batch;
}
// h twice, the unprojected h, the x_gates of a chunk.
constexpr int64_t forward_scratch(const Shape& s, int64_t element_bytes, int64_t gates, bool projected) {
  const int64_t line = 64 / element_bytes, units = (s.hidden + line - 1) / line * line;
  return s.batch * (2 * scratch_stride(s.proj, element_bytes) +
                    (projected ? scratch_stride(s.hidden, element_bytes) : 0)) +
         chunk_rows(s, element_bytes, gates) * gates * units;
}
// The longest sum that one accumulator makes. The rounding error of a sum grows with its length; sums
// of partial sums keep a product over thousands of values as exact as a blocked GEMM's.
constexpr int64_t kLongestSum = 128;

// The rows whose gate gradients are kept until the products over them are made: so many that the
// gradients of the weights, which each product adds to, are not read too often.
constexpr int64_t kSlabRows = 256;
constexpr int64_t backward_chunk_rows(const Shape& s) {
  const int64_t steps = kSlabRows / (s.batch > 0 ? s.batch : 1);
  const int64_t rows = (steps > 1 ? steps : 1) * s.batch;
  return rows < s.rows ? rows : s.rows;
}
// A panel holds this many columns of one factor of a product over rows.
constexpr int64_t kPanelBytes = 4 * 64;
constexpr int64_t panel_scratch(int64_t element_bytes) { return kSlabRows * (kPanelBytes / element_bytes); }
// d_x_gates, d_h_gates if the cell splits them, d_hidden behind a projection; where a factor is a pair,
// pairs of the rows of the first and of the last; a panel per thread.
constexpr int64_t backward_scratch(const Shape& s, int64_t element_bytes, int64_t gates, bool split, bool projected,
                                   bool paired, int64_t threads) {
  const int64_t stride = scratch_stride(gates * s.hidden, element_bytes);
  const int64_t hidden_stride = projected ? scratch_stride(s.proj, element_bytes) : 0;
  return backward_chunk_rows(s) * ((split ? 2 : 1) * stride + hidden_stride) +
         (paired ? kSlabRows / 2 * (stride + hidden_stride) : 0) + threads * panel_scratch(element_bytes);
}

}  // namespace fusedrnn
