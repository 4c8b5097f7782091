// Function qualifiers for scalar code that the CPU and the CUDA kernels share.
#pragma once

#if defined(__CUDACC__)
#define MMFAST_HD __host__ __device__
// For constant tables at namespace scope. Device code may not name a host variable; host code of a CUDA source may not
// read these in turn.
#define MMFAST_CONSTANT __device__ constexpr
#else
#define MMFAST_HD
#define MMFAST_CONSTANT constexpr
#endif

// Under the sanitizers each of the many copies would bring its own checks: minutes to compile.
#if defined(__SANITIZE_ADDRESS__) && !defined(MMFAST_QUICK_COMPILE)
#define MMFAST_QUICK_COMPILE
#endif

// MMFAST_ROLLED: a loop whose body is long enough. MMFAST_BY_THREE: one of about nine rounds, where eight at once are too many.
#if defined(__CUDA_ARCH__)
#define MMFAST_ROLLED _Pragma("unroll 1")
#define MMFAST_BY_THREE _Pragma("unroll 3")
#else
#define MMFAST_ROLLED
#define MMFAST_BY_THREE
#endif
#if defined(__CUDA_ARCH__)
#define MMFAST_UNROLL _Pragma("unroll")
#elif defined(__CUDACC__) || defined(MMFAST_QUICK_COMPILE)
#define MMFAST_UNROLL
#else
#define MMFAST_UNROLL _Pragma("GCC unroll 32")
#endif

// always_inline also keeps these functions out of the symbol table, see cmake/check_isa.cmake. For tests alone
// MMFAST_QUICK_COMPILE leaves that to the compiler; then the linker takes the first copy of a scalar function, baseline's.
// MMFAST_LAMBDA: the same of a lambda.
#if defined(MMFAST_QUICK_COMPILE)
#define MMFAST_INLINE MMFAST_HD inline
#define MMFAST_LAMBDA
#else
#define MMFAST_INLINE MMFAST_HD inline __attribute__((always_inline))
#define MMFAST_LAMBDA __attribute__((always_inline))
#endif
