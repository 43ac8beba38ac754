// The projections around an attend, of torch's tensors: fp32, behind plain CPython functions that answer None to
// whatever they do not know.
#include <pybind11/pybind11.h>

#include "cpu/buffer.h"
#include "cpu/dispatch.h"
#include "fast_call.h"
#include "packs.h"
#include "tensors.h"

namespace py = pybind11;
using namespace fusedrnn;

namespace {

bool read_plain(PyObject* object, const Tensors& tensors, dlpack::Tensor& t) {
  return tensors.is_plain(object) && tensors.read(object, t) && dlpack::is_float32(t) && is_contiguous(t);
}

struct Sizes {
  int64_t rows, inputs, outputs;
};

// Of x [..., I] and weight [O, I]; nothing is empty.
bool read_sizes(const dlpack::Tensor& x, const dlpack::Tensor& weight, Sizes& s) {
  if (weight.ndim != 2 || x.ndim < 1) return false;
  s = {0, weight.shape[1], weight.shape[0]};
  if (s.inputs == 0 || s.outputs == 0 || x.shape[x.ndim - 1] != s.inputs) return false;
  s.rows = count_of(x) / s.inputs;
  return s.rows > 0;
}

// linear_forward(threads, x [..., I], weight [O, I], bias [O] or None, whether a packed weight is kept) -> [..., O],
// or None.
py::object forward(PyObject* const* args) {
  enum { kThreads, kX, kWeight, kBias, kKeep };
  const Tensors& tensors = Tensors::found();
  const int threads = integer(args[kThreads]);
  dlpack::Tensor x, weight, bias;
  Sizes s;
  if (!read_plain(args[kX], tensors, x) || !read_plain(args[kWeight], tensors, weight)) return py::none();
  if (!read_sizes(x, weight, s)) return py::none();
  LinearForward l{s.rows, s.inputs, s.outputs, static_cast<const float*>(x.data), nullptr, nullptr, nullptr};
  if (args[kBias] != Py_None) {
    if (!read_plain(args[kBias], tensors, bias) || !is_vector(bias, s.outputs)) return py::none();
    l.bias = static_cast<const float*>(bias.data);
  }
  const auto pack = args[kKeep] == Py_True ? packed(args[kWeight], weight, Packing::kRows, 1, threads, false)
                                           : packed_once(weight, Packing::kRows, 1, threads);
  l.weight = reinterpret_cast<const float*>(pack.get());
  const auto out = tensors.make_like(args[kX], x, s.outputs, l.out);
  const Kernels& k = kernels();
  {
    const py::gil_scoped_release release;
    run_linear(k, l, threads);
  }
  return out;
}

// linear_backward(threads, d_out [..., O], x, weight, whether d_x, d_weight, d_bias are needed) -> those, None where
// not.
py::object backward(PyObject* const* args) {
  enum { kThreads, kOut, kX, kWeight, kNeedsX, kNeedsWeight, kNeedsBias };
  const Tensors& tensors = Tensors::found();
  const int threads = integer(args[kThreads]);
  dlpack::Tensor d_out, x, weight;
  Sizes s;
  if (!read_plain(args[kOut], tensors, d_out) || !read_plain(args[kX], tensors, x)) return py::none();
  if (!read_plain(args[kWeight], tensors, weight)) return py::none();
  if (!read_sizes(x, weight, s) || count_of(d_out) != s.rows * s.outputs) return py::none();
  const int64_t panel_bytes = panel_scratch(sizeof(float)) * static_cast<int64_t>(sizeof(float));
  const Buffer panels = allocate(std::max(threads, 1) * panel_bytes);
  LinearBackward l{s.rows, s.inputs, s.outputs};
  l.x = static_cast<const float*>(x.data);
  l.d_out = static_cast<const float*>(d_out.data);
  l.panels = reinterpret_cast<float*>(panels.get());
  py::object made[3] = {py::none(), py::none(), py::none()};
  std::shared_ptr<const char> pack;
  if (args[kNeedsX] == Py_True) {
    pack = packed_once(weight, Packing::kColumns, 1, threads);
    l.weight = reinterpret_cast<const float*>(pack.get());
    made[0] = tensors.make_like(args[kX], x, s.inputs, l.d_x);
  }
  if (args[kNeedsWeight] == Py_True) made[1] = tensors.make_like(args[kWeight], weight, s.inputs, l.d_weight);
  if (args[kNeedsBias] == Py_True) {
    void* data;
    made[2] = tensors.make(args[kWeight], {s.outputs}, data);
    l.d_bias = static_cast<float*>(data);
  }
  const Kernels& k = kernels();
  {
    const py::gil_scoped_release release;
    run_linear(k, l, threads);
  }
  return py::make_tuple(made[0], made[1], made[2]);
}

PyMethodDef methods[] = {
    fast_method<forward, 5>("linear_forward", "x @ weight.T + bias"),
    fast_method<backward, 7>("linear_backward", "-> gradients of x, weight and bias"),
};

}  // namespace

void bind_linear(py::module_& m) { add_methods(m, methods); }
