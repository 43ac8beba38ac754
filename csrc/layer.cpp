// Layers of torch's tensors, each function a plain CPython one. `layer_forward` and `layer_backward` run one layer and
// trust their arguments. `layers` runs a stack that nobody looks on at (no gradient, no tracer), and looks at
// everything first; `fits` only looks.
#include <string.h>

#include <array>
#include <vector>

#include <pybind11/pybind11.h>

#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"
#include "cpu/buffer.h"
#include "cpu/dispatch.h"
#include "fast_call.h"
#include "packs.h"
#include "tensors.h"

namespace py = pybind11;
using namespace fusedrnn;

namespace {

// Above so many multiply-adds (about 20 us) other threads want the GIL.
constexpr int64_t kWorthRelease = 1 << 19;

template <class Cell>
constexpr bool kOwnExtra = Cell::kExtra != Extra::kNone;
constexpr int64_t kGates[kCells] = {RnnTanh::kGates, RnnRelu::kGates, Lstm::kGates, Gru::kGates};
constexpr int kStates[kCells] = {RnnTanh::kStates, RnnRelu::kStates, Lstm::kStates, Gru::kStates};
constexpr bool kSavesGates[kCells] = {RnnTanh::kSavesGates, RnnRelu::kSavesGates, Lstm::kSavesGates, Gru::kSavesGates};
constexpr bool kExtras[kCells] = {kOwnExtra<RnnTanh>, kOwnExtra<RnnRelu>, kOwnExtra<Lstm>, kOwnExtra<Gru>};

// ---- memory -------------------------------------------------------------------------------------------------------

float wide(Bf16 v) {
  const uint32_t bits = uint32_t{v.bits} << 16;
  float wide;
  memcpy(&wide, &bits, sizeof wide);
  return wide;
}

Bf16 narrow(float v) {
  uint32_t bits;
  memcpy(&bits, &v, sizeof bits);
  if (v != v) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

void convert(const Bf16* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = wide(from[i]);
}
void convert(const float* from, Bf16* to, int64_t n) {
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

template <class Run>
void run_beside(int64_t work, Run run) {
  if (work < kWorthRelease) return run();
  const py::gil_scoped_release release;
  run();
}

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

  int64_t gates() const { return kGates[cell]; }
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
Weights weights_of(PyObject* const* each, Py_ssize_t count, const Tensors& tensors) {
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

Items items_of(PyObject* list) {
  if (!PyList_Check(list) && !PyTuple_Check(list)) throw py::type_error("expected a list or a tuple");
  return {PySequence_Fast_ITEMS(list), PySequence_Fast_GET_SIZE(list)};
}

int cell_of(PyObject* value) {
  const int cell = integer(value);
  if (cell < 0 || cell >= kCells) throw std::invalid_argument("cell: unknown index");
  return cell;
}

Layer read_layer(PyObject* cell, PyObject* threads, PyObject* directions, const dlpack::Tensor& input,
                 PyObject* batch_sizes, PyObject* weights, const dlpack::Tensor& state, PyObject* resets,
                 const Tensors& tensors) {
  Layer l{};
  l.cell = cell_of(cell);
  l.threads = integer(threads);
  l.directions = integer(directions);
  if (l.directions != 1 && l.directions != 2) throw std::invalid_argument("directions: expected 1 or 2");
  const Items all = items_of(weights);
  const Py_ssize_t each = all.count / l.directions;
  if (each < 2 || each > 5) throw std::invalid_argument("weights: expected 2 to 5 per direction");
  for (int i = 0; i < l.directions; ++i) l.weights[i] = weights_of(all.items + i * each, each, tensors);
  l.inputs = input.shape[input.ndim - 1];
  l.input = input.data;
  Shape& s = l.shape;
  s.batch = state.shape[1];
  s.proj = state.shape[2];
  s.hidden = l.weights[0].hh.t.shape[0] / l.gates();
  if (batch_sizes == Py_None) {
    s.time = input.shape[0];
    s.rows = s.time * input.shape[1];
  } else {
    const auto sizes = tensors.view(batch_sizes);
    s.batch_sizes = static_cast<const int64_t*>(sizes.data);
    s.time = sizes.shape[0];
    s.rows = input.shape[0];
  }
  if (resets != Py_None) l.resets = static_cast<const bool*>(tensors.view(resets).data);
  return l;
}

py::list list_of(const std::vector<py::object>& objects) {
  py::list list(objects.size());
  for (size_t i = 0; i < objects.size(); ++i) list[i] = objects[i];
  return list;
}

py::object output_like(PyObject* input, const dlpack::Tensor& x, int64_t columns, void*& data, const Tensors& tensors) {
  if (x.ndim == 2) return tensors.make(input, {x.shape[0], columns}, data);
  return tensors.make(input, {x.shape[0], x.shape[1], columns}, data);
}

template <class S>
py::object forward_of(const Layer& l, bool save, PyObject* input, const dlpack::Tensor& x, const Items& states,
                      const Tensors& tensors) {
  using T = Acc<S>;
  constexpr bool kWidens = Storage<S>::kPerFactor > 1;
  const Shape& s = l.shape;
  Held held;
  void *output, *gates = nullptr, *extra = nullptr, *raw = nullptr;
  const auto made = output_like(input, x, l.directions * s.proj, output, tensors);
  T* state[2] = {};
  void* last_at[2] = {};
  std::vector<py::object> last, saved;
  const auto length = [&](int i) { return l.directions * s.batch * (i == 0 ? s.proj : s.hidden); };
  for (int i = 0; i < kStates[l.cell]; ++i) {
    last.push_back(tensors.make(input, {l.directions, s.batch, i == 0 ? s.proj : s.hidden}, last_at[i]));
    state[i] = kWidens ? held.take<T>(length(i)) : static_cast<T*>(last_at[i]);
    convert(static_cast<const S*>(tensors.view(states.items[i]).data), state[i], length(i));
  }
  if (save) {
    const auto keep = [&](int64_t columns, void*& data) {
      saved.push_back(tensors.make(input, {l.directions, s.rows, columns}, data, kWidens));
    };
    if (kSavesGates[l.cell]) keep(l.gates() * s.hidden, gates);
    if (kExtras[l.cell]) keep(s.hidden, extra);
    if (l.weights[0].hr.object) keep(s.hidden, raw);
  }
  if (s.rows > 0) {
    forward<S>(l, static_cast<S*>(output), state, static_cast<T*>(gates), static_cast<T*>(extra), static_cast<T*>(raw),
               held);
  }
  if (kWidens) {
    for (int i = 0; i < kStates[l.cell]; ++i) convert(state[i], static_cast<S*>(last_at[i]), length(i));
  }
  return py::make_tuple(made, list_of(last), list_of(saved));
}

// layer_forward(cell, threads, directions, save, input, batch_sizes, weights, states, resets) -> (output, last states,
// saved): docs/architecture.md, "The layer". Everything is contiguous, and of fp32, fp64 or bf16.
py::object layer_forward(PyObject* const* args) {
  const Tensors& tensors = Tensors::found();
  PyObject* const input = args[4];
  const auto x = tensors.view(input);
  const Items states = items_of(args[7]);
  const Layer l = read_layer(args[0], args[1], args[2], x, args[5], args[6], tensors.view(states.items[0]), args[8], tensors);
  py::object result;
  for_storage(storage_of(x), [&](auto s) {
    result = forward_of<decltype(s)>(l, integer(args[3]) != 0, input, x, states, tensors);
  });
  return result;
}

// ---- its gradient -------------------------------------------------------------------------------------------------

struct Gradients {
  PyObject *input, *states, *output, *saved, *grad_output, *grad_last, *needs;
};

template <class S>
py::object backward_of(const Layer& l, const Gradients& g, const dlpack::Tensor& x, PyObject* weights,
                       const Tensors& tensors) {
  using T = Acc<S>;
  constexpr bool kWidens = Storage<S>::kPerFactor > 1;
  const Shape& s = l.shape;
  const Items states = items_of(g.states), last = items_of(g.grad_last), needs = items_of(g.needs);
  const Items needs_weights = items_of(needs.items[1]), all = items_of(weights), saved = items_of(g.saved);
  const bool zeros = s.rows == 0;
  Held held;

  T* d_state[2] = {};
  std::vector<py::object> d_inputs, d_weights, d_states;
  const Items needs_states = items_of(needs.items[2]);
  for (int i = 0; i < kStates[l.cell]; ++i) {
    const int64_t columns = i == 0 ? s.proj : s.hidden, n = l.directions * s.batch * columns;
    if (needs_states.items[i] == Py_True) {
      void* data;
      d_states.push_back(tensors.make(g.input, {l.directions, s.batch, columns}, data, kWidens));
      d_state[i] = static_cast<T*>(data);
    } else {
      d_states.push_back(py::none());
      d_state[i] = held.take<T>(n);
    }
    if (last.items[i] == Py_None) {
      memset(d_state[i], 0, n * sizeof(T));
    } else {
      convert(static_cast<const S*>(tensors.view(last.items[i]).data), d_state[i], n);
    }
  }
  void* d_input[2] = {};
  if (needs.items[0] == Py_True) {
    for (int i = 0; i < l.directions; ++i) {
      if (x.ndim == 2) {
        d_inputs.push_back(tensors.make(g.input, {x.shape[0], x.shape[1]}, d_input[i], false, zeros));
      } else {
        d_inputs.push_back(tensors.make(g.input, {x.shape[0], x.shape[1], x.shape[2]}, d_input[i], false, zeros));
      }
    }
  }
  std::array<void*, 10> d_weight{};
  for (Py_ssize_t i = 0; i < all.count; ++i) {
    if (needs_weights.items[i] != Py_True) {
      d_weights.push_back(py::none());
      continue;
    }
    const auto t = tensors.view(all.items[i]);
    if (t.ndim == 1) {
      d_weights.push_back(tensors.make(g.input, {t.shape[0]}, d_weight[i], kWidens, zeros));
    } else {
      d_weights.push_back(tensors.make(g.input, {t.shape[0], t.shape[1]}, d_weight[i], kWidens, zeros));
    }
  }
  if (!zeros) {
    const auto values = [&](Py_ssize_t i) { return static_cast<const T*>(tensors.view(saved.items[i]).data); };
    Py_ssize_t next = 0;
    const T* gates = kSavesGates[l.cell] ? values(next++) : nullptr;
    const T* extra = kExtras[l.cell] ? values(next++) : nullptr;
    const T* raw = l.weights[0].hr.object ? values(next++) : nullptr;
    const auto* output = static_cast<const S*>(tensors.view(g.output).data);
    const auto* d_output = g.grad_output == Py_None ? nullptr : static_cast<const S*>(tensors.view(g.grad_output).data);
    const auto* initial0 = static_cast<const S*>(tensors.view(states.items[0]).data);
    const T* initial1 = kStates[l.cell] < 2 ? nullptr
                                            : held.widened<S>(tensors.view(states.items[1]).data,
                                                              l.directions * s.batch * s.hidden);
    BackwardDirection<S> directions[2] = {};
    const Py_ssize_t each = all.count / l.directions;
    for (int i = 0; i < l.directions; ++i) {
      const Weights& w = l.weights[i];
      BackwardDirection<S>& d = directions[i];
      d.shape = s;
      d.reverse = i == 1;
      d.input = static_cast<const S*>(l.input);
      d.inputs = l.inputs;
      // The forward of a single step reads no packs, so that nothing is known of the weights it saw.
      const auto columns = [&](const Weight& weight) {
        return pack<S>(weight, Packing::kColumns, 1, l.threads, s.time > 1 || kWidens, held);
      };
      if (d_input[i]) d.weight_ih = columns(w.ih);
      d.weight_hh = columns(w.hh);
      d.weight_hr = columns(w.hr);
      if (gates) d.gates = gates + i * s.rows * l.gates() * s.hidden;
      if (extra) d.extra = extra + i * s.rows * s.hidden;
      if (raw) d.raw = raw + i * s.rows * s.hidden;
      d.output = output + i * s.proj;
      d.output_stride = d.d_output_stride = l.directions * s.proj;
      d.initial0 = initial0 + i * s.batch * s.proj;
      if (initial1) d.initial1 = initial1 + i * s.batch * s.hidden;
      if (d_output) d.d_output = d_output + i * s.proj;
      d.d_state0 = d_state[0] + i * s.batch * s.proj;
      if (d_state[1]) d.d_state1 = d_state[1] + i * s.batch * s.hidden;
      d.d_input = static_cast<S*>(d_input[i]);
      void* const* of = d_weight.data() + i * each;
      d.d_weight_ih = static_cast<T*>(of[0]);
      d.d_weight_hh = static_cast<T*>(of[1]);
      if (each >= 4) d.d_bias_ih = static_cast<T*>(of[2]), d.d_bias_hh = static_cast<T*>(of[3]);
      if (each % 2 == 1) d.d_weight_hr = static_cast<T*>(of[each - 1]);
      if (l.resets) d.resets = l.resets + i * s.rows;
    }
    const Kernels& k = kernels();
    run_beside(2 * l.work(), [&] { run_backward<S>(k, l.cell, directions, l.directions, l.threads); });
  }
  return py::make_tuple(list_of(d_inputs), list_of(d_weights), list_of(d_states));
}

// layer_backward(cell, threads, directions, input, batch_sizes, weights, states, output, saved, grad_output, grad_last,
// needs, resets) -> gradients of the input, one per direction, if it is needed, of the weights, and of the states; of
// bf16 the latter two are fp32. Everything is contiguous.
py::object layer_backward(PyObject* const* args) {
  const Tensors& tensors = Tensors::found();
  const Gradients g{args[3], args[6], args[7], args[8], args[9], args[10], args[11]};
  const auto x = tensors.view(g.input);
  const Layer l = read_layer(args[0], args[1], args[2], x, args[4], args[5], tensors.view(items_of(g.states).items[0]),
                             args[12], tensors);
  py::object result;
  for_storage(storage_of(x), [&](auto s) { result = backward_of<decltype(s)>(l, g, x, args[5], tensors); });
  return result;
}

// ---- a stack ------------------------------------------------------------------------------------------------------

enum Argument { kCell, kThreads, kInput, kBatchSizes, kHx, kParams, kHasBiases, kLayers, kBidirectional, kBatchFirst,
                kArguments };

// A stack's call, as torch._VF has it; hx None stands for zeros.
struct Stack {
  int cell, threads, layers, directions;
  bool batch_first;
  dlpack::Tensor input, states[2];
  bool has_states;
  Items params;
  Py_ssize_t each;  // weights per layer and direction
  Shape shape;
  int64_t inputs;
};

bool plain(PyObject* x, int storage, int dims, const Tensors& tensors, dlpack::Tensor& t) {
  return tensors.is_plain(x) && tensors.read(x, t) && t.ndim == dims && storage_of(t) == storage && is_contiguous(t);
}

bool is_list(PyObject* x) { return PyList_Check(x) || PyTuple_Check(x); }

bool read_batch_sizes(PyObject* object, const Tensors& tensors, Shape& s) {
  dlpack::Tensor t;
  if (!tensors.is_plain(object) || !tensors.read(object, t)) return false;
  if (t.ndim != 1 || t.type_code != dlpack::kInt || t.type_bits != 64 || !is_contiguous(t) || t.shape[0] == 0) return false;
  const auto* sizes = static_cast<const int64_t*>(t.data);
  s.batch_sizes = sizes;
  s.time = t.shape[0];
  s.batch = sizes[0];
  int64_t rows = 0, before = sizes[0];
  for (int64_t i = 0; i < s.time; ++i) {
    if (sizes[i] < 1 || sizes[i] > before) return false;
    before = sizes[i];
    rows += before;
  }
  return rows == s.rows;
}

// Whether these are plain tensors of one kind in the CPU's memory, whose shapes fit each other.
bool read_stack(PyObject* const* args, const Tensors& tensors, Stack& k) {
  k.cell = cell_of(args[kCell]);
  k.threads = integer(args[kThreads]);
  k.layers = integer(args[kLayers]);
  k.directions = args[kBidirectional] == Py_True ? 2 : 1;
  k.batch_first = args[kBatchFirst] == Py_True;
  const bool has_biases = args[kHasBiases] == Py_True, dense = args[kBatchSizes] == Py_None;
  if (!tensors.is_plain(args[kInput]) || !tensors.read(args[kInput], k.input) || !is_list(args[kParams])) return false;
  const dlpack::Tensor& x = k.input;
  const int storage = storage_of(x);
  if (storage < 0 || x.ndim != (dense ? 3 : 2)) return false;
  Shape& s = k.shape;
  s = {};
  k.inputs = x.shape[x.ndim - 1];
  if (k.inputs > 1 && x.strides[x.ndim - 1] != 1) return false;
  if (dense) {
    s.time = x.shape[k.batch_first ? 1 : 0];
    s.batch = x.shape[k.batch_first ? 0 : 1];
    s.rows = s.time * s.batch;
  } else {
    s.rows = x.shape[0];
    if (!is_contiguous(x) || !read_batch_sizes(args[kBatchSizes], tensors, s)) return false;
  }
  if (s.rows == 0 || k.inputs == 0 || k.layers < 1) return false;

  k.params = items_of(args[kParams]);
  const Py_ssize_t runs = k.layers * k.directions;
  k.each = k.params.count / runs;
  const Py_ssize_t least = has_biases ? 4 : 2;
  if (k.params.count != runs * k.each || k.each < least || k.each > least + 1) return false;
  dlpack::Tensor t;
  const int64_t gates = kGates[k.cell];
  if (!plain(k.params.items[1], storage, 2, tensors, t) || t.shape[0] == 0 || t.shape[0] % gates != 0) return false;
  s.hidden = t.shape[0] / gates;
  s.proj = t.shape[1];
  if ((k.each > least) != (s.proj != s.hidden) || s.proj == 0) return false;
  int64_t width = k.inputs;
  for (Py_ssize_t run = 0; run < runs; ++run) {
    if (run == k.directions) width = k.directions * s.proj;
    PyObject* const* w = k.params.items + run * k.each;
    const auto matrix = [&](PyObject* x, int64_t rows, int64_t columns) {
      return plain(x, storage, 2, tensors, t) && t.shape[0] == rows && t.shape[1] == columns;
    };
    if (!matrix(w[0], gates * s.hidden, width) || !matrix(w[1], gates * s.hidden, s.proj)) return false;
    for (int i = 2; i < least; ++i) {
      if (!plain(w[i], storage, 1, tensors, t) || t.shape[0] != gates * s.hidden) return false;
    }
    if (k.each > least && !matrix(w[least], s.proj, s.hidden)) return false;
  }

  k.has_states = args[kHx] != Py_None;
  if (!k.has_states) return true;
  PyObject* const lone[1] = {args[kHx]};
  const Items states = kStates[k.cell] == 1     ? Items{lone, 1}
                       : is_list(args[kHx]) ? items_of(args[kHx])
                                            : Items{nullptr, 0};
  if (states.count != kStates[k.cell]) return false;
  for (int i = 0; i < states.count; ++i) {
    dlpack::Tensor& state = k.states[i];
    if (!plain(states.items[i], storage, 3, tensors, state)) return false;
    if (state.shape[0] != runs || state.shape[1] != s.batch || state.shape[2] != (i == 0 ? s.proj : s.hidden)) return false;
  }
  return true;
}

// The input as [T, B, I] in one piece.
template <class S>
const S* in_time_order(const Stack& k, Held& held) {
  const auto* from = static_cast<const S*>(k.input.data);
  if (k.shape.batch_sizes) return from;
  const int64_t time = k.input.strides[k.batch_first ? 1 : 0], batch = k.input.strides[k.batch_first ? 0 : 1];
  const Shape& s = k.shape;
  if ((s.batch == 1 || batch == k.inputs) && (s.time == 1 || time == s.batch * k.inputs)) return from;
  S* const to = held.take<S>(s.rows * k.inputs);
  for (int64_t t = 0; t < s.time; ++t) {
    for (int64_t b = 0; b < s.batch; ++b) {
      memcpy(to + (t * s.batch + b) * k.inputs, from + t * time + b * batch, k.inputs * sizeof(S));
    }
  }
  return to;
}

template <class S>
py::object results_of(const Stack& k, PyObject* input, const Tensors& tensors) {
  using T = Acc<S>;
  constexpr bool kWidens = Storage<S>::kPerFactor > 1;
  const Shape& s = k.shape;
  const int64_t width = k.directions * s.proj;
  Held held;
  void* output;
  const auto made = s.batch_sizes ? tensors.make(input, {s.rows, width}, output)
                                  : tensors.make(input, {s.time, s.batch, width}, output);
  py::tuple result(1 + kStates[k.cell]);
  result[0] = made;
  T* state[2] = {};
  void* last[2] = {};
  const auto columns = [&](int i) { return i == 0 ? s.proj : s.hidden; };
  const auto length = [&](int i) { return k.layers * k.directions * s.batch * columns(i); };
  for (int i = 0; i < kStates[k.cell]; ++i) {
    result[1 + i] = tensors.make(input, {k.layers * k.directions, s.batch, columns(i)}, last[i]);
    state[i] = kWidens ? held.take<T>(length(i)) : static_cast<T*>(last[i]);
    if (k.has_states) {
      convert(static_cast<const S*>(k.states[i].data), state[i], length(i));
    } else {
      memset(state[i], 0, length(i) * sizeof(T));
    }
  }
  const S* from = in_time_order<S>(k, held);
  // A layer may begin while the one before it goes on: what the one after it writes has been read by then.
  S* between[2] = {};
  for (int i = 0; i < 2 && i + 1 < k.layers; ++i) between[i] = held.take<S>(s.rows * width);
  const bool at_once = k.directions == 1 && k.layers > 1 && width % Storage<S>::kPerFactor == 0;
  std::vector<ForwardDirection<S>> all(at_once ? k.layers : 0);
  int64_t work = 0;
  for (int layer = 0; layer < k.layers; ++layer) {
    Layer l{};
    l.cell = k.cell;
    l.threads = k.threads;
    l.directions = k.directions;
    l.shape = s;
    l.inputs = layer == 0 ? k.inputs : width;
    l.input = from;
    for (int i = 0; i < k.directions; ++i) {
      l.weights[i] = weights_of(k.params.items + (layer * k.directions + i) * k.each, k.each, tensors);
    }
    S* const to = layer + 1 == k.layers ? static_cast<S*>(output) : between[layer % 2];
    const int64_t run = layer * k.directions * s.batch;
    T* const start[2] = {state[0] + run * s.proj, state[1] ? state[1] + run * s.hidden : nullptr};
    if (at_once) {
      describe<S>(l, to, start, nullptr, nullptr, nullptr, &all[layer], held);
      work += l.work();
    } else {
      forward<S>(l, to, start, nullptr, nullptr, nullptr, held);
    }
    from = to;
  }
  if (at_once) {
    const Kernels& table = kernels();
    run_beside(work, [&] { run_stack<S>(table, k.cell, all.data(), k.layers, k.threads); });
  }
  if (kWidens) {
    for (int i = 0; i < kStates[k.cell]; ++i) convert(state[i], static_cast<S*>(last[i]), length(i));
  }
  return std::move(result);
}

// layers(*Argument): the output, time first, and the last states; None where the ordinary way has to be taken.
py::object layers(PyObject* const* args) {
  const Tensors& tensors = Tensors::found();
  Stack stack;
  if (!read_stack(args, tensors, stack)) return py::none();
  py::object result;
  for_storage(storage_of(stack.input), [&](auto s) { result = results_of<decltype(s)>(stack, args[kInput], tensors); });
  return result;
}

// fits(*Argument): whether `layers` would run it.
py::object fits(PyObject* const* args) {
  Stack stack;
  return py::bool_(read_stack(args, Tensors::found(), stack));
}

PyMethodDef methods[] = {
    fast_method<layer_forward, 9>("layer_forward", "one layer -> (output, last states, saved)"),
    fast_method<layer_backward, 13>("layer_backward", "-> gradients of input (by direction), weights, states"),
    fast_method<layers, kArguments>("layers", "a stack -> (output, *last states), or None"),
    fast_method<fits, kArguments>("fits", "whether `layers` knows these arguments"),
};

}  // namespace

void bind_layer(py::module_& m) { add_methods(m, methods); }
