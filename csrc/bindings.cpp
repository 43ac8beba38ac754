// fusedrnn._C: raw pointers as integers, nothing of torch. Callers have validated everything;
// shapes of the pointers are in cpu/scan.h.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "cpu/dispatch.h"

namespace py = pybind11;
using namespace fusedrnn;

void bind_stepper(py::module_& m);
void bind_attend(py::module_& m);
void bind_attend_step(py::module_& m);
void bind_one_step(py::module_& m);
void bind_cuda(py::module_& m);

namespace {

template <class P>
P* pointer(const py::handle& address) {
  return reinterpret_cast<P*>(PyLong_AsSize_t(address.ptr()));
}

int64_t integer(const py::handle& value) { return PyLong_AsLongLong(value.ptr()); }

// (T, B, H, P, N, batch_sizes), the first fields of a direction.
Shape read_shape(const py::tuple& t) {
  return {integer(t[0]), integer(t[1]), integer(t[2]),
          integer(t[3]), integer(t[4]), pointer<const int64_t>(t[5])};
}

// A direction comes as one tuple in the order of the struct's fields: parsing named arguments
// would cost more than a short scan.
template <class S>
void read(const py::tuple& t, ForwardDirection<S>& d) {
  using T = Acc<S>;
  if (t.size() != 23) throw std::invalid_argument("forward: a direction has 23 fields");
  d.shape = read_shape(t);
  d.reverse = integer(t[6]) != 0;
  d.input = pointer<const S>(t[7]);
  d.inputs = integer(t[8]);
  d.packed = integer(t[9]) != 0;
  d.weight_ih = pointer<const Factor<S>>(t[10]);
  d.weight_hh = pointer<const Factor<S>>(t[11]);
  d.bias_ih = pointer<const T>(t[12]);
  d.bias_hh = pointer<const T>(t[13]);
  d.weight_hr = pointer<const Factor<S>>(t[14]);
  d.output = pointer<S>(t[15]);
  d.output_stride = integer(t[16]);
  d.state0 = pointer<T>(t[17]);
  d.state1 = pointer<T>(t[18]);
  d.gates = pointer<T>(t[19]);
  d.extra = pointer<T>(t[20]);
  d.raw = pointer<T>(t[21]);
  d.resets = pointer<const bool>(t[22]);
}

template <class S>
void read(const py::tuple& t, BackwardDirection<S>& d) {
  using T = Acc<S>;
  if (t.size() != 30) throw std::invalid_argument("backward: a direction has 30 fields");
  d.shape = read_shape(t);
  d.reverse = integer(t[6]) != 0;
  d.input = pointer<const S>(t[7]);
  d.inputs = integer(t[8]);
  d.weight_ih = pointer<const Factor<S>>(t[9]);
  d.weight_hh = pointer<const Factor<S>>(t[10]);
  d.weight_hr = pointer<const Factor<S>>(t[11]);
  d.gates = pointer<const T>(t[12]);
  d.extra = pointer<const T>(t[13]);
  d.raw = pointer<const T>(t[14]);
  d.output = pointer<const S>(t[15]);
  d.output_stride = integer(t[16]);
  d.initial0 = pointer<const S>(t[17]);
  d.initial1 = pointer<const T>(t[18]);
  d.d_output = pointer<const S>(t[19]);
  d.d_output_stride = integer(t[20]);
  d.d_state0 = pointer<T>(t[21]);
  d.d_state1 = pointer<T>(t[22]);
  d.d_input = pointer<S>(t[23]);
  d.d_weight_ih = pointer<T>(t[24]);
  d.d_weight_hh = pointer<T>(t[25]);
  d.d_bias_ih = pointer<T>(t[26]);
  d.d_bias_hh = pointer<T>(t[27]);
  d.d_weight_hr = pointer<T>(t[28]);
  d.resets = pointer<const bool>(t[29]);
}

template <class Direction, class Run>
void scan(int cell, int threads, const py::args& directions, Run run) {
  if (cell < 0 || cell >= kCells) throw std::invalid_argument("cell: unknown index");
  const int count = static_cast<int>(directions.size());
  if (count != 1 && count != 2) throw std::invalid_argument("directions: expected 1 or 2");
  Direction d[2] = {};
  for (int i = 0; i < count; ++i) read(py::reinterpret_borrow<py::tuple>(directions[i]), d[i]);
  if (PyErr_Occurred()) throw py::error_already_set();
  const Kernels& k = kernels();
  py::gil_scoped_release release;
  run(k, cell, d, count, threads);
}

// f(S{}) for the storage type of a code: 0 float, 1 double, 2 bf16.
template <class Call>
void for_storage(int code, Call f) {
  switch (code) {
    case 0: return f(float{});
    case 1: return f(double{});
    case 2: return f(Bf16{});
    default: throw std::invalid_argument("storage: expected 0, 1 or 2");
  }
}

void forward(int cell, int storage, int threads, const py::args& directions) {
  for_storage(storage, [&](auto s) {
    scan<ForwardDirection<decltype(s)>>(cell, threads, directions, run_forward<decltype(s)>);
  });
}

void backward(int cell, int storage, int threads, const py::args& directions) {
  for_storage(storage, [&](auto s) {
    scan<BackwardDirection<decltype(s)>>(cell, threads, directions, run_backward<decltype(s)>);
  });
}

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of fusedrnn over raw pointers.";
  m.def("forward", &forward, "forward(cell, storage, threads, *directions)");
  m.def("backward", &backward, "backward(cell, storage, threads, *directions)");
  m.def(
      "pack_rows",
      [](int storage, uintptr_t weight, int64_t gates, int64_t n, int64_t k, uintptr_t packed, int threads) {
        const Kernels& table = kernels();
        py::gil_scoped_release release;
        for_storage(storage, [&](auto s) {
          using S = decltype(s);
          run_pack_rows<S>(table, at<const S>(weight), gates, n, k, at<Factor<S>>(packed), threads);
        });
      },
      "[gates*n, k] -> [ceil(n/W), k, gates, W]");
  m.def(
      "pack_columns",
      [](int storage, uintptr_t weight, int64_t k, int64_t n, uintptr_t packed, int threads) {
        const Kernels& table = kernels();
        py::gil_scoped_release release;
        for_storage(storage, [&](auto s) {
          using S = decltype(s);
          run_pack_columns<S>(table, at<const S>(weight), k, n, at<Factor<S>>(packed), threads);
        });
      },
      "[k, n] -> [ceil(n/W), k, W]");
  m.def(
      "math",
      [](bool f64, int function, uintptr_t in, uintptr_t out, int64_t n) {
        const Kernels& table = kernels();
        py::gil_scoped_release release;
        f64 ? table.math64(function, at<double>(in), at<double>(out), n)
            : table.math32(function, at<float>(in), at<float>(out), n);
      },
      "the kernels' sigmoid (0) or tanh (1) of n values, for tests");
  m.def(
      "fingerprint", [](uintptr_t data, size_t bytes) { return kernels().fingerprint(at<const void>(data), bytes); },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "read",
      [](uintptr_t data, size_t bytes, int64_t repeats, int threads) {
        return run_read(kernels(), at<const void>(data), bytes, repeats, threads);
      },
      py::call_guard<py::gil_scoped_release>(), "reads memory and does nothing else, for the benchmark's ceilings");
  m.def("width", [](int storage) {
    const Kernels& k = kernels();
    return storage == 1 ? k.f64.width : k.f32.width;
  });
  m.def(
      "step_together", [](int storage) { return kernels().step[storage].together; },
      "how many steps of k lie side by side in a weight packed for a stepper");
  m.def("isa", [] { return std::string(kernels().name); });
  m.def("set_isa", [](const std::string& name) { set_level(name); }, "'' goes back to the best level");
  m.def("isa_levels", &supported_levels);
  m.def("cpu_features", &cpu_features);
  bind_stepper(m);
  bind_attend(m);
  bind_attend_step(m);
  bind_one_step(m);
  bind_cuda(m);
}
