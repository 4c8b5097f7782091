// The GPU kernels of the mel slice as a block of threads runs them: a tile of frames, in memory that the block shares.
// No CUDA header is needed, so that a host can run the same code (tests/native/test_mel_block.cpp).
//
// Note: [Phases]
//   A kernel is a sequence of phases. Each is a loop over independent items, block.each(n, f), after which all threads wait for
//   each other. What one item writes no other item of the phase touches; so the order of items does not matter, which the
//   host test checks by changing it.
//
// Note: [Frames in lanes, shared]
//   As on the CPU the frame is the fastest index of every array, so neighbouring threads hold neighbouring frames: window,
//   twiddles and filters are the same for a whole warp, which reads them with one broadcast, and no phase has bank conflicts
//   that padding does not remove.
//     samples  -- read once, coalesced; frames overlap in place ------->  x    [span], see Layout::skew
//     x        -- DC, pre-emphasis, window, columns of the transform -->  z    [R/2 + 1][S][F], in two planes
//     z        -- rows of the transform, in place --------------------->  power [K][F], over x
//     power    -- sparse filters, log ---------------------------------->  v    [M][F | 1], over z
//     v        -- range, affine, DCT ---------------------------------->  features, coalesced in either layout
//
// Note: [Cost on a GPU], per frame at 400 / 160 / 80, predicted from counts, not measured
//   10.5 k floating point operations, 960 bytes of device memory: floors on an H200 of 4.5 G frames/s (4.3 TB/s) and, at 35 %
//   of its 67 TFLOP/s, 2.2 G. Shared memory and L1: 400 samples + 400 window + 400 twiddle + 4 x 450 spectrum + 402 power + 800
//   filter + 240 output words, 4.4 k lane accesses or 139 cycles of a multiprocessor: 1.7 G frames/s with all 132.
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

// Filters by row, packed from the first non-zero weight to the last one, and the filters that each bin feeds.
template <class T>
struct SparseFilters {
    int64_t rows = 0;                                          // 0: the bare spectrum
    const int32_t *row_first = nullptr, *row_count = nullptr;  // [rows]
    const int32_t *bin_first = nullptr, *bin_count = nullptr;  // [K]
    const T* weights = nullptr;                                // [rows][K]
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

