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

template <class T>
void run_forward(const Kernels& k, int cell, ForwardDirection<T>* directions, int count, int threads);
template <class T>
void run_backward(const Kernels& k, int cell, BackwardDirection<T>* directions, int count, int threads);

template <class T>
void run_pack_rows(const Kernels& k, const T* weight /*[gates*n, columns]*/, int64_t gates, int64_t n, int64_t columns,
                   T* packed, int threads);
template <class T>
void run_pack_columns(const Kernels& k, const T* weight /*[rows, n]*/, int64_t rows, int64_t n, T* packed, int threads);

// Asks for huge pages behind fresh memory: a fault per 4096 bytes takes longer than a scan that writes them.
void huge_pages(void* memory, size_t bytes);

}  // namespace fusedrnn
