// Attention of few queries. For fusion_forward.cpp.
//
// Note: [Few]
//   With queries in the lanes one query would use a sixteenth of a vector. Here features are: of a key's score the products
//   of the features, added up when there are as many keys as lanes; of the output one probability times a value. Reading
//   the keys and values is most of the time: 512 bytes a key and head of 64 features, 24 ns at what one core gets from
//   memory, where five queries take some 35 cycles. So as many keys as lanes go through all heads of the item before the
//   next ones, near to how the rows lie, which are asked for meanwhile; more at a time would leave the first cache, fewer
//   load and store a head's output for each few keys.
#pragma once

#include "fusion/fusion_panel.h"

namespace mmfast {
namespace fusion {
namespace MMFAST_ISA {
namespace {

constexpr int64_t kFewKeys = 64;

// Of one head: queries [row][dim], output so far [row][value_dim], in whole vectors, and of each row the softmax so far.
template <class T>
struct FewHead {
    T *queries, *out, *maximum, *sum;
};

template <class T>
constexpr int64_t few_head_size(const Problem& p) {
    constexpr int64_t N = Simd<T>::lanes;
    return kFewRows * (up_to_multiple(p.dim, N) + up_to_multiple(p.value_dim, N) + 2);
}

template <class T>
constexpr int64_t few_scratch(const Problem& p, int64_t heads) {
    return up_to_multiple(heads * few_head_size<T>(p), 16) + kFewRows * heads * kFewKeys;
}

template <class T>
MMFAST_INLINE FewHead<T> few_head(const Problem& p, T* states, int64_t h) {
    constexpr int64_t N = Simd<T>::lanes;
    FewHead<T> s;
    s.queries = states + h * few_head_size<T>(p);
    s.out = s.queries + kFewRows * up_to_multiple(p.dim, N);
    s.maximum = s.out + kFewRows * up_to_multiple(p.value_dim, N);
    s.sum = s.maximum + kFewRows;
    return s;
}

// Sums that R queries have beside each other, each in a register: enough to hide the latency of a multiply-add, for which
// two would wait half of the time, and not more than there are registers for.
constexpr int few_sums(int rows, int most) {
    constexpr int kSums = kProductWidth < 4 ? 10 : 20;
    const int fit = kSums / rows;
    return fit >= most ? most : fit >= 4 ? 4 : fit >= 2 ? 2 : 1;
}

// Note: [Every second feature]
//   Of bfloat16, half of a word each, the even ones of a vector of words are numbers when shifted and the odd ones when masked:
//   one operation for as many as lanes, where to widen neighbours takes two. So queries have the even features of two
//   vectors before the odd ones, and outputs come out in that order, until the last key has been read.
//   Measured where the keys stay in the second cache, 1 query, 8 x 64 features, with [Every request by itself]: 11 elements a
//   ns in place of 4.6 to 6.7.
enum class Part { some, whole, even, odd };  // whole: known to be enough elements, next to each other

// A vector of a row, `n` elements of which are left; or every second one of twice as many.
template <class T, Part kPart, class From>
MMFAST_INLINE Vec<T> load_part(const From* p, int64_t step, int64_t n) {
    if constexpr (kPart == Part::whole) {
        return load_as<T>(p, Simd<T>::lanes);
    } else if constexpr (kPart == Part::some) {
        return load_step<T>(p, step, n);
    } else {
        using Words = typename Simd<T>::U;
        Words words;
        __builtin_memcpy(&words, p, sizeof words);
        return Simd<T>::template bits<Words, Vec<T>>(kPart == Part::even ? words << 16 : words & 0xffff0000u);
    }
}

// Whether rows of `width` features can be read so.
template <class T>
MMFAST_INLINE bool by_halves(const View& x, int64_t width) {
    return sizeof(T) == 4 && x.type == ScalarType::bfloat16 && x.column == 1 && width % (2 * Simd<T>::lanes) == 0;
}
// Whether there are registers for it: two sums of each of R queries.
template <class From, int R>
constexpr bool kHalvesFit = std::is_same_v<From, BFloat16> && few_sums(R, 2) == 2;

// Every second element of `count`, two vectors at a time, the even ones first; or, to undo it, the first ones even again.
template <class T, size_t... K>
MMFAST_INLINE void part_halves(T* x, int64_t count, bool undo, std::index_sequence<K...>) {
    constexpr int64_t N = sizeof...(K);
    for (T* const end = x + count; x < end; x += 2 * N) {
        const Vec<T> a = Simd<T>::load(x), b = Simd<T>::load(x + N);
        Simd<T>::store(x, undo ? __builtin_shufflevector(a, b, (K / 2 + K % 2 * N)...)
                               : __builtin_shufflevector(a, b, (2 * K)...));
        Simd<T>::store(x + N, undo ? __builtin_shufflevector(a, b, (N / 2 + K / 2 + K % 2 * N)...)
                                   : __builtin_shufflevector(a, b, (2 * K + 1)...));
    }
}
template <class T>
MMFAST_INLINE void part_halves(T* x, int64_t count, bool undo) {
    part_halves(x, count, undo, std::make_index_sequence<Simd<T>::lanes>());
}

// Note: [Every request by itself]
//   Rows that come next are asked for line by line as the same lines of key `k` are read. The requests for as many rows as lanes
//   at once waited for room for each other, half of the time where the keys were cached, and everything else with them.
template <class From>
struct Following {
    const From* first;
    int64_t stride;
    MMFAST_INLINE void operator()(int64_t k, int64_t d) const { __builtin_prefetch(first + k * stride + d, 0, 2); }
};
struct NoFollowing {
    MMFAST_INLINE void operator()(int64_t, int64_t) const {}
};

// Products of the features of K keys, added up by lanes, into parts[row][place ..].
template <class T, int R, int K, bool kHalves, class From, class A>
MMFAST_INLINE void few_products(int64_t dim, const View& key, const From* from, const T* queries, int64_t place,
                                Vec<T> (&parts)[R][Simd<T>::lanes], const A& ahead) {
    constexpr int64_t N = Simd<T>::lanes;
    const int64_t width = up_to_multiple(dim, N), stride = key.row;
    Vec<T> sum[R][K];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k) sum[r][k] = Vec<T>{};
    const auto step = [&]<Part kPart>(int64_t d) MMFAST_LAMBDA {
        Vec<T> x[K];
        const From* const at = from + (kPart == Part::odd ? d - N : d) * key.column;
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k) {
            if constexpr (kPart != Part::odd) ahead(place + k, d);
            x[k] = load_part<T, kPart>(at + k * stride, key.column, dim - d);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const Vec<T> q = Simd<T>::load(queries + r * width + d);
#pragma GCC unroll 8
            for (int k = 0; k < K; ++k) sum[r][k] += q * x[k];
        }
    };
    if constexpr (kHalves) {
        for (int64_t d = 0; d < dim; d += 2 * N) {
            step.template operator()<Part::even>(d);
            step.template operator()<Part::odd>(d + N);
        }
    } else {
        int64_t d = 0;
        if (key.column == 1)
            for (; d + N <= dim; d += N) step.template operator()<Part::whole>(d);
        for (; d < dim; d += N) step.template operator()<Part::some>(d);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k) parts[r][place + k] = sum[r][k];
}

// tile[row][key] = queries[row][..] keys[key][..] of `dim` features, for key = first .. last - 1, at most as many as lanes.
template <class T, int R, bool kHalves = false, class From, class A = NoFollowing>
void few_scores(int64_t dim, const View& key, const From* from, int64_t first, int64_t last, const T* queries, T* tile,
                const A& ahead = {}) {
    constexpr int64_t N = Simd<T>::lanes;
    constexpr int K = smaller(few_sums(R, 8), N);
    Vec<T> parts[R][N];
    int64_t k = first;
    for (; k + K <= last; k += K)
        few_products<T, R, K, kHalves>(dim, key, from + k * key.row, queries, k - first, parts, ahead);
    for (; k < last; ++k)
        few_products<T, R, 1, kHalves>(dim, key, from + k * key.row, queries, k - first, parts, ahead);
    for (; k < first + N; ++k)
        for (int r = 0; r < R; ++r) parts[r][k - first] = Vec<T>{};
    for (int r = 0; r < R; ++r) Simd<T>::store(tile + r * kFewKeys + first, Simd<T>::sums(parts[r]), int(last - first));
}

// C vectors of features from `d` on, or of Part::even the even and the odd ones of each two in turn; see few_output.
template <class T, int R, int C, Part kPart, class From, class A>
MMFAST_INLINE void few_output_chunk(int64_t dim, const View& value, const From* from, int64_t first, int64_t last,
                                    const T* tile, int64_t d, T* out, const A& ahead) {
    constexpr int64_t N = Simd<T>::lanes;
    const int64_t width = up_to_multiple(dim, N);
    Vec<T> sum[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) sum[r][c] = Simd<T>::load(out + r * width + d + c * N);
    from += first * value.row + d * value.column;
    for (int64_t k = first; k < last; ++k, from += value.row) {
        Vec<T> x[C];
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
            if (kPart != Part::even || c % 2 == 0) ahead(k - first, d + c * N);
            if constexpr (kPart == Part::even)
                x[c] = c % 2 ? load_part<T, Part::odd>(from + (c - 1) * N, 1, N)
                             : load_part<T, Part::even>(from + c * N, 1, N);
            else x[c] = load_part<T, kPart>(from + c * N * value.column, value.column, dim - d - c * N);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c) sum[r][c] += tile[r * kFewKeys + k] * x[c];
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) Simd<T>::store(out + r * width + d + c * N, sum[r][c]);
}

// out[row][..] += tile[row][key] values[key][..] of `dim` features, for key = first .. last - 1
template <class T, int R, bool kHalves = false, class From, class A = NoFollowing>
void few_output(int64_t dim, const View& value, const From* from, int64_t first, int64_t last, const T* tile, T* out,
                const A& ahead = {}) {
    constexpr int64_t N = Simd<T>::lanes;
    constexpr int C = few_sums(R, 8);
    int64_t d = 0;
    const auto chunks = [&]<int M, Part kPart>() MMFAST_LAMBDA {
        if constexpr (M <= C)
            for (; d + M * N <= dim; d += M * N)
                few_output_chunk<T, R, M, kPart>(dim, value, from, first, last, tile, d, out, ahead);
    };
    if constexpr (kHalves) {
        chunks.template operator()<8, Part::even>();
        chunks.template operator()<4, Part::even>();
        chunks.template operator()<2, Part::even>();
        return;
    }
    if (value.column == 1) {
        chunks.template operator()<8, Part::whole>();
        chunks.template operator()<4, Part::whole>();
        chunks.template operator()<2, Part::whole>();
        chunks.template operator()<1, Part::whole>();
    }
    for (; d < dim; d += N) few_output_chunk<T, R, 1, Part::some>(dim, value, from, first, last, tile, d, out, ahead);
}

// Adds `count` elements of a mask, `step` apart, to the scores of one row.
template <class T, class From>
MMFAST_INLINE void few_mask(const From* from, int64_t step, int64_t count, T* row) {
    constexpr int64_t N = Simd<T>::lanes;
    if (step > 1) {
        for (int64_t k = 0; k < count; ++k) row[k] = masked<T>(row[k], T(from[k * step]));
        return;
    }
    const Vec<T> same = Simd<T>::splat(T(*from));
    for (int64_t k = 0; k < count; k += N) {  // what lies behind the keys is there to be overwritten
        const Vec<T> added = step ? load_columns<T>(from + k, count - k) : same;
        Simd<T>::store(row + k, masked<T>(Simd<T>::load(row + k), added));
    }
}

template <class T>
void few_masks(const Problem& p, int64_t batch, const Rows& rows, const Segment& s, T* tile) {
    if (!s.count) return;
    for (int64_t r = 0; r < rows.n; ++r) {
        T* const row = tile + r * kFewKeys;
        for (const View& mask : p.sources[s.source].added)
            if (mask.data)
                dispatch_mask(mask, [&](auto* kind) MMFAST_LAMBDA {
                    using From = std::remove_pointer_t<decltype(kind)>;
                    const int64_t at = mask.at(batch, rows.head[r], rows.row[r]) + s.first * mask.column;
                    few_mask<T>(static_cast<const From*>(mask.data) + at, mask.column, s.count, row);
                });
        if (p.causal)
            for (int64_t k = larger(0, rows.row[r] + 1 - s.first); k < s.count; ++k) row[k] = -infinity<T>();
    }
}

// Exponentials in place of `count` scores of one row; the factor of what there is so far.
template <class T>
T few_exponentials(int64_t count, T* row, T& maximum, T& sum) {
    constexpr int64_t N = Simd<T>::lanes;
    Vec<T> most = Simd<T>::splat(maximum);
    for (int64_t k = count; k < up_to_multiple(count, N); ++k) row[k] = -infinity<T>();
    for (int64_t k = 0; k < count; k += N) {
        const Vec<T> x = Simd<T>::load(row + k);
        most = x > most ? x : most;
    }
    T now = maximum;
    for (int64_t i = 0; i < N; ++i) now = most[i] > now ? most[i] : now;
    const T shift = now == -infinity<T>() ? T(0) : now;
    const T factor = mmfast::exp2(Simd<T>::splat(maximum - shift))[0];
    Vec<T> total{};
    for (int64_t k = 0; k < count; k += N) {
        const Vec<T> e = mmfast::exp2(Simd<T>::load(row + k) - shift);
        total += e;
        Simd<T>::store(row + k, e);
    }
    maximum = now;
    sum = sum * factor + Simd<T>::sum(total);
    return factor;
}

template <class F>
MMFAST_INLINE void for_few(int64_t n, const F& f) {
    if (n == 1) return f.template operator()<1>();
    if (n == 2) return f.template operator()<2>();
    if (n <= 4) return f.template operator()<4>();
    if (n == 5) return f.template operator()<5>();
    f.template operator()<8>();
}

// Keys lo .. hi - 1 for all heads of the item; done(head, rows, output [row][value_width], maxima, sums) for each.
template <class T, class F>
void attend_few(const Problem& p, const Item& item, int64_t fold, const Keys& keys, int64_t lo, int64_t hi, T* scratch,
                const F& done) {
    constexpr int64_t N = Simd<T>::lanes;
    const int64_t width = up_to_multiple(p.dim, N), value_width = up_to_multiple(p.value_dim, N);
    T* const tiles = scratch + up_to_multiple(item.heads * few_head_size<T>(p), 16);
    Rows rows;
    set_rows<T>(p, fold, item.head, item.panel, rows);
    bool keys_by_halves = false, values_by_halves = false;  // all of them: their queries and outputs are the same
    for_few(rows.n, [&]<int R>() { keys_by_halves = values_by_halves = kHalvesFit<BFloat16, R>; });
    for (int j = 0; j < p.count; ++j) {
        keys_by_halves = keys_by_halves && by_halves<T>(p.sources[j].key, p.dim);
        values_by_halves = values_by_halves && by_halves<T>(p.sources[j].value, p.value_dim);
    }
    for (int64_t h = 0; h < item.heads; ++h) {
        const FewHead<T> s = few_head(p, scratch, h);
        set_rows<T>(p, fold, item.head + h * fold, item.panel, rows);
        for (int64_t i = 0; i < few_head_size<T>(p); ++i) s.queries[i] = T(0);
        pack_rows<T>(p.query, item.batch, rows, p.dim, width, T(p.scale * kLog2e), s.queries);
        if (keys_by_halves) part_halves(s.queries, rows.n * width, false);
        for (int64_t r = 0; r < kFewRows; ++r) s.maximum[r] = -infinity<T>();
    }
    // f<R>(head, first, last, its keys or values) for as many neighbouring keys as lanes at a time, all heads of which come in
    // turn; the next ones, and after the last those of `then` from `next` on, are fetched meanwhile.
    const auto for_heads = [&](const Segment& seg, const View& x, const View& then, int64_t next,
                               const auto& f) MMFAST_LAMBDA {
        dispatch<T>(x.type, [&](auto* kind) MMFAST_LAMBDA {
            using From = std::remove_pointer_t<decltype(kind)>;
            for_few(rows.n, [&]<int R>() MMFAST_LAMBDA {
                for (int64_t k = 0; k < seg.count; k += N)
                    for (int64_t h = 0; h < item.heads; ++h) {
                        const int64_t head = key_head(p, seg.source, item.head + h * fold);
                        const From* const at = static_cast<const From*>(x.data) + x.at(item.batch, head, seg.first);
                        Following<From> ahead{at + (k + N) * x.row, x.row};
                        if (k + N >= seg.count) {
                            const bool any = then.column == 1 && next < keys.length[seg.source];
                            ahead = any ? Following<From>{static_cast<const From*>(then.data) +
                                                              then.at(item.batch, head, next),
                                                          then.row}
                                        : Following<From>{at, 0};
                        }
                        f.template operator()<R>(h, k, smaller(k + N, seg.count), at, ahead);
                    }
            });
        });
    };
    for (int64_t from = lo; from < hi; from += kFewKeys)
        for_segments(p, keys, rows.last, from, smaller(from + kFewKeys, hi), [&](const Segment& seg) {
            const Source& source = p.sources[seg.source];
            for_heads(
                seg, source.key, source.value, seg.first,
                [&]<int R, class From>(int64_t h, int64_t first, int64_t last, const From* at,
                                       const Following<From>& ahead) MMFAST_LAMBDA {
                    T *const tile = tiles + h * kFewRows * kFewKeys, *const queries = few_head(p, scratch, h).queries;
                    if constexpr (kHalvesFit<From, R>)
                        if (keys_by_halves)
                            return few_scores<T, R, true>(p.dim, source.key, at, first, last, queries, tile, ahead);
                    few_scores<T, R>(p.dim, source.key, at, first, last, queries, tile, ahead);
                });
            for (int64_t h = 0; h < item.heads; ++h) {
                const FewHead<T> s = few_head(p, scratch, h);
                T* const tile = tiles + h * kFewRows * kFewKeys;
                set_rows<T>(p, fold, item.head + h * fold, item.panel, rows);
                few_masks<T>(p, item.batch, rows, seg, tile);
                for (int64_t r = 0; r < rows.n; ++r) {
                    const T factor = few_exponentials<T>(seg.count, tile + r * kFewKeys, s.maximum[r], s.sum[r]);
                    if (factor == 1) continue;
                    for (int64_t d = r * value_width; d < (r + 1) * value_width; d += N)
                        Simd<T>::store(s.out + d, factor * Simd<T>::load(s.out + d));
                }
            }
            for_heads(seg, source.value, source.key, seg.first + seg.count,
                      [&]<int R, class From>(int64_t h, int64_t first, int64_t last, const From* at,
                                             const Following<From>& ahead) MMFAST_LAMBDA {
                          T *const tile = tiles + h * kFewRows * kFewKeys, *const out = few_head(p, scratch, h).out;
                          if constexpr (kHalvesFit<From, R>)
                              if (values_by_halves)
                                  return few_output<T, R, true>(p.value_dim, source.value, at, first, last, tile, out,
                                                                ahead);
                          few_output<T, R>(p.value_dim, source.value, at, first, last, tile, out, ahead);
                      });
        });
    for (int64_t h = 0; h < item.heads; ++h) {
        const FewHead<T> s = few_head(p, scratch, h);
        set_rows<T>(p, fold, item.head + h * fold, item.panel, rows);
        if (values_by_halves) part_halves(s.out, rows.n * value_width, true);
        done(h, rows, s.out, s.maximum, s.sum);
    }
}

}  // namespace
}  // namespace MMFAST_ISA
}  // namespace fusion
}  // namespace mmfast
