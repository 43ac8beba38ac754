#include "../cells/rnn.h"
#include "launch.h"

namespace fusedrnn::cuda {

int rnn_tanh_forward(const FusedrnnCudaForward& a, const intptr_t* stream) { return forward<RnnTanh>(a, stream); }
int rnn_tanh_backward(const FusedrnnCudaBackward& a, const intptr_t* stream) { return backward<RnnTanh>(a, stream); }

}  // namespace fusedrnn::cuda
