// Vectors of the computing type from and to memory of any sample type. For files compiled once per instruction set only.
#pragma once

#include "common/scalar_types.h"
#include "common/simd.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace mmfast {
inline namespace MMFAST_ISA {

// The first `n` values from p on (at most a vector), zero behind them.
template <class T, class From>
MMFAST_INLINE typename Simd<T>::V load_as(const From* p, int64_t n) {
    using S = Simd<T>;
    constexpr int N = S::lanes;
    if constexpr (sizeof(From) == sizeof(T) && !std::is_integral_v<From>) {
        return S::load(reinterpret_cast<const T*>(p), int(n));
    } else if constexpr (std::is_same_v<From, BFloat16> && sizeof(T) == 4) {
        typename VectorOf<uint16_t, N>::type half{};
        if (n >= N) {
            // One instruction, where GCC 12 makes four of a conversion of vectors.
#if defined(__AVX512F__)
            return (typename S::V)_mm512_slli_epi32(
                _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
#elif defined(__AVX2__) && !defined(MMFAST_EMULATE_VECTORS)
            return (typename S::V)_mm256_slli_epi32(
                _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16);
#else
            __builtin_memcpy(&half, p, sizeof half);
#endif
        } else {
#if defined(__AVX512BW__)
            const __m256i some = _mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p);
            __builtin_memcpy(&half, &some, sizeof half);
#else
            for (int i = 0; i < n; ++i) half[i] = p[i].bits;
#endif
        }
        return S::template bits<typename S::U, typename S::V>(__builtin_convertvector(half, typename S::U) << 16);
    } else {
#if defined(__F16C__)
        if constexpr (std::is_same_v<From, Float16> && sizeof(T) == 4) {
#if defined(__AVX512F__)
            const __mmask16 some = n >= N ? 0xffff : __mmask16((1u << n) - 1);
            return (typename S::V)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, p));
#else
            alignas(32) Float16 part[N] = {};
            const Float16* from = p;
            if (n < N) {
                for (int i = 0; i < n; ++i) part[i] = p[i];
                from = part;
            }
            return (typename S::V)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#endif
        }
#endif
        alignas(64) T part[N] = {};
        for (int i = 0; i < (n < N ? n : N); ++i) part[i] = T(p[i]);
        return S::load(part);
    }
}

// The first `n` lanes of x, rounded to nearest.
template <class T, class To>
MMFAST_INLINE void store_as(To* p, typename Simd<T>::V x, int64_t n) {
    using S = Simd<T>;
    constexpr int N = S::lanes;
    if constexpr (sizeof(To) == sizeof(T) && !std::is_integral_v<To>) {
        S::store(reinterpret_cast<T*>(p), x, int(n));
    } else if constexpr (std::is_same_v<To, BFloat16> && sizeof(T) == 4) {
        using U = typename S::U;
        const U u = S::template bits<typename S::V, U>(x);
        const U rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
        const auto half =
            __builtin_convertvector(x != x ? U{} + 0x7fc0 : rounded, typename VectorOf<uint16_t, N>::type);
        if (n >= N) {
            __builtin_memcpy(p, &half, sizeof half);
        } else {
#if defined(__AVX512BW__)
            _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), (__m256i)half);
#else
            for (int i = 0; i < n; ++i) p[i].bits = half[i];
#endif
        }
    } else {
#if defined(__F16C__)
        if constexpr (std::is_same_v<To, Float16> && sizeof(T) == 4) {
#if defined(__AVX512F__)
            const __mmask16 some = n >= N ? 0xffff : __mmask16((1u << n) - 1);
            _mm256_mask_storeu_epi16(p, some, _mm512_cvtps_ph((__m512)x, 0));
#else
            alignas(32) Float16 part[N];
            _mm_store_si128(reinterpret_cast<__m128i*>(part), _mm256_cvtps_ph((__m256)x, 0));
            if (n >= N) __builtin_memcpy(p, part, sizeof part);
            else
                for (int i = 0; i < n; ++i) p[i] = part[i];
#endif
            return;
        }
#endif
        for (int i = 0; i < (n < N ? n : N); ++i) p[i] = To(x[i]);
    }
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
