// One layer of torch's tensors, forward and backward, each a plain CPython function. They trust their arguments.
#include "layer.h"

#include <array>

using namespace fusedrnn;

namespace {

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

PyMethodDef methods[] = {
    fast_method<layer_forward, 9>("layer_forward", "one layer -> (output, last states, saved)"),
    fast_method<layer_backward, 13>("layer_backward", "-> gradients of input (by direction), weights, states"),
};

}  // namespace

void bind_layer(py::module_& m) { add_methods(m, methods); }
