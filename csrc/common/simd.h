// The vector type of the instruction set that a file is compiled for, its lanes independent; GCC and Clang vector
// extensions, so that one source serves every width. For files compiled once per instruction set only.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "common/hd.h"

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace mmfast {
inline namespace MMFAST_ISA {

#if defined(__AVX512F__) || defined(MMFAST_EMULATE_VECTORS)  // for tests: by what every machine has
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T, int N>
struct VectorOf {
    typedef T type __attribute__((vector_size(N * sizeof(T))));
};

// What this thread has streamed is seen by others before all that it stores later.
MMFAST_INLINE void stream_fence() {
#if defined(__AVX__)
    _mm_sfence();
#endif
}

template <class T>
struct Simd {
    static constexpr int lanes = kVectorBytes / int(sizeof(T));
    using V = typename VectorOf<T, lanes>::type;
    using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
    using I = typename VectorOf<Int, lanes>::type;
    using U = typename VectorOf<std::make_unsigned_t<Int>, lanes>::type;

    // Not x + 0, which is another number for x = -0 and costs an addition.
    static MMFAST_INLINE V splat(T x) { return x - V{}; }
    static MMFAST_INLINE V load(const T* p) {
        V v;
        __builtin_memcpy(&v, p, sizeof v);
        return v;
    }
    static MMFAST_INLINE void store(T* p, V v) { __builtin_memcpy(p, &v, sizeof v); }
    // Past the caches, to an aligned p: only for whole lines that nobody reads soon. Then a stream_fence() before others may.
    static MMFAST_INLINE void stream(T* p, V v) {
#if defined(__AVX512F__)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif defined(__AVX__)
        _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#else
        store(p, v);
#endif
    }
    // The first `n` lanes; the others are zero or left alone.
    static MMFAST_INLINE V load(const T* p, int n) {
        if (n >= lanes) return load(p);
#if defined(__AVX512F__)
        if constexpr (sizeof(T) == 4) return (V)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
#elif defined(__AVX2__)
        if constexpr (sizeof(T) == 4) {
            const I place = {0, 1, 2, 3, 4, 5, 6, 7};
            return (V)_mm256_maskload_ps(p, (__m256i)(place < n));
        }
#endif
        alignas(64) T part[lanes] = {};
        for (int i = 0; i < n; ++i) part[i] = p[i];
        return load(part);
    }
    static MMFAST_INLINE void store(T* p, V v, int n) {
        if (n >= lanes) return store(p, v);
#if defined(__AVX512F__)
        if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
#elif defined(__AVX2__)
        if constexpr (sizeof(T) == 4) {  // in pieces: some processors take twenty operations for a masked store
            __m128 part = _mm256_castps256_ps128((__m256)v);
            if (n & 4) {
                _mm_storeu_ps(p, part);
                part = _mm256_extractf128_ps((__m256)v, 1);
                p += 4;
            }
            if (n & 2) {
                _mm_storel_pi(reinterpret_cast<__m64*>(p), part);
                part = _mm_movehl_ps(part, part);
                p += 2;
            }
            if (n & 1) _mm_store_ss(p, part);
            return;
        }
#endif
        alignas(64) T part[lanes];
        store(part, v);
        for (int i = 0; i < n; ++i) p[i] = part[i];
    }
    // Lanes [first, first + n), n > 0, to p[0] and on.
    static MMFAST_INLINE void store_lanes(T* p, V v, int first, int n) {
#if defined(__AVX512F__)
        if constexpr (sizeof(T) == 4) {
            const __mmask16 some = __mmask16(((1u << n) - 1) << first);
            return store(p, (V)_mm512_maskz_compress_ps(some, (__m512)v), n);
        }
#endif
        alignas(64) T part[lanes];
        store(part, v);
        for (int i = 0; i < n; ++i) p[i] = part[first + i];
    }
    template <class From, class To>
    static MMFAST_INLINE To bits(From from) {
        To to;
        static_assert(sizeof from == sizeof to);
        __builtin_memcpy(&to, &from, sizeof to);
        return to;
    }
    static MMFAST_INLINE V sqrt(V x) {
        V y;
        for (int i = 0; i < lanes; ++i)
            y[i] = sizeof(T) == 4 ? T(__builtin_sqrtf(float(x[i]))) : T(__builtin_sqrt(double(x[i])));
        return y;
    }

    static MMFAST_INLINE bool all_zero(V x) {
#if defined(__AVX512F__)
        if constexpr (sizeof(T) == 4) return _mm512_cmp_ps_mask((__m512)x, _mm512_setzero_ps(), _CMP_NEQ_UQ) == 0;
#elif defined(__AVX2__)
        if constexpr (sizeof(T) == 4)
            return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, _mm256_setzero_ps(), _CMP_NEQ_UQ)) == 0;
#endif
        bool zero = true;
        for (int i = 0; i < lanes; ++i) zero &= x[i] == 0;
        return zero;
    }

    // a < b ? a : b and a > b ? a : b, which is b where either is NaN.
    static MMFAST_INLINE V min(V a, V b) {
#if defined(__AVX512F__)
        if constexpr (sizeof(T) == 4) return (V)_mm512_min_ps((__m512)a, (__m512)b);
#endif
        return a < b ? a : b;
    }
    static MMFAST_INLINE V max(V a, V b) {
#if defined(__AVX512F__)
        if constexpr (sizeof(T) == 4) return (V)_mm512_max_ps((__m512)a, (__m512)b);
#endif
        return a > b ? a : b;
    }
    // The least and the greatest of the lanes, none of which is NaN.
    template <int kLeft = lanes>
    static MMFAST_INLINE T lowest(V x) {
        if constexpr (kLeft == 1) return x[0];
        else return lowest<kLeft / 2>(min(x, rotate<kLeft / 2>(x, std::make_index_sequence<lanes>())));
    }
    template <int kLeft = lanes>
    static MMFAST_INLINE T highest(V x) {
        if constexpr (kLeft == 1) return x[0];
        else return highest<kLeft / 2>(max(x, rotate<kLeft / 2>(x, std::make_index_sequence<lanes>())));
    }

    // Sum of the lanes, in pairs: one half and the other, until one lane is left.
    template <int kLeft = lanes>
    static MMFAST_INLINE T sum(V x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
        // The same sums: what stays within a half of the register takes a third of the time.
        if constexpr (sizeof(T) == 4) {
            const __m128 four = _mm256_castps256_ps128((__m256)x) + _mm256_extractf128_ps((__m256)x, 1);
            const __m128 two = four + _mm_movehl_ps(four, four);
            return two[0] + two[1];
        } else {
            const __m128d two = _mm256_castpd256_pd128((__m256d)x) + _mm256_extractf128_pd((__m256d)x, 1);
            return two[0] + two[1];
        }
#else
        if constexpr (kLeft == 1) return x[0];
        else return sum<kLeft / 2>(x + rotate<kLeft / 2>(x, std::make_index_sequence<lanes>()));
#endif
    }

    // Lane i is the sum of the lanes of x[i], of `lanes` vectors: twice as many of them side by side in each round.
    template <int kSide = 1>
    static MMFAST_INLINE V sums(V* x) {
        if constexpr (kSide == lanes) {
            return x[0];
        } else {
            for (int i = 0; i < lanes / kSide / 2; ++i)
                x[i] = add_sides<kSide>(x[2 * i], x[2 * i + 1], std::make_index_sequence<lanes>());
            return sums<2 * kSide>(x);
        }
    }

    // Lanes 1 .. of x, then `next`.
    static MMFAST_INLINE V shift_in(V x, T next) {
#if defined(__AVX512F__)
        if constexpr (sizeof(T) == 4) return (V)_mm512_alignr_epi32((__m512i)splat(next), (__m512i)x, 1);
#endif
        return shift_in(x, next, std::make_index_sequence<lanes>());
    }

    // columns[c] = element c of each of the rows, read at `at`, for c < count.
    static MMFAST_INLINE void load_transposed(const T* const* rows, int64_t at, V* columns, int64_t count = lanes) {
#if defined(__AVX512F__)
        if constexpr (sizeof(T) == 4) {
            // Quarters of four rows are put together as they are loaded, which leaves half the shuffles.
            int q = 0;
            for (; 4 * q + 4 <= count; ++q) {
                __m512 z[4];
                for (int i = 0; i < 4; ++i) {
                    const auto part = [&](int k) { return _mm_loadu_ps(rows[4 * k + i] + at + 4 * q); };
                    z[i] = _mm512_insertf32x4(_mm512_castps128_ps512(part(0)), part(1), 1);
                    z[i] = _mm512_insertf32x4(_mm512_insertf32x4(z[i], part(2), 2), part(3), 3);
                }
                const __m512d a = (__m512d)_mm512_unpacklo_ps(z[0], z[1]), b = (__m512d)_mm512_unpacklo_ps(z[2], z[3]);
                const __m512d c = (__m512d)_mm512_unpackhi_ps(z[0], z[1]), d = (__m512d)_mm512_unpackhi_ps(z[2], z[3]);
                columns[4 * q] = (V)_mm512_unpacklo_pd(a, b);
                columns[4 * q + 1] = (V)_mm512_unpackhi_pd(a, b);
                columns[4 * q + 2] = (V)_mm512_unpacklo_pd(c, d);
                columns[4 * q + 3] = (V)_mm512_unpackhi_pd(c, d);
            }
            if (4 * q >= count) return;
            V rest[lanes];
            for (int i = 0; i < lanes; ++i) rest[i] = load(rows[i] + at + 4 * q, int(count - 4 * q));
            transpose(rest);
            for (int i = 0; 4 * q + i < count; ++i) columns[4 * q + i] = rest[i];
            return;
        }
#elif defined(__AVX2__)
        if constexpr (sizeof(T) == 4) {
            if (count == lanes) {  // halves of two rows are put together as they are loaded: a third of the shuffles
                for (int half = 0; half < 2; ++half) {
                    __m256 z[4];
                    for (int i = 0; i < 4; ++i)
                        z[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(rows[i] + at + 4 * half)),
                                                    _mm_loadu_ps(rows[4 + i] + at + 4 * half), 1);
                    transpose_quarters(z, columns + 4 * half);
                }
                return;
            }
        }
#endif
        for (int i = 0; i < lanes; ++i) columns[i] = load(rows[i] + at, int(count));
        transpose(columns);
    }

    // rows[i] becomes lane i of what the rows held: log2(lanes) rounds of interleaving.
    static MMFAST_INLINE void transpose(V* rows) {
#if defined(__AVX2__) && !defined(__AVX512F__)
        if constexpr (sizeof(T) == 4) {  // the halves first: 24 shuffles, not the 48 of rounds that cross halves
            __m256 low[4], high[4];
            for (int i = 0; i < 4; ++i) {
                low[i] = _mm256_permute2f128_ps((__m256)rows[i], (__m256)rows[4 + i], 0x20);
                high[i] = _mm256_permute2f128_ps((__m256)rows[i], (__m256)rows[4 + i], 0x31);
            }
            transpose_quarters(low, rows);
            transpose_quarters(high, rows + 4);
            return;
        }
#endif
        transpose(rows, std::make_index_sequence<lanes>());
    }

