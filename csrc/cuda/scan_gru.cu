#include "../cells/gru.h"
#include "launch.h"

namespace fusedrnn::cuda {

int gru_forward(const FusedrnnCudaForward& a, const intptr_t* stream) { return forward<Gru>(a, stream); }
int gru_backward(const FusedrnnCudaBackward& a, const intptr_t* stream) { return backward<Gru>(a, stream); }

}  // namespace fusedrnn::cuda
