// A softmax block by block of keys: exponentials of scores in memory, or of a product's vectors before they get there. For
// fusion_forward.cpp.
#pragma once

#include "fusion/fusion_panel.h"

namespace mmfast {
namespace fusion {
namespace MMFAST_ISA {
namespace {

// Of a softmax so far: the maximum (in units of ln 2) and the sum of the exponentials less it.
template <class T, int S>
struct Running {
    Vec<T> maximum[S], sum[S];
};

// The same in memory: maxima, then sums.
template <class T, int S>
MMFAST_INLINE void load_running(const T* from, Running<T, S>& running) {
    constexpr int64_t N = Simd<T>::lanes;
    for (int v = 0; v < S; ++v) {
        running.maximum[v] = Simd<T>::load(from + v * N);
        running.sum[v] = Simd<T>::load(from + (S + v) * N);
    }
}

template <class T, int S>
MMFAST_INLINE void store_running(const Running<T, S>& running, T* to) {
    constexpr int64_t N = Simd<T>::lanes;
    for (int v = 0; v < S; ++v) {
        Simd<T>::store(to + v * N, running.maximum[v]);
        Simd<T>::store(to + (S + v) * N, running.sum[v]);
    }
}

// factor[lane] = 1 / sum, and the log-sum-exp of softmax number `softmax`.
template <class T, int S>
MMFAST_INLINE void finish(const ForwardJob<T>& job, const Item& item, const Rows& rows, int softmax,
                          const Running<T, S>& running, T* factor) {
    constexpr int N = Simd<T>::lanes;
    const Problem& p = *job.problem;
    alignas(64) T lse[kPanel<T>];
    for (int v = 0; v < S; ++v) {
        const Vec<T> sum = running.sum[v];
        const auto nothing = sum == 0;
        Simd<T>::store(factor + v * N, nothing ? Vec<T>{} : T(1) / sum);
        Simd<T>::store(lse + v * N,
                       nothing ? Simd<T>::splat(-infinity<T>()) : running.maximum[v] * T(kLn2) + mmfast::log(sum));
    }
    scatter(p, lse, item.batch, rows, job.lse + softmax * p.batch * p.heads * p.rows);
}

// From one partial result to the next: that of whole panels, as narrow as the last one may be.
template <class T>
MMFAST_INLINE int64_t partial_size(const Problem& p) {
    return (p.value_dim + 2) * kPanel<T>;
}
template <class T>
MMFAST_INLINE T* partial_of(const ForwardJob<T>& job, int64_t slot) {
    return job.partial + slot * partial_size<T>(*job.problem);
}

template <class T, int S>
MMFAST_INLINE void reset(Running<T, S>& running) {
    for (int v = 0; v < S; ++v) {
        running.maximum[v] = Simd<T>::splat(-infinity<T>());
        running.sum[v] = Vec<T>{};
    }
}

// Exponentials in place of the scores, of all vectors from the kFirst-th on; factor[lane] = what outputs so far are to be scaled by.
template <class T, int S, int kFirst = 0>
void exponentials(int64_t count, T* tile, Running<T, S>& running, T* factor) {
    constexpr int N = Simd<T>::lanes, W = S * N, kCount = smaller(S - kFirst, kProductWidth);
    Vec<T> maximum[kCount], shift[kCount], sum[kCount];
    T* const first = tile + kFirst * N;
    for (int v = 0; v < kCount; ++v) maximum[v] = running.maximum[kFirst + v];
    for (int64_t k = 0; k < count; ++k)
#pragma GCC unroll 4
        for (int v = 0; v < kCount; ++v) {
            const Vec<T> x = Simd<T>::load(first + k * W + v * N);
            maximum[v] = Simd<T>::max(x, maximum[v]);
        }
    for (int v = 0; v < kCount; ++v) {
        shift[v] = maximum[v] == -infinity<T>() ? Vec<T>{} : maximum[v];
        const Vec<T> f = mmfast::exp2(running.maximum[kFirst + v] - shift[v]);
        Simd<T>::store(factor + (kFirst + v) * N, f);
        running.sum[kFirst + v] *= f;
        sum[v] = Vec<T>{};  // of the block alone: one long chain of additions would lose digits
        running.maximum[kFirst + v] = maximum[v];
    }
    for (int64_t k = 0; k < count; ++k)
#pragma GCC unroll 4
        for (int v = 0; v < kCount; ++v) {
            T* const at = first + k * W + v * N;
            const Vec<T> e = mmfast::exp2(Simd<T>::load(at) - shift[v]);
            sum[v] += e;
            Simd<T>::store(at, e);
        }
    for (int v = 0; v < kCount; ++v) running.sum[kFirst + v] += sum[v];
    if constexpr (kFirst + kCount < S) exponentials<T, S, kFirst + kCount>(count, tile, running, factor);
}

// Note: [Exponentials at once]
//   The scores of a few keys tell roughly where the maximum of a softmax lies; exponentials less that, though some exceed 1, are
//   as exact as less the maximum itself. So those of all other keys are taken of the product's vectors before they are
//   stored, and neither a look for the maximum nor outputs to be scaled come between the two products. Where a score turns
//   out to be much larger the block is computed again, with its maximum looked for, or large values could overflow; and where
//   that happens again and again nothing is tried any more.
constexpr float kMostSum = 0x1p12f;  // of a block
constexpr int kMostFailures = 3;     // of an item

template <class T, int S>
MMFAST_INLINE bool all_finite(const Vec<T>* x) {
    Vec<T> zero{};
    for (int v = 0; v < S; ++v) zero += x[v] - x[v];
    return Simd<T>::all_zero(zero);
}

// Exponentials of plain scores into `block` [key][lane]; false if they are to be computed again, running is untouched then.
// key_of(segment, keys before it in the block) is a Block.
template <class T, int S, class F>
bool exponentials_at_once(const Problem& p, const Keys& keys, int64_t last, int64_t from, int64_t to, const T* queries,
                          T* block, Ahead& ahead, Running<T, S>& running, bool started, const F& key_of) {
    constexpr int N = Simd<T>::lanes, W = S * N;
    Running<T, S> now = running;
    Vec<T> sum[S] = {};
    int64_t count = 0;
    bool fits = !started || all_finite<T, S>(now.maximum);
    for_segments(p, keys, last, from, to, [&](Segment s) MMFAST_LAMBDA {
        if (!fits) return;
        Block<T> key = key_of(s, count);
        T* tile = block + count * W;
        count += s.count;
        if (!started) {
            alignas(64) T factor[W];
            const int64_t some = smaller(s.count, kProductRows);
            product_panel<T, S, false>(some, p.dim, key.data, key.stride, queries, W, tile, W, Start::zero);
            exponentials<T, S>(some, tile, now, factor);
            if (!(fits = all_finite<T, S>(now.maximum))) return;
            started = true;
            key.data += some * key.stride;
            tile += some * W;
            s.count -= some;
        }
        product_panel<T, S, false>(s.count, p.dim, key.data, key.stride, queries, W, tile, W, Start::zero, nullptr,
                                   ahead, [&](Vec<T> x, int v, T*) MMFAST_LAMBDA {
                                       const Vec<T> e = mmfast::exp2_limited(x - now.maximum[v]);
                                       sum[v] += e;
                                       return e;
                                   });
    });
    if (!fits) return false;
    Vec<T> over{};  // of NaN, too
    for (int v = 0; v < S; ++v) {
        over += sum[v] < T(kMostSum) ? Vec<T>{} : Simd<T>::splat(1);
        over += sum[v] >= T(0) ? Vec<T>{} : Simd<T>::splat(1);
    }
    if (!Simd<T>::all_zero(over)) return false;
    for (int v = 0; v < S; ++v) {
        running.maximum[v] = now.maximum[v];
        running.sum[v] = now.sum[v] + sum[v];
    }
    return true;
}

}  // namespace
}  // namespace MMFAST_ISA
}  // namespace fusion
}  // namespace mmfast
