// The exchange of one time step and nothing else, by every mechanism that a scan could use: by device.h's own
// primitives where the scans have them, but that whoever waits in vain fails and does not hang.
//
// A round: each block writes its share of the data, all wait, each reads all of it. What is written
// depends on what was read, so rounds cannot overlap; every word is the number of its round, so a
// mechanism that lets stale data through is found out. Two buffers in turn are enough: whoever writes
// round r + 2 has read all of round r + 1, which each block wrote after it had read round r.
#include "sync_latency.h"

#include <cooperative_groups.h>

#include <algorithm>

#include "device.h"

namespace fusedrnn::cuda {
namespace {

constexpr int kBatch = 4;           // loads that a thread has in flight
constexpr int kLine = 128;          // bytes that the counter has for itself
constexpr int kPatience = 1 << 20;  // polls, about a second: then the kernel fails and does not hang

struct Exchange {
  int rounds;
  int vectors;           // of 16 bytes, that each block reads in a round
  uint32_t* counter;     // [1], zero
  uint4* buffers;        // [2, vectors], zero
  long long* cycles;     // [1]
  long long* wrong;      // [1], zero
};

__host__ __device__ constexpr bool in_shared(Mechanism m) { return m == kBlock || m == kCluster || m == kPush; }
__host__ __device__ constexpr bool in_cluster(Mechanism m) { return m == kCluster || m == kPush; }

__device__ void be_patient(int& polls) {
  if (++polls > kPatience) __trap();
}

// ---- what no scan has ---------------------------------------------------------------------------

// A word and its flag are 8 bytes, which are written and read at once.
__device__ void store_flagged(uint4* p, unsigned value, unsigned flag) {
  const unsigned long long word = static_cast<unsigned long long>(flag) << 32 | value;
  asm volatile("st.relaxed.gpu.global.v2.u64 [%0], {%1, %1};" ::"l"(p), "l"(word) : "memory");
}

__device__ uint4 load_flagged(const uint4* p) {
  unsigned long long a, b;
  asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(a), "=l"(b) : "l"(p) : "memory");
  return {static_cast<unsigned>(a), static_cast<unsigned>(a >> 32), static_cast<unsigned>(b),
          static_cast<unsigned>(b >> 32)};
}

// Clusters are from sm_90 on; the host refuses to launch them on others.

__device__ unsigned cluster_rank() {
  unsigned rank = 0;
#if FUSEDRNN_ARCH >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

__device__ unsigned cluster_size() {
  unsigned size = 1;
#if FUSEDRNN_ARCH >= 900
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
  return size;
}

// 16 bytes to where `shared` is in block `peer`.
__device__ void store_peer(unsigned peer, void* shared, unsigned value) {
#if FUSEDRNN_ARCH >= 900
  asm volatile(
      "{\n.reg .u32 to;\n"
      "mapa.shared::cluster.u32 to, %0, %1;\n"
      "st.shared::cluster.v4.u32 [to], {%2, %2, %2, %2};\n}" ::"r"(shared_address(shared)),
      "r"(peer), "r"(value)
      : "memory");
#endif
}

// ---- the exchange -----------------------------------------------------------------------------

template <Mechanism M>
__device__ void write(const Exchange& x, uint4* buffer, unsigned rank, unsigned ranks, unsigned round, unsigned value,
                      Arrivals* arrivals) {
  const int begin = static_cast<int>(int64_t{x.vectors} * rank / ranks);
  const int end = static_cast<int>(int64_t{x.vectors} * (rank + 1) / ranks);
  for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += blockDim.x) {
    if constexpr (M == kFlags) {
      store_flagged(buffer + i, value, round);
    } else if constexpr (in_cluster(M)) {
      for (unsigned peer = 0; peer < ranks; ++peer) {
        if constexpr (M == kCluster) store_peer(peer, buffer + i, value);
        if constexpr (M == kPush) push(peer, buffer + i, {value, value, value, value}, arrivals);
      }
    } else {
      buffer[i] = {value, value, value, value};
    }
  }
}

template <Mechanism M>
__device__ uint4 load(const uint4* p) {
  if constexpr (M == kFlags) return load_flagged(p);
  if constexpr (in_shared(M)) return *p;
  return load_fresh(p);
}

// Reads a whole round; what differs from its number.
template <Mechanism M>
__device__ unsigned read(const Exchange& x, const uint4* buffer, unsigned round) {
  unsigned differs = 0;
  for (int i = threadIdx.x; i < x.vectors; i += kBatch * blockDim.x) {
    uint4 v[kBatch];
    int polls = 0;
    for (bool there = false; !there;) {
      there = true;
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int k = i + j * static_cast<int>(blockDim.x);
        v[j] = k < x.vectors ? load<M>(buffer + k) : uint4{round, round, round, round};
      }
      if constexpr (M == kFlags) {
#pragma unroll
        for (int j = 0; j < kBatch; ++j) there = there && v[j].y == round && v[j].w == round;
        be_patient(polls);
      }
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      differs |= (v[j].x ^ round) | (v[j].y ^ round) | (v[j].z ^ round) | (v[j].w ^ round);
    }
  }
  return differs;
}

