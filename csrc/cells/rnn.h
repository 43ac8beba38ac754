// The Elman RNN: h' = phi(x + h). Its one gate is its output, so nothing is saved.
#pragma once

#include "cell.h"

namespace fusedrnn {
namespace {

template <bool kRelu>
struct Rnn {
  static constexpr int kGates = 1;
  static constexpr int kStates = 1;
  static constexpr bool kSavesGates = false;
  static constexpr Extra kExtra = Extra::kNone;
  static constexpr bool kReadsPrev = false;
  static constexpr int kSplitGate = -1;
  static constexpr bool kDirect = false;

  template <class V, class M = Math<V>>
  static FUSEDRNN_HD void forward(const V* x, const V* h, const V*, V* next, V* gates, V&) {
    const V sum = x[0] + h[0];
    const V zero = M::splat(0);
    // A comparison with NaN is false, so NaN passes through both branches.
    if constexpr (kRelu) {
      next[0] = sum < zero ? zero : sum;
    } else {
      next[0] = M::tanh(sum);
    }
    gates[0] = next[0];
  }

  template <class V, class M = Math<V>>
  static FUSEDRNN_HD void backward(const V* gates, V, const V*, const V* d_next, V* d_x, V* d_h, V*) {
    const V zero = M::splat(0), one = M::splat(1);
    if constexpr (kRelu) {
      d_x[0] = gates[0] <= zero ? zero : d_next[0];
    } else {
      d_x[0] = d_next[0] * (one - gates[0] * gates[0]);
    }
    d_h[0] = d_x[0];
  }
};

using RnnTanh = Rnn<false>;
using RnnRelu = Rnn<true>;

}  // namespace
}  // namespace fusedrnn
