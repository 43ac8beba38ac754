#define FUSEDRNN_VECTOR_BYTES 32
#include "kernels.h"

namespace fusedrnn {
static const Functions<float> kF32 = functions<float>();
static const Functions<double> kF64 = functions<double>();
static const Functions<Bf16> kBf16 = functions<Bf16>();
const Kernels kAvx2Kernels = {"avx2",           kF32,    kF64,      kBf16,       map_math<float>,
                              map_math<double>, kStep<>, kUpdate<>,
                              linear_forward,   linear_backward, fingerprint, read_all, kAvx2Attend};
}  // namespace fusedrnn