template <Mechanism M>
__global__ void __launch_bounds__(1024, 1) exchange_kernel(Exchange x) {
  extern __shared__ uint4 shared[];  // [2, vectors] where the data is exchanged there
  __shared__ Arrivals arrivals[2];
  uint4* const buffers = in_shared(M) ? shared : x.buffers;
  const bool first = threadIdx.x == 0;
  unsigned rank = blockIdx.x, ranks = gridDim.x;
  if constexpr (in_cluster(M)) {
    rank = cluster_rank(), ranks = cluster_size();
    if (first) {
      for (auto& each : arrivals) arrivals_init(&each);
    }
    cluster_sync();  // every block runs, and its arrivals are there
  }

  unsigned differs = 0;
  const long long began = clock64();
  for (unsigned round = 1; round <= static_cast<unsigned>(x.rounds); ++round) {
    uint4* const buffer = buffers + (round & 1) * x.vectors;
    Arrivals* const counted = &arrivals[round & 1];
    if (M == kPush && first) arrivals_expect(counted, x.vectors * static_cast<int>(sizeof(uint4)));
    write<M>(x, buffer, rank, ranks, round, round + differs, counted);

    if constexpr (M == kBlock) __syncthreads();
    if constexpr (M == kGrid) cooperative_groups::this_grid().sync();
    if constexpr (M == kCluster) cluster_sync();
    int polls = 0;
    if constexpr (M == kCounter) {
      __syncthreads();
      if (first) {
        arrive(x.counter);
        while (!reached(x.counter, round * gridDim.x)) be_patient(polls);
      }
      __syncthreads();
    }
    if constexpr (M == kPush) {
      while (!arrivals_over(counted, (round - 1) >> 1 & 1)) be_patient(polls);
    }

    differs |= read<M>(x, buffer, round);
    // without a barrier of all: no thread may write before the others of its block have read
    if constexpr (M == kFlags || M == kPush) __syncthreads();
  }
  if (first && blockIdx.x == 0) *x.cycles = clock64() - began;
  if (differs != 0) atomicAdd(reinterpret_cast<unsigned long long*>(x.wrong), 1ull);
  if constexpr (in_cluster(M)) cluster_sync();  // the others may still write here
}

// ---- the host ---------------------------------------------------------------------------------

using Kernel = void (*)(Exchange);

Kernel kernel_of(int mechanism) {
  static constexpr Kernel kKernels[kMechanisms] = {exchange_kernel<kBlock>,   exchange_kernel<kGrid>,
                                                   exchange_kernel<kCounter>, exchange_kernel<kFlags>,
                                                   exchange_kernel<kCluster>, exchange_kernel<kPush>};
  return mechanism >= 0 && mechanism < kMechanisms ? kKernels[mechanism] : nullptr;
}

int vectors_of(Mechanism m, int bytes) { return bytes / (m == kFlags ? 8 : 16); }

// A launch without its blocks: `blocks` is set by who launches.
struct Launch {
  Kernel kernel;
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attribute{};
  int capacity = 0;  // of blocks