private:
#if defined(__AVX2__) && !defined(__AVX512F__)
    // to[c] = element c of the four rows in the low halves of z, then of those in the high halves.
    static MMFAST_INLINE void transpose_quarters(const __m256* z, V* to) {
        const __m256d a = (__m256d)_mm256_unpacklo_ps(z[0], z[1]), b = (__m256d)_mm256_unpacklo_ps(z[2], z[3]);
        const __m256d c = (__m256d)_mm256_unpackhi_ps(z[0], z[1]), d = (__m256d)_mm256_unpackhi_ps(z[2], z[3]);
        to[0] = (V)_mm256_unpacklo_pd(a, b);
        to[1] = (V)_mm256_unpackhi_pd(a, b);
        to[2] = (V)_mm256_unpacklo_pd(c, d);
        to[3] = (V)_mm256_unpackhi_pd(c, d);
    }
#endif
    template <size_t n, size_t... K>
    static MMFAST_INLINE V rotate(V x, std::index_sequence<K...>) {
        return __builtin_shufflevector(x, x, ((K + n) % lanes)...);
    }
    template <size_t n, size_t... K>
    static MMFAST_INLINE V add_sides(V a, V b, std::index_sequence<K...>) {
        return __builtin_shufflevector(a, b, (K / (2 * n) * 2 * n + K % n + K / n % 2 * lanes)...) +
               __builtin_shufflevector(a, b, (K / (2 * n) * 2 * n + K % n + K / n % 2 * lanes + n)...);
    }
    template <size_t... K>
    static MMFAST_INLINE V shift_in(V x, T next, std::index_sequence<K...>) {
        return __builtin_shufflevector(x, splat(next), (K + 1)...);
    }
    template <size_t... K>
    static MMFAST_INLINE void transpose(V* rows, std::index_sequence<K...>) {
        for (int round = 1; round < lanes; round *= 2) {
            V next[lanes];
            for (int i = 0; i < lanes / 2; ++i) {
                const V a = rows[i], b = rows[i + lanes / 2];
                next[2 * i] = __builtin_shufflevector(a, b, (K / 2 + (K % 2) * lanes)...);
                next[2 * i + 1] = __builtin_shufflevector(a, b, (lanes / 2 + K / 2 + (K % 2) * lanes)...);
            }
            for (int i = 0; i < lanes; ++i) rows[i] = next[i];
        }
    }
};

