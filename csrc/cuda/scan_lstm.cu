#include "../cells/lstm.h"
#include "launch.h"

namespace fusedrnn::cuda {

int lstm_forward(const FusedrnnCudaForward& a, const intptr_t* stream) { return forward<Lstm>(a, stream); }
int lstm_backward(const FusedrnnCudaBackward& a, const intptr_t* stream) { return backward<Lstm>(a, stream); }

}  // namespace fusedrnn::cuda
