// The matrix product inside a step: R batch rows times NB blocks of W units with G gates each,
// held in registers for the whole of K. Packed weights are read once, front to back.
#pragma once

#include "storage.h"

namespace fusedrnn {
namespace {

// Vector registers of the level: accumulators fill most, weights and a broadcast need the rest.
constexpr int kRegisters = FUSEDRNN_VECTOR_BYTES == 64 ? 32 : 16;

// The most rows that a tile of `columns` accumulators per row takes.
constexpr int max_rows(int columns) {
  return kRegisters == 32 ? (columns == 4 ? 6 : 8) : (columns == 4 ? 3 : 4);
}

// rows[r][k] is at rows[r * stride + k * k_stride]; P says what they are (storage.h). Of K, every U-th goes to one of U
// copies of the accumulators.
template <class P, int R, int NB, int G, int U = 1>
void tile(int64_t k_end, const typename P::Row* __restrict__ rows /*[R, k_end]*/, int64_t stride, int64_t k_stride,
          const typename P::Element* __restrict__ weight /*[NB][k_end, G, W], block*/, int64_t block,
          typename P::Acc* __restrict__ out /*[R, NB, G, W]*/) {
  using T = typename P::Acc;
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::kWidth, N = NB * G, K = P::kTogether;
  int64_t k = 0;
  do {
    const int64_t stop = k + kLongestSum < k_end ? k + kLongestSum : k_end;
    const bool first = k == 0;
    V acc[U][R][N];
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) acc[u][r][n] = V{};

    for (; k + U * K <= stop; k += U * K) {
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) {
        const int64_t at = k + u * K;
        typename P::V w[N][K];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) P::load(weight + (n / G) * block + (at * G + n % G * K) * W, w[n]);
#pragma GCC unroll 2
        for (int i = 0; i < K; ++i)
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) {
            const auto h = P::splat(rows[r * stride + (at + i) * k_stride]);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) acc[u][r][n] = P::add(acc[u][r][n], w[n][i], h);
          }
      }
    }
    if constexpr (U * K > 1) {
      for (; k < stop; k += K) {
        typename P::V w[N][K];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) P::load(weight + (n / G) * block + (k * G + n % G * K) * W, w[n]);
#pragma GCC unroll 2
        for (int i = 0; i < K; ++i) {
          if (k + i == stop) break;
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) {
            const auto h = P::splat(rows[r * stride + (k + i) * k_stride]);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) acc[0][r][n] = P::add(acc[0][r][n], w[n][i], h);
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        V sum = acc[0][r][n];
#pragma GCC unroll 8
        for (int u = 1; u < U; ++u) sum += acc[u][r][n];
        T* to = out + (r * N + n) * W;
        store(to, first ? sum : load(to) + sum);
      }
  } while (k < k_end);
}

template <class P>
using Tile = void (*)(int64_t, const typename P::Row*, int64_t, int64_t, const typename P::Element*, int64_t,
                      typename P::Acc*);

// tile<P, r, NB, G> for a run-time number of rows, 1 .. max_rows(NB * G).
template <class P, int NB, int G>
FUSEDRNN_HD Tile<P> tile_of(int64_t r) {
  constexpr int most = max_rows(NB * G);
  static constexpr Tile<P> tiles[8] = {
      tile<P, 1, NB, G>,
      tile<P, 2, NB, G>,
      tile<P, 3, NB, G>,
      tile<P, most < 4 ? 1 : 4, NB, G>,
      tile<P, most < 5 ? 1 : 5, NB, G>,
      tile<P, most < 6 ? 1 : 6, NB, G>,
      tile<P, most < 7 ? 1 : 7, NB, G>,
      tile<P, most < 8 ? 1 : 8, NB, G>,
  };
  return tiles[r - 1];
}

// The blocks of units taken at once: as many as fill four accumulators per row.
template <int G>
constexpr int kBlocks = G == 1 ? 4 : 1;

// Few accumulators cannot hide the latency of a multiply-add: those of a lone row have a copy. All tiles of a call have
// as many, whatever their size, as what a thread's share leaves over must not change the order of a sum.
constexpr int kLoneCopies = 2;

