// SIMD vectors of FUSEDRNN_VECTOR_BYTES (16, 32 or 64), written with the compiler's own vector
// types so that one source serves every ISA level; intrinsics only where masks need them.
#pragma once

#include <stdint.h>

#if FUSEDRNN_VECTOR_BYTES >= 32
#include <immintrin.h>
#endif

#include "../cells/math.h"
#include "scan.h"

namespace fusedrnn {
namespace {

// Whether a product and a sum round once, as one.
#if defined(__SSE2__) && !defined(__FMA__)
constexpr bool kFused = false;
#else
constexpr bool kFused = true;
#endif

typedef float VecF __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES)));
typedef double VecD __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES)));

template <class T>
struct Simd;

template <>
struct Simd<float> {
  using V = VecF;
  typedef uint32_t Bits __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES)));
  static constexpr int kWidth = FUSEDRNN_VECTOR_BYTES / 4;
};

template <>
struct Simd<double> {
  using V = VecD;
  typedef uint64_t Bits __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES)));
  static constexpr int kWidth = FUSEDRNN_VECTOR_BYTES / 8;
};

template <class T>
FUSEDRNN_HD typename Simd<T>::V load(const T* from) {
  typename Simd<T>::V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <class T>
FUSEDRNN_HD void store(T* to, typename Simd<T>::V v) {
  __builtin_memcpy(to, &v, sizeof v);
}

template <class T>
FUSEDRNN_HD typename Simd<T>::V splat(T value) {
  return value - typename Simd<T>::V{};  // x - 0 is x, also for -0 and NaN
}

#if FUSEDRNN_VECTOR_BYTES == 64

FUSEDRNN_HD VecF load_masked(const float* from, int n) {
  return (VecF)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), from);
}
FUSEDRNN_HD VecD load_masked(const double* from, int n) {
  return (VecD)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), from);
}
FUSEDRNN_HD void store_masked(float* to, VecF v, int n) {
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
}
FUSEDRNN_HD void store_masked(double* to, VecD v, int n) {
  _mm512_mask_storeu_pd(to, static_cast<__mmask8>((1u << n) - 1), (__m512d)v);
}

#elif FUSEDRNN_VECTOR_BYTES == 32

FUSEDRNN_HD __m256i mask_of(const float*, int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FUSEDRNN_HD __m256i mask_of(const double*, int n) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
FUSEDRNN_HD VecF load_masked(const float* from, int n) {
  return (VecF)_mm256_maskload_ps(from, mask_of(from, n));
}
FUSEDRNN_HD VecD load_masked(const double* from, int n) {
  return (VecD)_mm256_maskload_pd(from, mask_of(from, n));
}
FUSEDRNN_HD void store_masked(float* to, VecF v, int n) {
  _mm256_maskstore_ps(to, mask_of(to, n), (__m256)v);
}
FUSEDRNN_HD void store_masked(double* to, VecD v, int n) {
  _mm256_maskstore_pd(to, mask_of(to, n), (__m256d)v);
}

#else

template <class T>
FUSEDRNN_HD typename Simd<T>::V load_masked(const T* from, int n) {
  typename Simd<T>::V v{};
  for (int i = 0; i < Simd<T>::kWidth; ++i) {
    if (i < n) v[i] = from[i];
  }
  return v;
}
template <class T>
FUSEDRNN_HD void store_masked(T* to, typename Simd<T>::V v, int n) {
  for (int i = 0; i < Simd<T>::kWidth; ++i) {
    if (i < n) to[i] = v[i];
  }
}

#endif

// The larger or the smaller of each lane; where a lane of v is NaN it stays so. Compilers make two instructions
// of the comparison.
#if FUSEDRNN_VECTOR_BYTES == 64
FUSEDRNN_HD VecF at_least(VecF low, VecF v) { return (VecF)_mm512_maskz_max_ps(0xffff, (__m512)low, (__m512)v); }
FUSEDRNN_HD VecD at_least(VecD low, VecD v) { return (VecD)_mm512_maskz_max_pd(0xff, (__m512d)low, (__m512d)v); }
FUSEDRNN_HD VecF at_most(VecF high, VecF v) { return (VecF)_mm512_maskz_min_ps(0xffff, (__m512)high, (__m512)v); }
FUSEDRNN_HD VecD at_most(VecD high, VecD v) { return (VecD)_mm512_maskz_min_pd(0xff, (__m512d)high, (__m512d)v); }
#elif FUSEDRNN_VECTOR_BYTES == 32
FUSEDRNN_HD VecF at_least(VecF low, VecF v) { return (VecF)_mm256_max_ps((__m256)low, (__m256)v); }
FUSEDRNN_HD VecD at_least(VecD low, VecD v) { return (VecD)_mm256_max_pd((__m256d)low, (__m256d)v); }
FUSEDRNN_HD VecF at_most(VecF high, VecF v) { return (VecF)_mm256_min_ps((__m256)high, (__m256)v); }
FUSEDRNN_HD VecD at_most(VecD high, VecD v) { return (VecD)_mm256_min_pd((__m256d)high, (__m256d)v); }
#else
FUSEDRNN_HD VecF at_least(VecF low, VecF v) { return low > v ? low : v; }
FUSEDRNN_HD VecD at_least(VecD low, VecD v) { return low > v ? low : v; }
FUSEDRNN_HD VecF at_most(VecF high, VecF v) { return high < v ? high : v; }
FUSEDRNN_HD VecD at_most(VecD high, VecD v) { return high < v ? high : v; }
#endif

// x / y for normal y whose reciprocal is normal, to about one unit in the last place.
FUSEDRNN_HD VecF quotient(VecF x, VecF y) {
#if FUSEDRNN_VECTOR_BYTES == 64
  const VecF r = (VecF)_mm512_maskz_rcp14_ps(0xffff, (__m512)y), q = x * r;
  return q + q * (1.0f - y * r);
#else
  return x / y;
#endif
}
FUSEDRNN_HD VecD quotient(VecD x, VecD y) { return x / y; }

// bf16 is loaded to and stored from float vectors, rounded to nearest even.
typedef uint16_t VecH __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES / 2)));

