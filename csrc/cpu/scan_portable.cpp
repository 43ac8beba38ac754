#define FUSEDRNN_VECTOR_BYTES 16
#include "kernels.h"

namespace fusedrnn {
const Kernels kPortableKernels = level("portable");
}  // namespace fusedrnn