#if defined(__AVX512F__)
// Note: [Logarithm by a table]
//   x = m 2^e with m in [0.734, 1.469), which sixteen intervals share, one of them around 1. For each the table has c, a float
//   whose logarithm is to 2^-31 a multiple of 2^-16, and that logarithm: e ln 2 (its first part a multiple of 2^-9) less ln c
//   is then exact, and what is left, log1p(r) with r = c m - 1 and |r| < 0.032, takes a short polynomial. 15 operations
//   instead of 22. Counted from above, -e and the place in the table come from one difference.
template <bool kNormal, int kCount>
MMFAST_INLINE void log_finite(const Simd<float>::V* x, Simd<float>::V* result) {
    using S = Simd<float>;
    using V = S::V;
    using I = S::I;
    using U = S::U;
    constexpr float kUnit = 0x1p-16f;
    const V factor = {0x1.63439ap-1f, 0x1.73fbf4p-1f, 0x1.85ae74p-1f, 0x1.99bcb4p-1f, 0x1.aefef6p-1f, 0x1.c6022cp-1f,
                      0x1.e267c8p-1f, 0x1p+0f,        0x1.084896p+0f, 0x1.1123a2p+0f, 0x1.1a3e84p+0f, 0x1.246d98p+0f,
                      0x1.2ecb6ap+0f, 0x1.3ac174p+0f, 0x1.47d6c4p+0f, 0x1.54a622p+0f};
    const V logs = {23951 * kUnit,  20937 * kUnit,  17891 * kUnit,  14602 * kUnit,
                    11287 * kUnit,  7878 * kUnit,   3902 * kUnit,   0,
                    -2087 * kUnit,  -4247 * kUnit,  -6396 * kUnit,  -8719 * kUnit,
                    -11002 * kUnit, -13541 * kUnit, -16210 * kUnit, -18722 * kUnit};
    V less[kCount], r[kCount], log_c[kCount], y[kCount];
    for (int i = 0; i < kCount; ++i) {
        V z = x[i];
        if constexpr (!kNormal) z = z < 1.17549435e-38f ? z * 8388608.0f : z;
        const I down =
            I((0x3f3c0000u + 0x7fffffu) - S::bits<V, U>(z));  // unsigned, since the sign of a NaN makes it wrap
        const __m512i at = (__m512i)(down >> 19);             // its last four bits count
        less[i] = __builtin_convertvector(down >> 23, V);
        const V m = (V)_mm512_scalef_ps((__m512)z, (__m512)less[i]);
        if constexpr (!kNormal) less[i] = x[i] < 1.17549435e-38f ? less[i] + 23.0f : less[i];
        log_c[i] = (V)_mm512_permutexvar_ps(at, (__m512)logs);
        r[i] = (V)_mm512_fmsub_ps((__m512)m, _mm512_permutexvar_ps(at, (__m512)factor), _mm512_set1_ps(1));
    }
    // Each step for all values before the next: one value's chain is longer than a core looks ahead.
    for (int i = 0; i < kCount; ++i) y[i] = r[i] * 1.9984938e-1f - 2.5019510e-1f;
    for (int i = 0; i < kCount; ++i) y[i] = y[i] * r[i] + 3.3333350e-1f;
    for (int i = 0; i < kCount; ++i) y[i] = y[i] * r[i] - 4.9999997e-1f;
    for (int i = 0; i < kCount; ++i) y[i] = y[i] * (r[i] * r[i]) + r[i];
    for (int i = 0; i < kCount; ++i)
        result[i] = (less[i] * 2.12194440e-4f + y[i]) + (less[i] * -0.693359375f + log_c[i]);
}
#else
// x = m 2^e with m in [sqrt(1/2), sqrt(2)), a polynomial in m - 1 (the coefficients of Cephes' logf) and e ln 2 in two parts.
// Each step is done for all values before the next: one value's chain of twenty operations is longer than a core looks ahead.
template <bool kNormal, int kCount>
MMFAST_INLINE void log_finite(const Simd<float>::V* x, Simd<float>::V* result) {
    using S = Simd<float>;
    using V = S::V;
    using I = S::I;
    using U = S::U;
    constexpr float kCoefficients[] = {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f,
                                       -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f};
    V e[kCount], m[kCount], m2[kCount], y[kCount];
    for (int i = 0; i < kCount; ++i) {
        V z = x[i];
        I scaled{};
        if constexpr (!kNormal) {
            const auto subnormal = z < 1.17549435e-38f;
            z = subnormal ? z * 8388608.0f : z;
            scaled = subnormal ? I{} - 23 : I{};
        }
        const I u = I(S::bits<V, U>(z) - 0x3f3504f3u);  // sqrt(1/2); unsigned, since the sign of a NaN makes it wrap
        e[i] = __builtin_convertvector((u >> 23) + scaled, V);
        m[i] = S::bits<I, V>((u & 0x007fffff) + 0x3f3504f3) - 1.0f;
    }
    for (int i = 0; i < kCount; ++i) m2[i] = m[i] * m[i];
    for (int i = 0; i < kCount; ++i) y[i] = m[i] * 7.0376836292e-2f + kCoefficients[0];
    for (int k = 1; k < 8; ++k)
        for (int i = 0; i < kCount; ++i) y[i] = y[i] * m[i] + kCoefficients[k];
    for (int i = 0; i < kCount; ++i) y[i] = y[i] * m[i] * m2[i] + e[i] * -2.12194440e-4f - m2[i] * 0.5f;
    for (int i = 0; i < kCount; ++i) result[i] = m[i] + y[i] + e[i] * 0.693359375f;
}
#endif