// The blocks for one row alone, whose gates take long to follow from each other: those of two blocks overlap, where
// their accumulators leave registers for the weights.
template <int G>
constexpr int kLoneBlocks = G == 1 ? 4 : 2 * G * kLoneCopies < kRegisters ? 2 : 1;

// A tile of r rows and so many blocks; `lone` where the call has one row at a time.
template <class P, int G>
FUSEDRNN_HD Tile<P> tile_for(int64_t r, int64_t blocks, bool lone = false) {
  if constexpr (G == 1) {
    switch (blocks) {
      case 1: return lone ? tile<P, 1, 1, 1, kLoneCopies> : tile_of<P, 1, 1>(r);
      case 2: return lone ? tile<P, 1, 2, 1, kLoneCopies> : tile_of<P, 2, 1>(r);
      case 3: return lone ? tile<P, 1, 3, 1, kLoneCopies> : tile_of<P, 3, 1>(r);
      default: return lone ? tile<P, 1, 4, 1, kLoneCopies> : tile_of<P, 4, 1>(r);
    }
  } else {
    if (!lone) return tile_of<P, 1, G>(r);
    return blocks == 1 ? tile<P, 1, 1, G, kLoneCopies> : tile<P, 1, kLoneBlocks<G>, G, kLoneCopies>;
  }
}

// R batch rows times N rows of a weight as torch stores it: one dot product each.
template <class T, int R, int N>
void dots(int64_t k_end, const T* __restrict__ rows /*[R, k_end], stride*/, int64_t stride,
          const T* __restrict__ weight /*[N, k_end]*/, T* __restrict__ out /*[R, N], out_stride*/,
          int64_t out_stride) {
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::kWidth;
  V acc[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) acc[r][n] = V{};
  int64_t k = 0;
  for (; k + W <= k_end; k += W) {
    V h[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) h[r] = load(rows + r * stride + k);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const V w = load(weight + n * k_end + k);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[r][n] += w * h[r];
    }
  }
  if (k < k_end) {
    const int left = static_cast<int>(k_end - k);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const V w = load_masked(weight + n * k_end + k, left);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[r][n] += w * load_masked(rows + r * stride + k, left);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) out[r * out_stride + n] = sum_lanes<T>(acc[r][n]);
}

// What a tile computes, from a weight as torch stores it: for a single step, packing would read
// the weight more often than the product does.
template <class T, int G>
void unpacked_tile(int64_t rows, int64_t blocks, int64_t k_end, const T* h /*[rows, k_end], stride*/,
                   int64_t stride, const T* weight /*[G*units, k_end]*/, int64_t units, int64_t unit_block,
                   T* out /*[rows, blocks, G, W]*/) {
  constexpr int W = Simd<T>::kWidth;
  for (int64_t j = 0; j < blocks; ++j) {
    const int64_t u = (unit_block + j) * W, n = units - u < W ? units - u : W;
    for (int g = 0; g < G; ++g) {
      const T* w = weight + (g * units + u) * k_end;
      T* to = out + (j * G + g) * W;
      const int64_t out_stride = blocks * G * W;
      for (int64_t r = 0; r < rows; ++r) store(to + r * out_stride, typename Simd<T>::V{});
      for (int64_t l = 0; l < n; l += 4) {
        int64_t r = 0;
        if (n - l >= 4) {
          for (; r + 2 <= rows; r += 2) {
            dots<T, 2, 4>(k_end, h + r * stride, stride, w + l * k_end, to + r * out_stride + l, out_stride);
          }
          for (; r < rows; ++r) {
            dots<T, 1, 4>(k_end, h + r * stride, stride, w + l * k_end, to + r * out_stride + l, out_stride);
          }
        } else {
          for (; r < rows; ++r) {
            for (int64_t i = l; i < n; ++i) {
              dots<T, 1, 1>(k_end, h + r * stride, stride, w + i * k_end, to + r * out_stride + i, out_stride);
            }
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace fusedrnn
