// Error reporting without Torch: failures become C++ exceptions, which pybind11 turns into Python ones.
#pragma once

#include <cuda_runtime_api.h>

#include <sstream>
#include <stdexcept>
#include <string>

namespace specvlm {

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) +
                             ")");
  }
}

// check_argument(ok, "page_size: expected a power of two, got ", page_size)
template <typename... Parts>
void check_argument(bool ok, const Parts&... parts) {
  if (!ok) {
    std::ostringstream message;
    (message << ... << parts);
    throw std::invalid_argument(message.str());
  }
}

}  // namespace specvlm
