// The GRU as torch has it: gates r, z, n, the reset gate applied after the recurrent product.
// Cho et al. 2014, version 1. Saves n's recurrent half, which r multiplies.
#pragma once

#include "cell.h"

namespace fusedrnn {
namespace {

struct Gru {
  static constexpr int kGates = 3;
  static constexpr int kStates = 1;
  static constexpr bool kSavesGates = true;
  static constexpr Extra kExtra = Extra::kOwn;
  static constexpr bool kReadsPrev = true;
  static constexpr int kSplitGate = 2;
  static constexpr bool kDirect = true;

  template <class V, class M = Math<V>>
  static FUSEDRNN_HD void forward(const V* x, const V* h, const V* prev, V* next, V* gates, V& extra) {
    gates[0] = M::sigmoid(x[0] + h[0]);
    gates[1] = M::sigmoid(x[1] + h[1]);
    gates[2] = M::tanh(x[2] + gates[0] * h[2]);
    next[0] = gates[2] + gates[1] * (prev[0] - gates[2]);
    extra = h[2];
  }

  template <class V, class M = Math<V>>
  static FUSEDRNN_HD void backward(const V* gates, V extra, const V* prev, const V* d_next, V* d_x, V* d_h,
                                   V* d_prev) {
    const V one = M::splat(1);
    const V r = gates[0], z = gates[1], n = gates[2];
    d_x[2] = d_next[0] * (one - z) * (one - n * n);
    d_x[1] = d_next[0] * (prev[0] - n) * z * (one - z);
    d_x[0] = d_x[2] * extra * r * (one - r);
    d_h[0] = d_x[0];
    d_h[1] = d_x[1];
    d_h[2] = d_x[2] * r;
    d_prev[0] = d_next[0] * z;
  }
};

}  // namespace
}  // namespace fusedrnn
