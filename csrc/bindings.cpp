// fusedrnn._C: raw pointers as integers, or tensors read through DLPack; nothing of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/dispatch.h"
#include "cpu/sharing.h"
#include "cpu/team.h"
#include "packs.h"

namespace py = pybind11;
using namespace fusedrnn;

void bind_layer(py::module_& m);
void bind_linear(py::module_& m);
void bind_stack(py::module_& m);
void bind_stepper(py::module_& m);
void bind_attend(py::module_& m);
void bind_attend_step(py::module_& m);
void bind_one_step(py::module_& m);
void bind_cuda(py::module_& m);

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of fusedrnn over raw pointers.";
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
  m.def(
      "share_layer",
      [](int gates, int64_t time, int64_t batch, int64_t hidden, int64_t inputs, int directions, int threads) {
        const Shape shape{time, batch, hidden, hidden, time * batch, nullptr};
        const auto& f = kernels().f32;
        const LayerWork layer{shape, inputs, gates, directions, sizeof(float), f.width, f.rows[0]};
        const int members = share_layer(layer, threads).members;
        return py::make_tuple(members, members > 1 && choose_split(layer, members) == Split::kRows);
      },
      "members of a direction's team, 0 where one thread makes all, and whether they share out rows; for tests");
  py::class_<Crowd>(m, "Crowd", "how large teams of threads may be beside other work (cpu/team.h), for tests")
      .def(py::init<>())
      .def("size", &Crowd::size)
      .def("is_careful", &Crowd::is_careful)
      .def("waited", &Crowd::waited)
      .def("away", &Crowd::away);
  bind_layer(m);
  bind_linear(m);
  bind_stack(m);
  bind_packs(m);
  bind_stepper(m);
  bind_attend(m);
  bind_attend_step(m);
  bind_one_step(m);
  bind_cuda(m);
}
