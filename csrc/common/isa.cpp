#include "common/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(MMFAST_X86)
#include <cpuid.h>
#endif
#if defined(MMFAST_AMX) && !defined(MMFAST_EMULATE_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define MMFAST_ASK_FOR_AMX
#endif

namespace mmfast {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx"};

constexpr Isa kBuilt[] = {
    Isa::baseline,
#if defined(MMFAST_AVX2)
    Isa::avx2,
#endif
#if defined(MMFAST_AVX512)
    Isa::avx512,
#endif
#if defined(MMFAST_AVX512_BF16)
    Isa::avx512_bf16,
#endif
#if defined(MMFAST_AMX)
    Isa::amx,
#endif
};

// AVX512_BF16.
[[maybe_unused]] bool has_bfloat16() {
#if defined(MMFAST_X86)
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 5));
#else
    return false;
#endif
}

// The matrix unit for bfloat16, which the operating system lends to a process that asks.
[[maybe_unused]] bool amx_granted() {
#if defined(MMFAST_EMULATE_AMX)
    return true;
#elif defined(MMFAST_ASK_FOR_AMX)
    constexpr unsigned kBFloat16 = 1u << 22, kTiles = 1u << 24;
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA: Linux 5.16
    unsigned a, b, c, d;
    if (!has_bfloat16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (~d & (kBFloat16 | kTiles))) return false;
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
    return false;
#endif
}

Isa supported() {
#if defined(MMFAST_EMULATE_VECTORS)
    return Isa::amx;
#elif defined(MMFAST_X86)
    // These ask the operating system (XGETBV) as well as CPUID. They name every set that CMakeLists.txt turns on.
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512cd");
    if (avx512 && amx_granted()) return Isa::amx;
    if (avx512 && has_bfloat16()) return Isa::avx512_bf16;
    return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::baseline;
#else
    return Isa::baseline;
#endif
}

Isa best_built(Isa limit) {
    Isa best = Isa::baseline;
    for (Isa isa : kBuilt)
        if (isa <= limit) best = isa;
    return best;
}

Isa limited() {
    const Isa best = supported();
    const char* limit = std::getenv("MMFAST_CPU_ISA");
    if (limit == nullptr || *limit == '\0') {
        return best_built(best);
    }
    for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx}) {
        if (std::string(limit) == isa_name(isa)) {
            return best_built(isa < best ? isa : best);
        }
    }
    throw std::invalid_argument("MMFAST_CPU_ISA must be 'baseline', 'avx2', 'avx512', 'avx512_bf16' or 'amx', got '" +
                                std::string(limit) + "'");
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
    static const std::string names = [] {
        std::string all;
        for (Isa isa : kBuilt) {
            if (!all.empty()) all += ' ';
            all += isa_name(isa);
        }
        return all;
    }();
    return names.c_str();
}

}  // namespace mmfast
