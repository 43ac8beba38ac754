// The products over the rows of a chunk that the backward scan leaves behind, shared by a team.
#pragma once

#include "loop.h"

namespace fusedrnn {
namespace {

// out [rows, n] = a [rows, k] @ weight [k, n], the weight packed by columns.
template <class T>
FUSEDRNN_HD void multiply_rows(const Team& team, int64_t rows, int64_t k, const T* a, int64_t a_stride,
                               const T* weight /*packed [ceil(n/W), k, W]*/, int64_t n, T* out, int64_t out_stride) {
  constexpr int W = Simd<T>::kWidth;
  alignas(64) T acc[8 * 4 * W];  // [count, blocks, W]
  const int64_t column_blocks = (n + W - 1) / W;
  // Few rows are not shared out: each thread would read the whole weight for a few of them.
  const bool by_rows = rows >= 2 * max_rows(4) * team.size;
  const Range mine = by_rows ? share(rows, team.member, team.size) : Range{0, rows};
  const Range blocks_of_mine = by_rows ? Range{0, column_blocks} : share(column_blocks, team.member, team.size);
  for_groups(blocks_of_mine, kBlocks<1>, false, [&](int64_t first_block, int64_t blocks) {
    for_slabs(k, [&](Range slab) {
      const T* from = weight + (first_block * k + slab.begin) * W;
      for_each_tile(mine.begin, mine.end, max_rows(4), [&](int64_t row, int64_t count) {
        tile_for<T, 1>(count, blocks)(slab.end - slab.begin, a + row * a_stride + slab.begin, a_stride, 1, from, k * W,
                                      acc);
        for (int64_t r = 0; r < count; ++r) {
          for (int64_t j = 0; j < blocks; ++j) {
            const int64_t column = (first_block + j) * W;
            const int lanes = static_cast<int>(smaller(W, n - column));
            T* to = out + (row + r) * out_stride + column;
            const auto sum = load(acc + (r * blocks + j) * W);
            store(to, slab.begin > 0 ? load(to, lanes) + sum : sum, lanes);
          }
        }
      });
    });
  });
}

// out [m, n] (+)= a.T @ b over the rows of a slab, at most kLongestSum: a [slab, m] starts at the slab's
// first row; for_rows(copy) calls copy(row, b's row) for each row of the slab.
template <class T, class F>
FUSEDRNN_HD void multiply_transposed(const Team& team, Range slab, int64_t m, const T* a, int64_t a_stride, int64_t n,
                                     T* panel, bool add, T* out /*[m, n]*/, F for_rows) {
  constexpr int W = Simd<T>::kWidth;
  alignas(64) T acc[8 * 4 * W];  // [count, blocks, W]
  const int64_t count = slab.end - slab.begin;
  const Range mine = share(m, team.member, team.size);
  for_groups(Range{0, (n + W - 1) / W}, kBlocks<1>, false, [&](int64_t first_block, int64_t blocks) {
    for_rows([&](int64_t row, const T* from) {
      for (int64_t j = 0; j < blocks; ++j) {
        const int64_t column = (first_block + j) * W;
        store(panel + (j * count + row - slab.begin) * W,
              load(from + column, static_cast<int>(smaller(W, n - column))));
      }
    });
    for_each_tile(mine.begin, mine.end, max_rows(4), [&](int64_t i, int64_t rows) {
      tile_for<T, 1>(rows, blocks)(count, a + i, 1, a_stride, panel, count * W, acc);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t j = 0; j < blocks; ++j) {
          const int64_t column = (first_block + j) * W;
          const int lanes = static_cast<int>(smaller(W, n - column));
          T* to = out + (i + r) * n + column;
          const auto sum = load(acc + (r * blocks + j) * W);
          store(to, add ? load(to, lanes) + sum : sum, lanes);
        }
      }
    });
  });
}

// out [n] (+)= the sum of the rows of a [rows, n].
template <class T>
FUSEDRNN_HD void sum_rows(const Team& team, int64_t rows, int64_t n, const T* a, int64_t a_stride, bool add, T* out) {
  constexpr int W = Simd<T>::kWidth;
  const Range mine = share((n + W - 1) / W, team.member, team.size);
  for (int64_t block = mine.begin; block < mine.end; ++block) {
    const int64_t column = block * W;
    const int lanes = static_cast<int>(smaller(W, n - column));
    // Two halves hide the latency of an addition, and round less.
    typename Simd<T>::V sum[2] = {};
    for (int64_t r = 0; r < rows; ++r) sum[r & 1] += load(a + r * a_stride + column, lanes);
    const auto total = sum[0] + sum[1];
    store(out + column, add ? load(out + column, lanes) + total : total, lanes);
  }
}

}  // namespace
}  // namespace fusedrnn
