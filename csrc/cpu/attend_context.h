// From scores to context: mask, softmax, dropout, and the weighted sum of the values.
#pragma once

#include "attend_scores.h"

namespace fusedrnn {
namespace {

// Which weights dropout keeps: a hash of the pair's number and the seed, the same in every backend.
// Its rounds: https://nullprogram.com/blog/2018/07/31/ ("lowbias32").
struct Dropout {
  uint64_t seed;
  uint32_t threshold;  // of 2^24
  double factor;       // of what is kept

  template <class S>
  static Dropout of(const Attend<S>& a) {
    const double scaled = a.dropout * 0x1p24;
    const auto below = static_cast<uint32_t>(scaled);
    return {a.seed, below < scaled ? below + 1 : below, 1 / (1 - a.dropout)};
  }
  static FUSEDRNN_HD uint32_t mix(uint32_t x) {
    x ^= x >> 16;
    x *= 0x7feb352d;
    x ^= x >> 15;
    x *= 0x846ca68b;
    return x ^ x >> 16;
  }
  FUSEDRNN_HD bool keeps(uint64_t pair) const {
    const auto low = static_cast<uint32_t>(pair), high = static_cast<uint32_t>(pair >> 32);
    const uint32_t inner = mix(low ^ static_cast<uint32_t>(seed));
    return mix(inner + high * 0x9E3779B9u + static_cast<uint32_t>(seed >> 32)) >> 8 >= threshold;
  }
  // to[j] = from[j] * factor where kept, else 0; `first` is the number of the row's first pair.
  template <class T>
  FUSEDRNN_HD void apply(uint64_t first, int64_t keys, const T* from, T* to) const {
    const T kept = static_cast<T>(factor);
    for (int64_t j = 0; j < keys; ++j) to[j] = keeps(first + j) ? from[j] * kept : T{0};
  }
};

template <class T>
FUSEDRNN_HD typename Simd<T>::V fill_lanes(typename Simd<T>::V v, int n, T rest) {
  for (int i = n; i < Simd<T>::kWidth; ++i) v[i] = rest;
  return v;
}

// The part of a row beyond a length.
template <class X>
FUSEDRNN_HD void clear(X* row, int64_t from, int64_t to) {
  __builtin_memset(static_cast<void*>(row + from), 0, sizeof(X) * (to - from));
}

// Scaled and masked, from scores as the tiles made them.
template <class S>
FUSEDRNN_HD void finish_scores(const AttendForward<S>& a, int64_t head, int64_t query, int64_t keys,
                               const Acc<S>* from, Acc<S>* to) {
  using T = Acc<S>;
  const T scale = static_cast<T>(a.scale), none = -__builtin_inf();
  for_vectors<T>(keys, [&](int64_t j, auto n) { store(to + j, load(from + j, n) * scale, n); });
  if (a.mask_kind == kBoolMask) {
    const uint8_t* mask = of_head(a.bool_mask, a.heads, head).row(query);
    for (int64_t j = 0; j < keys; ++j) to[j] = mask[j] ? to[j] : none;
  } else if (a.mask_kind == kAddedMask) {
    const S* mask = of_head(a.added_mask, a.heads, head).row(query);
    for_vectors<T>(keys, [&](int64_t j, auto n) { store(to + j, load(to + j, n) + load(mask + j, n), n); });
  }
}

// In place. A row without a key to attend to becomes zero.
template <class T>
FUSEDRNN_HD void softmax(int64_t keys, T* row) {
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::kWidth;
  const T none = -__builtin_inf();
  V most = splat(none);
  for_vectors<T>(keys, [&](int64_t j, auto n) { most = at_least(most, fill_lanes(load(row + j, n), n, none)); });
  T largest = none;
  for (int i = 0; i < W; ++i) largest = most[i] > largest ? most[i] : largest;
  const T shift = largest == none ? T{0} : largest;
  V sums{};
  for_vectors<T>(keys, [&](int64_t j, auto n) {
    const V p = Math<V>::exp(load(row + j, n) - shift);
    store(row + j, p, n);
    sums += keep_lanes<T>(p, n);
  });
  const T sum = sum_lanes<T>(sums), factor = sum == 0 ? T{0} : 1 / sum;
  for_vectors<T>(keys, [&](int64_t j, auto n) { store(row + j, load(row + j, n) * factor, n); });
}

// Columns of a weighted sum that are taken at once.
constexpr int kGroup = kRegisters == 32 ? 4 : 2;

// R rows of weights times G vectors of columns of x.
template <class S, int R, int G>
FUSEDRNN_HD void weighted_sum(int64_t count, const Acc<S>* weights /*[R, count]*/, int64_t stride, int64_t step,
                              const S* x /*[count, G * W]*/, int64_t x_stride, int lanes, S* out /*[R, G * W]*/,
                              int64_t out_stride) {
  using T = Acc<S>;
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::kWidth;
  const int n = G > 1 ? W : lanes;
  V total[R][G] = {};
  for (int64_t k = 0; k < count;) {
    V sum[R][G] = {};
    for (const int64_t stop = smaller(k + kLongestSum, count); k < stop; ++k) {
      V values[G];
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) values[g] = load(x + k * x_stride + g * W, n);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const V weight = splat(weights[r * stride + k * step]);
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) sum[r][g] += weight * values[g];
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) total[r][g] += sum[r][g];
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) store(out + r * out_stride + g * W, total[r][g], n);
}

