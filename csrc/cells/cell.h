// The shape of a cell. A cell is a struct of constants and two functions, templated on a value
// type V (float, double or a SIMD vector) and on its functions M; it knows no time loop, no tile and no thread.
//
//   kGates       G, gates in the order of the weights' rows
//   kStates      S, states; state 0 is the hidden state that is the output
//   kSavesGates  whether the activated gates are saved for backward; a cell whose only gate is
//                its output reads it back from there instead
//   kExtra       which further value is saved per unit: kNone, kState1 (state 1 after the step)
//                or kOwn (a value of the cell's own)
//   kReadsPrev   whether backward reads the previous hidden state
//   kSplitGate   the gate whose h_gates gradient differs from its x_gates gradient, or -1
//   kDirect      whether the previous hidden state gets a gradient that bypasses the weights
//
//   forward(x[G], h[G], prev[S], next[S], gates[G], extra)
//     x = W_ih x + b_ih, h = W_hh h + b_hh; writes the new states, the activated gates and extra.
//     next[0] is the hidden state before any projection.
//   backward(gates[G], extra, prev[S], d_next[S], d_x[G], d_h[G], d_prev[S])
//     d_prev[0] is written only if kDirect; the rest of it goes through d_h and the weights.
#pragma once

#include "math.h"

namespace fusedrnn {
namespace {

enum class Extra { kNone, kState1, kOwn };

}  // namespace
}  // namespace fusedrnn
