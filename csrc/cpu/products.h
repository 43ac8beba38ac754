// The products over the rows of a chunk that the backward scan leaves behind, shared by a team.
#pragma once

#include <type_traits>

#include "loop.h"
#include "pack.h"

namespace fusedrnn {
namespace {

// out [rows, n] = a [rows, k] @ weight [k, n] + bias, the weight packed by columns.
template <class S>
FUSEDRNN_HD void multiply_rows(const Team& team, int64_t rows, int64_t k, const S* a, int64_t a_stride,
                               const Factor<S>* weight /*packed [ceil(n/W), K, W]*/, int64_t n, S* out,
                               int64_t out_stride, const Acc<S>* bias = nullptr /*[n]*/) {
  using T = Acc<S>;
  constexpr int W = Simd<T>::kWidth, kPer = Storage<S>::kPerFactor;
  alignas(64) T acc[8 * 4 * W];  // [count, blocks, W]
  const int64_t column_blocks = ceil_div(n, W), factors = ceil_div(k, kPer);
  // Few rows are not shared out: each thread would read the whole weight for a few of them.
  const bool by_rows = rows >= 2 * max_rows(4) * team.size;
  const Range mine = by_rows ? share(rows, team.member, team.size) : Range{0, rows};
  const Range blocks_of_mine = by_rows ? Range{0, column_blocks} : share(column_blocks, team.member, team.size);
  const auto part = [&](int64_t first_block, int64_t blocks, Range slab) {
    const Factor<S>* from = weight + (first_block * factors + slab.begin) * W;
    for_each_tile(mine.begin, mine.end, max_rows(4), [&](int64_t row, int64_t count) {
      tile_for<Direct<S>, 1>(count, blocks)(slab.end - slab.begin,
                                    reinterpret_cast<const Factor<S>*>(a + row * a_stride) + slab.begin,
                                    a_stride / kPer, 1, from, factors * W, acc);
      store_tile(acc, count, blocks, first_block, n, slab.begin > 0, out + row * out_stride, out_stride,
                 slab.begin > 0 ? nullptr : bias);
    });
  };
  for_groups(blocks_of_mine, kBlocks<1>, false, [&](int64_t first_block, int64_t blocks) {
    if constexpr (kPer == 1) {
      for_slabs(factors, [&](Range slab) { part(first_block, blocks, slab); });
    } else {
      part(first_block, blocks, {0, factors});  // a sum of slabs would be rounded at each
    }
  });
}

// One row into a panel; of a pair, the first row comes first.
template <class T>
FUSEDRNN_HD void panel_row(T* panel /*[rows, W]*/, int64_t row, const T* from, int lanes) {
  store(panel + row * Simd<T>::kWidth, load(from, lanes));
}
FUSEDRNN_HD void panel_row(Bf16Pair* panel /*[ceil(rows/2), W]*/, int64_t row, const Bf16* from, int lanes) {
  Bf16Pair* to = panel + row / 2 * Simd<float>::kWidth;
  const auto bits = load_bits(from, lanes);
  store_pairs(to, row % 2 ? Factors<Bf16Pair>::load(to) | bits << 16 : bits);
}
// What is saved in fp32 is rounded like everything else that goes into a product.
FUSEDRNN_HD void panel_row(Bf16Pair* panel, int64_t row, const float* from, int lanes) {
  Bf16 rounded[Simd<float>::kWidth];
  store(rounded, load(from, lanes));
  panel_row(panel, row, rounded, Simd<float>::kWidth);
}

// out [m, n] (+)= a.T @ b for a [count, m] and b [count, n], count at most kSlabRows.
// for_rows(copy) calls copy(r, row r of b, null for zeros) for each r in ascending order; `pairs` is for
// the team.
template <class S, class Call>
FUSEDRNN_HD void multiply_transposed(const Team& team, int64_t count, int64_t m, const S* a, int64_t a_stride,
                                     int64_t n, Factor<S>* pairs, Factor<S>* panel, bool add, Acc<S>* out /*[m, n]*/,
                                     Call for_rows) {
  using T = Acc<S>;
  constexpr int W = Simd<T>::kWidth, kPer = Storage<S>::kPerFactor;
  alignas(64) T acc[8 * 4 * W];  // [tile rows, blocks, W]
  const int64_t factors = ceil_div(count, kPer);
  Range mine = share(m, team.member, team.size);
  const Factor<S>* columns;  // [factors, column_stride]
  int64_t column_stride;
  if constexpr (kPer == 1) {
    columns = a;
    column_stride = a_stride;
  } else {
    // Whole vectors, so that no thread writes into another's.
    const Range blocks = share(ceil_div(m, W), team.member, team.size);
    mine = {blocks.begin * W, smaller(blocks.end * W, m)};
    columns = pairs;
    column_stride = a_stride / kPer;
    for (int64_t r = 0; r < count; r += 2) {
      const S* row = a + r * a_stride;
      for (int64_t i = mine.begin; i < mine.end; i += W) {
        store_pairs(pairs + r / 2 * column_stride + i,
                    pair_rows(row + i, r + 1 < count ? row + a_stride + i : nullptr, W));
      }
    }
  }
  for_groups(Range{0, ceil_div(n, W)}, kBlocks<1>, false, [&](int64_t first_block, int64_t blocks) {
    for_rows([&](int64_t r, const auto* from) {
      static constexpr std::decay_t<decltype(*from)> zeros[W] = {};
      for (int64_t j = 0; j < blocks; ++j) {
        const int64_t column = (first_block + j) * W;
        panel_row(panel + j * factors * W, r, from ? from + column : zeros, static_cast<int>(smaller(W, n - column)));
      }
    });
    for_each_tile(mine.begin, mine.end, max_rows(4), [&](int64_t i, int64_t rows) {
      tile_for<Direct<S>, 1>(rows, blocks)(factors, columns + i, 1, column_stride, panel, factors * W, acc);
      store_tile(acc, rows, blocks, first_block, n, add, out + i * n, n);
    });
  });
}

// out [n] (+)= the sum of the rows of a [rows, n]; and the same to `copy`, if it is not null.
template <class S>
FUSEDRNN_HD void sum_rows(const Team& team, int64_t rows, int64_t n, const S* a, int64_t a_stride, bool add,
                          Acc<S>* out, Acc<S>* copy = nullptr) {
  using V = typename Simd<Acc<S>>::V;
  constexpr int W = Simd<Acc<S>>::kWidth;
  const Range mine = share(ceil_div(n, W), team.member, team.size);
  const auto columns = [&](auto count, int64_t block) {
    constexpr int kCount = decltype(count)::value;
    const int lanes = static_cast<int>(smaller(W, n - (block + kCount - 1) * W));
    const auto load_row = [&](int64_t r, int j) {
      const S* from = a + r * a_stride + (block + j) * W;
      return j + 1 < kCount ? load(from) : load(from, lanes);
    };
    // Two halves hide the latency of an addition, and round less.
    V sum[2][kCount] = {};
    int64_t r = 0;
    for (; r + 2 <= rows; r += 2) {
#pragma GCC unroll 4
      for (int j = 0; j < kCount; ++j) {
        sum[0][j] += load_row(r, j);
        sum[1][j] += load_row(r + 1, j);
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) {
      if (r < rows) sum[0][j] += load_row(r, j);
      V total = sum[0][j] + sum[1][j];
      const int64_t column = (block + j) * W;
      const int width = j + 1 < kCount ? W : lanes;
      if (add) total += load(out + column, width);
      store(out + column, total, width);
      if (copy) store(copy + column, total, width);
    }
  };
  int64_t block = mine.begin;
  for (; block + 4 <= mine.end; block += 4) columns(std::integral_constant<int, 4>{}, block);
  for (; block < mine.end; ++block) columns(std::integral_constant<int, 1>{}, block);
}

}  // namespace
}  // namespace fusedrnn
