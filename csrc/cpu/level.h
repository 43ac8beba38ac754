// The instruction set in use, and its kernels.
#pragma once

#include <string>
#include <vector>

#include "scan.h"

namespace fusedrnn {

std::vector<std::string> cpu_features();
std::vector<std::string> supported_levels();  // worst first
// The level in use: the best, or what FUSEDRNN_ISA or set_level asked for.
const Kernels& kernels();                     // throws std::invalid_argument on a bad FUSEDRNN_ISA
void set_level(const std::string& name);      // "" is automatic; throws std::invalid_argument

}  // namespace fusedrnn
