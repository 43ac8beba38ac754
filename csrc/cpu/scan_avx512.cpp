#define FUSEDRNN_VECTOR_BYTES 64
#include "kernels.h"

namespace fusedrnn {
extern const Functions<float> kAvx512F32 = functions<float>();
extern const Functions<double> kAvx512F64 = functions<double>();
extern const StepFunctions kAvx512Step[kStorages] = {kStep<>[kPlain], kStep<>[kBFloat16], kStep<>[kInt8]};
static const Functions<Bf16> kBf16 = functions<Bf16>();
const Kernels kAvx512Kernels = {"avx512",         kAvx512F32,  kAvx512F64, kBf16,       map_math<float>,
                                map_math<double>, kAvx512Step, kUpdate<>,
                                linear_forward,   linear_backward, fingerprint, read_all, kAvx512Attend};
}  // namespace fusedrnn