// Natural logarithm of kCount values in place, within 1 ulp for float. As std::log for zero, infinity, NaN, negative and
// subnormal x; with kNormal, x is known to be NaN or at least the smallest normal number.
template <bool kNormal, int kCount>
MMFAST_INLINE void log_each(Simd<float>::V* x) {
    using S = Simd<float>;
    using V = S::V;
    const V infinity = S::splat(__builtin_inff());
    V y[kCount];
    log_finite<kNormal, kCount>(x, y);
    for (int i = 0; i < kCount; ++i) {
        if constexpr (!kNormal) {
            y[i] = x[i] == 0.0f ? -infinity : y[i];
            y[i] = x[i] < 0.0f ? S::splat(__builtin_nanf("")) : y[i];
        }
        x[i] = x[i] < infinity ? y[i] : x[i];  // infinity and NaN themselves
    }
}
template <bool kNormal, int kCount>
MMFAST_INLINE void log_each(Simd<double>::V* x) {
    for (int k = 0; k < kCount; ++k)
        for (int i = 0; i < Simd<double>::lanes; ++i) x[k][i] = __builtin_log(x[k][i]);
}

template <bool kNormal = false>
MMFAST_INLINE Simd<float>::V log(Simd<float>::V x) {
    log_each<kNormal, 1>(&x);
    return x;
}
template <bool kNormal = false>
MMFAST_INLINE Simd<double>::V log(Simd<double>::V x) {
    log_each<kNormal, 1>(&x);
    return x;
}

