// Scores of queries and keys, for any score: rows are prepared once, then meet in tiles whose sums over D stay
// in registers.
#pragma once

#include <type_traits>

#include "../scores/additive.h"
#include "../scores/dot.h"
#include "attend.h"
#include "bundle.h"
#include "loop.h"

namespace fusedrnn {
namespace {

template <int N>
struct Constant {
  static constexpr int value = N;
  constexpr operator int() const { return N; }
};

// f(Constant<R>, first row) for blocks of R rows, R = Most, then the powers of two below; Most is 1, 2 or 4.
template <int Most, class F>
FUSEDRNN_HD void for_row_blocks(int64_t rows, F f) {
  int64_t i = 0;
  for (; i + Most <= rows; i += Most) f(Constant<Most>{}, i);
  if constexpr (Most > 2) {
    if (i + 2 <= rows) f(Constant<2>{}, i), i += 2;
  }
  if constexpr (Most > 1) {
    if (i < rows) f(Constant<1>{}, i);
  }
}

// f(j, lanes) for vectors of [0, n), the last one in part; `lanes` is a constant of the others.
template <class T, class F>
FUSEDRNN_HD void for_vectors(int64_t n, F f) {
  constexpr int W = Simd<T>::kWidth;
  int64_t j = 0;
  for (; j + W <= n; j += W) f(j, Constant<W>{});
  if (j < n) f(j, static_cast<int>(n - j));
}

// Rows of one head.
template <class X>
struct HeadRows {
  X* data;
  int64_t stride;
  X* row(int64_t t) const { return data + t * stride; }
};

template <class X>
FUSEDRNN_HD HeadRows<X> of_head(const Rows<X>& rows, int64_t heads, int64_t head) {
  return {rows.data + head / heads * rows.batch_stride + head % heads * rows.head_stride, rows.stride};
}

template <class S>
FUSEDRNN_HD int64_t keys_of(const Attend<S>& a, int64_t head) {
  if (a.lengths == nullptr) return a.keys;
  const int64_t length = a.lengths[head / a.heads];
  return length < 0 ? 0 : length < a.keys ? length : a.keys;
}

// Values of a prepared row, blocks of W columns with their parts.
template <class Score, class T>
constexpr int64_t prepared_size(int64_t width) {
  return ceil_div(width, Simd<T>::kWidth) * Score::kParts * Simd<T>::kWidth;
}

template <class Score, class S>
FUSEDRNN_HD void prepare(HeadRows<const S> rows, Slice which, Slice columns, Acc<S>* to /*[rows, blocks, parts, W]*/) {
  using V = typename Simd<Acc<S>>::V;
  constexpr int W = Simd<Acc<S>>::kWidth, P = Score::kParts;
  for (int64_t t = which.begin; t < which.end; ++t) {
    for (int64_t c = columns.begin; c < columns.end; c += W) {
      V parts[P];
      Score::prepare(load(rows.row(t) + c, static_cast<int>(smaller(W, columns.end - c))), parts);
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p, to += W) store(to, parts[p]);
    }
  }
}

using Kept = Additive<PerElement>;

// Whether no element is larger than `most` or NaN.
template <class S>
FUSEDRNN_HD bool all_within(HeadRows<const S> rows, Slice which, Slice columns, double most) {
  using T = Acc<S>;
  using Bits = typename Simd<T>::Bits;
  constexpr int W = Simd<T>::kWidth;
  const Bits limit = (Bits)splat<T>(static_cast<T>(most)), sign = (Bits)splat<T>(-T{0});
  Bits largest{};
  for (int64_t t = which.begin; t < which.end; ++t) {
    for (int64_t c = columns.begin; c < columns.end; c += W) {
      // As integers: NaN is beyond infinity.
      const Bits x = (Bits)load(rows.row(t) + c, static_cast<int>(smaller(W, columns.end - c))) & ~sign;
      largest = x > largest ? x : largest;
    }
  }
  for (int i = 0; i < W; ++i) {
    if (largest[i] > limit[i]) return false;
  }
  return true;
}

// f(score) for the score of a. An exponential per element, where these columns of all queries and keys allow it, is
// worth it where elements are in more than one pair: `shared`. Keys that are kept do allow it.
template <class S, class F>
FUSEDRNN_HD void with_score(const Attend<S>& a, HeadRows<const S> q, Slice queries, HeadRows<const S> k, Slice keys,
                            Slice columns, bool shared, bool kept, F f) {
  if (a.score == kDot) return f(Dot{});
  const bool per_element = kFused && shared && all_within(q, queries, columns, PerElement::kMost) &&
                           (kept || all_within(k, keys, columns, PerElement::kMost));
  return per_element ? f(Additive<PerElement>{}) : f(Additive<PerPair>{});
}

// Rows of queries that meet a tile of keys at once, and the keys.
constexpr int kScoreRows = kRegisters == 32 ? 4 : 2;
template <class T>
constexpr int kScoreKeys = Simd<T>::kWidth < 4 ? Simd<T>::kWidth : 4;

// The sums of all lanes, `count` of each row.
template <class T, int R>
FUSEDRNN_HD void store_sums(const typename Simd<T>::V* sum /*[R, C]*/, int count, T* out /*[R, keys]*/,
                             int64_t stride) {
  constexpr int C = kScoreKeys<T>;
  if constexpr (R * C == Simd<T>::kWidth && R > 1) {
    const auto all = sum_lanes_of<T, R * C>(sum);
    T values[R * C];
    store(values, all);
    for (int r = 0; r < R; ++r) {
      if (count == C) {
        __builtin_memcpy(out + r * stride, values + r * C, sizeof(T) * C);
      } else {
        for (int c = 0; c < count; ++c) out[r * stride + c] = values[r * C + c];
      }
    }
  } else {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) store(out + r * stride, sum_lanes_of<T, C>(sum + r * C), count);
  }
}

