// A 64-bit hash of all bytes of a weight: lanes of multiply and rotate, then the lanes combined.
// Each step is a bijection of its lane, so a single changed word always changes the hash; the rotation brings high
// bits (signs) back to where a product spreads them. What a change of the lane's next word could undo, as of a sign by
// that of an exponent, is in a sum of all words and a sum of its values (Fletcher's), which two changed words never
// leave both as they were. The value depends on the ISA level, as the lanes' width does.
#pragma once

#include <stddef.h>

#include "simd.h"

namespace fusedrnn {
namespace {

inline uint64_t fingerprint(const void* data, size_t bytes) {
  typedef uint64_t Lanes __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES)));
  constexpr int kVectors = 8, kWidth = FUSEDRNN_VECTOR_BYTES / 8;  // 8 hide the product's latency
  constexpr uint64_t kPrime = 0x9E3779B185EBCA87ull;
  Lanes lane[kVectors];
  for (int v = 0; v < kVectors; ++v)
    for (int i = 0; i < kWidth; ++i) lane[v][i] = kPrime * (2 * (v * kWidth + i) + 1);
  Lanes sum{}, sums{};
  const auto step = [&](const char* from) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      Lanes word;
      __builtin_memcpy(&word, from + v * sizeof word, sizeof word);
      const Lanes mixed = (lane[v] ^ word) * kPrime;
      lane[v] = (mixed << 31) | (mixed >> 33);
      sum += word;
    }
    sums += sum;
  };
  const char* p = static_cast<const char*>(data);
  size_t left = bytes;
  for (; left >= sizeof lane; left -= sizeof lane, p += sizeof lane) step(p);
  if (left != 0) {
    char last[sizeof lane] = {};
    __builtin_memcpy(last, p, left);
    step(last);
  }
  uint64_t hash = bytes * kPrime;
  const auto combine = [&](const Lanes& part) {
    for (int i = 0; i < kWidth; ++i) {
      hash = (hash ^ part[i]) * kPrime;
      hash ^= hash >> 29;
    }
  };
  for (const Lanes& each : lane) combine(each);
  combine(sum);
  combine(sums);
  return hash;
}

}  // namespace
}  // namespace fusedrnn
