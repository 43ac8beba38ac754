// The seam between the kernels and the machine: everything that a kernel asks of a GPU beyond C++.
//
// nvcc sees the instructions; with FUSEDRNN_FIBERS g++ sees their emulation (emulation.h), so that the same
// sources run and race on a CPU. Kernels use nothing of CUDA but what is declared here, threadIdx, blockIdx,
// gridDim and __syncthreads.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(FUSEDRNN_FIBERS)
#include "fibers.h"
#else
#include <cuda_runtime.h>
#endif

namespace fusedrnn::cuda {

// What a test can leave out, to see that it is missed.
enum class Race { kNone, kNoWait, kEarlyArrival, kNoBlockBarrier, kOneBuffer, kOverlap };

// Which blocks of a launch have to run at once: none, all of it, or those of a row of the grid.
enum class Together { kNone, kGrid, kCluster };

struct Device {
  int multiprocessors;
  int shared_bytes;  // that a block can have
};

struct Config {
  dim3 grid;
  int threads, shared;
  Together together;
  intptr_t stream;
};

// Storage: bits alone, so that no header of CUDA's types is needed.
struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

}  // namespace fusedrnn::cuda

#if defined(FUSEDRNN_FIBERS)
#include "emulation.h"
#else

// What host code compiles as if it were for a GPU that has everything.
#if defined(__CUDA_ARCH__)
#define FUSEDRNN_ARCH __CUDA_ARCH__
#else
#define FUSEDRNN_ARCH 1000
#endif

