// SIMD vectors of FUSEDRNN_VECTOR_BYTES (16, 32 or 64), written with the compiler's own vector
// types so that one source serves every ISA level; intrinsics only where masks need them.
#pragma once

#include <stdint.h>

#if FUSEDRNN_VECTOR_BYTES >= 32
#include <immintrin.h>
#endif

#include "../cells/math.h"

namespace fusedrnn {
namespace {

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
