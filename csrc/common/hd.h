// Function qualifiers for scalar code that the CPU and the CUDA kernels share.
#pragma once

#if defined(__CUDACC__)
#define MMFAST_HD __host__ __device__
#else
#define MMFAST_HD
#endif

// always_inline also keeps these functions out of the symbol table, see cmake/check_isa.cmake.
#define MMFAST_INLINE MMFAST_HD inline __attribute__((always_inline))
