// What a call of the block kernels works on, and the scalar mathematics that only they need.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

#include "common/scalar_types.h"
#include "mel/mel_core.h"

namespace mmfast {
namespace mel {

// Tables of a transform as the block kernels read them (BlockTables).
template <class T>
struct BlockPlan {
    RealPlan<T> fft;                 // twiddle: [R / 2][S][cos, sin]
    ComplexPlan<T> convolution;      // in place of fft.row.convolution
    const T* row_twiddle = nullptr;  // [A][P][cos, sin] of a TunedShape
};

// Filters by row, from the first non-zero weight to the last one, and the filters that each bin feeds. Weights go in pairs,
// those of neighbouring filters beside each other: weight j of filter i stands at (j / 2 rows + i) 2 + j % 2, a zero after an
// odd number.
template <class T>
struct SparseFilters {
    int64_t rows = 0;                                          // 0: the bare spectrum
    const int32_t *row_first = nullptr, *row_count = nullptr;  // [rows]
    const int32_t *bin_first = nullptr, *bin_count = nullptr;  // [K]
    const T* weights = nullptr;                                // [(K + 1) / 2][rows][2]
    const T* dense = nullptr;                                  // [K][rows]
};

template <class T>
struct Extrema {
    T lowest, highest;
};

// What a call of a kernel works on; plain, handed over by value.
template <class T>
struct BlockJob {
    MelParams<T> p;  // filters and fft are not used
    BlockPlan<T> plan;
    SparseFilters<T> filters;

    const void* data = nullptr;
    ScalarType type = ScalarType::float32;
    int64_t rows = 0, length = 0, row_stride = 0, sample_stride = 0;
    const int64_t* lengths = nullptr;
    T signal_preemphasis = 0;

    void* features = nullptr;
    ScalarType out_type = ScalarType::float32;
    T fill = 0;
    int64_t* counts = nullptr;
    int64_t frames = 0, feature_count = 0, tiles = 0;  // of a row
    int64_t group = 1;                                 // rows that share a maximum
    Extrema<T>* extrema = nullptr;                     // [rows][tiles]; null: not wanted
    const T* maxima = nullptr;                         // [groups]
    bool clip = false;                                 // second round: the maximum is known

    // Backward. grad: laid out as the features. grad_wave: [rows][length]. spans: [rows][tiles][span], the gradient of the staged
    // samples of a tile, where it is not all that there is for a sample (OwnSamples).
    const T* grad = nullptr;
    T *grad_wave = nullptr, *spans = nullptr;
    T* filter_sums = nullptr;  // [slots][K][rows], added to
    T* raised = nullptr;       // [rows][tiles]: gradient of values that top_db raised
    T* highest = nullptr;      // [rows][tiles]: largest v, as this kernel computes it
    int32_t* hits = nullptr;   // [rows][tiles]: how many v equal it
    const T *group_highest = nullptr,
            *share = nullptr;  // [groups]; share_only: gradient for every v that equals the highest
    bool share_only = false;

    MMFAST_INLINE int64_t bins() const { return plan.fft.n / 2 + 1; }
    MMFAST_INLINE int64_t bands() const { return filters.rows ? filters.rows : bins(); }
    MMFAST_INLINE int64_t row_length(int64_t row) const {
        if (!lengths) return length;
        const int64_t n = lengths[row];
        return n < 0 ? 0 : n > length ? length : n;
    }
    MMFAST_INLINE int64_t count(int64_t row) const {
        if (!lengths) return frames;
        const int64_t n = p.framing.count(row_length(row));
        return n < frames ? n : frames;
    }
};

// ---- Scalars --------------------------------------------------------------------------------------------------------

MMFAST_INLINE float half_to_float(uint16_t bits) {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(bits));
#else
    Float16 h;
    std::memcpy(&h, &bits, sizeof h);
    return float(h);
#endif
}

MMFAST_INLINE uint16_t float_to_half(float x) {
#if defined(__CUDA_ARCH__)
    return __half_as_ushort(__float2half_rn(x));
#else
    const Float16 h = Float16(x);
    uint16_t bits;
    std::memcpy(&bits, &h, sizeof bits);
    return bits;
#endif
}

MMFAST_INLINE float bfloat_to_float(uint16_t bits) {
    const uint32_t u = uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &u, sizeof x);
    return x;
}

