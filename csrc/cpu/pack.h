// Weights in the order in which a tile reads them. Each call packs some blocks of W units.
#pragma once

#include "simd.h"

namespace fusedrnn {
namespace {

template <class T>
void pack_rows(const T* weight /*[G*n, k]*/, int64_t gates, int64_t n, int64_t k_end, int64_t begin, int64_t end,
               T* packed /*[ceil(n/W), k, G, W]*/) {
  constexpr int W = Simd<T>::kWidth;
  T square[W][W];
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * W;
    const int64_t lanes = n - first < W ? n - first : W;
    for (int64_t g = 0; g < gates; ++g) {
      const T* from = weight + (g * n + first) * k_end;
      T* to = packed + (first * k_end * gates) + g * W;
      for (int64_t k = 0; k < k_end; k += W) {
        const int columns = static_cast<int>(k_end - k < W ? k_end - k : W);
        for (int64_t l = 0; l < W; ++l) {
          const typename Simd<T>::V row = l < lanes ? load(from + l * k_end + k, columns) : typename Simd<T>::V{};
          for (int c = 0; c < W; ++c) square[c][l] = row[c];
        }
        for (int c = 0; c < columns; ++c) store(to + (k + c) * gates * W, load(square[c]));
      }
    }
  }
}

template <class T>
void pack_columns(const T* weight /*[k, n]*/, int64_t k_end, int64_t n, int64_t begin, int64_t end,
                  T* packed /*[ceil(n/W), k, W]*/) {
  constexpr int W = Simd<T>::kWidth;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * W;
    const int lanes = static_cast<int>(n - first < W ? n - first : W);
    T* to = packed + first * k_end;
    for (int64_t k = 0; k < k_end; ++k) store(to + k * W, load(weight + k * n + first, lanes));
  }
}

// Two rows, one value of each in a pair; without a second row its half is zero.
FUSEDRNN_HD Simd<float>::Bits pair_rows(const Bf16* first, const Bf16* second, int n) {
  const Simd<float>::Bits low = load_bits(first, n);
  return second == nullptr ? low : low | load_bits(second, n) << 16;
}

FUSEDRNN_HD void store_pairs(Bf16Pair* to, Simd<float>::Bits pairs) { __builtin_memcpy(to, &pairs, sizeof pairs); }

// A pair of neighbours in a row is moved as if it were a float.
inline void pack_rows(const Bf16* weight, int64_t gates, int64_t n, int64_t k_end, int64_t begin, int64_t end,
                      Bf16Pair* packed) {
  pack_rows<float>(reinterpret_cast<const float*>(weight), gates, n, k_end / 2, begin, end,
                   reinterpret_cast<float*>(packed));
}

inline void pack_columns(const Bf16* weight, int64_t k_end, int64_t n, int64_t begin, int64_t end, Bf16Pair* packed) {
  constexpr int W = Simd<float>::kWidth;
  const int64_t pairs = ceil_div(k_end, 2);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * W;
    const int lanes = static_cast<int>(n - first < W ? n - first : W);
    Bf16Pair* to = packed + first * pairs;
    for (int64_t k = 0; k < k_end; k += 2) {
      const Bf16* row = weight + k * n + first;
      store_pairs(to + k / 2 * W, pair_rows(row, k + 1 < k_end ? row + n : nullptr, lanes));
    }
  }
}

}  // namespace
}  // namespace fusedrnn
