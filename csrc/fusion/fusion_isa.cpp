// The kernels for bfloat16 that this machine runs. Apart from what deals out the work, so that the tests that emulate their
// instructions, where MMFAST_EMULATED says whose, compile nothing else again.
#include "fusion/fusion_tile.h"

namespace mmfast {
namespace fusion {

const MatrixKernels& matrix_kernels() {
    static const MatrixKernels chosen = [] {
        MatrixKernels result{};
#if defined(MMFAST_EMULATED)
        if (best_isa() >= Isa::avx2) MMFAST_EMULATED::matrix_kernels_float(result);
#else
#if defined(MMFAST_AVX512_BF16)
        if (best_isa() == Isa::avx512_bf16) avx512_bf16::matrix_kernels_float(result);
#endif
#if defined(MMFAST_AMX)
        if (best_isa() == Isa::amx) amx::matrix_kernels_float(result);
#endif
#endif
        return result;
    }();
    return chosen;
}

}  // namespace fusion
}  // namespace mmfast
