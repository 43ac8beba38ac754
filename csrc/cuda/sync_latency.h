// What a time step costs before it computes anything: an exchange between the blocks of a scan.
#pragma once

#include <cstdint>

namespace fusedrnn::cuda {

// How the blocks tell each other that the data of a round is there. The order is that of
// benchmarks/sync_latency.py.
enum Mechanism {
  kBlock,    // one block: shared memory and __syncthreads
  kGrid,     // L2 and grid.sync of a cooperative launch
  kCounter,  // L2 and one counter: red.release, ld.acquire
  kFlags,    // L2, the number of the round beside each word: no barrier
  kCluster,  // stores into the shared memory of every block of the cluster, and its barrier
  kPush,     // st.async into it, counted by the mbarrier of every receiver: no barrier
  kMechanisms,
};

}  // namespace fusedrnn::cuda

extern "C" {

// The blocks of `threads` that run at once, each on a multiprocessor of its own, and in whole
// clusters, in a round that gives each of them `bytes` of data; 0 where the device cannot do it at
// all, -cudaError_t after an error.
int fusedrnn_cuda_sync_capacity(int mechanism, int threads, int cluster, int bytes);

// Runs `rounds` of the exchange in one launch. Of the same arguments as above; blocks is at most the
// capacity, bytes a multiple of 16 that gives every block a share, rounds * blocks below 2^31.
// scratch [4 * bytes + 128] of the device, result [2]: the cycles of the first block, and how many
// threads read what nobody wrote in that round. Returns a cudaError_t; cudaErrorCooperativeLaunchTooLarge,
// before any launch, where the blocks do not fit.
int fusedrnn_cuda_sync_rounds(int mechanism, int blocks, int threads, int cluster, int bytes, int rounds,
                              uint64_t scratch, uint64_t result, intptr_t stream);
}