// out [rows, columns] = weights [rows, count] @ x [count, columns]
template <class S>
void weighted_sums(int64_t rows, int64_t count, const Acc<S>* weights, int64_t stride, int64_t step,
                   HeadRows<const S> x, Slice columns, S* out, int64_t out_stride) {
  constexpr int W = Simd<Acc<S>>::kWidth;
  for (int64_t c = columns.begin; c < columns.end;) {
    const auto group = [&](auto groups, int lanes) {
      for_row_blocks<4>(rows, [&](auto r, int64_t i) {
        weighted_sum<S, r.value, groups.value>(count, weights + i * stride, stride, step, x.data + c, x.stride, lanes,
                                               out + i * out_stride + c, out_stride);
      });
      c += groups.value * W;
    };
    if (c + kGroup * W <= columns.end) {
      group(Constant<kGroup>{}, W);
    } else {
      group(Constant<1>{}, static_cast<int>(smaller(W, columns.end - c)));
    }
  }
}

template <class S>
void context(const AttendForward<S>& a, int64_t head, Slice queries, Slice columns, const Acc<S>* from, Acc<S>* to) {
  using T = Acc<S>;
  const int64_t keys = keys_of(a, head), stride = score_stride(a.keys);
  const bool first = columns.begin == 0;
  for (int64_t i = queries.begin; i < queries.end; ++i) {
    const int64_t query = head * a.queries + i;
    T* row = to + (i - queries.begin) * stride;
    finish_scores(a, head, i, keys, from + (i - queries.begin) * stride, row);
    softmax(keys, row);
    if (first && a.probabilities) {
      T* saved = a.probabilities + query * a.keys;
      for_vectors<T>(keys, [&](int64_t j, auto n) { store(saved + j, load(row + j, n), n); });
      clear(saved, keys, a.keys);
    }
    if (a.dropout > 0) Dropout::of(a).apply(query * a.keys, keys, row, row);
    if (first && a.weights) {
      S* weights = a.weights + query * a.keys;
      for_vectors<T>(keys, [&](int64_t j, auto n) { store(weights + j, load(row + j, n), n); });
      clear(weights, keys, a.keys);
    }
  }
  S* out = a.context + (head * a.queries + queries.begin) * a.values;
  weighted_sums<S>(queries.size(), keys, to, stride, 1, of_head(a.value, a.heads, head), columns, out, a.values);
}

}  // namespace
}  // namespace fusedrnn
