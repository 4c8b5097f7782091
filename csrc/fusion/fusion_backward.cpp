// Gradients of attention: one piece of keys that stays in the second cache, one panel of queries after the other.
//
// Note: [Backward]
//   P = exp(S - L),  dP = V dO,  dS = P (g (dP - delta) + dL),  delta = sum over k of P dP
//   dQ = scale K dS,  dK = scale dS Q,  dV = g P dO,  dg = delta
//   with the gate g of a source, or 1. Five products of the size of the scores. A piece is at most kResidentKeys keys;
//   where that is all of them, delta is a mean over what is in the cache; else it is taken from the output, delta = dO O.
#include "fusion/fusion_few_backward.h"
#include "fusion/fusion_gradients.h"
#include "fusion/fusion_panel.h"

namespace mmfast {
namespace fusion {
namespace MMFAST_ISA {
namespace {

template <class T>
struct Buffers {
    // [..][panel]                                      [panel][..]          [keys][..], sums  [keys][..], copies
    T *queries, *grad_out, *p, *dp, *mask, *out_or_dq, *query_rows, *grad_rows, *dk, *dv, *keys, *values;
    int64_t dim, value_dim;  // in whole vectors
    int64_t most;            // keys that there is room for
    // Sums and copies of head number h.
    MMFAST_INLINE void set_head(const Problem& p, int64_t h, Buffers& of) const {
        of = *this;
        of.dk += h * most * dim;
        of.dv += h * most * value_dim;
        of.keys += h * most * copy_stride<T>(p.dim);
        of.values += h * most * copy_stride<T>(p.value_dim);
    }
};

constexpr int64_t piece_keys(const Problem& p) {
    int64_t total = 0;
    for (int j = 0; j < p.count; ++j) total += p.sources[j].keys;
    return smaller(total, kResidentKeys);
}

template <class T>
MMFAST_INLINE int64_t lay_out(const Problem& p, int64_t heads, T* scratch, Buffers<T>& b) {
    constexpr int64_t W = kPanel<T>, N = Simd<T>::lanes;
    const int64_t n = b.most = up_to_multiple(piece_keys(p), 16);
    b.dim = up_to_multiple(p.dim, N);
    b.value_dim = up_to_multiple(p.value_dim, N);
    int64_t at = 0;
    const auto take = [&](T*& to, int64_t size) MMFAST_LAMBDA {
        to = scratch + at;
        at += size;
    };
    take(b.queries, W * p.dim);
    take(b.grad_out, W * p.value_dim);
    take(b.p, W * n);
    take(b.dp, W * n);
    take(b.mask, W * n);
    take(b.out_or_dq, W * larger(p.dim, p.value_dim));
    take(b.query_rows, W * b.dim + W / 2 * N);
    take(b.grad_rows, W * b.value_dim + W / 2 * N);
    take(b.dk, heads * n * b.dim);
    take(b.dv, heads * n * b.value_dim);
    take(b.keys, heads * n * copy_stride<T>(p.dim));
    take(b.values, heads * n * copy_stride<T>(p.value_dim));
    return at;
}

template <class T>
int64_t scratch_size(const Problem& p, int64_t heads, bool few) {
    Buffers<T> b;
    return few ? few_gradient_scratch<T>(p, heads) : lay_out<T>(p, heads, nullptr, b);
}

// Note: [Straight]
//   A single panel is all that an item adds to the gradients of its keys: then they need no sums and are written where they
//   belong as they are computed; past the caches if they are large, as the lines would only be read to be overwritten.
template <class T>
MMFAST_INLINE bool straight(const BackwardItem& item, const Accumulator& to, int64_t width) {
    return item.panels == 1 && !to.add && to.target.type == scalar_type_of<T>() && width % Simd<T>::lanes == 0;
}

// Note: [Pairs]
//   Of 40 features the last 8 would take a whole vector of multiply-adds a query. Instead two queries share vectors: their
//   features are interleaved, and the two values of the tile, side by side as the queries are, are broadcast together. What
//   this adds up are two sums in turn. With all 40 features interleaved a key takes one broadcast for two queries, 10 loads
//   for 25 multiply-adds of 5 keys. Sums of features that fill vectors become one when a block is done, the others at the
//   end, in add_pairs().
template <class T>
MMFAST_INLINE constexpr bool in_pairs(int64_t width) {
    const int64_t rest = width % Simd<T>::lanes;
    return sizeof(T) == 4 && rest > 0 && 2 * rest <= Simd<T>::lanes;
}

// Whether not only the last features are interleaved, but those of two whole vectors before them, too.
constexpr int kPairedVectors = 2;
template <class T>
MMFAST_INLINE constexpr bool all_in_pairs(int64_t width, int64_t lanes) {
    return in_pairs<T>(width) && width / Simd<T>::lanes == kPairedVectors && lanes % 2 == 0;
}

// a[0], b[0], a[1], b[1], .. of half of the lanes, from the first or from the middle on.
template <class T, bool kUpper, size_t... K>
MMFAST_INLINE Vec<T> interleave(Vec<T> a, Vec<T> b, std::index_sequence<K...>) {
    constexpr size_t N = sizeof...(K);
    return __builtin_shufflevector(a, b, (kUpper * N / 2 + K / 2 + K % 2 * N)...);
}

// a[0] + a[1], a[2] + a[3], .., then those of b.
template <class T, size_t... K>
MMFAST_INLINE Vec<T> add_neighbours(Vec<T> a, Vec<T> b, std::index_sequence<K...>) {
    return __builtin_shufflevector(a, b, (2 * K)...) + __builtin_shufflevector(a, b, (2 * K + 1)...);
}

// p[0], p[1], p[0], p[1], ..
MMFAST_INLINE Vec<float> splat_pair(const float* p) {
    double pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return Simd<float>::bits<Vec<double>, Vec<float>>(Simd<double>::splat(pair));
}

// The queries or gradients of the output of a panel by rows: where they lie, or a copy in `buffer`, in whole vectors.
template <class T>
MMFAST_INLINE Block<T> rows_of(const View& x, int64_t batch, const Rows& rows, int64_t width, T* buffer) {
    if (in_place<T>(x, true) && rows.one_head && (in_pairs<T>(width) || width % Simd<T>::lanes == 0))
        return {static_cast<const T*>(x.data) + x.at(batch, rows.head[0], rows.row[0]), x.row};
    const int64_t padded = up_to_multiple(width, Simd<T>::lanes);
    pack_rows<T>(x, batch, rows, width, padded, T(1), buffer);
    return {buffer, padded};
}

// Rows interleaved by pairs of rows, from the feature `first` on, zero behind the rows and features.
template <class T>
void pack_pairs(const View& x, int64_t batch, const Rows& rows, int64_t first, int64_t width, T* to) {
    constexpr int64_t N = Simd<T>::lanes;
    constexpr auto kLanes = std::make_index_sequence<N>();
    dispatch<T>(x.type, [&](auto* kind) MMFAST_LAMBDA {
        using From = std::remove_pointer_t<decltype(kind)>;
        const From* const data = static_cast<const From*>(x.data) + first * x.column;
        for (int64_t r = 0; r < rows.n; r += 2) {
            const From* const a = data + x.at(batch, rows.head[r], rows.row[r]);
            const From* const b = r + 1 < rows.n ? data + x.at(batch, rows.head[r + 1], rows.row[r + 1]) : nullptr;
            for (int64_t k = 0; k < width - first; k += N) {
                const int64_t left = width - first - k;
                const Vec<T> one = load_step<T>(a + k * x.column, x.column, left);
                const Vec<T> other = b ? load_step<T>(b + k * x.column, x.column, left) : Vec<T>{};
                Simd<T>::store(to, interleave<T, false>(one, other, kLanes));
                to += N;
                if (2 * left <= N) continue;
                Simd<T>::store(to, interleave<T, true>(one, other, kLanes));
                to += N;
            }
        }
    });
}

// c[key][..] += sum over `pairs` pairs of rows of a[key][lane] row[lane][..], of M whole vectors and half a vector, all of
// them interleaved in `rows`.
template <class T, int R, int M, int64_t W>
MMFAST_INLINE void pair_block(int64_t pairs, const T* a, const T* rows, T* c, int64_t c_stride) {
    constexpr int64_t N = Simd<T>::lanes;
    constexpr int kVectors = 2 * M + 1;
    Vec<T> sum[R][kVectors] = {};
    for (int64_t i = 0; i < pairs; ++i, a += 2, rows += kVectors * N) {
        Vec<T> pair[R];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) pair[r] = splat_pair(a + r * W);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
            const Vec<T> x = Simd<T>::load(rows + v * N);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) sum[r][v] += pair[r] * x;
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v <= M; ++v) {
            T* const to = c + r * c_stride + v * N;
            const Vec<T> x = v == M
                                 ? sum[r][2 * M]
                                 : add_neighbours<T>(sum[r][smaller(2 * v, 2 * M)], sum[r][smaller(2 * v + 1, 2 * M)],
                                                     std::make_index_sequence<N>());
            Simd<T>::store(to, x + Simd<T>::load(to));
        }
}

// The queries or gradients of the output of a panel: by rows, unless all of them are interleaved.
template <class T>
struct PanelRows {
    Block<T> rows;
    const T* pairs;
};

// The same for any number of keys.
template <class T, int M, int64_t W>
void product_pairs(int64_t keys, int64_t pairs, const T* a, const T* rows, T* c, int64_t c_stride) {
    constexpr int kMost = (kProductWidth >= 4 ? 25 : 12) / (2 * M + 1), kRows = smaller(kMost, 12);
    int64_t i = 0;
    const auto block = [&]<int R>() MMFAST_LAMBDA {
        for (; i + R <= keys; i += R) pair_block<T, R, M, W>(pairs, a + i * W, rows, c + i * c_stride, c_stride);
    };
    block.template operator()<kRows>();
    if constexpr (kRows > 4) block.template operator()<M ? 2 : 4>();
    block.template operator()<1>();
}

template <class T>
MMFAST_INLINE PanelRows<T> panel_rows(const View& x, int64_t batch, const Rows& rows, int64_t width, T* buffer) {
    constexpr int64_t N = Simd<T>::lanes;
    if constexpr (sizeof(T) == 4) {
        if (all_in_pairs<T>(width, rows.n)) {
            pack_pairs<T>(x, batch, rows, 0, width, buffer);
            return {{nullptr, 0}, buffer};
        }
    }
    const Block<T> block = rows_of(x, batch, rows, width, buffer);
    T* const pairs = buffer + kPanel<T> * up_to_multiple(width, N);
    if constexpr (sizeof(T) == 4) {
        if (in_pairs<T>(width)) pack_pairs<T>(x, batch, rows, width / N * N, width, pairs);
    }
    return {block, pairs};
}

// Gradients of the keys or values of one segment: a[keys][lane] times `from` [lane][..], to `sums` or straight.
template <class T, int64_t W>
void add_keys(const BackwardItem& item, const Accumulator& to, int64_t run, int64_t head, const Segment& s,
              int64_t lanes, int64_t width, T* a, const PanelRows<T>& panel, T* sums) {
    constexpr int64_t N = Simd<T>::lanes, kLine = 64 / sizeof(T);
    if (!to.target.data) return;
    const int64_t padded = up_to_multiple(width, N);
    const Block<T>& from = panel.rows;
    if constexpr (sizeof(T) == 4) {
        if (all_in_pairs<T>(width, lanes))
            return product_pairs<T, kPairedVectors, W>(s.count, lanes / 2, a, panel.pairs, sums, padded);
        if (in_pairs<T>(width)) {
            for (int64_t k = 0; k < s.count && lanes % 2; ++k) a[k * W + lanes] = 0;  // no row: perhaps NaN
            product_pairs<T, 0, W>(s.count, (lanes + 1) / 2, a, panel.pairs, sums + padded - N, padded);
            width = padded - N;
            if (!width) return;
        }
    }
    if (!straight<T>(item, to, width) || width < padded)
        return product_rows<T, false>(s.count, lanes, up_to_multiple(width, N), a, W, from.data, from.stride, sums,
                                      padded, Start::add);
    T* const data = static_cast<T*>(to.target.data) + run * to.run + to.target.at(item.batch, head, s.first);
    const bool lines = reinterpret_cast<uintptr_t>(data) % 64 == 0 && to.target.row % kLine == 0 &&
                       width % kLine == 0 && kProductWidth * N % kLine == 0;
    product_rows<T, false>(s.count, lanes, width, a, W, from.data, from.stride, data, to.target.row,
                           to.large && lines ? Start::stream : Start::zero);
}

// P in place of the scores, and sums of it.
template <class T, int S>
void probabilities(int64_t count, T* p, const T* dp, Lanes<T>& lanes) {
    constexpr int N = Simd<T>::lanes, W = S * N;
    Vec<T> lse[S];
    for (int v = 0; v < S; ++v) lse[v] = Simd<T>::load(lanes.lse + v * N);
    Totals<T, S> totals(lanes);
    for (int64_t k = 0; k < count; ++k)
#pragma GCC unroll 4
        for (int v = 0; v < S; ++v) {
            T* const at = p + k * W + v * N;
            const Vec<T> e = mmfast::exp2(Simd<T>::load(at) - lse[v]);
            totals.add(v, e, dp + k * W + v * N);
            Simd<T>::store(at, e);
        }
    totals.store(lanes);
}

// The same of plain scores, which never reach memory.
template <class T, int S>
void probabilities_of(const Problem& p, int64_t count, const Block<T>& key, const T* queries, T* tile, const T* dp,
                      Lanes<T>& lanes, Ahead& ahead) {
    constexpr int N = Simd<T>::lanes, W = S * N;
    Totals<T, S> totals(lanes);
    product_panel<T, S, false>(count, p.dim, key.data, key.stride, queries, W, tile, W, Start::zero, nullptr, ahead,
                               [&](Vec<T> x, int v, T* to) MMFAST_LAMBDA {
                                   const Vec<T> e = mmfast::exp2(x - Simd<T>::load(lanes.lse + v * N));
                                   totals.add(v, e, dp + (to - tile));
                                   return e;
                               });
    totals.store(lanes);
}

// scale dS in place of dP, and g P in place of P.
template <class T, int S, bool kGated>
void score_gradients(int64_t count, T scale, T* p, T* dp, const Lanes<T>& lanes) {
    constexpr int N = Simd<T>::lanes, W = S * N;
    Vec<T> gate[S], delta[S], grad_lse[S];
    for (int v = 0; v < S; ++v) {
        gate[v] = Simd<T>::load(lanes.gate + v * N);
        grad_lse[v] = Simd<T>::load(lanes.grad_lse + v * N);
        delta[v] = Simd<T>::load(lanes.delta + v * N) - (kGated ? Vec<T>{} : grad_lse[v]);
    }
    for (int64_t k = 0; k < count; ++k)
#pragma GCC unroll 4
        for (int v = 0; v < S; ++v) {
            T *const at = p + k * W + v * N, *const to = dp + k * W + v * N;
            const Vec<T> e = Simd<T>::load(at), d = Simd<T>::load(to) - delta[v];
            Simd<T>::store(to, scale * e * (kGated ? d * gate[v] + grad_lse[v] : d));
            if (kGated) Simd<T>::store(at, e * gate[v]);
        }
}

// delta = dO O
template <class T, int S>
void delta_of_output(const Problem& p, const View& out, int64_t batch, const Rows& rows, const T* grad_out, T* buffer,
                     T* delta) {
    constexpr int N = Simd<T>::lanes, W = S * N;
    pack_columns<T>(out, batch, rows, 0, p.value_dim, T(1), buffer);
    Vec<T> sum[S] = {};
    for (int64_t k = 0; k < p.value_dim; ++k)
        for (int v = 0; v < S; ++v)
            sum[v] += Simd<T>::load(grad_out + k * W + v * N) * Simd<T>::load(buffer + k * W + v * N);
    for (int v = 0; v < S; ++v) Simd<T>::store(delta + v * N, sum[v]);
}

template <class T, int S>
void backward_panel(const BackwardJob<T>& job, const BackwardItem& item, const Rows& rows, const Keys& keys,
                    const Buffers<T>& b, Ahead& ahead) {
    constexpr int64_t N = Simd<T>::lanes, W = S * N;
    const Problem& p = *job.problem;
    const bool whole = item.first == 0 && item.last == keys.start[p.count], plain = plain_scores<T>(p);
    pack_columns<T>(p.query, item.batch, rows, 0, p.dim, T(p.scale * kLog2e), b.queries);
    const PanelRows<T> queries = panel_rows<T>(p.query, item.batch, rows, p.dim, b.query_rows);
    pack_columns<T>(job.grad_out, item.batch, rows, 0, p.value_dim, T(1), b.grad_out);
    const PanelRows<T> grads = panel_rows<T>(job.grad_out, item.batch, rows, p.value_dim, b.grad_rows);
    const auto for_each = [&](int64_t lo, int64_t hi, const auto& f) MMFAST_LAMBDA {
        for_segments(p, keys, rows.last, lo, hi, [&](const Segment& s) MMFAST_LAMBDA {
            f(s, key_head(p, s.source, item.head), s.place - item.first);
        });
    };

    ahead.spread(2 * product_steps(item.last - item.first));
    Lanes<T> lanes;
    for (int softmax = 0; softmax < p.softmaxes(); ++softmax) {
        const int64_t lo = p.decoupled ? keys.start[softmax] : item.first;
        const int64_t hi = p.decoupled ? keys.start[softmax + 1] : item.last;
        set_lanes<T, S>(job, item.batch, rows, softmax, lanes);
        for_each(lo, hi, [&](const Segment& s, int64_t head, int64_t at) MMFAST_LAMBDA {
            const Source& from = p.sources[s.source];
            const Block<T> key = block_of<T>(from.key, true, item.batch, head, s.first, s.count, p.dim, true,
                                             b.keys + at * copy_stride<T>(p.dim));
            const Block<T> value = block_of<T>(from.value, false, item.batch, head, s.first, s.count, p.value_dim, true,
                                               b.values + at * copy_stride<T>(p.value_dim));
            T *const tile = b.p + at * W, *const dp = b.dp + at * W;
            product_panel<T, S, false>(s.count, p.value_dim, value.data, value.stride, b.grad_out, W, dp, W,
                                       Start::zero, nullptr, ahead);
            if constexpr (kAtOnce<T>) {
                if (plain) return probabilities_of<T, S>(p, s.count, key, b.queries, tile, dp, lanes, ahead);
            }
            scores<T, S>(p, item.batch, rows, s, key, b.queries, tile, b.mask, ahead);
            probabilities<T, S>(s.count, tile, dp, lanes);
        });
        if (whole) set_delta<T, S>(lanes);
        else delta_of_output<T, S>(p, job.out, item.batch, rows, b.grad_out, b.out_or_dq, lanes.delta);
        if (job.grad_gates)
            scatter(p, lanes.delta, item.batch, rows, job.grad_gates + softmax * p.batch * p.heads * p.rows);
        for_each(lo, hi, [&](const Segment& s, int64_t, int64_t at) MMFAST_LAMBDA {
            T *const of = b.p + at * W, *const to = b.dp + at * W;
            if (p.decoupled) score_gradients<T, S, true>(s.count, T(p.scale), of, to, lanes);
            else score_gradients<T, S, false>(s.count, T(p.scale), of, to, lanes);
        });
    }
    Start start = Start::zero;
    for_each(item.first, item.last, [&](const Segment& s, int64_t head, int64_t at) MMFAST_LAMBDA {
        if (job.query.target.data) {
            const Block<T> key = block_of<T>(p.sources[s.source].key, true, item.batch, head, s.first, s.count, p.dim,
                                             true, b.keys + at * copy_stride<T>(p.dim));
            product_panel<T, S, true>(p.dim, s.count, key.data, key.stride, b.dp + at * W, W, b.out_or_dq, W, start);
            start = Start::add;
        }
        add_keys<T, W>(item, job.key[s.source], item.key_run[s.source], head, s, rows.n, p.dim, b.dp + at * W, queries,
                       b.dk + at * b.dim);
        add_keys<T, W>(item, job.value[s.source], item.value_run[s.source], head, s, rows.n, p.value_dim, b.p + at * W,
                       grads, b.dv + at * b.value_dim);
    });
    if (!job.query.target.data) return;
    if (start == Start::zero) {
        if (job.query.add) return;
        for (int64_t i = 0; i < p.dim * W; i += N) Simd<T>::store(b.out_or_dq + i, Vec<T>{});
    }
    unpack_columns<T>(b.out_or_dq, p.dim, static_cast<const T*>(nullptr), item.batch, rows, job.query.target,
                      item.query_run * job.query.run, job.query.add);
}

// Sums of rows as product_pairs leaves them, one for each feature from now on.
template <class T>
void add_pairs(int64_t count, int64_t width, T* sums) {
    const int64_t padded = up_to_multiple(width, Simd<T>::lanes), rest = width % Simd<T>::lanes;
    for (T* at = sums + width - rest; count > 0; --count, at += padded)
        for (int64_t j = 0; j < rest; ++j) at[j] = at[2 * j] + at[2 * j + 1];
}

// f(source, its head, first key, number, place in the piece)
template <class F>
MMFAST_INLINE void for_sources(const Problem& p, const BackwardItem& item, const Keys& keys, const F& f) {
    for (int j = 0; j < p.count; ++j) {
        const int64_t from = larger(item.first - keys.start[j], 0);
        const int64_t to = smaller(item.last - keys.start[j], p.sources[j].keys);
        if (from < to) f(j, key_head(p, j, item.head), from, to - from, keys.start[j] + from - item.first);
    }
}

template <class T>
void begin_head(const BackwardJob<T>& job, const BackwardItem& item, const Keys& keys, const Buffers<T>& b) {
    const Problem& p = *job.problem;
    for_sources(p, item, keys, [&](int j, int64_t head, int64_t first, int64_t count, int64_t at) {
        if (!straight<T>(item, job.key[j], p.dim)) clear(b.dk + at * b.dim, count * b.dim);
        if (!straight<T>(item, job.value[j], p.value_dim)) clear(b.dv + at * b.value_dim, count * b.value_dim);
        count = smaller(count, keys.length[j] - first);
        if (count <= 0) return;
        block_of<T>(p.sources[j].key, true, item.batch, head, first, count, p.dim, false,
                    b.keys + at * copy_stride<T>(p.dim));
        block_of<T>(p.sources[j].value, false, item.batch, head, first, count, p.value_dim, false,
                    b.values + at * copy_stride<T>(p.value_dim));
    });
}

// `last`: the largest row of the item's last panel.
template <class T>
void end_head(const BackwardJob<T>& job, const BackwardItem& item, int64_t last, const Keys& keys,
              const Buffers<T>& b) {
    const Problem& p = *job.problem;
    for_sources(p, item, keys, [&](int j, int64_t head, int64_t first, int64_t count, int64_t at) {
        const int64_t seen = p.causal ? smaller(keys.length[j], last + 1) : keys.length[j];
        const int64_t written = smaller(larger(seen - first, 0), count);
        const auto end = [&](const Accumulator& to, int64_t run, int64_t width, T* sums) {
            if (!to.target.data) return;
            const int64_t padded = up_to_multiple(width, Simd<T>::lanes);
            const bool here = straight<T>(item, to, width);
            const int64_t there = here ? written : 0;
            if (in_pairs<T>(width)) add_pairs(count, width, sums);
            if (here) clear(sums + there * padded, (count - there) * padded);
            flush<T>(to, run, item.batch, head, first + there, count - there, width, sums + there * padded, padded);
        };
        end(job.key[j], item.key_run[j], p.dim, b.dk + at * b.dim);
        end(job.value[j], item.value_run[j], p.value_dim, b.dv + at * b.value_dim);
    });
}

// As in the forward pass several heads share an item where their keys stay in the second cache: see [Heads of an item]
// there. With one panel a head is done at once, and the next one's keys are asked for.
template <class T>
void backward(const BackwardJob<T>& job, const BackwardItem& item, T* scratch) {
    const Problem& p = *job.problem;
    if (item.few) return backward_few(job, item, scratch);
    const bool together = item.panels > 1;
    Buffers<T> all, b;
    lay_out(p, together ? item.heads : 1, scratch, all);
    Keys keys;
    set_keys(p, item.batch, false, keys);
    const bool whole = item.first == 0 && item.last == keys.start[p.count];
    Ahead ahead;
    Rows rows{};
    BackwardItem now = item;
    const auto set_head = [&](int64_t h) {
        now.head = item.head + h * job.fold;
        all.set_head(p, together ? h : 0, b);
    };
    const auto panel = [&](int64_t i, int64_t h) {
        const bool last_head = h + 1 == item.heads;
        if (!last_head || i + 1 < item.panels) {
            set_head(last_head ? 0 : h + 1);
            set_rows<T>(p, job.fold, now.head, item.panel + i + last_head, rows);
            rows_ahead(job, now, rows, whole, ahead);
            if (i == 0 && !last_head)
                for_sources(p, now, keys, [&](int j, int64_t head, int64_t first, int64_t count, int64_t) {
                    ahead.add(p.sources[j].key, now.batch, head, first, count, p.dim);
                    ahead.add(p.sources[j].value, now.batch, head, first, count, p.value_dim);
                });
        }
        set_head(h);
        set_rows<T>(p, job.fold, now.head, item.panel + i, rows);
        for_width<T>(rows.n, [&]<int S>() MMFAST_LAMBDA { backward_panel<T, S>(job, now, rows, keys, b, ahead); });
    };
    if (together) {
        for (int64_t h = 0; h < item.heads; ++h) {
            set_head(h);
            begin_head(job, now, keys, b);
        }
        for (int64_t i = 0; i < item.panels; ++i)
            for (int64_t h = 0; h < item.heads; ++h) panel(i, h);
        for (int64_t h = 0; h < item.heads; ++h) {
            set_head(h);
            end_head(job, now, rows.last, keys, b);
        }
        return;
    }
    for (int64_t h = 0; h < item.heads; ++h) {
        set_head(h);
        begin_head(job, now, keys, b);
        if (item.panels > 0) panel(0, h);
        set_head(h);
        end_head(job, now, rows.last, keys, b);
    }
    stream_fence();
}

template <class T>
MMFAST_INLINE void set_kernels(TileKernels<T>& kernels) {
    kernels.backward_scratch = scratch_size<T>;
    kernels.backward = backward<T>;
}

}  // namespace

void backward_kernels_float(TileKernels<float>& kernels) {
    set_kernels(kernels);
}
void backward_kernels_double(TileKernels<double>& kernels) {
    set_kernels(kernels);
}

}  // namespace MMFAST_ISA
}  // namespace fusion
}  // namespace mmfast
