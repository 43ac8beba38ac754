// e_ij = sum_h v_h tanh(q_ih + k_jh). Bahdanau et al. 2014, https://arxiv.org/abs/1409.0473
//
// tanh(q + k) = s / (s + 2) with s = expm1(2 (q + k)): one exponential per pair, or one per element of q and
// of k, whose product is that of the pair.
#pragma once

#include <type_traits>

#include "score.h"

namespace fusedrnn {
namespace {

template <class V>
struct Expm1 {
  V s, s_plus_2;
};

// `Exponentials` makes s.
template <class Exponentials>
struct Additive {
  static constexpr int kParts = Exponentials::kParts;
  static constexpr bool kWeighted = true;

  template <class V>
  static FUSEDRNN_HD void prepare(V x, V* parts) {
    Exponentials::prepare(x, parts);
  }
  template <class Q, class K>
  static FUSEDRNN_HD auto tanh(const Q* q, const K* k) {
    const auto pair = Exponentials::of_pair(q, k);
    return Math<std::remove_cv_t<decltype(pair.s)>>::quotient(pair.s, pair.s_plus_2);
  }
  template <class Q, class K, class V, class Sum>
  static FUSEDRNN_HD Sum add(const Q* q, const K* k, V v, const Sum& sum) {
    return sum + tanh(q, k) * v;
  }
  template <class Q, class K, class G, class V>
  static FUSEDRNN_HD void gradients(const Q* q, const K* k, const G& g, Q& dq, K& dk, V& dv) {
    const auto t = tanh(q, k), gt = g * t, through = g - gt * t;
    dq += through;
    dk += through;
    dv += gt;
  }
};

// expm1(2 (q + k)), whatever the values are.
struct PerPair {
  static constexpr int kParts = 1;
  template <class V>
  static FUSEDRNN_HD void prepare(V x, V* parts) {
    parts[0] = x + x;
  }
  template <class Q, class K>
  static FUSEDRNN_HD auto of_pair(const Q* q, const K* k) {
    const auto sum = q[0] + k[0];
    using V = std::remove_cv_t<decltype(sum)>;
    const V s = Math<V>::expm1_saturated(sum);
    return Expm1<V>{s, s + Math<V>::splat(2)};
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
  template <class Q, class K>
  static FUSEDRNN_HD auto of_pair(const Q* q, const K* k) {
    const auto s = q[0] * k[0] - Math<Q>::splat(1);
    using V = std::remove_cv_t<decltype(s)>;
    // To s + 2 the rests are a rounding at most, for which it is not to wait.
    return Expm1<V>{s + (q[1] + k[1]), s + Math<Q>::splat(2)};
  }
};

}  // namespace
}  // namespace fusedrnn
