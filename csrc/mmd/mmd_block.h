// The quadratic forms of an MMD for few features, as a block of threads runs them: differences in registers, exact in the
// features' own type. No CUDA header is needed, so that a host can run the same code (tests/native/test_mmd_block.cpp).
//
// Note: [Rows that own their sums]
//   A thread has a row of the pooled sample and meets all others, tile by tile in shared memory. Each ordered pair is then
//   evaluated, twice the work of each pair once, but a row's sums and gradient stay with its thread: no atomics, one order,
//   and no memory beyond the result.
//
// Note: [Instructions of a pair]
//   Gaussians in float have kernels of their own, where a pair asks for nothing that is known outside the loop. Per ordered
//   pair with D features and R rungs: ceil((D + 1) / 4) loads, 2 D for z, and 3 for a single Gaussian or 2 R + 2 for a
//   ladder; a gradient adds D + 1 and for a ladder R. Counted in the SASS for sm_90a, with what the loop itself takes:
//     D   R = 1, values   and gradient   R = 5, values   and gradient
//     2             8.2           11.6            17.8           25.8
//     3            11.8           15.9            20.8           29.8
//     4            13.6           18.9            22.8           32.8
//     8            23.3           32.8            32.5           46.5
//     16           41.5           58.3            50.5           72.5
//   At 128 a clock and multiprocessor that is as long as the exponential takes (16 a clock) in the first case, and longer
//   in all others. Registers: 40 to 96 for a single Gaussian, 72 for a ladder, 125 to 168 for its gradient; no loop spills.
//   The exponential is 2^(-gamma log2(e) z) by ex2.approx: 2 ulp, and the rounding of its argument that exp() has as well.
//
// Note: [Phases]
//   As in mel/mel_block.h: block.each(n, f) runs independent items and waits for all of them.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/exp2.h"
#include "mmd/mmd_core.h"

namespace mmfast {
namespace mmd {

constexpr int kFewRows = 128, kFewColumns = 128, kFewTerms = 64, kFewFeatures = 16;

template <class T>
struct FewJob {
    int64_t batch, n, m;  // points of x and of y; all arrays contiguous
    int dimension;
    const T *x, *y;                    // [batch][n][dimension], [batch][m][dimension]
    const T *wx, *wy;                  // [batch][n], [batch][m], or null for ones
    const double *coefs, *parameters;  // [3], [terms][4]
    int terms;
    uint8_t families[kFewTerms];
    int shares;  // of the columns; each has its own results
    bool all_sums;
    double* sums;  // [batch][shares][2][n + m]: of b_j k over the columns of x, and over those of y
    T* gradient;   // [batch][shares][n + m][dimension], or null
};

template <class T>
MMFAST_INLINE bool all_gaussians(const FewJob<T>& job) {
    for (int t = 0; t < job.terms; ++t)
        if (job.families[t] != int(Family::gaussian)) return false;
    return true;
}

// Tiles do not mix the samples: those of x come first.
MMFAST_INLINE int64_t few_tiles(int64_t n, int64_t m, int size) {
    return (n + size - 1) / size + (m + size - 1) / size;
}

template <class T>
struct Numbers {
    using V = T;
    static MMFAST_INLINE T exp(T x) { return ::exp(x); }
    static MMFAST_INLINE T exp2(T x) { return fast_exp2(x); }
    static MMFAST_INLINE T log(T x) { return ::log(x); }
    static MMFAST_INLINE T sqrt(T x) { return ::sqrt(x); }
};

// A column's coordinates and, behind them, its weight: one point in loads of 16 bytes.
template <class T, int D>
struct alignas(16) FewColumn {
    static constexpr int kVector = 16 / int(sizeof(T));
    T at[(D + kVector) / kVector * kVector];
};

// Ladders without a number of rungs that is known to the compiler, and Gaussians that are no ladder.
constexpr int kAnyLadder = 0, kApart = -1;

// What a row needs of its Gaussians, in registers. The rungs are few, or none where the number is not known.
template <class T, int Rungs>
struct FewLadder {
    static constexpr int kKept = Rungs > 0 ? Rungs : 1;
    T rate;  // of the widest: exp(-gamma z) = 2^(rate z)
    T weights[kKept], slopes[kKept];
};

template <class T, int D>
struct FewMemory {
    FewColumn<T, D> columns[kFewColumns];
    double gradient[D][kFewRows], sums[2][kFewRows];
    Term<T> terms[kFewTerms];
    bool ladder;
};

template <class T, int D, class Block>
struct Few {
    using Memory = FewMemory<T, D>;
    const FewJob<T>& job;
    const Block& block;
    Memory& memory;
    int64_t item, share, row0;  // the first row within its sample
    bool of_y;
    int rows;

