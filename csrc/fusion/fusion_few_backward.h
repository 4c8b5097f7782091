// Gradients of few queries and many keys. For fusion_backward.cpp.
//
// Note: [Few, backward]
//   Features are in the lanes, as forward (see [Few]). With the log-sum-exp L and delta = dO O known, a key needs nothing of the
//   others: it is read once, and its gradients, sums over the few queries, are written once, straight into the result. As
//   many keys as lanes go through all heads before the next ones.
//   Floor: a key and head of 64 features move 1.5 KB, read, written, and read before they are written.
#pragma once

#include "fusion/fusion_few.h"

namespace mmfast {
namespace fusion {
namespace MMFAST_ISA {
namespace {

// Of one head, in whole vectors a row: queries times scale and 1 / ln 2, times scale, dO, dQ so far.
template <class T>
struct FewGradientHead {
    T *queries, *query_rows, *grad_rows, *dq, *lse, *offset;  // offset = delta - dL
};

template <class T>
MMFAST_INLINE FewGradientHead<T> few_gradient_head(const Problem& p, T* scratch, int64_t h) {
    constexpr int64_t N = Simd<T>::lanes;
    const int64_t width = kFewRows * up_to_multiple(p.dim, N), value_width = kFewRows * up_to_multiple(p.value_dim, N);
    FewGradientHead<T> s;
    s.queries = scratch + h * (3 * width + value_width + 2 * kFewRows);
    s.query_rows = s.queries + width;
    s.dq = s.query_rows + width;
    s.grad_rows = s.dq + width;
    s.lse = s.grad_rows + value_width;
    s.offset = s.lse + kFewRows;
    return s;
}

template <class T>
int64_t few_gradient_scratch(const Problem& p, int64_t heads) {
    return few_gradient_head<T>(p, nullptr, heads).queries - static_cast<T*>(nullptr) + 2 * kFewRows * kFewKeys;
}

template <class T>
void begin_few_gradients(const BackwardJob<T>& job, int64_t batch, const Rows& rows, const FewGradientHead<T>& s) {
    constexpr int64_t N = Simd<T>::lanes;
    const Problem& p = *job.problem;
    const int64_t width = up_to_multiple(p.dim, N), value_width = up_to_multiple(p.value_dim, N);
    for (T* at = s.queries; at < s.offset + kFewRows; ++at) *at = T(0);
    pack_rows<T>(p.query, batch, rows, p.dim, width, T(p.scale * kLog2e), s.queries);
    pack_rows<T>(p.query, batch, rows, p.dim, width, T(p.scale), s.query_rows);
    pack_rows<T>(job.grad_out, batch, rows, p.value_dim, value_width, T(1), s.grad_rows);
    dispatch<T>(job.out.type, [&](auto* kind) MMFAST_LAMBDA {
        using From = std::remove_pointer_t<decltype(kind)>;
        for (int64_t r = 0; r < rows.n; ++r) {
            const int64_t at = (batch * p.heads + rows.head[r]) * p.rows + rows.row[r];
            const From* const out =
                static_cast<const From*>(job.out.data) + job.out.at(batch, rows.head[r], rows.row[r]);
            Vec<T> sum{};
            for (int64_t d = 0; d < p.value_dim; d += N)
                sum += Simd<T>::load(s.grad_rows + r * value_width + d) *
                       load_step<T>(out + d * job.out.column, job.out.column, p.value_dim - d);
            s.lse[r] = shift_of(job.lse[at]);
            s.offset[r] = Simd<T>::sum(sum) - (job.grad_lse ? job.grad_lse[at] : T(0));
        }
    });
}

// P in place of `count` scores of each row, and dS = P (dP - offset) in place of dP.
template <class T>
void few_score_gradients(int64_t rows, int64_t count, const FewGradientHead<T>& s, T* p, T* dp) {
    constexpr int64_t N = Simd<T>::lanes;
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t k = 0; k < count; k += N) {
            T *const at = p + r * kFewKeys + k, *const to = dp + r * kFewKeys + k;
            const Vec<T> e = mmfast::exp2(Simd<T>::load(at) - s.lse[r]);
            Simd<T>::store(at, e);
            Simd<T>::store(to, e * (Simd<T>::load(to) - s.offset[r]));
        }
}

// Rows `first` .. of a gradient: sums over the queries of tile[query][key] x[query][..].
template <class T, int R>
void few_key_gradients(const Accumulator& to, int64_t run, int64_t batch, int64_t head, int64_t first, int64_t count,
                       int64_t dim, const T* tile, const T* x) {
    constexpr int64_t N = Simd<T>::lanes;
    const int64_t width = up_to_multiple(dim, N);
    dispatch<T>(to.target.type, [&](auto* kind) MMFAST_LAMBDA {
        using To = std::remove_pointer_t<decltype(kind)>;
        To* const data = static_cast<To*>(to.target.data) + run * to.run;
        for (int64_t k = 0; k < count; ++k) {
            To* const row = data + to.target.at(batch, head, first + k);
            for (int64_t d = 0; d < dim; d += N) {
                Vec<T> sum = tile[k] * Simd<T>::load(x + d);
#pragma GCC unroll 8
                for (int r = 1; r < R; ++r) sum += tile[r * kFewKeys + k] * Simd<T>::load(x + r * width + d);
                store_as<T>(row + d, sum, dim - d);
            }
        }
    });
}

template <class T>
void clear_key_gradients(const Accumulator& to, int64_t run, int64_t batch, int64_t head, int64_t first, int64_t end,
                         int64_t dim) {
    constexpr int64_t N = Simd<T>::lanes;
    if (!to.target.data) return;
    dispatch<T>(to.target.type, [&](auto* kind) MMFAST_LAMBDA {
        using To = std::remove_pointer_t<decltype(kind)>;
        for (int64_t k = first; k < end; ++k)
            for (int64_t d = 0; d < dim; d += N)
                store_as<T>(static_cast<To*>(to.target.data) + run * to.run + to.target.at(batch, head, k) + d,
                            Vec<T>{}, dim - d);
    });
}

// All heads of an item, one softmax, one panel of at most kFewRows rows a head.
template <class T>
void backward_few(const BackwardJob<T>& job, const BackwardItem& item, T* scratch) {
    constexpr int64_t N = Simd<T>::lanes;
    const Problem& p = *job.problem;
    const int64_t width = up_to_multiple(p.dim, N);
    T* const tile = few_gradient_head<T>(p, scratch, item.heads).queries;
    T* const slopes = tile + kFewRows * kFewKeys;
    Keys keys;
    set_keys(p, item.batch, false, keys);
    Rows rows;
    const auto set_head = [&](int64_t h) {
        set_rows<T>(p, job.fold, item.head + h * job.fold, item.panel, rows);
        return few_gradient_head<T>(p, scratch, h);
    };
    for (int64_t h = 0; h < item.heads; ++h) begin_few_gradients(job, item.batch, rows, set_head(h));
    const auto chunk = [&]<int R>(const Segment& seg, int64_t h) MMFAST_LAMBDA {
        const int j = seg.source;
        const Source& source = p.sources[j];
        const FewGradientHead<T> s = set_head(h);
        const int64_t head = key_head(p, j, item.head + h * job.fold);
        dispatch<T>(source.key.type, [&](auto* kind) MMFAST_LAMBDA {
            using From = std::remove_pointer_t<decltype(kind)>;
            const bool more = seg.first + N < keys.length[j];
            const auto scores_of = [&](const View& x, int64_t width, const T* rows_of, T* to) MMFAST_LAMBDA {
                const From* const at = static_cast<const From*>(x.data) + x.at(item.batch, head, seg.first);
                const Following<From> ahead{more ? at + N * x.row : at, more ? x.row : 0};
                few_scores<T, R>(width, x, at, 0, seg.count, rows_of, to, ahead);
                return at;
            };
            const From* const key = scores_of(source.key, p.dim, s.queries, tile);
            scores_of(source.value, p.value_dim, s.grad_rows, slopes);
            few_masks<T>(p, item.batch, rows, seg, tile);
            few_score_gradients<T>(rows.n, seg.count, s, tile, slopes);
            if (job.query.target.data) few_output<T, R>(p.dim, source.key, key, 0, seg.count, slopes, s.dq);
        });
        if (job.key[j].target.data)
            few_key_gradients<T, R>(job.key[j], item.key_run[j], item.batch, head, seg.first, seg.count, p.dim, slopes,
                                    s.query_rows);
        if (job.value[j].target.data)
            few_key_gradients<T, R>(job.value[j], item.value_run[j], item.batch, head, seg.first, seg.count,
                                    p.value_dim, tile, s.grad_rows);
    };
    for (int j = 0; j < p.count; ++j) {
        const int64_t first = larger(item.first - keys.start[j], 0);
        const int64_t end = smaller(item.last - keys.start[j], p.sources[j].keys);
        const int64_t seen = p.causal ? smaller(keys.length[j], rows.last + 1) : keys.length[j];
        const int64_t to = larger(first, smaller(end, seen));
        for_few(rows.n, [&]<int R>() MMFAST_LAMBDA {
            for (int64_t k = first; k < to; k += N)
                for (int64_t h = 0; h < item.heads; ++h)
                    chunk.template operator()<R>(Segment{j, k, smaller(N, to - k), keys.start[j] + k}, h);
        });
        for (int64_t h = 0; h < item.heads && to < end; ++h) {
            const int64_t head = key_head(p, j, item.head + h * job.fold);
            clear_key_gradients<T>(job.key[j], item.key_run[j], item.batch, head, to, end, p.dim);
            clear_key_gradients<T>(job.value[j], item.value_run[j], item.batch, head, to, end, p.value_dim);
        }
    }
    if (!job.query.target.data) return;
    T scale[kFewRows];
    for (T& x : scale) x = T(p.scale);
    for (int64_t h = 0; h < item.heads; ++h) {
        const FewGradientHead<T> s = set_head(h);
        unpack_rows<T>(s.dq, width, p.dim, scale, item.batch, rows, job.query.target, item.query_run * job.query.run,
                       job.query.add);
    }
}

}  // namespace
}  // namespace MMFAST_ISA
}  // namespace fusion
}  // namespace mmfast
