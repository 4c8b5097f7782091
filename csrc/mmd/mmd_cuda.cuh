// The quadratic forms for few features on the GPU: mmd_block.h by a block of 128 threads, a row each. A type is a file, for
// they take minutes to compile.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "common/check_cuda.h"
#include "mmd/mmd_cuda.h"

namespace mmfast {
namespace mmd {
namespace {

struct CudaBlock {
    template <class F>
    __device__ __forceinline__ void each(int n, const F& f) const {
        for (int i = int(threadIdx.x); i < n; i += kFewRows) f(i);
        __syncthreads();
    }
};

template <class T, int D>
__global__ void __launch_bounds__(kFewRows) few(const __grid_constant__ FewJob<T> job) {
    __shared__ FewMemory<T, D> memory;
    const CudaBlock block;
    Few<T, D, CudaBlock>(job, block, memory, int64_t(blockIdx.x)).run();
}

template <class T, int D, bool gradient, bool Single>
__global__ void __launch_bounds__(kFewRows) few_gaussians(const __grid_constant__ FewJob<T> job) {
    __shared__ FewMemory<T, D> memory;
    const CudaBlock block;
    Few<T, D, CudaBlock>(job, block, memory, int64_t(blockIdx.x)).template run_gaussians<gradient, Single>();
}

template <class T, int D>
auto kernel_for(const FewJob<T>& job) {
    // Twice the compilation, and for double the exponentials are most of the work anyway.
    if constexpr (std::is_same_v<T, float>) {
        if (all_gaussians(job)) {
            if (job.terms == 1)
                return job.gradient ? few_gaussians<T, D, true, true> : few_gaussians<T, D, false, true>;
            return job.gradient ? few_gaussians<T, D, true, false> : few_gaussians<T, D, false, false>;
        }
    }
    return few<T, D>;
}

template <class T, int D>
void launch(const FewJob<T>& job, cudaStream_t stream) {
    static_assert(sizeof(FewMemory<T, D>) <= 48 * 1024, "static shared memory");
    const int64_t blocks = few_tiles(job.n, job.m, kFewRows) * job.shares * job.batch;
    if (blocks == 0) return;
    kernel_for<T, D>(job)<<<static_cast<unsigned>(blocks), kFewRows, 0, stream>>>(job);
    check_cuda(cudaGetLastError(), "mmd: quadratic forms of few features");
}

}  // namespace

template <class T>
void quadratic_few_cuda(const FewJob<T>& job, cudaStream_t stream) {
    if (job.dimension <= 2) return launch<T, 2>(job, stream);
    if (job.dimension == 3) return launch<T, 3>(job, stream);
    if (job.dimension <= 4) return launch<T, 4>(job, stream);
    if (job.dimension <= 8) return launch<T, 8>(job, stream);
    launch<T, kFewFeatures>(job, stream);
}

}  // namespace mmd
}  // namespace mmfast
