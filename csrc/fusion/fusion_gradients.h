// What the ways to compute gradients of lanes of queries share. For fusion_backward.cpp and fusion_matrix.cpp.
#pragma once

#include "fusion/fusion_panel.h"

namespace mmfast {
namespace fusion {
namespace MMFAST_ISA {
namespace {

// What a softmax needs of each lane.
template <class T>
struct Lanes {
    alignas(64) T lse[kPanel<T>];  // in units of ln 2
    alignas(64) T grad_lse[kPanel<T>];
    alignas(64) T delta[kPanel<T>];
    alignas(64) T total[kPanel<T>];  // of P
    alignas(64) T gate[kPanel<T>];
};

template <class T, int S>
void set_lanes(const BackwardJob<T>& job, int64_t batch, const Rows& rows, int softmax, Lanes<T>& lanes) {
    const Problem& p = *job.problem;
    const int64_t offset = softmax * p.batch * p.heads * p.rows;
    gather(p, job.lse + offset, batch, rows, -infinity<T>(), lanes.lse);
    if (job.grad_lse) gather(p, job.grad_lse + offset, batch, rows, T(0), lanes.grad_lse);
    for (int64_t i = 0; i < kPanel<T>; ++i) {
        lanes.lse[i] = shift_of(lanes.lse[i]);
        if (!job.grad_lse) lanes.grad_lse[i] = 0;
        lanes.delta[i] = lanes.total[i] = 0;
        lanes.gate[i] = 1;
    }
    if (p.decoupled) gates_of(p.sources[softmax], batch, rows, lanes.gate);
}

// Sums over keys, of P dP and P.
template <class T, int S>
struct Totals {
    Vec<T> delta[S], total[S];
    MMFAST_INLINE explicit Totals(const Lanes<T>& lanes) {
        for (int v = 0; v < S; ++v) {
            delta[v] = Simd<T>::load(lanes.delta + v * Simd<T>::lanes);
            total[v] = Simd<T>::load(lanes.total + v * Simd<T>::lanes);
        }
    }
    MMFAST_INLINE void add(int v, Vec<T> p, const T* dp) {
        delta[v] += p * Simd<T>::load(dp);
        total[v] += p;
    }
    MMFAST_INLINE void store(Lanes<T>& lanes) const {
        for (int v = 0; v < S; ++v) {
            Simd<T>::store(lanes.delta + v * Simd<T>::lanes, delta[v]);
            Simd<T>::store(lanes.total + v * Simd<T>::lanes, total[v]);
        }
    }
};

// delta of a softmax whose keys have all been met. P adds up to 1 as exactly only as the log-sum-exp was rounded, which is as
// large as the scores; without the division gradients of queries would get that error times the mean of the keys.
template <class T, int S>
MMFAST_INLINE void set_delta(Lanes<T>& lanes) {
    constexpr int N = Simd<T>::lanes;
    for (int i = 0; i < S * N; i += N) {
        const Vec<T> total = Simd<T>::load(lanes.total + i);
        Simd<T>::store(lanes.delta + i, total == 0 ? Vec<T>{} : Simd<T>::load(lanes.delta + i) / total);
    }
}

// Sums of keys first .. to where they belong, or added to it.
template <class T>
void flush(const Accumulator& to, int64_t run, int64_t batch, int64_t head, int64_t first, int64_t count, int64_t width,
           const T* from, int64_t stride) {
    constexpr int64_t N = Simd<T>::lanes;
    dispatch<T>(to.target.type, [&](auto* kind) MMFAST_LAMBDA {
        using To = std::remove_pointer_t<decltype(kind)>;
        To* const data = static_cast<To*>(to.target.data) + run * to.run;
        for (int64_t i = 0; i < count; ++i) {
            To* const row = data + to.target.at(batch, head, first + i);
            for (int64_t k = 0; k < width; k += N)
                store_as<T>(row + k, Simd<T>::load(from + i * stride + k), width - k);
        }
    });
}

template <class T>
MMFAST_INLINE void clear(T* to, int64_t count) {
    for (int64_t i = 0; i < count; i += Simd<T>::lanes) Simd<T>::store(to + i, Vec<T>{});
}

// What the queries `rows` of an item will read and write.
template <class T>
void rows_ahead(const BackwardJob<T>& job, const BackwardItem& item, const Rows& rows, bool whole, Ahead& ahead) {
    if (!rows.one_head) return;
    const Problem& p = *job.problem;
    const auto add = [&](const auto& x, int64_t columns) {
        ahead.add(x, item.batch, rows.head[0], rows.row[0], rows.n, columns);
    };
    add(p.query, p.dim);
    add(job.grad_out, p.value_dim);
    if (!whole) add(job.out, p.value_dim);
    if (job.query.target.data && !job.query.run) add(job.query.target, p.dim);
}

}  // namespace
}  // namespace MMFAST_ISA
}  // namespace fusion
}  // namespace mmfast
