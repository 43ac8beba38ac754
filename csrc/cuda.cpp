// fusedrnn._C.cuda: the CUDA code that this build holds, or why it holds none (setup.py says).
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#ifdef FUSEDRNN_CUDA_ARCHITECTURES
#include "cuda/sync_latency.h"
#endif

namespace py = pybind11;

#ifdef FUSEDRNN_CUDA_ARCHITECTURES

namespace {

void check(int code) {
  if (code != 0) throw std::runtime_error(std::string("CUDA: ") + fusedrnn_cuda_error(code));
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
