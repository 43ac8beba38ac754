// AVX-512 with its products of bf16 pairs and of bytes; the rest is that of scan_avx512.cpp.
#define FUSEDRNN_VECTOR_BYTES 64
#include "kernels.h"
#include "step_digits.h"

namespace fusedrnn {
extern const Functions<float> kAvx512F32;
extern const Functions<double> kAvx512F64;
extern const StepFunctions kAvx512Step[kStorages];
static const Functions<Bf16> kBf16 = functions<Bf16>();
static const StepFunctions kStepOfBytes[kStorages] = {kAvx512Step[kPlain], kAvx512Step[kBFloat16],
                                                      step_functions<Digits>};
const Kernels kAvx512Bf16Kernels = {"avx512bf16",     kAvx512F32,   kAvx512F64, kBf16,       map_math<float>,
                                    map_math<double>, kStepOfBytes, kUpdate<>,
                                    linear_forward,   linear_backward, fingerprint, read_all, kAvx512Attend};
}  // namespace fusedrnn
