#include "packs.h"

#include <string.h>

#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#include <pybind11/stl.h>

#include "cpu/buffer.h"
#include "cpu/dispatch.h"
#include "tensors.h"

namespace py = pybind11;

namespace fusedrnn {
namespace {

struct Key {
  const void* data;
  int64_t rows, columns, gates;
  int storage;
  const Kernels* level;
  uint64_t fingerprint;

  bool operator==(const Key& o) const {
    return data == o.data && rows == o.rows && columns == o.columns && gates == o.gates && storage == o.storage &&
           level == o.level && fingerprint == o.fingerprint;
  }
};

// Of what a fingerprint is.
struct Content {
  const void* data;
  int64_t bytes;
  const Kernels* level;

  bool operator==(const Content& o) const { return data == o.data && bytes == o.bytes && level == o.level; }
};

struct Kept {
  PyObject* owner;  // a weak reference
  Content content;
  uint64_t fingerprint;
  struct {
    Key key;
    std::shared_ptr<const char> pack;
  } by[2];  // Packing
};

// Never freed, as Python ends first.
std::unordered_map<PyObject*, Kept>& table() {
  static auto* const kept = new std::unordered_map<PyObject*, Kept>;
  return *kept;
}

// A weight's end: `number` is where it was.
PyObject* forget(PyObject* number, PyObject* owner) {
  auto* const weight = static_cast<PyObject*>(PyLong_AsVoidPtr(number));
  const auto found = table().find(weight);
  if (found != table().end() && found->second.owner == owner) {
    table().erase(found);
    Py_DECREF(owner);
  }
  Py_RETURN_NONE;
}

void drop(PyObject* weight) {
  const auto found = table().find(weight);
  if (found == table().end()) return;
  Py_DECREF(found->second.owner);
  table().erase(found);
}

PyMethodDef forget_method = {"forget", forget, METH_O, nullptr};

// The entry of a tensor, new where there is none or where it is another's who had the same place.
Kept& entry(PyObject* weight) {
  const auto found = table().find(weight);
  if (found != table().end()) {
    if (PyWeakref_GetObject(found->second.owner) == weight) return found->second;
    Py_DECREF(found->second.owner);
    table().erase(found);
  }
  const auto number = py::reinterpret_steal<py::object>(PyLong_FromVoidPtr(weight));
  const auto end = py::reinterpret_steal<py::object>(PyCFunction_New(&forget_method, number.ptr()));
  PyObject* const owner = end ? PyWeakref_NewRef(weight, end.ptr()) : nullptr;
  if (owner == nullptr) throw py::error_already_set();
  return table().emplace(weight, Kept{owner, {}, 0, {}}).first->second;
}

template <class S>
std::shared_ptr<const char> make(const Kernels& k, const Key& key, Packing packing, int threads) {
  constexpr int64_t kPer = Storage<S>::kPerFactor;
  const int64_t width = sizeof(Acc<S>) == 8 ? k.f64.width : k.f32.width;
  const auto* from = static_cast<const S*>(key.data);
  if (packing == Packing::kColumns) {
    Buffer pack = allocate(ceil_div(key.columns, width) * width * ceil_div(key.rows, kPer) * sizeof(Factor<S>));
    run_pack_columns<S>(k, from, key.rows, key.columns, reinterpret_cast<Factor<S>*>(pack.get()), threads);
    return {pack.release(), Free{}};
  }
  // Rows that are multiplied in pairs end with a zero.
  const int64_t n = key.rows / key.gates, columns = ceil_div(key.columns, kPer) * kPer;
  Buffer even;
  if (columns != key.columns) {
    even = allocate(key.rows * columns * sizeof(S));
    auto* to = reinterpret_cast<S*>(even.get());
    for (int64_t r = 0; r < key.rows; ++r) {
      memcpy(to + r * columns, from + r * key.columns, key.columns * sizeof(S));
      memset(to + r * columns + key.columns, 0, sizeof(S));
    }
    from = to;
  }
  Buffer pack = allocate(ceil_div(n, width) * width * key.gates * columns / kPer * sizeof(Factor<S>));
  run_pack_rows<S>(k, from, key.gates, n, columns, reinterpret_cast<Factor<S>*>(pack.get()), threads);
  return {pack.release(), Free{}};
}

std::shared_ptr<const char> make_any(const Key& key, Packing packing, int threads) {
  const py::gil_scoped_release release;
  std::shared_ptr<const char> pack;
  for_storage(key.storage, [&](auto s) { pack = make<decltype(s)>(*key.level, key, packing, threads); });
  return pack;
}

}  // namespace

std::shared_ptr<const char> packed(PyObject* weight, const dlpack::Tensor& t, Packing packing, int64_t gates,
                                   int threads, bool as_before) {
  constexpr int64_t kWorthRelease = 256 << 10;  // bytes
  const Kernels& k = kernels();
  Key key{t.data, t.shape[0], t.shape[1], gates, storage_of(t), &k, 0};
  const int64_t bytes = key.rows * key.columns * (t.type_bits / 8);
  const Content content{key.data, bytes, &k};
  const int by = static_cast<int>(packing);
  if (const Kept& kept = entry(weight); as_before && kept.content == content) {
    key.fingerprint = kept.fingerprint;
    if (kept.by[by].pack && kept.by[by].key == key) return kept.by[by].pack;
  }
  const auto fingerprint = [&] {
    if (bytes < kWorthRelease) return run_fingerprint(k, key.data, bytes, 1);
    const py::gil_scoped_release release;
    return run_fingerprint(k, key.data, bytes, threads);
  };
  key.fingerprint = fingerprint();
  Kept& kept = entry(weight);  // the table may have changed meanwhile
  kept.content = content;
  kept.fingerprint = key.fingerprint;
  if (kept.by[by].pack && kept.by[by].key == key) return kept.by[by].pack;
  const auto pack = make_any(key, packing, threads);
  // What another thread has written into meanwhile is for this call alone.
  if (fingerprint() == key.fingerprint) entry(weight).by[by] = {key, pack};
  return pack;
}

std::shared_ptr<const char> packed_once(const dlpack::Tensor& t, Packing packing, int64_t gates, int threads) {
  return make_any({t.data, t.shape[0], t.shape[1], gates, storage_of(t), &kernels(), 0}, packing, threads);
}

}  // namespace fusedrnn

void bind_packs(py::module_& m) {
  m.def(
      "forget_packs", [](py::handle weight) { fusedrnn::drop(weight.ptr()); },
      "drops the packs of a weight, if there are any");
  m.def(
      "packs",
      [] {
        std::vector<std::tuple<uintptr_t, std::string, uintptr_t>> all;
        for (const auto& [weight, kept] : fusedrnn::table()) {
          for (int by = 0; by < 2; ++by) {
            if (!kept.by[by].pack) continue;
            all.emplace_back(reinterpret_cast<uintptr_t>(weight), by == 0 ? "rows" : "columns",
                             reinterpret_cast<uintptr_t>(kept.by[by].pack.get()));
          }
        }
        return all;
      },
      "(id of the weight, \"rows\" or \"columns\", address) of every pack that is kept, for tests");
}
