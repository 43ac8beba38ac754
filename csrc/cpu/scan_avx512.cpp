#define FUSEDRNN_VECTOR_BYTES 64
#include "kernels.h"

namespace fusedrnn {
const Kernels kAvx512Kernels = level("avx512");
}  // namespace fusedrnn