    MMFAST_INLINE Few(const FewJob<T>& j, const Block& b, Memory& at, int64_t index) : job(j), block(b), memory(at) {
        const int64_t tiles = few_tiles(j.n, j.m, kFewRows), of_x = few_tiles(j.n, 0, kFewRows);
        const int64_t tile = index % tiles;
        share = index / tiles % j.shares;
        item = index / tiles / j.shares;
        of_y = tile >= of_x;
        row0 = (of_y ? tile - of_x : tile) * kFewRows;
        const int64_t left = (of_y ? j.m : j.n) - row0;
        rows = left < kFewRows ? int(left) : kFewRows;
    }

    MMFAST_INLINE const T* points(bool second) const {
        return second ? job.y + item * job.m * job.dimension : job.x + item * job.n * job.dimension;
    }
    MMFAST_INLINE T weight(bool second, int64_t i) const {
        const T* const w = second ? job.wy : job.wx;
        return w ? w[item * (second ? job.m : job.n) + i] : T(1);
    }

    // A layer's value at z: one exponential and squarings where each gamma is twice the next one's. All its terms have the
    // metric; what needs another one is not compiled.
    template <Metric metric>
    MMFAST_INLINE Value<T> at(T z) const {
        const int n = job.terms;
        if (metric == Metric::l2 && memory.ladder) {
            const Term<T>& widest = memory.terms[n - 1];
            T u = Numbers<T>::exp(-widest.gamma * z);
            Value<T> v{widest.weight * u, -widest.gamma * widest.weight * u};
            for (int t = n - 2; t >= 0; --t) {
                u = u * u;
                v.k += memory.terms[t].weight * u;
                v.h -= memory.terms[t].gamma * memory.terms[t].weight * u;
            }
            return v;
        }
        Value<T> v{T(0), T(0)};
        for (int t = 0; t < n; ++t) {
            Term<T> term = memory.terms[t];
            if (metric == Metric::l1) term.family = Family::laplacian_l1;
            if (metric == Metric::dot) term.family = Family::polynomial;
            const Value<T> more = value<Numbers<T>>(term, z);
            v.k += more.k;
            v.h += more.h;
        }
        return v;
    }

    MMFAST_INLINE void begin() const {
        block.each(kFewRows, [&](int r) {
            for (int d = 0; d < D; ++d) memory.gradient[d][r] = 0;
            memory.sums[0][r] = memory.sums[1][r] = 0;
            if (r < job.terms) {
                const double* const p = job.parameters + 4 * r;
                memory.terms[r] = {static_cast<Family>(job.families[r]), T(p[0]), T(p[1]), T(p[2]), T(p[3])};
            }
            if (r == 0) {
                memory.ladder = job.terms > 1;
                for (int t = 0; t < job.terms; ++t) {
                    const bool doubles =
                        t + 1 == job.terms || T(job.parameters[4 * t + 1]) == 2 * T(job.parameters[4 * t + 5]);
                    if (job.families[t] != int(Family::gaussian) || !doubles) memory.ladder = false;
                }
            }
        });
    }

    MMFAST_INLINE void stage(bool second, int64_t first, int count) const {
        const T* const from = points(second);
        block.each(kFewColumns, [&](int c) {
            T* const to = memory.columns[c].at;
            for (int d = 0; d < D; ++d)
                to[d] = c < count && d < job.dimension ? from[(first + c) * job.dimension + d] : T(0);
            to[D] = c < count ? weight(second, first + c) : T(0);
        });
    }

