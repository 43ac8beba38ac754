#define FUSEDRNN_VECTOR_BYTES 64
#include "attend_backward.h"

namespace fusedrnn {
extern const AttendKernels kAvx512Attend = attend_kernels();
}  // namespace fusedrnn
