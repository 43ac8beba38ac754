// A plain read: what a level of the memory gives to a core that does nothing else.
#pragma once

#include "scan.h"

namespace fusedrnn {
namespace {

inline uint64_t read_all(const void* data, size_t bytes /*a multiple of kReadBytes*/) {
  typedef uint64_t Lanes __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES)));
  constexpr int kVectors = 8;
  static_assert(kReadBytes % (kVectors * sizeof(Lanes)) == 0);
  Lanes lane[kVectors] = {};
  for (const char *p = static_cast<const char*>(data), *end = p + bytes; p != end; p += sizeof lane) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      Lanes word;
      __builtin_memcpy(&word, p + v * sizeof word, sizeof word);
      lane[v] |= word;
    }
  }
  uint64_t all = 0;
  for (int v = 0; v < kVectors; ++v)
    for (size_t i = 0; i < FUSEDRNN_VECTOR_BYTES / sizeof all; ++i) all |= lane[v][i];
  return all;
}

}  // namespace
}  // namespace fusedrnn
