// A stack of layers, as torch._VF has it: looked at, and run where nobody looks on (no gradient, no tracer).
#include <algorithm>
#include <array>

#include "layer.h"

using namespace fusedrnn;

namespace {

enum Argument { kCell, kThreads, kInput, kBatchSizes, kHx, kParams, kHasBiases, kLayers, kBidirectional, kBatchFirst,
                kWatched, kArguments };

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
  const int64_t gates = kTraits[k.cell].gates;
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
  const Items states = kTraits[k.cell].states == 1     ? Items{lone, 1}
                       : is_list(args[kHx]) ? items_of(args[kHx])
                                            : Items{nullptr, 0};
  if (states.count != kTraits[k.cell].states) return false;
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
  py::tuple result(1 + kTraits[k.cell].states);
  result[0] = made;
  T* state[2] = {};
  void* last[2] = {};
  const auto columns = [&](int i) { return i == 0 ? s.proj : s.hidden; };
  const auto length = [&](int i) { return k.layers * k.directions * s.batch * columns(i); };
  for (int i = 0; i < kTraits[k.cell].states; ++i) {
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
    for (int i = 0; i < kTraits[k.cell].states; ++i) convert(state[i], static_cast<S*>(last[i]), length(i));
  }
  return std::move(result);
}

// layers(*Argument): the output, time first, and the last states; True of a call that is watched, which is not run; None
// where the ordinary way has to be taken.
py::object layers(PyObject* const* args) {
  const Tensors& tensors = Tensors::found();
  // A list as it is now, for whose tensors another thread may put others while this one runs without the GIL.
  std::array<PyObject*, kArguments> now;
  std::copy(args, args + kArguments, now.begin());
  py::object kept[2];
  for (const auto which : {kParams, kHx}) {
    if (!PyList_Check(args[which])) continue;
    py::object& tuple = kept[which == kHx];
    tuple = py::reinterpret_steal<py::object>(PyList_AsTuple(args[which]));
    if (!tuple) throw py::error_already_set();
    now[which] = tuple.ptr();
  }
  Stack stack;
  if (!read_stack(now.data(), tensors, stack)) return py::none();
  if (args[kWatched] == Py_True) return py::bool_(true);
  py::object result;
  for_storage(storage_of(stack.input), [&](auto s) { result = results_of<decltype(s)>(stack, args[kInput], tensors); });
  return result;
}

PyMethodDef methods[] = {
    fast_method<layers, kArguments>("layers", "a stack -> (output, *last states), True or None"),
};

}  // namespace

void bind_stack(py::module_& m) { add_methods(m, methods); }