    // Row r with the staged columns; `factor` is the derivative of the value by a_i b_j k(x_i, x_j).
    template <Metric metric>
    MMFAST_INLINE void row(int r, bool second, int64_t first, int count, double factor) const {
        const T* const own = points(of_y) + (row0 + r) * job.dimension;
        T p[D], g[D], sum = 0;
        for (int d = 0; d < D; ++d) p[d] = d < job.dimension ? own[d] : T(0), g[d] = 0;
        const int64_t self = second == of_y ? row0 + r - first : -1;
        for (int c = 0; c < count; ++c) {
            if (c == self) continue;
            T z = 0;
            MMFAST_UNROLL
            for (int d = 0; d < D; ++d) {
                const T q = memory.columns[c].at[d], difference = p[d] - q;
                z += metric == Metric::dot  ? p[d] * q
                     : metric == Metric::l2 ? difference * difference
                     : difference < 0       ? -difference
                                            : difference;
            }
            const Value<T> v = at<metric>(z);
            const T w = memory.columns[c].at[D];
            sum += w * v.k;
            if (job.gradient == nullptr) continue;
            const T u = w * v.h;
            MMFAST_UNROLL
            for (int d = 0; d < D; ++d) {
                const T q = memory.columns[c].at[d], difference = p[d] - q;
                if (metric == Metric::dot) g[d] += u * q;
                if (metric == Metric::l2) g[d] += u * difference;
                // And NaN stays NaN.
                if (metric == Metric::l1) g[d] += difference > 0 ? u : difference < 0 ? -u : u * difference;
            }
        }
        memory.sums[second][r] += sum;
        const double scale = factor * weight(of_y, row0 + r) * (metric == Metric::l2 ? 2 : 1);
        if (job.gradient)
            for (int d = 0; d < D; ++d) memory.gradient[d][r] += scale * g[d];
    }

    static MMFAST_INLINE T rate(T gamma) { return -gamma * T(1.4426950408889634); }

    // The Gaussians at G values z: k, and h that lacks a factor of -1. A single one lacks weight and gamma as well.
    template <int Rungs, bool gradient, int G>
    MMFAST_INLINE void gaussians(const FewLadder<T, Rungs>& ladder, const T* z, T* k, T* h) const {
        T u[G];
        const auto add = [&](T w, T slope) {
            MMFAST_UNROLL
            for (int j = 0; j < G; ++j) {
                k[j] += w * u[j];
                if (gradient) h[j] += slope * u[j];
            }
        };
        const auto square = [&] {
            MMFAST_UNROLL
            for (int j = 0; j < G; ++j) u[j] = u[j] * u[j];
        };
        MMFAST_UNROLL
        for (int j = 0; j < G; ++j) {
            u[j] = Numbers<T>::exp2(ladder.rate * z[j]);
            k[j] = Rungs == 1 ? u[j] : ladder.weights[FewLadder<T, Rungs>::kKept - 1] * u[j];
            h[j] = Rungs == 1 ? u[j] : ladder.slopes[FewLadder<T, Rungs>::kKept - 1] * u[j];
        }
        if constexpr (Rungs > 0) {
            MMFAST_UNROLL
            for (int t = Rungs - 2; t >= 0; --t) square(), add(ladder.weights[t], ladder.slopes[t]);
        } else {
            for (int t = job.terms - 2; t >= 0; --t) {
                const T w = memory.terms[t].weight, gamma = memory.terms[t].gamma;
                if constexpr (Rungs == kAnyLadder) {
                    square();
                } else {
                    MMFAST_UNROLL
                    for (int j = 0; j < G; ++j) u[j] = Numbers<T>::exp2(rate(gamma) * z[j]);
                }
                add(w, gamma * w);
            }
        }
    }

    // Row p with the columns [c, c + G).
    template <int Rungs, bool gradient, int G>
    MMFAST_INLINE void meet(const FewLadder<T, Rungs>& ladder, const T* p, int c, T& sum, T* g) const {
        T z[G], k[G], h[G];
        MMFAST_UNROLL
        for (int j = 0; j < G; ++j) {
            const FewColumn<T, D>& q = memory.columns[c + j];
            z[j] = (p[0] - q.at[0]) * (p[0] - q.at[0]);
            MMFAST_UNROLL
            for (int d = 1; d < D; ++d) z[j] += (p[d] - q.at[d]) * (p[d] - q.at[d]);
        }
        gaussians<Rungs, gradient, G>(ladder, z, k, h);
        MMFAST_UNROLL
        for (int j = 0; j < G; ++j) {
            const FewColumn<T, D>& q = memory.columns[c + j];
            const T u = q.at[D] * h[j];
            sum += q.at[D] * k[j];
            MMFAST_UNROLL
            for (int d = 0; d < D; ++d)
                if (gradient) g[d] += u * (p[d] - q.at[d]);
        }
    }

