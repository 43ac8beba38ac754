#define FUSEDRNN_VECTOR_BYTES 32
#include "kernels.h"

namespace fusedrnn {
const Kernels kAvx2Kernels = {"avx2", functions<float>(), functions<double>(), fingerprint};
}  // namespace fusedrnn
