// e_ij = sum_h v_h tanh(q_ih + k_jh). Bahdanau et al. 2014, https://arxiv.org/abs/1409.0473
//
// tanh(q + k) = s / (s + 2) with s = expm1(2 (q + k)): one exponential per pair, or one per element of q and
// of k, whose product is that of the pair.
#pragma once

#include "score.h"

namespace fusedrnn {
namespace {

// `Expm1` makes s.
template <class Expm1>
struct Additive {
  static constexpr int kParts = Expm1::kParts;
  static constexpr bool kWeighted = true;

  template <class V>
  static FUSEDRNN_HD void prepare(V x, V* parts) {
    Expm1::prepare(x, parts);
  }
  template <class V>
  static FUSEDRNN_HD V tanh(const V* q, const V* k) {
    const V s = Expm1::of_pair(q, k);
    return s * Math<V>::reciprocal(s + Math<V>::splat(2));
  }
  template <class V>
  static FUSEDRNN_HD V add(const V* q, const V* k, V v, V sum) {
    return sum + v * tanh(q, k);
  }
  template <class V>
  static FUSEDRNN_HD void gradients(const V* q, const V* k, V g, V& dq, V& dk, V& dv) {
    const V t = tanh(q, k), slope = Math<V>::splat(1) - t * t;
    dq += g * slope;
    dk += g * slope;
    dv += g * t;
  }
};

// expm1(2 (q + k)), whatever the values are.
struct PerPair {
  static constexpr int kParts = 1;
  template <class V>
  static FUSEDRNN_HD void prepare(V x, V* parts) {
    parts[0] = x + x;
  }
  template <class V>
  static FUSEDRNN_HD V of_pair(const V* q, const V* k) {
    return Math<V>::expm1_saturated(q[0] + k[0]);
  }
};

// exp(2q) exp(2k) - 1, for |q| and |k| up to kMost. The second part is what rounding the first took away,
// relative to it: where the difference is small, it has a rounding error of its own size only.
struct PerElement {
  static constexpr int kParts = 2;
  static constexpr double kMost = 20;  // exp(4 * 20) and its reciprocal are normal floats
  template <class V>
  static FUSEDRNN_HD void prepare(V x, V* parts) {
    Math<V>::exp_with_rest(x + x, parts[0], parts[1]);
  }
  template <class V>
  static FUSEDRNN_HD V of_pair(const V* q, const V* k) {
    return (q[0] * k[0] - Math<V>::splat(1)) + (q[1] + k[1]);
  }
};

}  // namespace
}  // namespace fusedrnn
