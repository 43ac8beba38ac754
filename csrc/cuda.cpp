// fusedrnn._C.cuda: the CUDA code that this build holds, or why it holds none (setup.py says).
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#ifdef FUSEDRNN_CUDA_ARCHITECTURES
#include "cuda/scan.h"
#include "cuda/sync_latency.h"
#endif

namespace py = pybind11;

#ifdef FUSEDRNN_CUDA_ARCHITECTURES

namespace {

void check(int code) {
  if (code > 0) throw std::runtime_error(std::string("CUDA: ") + fusedrnn_cuda_error(code));
  if (code == kFusedrnnCudaTooLarge) throw std::runtime_error("CUDA scan: too large for its schedule on this GPU");
  if (code != 0) throw std::runtime_error("CUDA scan: an argument that no kernel takes");
}

// The fields of a struct of scan.h, in their order.
class Fields {
 public:
  Fields(const py::tuple& from, size_t count) : from_(from) {
    if (from.size() != count) throw std::invalid_argument("CUDA scan: expected " + std::to_string(count) + " fields");
  }
  Fields& operator>>(int32_t& to) { return read(to); }
  Fields& operator>>(int64_t& to) { return read(to); }
  template <class T>
  Fields& operator>>(T*& to) {
    to = reinterpret_cast<T*>(from_[at_++].cast<uintptr_t>());
    return *this;
  }

 private:
  template <class T>
  Fields& read(T& to) {
    to = from_[at_++].cast<T>();
    return *this;
  }

  const py::tuple& from_;
  size_t at_ = 0;
};

template <class Arguments>
void read_sizes(Fields& fields, Arguments& a) {
  fields >> a.cell >> a.storage >> a.schedule >> a.directions >> a.time >> a.batch >> a.hidden >> a.rows;
}

void scan_forward(const py::tuple& from, intptr_t stream) {
  FusedrnnCudaForward a{};
  Fields fields(from, 22);
  read_sizes(fields, a);
  fields >> a.x_gates >> a.weight >> a.bias >> a.start >> a.states;
  fields >> a.output >> a.output_direction >> a.output_row >> a.saved >> a.cells;
  fields >> a.resets >> a.offsets >> a.lengths >> a.counters;
  const py::gil_scoped_release released;
  check(fusedrnn_cuda_scan_forward(&a, stream));
}

void scan_backward(const py::tuple& from, intptr_t stream) {
  FusedrnnCudaBackward a{};
  Fields fields(from, 28);
  read_sizes(fields, a);
  fields >> a.weight >> a.saved >> a.saved_direction >> a.saved_row >> a.cells >> a.cells0;
  fields >> a.output >> a.output_direction >> a.output_row >> a.start;
  fields >> a.grad >> a.grad_direction >> a.grad_row >> a.d_states >> a.d_x_gates >> a.d_h_gates;
  fields >> a.resets >> a.offsets >> a.lengths >> a.counters;
  const py::gil_scoped_release released;
  check(fusedrnn_cuda_scan_backward(&a, stream));
}

bool scan_fits(int cell, int storage, int schedule, int64_t hidden, bool backward) {
  const int code = fusedrnn_cuda_scan_fits(cell, storage, schedule, hidden, backward);
  if (fusedrnn_cuda_runs_no_code(code)) {  // an answer that lasts, as no other error is
    PyErr_Format(PyExc_NotImplementedError, "has no code that this GPU and its driver run (CUDA: %s)",
                 fusedrnn_cuda_error(code));
    throw py::error_already_set();
  }
  if (code != kFusedrnnCudaTooLarge) check(code);
  return code == 0;
}

int sync_capacity(int mechanism, int threads, int cluster, int bytes) {
  const int blocks = fusedrnn_cuda_sync_capacity(mechanism, threads, cluster, bytes);
  if (blocks < 0) check(-blocks);
  return blocks;
}

void sync_rounds(int mechanism, int blocks, int threads, int cluster, int bytes, int rounds, uint64_t scratch,
                 uint64_t result, intptr_t stream) {
  check(fusedrnn_cuda_sync_rounds(mechanism, blocks, threads, cluster, bytes, rounds, scratch, result, stream));
}

}  // namespace

#endif

void bind_cuda(py::module_& m) {
  py::module_ cuda = m.def_submodule("cuda", "CUDA code of fusedrnn over raw pointers.");
#ifdef FUSEDRNN_CUDA_ARCHITECTURES
  cuda.attr("architectures") = py::str(FUSEDRNN_CUDA_ARCHITECTURES).attr("split")();
  cuda.attr("missing") = py::none();
  cuda.def("scan_fits", &scan_fits, py::arg("cell"), py::arg("storage"), py::arg("schedule"), py::arg("hidden"),
           py::arg("backward"), "whether the current device can hold such scans: cuda/scan.h");
  cuda.def("scan_forward", &scan_forward, py::arg("fields"), py::arg("stream"), "FusedrnnCudaForward of cuda/scan.h");
  cuda.def("scan_backward", &scan_backward, py::arg("fields"), py::arg("stream"),
           "FusedrnnCudaBackward of cuda/scan.h");
  cuda.def("sync_capacity", &sync_capacity, py::arg("mechanism"), py::arg("threads"), py::arg("cluster"),
           py::arg("bytes"), "blocks that can exchange data at once: cuda/sync_latency.h");
  cuda.def("sync_rounds", &sync_rounds, py::arg("mechanism"), py::arg("blocks"), py::arg("threads"),
           py::arg("cluster"), py::arg("bytes"), py::arg("rounds"), py::arg("scratch"), py::arg("result"),
           py::arg("stream"), "rounds of an exchange between blocks: cuda/sync_latency.h");
#else
  cuda.attr("architectures") = py::list();
  cuda.attr("missing") = FUSEDRNN_NO_CUDA;
#endif
}