    // Backward. grad: laid out as the features. spans: [rows][tiles][span], the gradient of the staged samples of a tile.
    const T* grad = nullptr;
    T* spans = nullptr;
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

template <class T>
MMFAST_INLINE void store_as(void* data, ScalarType type, int64_t i, T x) {
    switch (type) {
        case ScalarType::float64: static_cast<double*>(data)[i] = double(x); break;
        case ScalarType::float16: static_cast<uint16_t*>(data)[i] = float_to_half(float(x)); break;
        case ScalarType::bfloat16: static_cast<uint16_t*>(data)[i] = float_to_bfloat(float(x)); break;
        default: static_cast<float*>(data)[i] = float(x);
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

template <class T>
MMFAST_INLINE T compress_value(const MelParams<T>& p, T m) {
    if (!p.log) return m;
    const T ln = log_of((m < p.log_floor ? p.log_floor : m) + p.log_offset);
    const T rest = ln * p.log_scale_low, scaled = ln * p.log_scale + p.log_shift;
    return rest - rest == T(0) ? scaled + rest : scaled;  // an infinite ln has no rest
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

// ---- Shapes ---------------------------------------------------------------------------------------------------------

// DFT of A * B points in registers, in natural order.
template <int A, int B, class T>
struct RegisterDft {
    static MMFAST_INLINE void run(T* re, T* im) {
        T gr[A * B], gi[A * B];
        MMFAST_UNROLL
        for (int b = 0; b < B; ++b) {
            T ar[A], ai[A];
            MMFAST_UNROLL
            for (int a = 0; a < A; ++a) {
                ar[a] = re[b + B * a];
                ai[a] = im[b + B * a];
            }
            Dft<A, T, T>::run(ar, ai);
            MMFAST_UNROLL
            for (int a = 0; a < A; ++a) {
                if (a > 0 && b > 0) twist(ar[a], ai[a], kTurns<A * B, T>.cos[a * b], kTurns<A * B, T>.sin[a * b]);
                gr[a * B + b] = ar[a];
                gi[a * B + b] = ai[a];
            }
        }
        MMFAST_UNROLL
        for (int a = 0; a < A; ++a) {
            Dft<B, T, T>::run(gr + a * B, gi + a * B);
            MMFAST_UNROLL
            for (int b = 0; b < B; ++b) {
                re[a + A * b] = gr[a * B + b];
                im[a + A * b] = gi[a * B + b];
            }
        }
    }
};
template <int B, class T>
struct RegisterDft<1, B, T> {
    static MMFAST_INLINE void run(T* re, T* im) { Dft<B, T, T>::run(re, im); }
};

template <int P, class T>
MMFAST_INLINE void register_dft(T* re, T* im) {
    if constexpr (P == 25) RegisterDft<5, 5, T>::run(re, im);
    else if constexpr (P == 32) RegisterDft<4, 8, T>::run(re, im);
    else if constexpr (P == 16) RegisterDft<4, 4, T>::run(re, im);
    else RegisterDft<1, P, T>::run(re, im);
}

// n = 16 * A * P points known at compile time: rows of A * P points, each transformed in registers (A = 1) or in two steps
// through shared memory: over a for each p in j = p + P a, then over p; output k = ka + A kp stands at ka P + kp.
template <int A_, int P_, int F_>
struct TunedShape {
    static constexpr bool tuned = true;
    static constexpr int A = A_, P = P_, F = F_;
    static MMFAST_INLINE constexpr int n() { return 16 * A * P; }
    static MMFAST_INLINE constexpr int radix() { return 16; }
    static MMFAST_INLINE constexpr int columns() { return A * P; }
    static MMFAST_INLINE constexpr int rows() { return 9; }
    // Of a row; odd where a warp reads several rows at once.
    static MMFAST_INLINE constexpr int stride() { return F == 32 ? A * P : (A * P) | 1; }
    static MMFAST_INLINE constexpr int frames() { return F; }
    static MMFAST_INLINE constexpr int buffers() { return 1; }
    static MMFAST_INLINE constexpr int slot(int k) { return k % A * P + k / A; }
};

// Everything else, read from the plan: Stockham stages between two buffers, or the chirp.
struct GeneralShape {
    static constexpr bool tuned = false;
    int n_, radix_, columns_, stride_, frames_;
    template <class T>
    MMFAST_INLINE GeneralShape(const RealPlan<T>& plan, int frames)
        : n_(int(plan.n)), radix_(plan.radix), columns_(int(plan.columns)),
          stride_(int(plan.row.inner ? plan.row.inner : plan.columns) | 1), frames_(frames) {}
    MMFAST_INLINE int n() const { return n_; }
    MMFAST_INLINE int radix() const { return radix_; }
    MMFAST_INLINE int columns() const { return columns_; }
    MMFAST_INLINE int rows() const { return radix_ / 2 + 1; }
    MMFAST_INLINE int stride() const { return stride_; }
    MMFAST_INLINE int frames() const { return frames_; }
    MMFAST_INLINE int buffers() const { return 2; }
    MMFAST_INLINE int slot(int k) const { return k; }
};

constexpr int kParts = 16;  // of a sum over a frame

// Where the arrays of a tile lie in its memory, in elements.
//
// Sample n of frame f is staged at skew(f step + n), step = min(hop, window): `pad` elements are left out after every `step`, so
// that the frames of a warp read different banks.
struct Layout {
    int step = 0, pad = 0, span = 0, lane_stride = 0;
    uint32_t reciprocal = 0;
    int64_t plane = 0, z = 0, x = 0, v = 0, cepstra = 0, m = 0, g = 0, grad = 0, mean = 0, energy = 0, energy_grad = 0,
            part = 0;
    int64_t size = 0;

    template <class T, class Shape>
    MMFAST_INLINE Layout(const Shape& shape, const BlockJob<T>& job, bool backward) {
        const int F = shape.frames(), window = int(job.p.framing.window);
        const int64_t bands = job.bands(), n_cepstra = job.p.cepstra;
        step = job.p.framing.hop < window ? int(job.p.framing.hop) : window;
        // exact reciprocals, and no more than twice the memory
        pad = step >= 32 && int64_t(window) * step < (int64_t(1) << 31) ? ((32 / F - step) % 32 + 32) % 32 : 0;
        if (F == 32) pad = pad % 2;
        reciprocal = reciprocal_of(uint32_t(step));
        span = (F - 1) * step + window;
        lane_stride = F | 1;
        plane = int64_t(shape.rows()) * shape.stride() * F;
        int64_t at = 2 * shape.buffers() * plane;
        const int64_t staged = span + int64_t(span / step + 1) * pad, power = job.bins() * F;
        v = z;
        cepstra = v + bands * lane_stride;
        if (!backward && at < cepstra + n_cepstra * lane_stride) at = cepstra + n_cepstra * lane_stride;
        x = at;
        at += staged > power ? staged : power;
        if (backward) {
            m = at;
            at += bands * lane_stride;
            g = grad = at;
            at += bands * lane_stride;
            if (n_cepstra || job.p.energy != Energy::none) {
                grad = at;
                at += job.feature_count * lane_stride;
            }
        }
        mean = at;
        energy = mean + F;
        energy_grad = energy + F;
        part = energy_grad + F;
        size = part + 3 * kParts * F;
    }
    MMFAST_INLINE int skew(int q) const { return pad ? q + quotient(q, reciprocal) * pad : q; }
};

template <class T>
struct Planes {
    T *re, *im;
};

// A tile: the frames [frame, frame + frames) of a row, and the phases that compute them.
template <class T, class Shape, class Block>
struct Tile {
    const BlockJob<T>& job;
    const Shape& shape;
    const Block& block;
    const Layout& at;
    T* const memory;
    int64_t row, tile, frame, length;
    int frames, here;  // frames of the row in this tile, and places for frames in the features
    Planes<T> z;
    T maximum;  // of v over the group, once it is known

    MMFAST_INLINE Tile(const BlockJob<T>& j, const Shape& s, const Block& b, const Layout& layout, T* m, int64_t index)
        : job(j), shape(s), block(b), at(layout), memory(m), row(index / j.tiles), tile(index % j.tiles),
          frame(tile * s.frames()), length(j.row_length(row)) {
        const int64_t left = j.count(row) - frame, places = j.frames - frame;
        frames = left <= 0 ? 0 : left < s.frames() ? int(left) : s.frames();
        here = places < s.frames() ? int(places) : s.frames();
        z = {m + at.z, m + at.z + at.plane};
        maximum = j.maxima ? j.maxima[row / j.group] : T(0);
    }

    MMFAST_INLINE T* x() const { return memory + at.x; }
    MMFAST_INLINE T* power() const { return memory + at.x; }
    MMFAST_INLINE T* part() const { return memory + at.part; }
    MMFAST_INLINE int window() const { return int(job.p.framing.window); }
    MMFAST_INLINE int64_t group() const { return row / job.group; }

    // ---- Samples ----------------------------------------------------------------------------------------------------

    MMFAST_INLINE T signal(int64_t i) const {
        const int64_t base = row * job.row_stride;
        const T value = load_as<T>(job.data, job.type, base + i * job.sample_stride);
        if (job.signal_preemphasis == 0 || i == 0) return value;
        return value - job.signal_preemphasis * load_as<T>(job.data, job.type, base + (i - 1) * job.sample_stride);
    }

    template <class Sample, class Convert>
    MMFAST_INLINE void stage_inside(int64_t begin, int used, const Convert& convert) const {
        const Sample* const from = static_cast<const Sample*>(job.data) + row * job.row_stride + begin;
        T* const to = x();
        block.copy(used, [&](int q) { return T(convert(from[q])); }, [&](int q, T value) { to[at.skew(q)] = value; });
    }

    MMFAST_INLINE void stage() const {
        const Framing& f = job.p.framing;
        const int64_t begin = f.first + frame * f.hop;
        const int used = (frames - 1) * at.step + window();
        if (f.hop <= f.window && begin >= 0 && begin + used <= length && job.sample_stride == 1 &&
            job.signal_preemphasis == 0 && sizeof(T) == 4) {
            switch (job.type) {
                case ScalarType::float16:
                    stage_inside<uint16_t>(begin, used, [](uint16_t bits) { return half_to_float(bits); });
                    return;
                case ScalarType::bfloat16:
                    stage_inside<uint16_t>(begin, used, [](uint16_t bits) { return bfloat_to_float(bits); });
                    return;
                case ScalarType::int16:
                    stage_inside<int16_t>(begin, used, [](int16_t sample) { return sample; });
                    return;
                default: stage_inside<float>(begin, used, [](float sample) { return sample; }); return;
            }
        }
        T* const to = x();
        block.each(used, [&](int q) {
            const int64_t position = begin + (f.hop <= f.window ? q : q / at.step * f.hop + q % at.step);
            const int64_t i = f.source(position, length);
            to[at.skew(q)] = i < 0 ? T(0) : signal(i);
        });
    }

    // Sample n of frame f as staged; frames past the last one read its samples.
    MMFAST_INLINE T staged(int f, int n) const {
        const int lane = f < frames ? f : frames - 1;
        return x()[lane * (at.step + at.pad) + n + (at.pad ? quotient(n, at.reciprocal) * at.pad : 0)];
    }
    // The same with scale, dither and without its mean.
    MMFAST_INLINE T centred(int f, int n) const {
        T y = staged(f, n) * job.p.input_scale;
        if constexpr (!Shape::tuned)
            if (job.p.dither != 0) y += job.p.dither * dither_noise<T>(job.p.seed, row, frame + f, n);
        return y - memory[at.mean + f];
    }
    MMFAST_INLINE T conditioned(int f, int n) const {
        const T y = centred(f, n);
        return job.p.preemphasis == 0 ? y : y - centred(f, n ? n - 1 : 0) * job.p.preemphasis;
    }

    // to[f] = sum over n < count of value(f, n) for every frame, in parts.
    template <class Value>
    MMFAST_INLINE void sum_frames(int count, T* to, const Value& value) const {
        const int F = shape.frames();
        T* const parts = part();
        block.each(kParts * F, [&](int i) {
            T sum = 0;
            for (int n = i / F; n < count; n += kParts) sum += value(i % F, n);
            parts[i] = sum;
        });
        block.each(F, [&](int f) {
            T sum = 0;
            for (int i = 0; i < kParts; ++i) sum += parts[i * F + f];
            to[f] = sum;
        });
    }

    // Mean and energy of the frames.
    MMFAST_INLINE void condition() const {
        const MelParams<T>& p = job.p;
        const int F = shape.frames();
        T* const mean = memory + at.mean;
        block.each(F, [&](int f) { mean[f] = 0; });
        if (p.remove_dc) {
            T* const sum = memory + at.energy;
            sum_frames(window(), sum, [&](int f, int n) { return centred(f, n); });
            block.each(F, [&](int f) { mean[f] = sum[f] / T(window()); });
        }
        if (p.energy == Energy::none) return;
        if (p.raw_energy) {
            sum_frames(window(), memory + at.energy, [&](int f, int n) {
                const T y = centred(f, n);
                return y * y;
            });
        } else {
            sum_frames(window(), memory + at.energy, [&](int f, int n) {
                const T y = conditioned(f, n) * p.energy_window[n];
                return y * y;
            });
        }
    }

    MMFAST_INLINE T log_energy(int f) const {
        const T least = T(0x1p-23), sum = memory[at.energy + f];  // Kaldi: the float32 epsilon
        const T e = log_of(sum < least ? least : sum);
        return job.p.has_energy_floor && e < job.p.log_energy_floor ? job.p.log_energy_floor : e;
    }

    // ---- Transform --------------------------------------------------------------------------------------------------

    template <int R, class Load>
    MMFAST_INLINE void columns(const Load& load) const {
        const int S = shape.columns(), F = shape.frames(), stride = shape.stride(), length_ = window();
        const T *const tw = job.plan.fft.twiddle, *const w = job.p.window;
        block.each(S * F, [&](int i) {
            const int f = i % F, s = i / F;
            T v[R], re[R / 2 + 1], im[R / 2 + 1];
            MMFAST_UNROLL
            for (int r = 0; r < R; ++r) {
                const int n = s + S * r;
                v[r] = n < length_ ? load(f, n) * w[n] : T(0);
            }
            RealDft<R, T, T>::run(v, re, im);
            z.re[s * F + f] = re[0];
            z.im[s * F + f] = 0;
            MMFAST_UNROLL
            for (int k = 1; k <= R / 2; ++k) {
                const T* const t = tw + 2 * ((k - 1) * S + s);
                twist(re[k], im[k], t[0], t[1]);
                z.re[(k * stride + s) * F + f] = re[k];
                z.im[(k * stride + s) * F + f] = im[k];
            }
        });
    }

    template <class Load>
    MMFAST_INLINE void all_columns(const Load& load) const {
        if constexpr (Shape::tuned) {
            columns<16>(load);
        } else {
            switch (shape.radix()) {
                case 16: columns<16>(load); break;
                case 8: columns<8>(load); break;
                case 5: columns<5>(load); break;
                case 4: columns<4>(load); break;
                case 3: columns<3>(load); break;
                case 2: columns<2>(load); break;
                default: columns<1>(load);
            }
        }
    }

    // Bin of output k2 of row k1, -1 where another output gives it too.
    MMFAST_INLINE int bin_of(int k1, int k2) const {
        const int bin = k1 + shape.radix() * k2, n = shape.n();
        if (2 * bin <= n) return bin;
        return k1 == 0 || 2 * k1 == shape.radix() ? -1 : n - bin;
    }
    // Where z holds a bin (or its conjugate).
    MMFAST_INLINE int place_of(int bin) const {
        const int R = shape.radix();
        int k1 = bin % R;
        if (2 * k1 > R) {
            bin = shape.n() - bin;
            k1 = R - k1;
        }
        return k1 * shape.stride() + shape.slot(bin / R);
    }

    // The rows of a TunedShape, to squared magnitudes.
    template <bool kKeep>
    MMFAST_INLINE void tuned_rows() const {
        constexpr int A = Shape::A, P = Shape::P, F = Shape::F, stride = Shape::stride();
        if constexpr (A > 1) {
            const T* const tw = job.plan.row_twiddle;
            block.each(9 * P * F, [&](int i) {
                const int f = i % F, p = i / F % P, base = (i / (F * P) * stride + p) * F + f;
                T re[A], im[A];
                MMFAST_UNROLL
                for (int a = 0; a < A; ++a) {
                    re[a] = z.re[base + a * P * F];
                    im[a] = z.im[base + a * P * F];
                }
                register_dft<A>(re, im);
                MMFAST_UNROLL
                for (int a = 0; a < A; ++a) {
                    if (a) twist(re[a], im[a], tw[2 * (a * P + p)], tw[2 * (a * P + p) + 1]);
                    z.re[base + a * P * F] = re[a];
                    z.im[base + a * P * F] = im[a];
                }
            });
        }
        T* const out = power();
        block.each(9 * A * F, [&](int i) {
            const int f = i % F, k1 = i / F % 9, a = i / (9 * F), base = (k1 * stride + a * P) * F + f;
            T re[P], im[P];
            MMFAST_UNROLL
            for (int j = 0; j < P; ++j) {
                re[j] = z.re[base + j * F];
                im[j] = z.im[base + j * F];
            }
            register_dft<P>(re, im);
            MMFAST_UNROLL
            for (int j = 0; j < P; ++j) {
                const int bin = bin_of(k1, a + A * j);
                const T square = re[j] * re[j] + im[j] * im[j];
                if (bin >= 0) out[bin * F + f] = square;
                if (kKeep) {
                    z.re[base + j * F] = re[j];
                    z.im[base + j * F] = im[j];
                }
            }
        });
    }

    template <int R>
    MMFAST_INLINE void stage_of(const Planes<T>& from, const Planes<T>& to, int m, int s, const T* tw) const {
        const int F = shape.frames(), stride = shape.stride();
        block.each(shape.rows() * m * s * F, [&](int i) {
            const int f = i % F, t = i / F, q = t % s, p = t / s % m, base = t / (s * m) * stride;
            T re[R], im[R];
            MMFAST_UNROLL
            for (int a = 0; a < R; ++a) {
                const int j = (base + q + s * (p + m * a)) * F + f;
                re[a] = from.re[j];
                im[a] = from.im[j];
            }
            Dft<R, T, T>::run(re, im);
            MMFAST_UNROLL
            for (int k = 0; k < R; ++k) {
                if (k && tw) twist(re[k], im[k], tw[2 * (p * (R - 1) + k - 1)], tw[2 * (p * (R - 1) + k - 1) + 1]);
                const int j = (base + q + s * (R * p + k)) * F + f;
                to.re[j] = re[k];
                to.im[j] = im[k];
            }
        });
    }

    MMFAST_INLINE void prime_stage_of(const Planes<T>& from, const Planes<T>& to, int m, int s, int r, const T* roots,
                                      const T* tw) const {
        const int F = shape.frames(), stride = shape.stride();
        block.each(shape.rows() * m * s * F, [&](int i) {
            const int f = i % F, t = i / F, q = t % s, p = t / s % m, base = t / (s * m) * stride;
            T re[kMaxRadix], im[kMaxRadix];
            for (int k = 0; k < r; ++k) {
                T sr = 0, si = 0;
                for (int a = 0, j = 0; a < r; ++a, j = j + k < r ? j + k : j + k - r) {
                    const int in = (base + q + s * (p + m * a)) * F + f;
                    sr += from.re[in] * roots[2 * j] + from.im[in] * roots[2 * j + 1];
                    si += from.im[in] * roots[2 * j] - from.re[in] * roots[2 * j + 1];
                }
                if (k && tw) twist(sr, si, tw[2 * (p * (r - 1) + k - 1)], tw[2 * (p * (r - 1) + k - 1) + 1]);
                re[k] = sr;
                im[k] = si;
            }
            for (int k = 0; k < r; ++k) {
                const int j = (base + q + s * (r * p + k)) * F + f;
                to.re[j] = re[k];
                to.im[j] = im[k];
            }
        });
    }

    // [Stockham] of every row: x to x in natural order, w is scratch. The two are exchanged after each stage but the last.
    MMFAST_INLINE void stages(const ComplexPlan<T>& c, Planes<T>& x, Planes<T>& w) const {
        int s = 1, len = int(c.size);
        for (int i = 0; i < c.stages; ++i) {
            const int r = c.radix[i], m = len / r;
            const Planes<T> to = m == 1 ? x : w;
            switch (r) {
                case 2: stage_of<2>(x, to, m, s, c.twiddle[i]); break;
                case 3: stage_of<3>(x, to, m, s, c.twiddle[i]); break;
                case 4: stage_of<4>(x, to, m, s, c.twiddle[i]); break;
                case 5: stage_of<5>(x, to, m, s, c.twiddle[i]); break;
                case 7: stage_of<7>(x, to, m, s, c.twiddle[i]); break;
                case 8: stage_of<8>(x, to, m, s, c.twiddle[i]); break;
                default: prime_stage_of(x, to, m, s, r, c.roots[i], c.twiddle[i]);
            }
            if (m > 1) {
                w = x;
                x = to;
            }
            s *= r;
            len = m;
        }
    }

    // Every row of z, of any size, as transform_row (fft_core.h).
    MMFAST_INLINE void general_rows() {
        const int64_t other = 2 * at.plane;
        Planes<T> w =
            z.re == memory + at.z ? Planes<T>{z.re + other, z.im + other} : Planes<T>{z.re - other, z.im - other};
        const ComplexPlan<T>& row_plan = job.plan.fft.row;
        if (!row_plan.inner) {
            stages(row_plan, z, w);
            return;
        }
        const int F = shape.frames(), stride = shape.stride(), size = int(row_plan.size), inner = int(row_plan.inner);
        const T *const chirp = row_plan.chirp, *const spectrum = row_plan.chirp_spectrum;
        Planes<T> y = z;
        block.each(shape.rows() * inner * F, [&](int i) {
            const int j = i / F % inner, k = (i / (F * inner) * stride + j) * F + i % F;
            T re = 0, im = 0;
            if (j < size) {
                re = y.re[k];
                im = y.im[k];
                twist(re, im, chirp[2 * j], chirp[2 * j + 1]);
            }
            y.re[k] = re;
            y.im[k] = im;
        });
        stages(job.plan.convolution, y, w);
        block.each(shape.rows() * inner * F, [&](int i) {
            const int j = i / F % inner, k = (i / (F * inner) * stride + j) * F + i % F;
            const T re = y.re[k], im = y.im[k], c = spectrum[2 * j], d = spectrum[2 * j + 1];
            y.re[k] = re * d + im * c;  // swapped: the inverse transform
            y.im[k] = re * c - im * d;
        });
        stages(job.plan.convolution, y, w);
        block.each(shape.rows() * size * F, [&](int i) {
            const int j = i / F % size, k = (i / (F * size) * stride + j) * F + i % F;
            T re = y.im[k], im = y.re[k];
            twist(re, im, chirp[2 * j], chirp[2 * j + 1]);
            y.re[k] = re;
            y.im[k] = im;
        });
        z = y;
    }

    // Samples to power; with kKeep the spectrum stays in z.
    template <bool kKeep>
    MMFAST_INLINE void analyse() {
        const MelParams<T>& p = job.p;
        stage();
        if (p.conditions()) {
            condition();
            all_columns([&](int f, int n) { return conditioned(f, n); });
        } else {
            all_columns([&](int f, int n) { return staged(f, n); });
        }
        const int F = shape.frames(), bins = int(job.bins());
        T* const out = power();
        if constexpr (Shape::tuned) {
            tuned_rows<kKeep>();
        } else {
            general_rows();
            block.each(bins * F, [&](int i) {
                const int k = place_of(i / F) * F + i % F;
                out[i] = z.re[k] * z.re[k] + z.im[k] * z.im[k];
            });
        }
        if (p.power != 2 || p.power_offset != 0) block.each(bins * F, [&](int i) { out[i] = raise_power(p, out[i]); });
    }

    // to[i][f] = m, band i of frame f, or v of it.
    template <bool kCompress>
    MMFAST_INLINE void filter(T* to) const {
        const int F = shape.frames(), bins = int(job.bins()), lane_stride = at.lane_stride;
        const SparseFilters<T>& filters = job.filters;
        const T* const from = power();
        block.each(int(job.bands()) * F, [&](int i) {
            const int f = i % F, band = i / F;
            T m;
            if (filters.rows) {
                const T* const w = filters.weights + int64_t(band) * bins;
                const T* const in = from + filters.row_first[band] * F + f;
                const int count = filters.row_count[band];
                T a = 0, b = 0;
                int j = 0;
                for (; j + 2 <= count; j += 2) {
                    a += in[j * F] * w[j];
                    b += in[(j + 1) * F] * w[j + 1];
                }
                if (j < count) a += in[j * F] * w[j];
                m = a + b;
            } else {
                m = from[i];
            }
            to[band * lane_stride + f] = kCompress ? compress_value(job.p, m) : m;
        });
    }

    // Extrema over the tile of value(i, f), band i of frame f, left in part()[0] and part()[F].
    template <class Value>
    MMFAST_INLINE void extrema(const Value& value) const {
        const int F = shape.frames(), bands = int(job.bands());
        T* const parts = part();
        block.each(kParts * F, [&](int i) {
            Extrema<T> e{infinity_of<T>(), -infinity_of<T>()};
            for (int band = i / F; band < bands && i % F < frames; band += kParts) {
                const T v = value(band, i % F);
                widen(e, v, v);
            }
            parts[i] = e.lowest;
            parts[kParts * F + i] = e.highest;
        });
        block.each(F, [&](int f) {
            Extrema<T> e{parts[f], parts[kParts * F + f]};
            for (int i = 1; i < kParts; ++i) widen(e, parts[i * F + f], parts[(kParts + i) * F + f]);
            parts[f] = e.lowest;
            parts[kParts * F + f] = e.highest;
        });
        block.each(1, [&](int) {
            Extrema<T> e{parts[0], parts[kParts * F]};
            for (int f = 1; f < F; ++f) widen(e, parts[f], parts[kParts * F + f]);
            parts[0] = e.lowest;
            parts[kParts * F] = e.highest;
        });
    }

    // ---- Features ---------------------------------------------------------------------------------------------------

    // f(frame, feature, index into the features) for the `here` frames of the tile, neighbours in memory by neighbouring threads.
    template <class F>
    MMFAST_INLINE void each_feature(const F& f) const {
        const int n = int(job.feature_count);
        const int64_t base = row * job.feature_count * job.frames;
        if (job.p.time_major) {
            block.each(n * here, [&](int i) { f(i / n, i % n, base + frame * n + i); });
        } else {
            const int L = shape.frames();
            block.each(n * L, [&](int i) {
                if (i % L < here) f(i % L, i / L, base + (i / L) * job.frames + frame + i % L);
            });
        }
    }
    MMFAST_INLINE bool is_energy(int feature) const {
        const Energy e = job.p.energy;
        if (e == Energy::none) return false;
        return e == Energy::prepend || e == Energy::replace_first ? feature == 0 : feature == job.feature_count - 1;
    }

    MMFAST_INLINE void dct() const {
        constexpr int kBlock = 8;
        const int F = shape.frames(), bands = int(job.bands()), count = int(job.p.cepstra),
                  lane_stride = at.lane_stride;
        const T *const v = memory + at.v, *const table = job.p.dct;
        T* const out = memory + at.cepstra;
        block.each((count + kBlock - 1) / kBlock * F, [&](int i) {
            const int f = i % F, first = i / F * kBlock;
            T sum[kBlock] = {};
            for (int band = 0; band < bands; ++band) {
                const T value = v[band * lane_stride + f];
                const T* const row_ = table + int64_t(band) * count + first;
                MMFAST_UNROLL
                for (int j = 0; j < kBlock; ++j)
                    if (first + j < count) sum[j] += value * row_[j];
            }
            MMFAST_UNROLL
            for (int j = 0; j < kBlock; ++j)
                if (first + j < count) out[(first + j) * lane_stride + f] = sum[j];
        });
    }

    // Waveform to features. With job.clip it is the second round: the maxima are known.
    MMFAST_INLINE void forward() {
        const MelParams<T>& p = job.p;
        const int lane_stride = at.lane_stride;
        if (tile == 0 && job.counts) block.each(1, [&](int) { job.counts[row] = job.count(row); });
        const T threshold = job.clip ? maximum - p.top_db : T(0);
        if (job.clip && (frames == 0 || job.extrema[row * job.tiles + tile].lowest >= threshold)) return;
        if (frames > 0) {
            analyse<false>();
            T* const v = memory + at.v;
            if (p.has_top_db && !job.clip) {
                filter<true>(v);
                extrema([&](int band, int f) { return v[band * lane_stride + f]; });
            } else {
                filter<true>(v);
            }
            if (job.clip || p.output_offset != 0 || p.output_scale != 1) {
                const int F = shape.frames();
                block.each(int(job.bands()) * F, [&](int i) {
                    T& value = v[i / F * lane_stride + i % F];
                    value = ((job.clip ? clip_value(value, threshold) : value) + p.output_offset) * p.output_scale;
                });
            }
            if (p.cepstra) dct();
        }
        if (job.extrema && !job.clip) {
            block.each(1, [&](int) {
                Extrema<T> e{infinity_of<T>(), -infinity_of<T>()};
                if (frames > 0) e = {part()[0], part()[kParts * shape.frames()]};
                job.extrema[row * job.tiles + tile] = e;
            });
        }
        const T* const from = memory + (p.cepstra ? at.cepstra : at.v);
        const int shift = p.energy == Energy::prepend;
        each_feature([&](int f, int c, int64_t index) {
            T value = job.fill;
            if (f < frames) value = is_energy(c) ? log_energy(f) : from[(c - shift) * lane_stride + f];
            store_as(job.features, job.out_type, index, value);
        });
    }

    // Second round without a DCT: the features that lie below the threshold are raised in place.
    MMFAST_INLINE void clip_features() const {
        const MelParams<T>& p = job.p;
        const T threshold = maximum - p.top_db;
        if (frames == 0 || job.extrema[row * job.tiles + tile].lowest >= threshold) return;
        const T raised = (threshold + p.output_offset) * p.output_scale;
        each_feature([&](int f, int c, int64_t index) {
            if (f >= frames || is_energy(c)) return;
            if (raised != raised || load_as<T>(job.features, job.out_type, index) < raised)
                store_as(job.features, job.out_type, index, raised);
        });
    }

    MMFAST_INLINE void backward(int64_t slot);
    MMFAST_INLINE void band_gradients() const;
    MMFAST_INLINE void filter_gradients(int64_t slot) const;
    MMFAST_INLINE void tuned_rows_adjoint() const;
    template <int R>
    MMFAST_INLINE void columns_adjoint() const;
    MMFAST_INLINE void spectrum_adjoint();
    MMFAST_INLINE T sample_gradient(int f, int n) const;
    MMFAST_INLINE void overlap_add() const;
};

}  // namespace mel
}  // namespace mmfast
