// What a cell may call on a value type V. The loops that instantiate cells specialise Math for
// their own V (SIMD vectors in cpu/math.h); the scalar versions below also serve CUDA threads.
//
// Everything that is instantiated per ISA level lives in an anonymous namespace: a weak symbol
// from a file built with AVX-512 could be picked by the linker for CPUs without it.
#pragma once

#include <math.h>

#if defined(__CUDACC__)
#define FUSEDRNN_HD __host__ __device__ __forceinline__
#else
#define FUSEDRNN_HD inline __attribute__((always_inline))
#endif

namespace fusedrnn {
namespace {

template <class V>
struct Math;

template <>
struct Math<float> {
  static FUSEDRNN_HD float splat(double value) { return static_cast<float>(value); }
  static FUSEDRNN_HD float tanh(float x) { return ::tanhf(x); }
  static FUSEDRNN_HD float sigmoid(float x) { return 1.0f / (1.0f + ::expf(-x)); }
};

template <>
struct Math<double> {
  static FUSEDRNN_HD double splat(double value) { return value; }
  static FUSEDRNN_HD double tanh(double x) { return ::tanh(x); }
  static FUSEDRNN_HD double sigmoid(double x) { return 1.0 / (1.0 + ::exp(-x)); }
};

}  // namespace
}  // namespace fusedrnn
