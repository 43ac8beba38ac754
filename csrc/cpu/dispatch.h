// Kernels on teams of threads: layers, stacks of them, projections, packs and hashes.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "level.h"
#include "scan.h"

namespace fusedrnn {

template <class S>
void run_forward(const Kernels& k, int cell, ForwardDirection<S>* directions, int count, int threads);
// A stack of layers of one direction, dense; the output of each is the input of the next.
template <class S>
void run_stack(const Kernels& k, int cell, ForwardDirection<S>* layers, int count, int threads);
template <class S>
void run_backward(const Kernels& k, int cell, BackwardDirection<S>* directions, int count, int threads);
// The same stack, its last layer first; d_input of each is d_output of the next.
template <class S>
void run_stack(const Kernels& k, int cell, BackwardDirection<S>* layers, int count, int threads);

// Weights in the layouts of Functions, by all threads.
template <class S>
void run_pack_rows(const Kernels& k, const S* weight /*[gates*n, columns]*/, int64_t gates, int64_t n, int64_t columns,
                   Factor<S>* packed, int threads);
template <class S>
void run_pack_columns(const Kernels& k, const S* weight /*[rows, n]*/, int64_t rows, int64_t n, Factor<S>* packed,
                      int threads);

void run_linear(const Kernels& k, const LinearForward& l, int threads);
void run_linear(const Kernels& k, const LinearBackward& l, int threads);

// A hash of all bytes (cpu/fingerprint.h), the same for any number of threads.
uint64_t run_fingerprint(const Kernels& k, const void* data, int64_t bytes, int threads);

// Every thread reads its share of the data `repeats` times.
uint64_t run_read(const Kernels& k, const void* data, size_t bytes, int64_t repeats, int threads);

}  // namespace fusedrnn
