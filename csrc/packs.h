// Weights packed for the products of the scans (cpu/pack.h), kept from one call to the next.
//
// Kept beside the tensors, never as an attribute of theirs, which would leak into pickles and copies, and as long as
// they live. A pack is valid for an address, a shape, an ISA level and a hash of the content: writes through
// `param.data` do not bump a tensor's version. One that is in use is never changed.
#pragma once

#include <memory>

#include <pybind11/pybind11.h>

#include "dlpack.h"

namespace fusedrnn {

enum class Packing { kRows, kColumns };

// The pack of a contiguous matrix of a storage type, from the table or made now. Rows: [gates*n, k] -> [ceil(n/W),
// K(k), gates, W]; columns: [k, n] -> [ceil(n/W), K(k), W]. Needs the GIL, and may let go of it for a while.
//
// With `as_before` the content is what it was when a pack of this tensor was last asked for: a backward belongs to the
// forward that autograd has checked the versions of, and need not read the weights once more.
std::shared_ptr<const char> packed(PyObject* weight, const dlpack::Tensor& t, Packing packing, int64_t gates,
                                   int threads, bool as_before);

// The same, of a weight that the next call is expected to find changed: made now, kept by nobody.
std::shared_ptr<const char> packed_once(const dlpack::Tensor& t, Packing packing, int64_t gates, int threads);

}  // namespace fusedrnn

void bind_packs(pybind11::module_& m);
