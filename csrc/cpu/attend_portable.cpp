#define FUSEDRNN_VECTOR_BYTES 16
#include "attend_backward.h"

namespace fusedrnn {
extern const AttendKernels kPortableAttend = attend_kernels();
}  // namespace fusedrnn
