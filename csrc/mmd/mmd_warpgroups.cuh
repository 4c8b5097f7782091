// Tensor cores of sm_90a, which take a whole warpgroup's operands at once and work beside it (wgmma), for mmd_pairs.h and
// mmd_pairs_gradient.h.
#pragma once

#include <cuda_runtime.h>

#include "common/check_cuda.h"
#include "mmd/mmd_pairs.h"

// Other architectures, and sm_90 without its own instructions, have empty kernels that nobody starts.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MMFAST_WARPGROUPS
#endif

namespace mmfast {
namespace mmd {

struct Warpgroups {
    template <class T>
    struct Kept {
        T own;
        __device__ __forceinline__ T& operator[](int) { return own; }
    };

#if defined(MMFAST_WARPGROUPS)
    template <class F>
    __device__ __forceinline__ void each(const F& f) const {
        f(int(threadIdx.x));
    }
    __device__ __forceinline__ void barrier() const { __syncthreads(); }
    __device__ __forceinline__ uint32_t two(const uint16_t* from) const {
        return *reinterpret_cast<const uint32_t*>(from);
    }
    __device__ __forceinline__ void copy(void* to, const void* from) const {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared(to)), "l"(from) : "memory");
    }
    __device__ __forceinline__ void commit() const { asm volatile("cp.async.commit_group;" ::: "memory"); }
    // For all but the last `left` tiles' products; one that is done is `which`.
    template <int left, int which, class Registers>
    __device__ __forceinline__ void wait_products(Kept<Registers>& kept) const {
        wait_groups<left>();
        hold(kept.own.tiles[which]);  // it must not be read before
    }
    template <int which, class Registers>
    __device__ __forceinline__ void multiply(Kept<Registers>& kept, const uint16_t* hi, const uint16_t* lo) const {
        Registers& mine = kept.own;
        float (&tile)[kPairHalf / 2] = mine.tiles[which];
        const uint64_t head = descriptor(hi), low = descriptor(lo);
        hold(tile);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
        MMFAST_UNROLL
        for (int k = 0; k < kPairWidth / 16; ++k) product<0>(tile, mine.points[0][k], head + 2 * k, k > 0);
        MMFAST_UNROLL
        for (int k = 0; k < kPairWidth / 16; ++k) product<0>(tile, mine.points[0][k], low + 2 * k, true);
        MMFAST_UNROLL
        for (int k = 0; k < kPairWidth / 16; ++k) product<0>(tile, mine.points[1][k], head + 2 * k, true);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    }

protected:
    static __device__ __forceinline__ uint32_t shared(const void* at) { return uint32_t(__cvta_generic_to_shared(at)); }
    // For this thread's copies but the last `left` times that they were asked for; tensor cores read past the usual way.
    template <int left>
    static __device__ __forceinline__ void wait_own_copies() {
        asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    template <int left>
    static __device__ __forceinline__ void wait_groups() {
        asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(left) : "memory");
    }
    static __device__ __forceinline__ void hold(float (&d)[32]) {
        asm volatile(""
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
                       "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),
                       "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),
                       "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),
                       "+f"(d[29]), "+f"(d[30]), "+f"(d[31])::"memory");
    }
    // Of rows of 128 bytes whose pieces change places by their row: begin, eight rows' bytes, all in units of 16, and the
    // kind (1: 128 bytes). Whether the rows are columns of the product or what is added up over, it is the same.
    static __device__ __forceinline__ uint64_t descriptor(const uint16_t* from) {
        const uint64_t at = (uint64_t(shared(from)) & 0x3ffff) >> 4;
        return at | uint64_t(1) << 16 | uint64_t(8 * kPairWidth * 2 / 16) << 32 | uint64_t(1) << 62;
    }
    // The right operand's rows: columns of the product, or with `turned` what is added up over.
    template <int turned>
    static __device__ __forceinline__ void product(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool adds) {
        asm volatile(
            "{\n"
            ".reg .pred p;\n"
            "setp.ne.b32 p, %37, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
            "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
            "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
            "{%32, %33, %34, %35}, %36, p, 1, 1, %38;\n"
            "}\n"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
              "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
              "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
              "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(adds)), "n"(turned));
    }
#endif
};

}  // namespace mmd
}  // namespace mmfast
