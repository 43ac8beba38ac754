// A step's products with int8 weights where the CPU multiplies bytes (AVX512-VNNI), which are four times as many
// an instruction as floats.
//
// A row becomes integers of 32 bits times a power of two, x = s (2^24 d3 + 2^16 d2 + 2^8 d1 + d0) with signed
// bytes d: values down to 1/128 of the row's largest are exact. So are sums of integers. (Three bytes are not
// enough: an error of 2^-24 of the largest value in each small one was over the error budget.) vpdpbusd takes one
// factor unsigned, so weights are stored as w + 128, in fours, [ceil(k/4)][G][W][4], and sums start from -128 times
// those of the digits; they may wrap around on the way, as they do not at the end.
#pragma once

#include "step_kernel.h"

namespace fusedrnn {
namespace {

struct Digits {
  using Element = uint8_t;
  static constexpr int kTogether = 4, kPlanes = 4;
  static constexpr bool kScaled = true;
  static constexpr int64_t kMost = 1 << 17;  // values of a row whose sums of 127 * 128 stay below 2^31

  // Rows as they came and as digits. Those that digits cannot hold have scale 0: too large or too small a value,
  // or too many.
  struct Rows {
    StepRows plain;
    int64_t k, stride;
    int8_t* digits;  // [B, kPlanes, stride]
    int32_t* start;  // [B, kPlanes]
    float* scale;    // [B]
  };

  static constexpr int64_t plane(int64_t k) { return (k + 63) / 64 * 64; }
  static int64_t bytes(int64_t batch, int64_t k) { return batch * (kPlanes * plane(k) + 64); }

  static Rows rows(const StepRows& x, int64_t batch, int64_t k, char* memory) {
    const int64_t stride = plane(k);
    auto* digits = reinterpret_cast<int8_t*>(memory);
    auto* start = reinterpret_cast<int32_t*>(digits + batch * kPlanes * stride);
    Rows r{x, k, stride, digits, start, reinterpret_cast<float*>(start + batch * kPlanes)};
    for (int64_t b = 0; b < batch; ++b) split(r, b);
    return r;
  }

  typedef int32_t Ints __attribute__((vector_size(64)));
  typedef uint32_t Bits __attribute__((vector_size(64)));

  static VecF values(const Rows& r, int64_t b, int64_t i) {
    const float* from = r.plain.data + b * r.plain.stride;
    const int n = static_cast<int>(smaller(16, r.k - i));
    if (r.plain.k_stride == 1) return load(from + i, n);
    VecF lanes{};
    for (int j = 0; j < n; ++j) lanes[j] = from[(i + j) * r.plain.k_stride];
    return lanes;
  }

  static void split(const Rows& r, int64_t b) {
    Bits most{};
    for (int64_t i = 0; i < r.k; i += 16) {
      const Bits magnitude = (Bits)values(r, b, i) << 1;
      most = magnitude > most ? magnitude : most;
    }
    uint32_t largest = 0;
    for (int j = 0; j < 16; ++j) largest = most[j] > largest ? most[j] : largest;
    largest >>= 1;
    // An exponent whose power of two is so far above the largest value that its digits hold it.
    const uint32_t exponent = largest == 0 ? 127 : (largest + (1 << 17)) >> 23;
    r.scale[b] = 0;
    if (exponent < 31 || exponent > 253 || r.k > kMost) return;
    r.scale[b] = power(exponent - 30);
    const float inverse = power(284 - exponent);
    Ints sums[kPlanes] = {};
    for (int64_t i = 0; i < r.k; i += 16) {
      Ints rest = (Ints)_mm512_maskz_cvtps_epi32(0xffff, (__m512)(values(r, b, i) * inverse));
      for (int p = 0; p < kPlanes; ++p) {
        const Ints digit = rest << 24 >> 24;
        rest = (rest - digit) >> 8;
        sums[p] += digit;
        _mm_storeu_si128(reinterpret_cast<__m128i*>(r.digits + (b * kPlanes + p) * r.stride + i),
                         _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)digit));
      }
    }
    for (int p = 0; p < kPlanes; ++p) {
      int32_t sum = 0;
      for (int j = 0; j < 16; ++j) sum += sums[p][j];
      r.start[b * kPlanes + p] = -128 * sum;
    }
  }

  static float power(uint32_t exponent) {
    const uint32_t bits = exponent << 23;
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
  }

  static Ints weights(const uint8_t* weight, int N, int64_t group, int n) {
    Ints fours;
    __builtin_memcpy(&fours, weight + (group * N + n) * 64, sizeof fours);
    return fours;
  }

  // Row b times a block of units with N gates.
  template <int N>
  static void multiply(const Rows& r, int64_t b, const uint8_t* weight /*[k/4, N, W, 4]*/, float* acc /*[N, W]*/) {
    if (r.scale[b] == 0) return multiply_plain<N>(r, b, weight, acc);
    const int8_t* digits = r.digits + b * kPlanes * r.stride;
    Ints sums[kPlanes][N];
#pragma GCC unroll 8
    for (int p = 0; p < kPlanes; ++p)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sums[p][n] = Ints{} + r.start[b * kPlanes + p];
    for (int64_t group = 0; group * 4 < r.k; ++group) {
      Ints four[kPlanes];
#pragma GCC unroll 8
      for (int p = 0; p < kPlanes; ++p) {
        int32_t bytes;
        __builtin_memcpy(&bytes, digits + p * r.stride + group * 4, sizeof bytes);
        four[p] = Ints{} + bytes;
      }
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        const Ints w = weights(weight, N, group, n);
#pragma GCC unroll 8
        for (int p = 0; p < kPlanes; ++p) {
          sums[p][n] = (Ints)_mm512_dpbusd_epi32((__m512i)sums[p][n], (__m512i)w, (__m512i)four[p]);
        }
      }
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      VecF sum = __builtin_convertvector(sums[kPlanes - 1][n], VecF);
      for (int p = kPlanes - 2; p >= 0; --p) sum = sum * 256.0f + __builtin_convertvector(sums[p][n], VecF);
      store(acc + n * 16, sum * r.scale[b]);
    }
  }

  template <int N>
  static void multiply_plain(const Rows& r, int64_t b, const uint8_t* weight, float* acc) {
    for (int n = 0; n < N; ++n) {
      VecF sum{};
      for (int64_t i = 0; i < r.k; ++i) {
        const Ints w = (weights(weight, N, i / 4, n) >> (i % 4 * 8) & 255) - 128;
        sum += __builtin_convertvector(w, VecF) * r.plain.data[b * r.plain.stride + i * r.plain.k_stride];
      }
      store(acc + n * 16, sum);
    }
  }
};

template <>
struct StepFactor<Digits> : Digits {};

template <class P, int G>
FUSEDRNN_HD void step_multiply(int64_t count, int64_t blocks, bool, int64_t k, const Digits::Rows& rows, int64_t first,
                               const void* weight, int64_t unit_block, float* acc /*[count, blocks, G, W]*/) {
  const int64_t block = (k + 3) / 4 * G * 64;
  const uint8_t* from = static_cast<const uint8_t*>(weight) + unit_block * block;
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t j = 0; j < blocks; ++j) {
      Digits::multiply<G>(rows, first + r, from + j * block, acc + (r * blocks + j) * G * 16);
    }
  }
}

}  // namespace
}  // namespace fusedrnn
