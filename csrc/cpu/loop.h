// How a thread walks its share of a step: its rows in tiles, its blocks of units in groups.
#pragma once

#include "scan.h"
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

// f(first row, rows) for tiles of about equal size that cover the part's rows below `active`.
template <class F>
FUSEDRNN_HD void for_tiles(const Part& part, int64_t active, int64_t most, F f) {
  for (int64_t first = part.row_first; first < active; first += part.row_step) {
    const int64_t count = smaller(part.row_count, active - first);
    const int64_t tiles = (count + most - 1) / most;
    int64_t begin = 0;
    for (int64_t i = 1; i <= tiles; ++i) {
      const int64_t end = count * i / tiles;
      f(first + begin, end - begin);
      begin = end;
    }
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

}  // namespace
}  // namespace fusedrnn