FUSEDRNN_HD Simd<float>::Bits load_bits(const Bf16* from, int n = Simd<float>::kWidth) {
  VecH h{};
  if (n == Simd<float>::kWidth) {
    __builtin_memcpy(&h, from, sizeof h);
  } else {
    __builtin_memcpy(&h, from, n * sizeof(Bf16));
  }
  return __builtin_convertvector(h, Simd<float>::Bits);
}
FUSEDRNN_HD VecF load(const Bf16* from) { return (VecF)(load_bits(from) << 16); }
FUSEDRNN_HD VecH round_to_bf16(VecF v) {
  using Bits = Simd<float>::Bits;
  const Bits bits = (Bits)v, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(v == v ? rounded : Bits{} + 0x7fc0, VecH);
}
FUSEDRNN_HD void store(Bf16* to, VecF v) {
  const VecH h = round_to_bf16(v);
  __builtin_memcpy(to, &h, sizeof h);
}
FUSEDRNN_HD VecF load(const Bf16* from, int n) { return (VecF)(load_bits(from, n) << 16); }
FUSEDRNN_HD void store(Bf16* to, VecF v, int n) {
  const VecH h = round_to_bf16(v);
  if (n == Simd<float>::kWidth) {
    __builtin_memcpy(to, &h, sizeof h);
  } else {
    __builtin_memcpy(to, &h, n * sizeof(Bf16));
  }
}

// fp16 likewise. Without instructions for it: a factor of 2^112 moves the exponent from one range to the
// other, subnormals included, and what lies beyond the range of fp16 is infinite or NaN.
FUSEDRNN_HD VecF load(const Half* from, int n) {
  VecH h{};
  __builtin_memcpy(&h, from, n * sizeof(Half));
#if FUSEDRNN_VECTOR_BYTES == 64
  return (VecF)_mm512_maskz_cvtph_ps(0xffff, (__m256i)h);
#elif FUSEDRNN_VECTOR_BYTES == 32
  return (VecF)_mm256_cvtph_ps((__m128i)h);
#else
  using Bits = Simd<float>::Bits;
  const Bits bits = __builtin_convertvector(h, Bits), magnitude = (bits & 0x7fff) << 13;
  const Bits finite = (Bits)((VecF)magnitude * 0x1p112f);
  return (VecF)(((bits & 0x7fff) < 0x7c00 ? finite : magnitude | 0x7f800000) | (bits & 0x8000) << 16);
#endif
}
FUSEDRNN_HD void store(Half* to, VecF v, int n) {
#if FUSEDRNN_VECTOR_BYTES == 64
  const VecH h = (VecH)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif FUSEDRNN_VECTOR_BYTES == 32
  const VecH h = (VecH)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  using Bits = Simd<float>::Bits;
  const Bits bits = (Bits)v, magnitude = bits & 0x7fffffff;
  const Bits normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  const Bits subnormal = (Bits)((VecF)magnitude + 0.5f) - (Bits)(VecF{} + 0.5f);  // the sum rounds to 2^-24
  const Bits beyond = magnitude > 0x7f800000 ? Bits{} + 0x7e00 : Bits{} + 0x7c00;
  const Bits made = magnitude < (113u << 23) ? subnormal : magnitude < 0x477ff000 ? normal : beyond;
  const VecH h = __builtin_convertvector(made | bits >> 31 << 15, VecH);
#endif
  __builtin_memcpy(to, &h, n * sizeof(Half));
}

