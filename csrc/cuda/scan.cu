// The entry points: arguments that are wrong for every kernel, and which cell.
#include "launch.h"

using namespace fusedrnn::cuda;

namespace {

// Sizes of a row and of a tile are counted in int.
constexpr int64_t kMostHidden = 1 << 20, kMostBatch = 1 << 30;

template <class Arguments>
bool valid(const Arguments& a) {
  const bool ragged = a.offsets != nullptr;
  return a.time >= 0 && a.batch >= 1 && a.batch <= kMostBatch && a.hidden >= 1 && a.hidden <= kMostHidden &&
         a.rows >= 0 &&
         (a.directions == 1 || a.directions == 2) && ragged == (a.lengths != nullptr) &&
         (a.schedule != kFusedrnnCudaGrid || a.counters != nullptr);
}

}  // namespace

int fusedrnn_cuda_scan_forward(const FusedrnnCudaForward* arguments, intptr_t stream) {
  const FusedrnnCudaForward& a = *arguments;
  if (!valid(a)) return kFusedrnnCudaInvalid;
  if (a.rows == 0) return 0;
  switch (a.cell) {
    case kFusedrnnCudaRnnTanh: return rnn_tanh_forward(a, stream);
    case kFusedrnnCudaRnnRelu: return rnn_relu_forward(a, stream);
    case kFusedrnnCudaLstm: return lstm_forward(a, stream);
    case kFusedrnnCudaGru: return gru_forward(a, stream);
  }
  return kFusedrnnCudaInvalid;
}

int fusedrnn_cuda_scan_backward(const FusedrnnCudaBackward* arguments, intptr_t stream) {
  const FusedrnnCudaBackward& a = *arguments;
  if (!valid(a)) return kFusedrnnCudaInvalid;
  if (a.rows == 0) return 0;
  switch (a.cell) {
    case kFusedrnnCudaRnnTanh: return rnn_tanh_backward(a, stream);
    case kFusedrnnCudaRnnRelu: return rnn_relu_backward(a, stream);
    case kFusedrnnCudaLstm: return lstm_backward(a, stream);
    case kFusedrnnCudaGru: return gru_backward(a, stream);
  }
  return kFusedrnnCudaInvalid;
}

#if defined(FUSEDRNN_FIBERS)
// The machine of the launches that follow.
extern "C" FUSEDRNN_EXPORT void fusedrnn_fibers_machine(int order, unsigned seed, int multiprocessors,
                                                        int shared_bytes, int race) {
  machine = {static_cast<Order>(order), seed, multiprocessors, shared_bytes, race};
}
#endif
