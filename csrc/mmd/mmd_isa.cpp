// The copy of the tile kernels that this machine runs. Apart from the sweeps, so that the test that emulates the matrix unit
// compiles nothing else again.
#include "mmd/mmd_tile.h"

namespace mmfast {
namespace mmd {

template <>
const TileKernels<float>& tiles() {
    static const TileKernels<float> chosen = [] {
#if defined(MMFAST_AMX)
        if (best_isa() == Isa::amx) return amx::mmd_tiles_float();
#endif
        return MMFAST_FOR_ISA(best_isa(), mmd, mmd_tiles_float)();
    }();
    return chosen;
}

template <>
const TileKernels<double>& tiles() {
#if defined(MMFAST_EMULATE_VECTORS)  // of floats alone
    static const TileKernels<double> chosen = baseline::mmd_tiles_double();
#else
    static const TileKernels<double> chosen = MMFAST_FOR_ISA(best_isa(), mmd, mmd_tiles_double)();
#endif
    return chosen;
}

}  // namespace mmd
}  // namespace mmfast
