// The table of one ISA level. Each scan_<level>.cpp defines FUSEDRNN_VECTOR_BYTES, includes this
// and names its table; nothing else is compiled with that level's flags.
#pragma once

#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/rnn.h"
#include "backward.h"
#include "fingerprint.h"
#include "forward.h"
#include "math.h"
#include "pack.h"
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

template <class T>
constexpr Functions<T> functions() {
  return {
      {forward_scan<RnnTanh, T>, forward_scan<RnnRelu, T>, forward_scan<Lstm, T>, forward_scan<Gru, T>},
      {backward_scan<RnnTanh, T>, backward_scan<RnnRelu, T>, backward_scan<Lstm, T>, backward_scan<Gru, T>},
      pack_rows<T>,
      pack_columns<T>,
      map_math<T>,
      Simd<T>::kWidth,
      {kTileRows<RnnTanh>, kTileRows<RnnRelu>, kTileRows<Lstm>, kTileRows<Gru>},
  };
}

constexpr Kernels level(const char* name) {
  return {name, functions<float>(), functions<double>(),
          {step_functions<Plain<float>>, step_functions<BFloat16>, step_functions<Int8>}, fingerprint};
}

}  // namespace
}  // namespace fusedrnn
