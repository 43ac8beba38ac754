// Some vectors that go through a formula together, one operation after the other: each operation's vectors do not
// depend on each other, so none waits for the latency of the one before. Compilers keep the order of the source,
// and written pair by pair a formula fills the core's queues with operations that wait.
#pragma once

#include "math.h"

namespace fusedrnn {
namespace {

template <class V, int N>
struct Bundle {
  V of[N];

  FUSEDRNN_HD V& operator[](int i) { return of[i]; }
  FUSEDRNN_HD const V& operator[](int i) const { return of[i]; }
};

template <class V, int N>
FUSEDRNN_HD V member(const Bundle<V, N>& x, int i) {
  return x[i];
}
template <class V>
FUSEDRNN_HD V member(const V& x, int) {
  return x;
}

template <class V, int N, class F>
FUSEDRNN_HD Bundle<V, N> bundle_of(F f) {
  Bundle<V, N> made;
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) made[i] = f(i);
  return made;
}

// With another bundle, or with a vector that all members meet.
#define FUSEDRNN_BUNDLED(op)                                                                          \
  template <class V, int N, class Other>                                                              \
  FUSEDRNN_HD Bundle<V, N> operator op(const Bundle<V, N>& a, const Other& b) {                       \
    return bundle_of<V, N>([&](int i) FUSEDRNN_INLINE { return a[i] op member(b, i); });              \
  }                                                                                                   \
  template <class V, int N>                                                                           \
  FUSEDRNN_HD Bundle<V, N> operator op(const V& a, const Bundle<V, N>& b) {                           \
    return bundle_of<V, N>([&](int i) FUSEDRNN_INLINE { return a op b[i]; });                         \
  }
#define FUSEDRNN_INLINE __attribute__((always_inline))
FUSEDRNN_BUNDLED(+)
FUSEDRNN_BUNDLED(-)
FUSEDRNN_BUNDLED(*)
#undef FUSEDRNN_BUNDLED

template <class V, int N>
FUSEDRNN_HD void operator+=(Bundle<V, N>& a, const Bundle<V, N>& b) {
  a = a + b;
}
// All members, by halves.
template <class V, int N>
FUSEDRNN_HD void operator+=(V& a, Bundle<V, N> b) {
#pragma GCC unroll 2
  for (int half = N / 2; half > 0; half /= 2) {
#pragma GCC unroll 2
    for (int i = 0; i < half; ++i) b[i] += b[i + half];
  }
  a += b[0];
}

template <class V, int N>
struct Math<Bundle<V, N>> {
  using B = Bundle<V, N>;
  static FUSEDRNN_HD V splat(double value) { return Math<V>::splat(value); }
  // Every other one by the divider, which works beside the multipliers: gradients of attention take 3.8 cycles a vector
  // on Zen 5 instead of 4.3. All of them would be 3.5 there, but as much as 7 to 10 on CPUs that divide slowly.
  static FUSEDRNN_HD B quotient(const B& x, const B& y) {
    return bundle_of<V, N>([&](int i) FUSEDRNN_INLINE { return i % 2 ? Math<V>::quotient(x[i], y[i]) : x[i] / y[i]; });
  }
  static FUSEDRNN_HD B expm1_saturated(const B& x) {
    return bundle_of<V, N>([&](int i) FUSEDRNN_INLINE { return Math<V>::expm1_saturated(x[i]); });
  }
};
#undef FUSEDRNN_INLINE

}  // namespace
}  // namespace fusedrnn