// Of 2^f for |f| <= 1/2: 1 at 0, elsewhere off by at most 3e-9, and on either side by nothing on average.
constexpr float kExp2[] = {
    1.532647148e-04f, 1.339080743e-03f, 9.618505836e-03f, 5.550359935e-02f, 2.402264774e-01f, 6.931471825e-01f, 1.0f};

// 2^x of kCount values in place, within 2 ulp for float: x = n + f with |f| <= 1/2, a polynomial in f times 2^n. Meant for
// x <= 0: below the normal numbers the result is 0 (one that is subnormal would take a hundred times as long), and no care is
// taken of overflow. NaN stays.
//
// Note: [Exponentials by a table]
//   With AVX-512 n counts sixteenths: one instruction finds 2^j, of the last four bits j of n, in a table of 16, and |f| <=
//   1/32 takes a polynomial of degree 3. 9 operations instead of 10, of which only 7 wait for each other instead of 9.
template <int kCount>
MMFAST_INLINE void exp2_each(Simd<float>::V* x) {
    using S = Simd<float>;
    using V = S::V;
#if defined(__AVX512F__)
    constexpr float kUnit = 786432.0f;  // 1.5 * 2^19: the last bit of the sum is worth 1/16
    const V table = {1.0f,       1.0442737f, 1.0905077f, 1.1387886f, 1.1892071f, 1.2418578f, 1.2968396f, 1.3542556f,
                     1.4142135f, 1.4768262f, 1.5422108f, 1.6104903f, 1.6817929f, 1.7562522f, 1.8340081f, 1.9152066f};
    for (int i = 0; i < kCount; ++i) {
        const V shifted = x[i] + kUnit;
        const V n = shifted - kUnit;
        const V f = x[i] - n;
        const V power = (V)_mm512_permutexvar_ps((__m512i)shifted, (__m512)table);
        const V y = power * f * ((f * 5.5504109e-2f + 2.4023431e-1f) * f + 6.9314718e-1f) + power;
        const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x[i], _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
        x[i] = (V)_mm512_maskz_scalef_ps(normal, (__m512)y, (__m512)n);  // by 2 to what n is rounded down to
    }
#else
    // Each step for all values before the next, as in log_finite.
    V shifted[kCount], f[kCount], y[kCount];
    for (int i = 0; i < kCount; ++i) shifted[i] = x[i] + 12582912.0f;  // 1.5 * 2^23: the last bit of the sum is worth 1
    for (int i = 0; i < kCount; ++i) f[i] = x[i] - (shifted[i] - 12582912.0f);
    for (int i = 0; i < kCount; ++i) y[i] = f[i] * kExp2[0] + kExp2[1];
    for (int k = 2; k < 7; ++k)
        for (int i = 0; i < kCount; ++i) y[i] = y[i] * f[i] + kExp2[k];
    for (int i = 0; i < kCount; ++i) {
        // Unsigned: it may wrap.
        const V scale = S::bits<S::U, V>((S::bits<V, S::U>(shifted[i]) - (0x4b400000u - 127)) << 23);
        const V result = y[i] * scale;
        x[i] = x[i] < -126.0f ? V{} : result;
    }
#endif
}
// y = y x + c[k], for each k from the first to the last: a part of a polynomial of kCount values.
template <int kFirst, int kLast, int kCount>
MMFAST_INLINE void go_on(Simd<float>::V (&y)[kCount], const Simd<float>::V (&x)[kCount], const float* c) {
    for (int k = kFirst; k <= kLast; ++k)
        for (int i = 0; i < kCount; ++i) y[i] = y[i] * x[i] + c[k];
}
// 2^x of kCount values x <= 0 step by step, for those who weave them with something else: x less the nearest integer n, a polynomial
// in that, times 2^n. There is no table, whose entries' rounding is the same for all x that are close to each other: for what is
// summed up over many such. Nor a shuffle or a comparison, which wait for one port.
template <int kCount>
struct Exp2Steps {
    using S = Simd<float>;
    using V = S::V;
    static constexpr int kSteps = 3;
    V x[kCount], f[kCount], y[kCount];  // x is n after the first step and the result after the last one

