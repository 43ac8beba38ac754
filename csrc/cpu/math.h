// sigmoid and tanh on vectors: no table, no branch; 2-ulp class in fp32, about 1e-15 in fp64.
//
// With n = round(y / ln 2) and r = y - n ln 2, exp(y) = 2^n (1 + p(r)) and expm1(y) = 2^n p(r) + (2^n - 1), which has
// no cancellation that matters. A clamp is a comparison that is false for NaN, so NaN passes.
#pragma once

#include "simd.h"

namespace fusedrnn {
namespace {

template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr int kShift = 23;
  static constexpr uint32_t kBias = 127;
  static constexpr float kLow = -87.9f;  // 2^n becomes 0 here: n = -127
  static constexpr float kHigh = 88.9f;  // and infinite: n = 128
  static constexpr float kSaturated = 32;
  static constexpr float kLog2E = 1.44269504088896341f;
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
};

template <>
struct ExpConstants<double> {
  static constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int kShift = 52;
  static constexpr uint64_t kBias = 1023;
  static constexpr double kLow = -708.9;
  static constexpr double kHigh = 709.9;
  static constexpr double kSaturated = 64;
  static constexpr double kLog2E = 1.4426950408889634074;
  static constexpr double kLn2High = 6.93145751953125e-1, kLn2Low = 1.42860682030941723212e-6;
};

// exp(r) - 1 on |r| <= ln(2) / 2.
FUSEDRNN_HD VecF expm1_polynomial(VecF r) {  // Cephes expf
  VecF q = 1.9875691500e-4f * r + 1.3981999507e-3f;
  q = q * r + 8.3334519073e-3f;
  q = q * r + 4.1665795894e-2f;
  q = q * r + 1.6666665459e-1f;
  q = q * r + 5.0000001201e-1f;
  return (r * r) * q + r;
}
FUSEDRNN_HD VecD expm1_polynomial(VecD r) {  // Taylor: the remainder is below 1e-17
  const VecD r2 = r * r, r4 = r2 * r2;
  // Pairs, then Horner in r^4: half the latency of plain Horner.
  const VecD a = (1.0 / 2) + (1.0 / 6) * r + r2 * ((1.0 / 24) + (1.0 / 120) * r);
  const VecD b = (1.0 / 720) + (1.0 / 5040) * r + r2 * ((1.0 / 40320) + (1.0 / 362880) * r);
  const VecD c = (1.0 / 3628800) + (1.0 / 39916800) * r + r2 * ((1.0 / 479001600) + (1.0 / 6227020800.0) * r);
  return r2 * (a + r4 * (b + r4 * c)) + r;
}

// exp(r) there: its own polynomial where that takes fewer instructions, of least relative error (2^-28).
FUSEDRNN_HD VecF exp_polynomial(VecF r) {
  VecF q = 1.3814539416e-3f * r + 8.3687454462e-3f;
  q = q * r + 4.1668388993e-2f;
  q = q * r + 1.6666521132e-1f;
  q = q * r + 4.9999994040e-1f;
  q = q * r + 1.0f;
  return q * r + 1.0f;
}
FUSEDRNN_HD VecD exp_polynomial(VecD r) { return 1.0 + expm1_polynomial(r); }

// y = n ln 2 + r.
template <class T>
struct Reduced {
  typename Simd<T>::V scale;  // 2^n; 0 below the normal range, infinite above it
  typename Simd<T>::V r;
};

// y is within kLow .. kHigh.
template <class T>
FUSEDRNN_HD Reduced<T> reduce(typename Simd<T>::V y) {
  using V = typename Simd<T>::V;
  using Bits = typename Simd<T>::Bits;
  using C = ExpConstants<T>;
  const V shifted = y * C::kLog2E + C::kMagic;
  const V n = shifted - C::kMagic;
  const Bits scale = ((Bits)shifted << C::kShift) + (C::kBias << C::kShift);
  return {(V)scale, (y - n * C::kLn2High) - n * C::kLn2Low};
}

template <class T>
struct Exp2Part {
  typename Simd<T>::V scale;
  typename Simd<T>::V p;  // exp(r) - 1
};

template <class T>
FUSEDRNN_HD Exp2Part<T> split_exp(typename Simd<T>::V y) {
  const auto reduced = reduce<T>(y);
  return {reduced.scale, expm1_polynomial(reduced.r)};
}

template <class T>
struct VectorMath {
  using V = typename Simd<T>::V;
  using Bits = typename Simd<T>::Bits;
  using C = ExpConstants<T>;

  static FUSEDRNN_HD V splat(double value) { return fusedrnn::splat<T>(static_cast<T>(value)); }

  static FUSEDRNN_HD V quotient(V x, V y) { return fusedrnn::quotient(x, y); }

  // For x <= 0.
  static FUSEDRNN_HD V exp(V x) {
    const auto e = split_exp<T>(at_least(splat(C::kLow), x));
    return e.scale * e.p + e.scale;
  }

