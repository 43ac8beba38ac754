// The backward of attention. First the gradient of every score; then the columns of D and of Dv apart, so that
// sums over queries and sums over keys are made at once and no thread adds to what another makes.
#pragma once

#include "attend_context.h"

namespace fusedrnn {
namespace {

template <class S>
void score_gradients(const AttendBackward<S>& a, int64_t head, Slice queries, Acc<S>* scratch) {
  using T = Acc<S>;
  using V = typename Simd<T>::V;
  const int64_t keys = keys_of(a, head), first = head * a.queries;
  T* d_scores = a.d_scores + (first + queries.begin) * a.keys;
  if (a.d_context.data) {  // of the weights first: the scores of d_context and values
    scores_as<Dot>(of_head(a.d_context, a.heads, head), queries, of_head(a.value, a.heads, head), Slice{0, keys},
                   nullptr, a.values, static_cast<const S*>(nullptr), d_scores, a.keys, scratch);
  }
  for (int64_t i = queries.begin; i < queries.end; ++i, d_scores += a.keys) {
    const T* p = a.probabilities + (first + i) * a.keys;
    if (!a.d_context.data) clear(d_scores, 0, keys);
    if (a.d_weights.data) {
      const S* more = of_head(a.d_weights, a.heads, head).row(i);
      for_vectors<T>(keys, [&](int64_t j, auto n) {
        store(d_scores + j, load(d_scores + j, n) + load(more + j, n), n);
      });
    }
    if (a.dropout > 0) {
      const Dropout dropout = Dropout::of(a);
      dropout.apply((first + i) * a.keys, keys, p, a.weights + (first + i) * a.keys);
      dropout.apply((first + i) * a.keys, keys, d_scores, d_scores);
    }
    V sums{};
    for_vectors<T>(keys, [&](int64_t j, auto n) { sums += load(p + j, n) * load(d_scores + j, n); });
    const V mean = splat(sum_lanes<T>(sums));
    for_vectors<T>(keys, [&](int64_t j, auto n) {
      store(d_scores + j, load(p + j, n) * (load(d_scores + j, n) - mean), n);
    });
    clear(d_scores, keys, a.keys);
  }
}

// Keys that R queries meet before their sums are added to memory; with the rows, the length of a sum for v.
constexpr int64_t kGradientKeys = 32;

template <class Score, class T, int R>
FUSEDRNN_HD void gradient_tile(const T* q /*[R, parts, W]*/, int64_t keys, const T* k /*[keys, parts, W]*/,
                               const T* g /*[R, keys]*/, int64_t g_stride, T* dq /*[R, W]*/, T* dk /*[keys, W]*/,
                               T* dv /*[W]*/) {
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::kWidth, P = Score::kParts;
  Bundle<V, R> mine[P], d_mine{}, d_v{};
#pragma GCC unroll 2
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) mine[p][r] = load(q + (r * P + p) * W);
  for (int64_t j = 0; j < keys; ++j) {
    V parts[P], d_key = load(dk + j * W);
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) parts[p] = load(k + (j * P + p) * W);
    Bundle<V, R> gradients;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) gradients[r] = splat(g[r * g_stride + j]);
    Score::gradients(mine, parts, gradients, d_mine, d_key, d_v);
    store(dk + j * W, d_key);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) store(dq + r * W, load(dq + r * W) + d_mine[r]);
  V total = load(dv);
  total += d_v;
  store(dv, total);
}

// rows [n, D] from `from` [n, W] times `factor`
template <class S>
FUSEDRNN_HD void store_columns(int64_t n, const Acc<S>* from, typename Simd<Acc<S>>::V factor, int lanes, S* to,
                               int64_t stride) {
  constexpr int W = Simd<Acc<S>>::kWidth;
  for (int64_t t = 0; t < n; ++t) store(to + t * stride, load(from + t * W) * factor, lanes);
}

template <class S>
void column_gradients(const AttendBackward<S>& a, int64_t head, int64_t column, Acc<S>* scratch) {
  using T = Acc<S>;
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::kWidth;
  const auto q = of_head(a.query, a.heads, head), k = of_head(a.key, a.heads, head);
  const Slice queries{0, a.queries}, keys{0, keys_of(a, head)};
  const int lanes = static_cast<int>(smaller(W, a.width - column));
  const Slice columns{column, column + lanes};
  T *prepared_q = scratch, *prepared_k = prepared_q + a.queries * kMostParts * W;
  T *dq = prepared_k + keys.end * kMostParts * W, *dk = dq + a.queries * W;  // [Tq, W], [Tk, W] zero beyond a length
  clear(dq, 0, (a.queries + a.keys) * W);
  T dv[W] = {};
  const T* g = a.d_scores + head * a.queries * a.keys;
  with_score(a, q, queries, k, keys, columns, queries.size() > 1, false, [&](auto score) {
    using Score = decltype(score);
    prepare<Score>(q, queries, columns, prepared_q);
    prepare<Score>(k, keys, columns, prepared_k);
    for (int64_t j = 0; j < keys.end; j += kGradientKeys) {
      const int64_t count = smaller(kGradientKeys, keys.end - j);
      for_row_blocks<kScoreRows>(a.queries, [&](auto r, int64_t i) {
        gradient_tile<Score, T, r.value>(prepared_q + i * Score::kParts * W, count, prepared_k + j * Score::kParts * W,
                                         g + i * a.keys + j, a.keys, dq + i * W, dk + j * W, dv);
      });
    }
  });
  const V scale = splat(static_cast<T>(a.scale)), factor = a.v ? load(a.v + column, lanes) * scale : scale;
  if (a.d_query) store_columns(a.queries, dq, factor, lanes, a.d_query + head * a.queries * a.width + column, a.width);
  if (a.d_key) store_columns(a.keys, dk, factor, lanes, a.d_key + head * a.keys * a.width + column, a.width);
  if (a.d_v) store(a.d_v_of_heads + head * a.width + column, load(dv) * scale, lanes);
}

template <class S>
void value_gradients(const AttendBackward<S>& a, int64_t head, Slice columns) {
  const int64_t keys = keys_of(a, head), pairs = head * a.queries * a.keys;
  const Acc<S>* weights = (a.dropout > 0 ? a.weights : a.probabilities) + pairs;
  S* out = a.d_value + head * a.keys * a.values;
  weighted_sums<S>(keys, a.queries, weights, 1, a.keys, of_head(a.d_context, a.heads, head), columns, out, a.values);
  for (int64_t j = keys; j < a.keys; ++j) {
    clear(out + j * a.values, columns.begin, columns.end);
  }
}

template <class S>
void sum_heads(const AttendBackward<S>& a) {
  using T = Acc<S>;
  for_vectors<T>(a.width, [&](int64_t column, auto n) {
    typename Simd<T>::V sum{};
    for (int64_t head = 0; head < a.batch * a.heads; ++head) sum += load(a.d_v_of_heads + head * a.width + column, n);
    store(a.d_v + column, sum, n);
  });
}

template <class S>
constexpr AttendFunctions<S> attend_functions() {
  return {scores<S>,          context<S>,   score_gradients<S>,  column_gradients<S>,
          value_gradients<S>, sum_heads<S>, Simd<Acc<S>>::kWidth};
}

constexpr AttendKernels attend_kernels() {
  return {attend_functions<float>(), attend_functions<double>(), attend_functions<Bf16>(), attend_functions<Half>(),
          {keep, project}};
}

}  // namespace
}  // namespace fusedrnn
