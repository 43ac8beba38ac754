// The table of one ISA level. Each scan_<level>.cpp defines FUSEDRNN_VECTOR_BYTES, includes this
// and names its table; nothing else is compiled with that level's flags.
#pragma once

#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/rnn.h"
#include "attend.h"
#include "backward.h"
#include "fingerprint.h"
#include "forward.h"
#include "linear.h"
#include "math.h"
#include "pack.h"
#include "read.h"
#include "step_kernel.h"

namespace fusedrnn {
namespace {

template <class T>
void map_math(int function, const T* in /*[n]*/, T* out /*[n]*/, int64_t n) {
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::kWidth;
  for (int64_t i = 0; i < n; i += W) {
    const int lanes = static_cast<int>(n - i < W ? n - i : W);
    const V x = load(in + i, lanes);
    store(out + i, function == 0 ? Math<V>::sigmoid(x) : Math<V>::tanh(x), lanes);
  }
}

template <class Cell>
constexpr int kTileRows = max_rows(Cell::kGates == 1 ? 4 : Cell::kGates);

template <class S>
constexpr Functions<S> functions() {
  return {
      {forward_scan<RnnTanh, S>, forward_scan<RnnRelu, S>, forward_scan<Lstm, S>, forward_scan<Gru, S>},
      {backward_scan<RnnTanh, S>, backward_scan<RnnRelu, S>, backward_scan<Lstm, S>, backward_scan<Gru, S>},
      pack_rows,
      pack_columns,
      Simd<Acc<S>>::kWidth,
      {kTileRows<RnnTanh>, kTileRows<RnnRelu>, kTileRows<Lstm>, kTileRows<Gru>},
  };
}

template <int = 0>
constexpr void (*kUpdate[kCells])(const CellUpdate&) = {update_cell<RnnTanh>, update_cell<RnnRelu>, update_cell<Lstm>,
                                                        update_cell<Gru>};

template <int = 0>
constexpr StepFunctions kStep[kStorages] = {step_functions<Direct<float>>, step_functions<BFloat16>,
                                           step_functions<Int8>};

}  // namespace
}  // namespace fusedrnn