template <class Score, class T, int R>
FUSEDRNN_HD void score_tile(int64_t blocks, const T* q /*[R, blocks, parts, W]*/, int64_t keys,
                            const T* k /*[keys, blocks, parts, W]*/, const T* v /*[blocks, W]*/,
                            T* out /*[R, keys]*/, int64_t out_stride) {
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::kWidth, P = Score::kParts, C = kScoreKeys<T>;
  const int64_t row = blocks * P * W;
  for (int64_t j = 0; j < keys; j += C) {
    const int count = static_cast<int>(smaller(C, keys - j));
    const T* key[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) key[c] = k + (j + (c < count ? c : 0)) * row;
    Bundle<V, C> sum[R] = {};
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t at = block * P * W;
      const V weight = Score::kWeighted ? load(v + block * W) : V{};
      Bundle<V, C> parts[P];
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) parts[p][c] = load(key[c] + at + p * W);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        V mine[P];
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) mine[p] = load(q + r * row + at + p * W);
        sum[r] = Score::add(mine, parts, weight, sum[r]);
      }
    }
    store_sums<T, R>(sum[0].of, count, out + j, out_stride);
  }
}

// `kept` are all keys prepared, or null.
template <class Score, class S>
void scores_as(HeadRows<const S> q, Slice queries, HeadRows<const S> k, Slice keys, const Acc<S>* kept, int64_t width,
               const S* v /*[D]*/, Acc<S>* out /*[queries, Tk]*/, int64_t out_stride,
               Acc<S>* scratch /*score_scratch(D)*/) {
  using T = Acc<S>;
  constexpr int W = Simd<T>::kWidth;
  const int64_t blocks = ceil_div(width, W), row = prepared_size<Score, T>(width), tile = key_tile(width, sizeof(T));
  T *prepared_q = scratch, *prepared_k = prepared_q + queries.size() * row, *prepared_v = prepared_k + tile * row;
  const Slice all{0, width};
  prepare<Score>(q, queries, all, prepared_q);
  if constexpr (Score::kWeighted) prepare<Dot>(HeadRows<const S>{v, 0}, Slice{0, 1}, all, prepared_v);
  for (int64_t j = keys.begin; j < keys.end; j += tile) {
    const int64_t count = smaller(tile, keys.end - j);
    const T* const these = kept ? kept + j * row : prepared_k;
    if (!kept) prepare<Score>(k, Slice{j, j + count}, all, prepared_k);
    const auto rows = [&](auto r, int64_t i) {
      score_tile<Score, T, r.value>(blocks, prepared_q + i * row, count, these, prepared_v,
                                    out + i * out_stride + j, out_stride);
    };
    for_row_blocks<kScoreRows>(queries.size(), rows);
  }
}

