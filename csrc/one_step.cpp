// One step of a cell, or of a layer of one direction, behind one plain CPython function: where a step is small its
// time is mostly the call. It reads the weights where they lie, so that nothing can be out of date.
#include <pybind11/pybind11.h>

#include "cells/table.h"
#include "cpu/attend_run.h"
#include "cpu/buffer.h"
#include "cpu/dispatch.h"
#include "fast_call.h"
#include "tensors.h"

namespace py = pybind11;
using namespace fusedrnn;

namespace {

enum Argument { kCell, kThreads, kIsLayer, kInput, kHidden, kCellState, kWeightIh, kWeightHh, kBiasIh, kBiasHh,
                kArguments };

bool same_rows(const dlpack::Tensor& a, const dlpack::Tensor& b) {
  if (a.ndim != b.ndim) return false;
  for (int i = 0; i + 1 < a.ndim; ++i) {
    if (a.shape[i] != b.shape[i]) return false;
  }
  return true;
}

struct Step {
  Projection x{}, h{};
  CellUpdate update{};
  dlpack::Tensor input, hidden;
};

bool read_tensor(PyObject* x, dlpack::Tensor& t) {
  return Tensors::found().is_plain(x) && Tensors::found().read(x, t);
}

bool read_projection(PyObject* weight, PyObject* bias, int64_t inputs, int64_t outputs, Projection& p) {
  dlpack::Tensor t;
  int64_t rows;
  if (!read_tensor(weight, t) || t.ndim != 2 || t.shape[0] != outputs || t.shape[1] != inputs) return false;
  if (!read_rows(t, rows, p.weight_stride)) return false;
  p.inputs = inputs;
  p.outputs = outputs;
  p.weight = static_cast<const float*>(t.data);
  if (bias == Py_None) return true;
  if (!read_tensor(bias, t) || !dlpack::is_float32(t) || !is_vector(t, outputs)) return false;
  p.bias = static_cast<const float*>(t.data);
  return true;
}

// Whether all tensors are what this function knows, and fit. A stack's states have the layers as their first
// dimension, which is one here, where the input has time.
bool read(int cell, bool is_layer, PyObject* const* args, Step& step) {
  dlpack::Tensor other;
  CellUpdate& u = step.update;
  if (!read_tensor(args[kInput], step.input) || !read_rows(step.input, u.rows, step.x.x_stride)) return false;
  if (!read_tensor(args[kHidden], step.hidden) || !read_rows(step.hidden, step.h.rows, u.h_stride)) return false;
  u.hidden = step.hidden.shape[step.hidden.ndim - 1];
  if (step.h.rows != u.rows || step.input.ndim != step.hidden.ndim) return false;
  if (is_layer ? step.hidden.shape[0] != 1 : !same_rows(step.input, step.hidden)) return false;
  u.h = static_cast<const float*>(step.hidden.data);
  if ((args[kCellState] != Py_None) != (kTraits[cell].states == 2)) return false;
  if (kTraits[cell].states == 2) {
    int64_t rows;
    if (!read_tensor(args[kCellState], other) || !read_rows(other, rows, u.c_stride)) return false;
    if (!same_rows(other, step.hidden) || other.shape[other.ndim - 1] != u.hidden) return false;
    u.c = static_cast<const float*>(other.data);
  }
  const int64_t inputs = step.input.shape[step.input.ndim - 1], gates = kTraits[cell].gates * u.hidden;
  if (u.rows == 0 || u.hidden == 0 || inputs == 0) return false;
  step.x.rows = u.rows;
  step.x.x = static_cast<const float*>(step.input.data);
  step.h.x = u.h;
  step.h.x_stride = u.h_stride;
  return read_projection(args[kWeightIh], args[kBiasIh], inputs, gates, step.x) &&
         read_projection(args[kWeightHh], args[kBiasHh], u.hidden, gates, step.h);
}

// one_step(*Argument): the new states in a tuple, of a layer its output before them; or None where the ordinary way
// has to be taken.
py::object one_step(PyObject* const* args) {
  const int cell = integer(args[kCell]), threads = integer(args[kThreads]);
  if (cell < 0 || cell >= kCells) throw std::invalid_argument("cell: unknown index");
  Step step;
  const bool is_layer = args[kIsLayer] == Py_True;
  if (!read(cell, is_layer, args, step)) return py::none();
  CellUpdate& u = step.update;
  const Tensors& tensors = Tensors::found();
  py::object made[3];
  int results = 0;
  if (is_layer) made[results++] = tensors.make_like(args[kInput], step.input, u.hidden, u.output);
  made[results++] = tensors.make_like(args[kHidden], step.hidden, u.hidden, u.h_new);
  if (u.c) made[results++] = tensors.make_like(args[kCellState], step.hidden, u.hidden, u.c_new);
  const int64_t gates = step.x.outputs;
  const Buffer scratch = allocate(2 * u.rows * gates * sizeof(float));
  u.x_gates = step.x.out = reinterpret_cast<float*>(scratch.get());
  u.h_gates = step.h.out = step.x.out + u.rows * gates;
  const Kernels& k = kernels();
  const auto run = [&] {
    run_projection(k, step.x, threads);
    run_projection(k, step.h, threads);
    k.update[cell](u);
  };
  run_beside(u.rows * gates * (step.x.inputs + u.hidden), run);
  py::tuple result(results);
  for (int i = 0; i < results; ++i) result[i] = std::move(made[i]);
  return std::move(result);
}

PyMethodDef methods[] = {
    fast_method<one_step, kArguments>(
        "one_step", "one_step(cell, threads, is_layer, input, h, c, weight_ih, weight_hh, bias_ih, bias_hh)"),
};

}  // namespace

void bind_one_step(py::module_& m) { add_methods(m, methods); }
