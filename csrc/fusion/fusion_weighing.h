// Attention of a panel of queries together with its weights. For fusion_forward.cpp.
//
// Note: [Weights at once]
//   Weights are the exponentials of the forward pass over their sum. Where those of all keys of a panel fit into the second
//   cache they stay there, block by block, until the sum is known, and are added up over the heads; from the
//   log-sum-exp they would cost the product of queries and keys and the exponentials once more. Attention of 4 x 8 heads,
//   448 x 1500, 45 ms on a core of a Sapphire Rapids, takes 14 ms longer with weights so, and 35 to 50 ms longer otherwise.
#pragma once

#include "fusion/fusion_panel.h"
#include "fusion/fusion_softmax.h"

namespace mmfast {
namespace fusion {
namespace MMFAST_ISA {
namespace {

// Behind the buffers of a head: exponentials and sums of weights [key][lane], and of each block what its maximum was.
template <class T>
struct Weighing {
    T *tile, *sum, *maxima;
};

template <class T>
MMFAST_INLINE int64_t weighing_size(const Problem& p) {
    int64_t total = 0;
    for (int j = 0; j < p.count; ++j) total += p.sources[j].keys;
    return kPanel<T> * (2 * total + blocks_of(total, kBlockKeys));
}

// sum[key][lane] = or += exponentials of a block, less another maximum, times factor[lane].
template <class T, int S>
void add_block(int64_t count, const T* tile, const T* block_maximum, const Running<T, S>& running, const T* factor,
               bool add, T* sum) {
    constexpr int N = Simd<T>::lanes, W = S * N;
    Vec<T> f[S];
    for (int v = 0; v < S; ++v) {
        const Vec<T> last = running.maximum[v];
        const Vec<T> shift = last == -infinity<T>() ? Vec<T>{} : last;
        const Vec<T> its = Simd<T>::load(block_maximum + v * N);
        f[v] = Simd<T>::load(factor + v * N) * mmfast::exp2(its - shift);
    }
    for (int64_t k = 0; k < count; ++k)
#pragma GCC unroll 4
        for (int v = 0; v < S; ++v) {
            const int64_t at = k * W + v * N;
            const Vec<T> x = f[v] * Simd<T>::load(tile + at);
            Simd<T>::store(sum + at, add ? Simd<T>::load(sum + at) + x : x);
        }
}

// One head of an item, whose weights are added to those of the heads before it.
template <class T, int S>
void weighing_panel(const ForwardJob<T>& job, const Item& item, const Item& next, const Rows& rows, const Keys& keys,
                    Buffers<T>& b, const Weighing<T>& w, T part, bool first, bool last) {
    constexpr int64_t N = Simd<T>::lanes, W = S * N;
    const Problem& p = *job.problem;
    const int64_t total = keys.start[p.count], blocks = blocks_of(total, kBlockKeys);
    const auto start_of = [&](int64_t i) { return total * i / blocks; };
    alignas(64) T factor[W];
    Running<T, S> running;
    pack_columns<T>(p.query, item.batch, rows, 0, p.dim, T(p.scale * kLog2e), b.queries);
    reset(running);
    bool started = false;
    for (int64_t i = 0; i < blocks; ++i) {
        const int64_t from = start_of(i), to = start_of(i + 1);
        if (i + 1 < blocks) keys_ahead(p, item, keys, rows.last, to, start_of(i + 2), b);
        else if (!last) keys_ahead(p, next, keys, rows.last, 0, start_of(1), b);
        b.ahead.spread(product_steps(to - from) + product_steps(p.value_dim));
        b.tile = w.tile + from * W;
        started = attend_block<T, S>(p, item, rows, keys, from, to, b, running, started);
        for (int v = 0; v < S; ++v) Simd<T>::store(w.maxima + i * W + v * N, running.maximum[v]);
    }
    if (!started) clear_out<T, S>(p, b.out);
    finish<T, S>(job, item, rows, 0, running, factor);
    unpack_columns<T>(b.out, p.value_dim, factor, item.batch, rows, job.out, 0, false);
    for (int v = 0; v < S; ++v) Simd<T>::store(factor + v * N, part * Simd<T>::load(factor + v * N));
    for (int64_t i = 0; i < blocks; ++i)
        add_block<T, S>(start_of(i + 1) - start_of(i), w.tile + start_of(i) * W, w.maxima + i * W, running, factor,
                        !first, w.sum + start_of(i) * W);
}

// The weights of a panel, or their mean.
template <class T, int S>
void put_weights(const Problem& p, const WeightsJob<T>& job, int64_t batch, const Rows& rows, const Keys& keys,
                 const T* sum) {
    constexpr int64_t W = S * Simd<T>::lanes;
    const int64_t total = keys.start[p.count], blocks = blocks_of(total, kBlockKeys);
    for (int64_t i = 0; i < blocks; ++i) {
        const int64_t from = total * i / blocks;
        int64_t at = from;
        for_segments(p, keys, rows.last, from, total * (i + 1) / blocks, [&](const Segment& s) MMFAST_LAMBDA {
            unpack_columns<T>(sum + at * W, s.count, static_cast<const T*>(nullptr), batch, rows, job.weights[s.source],
                              s.first, false);
            at += s.count;
        });
    }
}

template <class T>
int64_t weighing_scratch(const Problem& p) {
    return scratch_size<T>(p, 1, 1, Order::panels) + weighing_size<T>(p);
}

template <class T>
void forward_weighing(const ForwardJob<T>& job, const WeightsJob<T>& weights, const Item& item, T* scratch) {
    const Problem& p = *job.problem;
    Buffers<T> b;
    set_buffers(p, 1, scratch, b);
    Weighing<T> w;
    w.tile = scratch + scratch_size<T>(p, 1, 1, Order::panels);
    Keys keys;
    set_keys(p, item.batch, true, keys);
    w.sum = w.tile + kPanel<T> * keys.start[p.count];
    w.maxima = w.sum + kPanel<T> * keys.start[p.count];
    const T part = T(1) / T(item.heads);
    Rows rows;
    Item now = item, next = item;
    for (int64_t h = 0; h < item.heads; ++h) {
        now.head = item.head + h;
        next.head = now.head + 1;
        set_rows<T>(p, 1, now.head, item.panel, rows);
        for_width<T>(rows.n, [&]<int S>() MMFAST_LAMBDA {
            weighing_panel<T, S>(job, now, next, rows, keys, b, w, part, h == 0, h + 1 == item.heads);
        });
    }
    if (item.heads > 1)
        for (int64_t i = 0; i < rows.n; ++i) rows.head[i] = 0;
    for_width<T>(rows.n, [&]<int S>() MMFAST_LAMBDA { put_weights<T, S>(p, weights, item.batch, rows, keys, w.sum); });
}

}  // namespace
}  // namespace MMFAST_ISA
}  // namespace fusion
}  // namespace mmfast
