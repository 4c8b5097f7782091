// Launches of the kernels for heads of a few features: raw pointers, sizes and a stream.
#pragma once

#include <cuda_runtime_api.h>

#include "fusion/fusion_tiny.h"

namespace mmfast {
namespace fusion {

enum class TinyKernel { forward, of_query, of_key };

struct TinyLaunch {
    const void* kernel;  // of the one argument, a TinyJob
    unsigned blocks;
};

// What is to be launched for a job on the current device, with kTinyThreads threads a block; sets `job.row_warps`.
TinyLaunch tiny_launch(TinyKernel kernel, TinyJob& job, int device);

void tiny_start(const TinyLaunch& launch, TinyJob& job, cudaStream_t stream);

// The driver's handle of a kernel on the current device.
void* tiny_function(const void* kernel);

}  // namespace fusion
}  // namespace mmfast
