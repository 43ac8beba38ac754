// One step of a decoder whose memory stays: the query's projection, additive scores, softmax and context behind one
// plain CPython function, as the stepper has it. It reads everything where it lies, so that nothing can be out of
// date but the exponentials of the keys.
#include <pybind11/pybind11.h>

#include <array>
#include <cmath>
#include <memory>
#include <utility>

#include "cpu/attend_run.h"
#include "cpu/buffer.h"
#include "cpu/dispatch.h"
#include "fast_call.h"
#include "tensors.h"

namespace py = pybind11;
using namespace fusedrnn;

namespace {

// Beyond it the exponentials do not stay in the caches, and reading them takes as long as making them: measured with
// one megabyte of second-level cache.
constexpr int64_t kMostKept = 1 << 20;  // elements of keys
// Multiply-adds that an element of a pair is worth, for whether others want the GIL.
constexpr int64_t kWorthOfPair = 4;

// What exponentials were made from. A tensor made in inference mode has no version, so its content counts.
struct Source {
  const Kernels* kernels;
  const float* data;
  int64_t count, width;
  uint64_t version;  // or fingerprint
  bool operator==(const Source& s) const {
    return kernels == s.kernels && data == s.data && count == s.count && width == s.width && version == s.version;
  }
};

// Keys as a level prepares them; never changed once made, as another thread may be reading them.
struct Prepared {
  Source source;
  Buffer data;
  bool usable;
};

enum Argument { kKeys, kThreads, kNeedWeights, kScale, kQuery, kWeight, kBias, kV, kNorm, kKey, kValue, kLengths, kMask,
                kArguments };

// Found once.
const py::str& version_name() {
  static const py::str* const name = new py::str("_version");
  return *name;
}

// What is kept of one tensor of keys from step to step.
class Keys {
 public:
  explicit Keys(bool versioned) : versioned_(versioned) {}

  // From the second step on, as the first may be the last.
  std::shared_ptr<const Prepared> prepared(const py::handle& tensor, const Kernels& k, const float* keys,
                                           int64_t count, int64_t width) {
    if (!std::exchange(seen_, true)) return nullptr;
    const uint64_t version = versioned_ ? tensor.attr(version_name()).cast<uint64_t>()
                                        : k.fingerprint(keys, count * width * sizeof(float));
    const Source source{&k, keys, count, width, version};
    if (!kept_ || !(kept_->source == source)) {
      Buffer data = allocate(kept_size(count, width) * sizeof(float));
      const bool usable = k.attend.step.keep(keys, count, width, reinterpret_cast<float*>(data.get()));
      kept_ = std::make_shared<Prepared>(Prepared{source, std::move(data), usable});
    }
    return kept_;
  }

  // Tensors::is_plain, a call of Python, unless x is the last step's.
  bool is_plain(const Tensors& tensors, Argument which, PyObject* x) {
    py::weakref& last = plain_[which];
    if (last.ptr() != nullptr && PyWeakref_GetObject(last.ptr()) == x) return true;
    if (!tensors.is_plain(x)) return false;
    if (which != kQuery) last = py::weakref(py::handle(x));  // another at every step
    return true;
  }

 private:
  const bool versioned_;
  bool seen_ = false;
  std::shared_ptr<const Prepared> kept_;
  std::array<py::weakref, kArguments> plain_;
};

const char kName[] = "fusedrnn.keys";

struct Step {
  AttendForward<float> attend{};
  Projection projection{};
  dlpack::Tensor query;
};

class Reader {
 public:
  Reader(Keys& keys, PyObject* const* args) : keys_(keys), args_(args) {}

  bool operator()(Argument which, dlpack::Tensor& t) const {
    return keys_.is_plain(Tensors::found(), which, args_[which]) && Tensors::found().read(args_[which], t);
  }
  bool there(Argument which) const { return args_[which] != Py_None; }
  bool floats(Argument which, int64_t size, const float*& data) const {
    dlpack::Tensor t;
    if (!there(which)) return true;
    if (!(*this)(which, t) || !dlpack::is_float32(t) || !is_vector(t, size)) return false;
    data = static_cast<const float*>(t.data);
    return true;
  }

