#include "common/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace mmfast {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

Isa supported() {
#if defined(MMFAST_X86)
    // These ask the operating system (XGETBV) as well as CPUID. They name every set that CMakeLists.txt turns on.
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512cd");
    return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::baseline;
#else
    return Isa::baseline;
#endif
}

Isa limited() {
    const Isa best = supported();
    const char* limit = std::getenv("MMFAST_CPU_ISA");
    if (limit == nullptr || *limit == '\0') {
        return best;
    }
    for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
        if (std::string(limit) == isa_name(isa)) {
            return isa < best ? isa : best;
        }
    }
    throw std::invalid_argument("MMFAST_CPU_ISA must be 'baseline', 'avx2' or 'avx512', got '" + std::string(limit) +
                                "'");
}

}  // namespace

Isa best_isa() {
    static const Isa isa = limited();
    return isa;
}

const char* isa_name(Isa isa) {
    return kNames[static_cast<int>(isa)];
}

const char* isa_built() {
#if defined(MMFAST_X86)
    return "baseline avx2 avx512";
#else
    return "baseline";
#endif
}

}  // namespace mmfast
