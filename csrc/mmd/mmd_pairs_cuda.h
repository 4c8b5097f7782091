// Launchers of mmd_pairs.h and mmd_pairs_gradient.h: raw pointers, sizes and a stream.
#pragma once

#include <cuda_runtime_api.h>

#include "mmd/mmd_pairs_gradient.h"

namespace mmfast {
namespace mmd {

// Whether this build has these kernels for the device, whose tensor cores they need.
bool has_pairs(int device);

void pairs_cuda(const PairsJob& job, int64_t batch, cudaStream_t stream);
void pairs_gradient_cuda(const PairsGradientJob& job, cudaStream_t stream);

}  // namespace mmd
}  // namespace mmfast
