// Launcher of mmd_pairs.h: raw pointers, sizes and a stream.
#pragma once

#include <cuda_runtime_api.h>

#include "mmd/mmd_pairs.h"

namespace mmfast {
namespace mmd {

// Whether this build has the kernel for the device, whose tensor cores it needs.
bool has_pairs(int device);

void pairs_cuda(const PairsJob& job, int64_t batch, cudaStream_t stream);

}  // namespace mmd
}  // namespace mmfast
