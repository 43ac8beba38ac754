// How a thread walks its share of a step: its rows in tiles, its blocks of units in groups.
#pragma once

#include "tile.h"

namespace fusedrnn {
namespace {

struct Range {
  int64_t begin, end;
};

FUSEDRNN_HD Range share(int64_t total, int member, int members) {
  return {total * member / members, total * (member + 1) / members};
}

FUSEDRNN_HD int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Asks for rows that are not in the first cache, all at once: of those that another thread has just written a product
// would wait for one after the other. More than these are under way before they are needed in any case.
template <class T>
FUSEDRNN_HD void fetch_rows(const T* rows, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(T), kMost = 64 * kLine;
  for (int64_t i = 0; i < smaller(count, kMost); i += kLine) __builtin_prefetch(rows + i);
}

// f(first, count) for tiles of about equal size, at most `most`, that cover [begin, end).
template <class F>
FUSEDRNN_HD void for_each_tile(int64_t begin, int64_t end, int64_t most, F f) {
  const int64_t count = end - begin, tiles = (count + most - 1) / most;
  int64_t done = 0;
  for (int64_t i = 1; i <= tiles; ++i) {
    const int64_t next = count * i / tiles;
    f(begin + done, next - done);
    done = next;
  }
}

// The same for the part's rows below `active`.
template <class F>
FUSEDRNN_HD void for_tiles(const Part& part, int64_t active, int64_t most, F f) {
  for (int64_t first = part.row_first; first < active; first += part.row_step) {
    for_each_tile(first, smaller(first + part.row_count, active), most, f);
  }
}

// f(first block, blocks) over a range of blocks, `most` at once. Odd steps go backwards: what the
// step before read last is still in the cache.
template <class F>
FUSEDRNN_HD void for_groups(Range range, int64_t most, bool backwards, F f) {
  if (!backwards) {
    for (int64_t b = range.begin; b < range.end; b += most) f(b, smaller(most, range.end - b));
  } else {
    for (int64_t e = range.end; e > range.begin; e -= most) {
      const int64_t b = e - most > range.begin ? e - most : range.begin;
      f(b, e - b);
    }
  }
}

// f(slab) for parts of the k of a product, short enough that the four blocks of the weight which one
// tile after the other reads stay in the second-level cache.
template <class F>
FUSEDRNN_HD void for_slabs(int64_t k, F f) {
  const int64_t most = (int64_t{512} << 10) / (4 * FUSEDRNN_VECTOR_BYTES), slabs = (k + most - 1) / most;
  for (int64_t i = 0; i < slabs; ++i) f(Range{k * i / slabs, k * (i + 1) / slabs});
}

// What a tile made, acc [rows, blocks, W], into columns [first_block * W, n) of rows of `out`; plus a bias [n].
template <class S, class T>
FUSEDRNN_HD void store_tile(const T* acc, int64_t rows, int64_t blocks, int64_t first_block, int64_t n, bool add, S* out,
                            int64_t out_stride, const T* bias = nullptr) {
  constexpr int W = Simd<T>::kWidth;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < blocks; ++j) {
      const int64_t column = (first_block + j) * W;
      const int lanes = static_cast<int>(smaller(W, n - column));
      S* to = out + r * out_stride + column;
      auto sum = load(acc + (r * blocks + j) * W);
      if (bias) sum += load(bias + column, lanes);
      store(to, add ? load(to, lanes) + sum : sum, lanes);
    }
  }
}

// Where time stands: step t, its rows [row, row + active) of N, and those of the neighbour step
// that the recurrence came from (before it in scan order).
struct Clock {
  const Shape& s;
  bool reverse;       // the direction of the scan itself
  int64_t t, active, row;

  FUSEDRNN_HD int64_t size(int64_t step) const {
    return step < 0 || step >= s.time ? 0 : s.batch_sizes ? s.batch_sizes[step] : s.batch;
  }
  // Rows that the scan's previous step also had, and the first of its rows.
  FUSEDRNN_HD int64_t previous_active() const { return size(reverse ? t + 1 : t - 1); }
  FUSEDRNN_HD int64_t previous_row() const { return reverse ? row + active : row - size(t - 1); }
  // The same of the scan's next step.
  FUSEDRNN_HD int64_t next_active() const { return size(reverse ? t - 1 : t + 1); }
  FUSEDRNN_HD int64_t next_row() const { return reverse ? row - size(t - 1) : row + active; }
};

FUSEDRNN_HD Clock clock_at(const Shape& s, bool reverse, bool at_end) {
  Clock c{s, reverse, at_end ? s.time - 1 : 0, 0, 0};
  c.active = c.size(c.t);
  c.row = at_end ? s.rows - c.active : 0;
  return c;
}

// To the step after (up) or before in time.
FUSEDRNN_HD void advance(Clock& c, bool up) {
  if (up) {
    c.row += c.active;
    c.active = c.size(++c.t);
  } else {
    c.active = c.size(--c.t);
    c.row -= c.active;
  }
}

// So many steps after (up) or before in time, all of as many rows.
FUSEDRNN_HD void leap(Clock& c, int64_t steps, bool up) {
  c.t += up ? steps : -steps;
  c.row += (up ? steps : -steps) * c.active;
}

// Steps [first, end) in scan order and the rows of N that they cover.
struct Span {
  int64_t first_step, end_step, row_begin, row_end;
};

// The steps from `now` on for which fits(span) holds; at least one.
template <class F>
FUSEDRNN_HD Span span_from(Clock now, int64_t step, bool up, F fits) {
  Span span{step, step + 1, now.row, now.row + now.active};
  while (span.end_step < now.s.time) {
    advance(now, up);
    Span longer = span;
    longer.end_step += 1;
    longer.row_begin = smaller(span.row_begin, now.row);
    if (now.row + now.active > span.row_end) longer.row_end = now.row + now.active;
    if (!fits(longer)) break;
    span = longer;
  }
  return span;
}

}  // namespace
}  // namespace fusedrnn
