// A stepper: all that a step needs, found once, behind a function that takes little more than a
// microsecond to call. pybind11's own dispatch would cost as much again, so that function is plain CPython.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <stdexcept>

#include "cpu/dispatch.h"
#include "fast_call.h"
#include "tensors.h"

namespace py = pybind11;
using namespace fusedrnn;

namespace {

// The parameters that a pack was made from, and whether they are still the same.
class Watch {
 public:
  Watch(py::dict parameters, const py::list& names)
      : parameters_(std::move(parameters)), version_(py::str("_version")), api_(exchange_api()) {
    for (const auto& name : names) {
      py::object tensor = parameters_[name];
      // A second tensor over the same memory keeps it, so that its address is not given to another.
      py::object memory = tensor.attr("detach")();
      const bool versioned = !tensor.attr("is_inference")().cast<bool>();
      dlpack::Tensor view;
      if (!read(tensor, view)) throw py::error_already_set();
      entries_.push_back({py::reinterpret_borrow<py::object>(name), tensor, memory, view.data,
                          versioned ? version_of(tensor) : -1, versioned ? 0 : content_of(view)});
    }
  }

  // Without an exception set: what cannot be read has changed.
  bool changed() const {
    if (spoilt_) return true;
    for (const Entry& e : entries_) {
      if (PyDict_GetItemWithError(parameters_.ptr(), e.name.ptr()) != e.tensor.ptr()) return true;
      dlpack::Tensor view;
      if (!read(e.tensor, view)) {
        PyErr_Clear();
        return true;
      }
      if (view.data != e.data) return true;
      if (e.version >= 0 ? version_of(e.tensor) != e.version : content_of(view) != e.content) return true;
    }
    return false;
  }

  void spoil() { spoilt_ = true; }

 private:
  struct Entry {
    py::object name, tensor, memory;
    const void* data;
    int64_t version;   // -1 of a tensor made in inference mode, which has none: its content counts
    uint64_t content;
  };

  bool read(const py::object& tensor, dlpack::Tensor& view) const { return api_->read(tensor.ptr(), &view) == 0; }

  static uint64_t content_of(const dlpack::Tensor& t) {
    if (!is_contiguous(t)) {
      throw std::invalid_argument("module: expected parameters made in inference mode to be contiguous");
    }
    const auto* data = static_cast<const char*>(t.data) + t.byte_offset;
    return run_fingerprint(kernels(), data, count_of(t) * (t.type_bits / 8), 1);
  }

  int64_t version_of(const py::object& tensor) const {
    const py::object version = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor.ptr(), version_.ptr()));
    return version ? PyLong_AsLongLong(version.ptr()) : (PyErr_Clear(), -1);
  }

  py::dict parameters_;
  py::str version_;
  const dlpack::ExchangeApi* api_;
  std::vector<Entry> entries_;
  bool spoilt_ = false;
};

struct Stepper {
  StepPlan plan;
  std::shared_ptr<Watch> watch;
  py::object memory;  // what the plan's pointers point into
  int64_t batch;      // B, or -1 without a batch dimension
  bool releases;
  Tensors tensors;
  bool running = false;
};

const char kName[] = "fusedrnn.stepper";

// Whether x is [B, I] or [I] of fp32 in plain memory of the CPU; its rows.
bool read_rows(const Stepper& s, PyObject* x, StepRows& rows) {
  dlpack::Tensor t;
  if (!s.tensors.is_plain(x) || !s.tensors.read(x, t)) return false;
  const int dims = s.batch < 0 ? 1 : 2;
  if (t.ndim != dims || !dlpack::is_float32(t)) return false;
  if (t.shape[dims - 1] != s.plan.layers[0].inputs || (dims == 2 && t.shape[0] != s.batch)) return false;
  rows.data = static_cast<const float*>(t.data);
  rows.stride = dims == 2 ? t.strides[0] : 0;
  rows.k_stride = t.strides[dims - 1];
  return rows.data != nullptr || s.batch == 0;
}

