// What bindings.cpp calls: the ISA level, the split over threads, and a few helpers.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <string>
#include <utility>
#include <vector>

#include "scan.h"

namespace fusedrnn {

std::vector<std::string> cpu_features();
std::vector<std::string> supported_levels();  // worst first
// The level in use: the best, or what FUSEDRNN_ISA or set_level asked for.
const Kernels& kernels();                     // throws std::invalid_argument on a bad FUSEDRNN_ISA
void set_level(const std::string& name);      // "" is automatic; throws std::invalid_argument

int gates_of(int cell);

template <class T>
void run_forward(const Kernels& k, int cell, ForwardDirection<T>* directions, int count, int threads);
template <class T>
void run_backward(const Kernels& k, int cell, BackwardDirection<T>* directions, int count, int threads);

// previous[i] = the hidden state that row i's step started from.
void previous_rows(const Shape& s, bool reverse, const char* output, int64_t output_stride,
                   const char* initial, char* previous, int64_t row_bytes);

}  // namespace fusedrnn
