// What a call of a layer is to its kernels: tensors as pointers, weights packed, and what those point into.
#pragma once

#include <string.h>

#include <vector>

#include <pybind11/pybind11.h>

#include "cells/table.h"
#include "cpu/buffer.h"
#include "cpu/dispatch.h"
#include "fast_call.h"
#include "packs.h"
#include "tensors.h"

namespace fusedrnn {
namespace {

namespace py = pybind11;

// ---- memory -------------------------------------------------------------------------------------------------------

inline float wide(Bf16 v) {
  const uint32_t bits = uint32_t{v.bits} << 16;
  float wide;
  memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline Bf16 narrow(float v) {
  uint32_t bits;
  memcpy(&bits, &v, sizeof bits);
  if (v != v) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline void convert(const Bf16* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = wide(from[i]);
}
inline void convert(const float* from, Bf16* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = narrow(from[i]);
}
template <class T>
void convert(const T* from, T* to, int64_t n) {
  memcpy(to, from, n * sizeof(T));
}

// What pointers of a call point into, beside its tensors.
struct Held {
  std::vector<std::shared_ptr<const char>> packs;
  std::vector<Buffer> buffers;

  template <class T>
  T* take(int64_t count) {
    buffers.push_back(allocate(count * static_cast<int64_t>(sizeof(T))));
    return reinterpret_cast<T*>(buffers.back().get());
  }

  template <class S>
  const Acc<S>* widened(const void* from, int64_t n) {
    if constexpr (Storage<S>::kPerFactor == 1) {
      return static_cast<const S*>(from);
    } else {
      auto* to = take<Acc<S>>(n);
      convert(static_cast<const S*>(from), to, n);
      return to;
    }
  }

  // Rows whose length is a multiple of what a product takes at once, filled up with zeros.
  template <class S>
  const S* even(const void* from, int64_t rows, int64_t& columns) {
    const auto* values = static_cast<const S*>(from);
    const int64_t given = columns;
    columns = ceil_div(given, Storage<S>::kPerFactor) * Storage<S>::kPerFactor;
    if (columns == given) return values;
    S* const to = take<S>(rows * columns);
    for (int64_t r = 0; r < rows; ++r) {
      memcpy(to + r * columns, values + r * given, given * sizeof(S));
      memset(to + r * columns + given, 0, sizeof(S));
    }
    return to;
  }
};

// ---- a layer ------------------------------------------------------------------------------------------------------

struct Weight {
  PyObject* object;  // null: there is none
  dlpack::Tensor t;
};

// Of one direction.
struct Weights {
  Weight ih, hh, bias_ih, bias_hh, hr;
};

// What is common to all directions of a layer, and where its tensors lie: [D, ...] each.
struct Layer {
  int cell;
  int threads;
  int directions;
  Shape shape;
  int64_t inputs;
  const void* input;
  Weights weights[2];
  const bool* resets;

  const CellTraits& traits() const { return kTraits[cell]; }
  int64_t gates() const { return traits().gates; }
  int64_t work() const { return directions * shape.rows * gates() * shape.hidden * (inputs + shape.proj); }
};

template <class S>
const Factor<S>* pack(const Weight& w, Packing packing, int64_t gates, int threads, bool as_before, Held& held) {
  if (w.object == nullptr) return nullptr;
  held.packs.push_back(packed(w.object, w.t, packing, gates, threads, as_before));
  return reinterpret_cast<const Factor<S>*>(held.packs.back().get());
}

// The directions of a layer. In, state: the initial states [D, B, ...], which become the last ones. Out: output
// [N, D*P], and what is saved, unless it is null.
template <class S>
void describe(const Layer& l, S* output, Acc<S>* const state[2], Acc<S>* gates, Acc<S>* extra, Acc<S>* raw,
              ForwardDirection<S>* directions, Held& held) {
  const Shape& s = l.shape;
  int64_t inputs = l.inputs;
  const S* input = held.even<S>(l.input, s.rows, inputs);
  for (int i = 0; i < l.directions; ++i) {
    const Weights& w = l.weights[i];
    ForwardDirection<S>& d = directions[i];
    d = {};
    d.shape = s;
    d.reverse = i == 1;
    d.input = input;
    d.inputs = inputs;
    // One step reads its weights once: packing them, or checking a pack, would read them again.
    d.packed = s.time > 1 || Storage<S>::kPerFactor > 1;
    const auto find = [&](const Weight& weight, int64_t of) {
      return d.packed || weight.object == nullptr ? pack<S>(weight, Packing::kRows, of, l.threads, false, held)
                                                  : static_cast<const Factor<S>*>(weight.t.data);
    };
    d.weight_ih = find(w.ih, l.gates());
    d.weight_hh = find(w.hh, l.gates());
    d.weight_hr = find(w.hr, 1);
    if (w.bias_ih.object) {
      d.bias_ih = held.widened<S>(w.bias_ih.t.data, l.gates() * s.hidden);
      d.bias_hh = held.widened<S>(w.bias_hh.t.data, l.gates() * s.hidden);
    }
    d.output = output + i * s.proj;
    d.output_stride = l.directions * s.proj;
    d.state0 = state[0] + i * s.batch * s.proj;
    if (state[1]) d.state1 = state[1] + i * s.batch * s.hidden;
    if (gates) d.gates = gates + i * s.rows * l.gates() * s.hidden;
    if (extra) d.extra = extra + i * s.rows * s.hidden;
    if (raw) d.raw = raw + i * s.rows * s.hidden;
    if (l.resets) d.resets = l.resets + i * s.rows;
  }
}

template <class S>
void forward(const Layer& l, S* output, Acc<S>* const state[2], Acc<S>* gates, Acc<S>* extra, Acc<S>* raw, Held& held) {
  ForwardDirection<S> directions[2];
  describe<S>(l, output, state, gates, extra, raw, directions, held);
  const Kernels& k = kernels();
  run_beside(l.work(), [&] { run_forward<S>(k, l.cell, directions, l.directions, l.threads); });
}

// The weights of one direction, of a list of all: ih, hh, both biases or none, hr or not.
inline Weights weights_of(PyObject* const* each, Py_ssize_t count, const Tensors& tensors) {
  Weights w{};
  const auto read = [&](Py_ssize_t i) { return Weight{each[i], tensors.view(each[i])}; };
  w.ih = read(0);
  w.hh = read(1);
  if (count >= 4) w.bias_ih = read(2), w.bias_hh = read(3);
  if (count % 2 == 1) w.hr = read(count - 1);
  return w;
}

struct Items {
  PyObject* const* items;
  Py_ssize_t count;
};

inline Items items_of(PyObject* list) {
  if (!PyList_Check(list) && !PyTuple_Check(list)) throw py::type_error("expected a list or a tuple");
  return {PySequence_Fast_ITEMS(list), PySequence_Fast_GET_SIZE(list)};
}

inline int cell_of(PyObject* value) {
  const int cell = integer(value);
  if (cell < 0 || cell >= kCells) throw std::invalid_argument("cell: unknown index");
  return cell;
}

}  // namespace
}  // namespace fusedrnn
