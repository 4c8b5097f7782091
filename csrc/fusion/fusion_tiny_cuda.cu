// Attention with heads of a few features on the GPU: fusion_tiny.h by blocks of kTinyThreads threads.
#include <cuda_runtime.h>

#include "common/check_cuda.h"
#include "fusion/fusion_tiny_cuda.h"

namespace mmfast {
namespace fusion {
namespace {

struct CudaBlock {
    template <class T>
    struct Kept {
        T own;
        __device__ __forceinline__ T& operator[](int) { return own; }
    };
    template <class F>
    __device__ __forceinline__ void each(const F& f) const {
        f(int(threadIdx.x));
        __syncthreads();
    }
};

template <class Kernel, int D>
__global__ void __launch_bounds__(kTinyThreads, Kernel::kBlocks) tiny(const __grid_constant__ TinyJob job) {
    __shared__ TinyMemory<D> memory;
    const CudaBlock block;
    Kernel(job, block, memory, int64_t(blockIdx.x)).run();
}

// The kernel for a job, and the rows of a thread.
struct Chosen {
    const void* kernel;
    int per;
};

template <int D>
Chosen choose(TinyKernel kernel) {
    using Shape = TinyShape<D>;
    static_assert(sizeof(TinyMemory<D>) <= 48 * 1024, "static shared memory");
    switch (kernel) {
        case TinyKernel::forward:
            return {reinterpret_cast<const void*>(&tiny<TinyForward<D, CudaBlock>, D>), Shape::kForward};
        case TinyKernel::of_query:
            return {reinterpret_cast<const void*>(&tiny<TinyOfQuery<D, CudaBlock>, D>), Shape::kOfQuery};
        default: return {reinterpret_cast<const void*>(&tiny<TinyOfKey<D, CudaBlock>, D>), Shape::kOfKey};
    }
}

Chosen choose(TinyKernel kernel, int64_t wide) {
    if (wide <= 4) return choose<4>(kernel);
    if (wide <= 6) return choose<6>(kernel);
    if (wide <= 8) return choose<8>(kernel);
    if (wide <= 12) return choose<12>(kernel);
    return choose<kTinyFeatures>(kernel);
}

}  // namespace

TinyLaunch tiny_launch(TinyKernel kernel, TinyJob& job, int device) {
    const auto [chosen, per] = choose(kernel, job.dim > job.value_dim ? job.dim : job.value_dim);
    const int64_t rows = kernel == TinyKernel::of_key ? job.keys : job.rows;
    int processors = 0;
    check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
               "attention: multiprocessors");
    // Blocks of more rows load the others less often; of fewer there are more to go around.
    job.row_warps = 2;
    if (rows <= 32 * per || 2 * tiny_blocks(job.batch, job.heads, rows, 2, per) < 3 * processors) job.row_warps = 1;
    return {chosen, unsigned(tiny_blocks(job.batch, job.heads, rows, job.row_warps, per))};
}

void tiny_start(const TinyLaunch& launch, TinyJob& job, cudaStream_t stream) {
    if (launch.blocks == 0) return;
    void* arguments[] = {&job};
    check_cuda(cudaLaunchKernel(launch.kernel, dim3(launch.blocks), dim3(kTinyThreads), arguments, 0, stream),
               "attention with heads of a few features");
}

void* tiny_function(const void* kernel) {
    cudaFunction_t function;
    check_cuda(cudaGetFuncBySymbol(&function, kernel), "attention: a kernel's handle");
    return function;
}

}  // namespace fusion
}  // namespace mmfast
