// Layers of torch's tensors, forward and backward, each a plain CPython function. They trust their arguments.
#include "layer.h"

using namespace fusedrnn;

namespace {

// Layers that follow each other, all of one kind; of several, each has one direction and a dense input.
struct Layers {
  Layer first;      // with the weights of the first one, and what is common to all
  Items weights;    // of all layers and directions
  Py_ssize_t each;  // of a direction
  int layers;

  // The k-th one, on an input.
  Layer layer(int k, const void* input, const Tensors& tensors) const {
    if (k == 0) return first;
    Layer l = first;
    l.inputs = l.shape.proj;
    l.input = input;
    l.weights[0] = weights_of(weights.items + k * each, each, tensors);
    return l;
  }
  // Values of a state, of one layer and of all.
  int64_t columns(int i) const { return i == 0 ? first.shape.proj : first.shape.hidden; }
  int64_t state_size(int i) const { return first.directions * first.shape.batch * columns(i); }
  int64_t runs() const { return layers * first.directions; }
};

// What a forward and a backward are given of layers.
struct Given {
  PyObject *cell, *threads, *directions, *layers, *input, *batch_sizes, *weights, *states, *resets;
};

Layers read_layers(const Given& g, const Tensors& tensors) {
  Layers k{};
  Layer& l = k.first;
  l.cell = cell_of(g.cell);
  l.threads = integer(g.threads);
  l.directions = integer(g.directions);
  k.layers = integer(g.layers);
  if (l.directions != 1 && l.directions != 2) throw std::invalid_argument("directions: expected 1 or 2");
  const bool plain = l.directions == 1 && g.batch_sizes == Py_None && g.resets == Py_None;
  if (k.layers < 1 || (k.layers > 1 && !plain)) {
    throw std::invalid_argument("layers: expected 1, or dense ones of one direction");
  }
  k.weights = items_of(g.weights);
  k.each = k.weights.count / k.runs();
  if (k.each < 2 || k.each > 5) throw std::invalid_argument("weights: expected 2 to 5 per direction");
  for (int i = 0; i < l.directions; ++i) l.weights[i] = weights_of(k.weights.items + i * k.each, k.each, tensors);
  const auto input = tensors.view(g.input), state = tensors.view(items_of(g.states).items[0]);
  l.inputs = input.shape[input.ndim - 1];
  l.input = input.data;
  Shape& s = l.shape;
  s.batch = state.shape[1];
  s.proj = state.shape[2];
  s.hidden = l.weights[0].hh.t.shape[0] / l.gates();
  if (g.batch_sizes == Py_None) {
    s.time = input.shape[0];
    s.rows = s.time * input.shape[1];
  } else {
    const auto sizes = tensors.view(g.batch_sizes);
    s.batch_sizes = static_cast<const int64_t*>(sizes.data);
    s.time = sizes.shape[0];
    s.rows = input.shape[0];
  }
  if (g.resets != Py_None) l.resets = static_cast<const bool*>(tensors.view(g.resets).data);
  return k;
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
py::object forward_of(const Layers& k, bool save, PyObject* input, const dlpack::Tensor& x, const Items& states,
                      const Tensors& tensors) {
  using T = Acc<S>;
  constexpr bool kWidens = Storage<S>::kPerFactor > 1;
  const Layer& first = k.first;
  const Shape& s = first.shape;
  const int64_t width = first.directions * s.proj;
  Held held;
  T* state[2] = {};
  void* last_at[2] = {};
  std::vector<py::object> outputs, last, saved;
  for (int i = 0; i < first.traits().states; ++i) {
    const int64_t length = k.layers * k.state_size(i);
    last.push_back(tensors.make(input, {k.runs(), s.batch, k.columns(i)}, last_at[i]));
    state[i] = kWidens ? held.take<T>(length) : static_cast<T*>(last_at[i]);
    convert(static_cast<const S*>(tensors.view(states.items[i]).data), state[i], length);
  }
  // What a layer's input is filled up with has to be there before it begins.
  const bool at_once = k.layers > 1 && width % Storage<S>::kPerFactor == 0;
  std::vector<ForwardDirection<S>> all(at_once ? k.layers : 0);
  const void* from = first.input;
  for (int i = 0; i < k.layers; ++i) {
    const Layer l = k.layer(i, from, tensors);
    void *output, *gates = nullptr, *extra = nullptr, *raw = nullptr;
    outputs.push_back(output_like(input, x, width, output, tensors));
    if (save) {
      const auto keep = [&](int64_t columns, void*& data) {
        saved.push_back(tensors.make(input, {l.directions, s.rows, columns}, data, kWidens));
      };
      if (l.traits().saves_gates) keep(l.gates() * s.hidden, gates);
      if (l.traits().has_extra) keep(s.hidden, extra);
      if (l.weights[0].hr.object) keep(s.hidden, raw);
    }
    T* const start[2] = {state[0] + i * k.state_size(0), state[1] ? state[1] + i * k.state_size(1) : nullptr};
    const auto values = [](void* data) { return static_cast<T*>(data); };
    auto* const to = static_cast<S*>(output);
    if (at_once) {
      describe<S>(l, to, start, values(gates), values(extra), values(raw), &all[i], held);
    } else if (s.rows > 0) {
      forward<S>(l, to, start, values(gates), values(extra), values(raw), held);
    }
    from = output;
  }
  if (at_once && s.rows > 0) {
    const Kernels& table = kernels();
    run_beside(k.layers * first.work(), [&] { run_stack<S>(table, first.cell, all.data(), k.layers, first.threads); });
  }
  if (kWidens) {
    for (int i = 0; i < first.traits().states; ++i) {
      convert(state[i], static_cast<S*>(last_at[i]), k.layers * k.state_size(i));
    }
  }
  return py::make_tuple(list_of(outputs), list_of(last), list_of(saved));
}

// layer_forward(*Argument) -> (the output of each layer, last states, what each has saved): docs/architecture.md, "The
// layer". Everything is contiguous, and of fp32, fp64 or bf16. Weights and states are those of all layers, whose number
// is 1 unless they are dense and of one direction, without resets.
py::object layer_forward(PyObject* const* args) {
  enum { kCell, kThreads, kDirections, kLayers, kSave, kInput, kBatchSizes, kWeights, kStates, kResets };
  const Tensors& tensors = Tensors::found();
  const Layers k = read_layers({args[kCell], args[kThreads], args[kDirections], args[kLayers], args[kInput],
                                args[kBatchSizes], args[kWeights], args[kStates], args[kResets]},
                               tensors);
  const auto x = tensors.view(args[kInput]);
  py::object result;
  for_storage(storage_of(x), [&](auto s) {
    using S = decltype(s);
    result = forward_of<S>(k, integer(args[kSave]) != 0, args[kInput], x, items_of(args[kStates]), tensors);
  });
  return result;
}

// ---- its gradient -------------------------------------------------------------------------------------------------

struct Gradients {
  PyObject *input, *states, *outputs, *saved, *grad_output, *grad_last, *needs;
};

// The i-th of all weights: two matrices for the gates, their biases or none, and a matrix behind them.
template <class S>
void check_weight(const Layers& k, Py_ssize_t i, const Tensors& tensors) {
  const Shape& s = k.first.shape;
  const int64_t rows = k.first.gates() * s.hidden, kind = i % k.each;
  const bool is_last_of_odd = k.each % 2 == 1 && kind == k.each - 1;
  const int64_t inputs = i < k.first.directions * k.each ? k.first.inputs : s.proj;
  const int64_t size = is_last_of_odd ? s.proj * s.hidden
                       : kind == 0    ? rows * inputs
                       : kind == 1    ? rows * s.proj
                                      : rows;
  tensors.kept<S>(k.weights.items[i], size);
}

template <class S>
py::object backward_of(const Layers& k, const Gradients& g, const dlpack::Tensor& x, const Tensors& tensors) {
  using T = Acc<S>;
  constexpr bool kWidens = Storage<S>::kPerFactor > 1;
  const Layer& first = k.first;
  const Shape& s = first.shape;
  const Items states = items_of(g.states), last = items_of(g.grad_last), needs = items_of(g.needs);
  const Items needs_weights = items_of(needs.items[1]), saved = items_of(g.saved), outputs = items_of(g.outputs);
  const bool zeros = s.rows == 0;
  tensors.kept<S>(g.input, s.rows * first.inputs);
  for (Py_ssize_t i = 0; i < k.weights.count; ++i) check_weight<S>(k, i, tensors);
  Held held;

  T* d_state[2] = {};
  std::vector<py::object> d_inputs, d_weights, d_states;
  const Items needs_states = items_of(needs.items[2]);
  for (int i = 0; i < first.traits().states; ++i) {
    const int64_t n = k.layers * k.state_size(i);
    if (needs_states.items[i] == Py_True) {
      void* data;
      d_states.push_back(tensors.make(g.input, {k.runs(), s.batch, k.columns(i)}, data, kWidens));
      d_state[i] = static_cast<T*>(data);
    } else {
      d_states.push_back(py::none());
      d_state[i] = held.take<T>(n);
    }
    if (last.items[i] == Py_None) {
      memset(d_state[i], 0, n * sizeof(T));
    } else {
      convert(tensors.kept<S>(last.items[i], n), d_state[i], n);
    }
  }
  void* d_input[2] = {};
  if (needs.items[0] == Py_True) {
    for (int i = 0; i < first.directions; ++i) {
      if (x.ndim == 2) {
        d_inputs.push_back(tensors.make(g.input, {x.shape[0], x.shape[1]}, d_input[i], false, zeros));
      } else {
        d_inputs.push_back(tensors.make(g.input, {x.shape[0], x.shape[1], x.shape[2]}, d_input[i], false, zeros));
      }
    }
  }
  std::vector<void*> d_weight(static_cast<size_t>(k.weights.count));
  for (Py_ssize_t i = 0; i < k.weights.count; ++i) {
    if (needs_weights.items[i] != Py_True) {
      d_weights.push_back(py::none());
      continue;
    }
    const auto t = tensors.view(k.weights.items[i]);
    if (t.ndim == 1) {
      d_weights.push_back(tensors.make(g.input, {t.shape[0]}, d_weight[i], kWidens, zeros));
    } else {
      d_weights.push_back(tensors.make(g.input, {t.shape[0], t.shape[1]}, d_weight[i], kWidens, zeros));
    }
  }
  const int64_t output_size = s.rows * first.directions * s.proj;
  const S* d_output = g.grad_output == Py_None ? nullptr : tensors.kept<S>(g.grad_output, output_size);
  const auto initial = [&](int i) { return tensors.kept<S>(states.items[i], k.layers * k.state_size(i)); };
  const S* initial0 = initial(0);
  const T* initial1 = first.traits().states < 2 ? nullptr : held.widened<S>(initial(1), k.layers * k.state_size(1));
  const Py_ssize_t saves = saved.count / k.layers;
  // Gradients of what goes from layer to layer: where one has read what another writes next, as in the forward.
  S* between[2] = {};
  for (int i = 0; i < 2 && i + 1 < k.layers; ++i) between[i] = held.take<S>(s.rows * s.proj);
  std::vector<BackwardDirection<S>> all;  // from the last layer on
  for (int layer = zeros ? -1 : k.layers - 1; layer >= 0; --layer) {
    const void* const from = layer == 0 ? nullptr : tensors.kept<S>(outputs.items[layer - 1], output_size);
    const Layer l = k.layer(layer, from, tensors);
    PyObject* const* next = saved.items + layer * saves;
    const auto values = [&](int64_t columns) { return tensors.kept<T>(*next++, l.directions * s.rows * columns); };
    const T* gates = l.traits().saves_gates ? values(l.gates() * s.hidden) : nullptr;
    const T* extra = l.traits().has_extra ? values(s.hidden) : nullptr;
    const T* raw = l.weights[0].hr.object ? values(s.hidden) : nullptr;
    const S* output = tensors.kept<S>(outputs.items[layer], output_size);
    for (int i = 0; i < l.directions; ++i) {
      const Weights& w = l.weights[i];
      BackwardDirection<S> d{};
      const int64_t run = (layer * l.directions + i) * s.batch;
      d.shape = s;
      d.reverse = i == 1;
      d.input = static_cast<const S*>(l.input);
      d.inputs = l.inputs;
      d.d_input = layer == 0 ? static_cast<S*>(d_input[i]) : between[(layer - 1) % 2];
      // The forward of a single step reads no packs, so that nothing is known of the weights it saw.
      const auto columns = [&](const Weight& weight) {
        return pack<S>(weight, Packing::kColumns, 1, l.threads, s.time > 1 || kWidens, held);
      };
      if (d.d_input) d.weight_ih = columns(w.ih);
      d.weight_hh = columns(w.hh);
      d.weight_hr = columns(w.hr);
      if (gates) d.gates = gates + i * s.rows * l.gates() * s.hidden;
      if (extra) d.extra = extra + i * s.rows * s.hidden;
      if (raw) d.raw = raw + i * s.rows * s.hidden;
      d.output = output + i * s.proj;
      d.output_stride = d.d_output_stride = l.directions * s.proj;
      d.initial0 = initial0 + run * s.proj;
      if (initial1) d.initial1 = initial1 + run * s.hidden;
      if (d_output) d.d_output = d_output + i * s.proj;
      d.d_state0 = d_state[0] + run * s.proj;
      if (d_state[1]) d.d_state1 = d_state[1] + run * s.hidden;
      void* const* of = d_weight.data() + (layer * l.directions + i) * k.each;
      d.d_weight_ih = static_cast<T*>(of[0]);
      d.d_weight_hh = static_cast<T*>(of[1]);
      if (k.each >= 4) d.d_bias_ih = static_cast<T*>(of[2]), d.d_bias_hh = static_cast<T*>(of[3]);
      if (k.each % 2 == 1) d.d_weight_hr = static_cast<T*>(of[k.each - 1]);
      if (l.resets) d.resets = l.resets + i * s.rows;
      all.push_back(d);
    }
    d_output = between[(layer + 1) % 2];
  }
  if (!zeros) {
    const Kernels& table = kernels();
    run_beside(2 * k.layers * first.work(), [&] {
      if (k.layers > 1) return run_stack<S>(table, first.cell, all.data(), k.layers, first.threads);
      run_backward<S>(table, first.cell, all.data(), first.directions, first.threads);
    });
  }
  return py::make_tuple(list_of(d_inputs), list_of(d_weights), list_of(d_states));
}

// layer_backward(*Argument) -> gradients of the input, one per direction, if it is needed, of the weights, and of the
// states; of bf16 the latter two are fp32. Everything is contiguous, and as in layer_forward.
py::object layer_backward(PyObject* const* args) {
  enum { kCell, kThreads, kDirections, kLayers, kInput, kBatchSizes, kWeights, kStates, kOutputs, kSaved, kGradOutput,
         kGradLast, kNeeds, kResets };
  const Tensors& tensors = Tensors::found();
  const Gradients g{args[kInput],      args[kStates],   args[kOutputs], args[kSaved],
                    args[kGradOutput], args[kGradLast], args[kNeeds]};
  const Layers k = read_layers({args[kCell], args[kThreads], args[kDirections], args[kLayers], args[kInput],
                                args[kBatchSizes], args[kWeights], args[kStates], args[kResets]},
                               tensors);
  const auto x = tensors.view(g.input);
  py::object result;
  for_storage(storage_of(x), [&](auto s) { result = backward_of<decltype(s)>(k, g, x, tensors); });
  return result;
}

PyMethodDef methods[] = {
    fast_method<layer_forward, 10>("layer_forward", "layers -> (outputs, last states, saved)"),
    fast_method<layer_backward, 14>("layer_backward", "-> gradients of input (by direction), weights, states"),
};

}  // namespace

void bind_layer(py::module_& m) { add_methods(m, methods); }
