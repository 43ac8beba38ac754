// The scan of a layer on a GPU: plain C, for ctypes and for bindings that know no CUDA.
//
// Shapes are those of docs/architecture.md: T time, B batch, H hidden, G gates, S states, D directions, N
// packed rows. Step t has the rows offsets[t] .. offsets[t + 1] of N, one per sequence that is still running,
// longest first; a dense batch needs no offsets. The second direction runs backwards in time: a sequence
// starts there at its own last step. The same pointers as Triton's scan takes.
#pragma once

#include <stdint.h>

#if defined(__GNUC__)
#define FUSEDRNN_EXPORT __attribute__((visibility("default")))
#else
#define FUSEDRNN_EXPORT
#endif

extern "C" {

// The order of csrc/cpu/scan.h: rnn_tanh, rnn_relu, lstm, gru.
enum { kFusedrnnCudaRnnTanh, kFusedrnnCudaRnnRelu, kFusedrnnCudaLstm, kFusedrnnCudaGru };

// Tf32 and split are stored as fp32. The products of tf32 take factors rounded to it; those of split take both parts
// of a factor and are as exact as fp32's, for finite weights.
enum { kFusedrnnCudaFp32, kFusedrnnCudaTf32, kFusedrnnCudaBf16, kFusedrnnCudaFp16, kFusedrnnCudaSplit };

// cta: a block has all units of its rows. grid: units are split over blocks that meet once a step, all blocks
// of a launch at once. cluster: over the up to 16 blocks of a cluster, which write into each other's shared
// memory; from sm_90 on. stepped: a launch for every step, which reads all weights; of any size.
enum { kFusedrnnCudaCta, kFusedrnnCudaGrid, kFusedrnnCudaCluster, kFusedrnnCudaStepped };

// Beside cudaError_t, which is positive.
enum {
  kFusedrnnCudaInvalid = -1,   // an argument that no kernel takes
  kFusedrnnCudaTooLarge = -2,  // the schedule cannot hold it: H too large for a block, or not all blocks at once
  kFusedrnnCudaDeadlock = -3,  // only over fibers
};

struct FusedrnnCudaForward {
  int32_t cell, storage, schedule, directions;
  int64_t time, batch, hidden, rows;
  const void* x_gates;  // [D, N, G*H]: W_ih x + b_ih
  const void* weight;   // [D, G*H, K]: K is H, filled up with zeros to whole 16 bytes; aligned to them
  const void* bias;     // [D, G*H]: b_hh, or null
  const void* start;    // [D, B, H]: the hidden state before the first step
  float* states;        // [S, D, B, H]: before the first step; after the last one
  void* output;         // strides output_direction, output_row, 1: [N, H] a direction
  int64_t output_direction, output_row;
  void* saved;              // [D, N, SAVED*H]: the activated gates, of a GRU also n's recurrent half; or null
  float* cells;             // [S-1, D, N, H]: the other states, or null
  const uint8_t* resets;    // [D, N]: the states are zero before these rows; or null
  const int64_t* offsets;   // [T+1], or null
  const int64_t* lengths;   // [B], or null with offsets
  uint32_t* counters;       // [D, B] zeros for grid, which leaves them dirty; else null
};

struct FusedrnnCudaBackward {
  int32_t cell, storage, schedule, directions;
  int64_t time, batch, hidden, rows;
  const void* weight;  // [D, H, G, K]: transposed, each gate filled up with zeros as forward's rows; aligned
  const void* saved;   // strides saved_direction, saved_row, 1: [N, SAVED*H] a direction; an RNN's output
  int64_t saved_direction, saved_row;
  const float* cells;  // [S-1, D, N, H]
  const void* cells0;  // [S-1, D, B, H]: the other states before the first step
  const void* output;  // strides output_direction, output_row, 1: [N, H] a direction; of a GRU
  int64_t output_direction, output_row;
  const void* start;   // [D, B, H]; of a GRU
  const void* grad;    // strides grad_direction, grad_row, 1: [N, H] a direction, the output's gradient; or null
  int64_t grad_direction, grad_row;
  float* d_states;     // [S, D, B, H]: of the last states; of those before the first step
  void* d_x_gates;     // [D, N, G*H]; d_h_gates itself but for a GRU
  void* d_h_gates;     // [D, N, G*H]
  const uint8_t* resets;   // [D, N] or null
  const int64_t* offsets;  // [T+1] or null
  const int64_t* lengths;  // [B] or null with offsets
  uint32_t* counters;      // [D, B] zeros for grid, which leaves them dirty; else null
};

// All return 0, a cudaError_t or one of the codes above. Pointers are on the current device.

// Whether a schedule can hold a scan on the current device, whatever its batch, time and directions.
FUSEDRNN_EXPORT int fusedrnn_cuda_scan_fits(int32_t cell, int32_t storage, int32_t schedule, int64_t hidden,
                                            int32_t backward);

// CUDA's words for a cudaError_t.
FUSEDRNN_EXPORT const char* fusedrnn_cuda_error(int32_t code);

// Whether a cudaError_t says that this GPU or its driver runs no code of this build: what fits will not change.
FUSEDRNN_EXPORT int fusedrnn_cuda_runs_no_code(int32_t code);

FUSEDRNN_EXPORT int fusedrnn_cuda_scan_forward(const FusedrnnCudaForward* arguments, intptr_t stream);
FUSEDRNN_EXPORT int fusedrnn_cuda_scan_backward(const FusedrnnCudaBackward* arguments, intptr_t stream);
}
