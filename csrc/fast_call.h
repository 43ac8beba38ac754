// Functions of a fixed number of arguments behind CPython's fastest convention: pybind11's own dispatch takes a
// microsecond.
#pragma once

#include <stdint.h>

#include <stdexcept>

#include <pybind11/pybind11.h>

namespace fusedrnn {

// f() for Python: a C++ exception becomes one of its own.
template <class F>
PyObject* guarded(F f) {
  try {
    return f().release().ptr();
  } catch (pybind11::error_already_set& error) {
    error.restore();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <pybind11::object (*kFunction)(PyObject* const*), int kCount>
PyObject* fast_call(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != kCount) {
    PyErr_Format(PyExc_TypeError, "expected %d arguments, got %zd", kCount, count);
    return nullptr;
  }
  return guarded([&] { return kFunction(args); });
}

template <pybind11::object (*kFunction)(PyObject* const*), int kCount>
PyMethodDef fast_method(const char* name, const char* text) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(fast_call<kFunction, kCount>)), METH_FASTCALL,
          text};
}

template <size_t N>
void add_methods(pybind11::module_& m, PyMethodDef (&methods)[N]) {
  for (PyMethodDef& each : methods) {
    m.attr(each.ml_name) = pybind11::reinterpret_steal<pybind11::object>(PyCFunction_New(&each, nullptr));
  }
}

// Above so many multiply-adds (about 20 us) other threads want the GIL.
constexpr int64_t kWorthRelease = 1 << 19;

template <class Run>
void run_beside(int64_t work, Run run) {
  if (work < kWorthRelease) return run();
  const pybind11::gil_scoped_release release;
  run();
}

inline int integer(PyObject* value) {
  const long number = PyLong_AsLong(value);
  if (number == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
  if (number != static_cast<int>(number)) throw std::invalid_argument("expected a number of 32 bits");
  return static_cast<int>(number);
}

}  // namespace fusedrnn