    template <int kStep>
    MMFAST_INLINE void step() {
        static_assert(kStep >= 0 && kStep < kSteps);
        if constexpr (kStep == 0) subtract_nearest();
        if constexpr (kStep == 1) go_on<2, 4>(y, f, kExp2);
        if constexpr (kStep == 2) {
            go_on<5, 6>(y, f, kExp2);
            for (int i = 0; i < kCount; ++i) x[i] = scaled(y[i], x[i]);
        }
    }
    // Exact. Less the integer below, which scalef takes of x, it would be rounded down.
    MMFAST_INLINE void subtract_nearest() {
        for (int i = 0; i < kCount; ++i) f[i] = rest(x[i]);
        for (int i = 0; i < kCount; ++i) y[i] = f[i] * kExp2[0] + kExp2[1];
        for (int i = 0; i < kCount; ++i) x[i] -= f[i];
    }

private:
#if defined(__AVX512F__)
    static MMFAST_INLINE V rest(V z) { return (V)_mm512_reduce_ps((__m512)z, 0x08); }
    static MMFAST_INLINE V scaled(V z, V n) { return (V)_mm512_scalef_ps((__m512)z, (__m512)n); }
#else
    static MMFAST_INLINE V rest(V z) { return z < -126.0f ? V{} : z - ((z + 12582912.0f) - 12582912.0f); }
    static MMFAST_INLINE V scaled(V z, V n) {
        const S::U exponent = S::bits<V, S::U>(n + 12582912.0f) - (0x4b400000u - 127);
        return n < -126.0f ? V{} : z * S::bits<S::U, V>(exponent << 23);
    }
#endif
};
// The same where all x are from -kExp2Near to 0 or little above, and given as x + kExp2NearMiddle: nothing is to be reduced then,
// nor scaled, which takes 7 operations instead of 11. Off by at most 1.4e-9 beside what rounding does, so that results may be
// mixed with those of Exp2Steps: what both are off by is hardly seen in differences of their sums.
constexpr float kExp2Near = 1.5f, kExp2NearMiddle = 0.75219864f;
constexpr float kExp2NearMiddleOf[] = {9.00553e-06f,   9.2269875e-05f, 7.916862e-04f, 5.710012e-03f,
                                       3.2952666e-02f, 0.14262204f,    0.41152015f,   0.5936981f};
