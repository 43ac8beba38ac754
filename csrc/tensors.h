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
  // Made at the first call, as importing the module must not need torch's; never freed, as Python ends first.
  static const Tensors& found() {
    static const Tensors* const found = new Tensors;
    return *found;
  }

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

  // A new tensor like another one, with `columns` in the place of its last dimension, and its memory.
  pybind11::object make_like(PyObject* other, const dlpack::Tensor& shape, int64_t columns, float*& data) const {
    pybind11::tuple sizes(shape.ndim);
    for (int i = 0; i < shape.ndim; ++i) sizes[i] = pybind11::int_(i + 1 < shape.ndim ? shape.shape[i] : columns);
    auto made = pybind11::reinterpret_steal<pybind11::object>(
        PyObject_CallMethodOneArg(other, new_empty_.ptr(), sizes.ptr()));
    dlpack::Tensor t;
    if (!made || !read(made.ptr(), t)) throw pybind11::error_already_set();
    data = static_cast<float*>(t.data);
    return made;
  }

 private:
  static bool refused() {
    PyErr_Clear();
    return false;
  }

  pybind11::object tensor_, parameter_;
  const dlpack::ExchangeApi* api_;
  pybind11::str is_neg_{"is_neg"}, new_empty_{"new_empty"};
};

// The dimensions but the last as one, with one stride between its rows; its rows are contiguous.
inline bool read_rows(const dlpack::Tensor& t, int64_t& rows, int64_t& stride) {
  if (!dlpack::is_float32(t) || t.ndim < 1) return false;
  const int64_t columns = t.shape[t.ndim - 1];
  if (columns > 1 && t.strides[t.ndim - 1] != 1) return false;
  rows = 1, stride = columns;
  for (int i = t.ndim - 2; i >= 0; --i) {
    if (t.shape[i] != 1) {
      if (rows == 1) stride = t.strides[i];
      if (t.strides[i] != stride * rows) return false;
    }
    rows *= t.shape[i];
  }
  return true;
}

inline bool is_vector(const dlpack::Tensor& t, int64_t size) {
  return t.ndim == 1 && t.shape[0] == size && (size <= 1 || t.strides[0] == 1);
}

}  // namespace fusedrnn
