#include "sharing.h"

#include <algorithm>

namespace fusedrnn {
namespace {

// Bytes of weights that a core keeps in its first cache, and in its second beside everything else; and that the cache
// which all cores share has for each of them to read, beside all else.
constexpr int64_t kFirstCache = 32 << 10, kOwnCache = 512 << 10, kSharedCache = 4 << 20;

}  // namespace

bool stays_in_own_cache(const LayerWork& layer) { return layer.weight_bytes() <= kOwnCache; }

// Without a barrier, each thread reads all weights for rows of its own: as many as are worth it, the farther away the
// weights are. Else the units are shared out, and with them the weights.
Split choose_split(const LayerWork& layer, int members) {
  const int64_t bytes = layer.weight_bytes();
  const int64_t enough = bytes <= kFirstCache    ? 2
                         : bytes <= kOwnCache    ? std::min(layer.tile_rows, 4)
                         : bytes <= kSharedCache ? 16
                                                 : INT64_MAX;
  return layer.shape.batch / members >= enough ? Split::kRows : Split::kUnits;
}

Sharing share_layer(const LayerWork& layer, int threads) {
  const Shape& s = layer.shape;
  const double work = layer.of_direction();
  const Sharing alone{0, work * layer.directions};
  if (threads < 2) return alone;
  const Sharing best = cheapest(std::max(threads / layer.directions, 1), [&](int n) {
    if (n == 1) return layer.directions > 1 ? region_cost(threads) + work : alone.cost;
    const bool by_rows = choose_split(layer, n) == Split::kRows;
    const double share = by_rows ? largest_share(s.batch, n) : largest_share(ceil_div(s.hidden, layer.width), n);
    return region_cost(threads) + share * work + (by_rows ? 0 : double(s.time) * barrier_cost(n));
  });
  return best.cost < alone.cost ? best : alone;
}

Part part_of(const LayerWork& layer, const Team& team) {
  const Shape& s = layer.shape;
  if (team.size == 1) return {0, s.batch, s.batch, 0, 1, nullptr, team};
  if (choose_split(layer, team.size) == Split::kUnits) {
    return {0, s.batch, s.batch, team.member, team.size, team.barrier, team};
  }
  if (s.batch_sizes == nullptr) {
    const int64_t begin = s.batch * team.member / team.size, end = s.batch * (team.member + 1) / team.size;
    return {begin, end - begin, s.batch, 0, 1, nullptr, team};
  }
  // Long sequences come first: dealing out strips keeps the threads level as the batch shrinks.
  const int64_t strip = std::min<int64_t>(layer.tile_rows, (s.batch + team.size - 1) / team.size);
  return {team.member * strip, strip, team.size * strip, 0, 1, nullptr, team};
}

}  // namespace fusedrnn
