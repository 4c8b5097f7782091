// mmd_pairs.h on the tensor cores of sm_90a.
#include "mmd/mmd_pairs_cuda.h"

#include <stdexcept>

#include "mmd/mmd_warpgroups.cuh"

namespace mmfast {
namespace mmd {
namespace {

struct PairsBlock : Warpgroups {
#if defined(MMFAST_WARPGROUPS)
    __device__ __forceinline__ void wait_copies() const {
        wait_own_copies<1>();
        __syncthreads();
    }
#endif
};

template <int Count>
__global__ void __launch_bounds__(kPairThreads, 1) pairs(const __grid_constant__ PairsJob job) {
#if defined(MMFAST_WARPGROUPS)
    extern __shared__ unsigned char room[];
    unsigned char* aligned = room + (1024 - (__cvta_generic_to_shared(room) & 1023)) % 1024;
    const PairsBlock block;
    Pairs<Count, PairsBlock>(job, block, *reinterpret_cast<PairMemory*>(aligned), int64_t(blockIdx.x)).run();
#endif
}

template <int Count>
auto kernel_for(int terms) {
    if constexpr (Count < kPairTerms) {
        if (terms != Count) return kernel_for<Count + 1>(terms);
    }
    return pairs<Count>;
}

}  // namespace

bool has_pairs(int device) {
    int major = 0, minor = 0;
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "mmd: architecture");
    check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "mmd: architecture");
    if (major != 9 || minor != 0) return false;
    cudaFuncAttributes found;  // a build for sm_90 without its own instructions has the empty kernel
    if (cudaFuncGetAttributes(&found, pairs<kPairTerms>) == cudaSuccess) return found.numRegs >= 64;
    cudaGetLastError();
    return false;
}

void pairs_cuda(const PairsJob& job, int64_t batch, cudaStream_t stream) {
    constexpr int bytes = sizeof(PairMemory) + 1024;
    const auto kernel = kernel_for<1>(job.terms);
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "mmd: shared memory");
    kernel<<<static_cast<unsigned>(batch * job.blocks), kPairThreads, bytes, stream>>>(job);
    check_cuda(cudaGetLastError(), "mmd: sums of pairs");
}

}  // namespace mmd
}  // namespace mmfast
