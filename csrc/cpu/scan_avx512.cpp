#define FUSEDRNN_VECTOR_BYTES 64
#include "kernels.h"

namespace fusedrnn {
const Kernels kAvx512Kernels = {"avx512", functions<float>(), functions<double>(), fingerprint};
}  // namespace fusedrnn
