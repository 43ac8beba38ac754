// From the arguments of a scan of one cell to a launch: which tile, how much shared memory, whether it fits.
#pragma once

#include "backward.h"

namespace fusedrnn::cuda {

// Without a stream nothing is launched or read: whether it could be.
int rnn_tanh_forward(const FusedrnnCudaForward& a, const intptr_t* stream);
int rnn_relu_forward(const FusedrnnCudaForward& a, const intptr_t* stream);
int lstm_forward(const FusedrnnCudaForward& a, const intptr_t* stream);
int gru_forward(const FusedrnnCudaForward& a, const intptr_t* stream);
int rnn_tanh_backward(const FusedrnnCudaBackward& a, const intptr_t* stream);
int rnn_relu_backward(const FusedrnnCudaBackward& a, const intptr_t* stream);
int lstm_backward(const FusedrnnCudaBackward& a, const intptr_t* stream);
int gru_backward(const FusedrnnCudaBackward& a, const intptr_t* stream);

namespace {

constexpr int kMostTiles = 65535;  // of the second dimension of a launch
constexpr int kMostOfCluster = 16;

// The least that is not smaller.
constexpr int64_t power_of_two(int64_t n) {
  int64_t power = 1;
  while (power < n) power *= 2;
  return power;
}

struct Plan {
  Tile tile;
  dim3 grid;
  int shared;
};

template <class P, int kGroups, class Exchange>
bool plan(int unit_warps, int row_tiles, int64_t hidden, int gates_of_k, int64_t batch, int directions,
          const Device& on, Plan& found) {
  using Held = Weights<P, kGroups, Exchange::kRegisters>;
  Tile tile{};
  tile.unit_warps = unit_warps;
  tile.row_tiles = row_tiles;
  tile.gate_chunks = static_cast<int>(ceil_div(hidden * sizeof(typename P::Storage), kChunkBytes));
  tile.chunks = gates_of_k * tile.gate_chunks;
  const int64_t tiles = ceil_div(batch, tile.rows());
  int64_t blocks = ceil_div(hidden, tile.units());
  if (Exchange::kTogether == Together::kCluster) blocks = power_of_two(blocks);
  const int64_t left = ceil_div(tile.chunks, tile.slices()) - Held::kRegisterChunks;
  const int64_t shared = int64_t{Exchange::bytes(tile)} + tile.sums_bytes(kGroups) +
                         (left < 0 ? 0 : left * Held::kPieces * kThreads * 16);
  if (shared > on.shared_bytes || tiles > kMostTiles) return false;
  found = {tile, dim3(blocks, tiles, directions), static_cast<int>(shared)};
  return true;
}

// The fewest units that a block can have leave it the most room for weights. Batch tiles are as small as the
// machine has room for at once, because a step takes as long as its largest tile. 256 threads with kMost
// elements each have 2 * kMost tiles of 16 units by 8 rows.
template <class P, int kGroups, class Exchange>
bool choose(int64_t hidden, int gates_of_k, int64_t batch, int directions, const Device& on, Plan& found) {
  bool any = false;
  for (int unit_warps = 1; unit_warps <= 2 * Exchange::kMost && !any; unit_warps *= 2) {
    for (int row_tiles = 1; unit_warps * row_tiles <= 2 * Exchange::kMost; ++row_tiles) {
      Plan next;
      if (!plan<P, kGroups, Exchange>(unit_warps, row_tiles, hidden, gates_of_k, batch, directions, on, next)) continue;
      const bool at_once = int64_t{next.grid.x} * next.grid.y * directions <= on.multiprocessors;
      if (Exchange::kTogether == Together::kNone && next.grid.x > 1) continue;
      if (Exchange::kTogether == Together::kCluster && next.grid.x > kMostOfCluster) continue;
      if (Exchange::kTogether == Together::kGrid && !at_once) continue;
      found = next;
      any = true;
      if (at_once) break;
    }
  }
  return any;
}

// All blocks of a grid run at once, so what is too large for that becomes several launches, one after the other:
// what fits depends on H alone, never on the batch.
template <class P, int kGroups, template <class> class Exchange, class Arguments>
int run(void (*kernel)(Arguments, Tile), const Arguments& a, int gates_of_k, const intptr_t* stream) {
  using E = Exchange<typename P::Storage>;
  Device on;
  if (int error = device(on)) return error;
  if (E::kTogether == Together::kCluster) {
    int capability;
    if (int error = compiled_for(kernel, capability)) return error;
    if (capability < 90) return kFusedrnnCudaTooLarge;
  }
  Plan found{};
  int64_t batch = a.batch;
  int directions = a.directions;
  for (;;) {
    bool fit = false;
    if (choose<P, kGroups, E>(a.hidden, gates_of_k, batch, directions, on, found)) {
      if (int error = fits(kernel, {found.grid, kThreads, found.shared, E::kTogether, 0}, on, fit)) return error;
    }
    if (fit) break;
    if (E::kTogether != Together::kGrid || (directions == 1 && batch <= kColumns)) return kFusedrnnCudaTooLarge;
    if (directions == 2) {
      directions = 1;
    } else {
      batch = ceil_div(batch, 2);
    }
  }
  if (stream == nullptr) return 0;

  Arguments part = a;
  Tile tile = found.tile;
  const int tiles = static_cast<int>(ceil_div(a.batch, tile.rows())), most = found.grid.y;
  for (tile.first_direction = 0; tile.first_direction < a.directions; tile.first_direction += directions) {
    for (tile.first_tile = 0; tile.first_tile < tiles; tile.first_tile += most) {
      const int now = tiles - tile.first_tile < most ? tiles - tile.first_tile : most;
      const Config config{dim3(found.grid.x, now, directions), kThreads, found.shared, E::kTogether, *stream};
      if (int error = launch(kernel, config, part, tile)) return error;
      if (part.counters != nullptr) part.counters += now * directions;
    }
  }
  return 0;
}

// Nothing is held and blocks share nothing, so neither H nor the batch can be too large. Shared memory is a ring, as
// long as there is room for, and then the sums.
template <class P, int kGroups, class Arguments>
int run_steps(void (*kernel)(Arguments, Tile), const Arguments& a, int gates_of_k, int64_t steps,
              const intptr_t* stream) {
  using Weights = Stream<P, kGroups>;
  Device on;
  if (int error = device(on)) return error;
  Tile tile{};
  tile.unit_warps = 1;
  tile.gate_chunks = static_cast<int>(ceil_div(a.hidden * sizeof(typename P::Storage), kChunkBytes));
  tile.chunks = gates_of_k * tile.gate_chunks;
  const int64_t columns = ceil_div(a.batch, kColumns);
  int shared = 0;
  for (int most = Weights::kRowTiles; most > 0; --most) {
    tile.row_tiles = static_cast<int>(ceil_div(columns, ceil_div(columns, most)));
    const int chunk = Weights::chunk_bytes(tile), sums = tile.sums_bytes(kGroups);
    for (tile.stages = Weights::kMostStages; tile.stages * chunk > on.shared_bytes && tile.stages > 2;) --tile.stages;
    shared = tile.stages * chunk > sums ? tile.stages * chunk : sums;
    if (shared <= on.shared_bytes) break;
  }
  if (shared > on.shared_bytes) return kFusedrnnCudaTooLarge;
  if (stream == nullptr) return 0;

  const int tiles = static_cast<int>(ceil_div(a.batch, tile.rows()));
  for (; tile.first_tile < tiles; tile.first_tile += kMostTiles) {
    const int now = tiles - tile.first_tile < kMostTiles ? tiles - tile.first_tile : kMostTiles;
    const dim3 grid(ceil_div(a.hidden, kWarpUnits), now, a.directions);
    const Config config{grid, kThreads, shared, Together::kNone, *stream};
    if (int error = launch_steps(kernel, config, steps, a, tile)) return error;
  }
  return 0;
}

template <class Cell, class P>
int forward_as(const FusedrnnCudaForward& a, const intptr_t* stream) {
  constexpr int G = Cell::kGates;
  switch (a.schedule) {
    case kFusedrnnCudaCta: return run<P, G, Cta>(scan_forward_kernel<Cell, P, Cta>, a, 1, stream);
    case kFusedrnnCudaGrid: return run<P, G, Grid>(scan_forward_kernel<Cell, P, Grid>, a, 1, stream);
    case kFusedrnnCudaCluster: return run<P, G, Cluster>(scan_forward_kernel<Cell, P, Cluster>, a, 1, stream);
    case kFusedrnnCudaStepped: return run_steps<P, G>(scan_forward_kernel<Cell, P, Stepped>, a, 1, a.time, stream);
  }
  return kFusedrnnCudaInvalid;
}

template <class Cell, class P>
int backward_as(const FusedrnnCudaBackward& a, const intptr_t* stream) {
  constexpr int G = Cell::kGates;
  switch (a.schedule) {
    case kFusedrnnCudaCta: return run<P, 1, Cta>(scan_backward_kernel<Cell, P, Cta>, a, G, stream);
    case kFusedrnnCudaGrid: return run<P, 1, Grid>(scan_backward_kernel<Cell, P, Grid>, a, G, stream);
    case kFusedrnnCudaCluster: return run<P, 1, Cluster>(scan_backward_kernel<Cell, P, Cluster>, a, G, stream);
    // the last multiplies the gradients of the first step
    case kFusedrnnCudaStepped: return run_steps<P, 1>(scan_backward_kernel<Cell, P, Stepped>, a, G, a.time + 1, stream);
  }
  return kFusedrnnCudaInvalid;
}

template <class Cell>
int forward(const FusedrnnCudaForward& a, const intptr_t* stream) {
  switch (a.storage) {
    case kFusedrnnCudaFp32: return forward_as<Cell, Strict>(a, stream);
    case kFusedrnnCudaTf32: return forward_as<Cell, Matrix<float>>(a, stream);
    case kFusedrnnCudaBf16: return forward_as<Cell, Matrix<Bf16>>(a, stream);
    case kFusedrnnCudaFp16: return forward_as<Cell, Matrix<Half>>(a, stream);
    case kFusedrnnCudaSplit: return forward_as<Cell, Split>(a, stream);
  }
  return kFusedrnnCudaInvalid;
}

template <class Cell>
int backward(const FusedrnnCudaBackward& a, const intptr_t* stream) {
  switch (a.storage) {
    case kFusedrnnCudaFp32: return backward_as<Cell, Strict>(a, stream);
    case kFusedrnnCudaTf32: return backward_as<Cell, Matrix<float>>(a, stream);
    case kFusedrnnCudaBf16: return backward_as<Cell, Matrix<Bf16>>(a, stream);
    case kFusedrnnCudaFp16: return backward_as<Cell, Matrix<Half>>(a, stream);
    case kFusedrnnCudaSplit: return backward_as<Cell, Split>(a, stream);
  }
  return kFusedrnnCudaInvalid;
}

}  // namespace
}  // namespace fusedrnn::cuda
