// The part of DLPack 1.x's C interface (github.com/dmlc/dlpack) that reads a framework's tensors without its headers:
// the table of functions that a tensor type offers as __dlpack_c_exchange_api__.
#pragma once

#include <cstdint>

namespace specvlm::dlpack {

constexpr std::uint32_t kMajorVersion = 1;
constexpr char kExchangeApiName[] = "dlpack_exchange_api";

struct Tensor {
  void* data;
  std::int32_t device_type, device_id;
  std::int32_t dims;
  std::uint8_t type_code, type_bits;
  std::uint16_t type_lanes;
  std::int64_t* shape;    // [dims], owned by the framework
  std::int64_t* strides;  // [dims], in elements
  std::uint64_t byte_offset;
};

struct ExchangeApi {
  std::uint32_t major, minor;
  const ExchangeApi* older;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  int (*tensor_from_py_object)(void* py_object, Tensor* out);  // -1: failed, with a Python exception set; may be null
  void* current_work_stream;
};

}  // namespace specvlm::dlpack
