#include "level.h"

#include <stdlib.h>

#include <atomic>
#include <stdexcept>

namespace fusedrnn {
namespace {

#if defined(__x86_64__) || defined(_M_X64)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

struct Level {
  const Kernels* kernels;
  bool supported;
};

const std::vector<Level>& levels() {
  static const std::vector<Level> all = {
      {&kPortableKernels, true},
#if defined(__x86_64__) || defined(_M_X64)
      {&kAvx2Kernels, has_avx2()},
      {&kAvx512Kernels, has_avx512()},
      {&kAvx512Bf16Kernels,
       has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")},
#endif
  };
  return all;
}

const Kernels& best() {
  const Kernels* k = nullptr;
  for (const Level& level : levels()) {
    if (level.supported) k = level.kernels;
  }
  return *k;
}

const Kernels& named(const std::string& name, const char* argument) {
  std::string known;
  for (const Level& level : levels()) {
    if (name == level.kernels->name) {
      if (level.supported) return *level.kernels;
      throw std::invalid_argument(std::string(argument) + ": this CPU cannot run " + name);
    }
    known += (known.empty() ? "" : ", ") + std::string(level.kernels->name);
  }
  throw std::invalid_argument(std::string(argument) + ": expected one of " + known + ", got '" + name + "'");
}

std::atomic<const Kernels*> current{nullptr};

}  // namespace

std::vector<std::string> cpu_features() {
  std::vector<std::string> found;
#if defined(__x86_64__) || defined(_M_X64)
#define FUSEDRNN_FEATURE(name) \
  if (__builtin_cpu_supports(name)) found.push_back(name);
  FUSEDRNN_FEATURE("avx2")
  FUSEDRNN_FEATURE("fma")
  FUSEDRNN_FEATURE("f16c")
  FUSEDRNN_FEATURE("avx512f")
  FUSEDRNN_FEATURE("avx512bw")
  FUSEDRNN_FEATURE("avx512dq")
  FUSEDRNN_FEATURE("avx512vl")
  FUSEDRNN_FEATURE("avx512bf16")
  FUSEDRNN_FEATURE("avx512vnni")
#undef FUSEDRNN_FEATURE
  if (__builtin_cpu_is("amd")) found.push_back("amd");
#endif
  return found;
}

std::vector<std::string> supported_levels() {
  std::vector<std::string> names;
  for (const Level& level : levels()) {
    if (level.supported) names.push_back(level.kernels->name);
  }
  return names;
}

void set_level(const std::string& name) { current.store(name.empty() ? &best() : &named(name, "isa")); }

const Kernels& kernels() {
  const Kernels* k = current.load(std::memory_order_relaxed);
  if (k != nullptr) return *k;
  const char* wanted = getenv("FUSEDRNN_ISA");
  k = wanted != nullptr && *wanted != 0 ? &named(wanted, "FUSEDRNN_ISA") : &best();
  current.store(k);
  return *k;
}

}  // namespace fusedrnn