template <int kCount>
struct Exp2NearSteps {
    using V = Simd<float>::V;
    static constexpr int kSteps = 3;
    V x[kCount], y[kCount];

    template <int kStep>
    MMFAST_INLINE void step() {
        static_assert(kStep >= 0 && kStep < kSteps);
        if constexpr (kStep == 0)
            for (int i = 0; i < kCount; ++i) y[i] = x[i] * kExp2NearMiddleOf[0] + kExp2NearMiddleOf[1];
        if constexpr (kStep == 1) go_on<2, 4>(y, x, kExp2NearMiddleOf);
        if constexpr (kStep == 2) {
            go_on<5, 7>(y, x, kExp2NearMiddleOf);
            for (int i = 0; i < kCount; ++i) x[i] = y[i];
        }
    }
};
// All of them at once; below the normal numbers 0.
template <int kCount>
MMFAST_INLINE void exp2_without_table(Simd<float>::V* x) {
#if defined(__AVX512F__)
    using V = Simd<float>::V;
    Exp2Steps<kCount> e;
    for (int i = 0; i < kCount; ++i) e.x[i] = x[i];
    e.subtract_nearest();
    go_on<2, 6>(e.y, e.f, kExp2);
    for (int i = 0; i < kCount; ++i) {
        const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x[i], _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
        x[i] = (V)_mm512_maskz_scalef_ps(normal, (__m512)e.y[i], (__m512)e.x[i]);
    }
#else
    exp2_each<kCount>(x);
#endif
}
MMFAST_INLINE Simd<float>::V exp2(Simd<float>::V x) {
    exp2_each<1>(&x);
    return x;
}

