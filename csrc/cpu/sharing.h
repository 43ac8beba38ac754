// How many threads work on something, and what each of them gets.
//
// Costs are multiply-adds of a large product that a thread makes in the time. Those of two threads are measured
// (docs/performance-cpu-story.md); how they grow with more is an estimate: members arrive at a barrier one after the other.
#pragma once

#include "scan.h"

namespace fusedrnn {

// Opening and closing a region, of all threads whatever the team (in_team says why).
constexpr double region_cost(int threads) { return threads > 1 ? 1.5e5 + 2.5e4 * threads : 0; }
constexpr double barrier_cost(int members) { return members > 1 ? 4e3 + 2.5e3 * members : 0; }

// All threads, or one where that is faster, for work that can be cut anywhere.
inline int worth_a_region(double work, int threads) {
  return threads > 1 && work - work / threads > region_cost(threads) ? threads : 1;
}

// How many members, and what it costs with them.
struct Sharing {
  int members;
  double cost;
};

// The cheapest of 1 to `most` members, the fewest of equals.
template <class Cost>
Sharing cheapest(int most, Cost cost) {
  Sharing best{1, cost(1)};
  for (int n = 2; n <= most; ++n) {
    const double of_n = cost(n);
    if (of_n < best.cost) best = {n, of_n};
  }
  return best;
}

// The largest of some equal shares of n things that stay whole, as a part of all.
constexpr double largest_share(int64_t n, int shares) {
  return n > 0 ? double(ceil_div(n, shares)) / double(n) : 1.0;
}

// What decides how a layer is shared out.
struct LayerWork {
  const Shape& shape;
  int64_t inputs;         // I
  int gates, directions;  // G, 1 or 2
  int64_t element_bytes;
  int width, tile_rows;   // units of a block, rows that a tile takes at once

  int64_t weight_bytes() const { return gates * shape.hidden * shape.proj * element_bytes; }  // of weight_hh
  double of_direction() const {
    return double(shape.rows) * gates * double(shape.hidden) * double(inputs + shape.proj);
  }
};

// Whether a team shares out the rows, or the units with a barrier at every step.
enum class Split { kRows, kUnits };
Split choose_split(const LayerWork& layer, int members);
// Whether a core keeps the recurrent weights in its second cache beside everything else.
bool stays_in_own_cache(const LayerWork& layer);

// Teams of a layer: members for each direction, or 0 where one thread makes all directions.
Sharing share_layer(const LayerWork& layer, int threads);

// What a member of a direction's team gets.
Part part_of(const LayerWork& layer, const Team& team);

}  // namespace fusedrnn
