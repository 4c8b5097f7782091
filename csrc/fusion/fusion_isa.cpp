// The kernels for the matrix unit that this machine runs. Apart from what deals out the work, so that the test that emulates the
// unit compiles nothing else again.
#include "fusion/fusion_tile.h"

#if !defined(MMFAST_MATRIX_FROM)
#define MMFAST_MATRIX_FROM amx
#endif

namespace mmfast {
namespace fusion {

const MatrixKernels& matrix_kernels() {
    static const MatrixKernels chosen = [] {
        MatrixKernels result{};
#if defined(MMFAST_AMX)
        if (best_isa() >= Isa::MMFAST_MATRIX_FROM) amx::matrix_kernels_float(result);
#endif
        return result;
    }();
    return chosen;
}

const MatrixWeights& matrix_weights() {
    static const MatrixWeights chosen = [] {
        MatrixWeights result{};
#if defined(MMFAST_AMX)
        if (best_isa() >= Isa::MMFAST_MATRIX_FROM) amx::matrix_weights_float(result);
#endif
        return result;
    }();
    return chosen;
}

}  // namespace fusion
}  // namespace mmfast
