// Attention on the CPU: what the ISA-specific files offer, and what they are given.
//
// N heads; the pairs of Tq queries and Tk keys of D values have scores, a query's weights are the softmax of
// its scores over the keys, and its context [Dv] is the weighted sum of the values. Nothing of the size
// Tq x Tk x D exists. Keys at and beyond a sequence's length are not looked at.
//
// Work comes as items that share no output: some queries of a head, or some columns of its D or Dv. What an
// item makes does not depend on how the work was divided.
#pragma once

#include <stdint.h>

#include "scan.h"

namespace fusedrnn {

enum ScoreCode { kAdditive, kDot };
enum MaskKind { kNoMask, kBoolMask, kAddedMask };

struct Slice {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// [B, N, T, columns] with contiguous columns; X may be const.
template <class X>
struct Rows {
  X* data;  // null if there is none
  int64_t batch_stride, head_stride, stride;
};

template <class S>
struct Attend {
  int score;                                           // ScoreCode
  int64_t batch, heads, queries, keys, width, values;  // B, N, Tq, Tk, D, Dv
  Rows<const S> query;     // [B, N, Tq, D]
  Rows<const S> key;       // [B, N, Tk, D]
  Rows<const S> value;     // [B, N, Tk, Dv]
  const S* v;              // [D], null unless the score has one
  const int64_t* lengths;  // [B] or null
  double scale;            // of scores
  double dropout;          // p in [0, 1)
  uint64_t seed;
};

template <class S>
struct AttendForward : Attend<S> {
  using T = Acc<S>;
  int mask_kind;                  // MaskKind
  Rows<const uint8_t> bool_mask;  // [B, N, Tq, Tk], not 0 where a query attends; strides of 0 where it is one
  Rows<const S> added_mask;       // likewise
  S* context;                     // [B, N, Tq, Dv]
  S* weights;                     // [B, N, Tq, Tk] after dropout, or null
  T* probabilities;               // [B, N, Tq, Tk] before dropout, or null
  bool steps;                     // the keys will meet more queries, in other calls that are to give the same digits
  const T* kept;                  // [B, N, Tk, ceil(D/W), parts, W] what AttendStep::keep made of the keys, or null
};

// Gradients that are null are not wanted.
template <class S>
struct AttendBackward : Attend<S> {
  using T = Acc<S>;
  const T* probabilities;   // [B, N, Tq, Tk] as the forward left them
  Rows<const S> d_context;  // [B, N, Tq, Dv] or null
  Rows<const S> d_weights;  // [B, N, Tq, Tk] or null
  T* d_scores;              // [B, N, Tq, Tk] zero beyond a length
  T* weights;               // [B, N, Tq, Tk] after dropout; null without dropout
  S* d_query;               // [B, N, Tq, D]
  S* d_key;                 // [B, N, Tk, D]
  S* d_value;               // [B, N, Tk, Dv]
  S* d_v;                   // [D]
  T* d_v_of_heads;          // [B, N, D], null if d_v is
};

// `head` is b * N + n. Scratch is aligned to 64 bytes.
template <class S>
struct AttendFunctions {
  using T = Acc<S>;
  // Before masks; of all keys, the columns `keys` are written.
  void (*scores)(const AttendForward<S>&, int64_t head, Slice queries, Slice keys,
                 T* scores /*[queries, score_stride(Tk)]*/, T* scratch /*score_scratch(D)*/);
  // Softmax and the columns of the context; writes weights and probabilities if `columns` begins at 0.
  // `from` and `to` may be the same.
  void (*context)(const AttendForward<S>&, int64_t head, Slice queries, Slice columns,
                  const T* from /*[queries, score_stride(Tk)] scores*/, T* to /*likewise, weights*/);
  // d_scores, and the weights after dropout.
  void (*score_gradients)(const AttendBackward<S>&, int64_t head, Slice queries,
                          T* scratch /*score_scratch(Dv)*/);
  // A vector of columns of d_query, d_key and d_v_of_heads, from `column` on.
  void (*column_gradients)(const AttendBackward<S>&, int64_t head, int64_t column,
                           T* scratch /*column_scratch()*/);
  // Columns of d_value.
  void (*value_gradients)(const AttendBackward<S>&, int64_t head, Slice columns);
  // d_v from d_v_of_heads.
  void (*sum_heads)(const AttendBackward<S>&);
  int width;  // values of a vector
};

// out = x @ weight.T + bias, for a few rows.
struct Projection {
  int64_t rows, inputs, outputs;  // R, I, O
  const float* x;                 // [R, I]
  int64_t x_stride;
  const float* weight;            // [O, I]
  int64_t weight_stride;
  const float* bias;              // [O] or null
  float* out;                     // [R, O]
};

// What one step of a decoder has besides.
struct AttendStep {
  // Prepares keys that many steps will meet; false where steps must take them as they are.
  bool (*keep)(const float* keys /*[count, D]*/, int64_t count, int64_t width, float* kept /*kept_size(count, D)*/);
  // Some columns of out.
  void (*project)(const Projection&, Slice outputs);
};

struct AttendKernels {
  AttendFunctions<float> f32;
  AttendFunctions<double> f64;
  AttendFunctions<Bf16> bf16;
  AttendFunctions<Half> f16;
  AttendStep step;
};

// Vectors of every level fit into rows of whole multiples of this.
constexpr int64_t kPad = 16;
constexpr int64_t padded(int64_t n) { return ceil_div(n, kPad) * kPad; }

constexpr int64_t score_stride(int64_t keys) { return padded(keys); }
// What a score prepares of an element, at most.
constexpr int64_t kMostParts = 2;
constexpr int64_t kept_size(int64_t keys, int64_t width) { return keys * kMostParts * padded(width); }
// The keys that are prepared at once stay in the first-level cache while all queries of an item meet them.
constexpr int64_t key_tile(int64_t width, int64_t element_bytes) {
  const int64_t fit = (int64_t{16} << 10) / (kMostParts * padded(width) * element_bytes + 1) / 4 * 4;
  return fit > 4 ? fit : 4;
}
// The prepared queries, a tile of prepared keys, and v.
constexpr int64_t score_scratch(int64_t queries, int64_t width, int64_t element_bytes) {
  return ((queries + key_tile(width, element_bytes)) * kMostParts + 1) * padded(width);
}
// A vector of each prepared query and key, and of its gradient.
constexpr int64_t column_scratch(int64_t queries, int64_t keys) { return (queries + keys) * (kMostParts + 1) * kPad; }
// The queries of an item: as many as leave their scores and prepared rows in the second-level cache.
constexpr int64_t query_tile(int64_t keys, int64_t width, int64_t element_bytes) {
  const int64_t per_query = (score_stride(keys) + kMostParts * padded(width)) * element_bytes;
  const int64_t fit = (int64_t{256} << 10) / (per_query + 1) / 4 * 4;
  return fit > 16 ? fit : 16;
}

extern const AttendKernels kPortableAttend, kAvx2Attend, kAvx512Attend;

}  // namespace fusedrnn
