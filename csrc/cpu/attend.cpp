#include "attend.h"

#include <algorithm>
#include <type_traits>

#include "attend_run.h"
#include "buffer.h"
#include "sharing.h"
#include "team.h"

namespace fusedrnn {
namespace {

template <class S>
const AttendFunctions<S>& functions_of(const AttendKernels& k) {
  if constexpr (std::is_same_v<S, float>) return k.f32;
  if constexpr (std::is_same_v<S, double>) return k.f64;
  if constexpr (std::is_same_v<S, Bf16>) return k.bf16;
  if constexpr (std::is_same_v<S, Half>) return k.f16;
}

// What takes as long as some multiply-adds of a large product (sharing.h): one of few rows, and a tanh, less for keys
// that are kept.
constexpr double kMultiplyAdd = 2, kTanh = 16, kTanhOfKept = 6;

template <class S>
int threads_for(const Attend<S>& a, int threads, double tanh = kTanh) {
  const double pairs = double(a.batch) * double(a.heads) * double(a.queries) * double(a.keys);
  const double each = double(a.width) * (a.score == kAdditive ? tanh : kMultiplyAdd) + kMultiplyAdd * double(a.values);
  return worth_a_region(pairs * each, threads);
}

// The queries of all heads in tiles, of about a thread's share at most.
struct Tiles {
  int64_t most, per_head, count, queries;

  template <class S>
  Tiles(const Attend<S>& a, int64_t width, int threads) : queries(a.queries) {
    const int64_t heads = a.batch * a.heads, a_share = ceil_div(ceil_div(heads * queries, threads), 4) * 4;
    most = std::min(query_tile(a.keys, width, sizeof(Acc<S>)), std::max<int64_t>(a_share, 4));
    per_head = ceil_div(queries, most);
    most = per_head > 1 ? most : queries;
    count = heads * per_head;
  }
  int64_t head(int64_t tile) const { return tile / per_head; }
  Slice slice(int64_t tile) const {
    const int64_t begin = tile % per_head * most;
    return {begin, std::min(begin + most, queries)};
  }
};

// The i-th of `parts` shares of [0, n), whole multiples of `unit`; if any is empty, the last ones are.
Slice part_of(int64_t n, int64_t unit, int64_t i, int64_t parts) {
  const int64_t units = ceil_div(n, unit);
  return {std::min(ceil_div(units * i, parts) * unit, n), std::min(ceil_div(units * (i + 1), parts) * unit, n)};
}

// Scratch of `elements` for each of some threads, on cache lines of their own.
template <class T>
class Scratch {
 public:
  Scratch(int64_t elements, int64_t count) : each_(padded(elements)) {
    const int64_t bytes = each_ * count * static_cast<int64_t>(sizeof(T));
    if (bytes > static_cast<int64_t>(sizeof near_)) far_ = allocate(bytes);
  }
  T* of(int64_t i) { return reinterpret_cast<T*>(far_ ? far_.get() : near_) + i * each_; }

 private:
  int64_t each_;
  alignas(64) char near_[16 << 10];  // malloc would tidy up for a block of a step's size
  Buffer far_;
};

}  // namespace

template <class S>
void run_attend(const Kernels& k, const AttendForward<S>& a, int threads) {
  using T = Acc<S>;
  const AttendFunctions<S>& f = functions_of<S>(k.attend);
  threads = threads_for(a, threads, a.kept ? kTanhOfKept : kTanh);
  const Tiles tiles(a, a.width, threads);
  const int64_t row = score_stride(a.keys), of_scores = score_scratch(tiles.most, a.width, sizeof(T));
  if (tiles.count >= threads || tiles.count == 0) {
    Scratch<T> scratch(tiles.most * row + of_scores, threads);
    const auto run = [&](int64_t i, T* scores) {
      f.scores(a, tiles.head(i), tiles.slice(i), {0, a.keys}, scores, scores + tiles.most * row);
      f.context(a, tiles.head(i), tiles.slice(i), {0, a.values}, scores, scores);
    };
    return in_team(threads, [&](int me, int) {
      T* const mine = scratch.of(me);
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t i = 0; i < tiles.count; ++i) run(i, mine);
    });
  }
  // Too few queries for all threads: the keys are shared out, then the columns of the context, for which each
  // makes the softmax again.
  const int64_t parts = ceil_div(threads, tiles.count), items = tiles.count * parts;
  Scratch<T> scores(tiles.most * row, tiles.count), scratch(std::max(tiles.most * row, of_scores), threads);
  in_team(threads, [&](int me, int) {
    T* const mine = scratch.of(me);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < items; ++i) {
      const int64_t tile = i / parts;
      f.scores(a, tiles.head(tile), tiles.slice(tile), part_of(a.keys, 4, i % parts, parts), scores.of(tile), mine);
    }
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < items; ++i) {
      const int64_t tile = i / parts;
      const Slice columns = part_of(a.values, kPad, i % parts, parts);
      if (i % parts > 0 && columns.size() == 0) continue;
      f.context(a, tiles.head(tile), tiles.slice(tile), columns, scores.of(tile), mine);
    }
  });
}

void run_projection(const Kernels& k, const Projection& p, int threads) {
  const double work = kMultiplyAdd * double(p.rows) * double(p.inputs) * double(p.outputs);
  in_team(worth_a_region(work, threads),
          [&](int me, int team) { k.attend.step.project(p, part_of(p.outputs, kPad, me, team)); });
}

template <class S>
void run_attend(const Kernels& k, AttendBackward<S> a, int threads) {
  using T = Acc<S>;
  const AttendFunctions<S>& f = functions_of<S>(k.attend);
  threads = threads_for(a, threads);
  const Tiles tiles(a, a.values, threads);
  const int64_t heads = a.batch * a.heads, blocks = ceil_div(a.width, f.width);
  const int64_t groups = ceil_div(a.values, 4 * f.width);
  const bool columns = a.d_query || a.d_key || a.d_v;
  // Cache lines of the same rows side by side belong to one thread.
  const int64_t neighbours = std::clamp<int64_t>(heads * blocks / (threads * 8), 1, 4);
  Scratch<T> scratch(std::max(score_scratch(tiles.most, a.values, sizeof(T)), column_scratch(a.queries, a.keys)),
                           threads);
  Scratch<T> of_heads(a.width, a.d_v ? heads : 0);
  a.d_v_of_heads = of_heads.of(0);
  in_team(threads, [&](int me, int) {
    T* const mine = scratch.of(me);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < tiles.count; ++i) f.score_gradients(a, tiles.head(i), tiles.slice(i), mine);
#pragma omp for schedule(dynamic, neighbours) nowait
    for (int64_t i = 0; i < (columns ? heads * blocks : 0); ++i) {
      f.column_gradients(a, i / blocks, i % blocks * f.width, mine);
    }
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t i = 0; i < (a.d_value ? heads * groups : 0); ++i) {
      f.value_gradients(a, i / groups, part_of(a.values, 4 * f.width, i % groups, groups));
    }
  });
  if (a.d_v) f.sum_heads(a);
}

#define FUSEDRNN_INSTANTIATE(S)                                               \
  template void run_attend<S>(const Kernels&, const AttendForward<S>&, int); \
  template void run_attend<S>(const Kernels&, AttendBackward<S>, int);
FUSEDRNN_INSTANTIATE(float)
FUSEDRNN_INSTANTIATE(double)
FUSEDRNN_INSTANTIATE(Bf16)
FUSEDRNN_INSTANTIATE(Half)
#undef FUSEDRNN_INSTANTIATE

}  // namespace fusedrnn
