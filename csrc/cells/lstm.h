// The LSTM with forget gate: gates i, f, g, o; states h, c. Gers et al. 2000.
#pragma once

#include "cell.h"

namespace fusedrnn {
namespace {

struct Lstm {
  static constexpr int kGates = 4;
  static constexpr int kStates = 2;
  static constexpr bool kSavesGates = true;
  static constexpr Extra kExtra = Extra::kState1;
  static constexpr bool kReadsPrev = false;
  static constexpr int kSplitGate = -1;
  static constexpr bool kDirect = false;

  template <class V, class M = Math<V>>
  static FUSEDRNN_HD void forward(const V* x, const V* h, const V* prev, V* next, V* gates, V& extra) {
    gates[0] = M::sigmoid(x[0] + h[0]);
    gates[1] = M::sigmoid(x[1] + h[1]);
    gates[2] = M::tanh(x[2] + h[2]);
    gates[3] = M::sigmoid(x[3] + h[3]);
    next[1] = gates[1] * prev[1] + gates[0] * gates[2];
    next[0] = gates[3] * M::tanh(next[1]);
    extra = next[1];
  }

  template <class V, class M = Math<V>>
  static FUSEDRNN_HD void backward(const V* gates, V extra, const V* prev, const V* d_next, V* d_x, V* d_h,
                                   V* d_prev) {
    const V one = M::splat(1);
    const V i = gates[0], f = gates[1], g = gates[2], o = gates[3];
    const V tanh_c = M::tanh(extra);
    const V d_c = d_next[1] + d_next[0] * o * (one - tanh_c * tanh_c);
    d_x[0] = d_c * g * i * (one - i);
    d_x[1] = d_c * prev[1] * f * (one - f);
    d_x[2] = d_c * i * (one - g * g);
    d_x[3] = d_next[0] * tanh_c * o * (one - o);
    for (int gate = 0; gate < 4; ++gate) d_h[gate] = d_x[gate];
    d_prev[1] = d_c * f;
  }
};

}  // namespace
}  // namespace fusedrnn