// Marks a stepper that runs without the GIL.
class Running {
 public:
  explicit Running(Stepper& s) : stepper_(s) { stepper_.running = true; }
  ~Running() { stepper_.running = false; }
  Running(const Running&) = delete;

 private:
  Stepper& stepper_;
};

// step(x, threads, anyway): True; False where the weights have changed, unless the step is to run anyway; None where x
// is not what is expected.
py::object take_step(Stepper& s, PyObject* x, int threads, bool anyway) {
  if (s.running) {
    throw std::runtime_error("step: this stepper is in a step in another thread; give each thread its own");
  }
  StepRows rows;
  if (!read_rows(s, x, rows)) return py::none();
  if (!anyway && s.watch->changed()) return py::bool_(false);
  if (s.releases) {
    const Running running(s);
    const py::gil_scoped_release release;
    run_step(s.plan, rows, threads);
  } else {
    run_step(s.plan, rows, threads);
  }
  return py::bool_(true);
}

PyObject* step(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  auto* s = static_cast<Stepper*>(PyCapsule_GetPointer(self, kName));
  if (s == nullptr) return nullptr;
  if (count != 3) {
    PyErr_SetString(PyExc_TypeError, "step: expected x, threads and whether to run anyway");
    return nullptr;
  }
  return guarded([&] { return take_step(*s, args[0], integer(args[1]), args[2] == Py_True); });
}

PyMethodDef step_method = {"step", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(step)), METH_FASTCALL,
                           "step(x, threads, anyway) -> True, False of changed weights, None of another x"};

template <class T>
T* address(const py::handle& value) {
  return reinterpret_cast<T*>(value.cast<uintptr_t>());
}

StepLayer read_layer(const py::tuple& t) {
  if (t.size() != 13) throw std::invalid_argument("stepper: a layer has 13 fields");
  return {t[0].cast<int64_t>(),     address<const void>(t[1]),   address<const void>(t[2]), address<const void>(t[3]),
          address<const float>(t[4]), address<const float>(t[5]), address<const float>(t[6]), address<const float>(t[7]),
          address<const float>(t[8]), address<float>(t[9]),       address<float>(t[10]),      address<float>(t[11]),
          address<float>(t[12])};
}

py::object make_stepper(std::shared_ptr<Watch> watch, py::object memory, int cell, int storage, bool batched,
                        const py::tuple& shape, uintptr_t output, const py::list& layers) {
  if (cell < 0 || cell >= kCells) throw std::invalid_argument("cell: unknown index");
  if (storage < 0 || storage >= kStorages) throw std::invalid_argument("storage: unknown index");
  if (shape.size() != 5) throw std::invalid_argument("stepper: a shape has 5 fields");
  auto s = std::make_unique<Stepper>();
  s->plan.kernels = &kernels();
  s->plan.cell = cell;
  s->plan.storage = static_cast<StepStorage>(storage);
  s->plan.shape = {shape[0].cast<int64_t>(), shape[1].cast<int64_t>(), shape[2].cast<int64_t>(),
                   shape[3].cast<int64_t>(), shape[4].cast<int64_t>()};
  for (const auto& layer : layers) s->plan.layers.push_back(read_layer(py::reinterpret_borrow<py::tuple>(layer)));
  s->plan.output = reinterpret_cast<float*>(output);
  s->watch = std::move(watch);
  s->memory = std::move(memory);
  s->batch = batched ? s->plan.shape.batch : -1;
  s->releases = step_work(s->plan) >= kWorthRelease;
  const py::capsule self(s.release(), kName, [](void* p) { delete static_cast<Stepper*>(p); });
  return py::reinterpret_steal<py::object>(PyCFunction_New(&step_method, self.ptr()));
}

}  // namespace

void bind_stepper(py::module_& m) {
  py::class_<Watch, std::shared_ptr<Watch>>(m, "Watch")
      .def(py::init<py::dict, const py::list&>())
      .def("changed", &Watch::changed)
      .def("spoil", &Watch::spoil);
  m.def("stepper", &make_stepper,
        "stepper(watch, memory, cell, storage, batched, shape, output, layers) -> step(x, threads, anyway)");
}