  // exp(x), rounded, and what the rounding took away, relative to it; the caller keeps x within the range.
  static FUSEDRNN_HD void exp_with_rest(V x, V& rounded, V& rest) {
    const auto e = split_exp<T>(x);
    const V m = splat(1) + e.p;
    rounded = e.scale * m;
    rest = (e.p - (m - splat(1))) / m;
  }

  // exp(x) - 1, which from kSaturated on is as good as infinite to a tanh, and below -kSaturated is -1.
  static FUSEDRNN_HD V expm1_saturated(V x) {
    const auto e = split_exp<T>(at_most(splat(C::kSaturated), at_least(splat(-C::kSaturated), x)));
    return e.scale * e.p + (e.scale - splat(1));
  }

  static FUSEDRNN_HD V sigmoid(V x) {
    const auto e = reduce<T>(-at_most(splat(-C::kLow), at_least(splat(-C::kHigh), x)));
    return splat(1) / (splat(1) + e.scale * exp_polynomial(e.r));
  }

  // expm1(y) / (expm1(y) + 2) with y = 2|x|, and as 1 - 2 / (expm1(y) + 2) where that is near 1: what the backward
  // makes of a saturated gate, 1 - tanh^2, is only as good as its last digit.
  static FUSEDRNN_HD V tanh(V x) {
    const V sign = splat(-0.0), one = splat(1), two = splat(2);
    const V a = at_most(splat(C::kSaturated), (V)((Bits)x & ~(Bits)sign));
    const auto e = split_exp<T>(a + a);
    const V expm1 = e.scale * e.p + (e.scale - one);
    const auto large = a > splat(0.5);
    const V q = (large ? -two : expm1) / (expm1 + two);
    return (V)((Bits)(large ? q + one : q) | ((Bits)x & (Bits)sign));
  }
};

template <>
struct Math<VecF> : VectorMath<float> {};
template <>
struct Math<VecD> : VectorMath<double> {};

// StoredMath<S>::M are the cells' functions for a storage type S.
template <class S>
struct StoredMath {
  using M = Math<typename Simd<Acc<S>>::V>;
};

#if FUSEDRNN_VECTOR_BYTES == 64

// For values that are stored in bf16: within 2^-16 of the value, where bf16 rounds by up to 2^-8, sigmoid within
// 2^-18, since what a forget gate is off by is off again at every step that a state lives. Far from zero they are
// exactly 0, 1 and -1.
struct CoarseMath {
  static FUSEDRNN_HD VecF splat(double value) { return fusedrnn::splat(static_cast<float>(value)); }

  // 1 / (1 + 2^z), z = -x log2(e): 2^z = 2^floor(z) p(z - floor(z)), p of least relative error on [0, 1].
  static FUSEDRNN_HD VecF sigmoid(VecF x) {
    const VecF most = splat(126), z = at_most(most, x * splat(-1.4426950408889634));
    const VecF f = (VecF)_mm512_maskz_reduce_ps(0xffff, (__m512)z, 9);  // z - floor(z)
    VecF p = splat(1.353416050e-02) * f + splat(5.201147485e-02);
    p = p * f + splat(2.414427485e-01);
    p = p * f + splat(6.930038360e-01);
    p = p * f + splat(1.000002593e+00);
    const VecF d = splat(1) + (VecF)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)z);
    const __mmask16 normal = _mm512_cmp_ps_mask((__m512)z, (__m512)most, _CMP_NGE_UQ);  // or NaN
    return (VecF)_mm512_maskz_mov_ps(normal, (__m512)inverse(d));
  }

  // e / (e + 2), e = 2^y - 1, y = 2 x log2(e), of n = round(y) and (2^f - 1) / f of least relative error for
  // f = y - n within 1/2, so that what is near 0 keeps its digits.
  static FUSEDRNN_HD VecF tanh(VecF x) {
    const VecF y = at_most(splat(40), at_least(splat(-40), x * splat(2.8853900817779268)));
    const VecF f = (VecF)_mm512_maskz_reduce_ps(0xffff, (__m512)y, 8);  // y - round(y)
    VecF p = splat(9.618105516e-03) * f + splat(5.583728808e-02);
    p = p * f + splat(2.402325226e-01);
    p = p * f + splat(6.931368578e-01);
    const VecF scale = (VecF)_mm512_maskz_scalef_ps(0xffff, (__m512)splat(1), (__m512)(y - f));
    const VecF e = scale * (p * f) + (scale - splat(1));
    return e * inverse(e + splat(2));
  }

 private:
  // Of a normal number whose reciprocal is normal.
  static FUSEDRNN_HD VecF inverse(VecF d) {
    const VecF r = (VecF)_mm512_maskz_rcp14_ps(0xffff, (__m512)d);
    return r * (splat(2) - d * r);
  }
};

template <>
struct StoredMath<Bf16> {
  using M = CoarseMath;
};

#endif

}  // namespace
}  // namespace fusedrnn