 private:
  Keys& keys_;
  PyObject* const* args_;
};

// Whether all tensors are what this function knows, and fit.
bool read(const Reader& tensor, Step& step) {
  AttendForward<float>& a = step.attend;
  Projection& p = step.projection;
  dlpack::Tensor &query = step.query, weight, key, value, other;
  int64_t keys;
  if (!tensor(kQuery, query) || !read_rows(query, p.rows, p.x_stride)) return false;
  if (!tensor(kWeight, weight) || weight.ndim != 2 || !read_rows(weight, p.outputs, p.weight_stride)) return false;
  if (!tensor(kKey, key) || key.ndim != 3 || !read_rows(key, keys, a.key.stride)) return false;
  if (!tensor(kValue, value) || value.ndim != 3 || !dlpack::is_float32(value)) return false;
  a.score = kAdditive;
  a.batch = key.shape[0];
  a.heads = 1;
  a.keys = key.shape[1];
  a.width = key.shape[2];
  a.values = value.shape[2];
  a.steps = keys * a.width <= kMostKept;
  p.inputs = query.shape[query.ndim - 1];
  if (query.ndim < 2 || query.shape[0] != a.batch || a.key.stride != a.width) return false;
  if (p.rows == 0 || keys == 0 || a.width == 0) return false;
  if (p.inputs != weight.shape[1] || p.outputs != a.width) return false;
  if (value.shape[0] != a.batch || value.shape[1] != a.keys || (a.values > 1 && value.strides[2] != 1)) return false;
  a.queries = p.rows / a.batch;
  p.x = static_cast<const float*>(query.data);
  p.weight = static_cast<const float*>(weight.data);
  a.query = {nullptr, a.queries * a.width, 0, a.width};
  a.key = {static_cast<const float*>(key.data), a.keys * a.width, 0, a.width};
  a.value = {static_cast<const float*>(value.data), value.strides[0], 0, value.strides[1]};
  if (!tensor.floats(kBias, a.width, p.bias) || !tensor.floats(kV, a.width, a.v) || a.v == nullptr) return false;
  if (tensor.there(kNorm)) {
    if (!tensor(kNorm, other) || !dlpack::is_float32(other) || other.ndim != 0) return false;
    double square = 0;
    for (int64_t i = 0; i < a.width; ++i) square += double(a.v[i]) * double(a.v[i]);
    a.scale *= *static_cast<const float*>(other.data) / std::sqrt(square);
  }
  if (tensor.there(kLengths)) {
    if (!tensor(kLengths, other) || !is_vector(other, a.batch)) return false;
    if (other.type_code != dlpack::kInt || other.type_bits != 64) return false;
    a.lengths = static_cast<const int64_t*>(other.data);
  }
  if (tensor.there(kMask)) {
    if (!tensor(kMask, other) || other.type_code != dlpack::kBool || other.ndim != 2) return false;
    if ((other.shape[0] != 1 && other.shape[0] != a.batch) || other.shape[1] != a.keys) return false;
    if (a.keys > 1 && other.strides[1] != 1) return false;
    a.mask_kind = kBoolMask;
    a.bool_mask = {static_cast<const uint8_t*>(other.data), other.shape[0] == 1 ? 0 : other.strides[0], 0, 0};
  }
  return true;
}

// attend_step(*Argument): (context, weights or None), or None where the ordinary way has to be taken.
py::object attend_step(PyObject* const* args) {
  auto* keys = static_cast<Keys*>(PyCapsule_GetPointer(args[kKeys], kName));
  const int threads = integer(args[kThreads]);
  Step step;
  step.attend.scale = PyFloat_AsDouble(args[kScale]);
  if (PyErr_Occurred()) throw py::error_already_set();
  if (!read(Reader(*keys, args), step)) return py::none();
  const Tensors& tensors = Tensors::found();
  AttendForward<float>& a = step.attend;
  Projection& p = step.projection;
  const py::object context = tensors.make_like(args[kQuery], step.query, a.values, a.context);
  const py::object weights =
      args[kNeedWeights] == Py_True ? tensors.make_like(args[kQuery], step.query, a.keys, a.weights) : py::none();
  const Kernels& k = kernels();
  std::shared_ptr<const Prepared> prepared;
  if (a.steps) prepared = keys->prepared(args[kKey], k, a.key.data, a.batch * a.keys, a.width);
  if (prepared && prepared->usable) a.kept = reinterpret_cast<const float*>(prepared->data.get());
  const Buffer projected = allocate(p.rows * p.outputs * sizeof(float));
  a.query.data = p.out = reinterpret_cast<float*>(projected.get());
  run_beside(kWorthOfPair * p.rows * a.keys * a.width, [&] {
    run_projection(k, p, threads);
    run_attend(k, a, threads);
  });
  return py::reinterpret_steal<py::object>(PyTuple_Pack(2, context.ptr(), weights.ptr()));
}

PyMethodDef methods[] = {fast_method<attend_step, kArguments>(
    "attend_step", "attend_step(keys, threads, need_weights, scale, query, weight, bias, v, g, key, value, lengths, mask)")};

}  // namespace

void bind_attend_step(py::module_& m) {
  m.def(
      "attend_keys",
      [](bool versioned) {
        return py::capsule(new Keys(versioned), kName, [](PyObject* self) {
          delete static_cast<Keys*>(PyCapsule_GetPointer(self, kName));
        });
      },
      "a place for what attend_step keeps of one tensor of keys, which has a version or has none");
  add_methods(m, methods);
}
