// Attention of bfloat16 on the matrix unit: one softmax over keys that all stay in the second cache. For the instruction set
// amx only; what it does not take, the kernels of avx512 do.
//
// Note: [Attention on the matrix unit]
//   Queries are along the lanes as everywhere. Products of inputs, scores and dP, are exact but for their sums. P and dS are
//   a sum of two bfloat16, x = h + l to 16 bits, as which they are multiplied twice: results are rounded once, at the end, as
//   those of the other kernels are, and the products still take less time than the exponentials.
//   Keys and features are filled up with zeros to multiples of 32, 2 x 2 tiles are multiplied at a time, and all keys
//   at once, so that outputs and gradients of queries are summed in the tiles.
#include "common/amx.h"
#include "fusion/fusion_gradients.h"
#include "fusion/fusion_panel.h"
#include "fusion/fusion_softmax.h"

namespace mmfast {
namespace fusion {
namespace MMFAST_ISA {
namespace {

using Floats = Vec<float>;
using Words = Simd<float>::U;

constexpr int64_t kLanes = Simd<float>::lanes;
constexpr int64_t kTwoTiles = 2 * kTileRows;
constexpr int kHalfPanel = kTwoTiles / kLanes;  // the least number of vectors that fills two tiles

constexpr int64_t padded(int64_t n) {
    return up_to_multiple(n, kTwoTiles);
}

// ---- Packing -------------------------------------------------------------------------------------------------------

MMFAST_INLINE Words bits_of(Floats x) {
    return Simd<float>::bits<Floats, Words>(x);
}
MMFAST_INLINE Floats number_of(Words x) {
    return Simd<float>::bits<Words, Floats>(x);
}

struct Halves {
    Words high, low;  // the upper half of each lane counts
};

// Of infinity and NaN `low` is 0, so that they come out of `high`.
MMFAST_INLINE Halves split(Floats x) {
    const Words high = bits_of(x) & 0xffff0000u;
    const Words low = bits_of(x - number_of(high)) + 0x8000u;
    return {high, (high & 0x7f800000u) == 0x7f800000u ? Words{} : low};
}

// Lane by lane (first, second) in the order of memory.
MMFAST_INLINE void put_pair(uint32_t* to, Words first, Words second) {
    const Words pair = (first >> 16) | (second & 0xffff0000u);
    __builtin_memcpy(to, &pair, sizeof pair);
}
MMFAST_INLINE void put_upper(uint16_t* to, Words x) {
    const auto half = __builtin_convertvector(x >> 16, VectorOf<uint16_t, int(kLanes)>::type);
    __builtin_memcpy(to, &half, sizeof half);
}
MMFAST_INLINE Words load_upper(const uint16_t* from) {
    typename VectorOf<uint16_t, int(kLanes)>::type half;
    __builtin_memcpy(&half, from, sizeof half);
    return __builtin_convertvector(half, Words) << 16;
}

// A row, `width` long with zeros behind it.
MMFAST_INLINE void copy_row(const void* from, int64_t count, int64_t width, uint16_t* to) {
    const float* const words = static_cast<const float*>(from);
    float* const pairs = reinterpret_cast<float*>(to);
    for (int64_t k = 0; k < width / 2; k += kLanes)
        Simd<float>::store(pairs + k, k < count / 2 ? Simd<float>::load(words + k, int(count / 2 - k)) : Floats{});
    if (count % 2) __builtin_memcpy(to + count - 1, static_cast<const uint16_t*>(from) + count - 1, 2);
}

// Rows of a panel, `width` long, zero behind the rows up to `lanes`.
void copy_rows(const View& x, int64_t batch, const Rows& rows, int64_t count, int64_t width, int64_t lanes,
               uint16_t* to) {
    const uint16_t* const data = static_cast<const uint16_t*>(x.data);
    for (int64_t r = 0; r < lanes; ++r)
        copy_row(r < rows.n ? data + x.at(batch, rows.head[r], rows.row[r]) : nullptr, r < rows.n ? count : 0, width,
                 to + r * width);
}

// Pairs of the columns of such rows: to[pair][lane].
void pair_columns(const uint16_t* from, int64_t width, int64_t lanes, uint32_t* to) {
    for (int64_t l = 0; l < lanes; l += kLanes) {
        const float* rows[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) rows[i] = reinterpret_cast<const float*>(from + (l + i) * width);
        for (int64_t k = 0; k < width / 2; k += kLanes) {
            Floats columns[kLanes];
            Simd<float>::load_transposed(rows, k, columns);
            for (int64_t i = 0; i < kLanes; ++i)
                Simd<float>::store(reinterpret_cast<float*>(to) + (k + i) * lanes + l, columns[i]);
        }
    }
}

// Pairs of such rows: to[pair][column].
void pair_rows(const uint16_t* from, int64_t width, int64_t lanes, uint32_t* to) {
    for (int64_t r = 0; r < lanes; r += 2)
        for (int64_t k = 0; k < width; k += kLanes)
            put_pair(to + r / 2 * width + k, load_upper(from + r * width + k), load_upper(from + (r + 1) * width + k));
}

// to[column][row] of such rows.
void transpose_rows(const uint16_t* from, int64_t width, int64_t count, uint16_t* to) {
    for (int64_t r = 0; r < count; r += 2 * kLanes)
        for (int64_t k = 0; k < width; k += kLanes) {
            Floats x[kLanes];
            for (int64_t i = 0; i < kLanes; ++i) {
                const uint16_t* const at = from + (r + 2 * i) * width + k;
                x[i] = number_of((load_upper(at) >> 16) | load_upper(at + width));
            }
            Simd<float>::transpose(x);
            for (int64_t i = 0; i < kLanes; ++i) __builtin_memcpy(to + (k + i) * count + r, &x[i], sizeof x[i]);
        }
}

// ---- Products ------------------------------------------------------------------------------------------------------

// Rows of bfloat16; or pairs of rows, a word for each column. `low` is null where `high` is all of it.
template <class E>
struct Factor {
    const E *high, *low;
    int64_t stride;
};
using Left = Factor<uint16_t>;
using Right = Factor<uint32_t>;

// c[rows][width] = or += left[rows][depth] right[depth][width], of multiples of 32; `between` is called before each block.
template <class F>
MMFAST_INLINE void multiply(MatrixUnit& unit, int64_t rows, int64_t depth, int64_t width, const Left& left,
                            const Right& right, float* c, int64_t c_stride, bool add, F&& between) {
    constexpr int64_t kHalf = kTileRows;
    const auto load_left = [&](const uint16_t* from, int64_t i, int64_t k) __attribute__((always_inline)) {
        from += i * left.stride + k;
        unit.load<4>(from, left.stride * 2);
        unit.load<5>(from + kHalf * left.stride, left.stride * 2);
    };
    const auto load_right = [&](const uint32_t* from, int64_t j, int64_t k) __attribute__((always_inline)) {
        from += k / 2 * right.stride + j;
        unit.load<6>(from, right.stride * 4);
        unit.load<7>(from + kHalf, right.stride * 4);
    };
    unit.fence();
    for (int64_t j = 0; j < width; j += kTwoTiles)
        for (int64_t i = 0; i < rows; i += kTwoTiles) {
            between();
            float* const to = c + i * c_stride + j;
            const int64_t down = kHalf * c_stride, bytes = c_stride * 4;
            if (add) {
                unit.load<0>(to, bytes);
                unit.load<1>(to + kHalf, bytes);
                unit.load<2>(to + down, bytes);
                unit.load<3>(to + down + kHalf, bytes);
            } else {
                unit.zero();
            }
            for (int64_t k = 0; k < depth; k += kTwoTiles) {
                load_left(left.high, i, k);
                if (right.low) {
                    load_right(right.low, j, k);
                    unit.multiply_add();
                }
                load_right(right.high, j, k);
                unit.multiply_add();
                if (left.low) {
                    load_left(left.low, i, k);
                    unit.multiply_add();
                }
            }
            unit.store<0>(to, bytes);
            unit.store<1>(to + kHalf, bytes);
            unit.store<2>(to + down, bytes);
            unit.store<3>(to + down + kHalf, bytes);
        }
    unit.fence();
}

// ---- What both passes share ----------------------------------------------------------------------------------------

// Memory dealt out piece by piece, each a multiple of a line.
class Pieces {
public:
    explicit Pieces(float* first) : first_(first) {}
    template <class E>
    void take(E*& to, int64_t count) {
        to = reinterpret_cast<E*>(first_ + at_);
        at_ += up_to_multiple(count * int64_t(sizeof(E)), 64) / 4;
    }
    int64_t taken() const { return at_; }

private:
    float* first_;
    int64_t at_ = 0;
};

int64_t most_keys(const Problem& p) {
    int64_t total = 0;
    for (int j = 0; j < p.count; ++j) total += p.sources[j].keys;
    return padded(total);
}

// Keys or values of one head, those of a source after those of the one before, zero up to a multiple of 32.
void copy_keys(const Problem& p, bool values, int64_t batch, int64_t head, const Keys& keys, uint16_t* to) {
    const int64_t count = values ? p.value_dim : p.dim, width = padded(count), total = keys.start[p.count];
    for (int j = 0; j < p.count; ++j) {
        const View& x = values ? p.sources[j].value : p.sources[j].key;
        const uint16_t* const from = static_cast<const uint16_t*>(x.data) + x.at(batch, key_head(p, j, head), 0);
        for (int64_t k = 0; k < keys.length[j]; ++k)
            copy_row(from + k * x.row, count, width, to + (keys.start[j] + k) * width);
    }
    for (int64_t k = total; k < padded(total); ++k) copy_row(nullptr, 0, width, to + k * width);
}

// Scores in place of the products in tile[key][lane]; returns what they are still to be multiplied by.
template <int S>
float finish_scores(const Problem& p, int64_t batch, const Rows& rows, const Keys& keys, float* tile, float* mask) {
    constexpr int64_t W = S * kLanes;
    const float factor = float(p.scale * kLog2e);
    if (plain_scores<float>(p)) return factor;
    for (int64_t i = 0; i < keys.start[p.count] * W; i += kLanes)
        Simd<float>::store(tile + i, Simd<float>::load(tile + i) * factor);
    for (int j = 0; j < p.count; ++j)
        mask_scores<float, S>(p, batch, rows, {j, 0, keys.length[j], keys.start[j]}, tile + keys.start[j] * W, mask);
    return 1;
}

// f<S>() for the number of vectors that hold n lanes and fill tiles.
template <class F>
MMFAST_INLINE void for_tiles(int64_t n, const F& f) {
    if constexpr (kHalfPanel < kPanelWidth) {
        if (n <= kTwoTiles) return f.template operator()<kHalfPanel>();
    }
    f.template operator()<kPanelWidth>();
}

// ---- Forward -------------------------------------------------------------------------------------------------------

struct ForwardBuffers {
    uint16_t *rows, *key, *value;    // queries; keys [key][feature]; values [feature][key]
    uint32_t *queries, *high, *low;  // pairs of features; of probabilities, pairs of keys
    float *tile, *mask, *out;
    int64_t key_size, value_size;  // of one head
};

int64_t lay_out(const Problem& p, int64_t heads, float* scratch, ForwardBuffers& b) {
    constexpr int64_t W = kPanel<float>;
    const int64_t n = most_keys(p), dim = padded(p.dim), value_dim = padded(p.value_dim);
    Pieces pieces(scratch);
    pieces.take(b.rows, larger(W * dim, n * value_dim));
    pieces.take(b.queries, W * dim / 2);
    pieces.take(b.high, W * n / 2);
    pieces.take(b.low, W * n / 2);
    pieces.take(b.tile, W * n);
    pieces.take(b.mask, W * n);
    pieces.take(b.out, W * value_dim);
    b.key_size = n * dim;
    b.value_size = n * value_dim;
    pieces.take(b.key, heads * b.key_size);
    pieces.take(b.value, heads * b.value_size);
    return pieces.taken();
}

int64_t forward_scratch(const Problem& p, int64_t heads) {
    ForwardBuffers b;
    return lay_out(p, heads, nullptr, b);
}

// Probabilities times their sum, in pairs of keys, of the products in b.tile.
template <int S>
void softmax(int64_t count, float factor, const ForwardBuffers& b, Running<float, S>& running) {
    constexpr int64_t W = S * kLanes;
    Floats shift[S], sum[S] = {};
    for (int v = 0; v < S; ++v) shift[v] = Simd<float>::splat(-infinity<float>());
    for (int64_t k = 0; k < count; ++k)
#pragma GCC unroll 4
        for (int v = 0; v < S; ++v)
            shift[v] = Simd<float>::max(Simd<float>::load(b.tile + k * W + v * kLanes) * factor, shift[v]);
    for (int v = 0; v < S; ++v) {
        running.maximum[v] = shift[v];
        shift[v] = shift[v] == -infinity<float>() ? Floats{} : shift[v];
    }
    const auto exponential = [&](int64_t k, int v) __attribute__((always_inline)) {
        const Floats e = mmfast::exp2(Simd<float>::load(b.tile + k * W + v * kLanes) * factor - shift[v]);
        sum[v] += e;
        return split(e);
    };
    for (int64_t k = 0; k < padded(count); k += 2)
#pragma GCC unroll 4
        for (int v = 0; v < S; ++v) {
            const Halves even = k < count ? exponential(k, v) : Halves{};
            const Halves odd = k + 1 < count ? exponential(k + 1, v) : Halves{};
            const int64_t at = k / 2 * W + v * kLanes;
            put_pair(b.high + at, even.high, odd.high);
            put_pair(b.low + at, even.low, odd.low);
        }
    for (int v = 0; v < S; ++v) running.sum[v] = sum[v];
}

template <int S>
void forward_panel(MatrixUnit& unit, const ForwardJob<float>& job, int64_t head, const Item& item, const Rows& rows,
                   const Keys& keys, const ForwardBuffers& b, Ahead& ahead) {
    constexpr int64_t W = S * kLanes;
    const Problem& p = *job.problem;
    const int64_t count = keys.start[p.count], n = padded(count), dim = padded(p.dim), value_dim = padded(p.value_dim);
    copy_rows(p.query, item.batch, rows, p.dim, dim, W, b.rows);
    pair_columns(b.rows, dim, W, b.queries);
    ahead.spread((n + value_dim) / kTwoTiles * (W / kTwoTiles));
    multiply(unit, n, dim, W, {b.key + head * b.key_size, nullptr, dim}, {b.queries, nullptr, W}, b.tile, W, false,
             ahead);
    Running<float, S> running;
    softmax<S>(count, finish_scores<S>(p, item.batch, rows, keys, b.tile, b.mask), b, running);
    multiply(unit, value_dim, n, W, {b.value + head * b.value_size, nullptr, n}, {b.high, b.low, W}, b.out, W, false,
             ahead);
    alignas(64) float factor[W];
    finish<float, S>(job, item, rows, 0, running, factor);
    unpack_columns<float>(b.out, p.value_dim, factor, item.batch, rows, job.out, 0, false, W);
}

// As forward() of fusion_forward.cpp: see [Heads of an item] there.
void forward(const ForwardJob<float>& job, const Item& item, float* scratch) {
    const Problem& p = *job.problem;
    const bool together = item.panels > 1;
    ForwardBuffers b;
    lay_out(p, together ? item.heads : 1, scratch, b);
    Keys keys;
    set_keys(p, item.batch, true, keys);
    MatrixUnit unit;
    Ahead ahead;
    const auto keep = [&](int64_t h, int64_t at) {
        copy_keys(p, false, item.batch, item.head + h * job.fold, keys, b.key + at * b.key_size);
        copy_keys(p, true, item.batch, item.head + h * job.fold, keys, b.rows);
        transpose_rows(b.rows, padded(p.value_dim), padded(keys.start[p.count]), b.value + at * b.value_size);
    };
    for (int64_t h = 0; together && h < item.heads; ++h) keep(h, h);
    Rows rows;
    for (int64_t i = 0; i < item.panels; ++i)
        for (int64_t h = 0; h < item.heads; ++h) {
            const int64_t following = i * item.heads + h + 1, next = following / item.heads;
            if (next < item.panels) {
                set_rows<float>(p, job.fold, item.head + following % item.heads * job.fold, item.panel + next, rows);
                if (rows.one_head) {
                    ahead.add(p.query, item.batch, rows.head[0], rows.row[0], rows.n, p.dim);
                    ahead.add(job.out, item.batch, rows.head[0], rows.row[0], rows.n, p.value_dim);
                }
            }
            set_rows<float>(p, job.fold, item.head + h * job.fold, item.panel + i, rows);
            if (!together) keep(h, 0);
            for_tiles(rows.n, [&]<int S>() __attribute__((always_inline)) {
                forward_panel<S>(unit, job, together ? h : 0, item, rows, keys, b, ahead);
            });
        }
}

// ---- Backward ------------------------------------------------------------------------------------------------------

struct BackwardBuffers {
    // Queries and gradients of the output: rows, pairs of features, pairs of rows.
    uint16_t *query_rows, *grad_rows;
    uint32_t *queries, *grad_out, *query_pairs, *grad_pairs;
    float *p, *dp, *mask, *dq;
    uint16_t *p_high, *p_low, *ds_high, *ds_low;  // [key][lane]
    uint32_t *pairs_high, *pairs_low;             // of dS, pairs of keys
    // Of each head: keys and values, keys [feature][key], sums.
    uint16_t *key, *value, *features;
    float *dk, *dv;
    int64_t key_size, value_size;
    MMFAST_INLINE BackwardBuffers of_head(int64_t h) const {
        BackwardBuffers b = *this;
        b.key += h * key_size;
        b.features += h * key_size;
        b.dk += h * key_size;
        b.value += h * value_size;
        b.dv += h * value_size;
        return b;
    }
};

int64_t lay_out(const Problem& p, int64_t heads, float* scratch, BackwardBuffers& b) {
    constexpr int64_t W = kPanel<float>;
    const int64_t n = most_keys(p), dim = padded(p.dim), value_dim = padded(p.value_dim);
    Pieces pieces(scratch);
    pieces.take(b.query_rows, W * dim);
    pieces.take(b.grad_rows, W * value_dim);
    pieces.take(b.queries, W * dim / 2);
    pieces.take(b.grad_out, W * value_dim / 2);
    pieces.take(b.query_pairs, W * dim / 2);
    pieces.take(b.grad_pairs, W * value_dim / 2);
    for (float** to : {&b.p, &b.dp, &b.mask}) pieces.take(*to, W * n);
    pieces.take(b.dq, W * dim);
    for (uint16_t** to : {&b.p_high, &b.p_low, &b.ds_high, &b.ds_low}) pieces.take(*to, W * n);
    for (uint32_t** to : {&b.pairs_high, &b.pairs_low}) pieces.take(*to, W * n / 2);
    b.key_size = n * dim;
    b.value_size = n * value_dim;
    pieces.take(b.key, heads * b.key_size);
    pieces.take(b.features, heads * b.key_size);
    pieces.take(b.value, heads * b.value_size);
    pieces.take(b.dk, heads * b.key_size);
    pieces.take(b.dv, heads * b.value_size);
    return pieces.taken();
}

int64_t backward_scratch(const Problem& p, int64_t heads) {
    BackwardBuffers b;
    return lay_out(p, heads, nullptr, b);
}

// P in place of the products, and sums of it.
template <int S>
void probabilities(int64_t count, float factor, const BackwardBuffers& b, Lanes<float>& lanes) {
    constexpr int64_t W = S * kLanes;
    Totals<float, S> totals(lanes);
    Floats lse[S];
    for (int v = 0; v < S; ++v) lse[v] = Simd<float>::load(lanes.lse + v * kLanes);
    for (int64_t k = 0; k < count; ++k)
#pragma GCC unroll 4
        for (int v = 0; v < S; ++v) {
            float* const at = b.p + k * W + v * kLanes;
            const Floats e = mmfast::exp2(Simd<float>::load(at) * factor - lse[v]);
            totals.add(v, e, b.dp + k * W + v * kLanes);
            Simd<float>::store(at, e);
        }
    totals.store(lanes);
}

// P and scale dS in halves.
template <int S>
void split_gradients(int64_t count, float scale, const BackwardBuffers& b, const Lanes<float>& lanes) {
    constexpr int64_t W = S * kLanes;
    Floats delta[S];
    for (int v = 0; v < S; ++v)
        delta[v] = Simd<float>::load(lanes.delta + v * kLanes) - Simd<float>::load(lanes.grad_lse + v * kLanes);
    const auto row = [&](int64_t k, int v) __attribute__((always_inline)) {
        const int64_t at = k * W + v * kLanes;
        Floats p{}, ds{};
        if (k < count) {
            p = Simd<float>::load(b.p + at);
            ds = scale * p * (Simd<float>::load(b.dp + at) - delta[v]);
        }
        const Halves of_p = split(p), of_ds = split(ds);
        put_upper(b.p_high + at, of_p.high);
        put_upper(b.p_low + at, of_p.low);
        put_upper(b.ds_high + at, of_ds.high);
        put_upper(b.ds_low + at, of_ds.low);
        return of_ds;
    };
    for (int64_t k = 0; k < padded(count); k += 2)
#pragma GCC unroll 4
        for (int v = 0; v < S; ++v) {
            const Halves even = row(k, v), odd = row(k + 1, v);
            const int64_t at = k / 2 * W + v * kLanes;
            put_pair(b.pairs_high + at, even.high, odd.high);
            put_pair(b.pairs_low + at, even.low, odd.low);
        }
}

// Whether a gradient of any source's keys, or values, is wanted.
bool any_wanted(const Accumulator* to, int count) {
    bool result = false;
    for (int j = 0; j < count; ++j) result = result || to[j].target.data;
    return result;
}

template <int S>
void backward_panel(MatrixUnit& unit, const BackwardJob<float>& job, const BackwardItem& item, const Rows& rows,
                    const Keys& keys, const BackwardBuffers& b, Ahead& ahead) {
    constexpr int64_t W = S * kLanes;
    const Problem& p = *job.problem;
    const int64_t count = keys.start[p.count], n = padded(count), dim = padded(p.dim), value_dim = padded(p.value_dim);
    const bool by_key = any_wanted(job.key, p.count), by_value = any_wanted(job.value, p.count);
    copy_rows(p.query, item.batch, rows, p.dim, dim, W, b.query_rows);
    copy_rows(job.grad_out, item.batch, rows, p.value_dim, value_dim, W, b.grad_rows);
    pair_columns(b.query_rows, dim, W, b.queries);
    pair_columns(b.grad_rows, value_dim, W, b.grad_out);
    ahead.spread(2 * n / kTwoTiles * (W / kTwoTiles));
    multiply(unit, n, dim, W, {b.key, nullptr, dim}, {b.queries, nullptr, W}, b.p, W, false, ahead);
    multiply(unit, n, value_dim, W, {b.value, nullptr, value_dim}, {b.grad_out, nullptr, W}, b.dp, W, false, ahead);
    Lanes<float> lanes;
    set_lanes<float, S>(job, item.batch, rows, 0, lanes);
    probabilities<S>(count, finish_scores<S>(p, item.batch, rows, keys, b.p, b.mask), b, lanes);
    set_delta<float, S>(lanes);
    if (job.grad_gates) scatter(p, lanes.delta, item.batch, rows, job.grad_gates);
    split_gradients<S>(count, float(p.scale), b, lanes);
    if (by_key) {
        pair_rows(b.query_rows, dim, W, b.query_pairs);
        multiply(unit, n, W, dim, {b.ds_high, b.ds_low, W}, {b.query_pairs, nullptr, dim}, b.dk, dim, true, Nothing());
    }
    if (by_value) {
        pair_rows(b.grad_rows, value_dim, W, b.grad_pairs);
        multiply(unit, n, W, value_dim, {b.p_high, b.p_low, W}, {b.grad_pairs, nullptr, value_dim}, b.dv, value_dim,
                 true, Nothing());
    }
    if (!job.query.target.data) return;
    multiply(unit, dim, n, W, {b.features, nullptr, n}, {b.pairs_high, b.pairs_low, W}, b.dq, W, false, Nothing());
    unpack_columns<float>(b.dq, p.dim, static_cast<const float*>(nullptr), item.batch, rows, job.query.target,
                          item.query_run * job.query.run, job.query.add, W);
}

void begin_head(const Problem& p, const BackwardItem& item, const Keys& keys, const BackwardBuffers& b) {
    const int64_t n = padded(keys.start[p.count]);
    copy_keys(p, false, item.batch, item.head, keys, b.key);
    copy_keys(p, true, item.batch, item.head, keys, b.value);
    transpose_rows(b.key, padded(p.dim), n, b.features);
    clear(b.dk, n * padded(p.dim));
    clear(b.dv, n * padded(p.value_dim));
}

void end_head(const BackwardJob<float>& job, const BackwardItem& item, const Keys& keys, const BackwardBuffers& b) {
    const Problem& p = *job.problem;
    const auto end = [&](int j, const Accumulator& to, int64_t run, int64_t width, const float* sums) {
        if (!to.target.data) return;
        const int64_t there = keys.length[j], head = key_head(p, j, item.head), stride = padded(width);
        flush<float>(to, run, item.batch, head, 0, there, width, sums + keys.start[j] * stride, stride);
        const float* const zeros = b.dq;
        flush<float>(to, run, item.batch, head, there, p.sources[j].keys - there, width, zeros, 0);
    };
    clear(b.dq, larger(padded(p.dim), padded(p.value_dim)));
    for (int j = 0; j < p.count; ++j) {
        end(j, job.key[j], item.key_run[j], p.dim, b.dk);
        end(j, job.value[j], item.value_run[j], p.value_dim, b.dv);
    }
}

// As backward() of fusion_backward.cpp, of all keys.
void backward(const BackwardJob<float>& job, const BackwardItem& item, float* scratch) {
    const Problem& p = *job.problem;
    const bool together = item.panels > 1;
    BackwardBuffers all;
    lay_out(p, together ? item.heads : 1, scratch, all);
    Keys keys;
    set_keys(p, item.batch, true, keys);
    MatrixUnit unit;
    Ahead ahead;
    Rows rows{};
    BackwardItem now = item;
    const auto head = [&](int64_t h) {
        now.head = item.head + h * job.fold;
        return all.of_head(together ? h : 0);
    };
    const auto panel = [&](int64_t i, int64_t h) {
        const int64_t following = i * item.heads + h + 1, next = following / item.heads;
        if (next < item.panels) {
            head(following % item.heads);
            set_rows<float>(p, job.fold, now.head, item.panel + next, rows);
            rows_ahead(job, now, rows, true, ahead);
        }
        const BackwardBuffers b = head(h);
        set_rows<float>(p, job.fold, now.head, item.panel + i, rows);
        for_tiles(rows.n, [&]<int S>() __attribute__((always_inline)) {
            backward_panel<S>(unit, job, now, rows, keys, b, ahead);
        });
    };
    if (together) {
        for (int64_t h = 0; h < item.heads; ++h) {
            const BackwardBuffers b = head(h);
            begin_head(p, now, keys, b);
        }
        for (int64_t i = 0; i < item.panels; ++i)
            for (int64_t h = 0; h < item.heads; ++h) panel(i, h);
        for (int64_t h = 0; h < item.heads; ++h) {
            const BackwardBuffers b = head(h);
            end_head(job, now, keys, b);
        }
        return;
    }
    for (int64_t h = 0; h < item.heads; ++h) {
        const BackwardBuffers b = head(h);
        begin_head(p, now, keys, b);
        if (item.panels) panel(0, h);
        head(h);
        end_head(job, now, keys, b);
    }
}

}  // namespace

void matrix_kernels_float(MatrixKernels& kernels) {
    kernels.panel = kPanel<float>;
    kernels.forward_scratch = forward_scratch;
    kernels.forward = forward;
    kernels.backward_scratch = backward_scratch;
    kernels.backward = backward;
}

}  // namespace MMFAST_ISA
}  // namespace fusion
}  // namespace mmfast