MMFAST_INLINE uint16_t float_to_bfloat(float x) {  // to nearest, ties to even; NaN stays NaN
    uint32_t u;
    std::memcpy(&u, &x, sizeof u);
    return x != x ? uint16_t(0x7fc0) : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

template <class T>
MMFAST_INLINE T load_as(const void* data, ScalarType type, int64_t i) {
    switch (type) {
        case ScalarType::float32: return T(static_cast<const float*>(data)[i]);
        case ScalarType::float64: return T(static_cast<const double*>(data)[i]);
        case ScalarType::float16: return T(half_to_float(static_cast<const uint16_t*>(data)[i]));
        case ScalarType::bfloat16: return T(bfloat_to_float(static_cast<const uint16_t*>(data)[i]));
        default: return T(static_cast<const int16_t*>(data)[i]);
    }
}

// Not the fast variants of CUDA: near 1 they have no relative accuracy.
MMFAST_INLINE float log_of(float x) {
    return logf(x);
}
MMFAST_INLINE double log_of(double x) {
    return log(x);
}
MMFAST_INLINE float root_of(float x) {
    return sqrtf(x);
}
MMFAST_INLINE double root_of(double x) {
    return sqrt(x);
}
MMFAST_INLINE float power_of(float x, float y) {
    return powf(x, y);
}
MMFAST_INLINE double power_of(double x, double y) {
    return pow(x, y);
}
MMFAST_INLINE float cos_of(float x) {
    return cosf(x);
}
MMFAST_INLINE double cos_of(double x) {
    return cos(x);
}

template <class T>
MMFAST_INLINE T infinity_of() {
    return T(__builtin_inff());
}

// |X|^2 to (|X|^2 + offset)^(power / 2).
template <class T>
MMFAST_INLINE T raise_power(const MelParams<T>& p, T square) {
    const T s = square + p.power_offset;
    return p.power == 2 ? s : p.power == 1 ? root_of(s) : power_of(s, p.power / 2);
}

// Its derivative, 0 where it has none.
template <class T>
MMFAST_INLINE T raise_power_slope(const MelParams<T>& p, T square) {
    const T s = square + p.power_offset;
    if (p.power == 2) return T(1);
    if (s == T(0)) return T(0);
    return p.power == 1 ? T(0.5) / root_of(s) : power_of(s, p.power / 2 - 1) * (p.power / 2);
}

// N values at once: their logarithms are chains of 25 operations, and one after the other each would wait for the last.
template <int N, class T>
MMFAST_INLINE void compress_values(const MelParams<T>& p, T* m) {
    if (!p.log) return;
    MMFAST_UNROLL
    for (int i = 0; i < N; ++i) {
        const T ln = log_of((m[i] < p.log_floor ? p.log_floor : m[i]) + p.log_offset);
        m[i] = ln * p.log_scale + (ln * p.log_scale_low + p.log_shift);  // parts of one sign: infinity stays
    }
}
template <class T>
MMFAST_INLINE T compress_value(const MelParams<T>& p, T m) {
    compress_values<1>(p, &m);
    return m;
}

// Gradient of v to gradient of m.
template <class T>
MMFAST_INLINE T compress_gradient(const MelParams<T>& p, T m, T g) {
    if (!p.log) return g;
    const T y = m + p.log_offset;
    return m < p.log_floor || y == T(0) ? T(0) : g * p.log_scale / y;
}

// v raised to the threshold; a threshold of NaN takes everything.
template <class T>
MMFAST_INLINE T clip_value(T v, T threshold) {
    return threshold != threshold || v < threshold ? threshold : v;
}

template <class T>
MMFAST_INLINE void widen(Extrema<T>& e, T low, T high) {  // a NaN stays
    if (low < e.lowest || low != low) e.lowest = low;
    if (high > e.highest || high != high) e.highest = high;
}

// The reference's dither_noise.
template <class T>
MMFAST_INLINE T dither_noise(uint32_t seed, int64_t row, int64_t frame, int n) {
    const uint32_t key = mix32(mix32(mix32(seed) + uint32_t(row)) + uint32_t(frame));
    const uint32_t a = mix32(key + 2 * uint32_t(n)), b = mix32(key + 2 * uint32_t(n) + 1);
    const T u = T((a >> 8) + 1) * T(0x1p-24), w = T(b >> 8) * T(0x1p-24);
    return root_of(-2 * log_of(u)) * cos_of(T(kTwoPi) * w);
}

// n / step as (n * reciprocal) >> 32: exact for n * step < 2^32.
MMFAST_INLINE uint32_t reciprocal_of(uint32_t step) {
    return step > 1 ? uint32_t(((uint64_t(1) << 32) + step - 1) / step) : 0;
}
MMFAST_INLINE int quotient(int n, uint32_t reciprocal) {
#if defined(__CUDA_ARCH__)
    return int(__umulhi(uint32_t(n), reciprocal));
#else
    return int((uint64_t(uint32_t(n)) * reciprocal) >> 32);
#endif
}
// n / step for all n and steps below 2^32, in five instructions where a division takes twenty.
MMFAST_INLINE uint64_t wide_reciprocal_of(uint64_t step) {
    return step > 1 ? ~uint64_t(0) / step + 1 : 0;
}
MMFAST_INLINE uint32_t wide_quotient(uint32_t n, uint64_t reciprocal) {
    if (reciprocal == 0) return n;
    const uint64_t low = uint64_t(n) * uint32_t(reciprocal);
    return uint32_t((uint64_t(n) * uint32_t(reciprocal >> 32) + (low >> 32)) >> 32);
}

}  // namespace mel
}  // namespace mmfast