template <class S>
void scores(const AttendForward<S>& a, int64_t head, Slice queries, Slice keys, Acc<S>* out, Acc<S>* scratch) {
  const auto q = of_head(a.query, a.heads, head), k = of_head(a.key, a.heads, head);
  keys.end = smaller(keys.end, keys_of(a, head));
  const bool shared = queries.size() > 1 || a.steps;
  with_score(a, q, queries, k, keys, Slice{0, a.width}, shared, a.kept != nullptr, [&](auto score) {
    using Score = decltype(score);
    const Acc<S>* kept = nullptr;
    if constexpr (std::is_same_v<Score, Kept>) {
      if (a.kept) kept = a.kept + head * a.keys * prepared_size<Kept, Acc<S>>(a.width);
    }
    scores_as<Score>(q, queries, k, keys, kept, a.width, a.v, out, score_stride(a.keys), scratch);
  });
}

inline bool keep(const float* keys, int64_t count, int64_t width, float* kept) {
  const HeadRows<const float> rows{keys, width};
  const Slice all{0, count}, columns{0, width};
  if (!kFused || !all_within(rows, all, columns, PerElement::kMost)) return false;
  prepare<Kept>(rows, all, columns, kept);
  return true;
}

template <int R>
FUSEDRNN_HD void project_rows(const Projection& p, const float* x /*[R, I]*/, Slice outputs, float* out /*[R, O]*/) {
  constexpr int C = kScoreKeys<float>;
  for (int64_t o = outputs.begin; o < outputs.end; o += C) {
    const int count = static_cast<int>(smaller(C, outputs.end - o));
    const float* row[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) row[c] = p.weight + (o + (c < count ? c : 0)) * p.weight_stride;
    VecF sum[R * C] = {};
    for_vectors<float>(p.inputs, [&](int64_t i, auto n) __attribute__((always_inline)) {
      VecF w[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) w[c] = load(row[c] + i, n);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const VecF mine = load(x + r * p.x_stride + i, n);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) sum[r * C + c] += mine * w[c];
      }
    });
    store_sums<float, R>(sum, count, out + o, p.outputs);
  }
  if (p.bias == nullptr) return;
  for (int r = 0; r < R; ++r) {
    for_vectors<float>(outputs.size(), [&](int64_t i, auto n) {
      float* const to = out + r * p.outputs + outputs.begin + i;
      store(to, load(to, n) + load(p.bias + outputs.begin + i, n), n);
    });
  }
}

// All rows meet a part of the weights while it is in the cache.
inline void project(const Projection& p, Slice outputs) {
  constexpr int64_t kPart = 1 << 17;  // bytes
  const int64_t fit = kPart / (p.inputs * static_cast<int64_t>(sizeof(float))) / kScoreKeys<float> * kScoreKeys<float>;
  const int64_t each = fit > 0 ? fit : kScoreKeys<float>;
  for (int64_t o = outputs.begin; o < outputs.end; o += each) {
    const Slice part{o, smaller(o + each, outputs.end)};
    for_row_blocks<kScoreRows>(p.rows, [&](auto r, int64_t i) {
      project_rows<r.value>(p, p.x + i * p.x_stride, part, p.out + i * p.outputs);
    });
  }
}

}  // namespace
}  // namespace fusedrnn
