#define FUSEDRNN_VECTOR_BYTES 32
#include "kernels.h"

namespace fusedrnn {
const Kernels kAvx2Kernels = level("avx2");
}  // namespace fusedrnn
