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

int of_cell(const FusedrnnCudaForward& a, const intptr_t* stream) {
  switch (a.cell) {
    case kFusedrnnCudaRnnTanh: return rnn_tanh_forward(a, stream);
    case kFusedrnnCudaRnnRelu: return rnn_relu_forward(a, stream);
    case kFusedrnnCudaLstm: return lstm_forward(a, stream);
    case kFusedrnnCudaGru: return gru_forward(a, stream);
  }
  return kFusedrnnCudaInvalid;
}

int of_cell(const FusedrnnCudaBackward& a, const intptr_t* stream) {
  switch (a.cell) {
    case kFusedrnnCudaRnnTanh: return rnn_tanh_backward(a, stream);
    case kFusedrnnCudaRnnRelu: return rnn_relu_backward(a, stream);
    case kFusedrnnCudaLstm: return lstm_backward(a, stream);
    case kFusedrnnCudaGru: return gru_backward(a, stream);
  }
  return kFusedrnnCudaInvalid;
}

template <class Arguments>
int scan(const Arguments& a, intptr_t stream) {
  if (!valid(a)) return kFusedrnnCudaInvalid;
  return a.rows == 0 ? 0 : of_cell(a, &stream);
}

template <class Arguments>
int scan_fits(int32_t cell, int32_t storage, int32_t schedule, int64_t hidden) {
  if (hidden < 1 || hidden > kMostHidden) return kFusedrnnCudaInvalid;
  Arguments a{};
  a.cell = cell;
  a.storage = storage;
  a.schedule = schedule;
  a.directions = 1;
  a.batch = 1;
  a.hidden = hidden;
  return of_cell(a, nullptr);
}

}  // namespace

int fusedrnn_cuda_scan_forward(const FusedrnnCudaForward* arguments, intptr_t stream) {
  return scan(*arguments, stream);
}

int fusedrnn_cuda_scan_backward(const FusedrnnCudaBackward* arguments, intptr_t stream) {
  return scan(*arguments, stream);
}

int fusedrnn_cuda_scan_fits(int32_t cell, int32_t storage, int32_t schedule, int64_t hidden, int32_t backward) {
  const auto fits = backward ? scan_fits<FusedrnnCudaBackward> : scan_fits<FusedrnnCudaForward>;
  return fits(cell, storage, schedule, hidden);
}

const char* fusedrnn_cuda_error(int32_t code) { return error_text(code); }

int fusedrnn_cuda_runs_no_code(int32_t code) { return runs_no_code(code); }

#if defined(FUSEDRNN_FIBERS)
// The machine of the launches that follow.
extern "C" FUSEDRNN_EXPORT void fusedrnn_fibers_machine(int order, unsigned seed, int multiprocessors,
                                                        int shared_bytes, int race) {
  machine = {static_cast<Order>(order), seed, multiprocessors, shared_bytes, race};
}
#endif
