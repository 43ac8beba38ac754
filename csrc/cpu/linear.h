// x @ weight.T + bias and its gradients for many rows, as one thread of a team runs them: the products of the scans
// (products.h), of which MKL reaches half the rate on AMD's CPUs.
#pragma once

#include "products.h"

namespace fusedrnn {
namespace {

inline void linear_forward(const LinearForward& l, const Team& team) {
  multiply_rows<float>(team, l.rows, l.inputs, l.x, l.inputs, l.weight, l.outputs, l.out, l.outputs, l.bias);
}

inline void linear_backward(const LinearBackward& l, const Team& team) {
  if (l.d_x) multiply_rows<float>(team, l.rows, l.outputs, l.d_out, l.outputs, l.weight, l.inputs, l.d_x, l.inputs);
  float* const panel = l.panels + team.member * panel_scratch(sizeof(float));
  const int slabs = static_cast<int>(ceil_div(l.rows, kSlabRows));
  for (int i = 0; i < slabs; ++i) {
    const Range slab = share(l.rows, i, slabs);
    const int64_t count = slab.end - slab.begin;
    const float* d_out = l.d_out + slab.begin * l.outputs;
    if (l.d_weight) {
      multiply_transposed<float>(team, count, l.outputs, d_out, l.outputs, l.inputs, nullptr, panel, i > 0, l.d_weight,
                                 [&](auto copy) {
                                   for (int64_t r = 0; r < count; ++r) copy(r, l.x + (slab.begin + r) * l.inputs);
                                 });
    }
    if (l.d_bias) sum_rows<float>(team, count, l.outputs, d_out, l.outputs, i > 0, l.d_bias);
  }
}

}  // namespace
}  // namespace fusedrnn
