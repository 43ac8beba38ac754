// Reads torch's tensors through the DLPack exchange table that torch publishes.
#pragma once

#include <pybind11/pybind11.h>

#include "dlpack.h"

namespace fusedrnn {

inline const dlpack::ExchangeApi* exchange_api() {
  const pybind11::capsule capsule = pybind11::module_::import("torch").attr("Tensor").attr("__dlpack_c_exchange_api__");
  const auto* api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api == nullptr) throw pybind11::error_already_set();
  if (api->version.major != 1 || api->read == nullptr) {
    throw pybind11::import_error("torch's DLPack exchange is not version 1");
  }
  return api;
}

class Tensors {
 public:
  Tensors()
      : tensor_(pybind11::module_::import("torch").attr("Tensor")),
        parameter_(pybind11::module_::import("torch.nn").attr("Parameter")),
        api_(exchange_api()) {}

  // Whether x is a tensor or a parameter, of no other subclass, whose memory holds its values: that of a lazily
  // negated one has the other sign.
  bool is_plain(PyObject* x) const {
    PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(x));
    if (type != tensor_.ptr() && type != parameter_.ptr()) return false;
    const auto negated = pybind11::reinterpret_steal<pybind11::object>(PyObject_CallMethodNoArgs(x, is_neg_.ptr()));
    return negated.ptr() == Py_False || refused();
  }

  // What is in the CPU's memory; false, without an exception set, for any other tensor.
  bool read(PyObject* tensor, dlpack::Tensor& t) const {
    if (api_->read(tensor, &t) != 0) return refused();
    t.data = static_cast<char*>(t.data) + t.byte_offset;
    return t.device_type == dlpack::kCpu;
  }

 private:
  static bool refused() {
    PyErr_Clear();
    return false;
  }

  pybind11::object tensor_, parameter_;
  const dlpack::ExchangeApi* api_;
  pybind11::str is_neg_{"is_neg"};
};

}  // namespace fusedrnn
