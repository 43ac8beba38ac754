#define FUSEDRNN_VECTOR_BYTES 32
#include "attend_backward.h"

namespace fusedrnn {
extern const AttendKernels kAvx2Attend = attend_kernels();
}  // namespace fusedrnn