// The same for sums that are looked at before they are used: of x > 120 or NaN it is no number from 0 to 2^119; what is below
// 2^-125 may be 0 or 2^-125.
MMFAST_INLINE Simd<float>::V exp2_limited(Simd<float>::V x) {
#if defined(__AVX512F__)
    return exp2(x);  // far beyond, f is large and y may be negative
#else
    using S = Simd<float>;
    using V = S::V;
    x = S::max(S::min(x, S::splat(120.0f)), S::splat(-125.0f));
    const V shifted = x + 12582912.0f;
    const V f = x - (shifted - 12582912.0f);
    V y = f * kExp2[0] + kExp2[1];
    for (int k = 2; k < 7; ++k) y = y * f + kExp2[k];
    // n to the exponent of y; the shift leaves nothing of 1.5 * 2^23.
    return S::bits<S::U, V>(S::bits<V, S::U>(y) + (S::bits<V, S::U>(shifted) << 23));
#endif
}

// e^x, within 2 ulp for float; as exp2 in all else.
MMFAST_INLINE Simd<float>::V exp(Simd<float>::V x) {
    using S = Simd<float>;
    using V = S::V;
    const V shifted = x * 1.44269504f + 12582912.0f;
    const V n = shifted - 12582912.0f;
    const V f = x - n * 0.693359375f - n * -2.12194440e-4f;
    V y = f * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * f + 8.3334519073e-3f;
    y = y * f + 4.1665795894e-2f;
    y = y * f + 1.6666665459e-1f;
    y = y * f + 5.0000001201e-1f;
    y = y * f + 1.0f;
    y = y * f + 1.0f;  // not y f^2 + (f + 1), whose last sum would be rounded twice: a bias where f is small
#if defined(__AVX512F__)
    const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.33654f), _CMP_NLT_UQ);
    return (V)_mm512_maskz_scalef_ps(normal, (__m512)y, (__m512)n);
#else
    const V scale = S::bits<S::U, V>((S::bits<V, S::U>(shifted) - (0x4b400000u - 127)) << 23);  // unsigned: it may wrap
    const V result = y * scale;
    return x < -87.33654f ? V{} : result;
#endif
}

template <int kCount>
MMFAST_INLINE void exp2_each(Simd<double>::V* x) {
    for (int k = 0; k < kCount; ++k)
        for (int i = 0; i < Simd<double>::lanes; ++i) x[k][i] = __builtin_exp2(x[k][i]);
}
MMFAST_INLINE Simd<double>::V exp2(Simd<double>::V x) {
    exp2_each<1>(&x);
    return x;
}

MMFAST_INLINE Simd<double>::V exp(Simd<double>::V x) {
    for (int i = 0; i < Simd<double>::lanes; ++i) x[i] = __builtin_exp(x[i]);
    return x;
}

template <class V, class T>
MMFAST_INLINE V power(V x, T exponent) {
    for (int i = 0; i < int(sizeof(V) / sizeof(T)); ++i)
        x[i] = sizeof(T) == 4 ? T(__builtin_powf(float(x[i]), float(exponent)))
                              : T(__builtin_pow(double(x[i]), double(exponent)));
    return x;
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
