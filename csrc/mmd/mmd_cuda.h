// Launchers of the CUDA kernels of the mmd slice: raw pointers, sizes and a stream.
#pragma once

#include <cuda_runtime_api.h>

#include "mmd/mmd_block.h"

namespace mmfast {
namespace mmd {

// Shares of the columns that keep the multiprocessors at work; `job.sums` and `job.gradient` need room for each.
int few_shares(int64_t batch, int64_t n, int64_t m, int device);

// The sums and the gradient of quadratic forms for up to kFewFeatures features and one layer.
template <class T>
void quadratic_few_cuda(const FewJob<T>& job, cudaStream_t stream);

}  // namespace mmd
}  // namespace mmfast
