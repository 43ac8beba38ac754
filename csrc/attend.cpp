// fusedrnn._C's attention, of torch's tensors. Callers have validated everything: shapes and dtypes fit, last
// dimensions are contiguous and hold their values.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "cpu/attend_run.h"
#include "cpu/dispatch.h"
#include "fast_call.h"
#include "tensors.h"

namespace py = pybind11;
using namespace fusedrnn;

namespace {

double real(PyObject* value) {
  const double number = PyFloat_AsDouble(value);
  if (number == -1 && PyErr_Occurred()) throw py::error_already_set();
  return number;
}

// f(S{}) for what a tensor stores.
template <class F>
py::object for_stored(const dlpack::Tensor& t, F f) {
  if (t.type_code == dlpack::kFloat && t.type_bits == 16) return f(Half{});
  switch (storage_of(t)) {
    case 0: return f(float{});
    case 1: return f(double{});
    case 2: return f(Bf16{});
    default: throw std::invalid_argument("query: no kernel for its dtype");
  }
}

template <class X>
const X* data_of(const Tensors& tensors, PyObject* tensor, int64_t count) {
  return tensor == Py_None ? nullptr : tensors.kept<X>(tensor, count);
}

// [B, N, T, columns], whose dimensions of one value lie anywhere.
template <class X>
Rows<X> rows_of(const dlpack::Tensor& t) {
  if (t.ndim != 4) throw std::invalid_argument("expected 4 dimensions");
  const auto stride = [&](int i) { return t.shape[i] == 1 ? 0 : t.strides[i]; };
  return {static_cast<X*>(t.data), stride(0), stride(1), stride(2)};
}
template <class X>
Rows<X> rows_of(const Tensors& tensors, PyObject* tensor, int64_t rows, int64_t columns) {
  if (tensor == Py_None) return {};
  const auto t = tensors.kept(tensor, holds<X>);
  if (t.ndim != 4 || t.shape[2] != rows || t.shape[3] != columns) Tensors::mistaken();
  return rows_of<X>(t);
}

// The arguments that both ways begin with.
enum { kThreads, kScore, kScale, kDropout, kSeed, kQuery, kKey, kValue, kV, kLengths, kOthers };

template <class S>
void read(const Tensors& tensors, PyObject* const* args, Attend<S>& a) {
  const dlpack::Tensor query = tensors.view(args[kQuery]), value = tensors.view(args[kValue]);
  a.query = rows_of<const S>(query);
  a.key = rows_of<const S>(tensors, args[kKey], value.shape[2], query.shape[3]);
  a.value = rows_of<const S>(tensors, args[kValue], value.shape[2], value.shape[3]);
  a.score = integer(args[kScore]);
  a.scale = real(args[kScale]);
  a.dropout = real(args[kDropout]);
  a.seed = PyLong_AsUnsignedLongLongMask(args[kSeed]);
  if (PyErr_Occurred()) throw py::error_already_set();
  a.batch = query.shape[0];
  a.heads = query.shape[1];
  a.queries = query.shape[2];
  a.width = query.shape[3];
  a.keys = value.shape[2];
  a.values = value.shape[3];
  a.v = data_of<S>(tensors, args[kV], a.width);
  a.lengths = data_of<int64_t>(tensors, args[kLengths], a.batch);
}

// A new tensor [B, N, T, columns] of a query's dtype, or of that of sums.
template <class S, class X>
py::object make(const Tensors& tensors, PyObject* query, const Attend<S>& a, int64_t rows, int64_t columns, X*& data) {
  void* memory;
  auto made = tensors.make(query, {a.batch, a.heads, rows, columns}, memory, sizeof(X) > sizeof(S));
  data = static_cast<X*>(memory);
  return made;
}

template <class S>
int64_t work_of(const Attend<S>& a) {
  return a.batch * a.heads * a.queries * a.keys * (a.width + a.values);
}

// attend_forward(threads, score, scale, dropout, seed, query, key, value, v, lengths, mask, need_weights, save) ->
// context, weights or None, probabilities or None.
py::object forward(PyObject* const* args) {
  enum { kMask = kOthers, kNeedWeights, kSave };
  const Tensors& tensors = Tensors::found();
  const int threads = integer(args[kThreads]);
  PyObject* const query = args[kQuery];
  return for_stored(tensors.view(query), [&](auto stored) -> py::object {
    using S = decltype(stored);
    AttendForward<S> a{};
    read(tensors, args, a);
    if (args[kMask] != Py_None) {
      const dlpack::Tensor mask = tensors.view(args[kMask]);
      a.mask_kind = mask.type_code == dlpack::kBool ? kBoolMask : kAddedMask;
      a.bool_mask = rows_of<const uint8_t>(mask);
      a.added_mask = rows_of<const S>(mask);
    }
    const auto context = make(tensors, query, a, a.queries, a.values, a.context);
    py::object weights = py::none(), probabilities = py::none();
    if (args[kNeedWeights] == Py_True) weights = make(tensors, query, a, a.queries, a.keys, a.weights);
    if (args[kSave] == Py_True) probabilities = make(tensors, query, a, a.queries, a.keys, a.probabilities);
    const Kernels& k = kernels();
    run_beside(work_of(a), [&] { run_attend(k, a, threads); });
    return py::make_tuple(context, weights, probabilities);
  });
}

// attend_backward(threads, score, scale, dropout, seed, query, key, value, v, lengths, probabilities, d_context,
// d_weights, whether d_query, d_key, d_value, d_v are needed) -> those, None where not, and the gradient of the scores.
py::object backward(PyObject* const* args) {
  enum { kProbabilities = kOthers, kContext, kWeights, kNeeds };
  const Tensors& tensors = Tensors::found();
  const int threads = integer(args[kThreads]);
  PyObject* const query = args[kQuery];
  return for_stored(tensors.view(query), [&](auto stored) -> py::object {
    using S = decltype(stored);
    AttendBackward<S> a{};
    read(tensors, args, a);
    a.probabilities = data_of<Acc<S>>(tensors, args[kProbabilities], a.batch * a.heads * a.queries * a.keys);
    a.d_context = rows_of<const S>(tensors, args[kContext], a.queries, a.values);
    a.d_weights = rows_of<const S>(tensors, args[kWeights], a.queries, a.keys);
    const auto needs = [&](int i) { return args[kNeeds + i] == Py_True; };
    py::object d_query = py::none(), d_key = py::none(), d_value = py::none(), d_v = py::none();
    if (needs(0)) d_query = make(tensors, query, a, a.queries, a.width, a.d_query);
    if (needs(1)) d_key = make(tensors, query, a, a.keys, a.width, a.d_key);
    if (needs(2)) d_value = make(tensors, query, a, a.keys, a.values, a.d_value);
    if (needs(3)) {
      void* memory;
      d_v = tensors.make(query, {a.width}, memory);
      a.d_v = static_cast<S*>(memory);
    }
    const auto d_scores = make(tensors, query, a, a.queries, a.keys, a.d_scores);
    const auto dropped = a.dropout > 0 ? make(tensors, query, a, a.queries, a.keys, a.weights) : py::none();
    const Kernels& k = kernels();
    run_beside(work_of(a), [&] { run_attend(k, a, threads); });
    return py::make_tuple(d_query, d_key, d_value, d_v, d_scores);
  });
}

PyMethodDef methods[] = {
    fast_method<forward, kOthers + 3>("attend_forward", "-> context, weights, probabilities"),
    fast_method<backward, kOthers + 7>("attend_backward", "-> gradients of query, key, value, v and scores"),
};

}  // namespace

void bind_attend(py::module_& m) { add_methods(m, methods); }