namespace fusedrnn::cuda {

__device__ constexpr bool planted(Race) { return false; }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(Bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float to_float(Half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

template <class S>
__device__ __forceinline__ S from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ Bf16 from_float<Bf16>(float x) {
  Bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <>
__device__ __forceinline__ Half from_float<Half>(float x) {
  Half y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}

__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

__device__ __forceinline__ void warp_sync() { __syncwarp(); }
__device__ __forceinline__ float shuffle_xor(float value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
__device__ __forceinline__ uint32_t shuffle(uint32_t value, int lane) { return __shfl_sync(~0u, value, lane); }

// Past L1, which does not see what other SMs store.
template <class S>
__device__ __forceinline__ S load_fresh(const S* from) {
  if constexpr (sizeof(S) == 2) {
    return {__ldcg(reinterpret_cast<const unsigned short*>(from))};
  } else {
    return __ldcg(from);
  }
}

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// 16 bytes from global to shared memory past L1. They are there after copies_wait() for the thread that asked.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
__device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// What a thread has asked for since the last time is a group. Waits for all groups but the last few.
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroups>
__device__ __forceinline__ void copies_wait_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Between the launches of launch_steps(), which from sm_90 on overlap: the next one may begin as soon as all blocks
// of this one say so, and sees what this one stores only after waiting until all of it has ended. Every block has to
// wait, or the launch after the next could begin too early.
__device__ __forceinline__ void let_next_launch_begin() {
#if FUSEDRNN_ARCH >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_last_launch() {
#if FUSEDRNN_ARCH >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// A counter in global memory that only grows. Whoever waits until it has reached `target` sees what those
// who arrived had seen; differences are taken, so it may wrap.
__device__ __forceinline__ void arrive(uint32_t* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
__device__ __forceinline__ bool reached(const uint32_t* counter, uint32_t target) {
  uint32_t now;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
  return static_cast<int32_t>(now - target) >= 0;
}
__device__ __forceinline__ void wait(const uint32_t* counter, uint32_t target) {
  while (!reached(counter, target)) {
  }
}

// ---- clusters, from sm_90 on: the blocks of a row of the grid, which see each other's shared memory.

__device__ __forceinline__ void cluster_sync() {
#if FUSEDRNN_ARCH >= 900
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// Counts the bytes that others push; a phase is over when all that one thread has announced for it are there,
// in any order of the two.
using Arrivals = uint64_t;

// To be followed by cluster_sync().
__device__ __forceinline__ void arrivals_init(Arrivals* arrivals) {
#if FUSEDRNN_ARCH >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;" ::"r"(
                   shared_address(arrivals))
               : "memory");
#endif
}
__device__ __forceinline__ void arrivals_expect(Arrivals* arrivals, int bytes) {
#if FUSEDRNN_ARCH >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(arrivals)), "r"(bytes)
               : "memory");
#endif
}
// Whether the phase whose number has this parity is over; it may take its time to see that it is not.
__device__ __forceinline__ bool arrivals_over(Arrivals* arrivals, int parity) {
  uint32_t over = 1;
#if FUSEDRNN_ARCH >= 900
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(over)
      : "r"(shared_address(arrivals)), "r"(parity)
      : "memory");
#endif
  return over != 0;
}
__device__ __forceinline__ void arrivals_wait(Arrivals* arrivals, int parity) {
  while (!arrivals_over(arrivals, parity)) {
  }
}
// 16 bytes to where `shared` is in block `peer` of the cluster, and to its `arrivals`.
__device__ __forceinline__ void push(int peer, void* shared, uint4 value, Arrivals* arrivals) {
#if FUSEDRNN_ARCH >= 900
  uint32_t to, count;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(shared_address(shared)), "r"(peer));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(count) : "r"(shared_address(arrivals)), "r"(peer));
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
               "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(count)
               : "memory");
#endif
}

// c += a @ b in fragments of PTX: 16 rows, 8 columns, k = 32 bytes of a row.
template <class S>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
#define FUSEDRNN_MMA(S, shape)                                                                                   \
  template <>                                                                                                    \
  __device__ __forceinline__ void mma<S>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {        \
    asm("mma.sync.aligned." shape " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"             \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                         \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                     \
  }
FUSEDRNN_MMA(Bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
FUSEDRNN_MMA(Half, "m16n8k16.row.col.f32.f16.f16.f32")
FUSEDRNN_MMA(float, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef FUSEDRNN_MMA

__device__ __forceinline__ uint32_t to_tf32(uint32_t bits) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(__uint_as_float(bits)));
  return y;
}

// The value, which the compiler does not know: what is made of it is not made ahead of a loop.
__device__ __forceinline__ uint32_t unknown(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

// ---- host ----------------------------------------------------------------------------------------------------

inline const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

// Whether an error says that this GPU or its driver runs no code of this build.
inline bool runs_no_code(int error) {
  return error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
         error == cudaErrorUnsupportedPtxVersion || error == cudaErrorInsufficientDriver ||
         error == cudaErrorNoDevice;
}

inline int device(Device& found) {
  int id;
  if (int error = cudaGetDevice(&id)) return error;
  if (int error = cudaDeviceGetAttribute(&found.multiprocessors, cudaDevAttrMultiProcessorCount, id)) return error;
  return cudaDeviceGetAttribute(&found.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, id);
}

// What the code that this GPU runs of a kernel was compiled for: 90 is sm_90. A GPU may be newer than its code.
template <class... Args>
int compiled_for(void (*kernel)(Args...), int& capability) {
  cudaFuncAttributes found;
  if (int error = cudaFuncGetAttributes(&found, kernel)) return error;
  capability = found.ptxVersion;
  return 0;
}

struct Attributes {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attribute{};
};

// As CUDA has it; the result points into `made`. Of a cluster with more than 8 blocks the kernel must say that
// it may not run elsewhere.
template <class... Args>
int prepare(void (*kernel)(Args...), const Config& c, Attributes& made) {
  if (int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, c.shared)) return error;
  made.config.gridDim = c.grid;
  made.config.blockDim = dim3(c.threads);
  made.config.dynamicSmemBytes = c.shared;
  made.config.stream = reinterpret_cast<cudaStream_t>(c.stream);
  made.config.attrs = &made.attribute;
  made.config.numAttrs = c.together == Together::kNone ? 0 : 1;
  if (c.together == Together::kGrid) {
    made.attribute.id = cudaLaunchAttributeCooperative;
    made.attribute.val.cooperative = 1;
  } else if (c.together == Together::kCluster) {
    if (int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1)) return error;
    made.attribute.id = cudaLaunchAttributeClusterDimension;
    made.attribute.val.clusterDim.x = c.grid.x;
    made.attribute.val.clusterDim.y = made.attribute.val.clusterDim.z = 1;
  }
  return 0;
}

// Whether what has to run at once can.
template <class... Args>
int fits(void (*kernel)(Args...), const Config& c, const Device& on, bool& fit) {
  Attributes made;
  if (int error = prepare(kernel, c, made)) return error;
  int each = 1;
  if (c.together == Together::kGrid) {
    if (int error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, c.threads, c.shared)) return error;
    fit = int64_t{c.grid.x} * c.grid.y * c.grid.z <= int64_t{each} * on.multiprocessors;
  } else {
    if (c.together == Together::kCluster) {
      const int error = cudaOccupancyMaxActiveClusters(&each, kernel, &made.config);
      if (error == cudaErrorInvalidClusterSize) {  // larger than this GPU has
        cudaGetLastError();
        each = 0;
      } else if (error != 0) {
        return error;
      }
    }
    fit = each > 0;
  }
  return 0;
}

template <class... Args>
int launch(void (*kernel)(Args...), const Config& c, Args... args) {
  Attributes made;
  if (int error = prepare(kernel, c, made)) return error;
  return cudaLaunchKernelEx(&made.config, kernel, args...);
}

// Launches for step 0 .. count - 1, of Together::kNone. The first waits for all that the stream did before.
template <class Arguments, class Tile>
int launch_steps(void (*kernel)(Arguments, Tile), const Config& c, int64_t count, const Arguments& arguments,
                 Tile tile) {
  Attributes made;
  if (int error = prepare(kernel, c, made)) return error;
  // Blocks of the next launch need room beside those of this one.
  if (int error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                       cudaSharedmemCarveoutMaxShared)) {
    return error;
  }
  int capability;
  if (int error = compiled_for(kernel, capability)) return error;
  made.attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  made.attribute.val.programmaticStreamSerializationAllowed = 1;
  for (tile.step = 0; tile.step < count; ++tile.step) {
    made.config.numAttrs = tile.step > 0 && capability >= 90 ? 1 : 0;
    if (int error = cudaLaunchKernelEx(&made.config, kernel, arguments, tile)) return error;
  }
  return 0;
}

}  // namespace fusedrnn::cuda

#endif
