// mmd_pairs_gradient.h on the tensor cores of sm_90a.
#include "mmd/mmd_pairs_gradient.h"

#include "mmd/mmd_pairs_cuda.h"
#include "mmd/mmd_warpgroups.cuh"

namespace mmfast {
namespace mmd {
namespace {

struct GradientBlock : Warpgroups {
#if defined(MMFAST_WARPGROUPS)
    __device__ __forceinline__ void open(uint64_t (&arrived)[2]) const {
        if (threadIdx.x < 2)
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared(&arrived[threadIdx.x])),
                         "r"(kPullThreads / 32)
                         : "memory");
        __syncthreads();
    }
    // With this thread's copies, but for the last `left` times that they were asked for.
    template <int left>
    __device__ __forceinline__ void arrive(uint64_t* arrived) const {
        wait_own_copies<left>();
        __syncwarp();
        if (threadIdx.x % 32 == 0)
            asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared(arrived)) : "memory");
    }
    __device__ __forceinline__ void wait(uint64_t* arrived, int parity) const {
        asm volatile(
            "{\n"
            ".reg .pred p;\n"
            "again:\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
            "@p bra there;\n"
            "bra again;\n"
            "there:\n"
            "}\n" ::"r"(shared(arrived)),
            "r"(parity)
            : "memory");
    }
    __device__ __forceinline__ void pull(Kept<PullRegisters>& kept, const uint16_t* hi, const uint16_t* lo) const {
        PullRegisters& mine = kept.own;
        const uint64_t head = descriptor(hi), low = descriptor(lo);
        constexpr int sixteen = 16 * kPairWidth * 2 / 16;
        hold(mine.sums);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
        MMFAST_UNROLL
        for (int k = 0; k < kPairHalf / 16; ++k) product<1>(mine.sums, mine.weights[0][k], head + sixteen * k, true);
        MMFAST_UNROLL
        for (int k = 0; k < kPairHalf / 16; ++k) product<1>(mine.sums, mine.weights[0][k], low + sixteen * k, true);
        MMFAST_UNROLL
        for (int k = 0; k < kPairHalf / 16; ++k) product<1>(mine.sums, mine.weights[1][k], head + sixteen * k, true);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    }
    __device__ __forceinline__ void wait_sums(Kept<PullRegisters>& kept) const {
        wait_groups<0>();
        hold(kept.own.sums);
    }
    template <class F>
    __device__ __forceinline__ bool all(const F& f) const {
        return __syncthreads_and(f(int(threadIdx.x)));
    }
    // Two numbers in two parts of float16, and back.
    __device__ __forceinline__ void split(float a, float b, uint32_t& head, uint32_t& low) const {
        float rounded[2];
        head = pack(a, b);
        join(head, rounded);
        low = pack(a - rounded[0], b - rounded[1]);
    }
    __device__ __forceinline__ void join(uint32_t packed, float (&to)[2]) const {
        asm("{\n"
            ".reg .f16 a, b;\n"
            "mov.b32 {a, b}, %2;\n"
            "cvt.f32.f16 %0, a;\n"
            "cvt.f32.f16 %1, b;\n"
            "}\n"
            : "=f"(to[0]), "=f"(to[1])
            : "r"(packed));
    }

private:
    static __device__ __forceinline__ uint32_t pack(float a, float b) {
        uint32_t packed;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(b), "f"(a));
        return packed;
    }
#endif
};

template <int Count>
__global__ void __launch_bounds__(kPullThreads, 1) pairs_gradient(const __grid_constant__ PairsGradientJob job) {
#if defined(MMFAST_WARPGROUPS)
    extern __shared__ unsigned char room[];
    unsigned char* aligned = room + (1024 - (__cvta_generic_to_shared(room) & 1023)) % 1024;
    const GradientBlock block;
    PairsGradient<Count, GradientBlock>(job, block, *reinterpret_cast<PairsGradientMemory*>(aligned),
                                        int64_t(blockIdx.x))
        .run();
#endif
}

template <int Count>
auto kernel_for(int terms) {
    if constexpr (Count < kPairTerms) {
        if (terms != Count) return kernel_for<Count + 1>(terms);
    }
    return pairs_gradient<Count>;
}

}  // namespace

void pairs_gradient_cuda(const PairsGradientJob& job, cudaStream_t stream) {
    constexpr int bytes = sizeof(PairsGradientMemory) + 1024;
    const auto kernel = kernel_for<1>(job.pairs.terms);
    const int64_t blocks = job.batch * job.row_tiles * job.strips;
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "mmd: shared memory");
    kernel<<<static_cast<unsigned>(blocks), kPullThreads, bytes, stream>>>(job);
    check_cuda(cudaGetLastError(), "mmd: gradients of pairs");
}

}  // namespace mmd
}  // namespace mmfast
