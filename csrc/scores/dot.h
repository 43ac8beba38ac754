// e_ij = scale * q_i . k_j. Luong et al. 2015, https://arxiv.org/abs/1508.04025
#pragma once

#include "score.h"

namespace fusedrnn {
namespace {

struct Dot {
  static constexpr int kParts = 1;
  static constexpr bool kWeighted = false;

  template <class V>
  static FUSEDRNN_HD void prepare(V x, V* parts) {
    parts[0] = x;
  }
  template <class V>
  static FUSEDRNN_HD V add(const V* q, const V* k, V, V sum) {
    return sum + q[0] * k[0];
  }
  template <class V>
  static FUSEDRNN_HD void gradients(const V* q, const V* k, V g, V& dq, V& dk, V&) {
    dq += g * k[0];
    dk += g * q[0];
  }
};

}  // namespace
}  // namespace fusedrnn