// A vector of factors, and the sum of products with one of them in every lane.
template <class F>
struct Factors {
  using V = typename Simd<F>::V;
  static FUSEDRNN_HD V load(const F* from) { return fusedrnn::load(from); }
  static FUSEDRNN_HD V splat(F value) { return fusedrnn::splat(value); }
  static FUSEDRNN_HD V add_product(V sum, V a, V b) { return sum + a * b; }
};
template <>
struct Factors<Bf16Pair> {
  using V = Simd<float>::Bits;
  static FUSEDRNN_HD V load(const Bf16Pair* from) {
    V v;
    __builtin_memcpy(&v, from, sizeof v);
    return v;
  }
  static FUSEDRNN_HD V splat(Bf16Pair value) { return V{} + value.bits; }
  static FUSEDRNN_HD VecF add_product(VecF sum, V a, V b) {
#if defined(__AVX512BF16__) && FUSEDRNN_VECTOR_BYTES == 64
    return (VecF)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    const V upper = V{} + 0xffff0000u;
    sum += (VecF)(a << 16) * (VecF)(b << 16);
    return sum + (VecF)(a & upper) * (VecF)(b & upper);
#endif
  }
};

// The first n lanes, and zero in the others.
template <class T>
FUSEDRNN_HD typename Simd<T>::V keep_lanes(typename Simd<T>::V v, int n) {
  using Bits = typename Simd<T>::Bits;
  constexpr int W = Simd<T>::kWidth;
  if (n == W) return v;
  Bits lane;
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) lane[i] = i;
  return (typename Simd<T>::V)((Bits)v & (Bits)(lane < static_cast<unsigned>(n)));
}

// The sum of all lanes, by halves.
template <class T>
FUSEDRNN_HD T sum_lanes(typename Simd<T>::V v) {
  constexpr int W = Simd<T>::kWidth;
#pragma GCC unroll 4
  for (int step = W / 2; step > 0; step /= 2) {
    typename Simd<T>::Bits from{};
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) from[i] = (i + step) % W;
    v += __builtin_shuffle(v, from);
  }
  return v[0];
}

// Lane i is the sum of all segments of v[i], of which a vector has `Segment` lanes each; N is a power of two up
// to the width. Two vectors fold into one with twice as many segments. Lanes beyond N repeat.
template <class T, int N, int Segment = Simd<T>::kWidth>
FUSEDRNN_HD typename Simd<T>::V sum_lanes_of(const typename Simd<T>::V* v) {
  if constexpr (Segment == 1) {
    return v[0];
  } else {
    constexpr int W = Simd<T>::kWidth, kHalf = Segment / 2, kFolded = N > 1 ? N / 2 : 1;
    typename Simd<T>::Bits lower{};
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) lower[i] = i / kHalf * Segment + i % kHalf;
    typename Simd<T>::V folded[kFolded];
#pragma GCC unroll 8
    for (int i = 0; i < kFolded; ++i) {
      const auto a = v[N > 1 ? 2 * i : 0], b = v[N > 1 ? 2 * i + 1 : 0];
      folded[i] = __builtin_shuffle(a, b, lower) + __builtin_shuffle(a, b, lower + kHalf);
    }
    return sum_lanes_of<T, kFolded, kHalf>(folded);
  }
}

// The first n lanes; the others read as 0 and are never touched in memory.
template <class T>
FUSEDRNN_HD typename Simd<T>::V load(const T* from, int n) {
  return n == Simd<T>::kWidth ? load(from) : load_masked(from, n);
}

template <class T>
FUSEDRNN_HD void store(T* to, typename Simd<T>::V v, int n) {
  if (n == Simd<T>::kWidth) {
    store(to, v);
  } else {
    store_masked(to, v, n);
  }
}

}  // namespace
}  // namespace fusedrnn
