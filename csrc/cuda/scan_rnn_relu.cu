#include "../cells/rnn.h"
#include "launch.h"

namespace fusedrnn::cuda {

int rnn_relu_forward(const FusedrnnCudaForward& a, const intptr_t* stream) { return forward<RnnRelu>(a, stream); }
int rnn_relu_backward(const FusedrnnCudaBackward& a, const intptr_t* stream) { return backward<RnnRelu>(a, stream); }

}  // namespace fusedrnn::cuda
