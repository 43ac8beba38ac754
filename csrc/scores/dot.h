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
  template <class Q, class K, class V, class Sum>
  static FUSEDRNN_HD Sum add(const Q* q, const K* k, V, const Sum& sum) {
    return sum + q[0] * k[0];
  }
  template <class Q, class K, class G, class V>
  static FUSEDRNN_HD void gradients(const Q* q, const K* k, const G& g, Q& dq, K& dk, V&) {
    dq += g * k[0];
    dk += g * q[0];
  }
};

}  // namespace
}  // namespace fusedrnn
