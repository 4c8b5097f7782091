// Instruction sets of the CPU kernels, and the choice between them at run time.
//
// A file such as mel_tile.cpp is compiled once per instruction set with MMFAST_ISA defined as its name, and puts all it
// defines into the namespace of that name. The linker keeps only one copy of an inline function that several files
// define, perhaps the AVX-512 one: such files therefore share no external symbol with any other
// (cmake/check_isa.cmake).
#pragma once

namespace mmfast {

// Two are of use to some kernels only: avx512_bf16, AVX-512 with products of bfloat16, and amx, with the matrix unit for
// them too.
enum class Isa { baseline, avx2, avx512, avx512_bf16, amx };

// Best instruction set that was built and that the processor and the operating system support, but none above the
// environment variable MMFAST_CPU_ISA ("baseline", "avx2", "avx512", "avx512_bf16", "amx"). Read once.
// Throws std::invalid_argument for another value of the variable.
Isa best_isa();

const char* isa_name(Isa isa);

// Names of the instruction sets built, separated by spaces.
const char* isa_built();

}  // namespace mmfast

// The copies of the CPU kernels that were built define MMFAST_AVX2, MMFAST_AVX512, MMFAST_AVX512_BF16 and MMFAST_AMX;
// baseline always is.
#if defined(MMFAST_AVX2)
#define MMFAST_FROM_AVX2(isa, slice, name, otherwise) \
    ((isa) >= ::mmfast::Isa::avx2 ? &::mmfast::slice::avx2::name : (otherwise))
#else
#define MMFAST_FROM_AVX2(isa, slice, name, otherwise) (otherwise)
#endif
#if defined(MMFAST_AVX512)
#define MMFAST_FROM_AVX512(isa, slice, name, otherwise) \
    ((isa) >= ::mmfast::Isa::avx512 ? &::mmfast::slice::avx512::name : (otherwise))
#else
#define MMFAST_FROM_AVX512(isa, slice, name, otherwise) (otherwise)
#endif

// name's variant for isa: MMFAST_FOR_ISA(isa, mel, tile_f32) is mmfast::mel::<isa>::tile_f32.
#define MMFAST_FOR_ISA(isa, slice, name) \
    ((void)(isa),                        \
     MMFAST_FROM_AVX512(isa, slice, name, MMFAST_FROM_AVX2(isa, slice, name, &::mmfast::slice::baseline::name)))
