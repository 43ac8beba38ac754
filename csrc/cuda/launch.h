// From the arguments of a scan of one cell to a launch: which tile, how much shared memory, whether it fits.
#pragma once

#include "backward.h"

namespace fusedrnn::cuda {

int rnn_tanh_forward(const FusedrnnCudaForward& a, intptr_t stream);
int rnn_relu_forward(const FusedrnnCudaForward& a, intptr_t stream);
int lstm_forward(const FusedrnnCudaForward& a, intptr_t stream);
int gru_forward(const FusedrnnCudaForward& a, intptr_t stream);
int rnn_tanh_backward(const FusedrnnCudaBackward& a, intptr_t stream);
int rnn_relu_backward(const FusedrnnCudaBackward& a, intptr_t stream);
int lstm_backward(const FusedrnnCudaBackward& a, intptr_t stream);
int gru_backward(const FusedrnnCudaBackward& a, intptr_t stream);

namespace {

constexpr int kMostTiles = 65535;  // of the second dimension of a launch

struct Plan {
  Tile tile;
  dim3 grid;
  int shared;
};

template <class P, int kGroups>
bool plan(int unit_warps, int row_tiles, int64_t hidden, int gates_of_k, int64_t batch, int directions,
          const Device& on, Plan& found) {
  constexpr int kPieces = Weights<P, kGroups>::kPieces, kHeld = Weights<P, kGroups>::kRegisterChunks;
  Tile tile{};
  tile.unit_warps = unit_warps;
  tile.row_tiles = row_tiles;
  tile.gate_chunks = static_cast<int>(ceil_div(hidden * sizeof(typename P::Storage), kChunkBytes));
  tile.chunks = gates_of_k * tile.gate_chunks;
  const int64_t blocks = ceil_div(hidden, tile.units()), tiles = ceil_div(batch, tile.rows());
  const int64_t left = ceil_div(tile.chunks, tile.slices()) - kHeld;  // by the registers
  const int64_t shared = int64_t{tile.vector_bytes()} + tile.sums_bytes(kGroups) +
                         (left < 0 ? 0 : left * kPieces * kThreads * 16);
  if (shared > on.shared_bytes || tiles > kMostTiles) return false;
  found = {tile, dim3(blocks, tiles, directions), static_cast<int>(shared)};
  return true;
}

// Batch tiles are as small as the machine has room for, because a step takes as long as its largest tile. 256
// threads with kMost elements each have 2 * kMost tiles of 16 units by 8 rows.
template <class P, int kGroups, int kMost>
bool plan_cta(int64_t hidden, int gates_of_k, int64_t batch, int directions, const Device& on, Plan& found) {
  int unit_warps = 1;
  while (unit_warps * kWarpUnits < hidden) unit_warps *= 2;
  bool any = false;
  for (int row_tiles = 1; unit_warps * row_tiles <= 2 * kMost; ++row_tiles) {
    any = plan<P, kGroups>(unit_warps, row_tiles, hidden, gates_of_k, batch, directions, on, found) || any;
    if (any && int64_t{found.grid.y} * directions <= on.multiprocessors) break;
  }
  return any;
}

// The fewest units a block can have hold the most weights; more only where the blocks would not fit at once.
template <class P, int kGroups, int kMost>
bool plan_grid(int64_t hidden, int gates_of_k, int64_t batch, int directions, const Device& on, Plan& found) {
  for (int unit_warps = 1; unit_warps <= 2 * kMost; unit_warps *= 2) {
    for (int row_tiles = 1; unit_warps * row_tiles <= 2 * kMost; ++row_tiles) {
      if (!plan<P, kGroups>(unit_warps, row_tiles, hidden, gates_of_k, batch, directions, on, found)) continue;
      if (int64_t{found.grid.x} * found.grid.y * directions <= on.multiprocessors) return true;
    }
  }
  return false;
}

template <class P, int kGroups, template <class> class Exchange, class Arguments>
int run(void (*kernel)(Arguments, Tile), const Arguments& a, int gates_of_k, intptr_t stream) {
  using E = Exchange<typename P::Storage>;
  constexpr bool kTogether = E::kTogether;
  Device on;
  if (int error = device(on)) return error;
  Plan found{};
  const bool any = kTogether ? plan_grid<P, kGroups, E::kMost>(a.hidden, gates_of_k, a.batch, a.directions, on, found)
                             : plan_cta<P, kGroups, E::kMost>(a.hidden, gates_of_k, a.batch, a.directions, on, found);
  if (!any) return kFusedrnnCudaTooLarge;
  if (kTogether) {
    int64_t fit = 0;
    if (int error = resident_blocks(kernel, kThreads, found.shared, on, fit)) return error;
    if (int64_t{found.grid.x} * found.grid.y * found.grid.z > fit) return kFusedrnnCudaTooLarge;
  }
  return launch(kernel, found.grid, kThreads, found.shared, kTogether, stream, a, found.tile);
}

template <class Cell, class P>
int forward_as(const FusedrnnCudaForward& a, intptr_t stream) {
  constexpr int G = Cell::kGates;
  switch (a.schedule) {
    case kFusedrnnCudaCta: return run<P, G, Cta>(scan_forward_kernel<Cell, P, Cta>, a, 1, stream);
    case kFusedrnnCudaGrid: return run<P, G, Grid>(scan_forward_kernel<Cell, P, Grid>, a, 1, stream);
  }
  return kFusedrnnCudaInvalid;
}

template <class Cell, class P>
int backward_as(const FusedrnnCudaBackward& a, intptr_t stream) {
  constexpr int G = Cell::kGates;
  switch (a.schedule) {
    case kFusedrnnCudaCta: return run<P, 1, Cta>(scan_backward_kernel<Cell, P, Cta>, a, G, stream);
    case kFusedrnnCudaGrid: return run<P, 1, Grid>(scan_backward_kernel<Cell, P, Grid>, a, G, stream);
  }
  return kFusedrnnCudaInvalid;
}

template <class Cell>
int forward(const FusedrnnCudaForward& a, intptr_t stream) {
  switch (a.storage) {
    case kFusedrnnCudaFp32: return forward_as<Cell, Strict>(a, stream);
    case kFusedrnnCudaTf32: return forward_as<Cell, Tf32>(a, stream);
    case kFusedrnnCudaBf16: return forward_as<Cell, Matrix<Bf16>>(a, stream);
    case kFusedrnnCudaFp16: return forward_as<Cell, Matrix<Half>>(a, stream);
  }
  return kFusedrnnCudaInvalid;
}

template <class Cell>
int backward(const FusedrnnCudaBackward& a, intptr_t stream) {
  switch (a.storage) {
    case kFusedrnnCudaFp32: return backward_as<Cell, Strict>(a, stream);
    case kFusedrnnCudaTf32: return backward_as<Cell, Tf32>(a, stream);
    case kFusedrnnCudaBf16: return backward_as<Cell, Matrix<Bf16>>(a, stream);
    case kFusedrnnCudaFp16: return backward_as<Cell, Matrix<Half>>(a, stream);
  }
  return kFusedrnnCudaInvalid;
}

}  // namespace
}  // namespace fusedrnn::cuda
