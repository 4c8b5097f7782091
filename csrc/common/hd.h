// Function qualifiers for scalar code that the CPU and the CUDA kernels share.
#pragma once

#if defined(__CUDACC__)
#define MMFAST_HD __host__ __device__
#else
#define MMFAST_HD
#endif

#define MMFAST_INLINE inline __attribute__((always_inline))
