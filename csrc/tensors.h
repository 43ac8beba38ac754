// Reads torch's tensors through the DLPack exchange table that torch publishes.
#pragma once

#include <stdexcept>
#include <type_traits>

#include <pybind11/pybind11.h>

#include "cpu/scan.h"
#include "dlpack.h"

namespace fusedrnn {

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

// That code of a tensor's values; -1 for others.
inline int storage_of(const dlpack::Tensor& t) {
  if (t.type_lanes != 1) return -1;
  if (t.type_code == dlpack::kFloat) return t.type_bits == 32 ? 0 : t.type_bits == 64 ? 1 : -1;
  return t.type_code == dlpack::kBfloat ? 2 : -1;
}

// Whether a tensor's values are of a type.
template <class T>
bool holds(const dlpack::Tensor& t) {
  using V = std::remove_const_t<T>;
  constexpr auto kCode = std::is_same_v<V, Bf16>      ? dlpack::kBfloat
                         : std::is_same_v<V, int64_t> ? dlpack::kInt
                         : std::is_same_v<V, bool>    ? dlpack::kBool
                                                      : dlpack::kFloat;
  return t.type_lanes == 1 && t.type_code == kCode && t.type_bits == 8 * sizeof(V);
}

inline int64_t count_of(const dlpack::Tensor& t) {
  int64_t count = 1;
  for (int i = 0; i < t.ndim; ++i) count *= t.shape[i];
  return count;
}

inline bool is_contiguous(const dlpack::Tensor& t) {
  int64_t stride = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    if (t.shape[i] != 1 && t.strides[i] != stride) return false;
    stride *= t.shape[i];
  }
  return true;
}

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

  // What is known to be in the CPU's memory.
  dlpack::Tensor view(PyObject* tensor) const {
    dlpack::Tensor t;
    if (api_->read(tensor, &t) != 0) throw pybind11::error_already_set();
    t.data = static_cast<char*>(t.data) + t.byte_offset;
    return t;
  }

  // What autograd has kept, as a kernel is about to read it: a hook of saved tensors may give back anything.
  dlpack::Tensor kept(PyObject* tensor, bool (*is_right)(const dlpack::Tensor&)) const {
    const dlpack::Tensor t = view(tensor);
    if (t.device_type != dlpack::kCpu || !is_right(t)) mistaken();
    return t;
  }
  // The same of `count` values that lie side by side.
  template <class T>
  const T* kept(PyObject* tensor, int64_t count) const {
    const dlpack::Tensor t = kept(tensor, holds<T>);
    if (count_of(t) != count || (count > 0 && !is_contiguous(t))) mistaken();
    return static_cast<const T*>(t.data);
  }
  [[noreturn]] static void mistaken() {
    throw std::runtime_error(
        "a saved tensor is not what forward saved: a hook of saved tensors has to give back its dtype, shape and device");
  }

  // A new tensor of these sizes, of another one's dtype or of fp32, and its memory; of zeros where that is asked for.
  pybind11::object make(PyObject* other, std::initializer_list<int64_t> sizes, void*& data, bool as_float = false,
                        bool zeros = false) const {
    pybind11::tuple shape(sizes.size());
    size_t i = 0;
    for (const int64_t size : sizes) shape[i++] = pybind11::int_(size);
    PyObject* const args[] = {other, shape.ptr(), float32_.ptr()};
    auto made = pybind11::reinterpret_steal<pybind11::object>(
        PyObject_VectorcallMethod((zeros ? new_zeros_ : new_empty_).ptr(), args, 2 | PY_VECTORCALL_ARGUMENTS_OFFSET,
                                  as_float ? dtype_.ptr() : nullptr));
    if (!made) throw pybind11::error_already_set();
    data = view(made.ptr()).data;
    return made;
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
  pybind11::object float32_ = pybind11::module_::import("torch").attr("float32");
  pybind11::tuple dtype_ = pybind11::make_tuple("dtype");
  const dlpack::ExchangeApi* api_;
  pybind11::str is_neg_{"is_neg"}, new_empty_{"new_empty"}, new_zeros_{"new_zeros"};
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
