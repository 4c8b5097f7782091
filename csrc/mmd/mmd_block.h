// The quadratic forms of an MMD for few features, as a block of threads runs them: differences in registers, exact in the
// features' own type. No CUDA header is needed, so that a host can run the same code (tests/native/test_mmd_block.cpp).
//
// Note: [Rows that own their sums]
//   A thread has a row of the pooled sample and meets all others, tile by tile in shared memory. Each ordered pair is then
//   evaluated, twice the work of each pair once, but a row's sums and gradient stay with its thread: no atomics, one order,
//   and no memory beyond the result. Per ordered pair with D features and a ladder of 5 Gaussians: 3 D + 21 operations and one
//   exponential, against 16 exponentials a clock and multiprocessor: from D = 1 to 16 the arithmetic is the limit, which no
//   product of tiles would lower below D of about 16.
//
// Note: [Phases]
//   As in mel/mel_block.h: block.each(n, f) runs independent items and waits for all of them.
#pragma once

#include <cmath>
#include <cstdint>

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

// Tiles do not mix the samples: those of x come first.
MMFAST_INLINE int64_t few_tiles(int64_t n, int64_t m, int size) {
    return (n + size - 1) / size + (m + size - 1) / size;
}

template <class T>
struct Numbers {
    using V = T;
    static MMFAST_INLINE T exp(T x) { return ::exp(x); }
    static MMFAST_INLINE T log(T x) { return ::log(x); }
    static MMFAST_INLINE T sqrt(T x) { return ::sqrt(x); }
};

template <class T, int D>
struct FewMemory {
    T columns[D][kFewColumns], weights[kFewColumns];
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
            for (int d = 0; d < D; ++d)
                memory.columns[d][c] = c < count && d < job.dimension ? from[(first + c) * job.dimension + d] : T(0);
            memory.weights[c] = c < count ? weight(second, first + c) : T(0);
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
                const T q = memory.columns[d][c], difference = p[d] - q;
                z += metric == Metric::dot  ? p[d] * q
                     : metric == Metric::l2 ? difference * difference
                     : difference < 0       ? -difference
                                            : difference;
            }
            const Value<T> v = at<metric>(z);
            const T w = memory.weights[c];
            sum += w * v.k;
            if (job.gradient == nullptr) continue;
            const T u = w * v.h;
            MMFAST_UNROLL
            for (int d = 0; d < D; ++d) {
                const T q = memory.columns[d][c], difference = p[d] - q;
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

    template <Metric metric>
    MMFAST_INLINE void sweep() const {
        const int64_t tiles = few_tiles(job.n, job.m, kFewColumns), of_x = few_tiles(job.n, 0, kFewColumns);
        const int64_t each = (tiles + job.shares - 1) / job.shares, last = (share + 1) * each;
        for (int64_t tile = share * each; tile < (last < tiles ? last : tiles); ++tile) {
            const bool second = tile >= of_x;
            const double coef = second != of_y ? job.coefs[2] : 2 * job.coefs[second ? 1 : 0];
            if (coef == 0 && !job.all_sums) continue;  // what a coefficient leaves out may even be NaN
            const int64_t first = (second ? tile - of_x : tile) * kFewColumns, left = (second ? job.m : job.n) - first;
            const int count = left < kFewColumns ? int(left) : kFewColumns;
            stage(second, first, count);
            block.each(rows, [&](int r) { row<metric>(r, second, first, count, coef); });
        }
    }

    MMFAST_INLINE void run() const {
        begin();
        switch (metric_of(static_cast<Family>(job.families[0]))) {
            case Metric::l2: sweep<Metric::l2>(); break;
            case Metric::l1: sweep<Metric::l1>(); break;
            case Metric::dot: sweep<Metric::dot>(); break;
        }
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