    // As row(), of Gaussians. Only the tile that holds the row's own point asks for it at each column.
    template <int Rungs, bool gradient>
    MMFAST_INLINE void gaussian_row(int r, bool second, int64_t first, int count, double factor) const {
        constexpr int kGroup = D <= 4 ? 8 : 4;
        const T* const own = points(of_y) + (row0 + r) * job.dimension;
        FewLadder<T, Rungs> ladder;
        ladder.rate = rate(memory.terms[job.terms - 1].gamma);
        MMFAST_UNROLL
        for (int t = 0; t < FewLadder<T, Rungs>::kKept; ++t) {
            const Term<T>& term = memory.terms[Rungs > 0 ? t : job.terms - 1];
            ladder.weights[t] = term.weight, ladder.slopes[t] = term.gamma * term.weight;
        }
        T p[D], g[D], sum = 0;
        MMFAST_UNROLL
        for (int d = 0; d < D; ++d) p[d] = d < job.dimension ? own[d] : T(0), g[d] = 0;
        const int64_t self = second == of_y ? row0 + r - first : -1;
        int c = 0;
        if (self < 0 || self >= count)
            for (; c + kGroup <= count; c += kGroup) meet<Rungs, gradient, kGroup>(ladder, p, c, sum, g);
        MMFAST_ROLLED
        for (; c < count; ++c)
            if (c != self) meet<Rungs, gradient, 1>(ladder, p, c, sum, g);
        memory.sums[second][r] += Rungs == 1 ? double(ladder.weights[0]) * sum : double(sum);
        if (!gradient) return;
        const double scale = -2 * factor * weight(of_y, row0 + r) * (Rungs == 1 ? double(ladder.slopes[0]) : 1.0);
        MMFAST_UNROLL
        for (int d = 0; d < D; ++d) memory.gradient[d][r] += scale * g[d];
    }

    // row(r, second, first, count, coef) for each row and each tile of columns.
    template <class Row>
    MMFAST_INLINE void sweep(const Row& row) const {
        const int64_t tiles = few_tiles(job.n, job.m, kFewColumns), of_x = few_tiles(job.n, 0, kFewColumns);
        const int64_t each = (tiles + job.shares - 1) / job.shares, last = (share + 1) * each;
        for (int64_t tile = share * each; tile < (last < tiles ? last : tiles); ++tile) {
            const bool second = tile >= of_x;
            const double coef = second != of_y ? job.coefs[2] : 2 * job.coefs[second ? 1 : 0];
            if (coef == 0 && !job.all_sums) continue;  // what a coefficient leaves out may even be NaN
            const int64_t first = (second ? tile - of_x : tile) * kFewColumns, left = (second ? job.m : job.n) - first;
            const int count = left < kFewColumns ? int(left) : kFewColumns;
            stage(second, first, count);
            block.each(rows, [&](int r) { row(r, second, first, count, coef); });
        }
    }

    template <Metric metric>
    MMFAST_INLINE void sweep_any() const {
        sweep([&](int r, bool second, int64_t first, int count, double coef) {
            row<metric>(r, second, first, count, coef);
        });
    }

    template <int Rungs, bool gradient>
    MMFAST_INLINE void sweep_gaussians() const {
        sweep([&](int r, bool second, int64_t first, int count, double coef) {
            gaussian_row<Rungs, gradient>(r, second, first, count, coef);
        });
    }

    MMFAST_INLINE void run() const {
        begin();
        switch (metric_of(static_cast<Family>(job.families[0]))) {
            case Metric::l2: sweep_any<Metric::l2>(); break;
            case Metric::l1: sweep_any<Metric::l1>(); break;
            case Metric::dot: sweep_any<Metric::dot>(); break;
        }
        end();
    }

    // Where all terms are Gaussians; `gradient` is whether the job has one. `Single` is whether there is one term.
    template <bool gradient, bool Single>
    MMFAST_INLINE void run_gaussians() const {
        begin();
        if constexpr (Single) {
            sweep_gaussians<1, gradient>();
        } else {
            switch (memory.ladder ? job.terms : kApart) {
                case kApart: sweep_gaussians<kApart, gradient>(); break;
                case 2: sweep_gaussians<2, gradient>(); break;
                case 3: sweep_gaussians<3, gradient>(); break;
                case 4: sweep_gaussians<4, gradient>(); break;
                case 5: sweep_gaussians<5, gradient>(); break;
                case 8: sweep_gaussians<8, gradient>(); break;
                default: sweep_gaussians<kAnyLadder, gradient>(); break;
            }
        }
        end();
    }

    MMFAST_INLINE void end() const {
        const int64_t total = job.n + job.m, base = item * job.shares + share;
        block.each(rows, [&](int r) {
            const int64_t i = row0 + r + (of_y ? job.n : 0);
            for (int s = 0; s < 2; ++s) job.sums[(base * 2 + s) * total + i] = memory.sums[s][r];
            if (job.gradient == nullptr) return;
            for (int d = 0; d < job.dimension; ++d)
                job.gradient[(base * total + i) * job.dimension + d] = T(memory.gradient[d][r]);
        });
    }
};

}  // namespace mmd
}  // namespace mmfast
