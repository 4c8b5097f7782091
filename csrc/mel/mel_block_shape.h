// Sizes of a transform, known to the compiler or not, and where the arrays of a tile of frames lie.
#pragma once

#include "mel/mel_block_job.h"

namespace mmfast {
namespace mel {

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
    static constexpr int kEach = 4;      // frames of a column that a thread takes: it reads window and twiddles once
    static constexpr int G = F / kEach;  // frames that stand side by side in z
    static constexpr int V = F >= 32 ? 4 : F == 16 ? 2 : 1;  // frames that a thread reads at once of a row of powers
    static MMFAST_INLINE constexpr int n() { return 16 * A * P; }
    static MMFAST_INLINE constexpr int radix() { return 16; }
    static MMFAST_INLINE constexpr int columns() { return A * P; }
    static MMFAST_INLINE constexpr int rows() { return 9; }
    // Of a row; odd where a warp reads several rows at once.
    static MMFAST_INLINE constexpr int stride() { return F == 32 ? A * P : (A * P) | 1; }
    static MMFAST_INLINE constexpr int frames() { return F; }
    static MMFAST_INLINE constexpr int together() { return G; }
    // From frame f to frame f + G in z: 8 banks further, so that all frames at one place are in banks of their own.
    static MMFAST_INLINE constexpr int group_stride() { return (9 * stride() * G + 23) / 32 * 32 + 8; }
    static MMFAST_INLINE constexpr int plane() { return F / G * group_stride(); }
    static MMFAST_INLINE constexpr int buffers() { return 1; }
    static MMFAST_INLINE constexpr int slot(int k) { return k % A * P + k / A; }
};

// Everything else, read from the plan: Stockham stages between two buffers, or the chirp.
struct GeneralShape {
    static constexpr bool tuned = false;
    static constexpr int V = 1;
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
    MMFAST_INLINE int together() const { return frames_; }
    MMFAST_INLINE int group_stride() const { return plane(); }
    MMFAST_INLINE int plane() const { return rows() * stride_ * frames_; }
    MMFAST_INLINE int buffers() const { return 2; }
    MMFAST_INLINE int slot(int k) const { return k; }
};

constexpr int kParts = 16;  // of a sum over a frame

// Where the arrays of a tile lie in its memory, in elements.
//
// Sample n of frame f is staged at skew(f step + n), step = min(hop, window): `pad` elements are left out after every `step`, so
// that the frames and columns of a warp read different banks.
struct Layout {
    int step = 0, pad = 0, span = 0, lane_stride = 0;
    uint32_t reciprocal = 0, feature_reciprocal = 0;
    uint64_t tiles_reciprocal = 0;
    int64_t plane = 0, z = 0, x = 0, v = 0, cepstra = 0, m = 0, g = 0, grad = 0, mean = 0, energy = 0, energy_grad = 0,
            poison = 0, part = 0;
    int64_t size = 0;

    template <class T, class Shape>
    MMFAST_INLINE Layout(const Shape& shape, const BlockJob<T>& job, bool backward) {
        const int F = shape.frames(), G = shape.together(), window = int(job.p.framing.window);
        const int64_t bands = job.bands(), n_cepstra = job.p.cepstra;
        step = job.p.framing.hop < window ? int(job.p.framing.hop) : window;
        span = (F - 1) * step + window;
        // exact reciprocals, and no more than twice the memory
        pad = step >= 32 && int64_t(span) * step < (int64_t(1) << 32) ? ((32 / G - step) % 32 + 32) % 32 : 0;
        if (G == 32) pad = pad % 2;
        reciprocal = reciprocal_of(uint32_t(step));
        const int64_t n = job.feature_count;
        feature_reciprocal = n * n * F < (int64_t(1) << 32) ? reciprocal_of(uint32_t(n)) : 0;
        tiles_reciprocal = wide_reciprocal_of(uint64_t(job.tiles));
        lane_stride = F | 1;
        plane = shape.plane();
        int64_t at = 2 * shape.buffers() * plane;
        const int64_t staged = span + int64_t(span / step + 1) * pad, power = (job.bins() + 1) * F;
        v = z;
        cepstra = v + bands * lane_stride;
        if (!backward && at < cepstra + n_cepstra * lane_stride) at = cepstra + n_cepstra * lane_stride;
        x = at = (at + 3) / 4 * 4;  // read and written by four
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
        mean = at = (at + 3) / 4 * 4;
        energy = mean + F;
        energy_grad = energy + F;
        poison = energy_grad + F;
        part = poison + F;
        size = part + 3 * kParts * F;
    }
    MMFAST_INLINE int skew(int q) const { return q + quotient(q, reciprocal) * pad; }
    // The row of tile i, of a tuned kernel's at most 2^30.
    MMFAST_INLINE uint32_t row_of(uint32_t i) const { return wide_quotient(i, tiles_reciprocal); }
    // i / n of one of the n features of the frames of a tile.
    MMFAST_INLINE int line(int i, int n) const { return feature_reciprocal ? quotient(i, feature_reciprocal) : i / n; }
};

template <class T>
struct Planes {
    T *re, *im;
};

// N values that lie together, moved as one.
template <int N, class T>
struct alignas(N * sizeof(T)) Together {
    T value[N];
    static MMFAST_INLINE Together of(const T* from) {
#if defined(__CUDA_ARCH__)  // as a whole it would be copied as bytes, by way of the stack
        if constexpr (N == 4 && sizeof(T) == 4) {
            const float4 v = *reinterpret_cast<const float4*>(from);
            return {v.x, v.y, v.z, v.w};
        } else if constexpr (N == 2 && sizeof(T) == 4) {
            const float2 v = *reinterpret_cast<const float2*>(from);
            return {v.x, v.y};
        } else
#endif
            return *reinterpret_cast<const Together*>(from);
    }
    MMFAST_INLINE void to(T* place) const {
#if defined(__CUDA_ARCH__)
        if constexpr (N == 4 && sizeof(T) == 4) {
            *reinterpret_cast<float4*>(place) = make_float4(value[0], value[1], value[2], value[3]);
            return;
        }
#endif
        *reinterpret_cast<Together*>(place) = *this;
    }
    MMFAST_INLINE void to_shared(T* place) const {
#if defined(__CUDA_ARCH__)
        if constexpr (N == 4 && sizeof(T) == 4) {
            // The compiler takes an assignment apart into four stores.
            asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(unsigned(__cvta_generic_to_shared(place))),
                         "f"(value[0]), "f"(value[1]), "f"(value[2]), "f"(value[3])
                         : "memory");
            return;
        }
#endif
        *reinterpret_cast<Together*>(place) = *this;
    }
};

}  // namespace mel
}  // namespace mmfast