  cudaError_t prepare(Mechanism m, int threads, int cluster, int bytes) {
    kernel = kernel_of(m);
    int device, processors, shared, major, limit;
    cudaError_t error = cudaGetDevice(&device);
    const auto ask = [&](int* value, cudaDeviceAttr what) {
      if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, what, device);
    };
    ask(&processors, cudaDevAttrMultiProcessorCount);
    ask(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    ask(&major, cudaDevAttrComputeCapabilityMajor);
    ask(&limit, cudaDevAttrMaxThreadsPerBlock);
    if (error != cudaSuccess) return error;
    if (threads > limit || (in_cluster(m) && major < 9)) return cudaSuccess;

    // More than half of the shared memory, so that a multiprocessor has one block, as in a scan.
    const int needed = std::max(in_shared(m) ? 2 * bytes : 0, shared / 2 + 16);
    cudaFuncAttributes attributes;
    error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess) return error;
    if (needed + static_cast<int>(attributes.sharedSizeBytes) > shared) return cudaSuccess;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, needed);
    if (error != cudaSuccess) return error;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = needed;
    config.attrs = &attribute;
    config.numAttrs = 1;
    if (!in_cluster(m)) {
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = m != kBlock;
      int each = 0;
      error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, needed);
      capacity = m == kBlock ? std::min(each, 1) : each * processors;
      return error;
    }
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
    int clusters = 0;
    config.gridDim = dim3(cluster);
    error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
    if (error == cudaErrorInvalidClusterSize) {  // larger than the device has
      cudaGetLastError();
      return cudaSuccess;
    }
    capacity = clusters * cluster;
    return error;
  }
};

bool valid(int mechanism, int threads, int cluster, int bytes) {
  return kernel_of(mechanism) != nullptr && threads > 0 && bytes >= 0 && bytes % 16 == 0 &&
         (bytes > 0 || (mechanism != kFlags && mechanism != kPush)) &&
         (in_cluster(static_cast<Mechanism>(mechanism)) ? cluster > 1 : cluster == 1);
}

}  // namespace
}  // namespace fusedrnn::cuda

using namespace fusedrnn::cuda;

extern "C" int fusedrnn_cuda_sync_capacity(int mechanism, int threads, int cluster, int bytes) {
  if (!valid(mechanism, threads, cluster, bytes)) return -cudaErrorInvalidValue;
  Launch launch;
  const cudaError_t error = launch.prepare(static_cast<Mechanism>(mechanism), threads, cluster, bytes);
  return error == cudaSuccess ? launch.capacity : -static_cast<int>(error);
}

extern "C" int fusedrnn_cuda_sync_rounds(int mechanism, int blocks, int threads, int cluster, int bytes, int rounds,
                                         uint64_t scratch, uint64_t result, intptr_t stream) {
  const bool shares = bytes == 0 || bytes / 16 >= blocks;
  if (!valid(mechanism, threads, cluster, bytes) || blocks < 1 || blocks % cluster != 0 || !shares || rounds < 0 ||
      int64_t{rounds} * blocks >= int64_t{1} << 31) {
    return cudaErrorInvalidValue;
  }
  const auto m = static_cast<Mechanism>(mechanism);
  Launch launch;
  cudaError_t error = launch.prepare(m, threads, cluster, bytes);
  if (error != cudaSuccess) return error;
  if (blocks > launch.capacity) return cudaErrorCooperativeLaunchTooLarge;

  auto* const queue = reinterpret_cast<cudaStream_t>(stream);
  auto* const memory = reinterpret_cast<char*>(scratch);
  auto* const found = reinterpret_cast<long long*>(result);
  const Exchange x{rounds, vectors_of(m, bytes), reinterpret_cast<uint32_t*>(memory),
                   reinterpret_cast<uint4*>(memory + kLine), found, found + 1};
  error = cudaMemsetAsync(memory, 0, 4 * static_cast<size_t>(bytes) + kLine, queue);
  if (error == cudaSuccess) error = cudaMemsetAsync(found, 0, 2 * sizeof(*found), queue);
  if (error != cudaSuccess) return error;
  launch.config.gridDim = dim3(blocks);
  launch.config.stream = queue;
  return cudaLaunchKernelEx(&launch.config, launch.kernel, x);
}
