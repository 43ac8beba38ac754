// What a tensor's memory looks like, through DLPack's exchange table: a function pointer that torch
// publishes on its Tensor class, so that reading a tensor takes neither torch's headers nor an attribute
// look-up. The layout of these structs is fixed by DLPack 1: https://github.com/dmlc/dlpack
#pragma once

#include <stdint.h>

#include <Python.h>

namespace dlpack {

enum Device : int32_t { kCpu = 1 };
enum TypeCode : uint8_t { kInt = 0, kFloat = 2, kBfloat = 4, kBool = 6 };

struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t* shape;    // [ndim]
  int64_t* strides;  // [ndim], in elements
  uint64_t byte_offset;
};

inline bool is_float32(const Tensor& t) { return t.type_code == kFloat && t.type_bits == 32; }

struct ExchangeApi {
  struct {
    uint32_t major, minor;
  } version;
  void* previous;
  void* unused[3];
  // Describes a tensor until control returns; -1 with a Python exception set where it has no memory.
  int (*read)(void* tensor /*PyObject*/, Tensor* out);
  void* stream;
};

}  // namespace dlpack
