// What CUDA says of a call, as an exception.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace mmfast {

inline void check_cuda(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // or the next one to ask would take it for its own
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

}  // namespace mmfast
