// Scratch memory, aligned to a cache line.
#pragma once

#include <stdint.h>
#include <stdlib.h>

#include <algorithm>
#include <memory>
#include <new>

namespace fusedrnn {

struct Free {
  void operator()(void* p) const { free(p); }
};
using Buffer = std::unique_ptr<char, Free>;

inline Buffer allocate(int64_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, 64, static_cast<size_t>(std::max<int64_t>(bytes, 64))) != 0) throw std::bad_alloc();
  return Buffer(static_cast<char*>(p));
}

}  // namespace fusedrnn
