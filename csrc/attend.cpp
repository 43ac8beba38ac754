// fusedrnn._C's attention: one tuple of numbers and addresses a call, in the order of the structs' fields in
// cpu/attend.h. Callers have validated everything.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "cpu/attend_run.h"
#include "cpu/dispatch.h"

namespace py = pybind11;
using namespace fusedrnn;

namespace {

class Fields {
 public:
  explicit Fields(const py::tuple& tuple) : tuple_(tuple) {}

  int64_t integer() { return PyLong_AsLongLong(next()); }
  uint64_t bits() { return PyLong_AsUnsignedLongLongMask(next()); }
  double real() { return PyFloat_AsDouble(next()); }
  template <class X>
  X* pointer() {
    return reinterpret_cast<X*>(PyLong_AsSize_t(next()));
  }
  template <class X>
  Rows<X> rows() {
    X* data = pointer<X>();
    const int64_t batch = integer(), head = integer(), row = integer();
    return {data, batch, head, row};
  }
  void end() const {
    if (PyErr_Occurred()) throw py::error_already_set();
    if (at_ != tuple_.size()) throw std::invalid_argument("fields: too many");
  }

 private:
  PyObject* next() {
    if (at_ == tuple_.size()) throw std::invalid_argument("fields: too few");
    return PyTuple_GET_ITEM(tuple_.ptr(), static_cast<Py_ssize_t>(at_++));
  }
  const py::tuple& tuple_;
  size_t at_ = 0;
};

template <class S>
void read(Fields& f, Attend<S>& a) {
  a.score = static_cast<int>(f.integer());
  for (int64_t* n : {&a.batch, &a.heads, &a.queries, &a.keys, &a.width, &a.values}) *n = f.integer();
  a.query = f.rows<const S>();
  a.key = f.rows<const S>();
  a.value = f.rows<const S>();
  a.v = f.pointer<const S>();
  a.lengths = f.pointer<const int64_t>();
  a.scale = f.real();
  a.dropout = f.real();
  a.seed = f.bits();
}

template <class S>
void read(Fields& f, AttendForward<S>& a) {
  using T = Acc<S>;
  read(f, static_cast<Attend<S>&>(a));
  a.mask_kind = static_cast<int>(f.integer());
  const Rows<const uint8_t> mask = f.rows<const uint8_t>();
  a.bool_mask = mask;
  a.added_mask = {reinterpret_cast<const S*>(mask.data), mask.batch_stride, mask.head_stride, mask.stride};
  a.context = f.pointer<S>();
  a.weights = f.pointer<S>();
  a.lse = f.pointer<T>();
  a.probabilities = f.pointer<T>();
  a.steps = false;
  a.kept = nullptr;
}

template <class S>
void read(Fields& f, AttendBackward<S>& a) {
  using T = Acc<S>;
  read(f, static_cast<Attend<S>&>(a));
  a.probabilities = f.pointer<const T>();
  a.d_context = f.rows<const S>();
  a.d_weights = f.rows<const S>();
  a.d_scores = f.pointer<T>();
  a.weights = f.pointer<T>();
  a.d_query = f.pointer<S>();
  a.d_key = f.pointer<S>();
  a.d_value = f.pointer<S>();
  a.d_v = f.pointer<S>();
}

template <class Arguments>
void run(int threads, const py::tuple& tuple) {
  Fields fields(tuple);
  Arguments a;
  read(fields, a);
  fields.end();
  const Kernels& k = kernels();
  py::gil_scoped_release release;
  run_attend(k, a, threads);
}

template <template <class> class Arguments>
void run_stored(int storage, int threads, const py::tuple& tuple) {
  switch (storage) {
    case 0: return run<Arguments<float>>(threads, tuple);
    case 1: return run<Arguments<double>>(threads, tuple);
    case 2: return run<Arguments<Bf16>>(threads, tuple);
    case 3: return run<Arguments<Half>>(threads, tuple);
    default: throw std::invalid_argument("storage: expected 0 to 3");
  }
}

}  // namespace

void bind_attend(py::module_& m) {
  m.def("attend_forward", &run_stored<AttendForward>, "attend_forward(storage, threads, fields)");
  m.def("attend_backward", &run_stored<AttendBackward>, "attend_backward(storage, threads, fields)");
}
