// Attention of bfloat16 on the matrix unit: of keys that all stay in the second cache. For the instruction set amx only; what it
// does not take, the kernels of avx512 do.
//
// Note: [Attention on the matrix unit]
//   Rows of tiles are queries, unlike everywhere else: then queries, gradients of outputs and outputs are read and written as
//   they lie, and only keys and values are arranged, once for all panels. Products of inputs, scores and dP, are exact but for
//   their sums. P and dS are a sum of two bfloat16, x = h + l to 16 bits, as which they are multiplied twice: results are
//   rounded once, at the end, as those of the other kernels are, and the products still take less time than the exponentials.
//   Each source begins a new tile of keys. Features that are multiplied are filled up with zeros to multiples of 32, keys and
//   features that a product has as columns to multiples of 16. Gradients of keys and values are summed transposed, or dS and P
//   would have to be.
//   Which key is which place of a sum is free as long as both factors agree: pairs are the keys k and k + 16, so that a pair of
//   halves is made from two vectors without moving lanes.
//
// Note: [Products meanwhile]
//   A panel is two halves. What is done with the scores of one is spread over the products of the other: the vector units and
//   the matrix unit work at the same time, and P has left for the first cache, as loads of tiles need it, long before it is
//   multiplied. Halves take the place of what they are made from, so that what a half is busy with stays in the first cache.
#include "common/amx.h"
#include "fusion/fusion_gradients.h"
#include "fusion/fusion_panel.h"
#include "fusion/fusion_softmax.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace mmfast {
namespace fusion {
namespace MMFAST_ISA {
namespace {

using Floats = Vec<float>;
using Words = Simd<float>::U;

constexpr int64_t kLanes = Simd<float>::lanes;
constexpr int64_t kTile = kTileRows, kTwoTiles = 2 * kTile;
constexpr int64_t kRows = kPanel<float>, kHalf = kRows / 2;
constexpr int64_t kMostTiles = kResidentKeys / kTile + kMostSources;  // of keys

constexpr int64_t to_tiles(int64_t n) {
    return up_to_multiple(n, kTile);
}
constexpr int64_t padded(int64_t n) {
    return up_to_multiple(n, kTwoTiles);
}
// Words from one row of n to the next: no multiple of 4 lines, by which rows would soon be 4 KiB apart.
constexpr int64_t row_stride(int64_t n) {
    const int64_t lines = (n + kTile - 1) / kTile;
    return (lines + (lines % 4 == 0)) * kTile;
}
// The same in bfloat16.
constexpr int64_t half_stride(int64_t n) {
    return 2 * row_stride((n + 1) / 2);
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

// Of infinity and NaN `low` is 0, so that they come out of `high`; if kSmall there are none but NaN, which may be in both.
template <bool kSmall>
MMFAST_INLINE Halves split(Floats x) {
    const Words high = bits_of(x) & 0xffff0000u;
    const Words low = bits_of(x - number_of(high)) + 0x8000u;
    if constexpr (kSmall) return {high, low};
    return {high, (high & 0x7f800000u) == 0x7f800000u ? Words{} : low};
}

// Lane by lane (first, second) in the order of memory.
MMFAST_INLINE void put_pair(uint32_t* to, Words first, Words second) {
    const Words pair = (first >> 16) | (second & 0xffff0000u);
    __builtin_memcpy(to, &pair, sizeof pair);
}
MMFAST_INLINE void put_pairs(uint32_t* high, uint32_t* low, const Halves& first, const Halves& second) {
    put_pair(high, first.high, second.high);
    put_pair(low, first.low, second.low);
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

// Pairs of the columns of rows: to[pair][row].
void pair_columns(const uint16_t* from, int64_t stride, int64_t width, int64_t count, uint32_t* to, int64_t to_stride) {
    for (int64_t l = 0; l < count; l += kLanes) {
        const float* rows[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) rows[i] = reinterpret_cast<const float*>(from + (l + i) * stride);
        for (int64_t k = 0; k < width / 2; k += kLanes) {
            Floats columns[kLanes];
            Simd<float>::load_transposed(rows, k, columns);
            for (int64_t i = 0; i < kLanes; ++i)
                Simd<float>::store(reinterpret_cast<float*>(to) + (k + i) * to_stride + l, columns[i]);
        }
    }
}

// Pairs of rows, each with the one 16 below it: to[pair][column]. `count`: a multiple of 16; then there are rows of zeros.
void pair_rows(const uint16_t* from, int64_t stride, int64_t width, int64_t count, uint32_t* to, int64_t to_stride) {
    for (int64_t r = 0; r < count; r += kTwoTiles)
        for (int64_t i = 0; i < kTile; ++i, to += to_stride)
            for (int64_t k = 0; k < width; k += kLanes) {
                const uint16_t* const first = from + (r + i) * stride + k;
                put_pair(to + k, load_upper(first), r + kTile < count ? load_upper(first + kTile * stride) : Words{});
            }
}

// to[column][row] of rows; their number and the width are multiples of 32. Blocks first .. last - 1 of transposed_blocks().
constexpr int64_t transposed_blocks(int64_t width, int64_t count) {
    return width / (2 * kLanes) * (count / (2 * kLanes));
}
void transpose_rows(const uint16_t* from, int64_t stride, int64_t width, int64_t first, int64_t last, uint16_t* to,
                    int64_t to_stride) {
    const auto put = [&](Floats* x, uint16_t* at) MMFAST_LAMBDA {
        Simd<float>::transpose(x);
        for (int64_t i = 0; i < kLanes; ++i, at += 2 * to_stride) __builtin_memcpy(at, &x[i], sizeof x[i]);
    };
    for (int64_t block = first; block < last; ++block) {
        const int64_t in_row = width / (2 * kLanes);
        const int64_t r = block / in_row * 2 * kLanes, k = block % in_row * 2 * kLanes;
        Floats even[kLanes], odd[kLanes];  // columns, pairs of rows
        for (int64_t i = 0; i < kLanes; ++i) {
            Words upper, lower;
            __builtin_memcpy(&upper, from + (r + 2 * i) * stride + k, sizeof upper);
            __builtin_memcpy(&lower, from + (r + 2 * i + 1) * stride + k, sizeof lower);
            even[i] = number_of((upper & 0xffffu) | (lower << 16));
            odd[i] = number_of((upper >> 16) | (lower & 0xffff0000u));
        }
        put(even, to + k * to_stride + r);
        put(odd, to + (k + 1) * to_stride + r);
    }
}

// ---- Products ------------------------------------------------------------------------------------------------------

// Rows of bfloat16; or pairs of rows, a word for each column. `low` is null where `high` is all of it.
template <class E>
struct Factor {
    const E *high, *low;
    int64_t stride;
    int64_t apart = 1;  // of a left one: pieces of 32 columns begin so many times 32 apart
};
using Left = Factor<uint16_t>;
using Right = Factor<uint32_t>;

// Sums in `data`, which start from zero if `from` is null.
struct Sums {
    float* data;
    int64_t stride;
    const float* from;
    int64_t from_stride;
};

// Steps of a product, each of which calls `between`.
constexpr int64_t product_calls(int64_t rows, int64_t depth, int64_t width) {
    return (rows + kTile) / kTwoTiles * ((width + kTile) / kTwoTiles) * (depth / kTwoTiles);
}

// R x C tiles.
template <int R, int C, class F>
MMFAST_INLINE void multiply_block(MatrixUnit& unit, int64_t depth, const Left& left, const Right& right,
                                  const Sums& sums, F&& between) {
    const auto load_left = [&](const uint16_t* from) MMFAST_LAMBDA {
        unit.load<4>(from, left.stride * 2);
        if constexpr (R == 2) unit.load<5>(from + kTile * left.stride, left.stride * 2);
    };
    const auto load_right = [&](const uint32_t* from) MMFAST_LAMBDA {
        unit.load<6>(from, right.stride * 4);
        if constexpr (C == 2) unit.load<7>(from + kTile, right.stride * 4);
    };
    if (sums.from) {
        const float* const down = sums.from + kTile * sums.from_stride;
        unit.load<0>(sums.from, sums.from_stride * 4);
        if constexpr (C == 2) unit.load<1>(sums.from + kTile, sums.from_stride * 4);
        if constexpr (R == 2) unit.load<2>(down, sums.from_stride * 4);
        if constexpr (R == 2 && C == 2) unit.load<3>(down + kTile, sums.from_stride * 4);
    } else {
        unit.zero();
    }
    for (int64_t k = 0; k < depth; k += kTwoTiles) {
        between();
        load_left(left.high + k * left.apart);
        if (right.low) {
            load_right(right.low + k / 2 * right.stride);
            unit.multiply_add<R, C>();
        }
        load_right(right.high + k / 2 * right.stride);
        unit.multiply_add<R, C>();
        if (left.low) {
            load_left(left.low + k * left.apart);
            unit.multiply_add<R, C>();
        }
    }
    float* const down = sums.data + kTile * sums.stride;
    unit.store<0>(sums.data, sums.stride * 4);
    if constexpr (C == 2) unit.store<1>(sums.data + kTile, sums.stride * 4);
    if constexpr (R == 2) unit.store<2>(down, sums.stride * 4);
    if constexpr (R == 2 && C == 2) unit.store<3>(down + kTile, sums.stride * 4);
}

// sums[rows][width] = or += left[rows][depth] right[depth][width], the depth a multiple of 32, the others of 16.
template <class F>
void multiply(MatrixUnit& unit, int64_t rows, int64_t depth, int64_t width, const Left& left, const Right& right,
              const Sums& sums, F&& between) {
    unit.fence();
    for (int64_t i = 0; i < rows; i += kTwoTiles) {
        const int64_t down = i * left.stride;
        const Left l{left.high + down, left.low ? left.low + down : nullptr, left.stride, left.apart};
        for (int64_t j = 0; j < width; j += kTwoTiles) {
            const Right r{right.high + j, right.low ? right.low + j : nullptr, right.stride};
            const Sums s{sums.data + i * sums.stride + j, sums.stride,
                         sums.from ? sums.from + i * sums.from_stride + j : nullptr, sums.from_stride};
            const auto block = [&]<int R, int C>()
                                   MMFAST_LAMBDA { multiply_block<R, C>(unit, depth, l, r, s, between); };
            const bool wide = j + kTile < width;
            if (i + kTile < rows) wide ? block.template operator()<2, 2>() : block.template operator()<2, 1>();
            else wide ? block.template operator()<1, 2>() : block.template operator()<1, 1>();
        }
    }
    unit.fence();
}

// f(from, to) of 0 .. count - 1, a share of it at a call.
template <class F>
class Spread {
public:
    Spread(int64_t count, int64_t calls, const F& f) : count_(count), share_(count / larger(calls, 1) + 1), f_(f) {}
    MMFAST_INLINE void operator()() {
        if (next_ < count_) step(smaller(next_ + share_, count_));
    }
    void rest() {
        if (next_ < count_) step(count_);
    }

private:
    __attribute__((noinline)) void step(int64_t to) {
        f_(next_, to);
        next_ = to;
    }
    int64_t count_, share_, next_ = 0;
    const F& f_;
};

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

// Where the keys of the sources lie: each source begins a tile.
struct Places {
    int64_t first[kMostSources + 1], count[kMostSources];
    int64_t total;
    int8_t source[kMostTiles];                   // of a tile
    alignas(64) float none[kMostTiles * kTile];  // to be added to scores: -inf where there is no key
};

void set_places(const Problem& p, int64_t batch, Places& places) {
    places.first[0] = 0;
    for (int j = 0; j < p.count; ++j) {
        const int64_t first = places.first[j], count = p.sources[j].length(batch), next = first + to_tiles(count);
        places.count[j] = count;
        places.first[j + 1] = next;
        for (int64_t k = first; k < next; ++k) {
            places.none[k] = k - first < count ? 0.0f : -infinity<float>();
            places.source[k / kTile] = int8_t(j);
        }
    }
    places.total = places.first[p.count];
}

int64_t most_keys(const Problem& p) {
    int64_t total = 0;
    for (int j = 0; j < p.count; ++j) total += to_tiles(p.sources[j].keys);
    return padded(total);
}

// Keys or values of one head, zero where there are none.
void copy_keys(const Problem& p, bool values, int64_t batch, int64_t head, const Places& places, uint16_t* to) {
    const int64_t count = values ? p.value_dim : p.dim, width = padded(count), stride = half_stride(width);
    for (int j = 0; j < p.count; ++j) {
        const View& x = values ? p.sources[j].value : p.sources[j].key;
        const uint16_t* const from = static_cast<const uint16_t*>(x.data) + x.at(batch, key_head(p, j, head), 0);
        for (int64_t k = 0; k < places.first[j + 1] - places.first[j]; ++k, to += stride)
            copy_row(k < places.count[j] ? from + k * x.row : nullptr, k < places.count[j] ? count : 0, width, to);
    }
}

// The queries `rows` of x, and of zeros behind them, up to `lanes`: where they lie or in `buffer`.
Left panel_rows(const View& x, int64_t batch, const Rows& rows, int64_t count, int64_t lanes, uint16_t* buffer) {
    const uint16_t* const data = static_cast<const uint16_t*>(x.data);
    if (rows.one_head && rows.n == lanes && count % kTwoTiles == 0)
        return {data + x.at(batch, rows.head[0], rows.row[0]), nullptr, x.row};
    const int64_t width = padded(count), stride = half_stride(width);
    for (int64_t r = 0; r < lanes; ++r)
        copy_row(r < rows.n ? data + x.at(batch, rows.head[r], rows.row[r]) : nullptr, r < rows.n ? count : 0, width,
                 buffer + r * stride);
    return {buffer, nullptr, stride};
}

// Whether scores are the products times a factor above 0, and no more.
bool plain(const Problem& p) {
    return p.scale > 0 && plain_scores<float>(p);
}

// Masks, to the scores of rows from .. to - 1 of one source.
void add_mask(const View& mask, int64_t batch, const Rows& rows, int64_t from, int64_t to, int64_t count, float* scores,
              int64_t stride) {
    dispatch_mask(mask, [&](auto* kind) MMFAST_LAMBDA {
        using From = std::remove_pointer_t<decltype(kind)>;
        for (int64_t r = from; r < to; ++r) {
            const From* const row = static_cast<const From*>(mask.data) + mask.at(batch, rows.head[r], rows.row[r]);
            for (int64_t k = 0; k < count; k += kLanes) {
                Floats added;
                if (mask.column == 1) {
                    added = load_columns<float>(row + k, count - k);
                } else {
                    alignas(64) float part[kLanes] = {};
                    for (int64_t i = 0; i < smaller(kLanes, count - k); ++i)
                        part[i] = float(row[(k + i) * mask.column]);
                    added = Simd<float>::load(part);
                }
                float* const at = scores + r * stride + k;
                Simd<float>::store(at, masked<float>(Simd<float>::load(at), added));
            }
        }
    });
}

// Scores of rows from .. to - 1 in place of the products, where they are not plain.
void finish_scores(const Problem& p, int64_t batch, const Rows& rows, int64_t from, int64_t to, const Places& places,
                   float* scores, int64_t stride) {
    const float factor = float(p.scale * kLog2e);
    to = smaller(to, rows.n);
    for (int64_t r = from; r < to; ++r)
        for (int64_t k = 0; k < places.total; k += kLanes) {
            float* const at = scores + r * stride + k;
            const Floats none = Simd<float>::load(places.none + k);
            Simd<float>::store(at, none == 0 ? Simd<float>::load(at) * factor : none);
        }
    for (int j = 0; j < p.count; ++j) {
        float* const first = scores + places.first[j];
        for (const View& mask : p.sources[j].added)
            if (mask.data) add_mask(mask, batch, rows, from, to, places.count[j], first, stride);
        for (int64_t r = from; p.causal && r < to; ++r)
            for (int64_t k = rows.row[r] + 1; k < places.count[j]; ++k) first[r * stride + k] = -infinity<float>();
    }
}

// Scores of `count` rows from `from` on, before finish_scores().
template <class F>
void multiply_scores(MatrixUnit& unit, const Problem& p, int64_t from, int64_t count, const Left& queries,
                     const uint32_t* keys, const Places& places, float* scores, int64_t stride, F&& between) {
    multiply(unit, count, padded(p.dim), places.total, {queries.high + from * queries.stride, nullptr, queries.stride},
             {keys, nullptr, stride}, {scores + from * stride, stride, plain(p) ? places.none : nullptr, 0}, between);
}

// Lane i is f over the lanes of x[i], of `kLanes` vectors.
template <int kSide, class F, size_t... K>
MMFAST_INLINE Floats fold_sides(Floats a, Floats b, const F& f, std::index_sequence<K...>) {
    constexpr size_t n = kSide;
    return f(__builtin_shufflevector(a, b, (K / (2 * n) * 2 * n + K % n + K / n % 2 * kLanes)...),
             __builtin_shufflevector(a, b, (K / (2 * n) * 2 * n + K % n + K / n % 2 * kLanes + n)...));
}
template <int kSide = 1, class F>
MMFAST_INLINE Floats fold(Floats* x, const F& f) {
    if constexpr (kSide == kLanes) {
        return x[0];
    } else {
        for (int i = 0; i < kLanes / kSide / 2; ++i)
            x[i] = fold_sides<kSide>(x[2 * i], x[2 * i + 1], f, std::make_index_sequence<kLanes>());
        return fold<2 * kSide>(x, f);
    }
}

// f<kBoth>(tile, first column, word) for each pair of vectors of a row: of a tile, and if kBoth of the next one.
template <class F>
MMFAST_INLINE void for_pairs(int64_t total, const F& f) {
    int64_t k = 0;
    for (; k + kTile < total; k += kTwoTiles)
#pragma GCC unroll 2
        for (int64_t l = 0; l < kTile; l += kLanes) f.template operator()<true>(k / kTile, k + l, k / 2 + l);
    for (int64_t l = 0; k < total && l < kTile; l += kLanes) f.template operator()<false>(k / kTile, k + l, k / 2 + l);
}

// Rows first .. last - 1 of x, as far as there are queries, times factor[row] or as they are.
void put_rows(const float* x, int64_t stride, int64_t count, const float* factor, int64_t batch, const Rows& rows,
              int64_t first, int64_t last, const Target& to, int64_t offset, bool add) {
    last = smaller(last, rows.n);
    const auto put = [&](auto* kind) MMFAST_LAMBDA {
        using To = std::remove_pointer_t<decltype(kind)>;
        for (int64_t r = first; r < last; ++r) {
            To* const at = static_cast<To*>(to.data) + offset + to.at(batch, rows.head[r], rows.row[r]);
            const Floats f = Simd<float>::splat(factor ? factor[r] : 1.0f);
            for (int64_t k = 0; k < count; k += kLanes) {
                Floats part = f * Simd<float>::load(x + r * stride + k);
                if (add) part += load_as<float>(at + k, count - k);
#if defined(__AVX512BF16__)
                if constexpr (std::is_same_v<To, BFloat16>) {
                    const __mmask16 some = count - k >= kLanes ? 0xffff : __mmask16((1u << (count - k)) - 1);
                    _mm256_mask_storeu_epi16(at + k, some, (__m256i)_mm512_cvtneps_pbh((__m512)part));
                    continue;
                }
#endif
                store_as<float>(at + k, part, count - k);
            }
        }
    };
    dispatch<float>(to.type, put);
}

// ---- Forward -------------------------------------------------------------------------------------------------------

struct ForwardBuffers {
    uint16_t *rows, *queries;  // rows of a head's keys or values; queries
    float *scores, *out;       // [query][key]: P in halves, in the end; [query][feature]
    uint32_t *keys, *values;   // of each head: [pair of features][key], [pair of keys][feature]
    int64_t keys_size, values_size;
    int64_t key_stride, value_stride;
};

int64_t lay_out(const Problem& p, int64_t heads, float* scratch, ForwardBuffers& b) {
    const int64_t n = most_keys(p), dim = padded(p.dim), value_dim = padded(p.value_dim);
    Pieces pieces(scratch);
    b.key_stride = row_stride(n);
    b.value_stride = row_stride(to_tiles(p.value_dim));
    b.keys_size = dim / 2 * b.key_stride;
    b.values_size = n / 2 * b.value_stride;
    pieces.take(b.rows, n * half_stride(larger(dim, value_dim)));
    pieces.take(b.queries, kRows * half_stride(dim));
    pieces.take(b.scores, kRows * b.key_stride);
    pieces.take(b.out, kRows * b.value_stride);
    pieces.take(b.keys, heads * b.keys_size);
    pieces.take(b.values, heads * b.values_size);
    return pieces.taken();
}

int64_t forward_scratch(const Problem& p, int64_t heads) {
    ForwardBuffers b;
    return lay_out(p, heads, nullptr, b);
}

// Of the rows of a panel.
struct Softmax {
    alignas(64) float maximum[kRows];
    alignas(64) float sum[kRows];
    alignas(64) float shift[kRows];
    alignas(64) float gate[kRows];  // in the end divided by the sum
};

// The softmaxes of a panel.
struct Softmaxes {
    const Problem& p;
    const Places& places;
    const ForwardBuffers& b;
    float factor;
    Softmax of[kMostSources];
    Floats sums[kMostSources][kLanes];  // of rows under way

    // Nothing is cleared: it would take longer than a product.
    Softmaxes(const Problem& problem, const Places& at, const ForwardBuffers& buffers, float by)
        : p(problem), places(at), b(buffers), factor(by) {}

    int64_t first(int m) const { return p.decoupled ? places.first[m] : 0; }
    int64_t last(int m) const { return p.decoupled ? places.first[m + 1] : places.total; }

    void find_maxima(int64_t from, int64_t to) {
        const auto max = [](Floats a, Floats b) MMFAST_LAMBDA { return Simd<float>::max(a, b); };
        for (int m = 0; m < p.softmaxes(); ++m)
            for (int64_t r = from; r < to; r += kLanes) {
                Floats largest[kLanes];
                for (int64_t i = 0; i < kLanes; ++i) largest[i] = Simd<float>::splat(-infinity<float>());
                for (int64_t k = first(m); k < last(m); k += kLanes)
#pragma GCC unroll 16
                    for (int64_t i = 0; i < kLanes; ++i)
                        largest[i] = max(Simd<float>::load(b.scores + (r + i) * b.key_stride + k), largest[i]);
                const Floats maximum = fold(largest, max) * factor;
                Simd<float>::store(of[m].maximum + r, maximum);
                Simd<float>::store(of[m].shift + r, maximum == -infinity<float>() ? Floats{} : maximum);
            }
    }
    // One softmax: P times their sum, in halves.
    void weigh(int64_t from, int64_t to) {
        const int64_t total = places.total;
        const float by = factor;
        for (int64_t r = from; r < to; ++r) {
            float* const scores = b.scores + r * b.key_stride;
            const Floats shift = Simd<float>::splat(of[0].shift[r]);
            Floats sum{};
            const auto half = [&](int64_t k) MMFAST_LAMBDA {
                const Floats e = mmfast::exp2(Simd<float>::load(scores + k) * by - shift);
                sum += e;
                return split<true>(e);
            };
            for_pairs(total, [&]<bool kBoth>(int64_t, int64_t k, int64_t) MMFAST_LAMBDA {
                const Halves first = half(k);
                put_in_place(scores + k, first, kBoth ? half(k + kTile) : Halves{});
            });
            sums[0][r % kLanes] = sum;
            if (r % kLanes == kLanes - 1) add_up(r - r % kLanes, 0);
        }
    }
    // Several: exponentials in place, and their sums; when those of kLanes rows are known, gate P in halves.
    void weigh_gated(int64_t from, int64_t to) {
        const float by = factor;
        for (int64_t r = from; r < to; ++r) {
            float* const scores = b.scores + r * b.key_stride;
            for (int m = 0, count = p.count; m < count; ++m) {
                const Floats shift = Simd<float>::splat(of[m].shift[r]);
                Floats sum{};
                for (int64_t k = first(m), end = last(m); k < end; k += kLanes) {
                    const Floats e = mmfast::exp2(Simd<float>::load(scores + k) * by - shift);
                    sum += e;
                    Simd<float>::store(scores + k, e);
                }
                sums[m][r % kLanes] = sum;
            }
            if (r % kLanes < kLanes - 1) continue;
            const int64_t group = r - r % kLanes;
            for (int m = 0; m < p.count; ++m) add_up(group, m);
            for (int64_t i = group; i <= r; ++i) apply_gates(i);
        }
    }

private:
    // In the place of the vectors that they were.
    static MMFAST_INLINE void put_in_place(float* to, const Halves& first, const Halves& second) {
        uint32_t* const words = reinterpret_cast<uint32_t*>(to);
        put_pairs(words, words + kTile, first, second);
    }
    void add_up(int64_t r, int m) {
        const Floats sum = fold(sums[m], [](Floats a, Floats b) MMFAST_LAMBDA { return a + b; });
        const Floats gate = Simd<float>::load(of[m].gate + r);
        Simd<float>::store(of[m].sum + r, sum);
        Simd<float>::store(of[m].gate + r, sum == 0 ? Floats{} : gate / sum);
    }
    void apply_gates(int64_t r) {
        float* const scores = b.scores + r * b.key_stride;
        const auto half = [&](int64_t tile, int64_t k) MMFAST_LAMBDA {
            return split<false>(Simd<float>::load(scores + k) * of[places.source[tile]].gate[r]);
        };
        for_pairs(places.total, [&]<bool kBoth>(int64_t tile, int64_t k, int64_t) MMFAST_LAMBDA {
            put_in_place(scores + k, half(tile, k), kBoth ? half(tile + 1, k + kTile) : Halves{});
        });
    }
};

void forward_panel(MatrixUnit& unit, const ForwardJob<float>& job, int64_t head, const Item& item, const Rows& rows,
                   const Places& places, const ForwardBuffers& b, Ahead& ahead) {
    const Problem& p = *job.problem;
    const bool is_plain = plain(p);
    const int64_t lanes = padded(rows.n), half = smaller(lanes, kHalf), depth = padded(places.total);
    const int64_t score_calls = product_calls(half, padded(p.dim), places.total);
    const int64_t output_calls = product_calls(half, depth, to_tiles(p.value_dim));
    const Left queries = panel_rows(p.query, item.batch, rows, p.dim, lanes, b.queries);
    const uint32_t* const keys = b.keys + head * b.keys_size;
    const uint32_t* const values = b.values + head * b.values_size;
    Softmaxes softmaxes(p, places, b, is_plain ? float(p.scale * kLog2e) : 1.0f);
    for (int m = 0; m < p.softmaxes(); ++m) {
        if (p.decoupled) gates_of(p.sources[m], item.batch, rows, softmaxes.of[m].gate);
        else
            for (float& gate : softmaxes.of[m].gate) gate = 1;
    }
    const auto scores = [&](int64_t from, auto&& between) {
        multiply_scores(unit, p, from, half, queries, keys, places, b.scores, b.key_stride, between);
        if (!is_plain) finish_scores(p, item.batch, rows, from, from + half, places, b.scores, b.key_stride);
        softmaxes.find_maxima(from, from + half);
    };
    const auto outputs = [&](int64_t from, auto&& between) {
        const auto* const halves = reinterpret_cast<const uint16_t*>(b.scores + from * b.key_stride);
        multiply(unit, half, depth, to_tiles(p.value_dim), {halves, halves + kTwoTiles, 2 * b.key_stride, 2},
                 {values, nullptr, b.value_stride}, {b.out + from * b.value_stride, b.value_stride, nullptr, 0},
                 between);
    };
    int64_t begin = 0;
    const auto weigh = [&](int64_t from, int64_t to) {
        if (p.decoupled) softmaxes.weigh_gated(begin + from, begin + to);
        else softmaxes.weigh(begin + from, begin + to);
    };
    ahead.spread(score_calls);
    scores(0, ahead);
    Spread first(half, half < lanes ? score_calls : 1, weigh);
    if (half < lanes) scores(half, first);
    first.rest();
    begin = half;
    Spread second(lanes - half, output_calls, weigh);
    outputs(0, second);
    second.rest();
    const auto put = [&](int64_t from, int64_t to) {
        put_rows(b.out, b.value_stride, p.value_dim, p.decoupled ? nullptr : softmaxes.of[0].gate, item.batch, rows,
                 from, to, job.out, 0, false);
    };
    Spread finished(half, output_calls, put);
    if (half < lanes) outputs(half, finished);
    finished.rest();
    put(half, lanes);
    for (int m = 0; m < p.softmaxes(); ++m) {
        alignas(64) float factor[kRows];
        Running<float, kPanelWidth> running;
        for (int v = 0; v < kPanelWidth; ++v) {
            running.maximum[v] = Simd<float>::load(softmaxes.of[m].maximum + v * kLanes);
            running.sum[v] = Simd<float>::load(softmaxes.of[m].sum + v * kLanes);
        }
        finish<float, kPanelWidth>(job, item, rows, m, running, factor);
    }
}

// As forward() of fusion_forward.cpp: see [Heads of an item] there.
void forward(const ForwardJob<float>& job, const Item& item, float* scratch) {
    const Problem& p = *job.problem;
    const bool together = item.panels > 1;
    ForwardBuffers b;
    lay_out(p, together ? item.heads : 1, scratch, b);
    Places places;
    set_places(p, item.batch, places);
    MatrixUnit unit;
    Ahead ahead;
    const auto keep = [&](int64_t h, int64_t at) {
        const int64_t head = item.head + h * job.fold, dim = padded(p.dim), value_dim = padded(p.value_dim);
        copy_keys(p, false, item.batch, head, places, b.rows);
        pair_columns(b.rows, half_stride(dim), dim, places.total, b.keys + at * b.keys_size, b.key_stride);
        copy_keys(p, true, item.batch, head, places, b.rows);
        pair_rows(b.rows, half_stride(value_dim), to_tiles(p.value_dim), places.total, b.values + at * b.values_size,
                  b.value_stride);
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
            forward_panel(unit, job, together ? h : 0, item, rows, places, b, ahead);
        }
}

// ---- Backward ------------------------------------------------------------------------------------------------------

struct BackwardBuffers {
    uint16_t *rows, *query_rows, *grad_rows;  // rows of a head's keys or values; queries and gradients of the output
    uint16_t *query_columns, *grad_columns;   // [feature][query]
    // [query][key] of P and dP, then halves of pairs of rows, those of dS in the place of dP; [query][feature].
    float *p, *dp, *dq;
    uint32_t *ds_row_high, *ds_row_low;  // [query][pair of keys]
    float* block;                        // gradients of 16 keys
    // Of each head: [pair of features][key] of keys and values, [pair of keys][feature] of keys, [feature][key] of sums.
    uint32_t *keys, *values, *key_pairs;
    float *dk, *dv;
    int64_t keys_size, values_size, key_pairs_size, dk_size, dv_size;
    int64_t key_stride, pair_stride, dim_stride;
    MMFAST_INLINE BackwardBuffers of_head(int64_t h) const {
        BackwardBuffers b = *this;
        b.keys += h * keys_size;
        b.values += h * values_size;
        b.key_pairs += h * key_pairs_size;
        b.dk += h * dk_size;
        b.dv += h * dv_size;
        return b;
    }
};

constexpr int64_t kQueryStride = half_stride(kRows);

int64_t lay_out(const Problem& p, int64_t heads, float* scratch, BackwardBuffers& b) {
    const int64_t n = most_keys(p), dim = padded(p.dim), value_dim = padded(p.value_dim);
    Pieces pieces(scratch);
    b.key_stride = row_stride(n);
    b.pair_stride = row_stride(n / 2);
    b.dim_stride = row_stride(to_tiles(p.dim));
    pieces.take(b.rows, n * half_stride(larger(dim, value_dim)));
    pieces.take(b.query_rows, kRows * half_stride(dim));
    pieces.take(b.grad_rows, kRows * half_stride(value_dim));
    pieces.take(b.query_columns, dim * kQueryStride);
    pieces.take(b.grad_columns, value_dim * kQueryStride);
    for (float** to : {&b.p, &b.dp}) pieces.take(*to, kRows * b.key_stride);
    pieces.take(b.dq, kRows * b.dim_stride);
    for (uint32_t** to : {&b.ds_row_high, &b.ds_row_low}) pieces.take(*to, kRows * b.pair_stride);
    pieces.take(b.block, kTile * larger(dim, value_dim));
    b.keys_size = dim / 2 * b.key_stride;
    b.values_size = value_dim / 2 * b.key_stride;
    b.key_pairs_size = n / 2 * b.dim_stride;
    b.dk_size = dim * b.key_stride;
    b.dv_size = value_dim * b.key_stride;
    pieces.take(b.keys, heads * b.keys_size);
    pieces.take(b.values, heads * b.values_size);
    pieces.take(b.key_pairs, heads * b.key_pairs_size);
    pieces.take(b.dk, heads * b.dk_size);
    pieces.take(b.dv, heads * b.dv_size);
    return pieces.taken();
}

int64_t backward_scratch(const Problem& p, int64_t heads) {
    BackwardBuffers b;
    return lay_out(p, heads, nullptr, b);
}

// Whether a gradient of any source's keys, or values, is wanted.
bool any_wanted(const Accumulator* to, int count) {
    bool result = false;
    for (int j = 0; j < count; ++j) result = result || to[j].target.data;
    return result;
}

// P and scale dS of a panel.
struct ScoreGradients {
    const Problem& p;
    const Places& places;
    const BackwardBuffers& b;
    float factor;
    bool by_query, by_key, by_value;
    Lanes<float> of[kMostSources];
    // scale dS = P (slope dP + offset)
    alignas(64) float slope[kMostSources][kRows];
    alignas(64) float offset[kMostSources][kRows];
    Floats deltas[kMostSources][kLanes], totals[kMostSources][kLanes];  // of rows under way

    ScoreGradients(const BackwardJob<float>& job, const Places& at, const BackwardBuffers& buffers, float by)
        : p(*job.problem), places(at), b(buffers), factor(by), by_query(job.query.target.data),
          by_key(any_wanted(job.key, p.count)), by_value(any_wanted(job.value, p.count)) {}

    // P in place of the scores, and delta.
    void weigh(int64_t from, int64_t to) {
        const float by = factor;
        const int softmaxes = p.softmaxes();
        for (int64_t r = from; r < to; ++r) {
            float* const scores = b.p + r * b.key_stride;
            const float* const dp = b.dp + r * b.key_stride;
            for (int m = 0; m < softmaxes; ++m) {
                const int64_t end = p.decoupled ? places.first[m + 1] : places.total;
                const Floats lse = Simd<float>::splat(of[m].lse[r]);
                Floats delta{}, total{};
                for (int64_t k = p.decoupled ? places.first[m] : 0; k < end; k += kLanes) {
                    const Floats e = mmfast::exp2(Simd<float>::load(scores + k) * by - lse);
                    delta += e * Simd<float>::load(dp + k);
                    total += e;
                    Simd<float>::store(scores + k, e);
                }
                deltas[m][r % kLanes] = delta;
                totals[m][r % kLanes] = total;
            }
            if (r % kLanes == kLanes - 1)
                for (int m = 0; m < softmaxes; ++m) add_up(r - r % kLanes, m);
        }
    }
    // Rows in pairs.
    void differentiate(int64_t from, int64_t to) {
        for (int64_t r = from; r < to; r += 2) {
            if (p.decoupled) differentiate_pair<true>(r);
            else differentiate_pair<false>(r);
        }
    }

private:
    // delta as set_delta() says.
    void add_up(int64_t r, int m) {
        const auto plus = [](Floats a, Floats b) MMFAST_LAMBDA { return a + b; };
        const Floats total = fold(totals[m], plus), sum = fold(deltas[m], plus);
        const Floats delta = total == 0 ? Floats{} : sum / total;
        const Floats gate = Simd<float>::load(of[m].gate + r), grad_lse = Simd<float>::load(of[m].grad_lse + r);
        Simd<float>::store(of[m].delta + r, delta);
        Simd<float>::store(slope[m] + r, gate * float(p.scale));
        Simd<float>::store(offset[m] + r, (grad_lse - gate * delta) * float(p.scale));
    }
    template <bool kGated>
    void differentiate_pair(int64_t r) {
        const int64_t stride = b.key_stride, pair_stride = b.pair_stride;
        float *const weights = b.p + r * stride, *const dp = b.dp + r * stride;
        uint32_t *const row_high = b.ds_row_high + r * pair_stride, *const row_low = b.ds_row_low + r * pair_stride;
        const bool query = by_query, key = by_key, value = by_value;
        for_pairs(places.total, [&]<bool kBoth>(int64_t tile, int64_t k, int64_t word) MMFAST_LAMBDA {
            // Of two rows, whose halves are put side by side; those of dS are given back.
            struct Two {
                Halves row[2];
            };
            const auto of_tile = [&](int64_t m, int64_t at) MMFAST_LAMBDA {
                const auto row = [&](const float* x, int i)
                                     MMFAST_LAMBDA { return Simd<float>::load(x + i * stride + at); };
                const auto put = [&](float* to, const Halves& upper, const Halves& lower) MMFAST_LAMBDA {
                    uint32_t* const words = reinterpret_cast<uint32_t*>(to + at);
                    put_pairs(words, words + stride, upper, lower);
                };
                const Floats e[] = {row(weights, 0), row(weights, 1)};
                const auto ds = [&](int i) MMFAST_LAMBDA {
                    return split<false>(e[i] * (row(dp, i) * slope[m][r + i] + offset[m][r + i]));
                };
                const auto gated = [&](int i) MMFAST_LAMBDA {
                    return split<!kGated>(kGated ? e[i] * of[m].gate[r + i] : e[i]);
                };
                const Two result{{ds(0), ds(1)}};
                if (value) put(weights, gated(0), gated(1));
                if (key) put(dp, result.row[0], result.row[1]);
                return result;
            };
            const Two first = of_tile(kGated ? places.source[tile] : 0, k);
            const Two second = kBoth ? of_tile(kGated ? places.source[tile + 1] : 0, k + kTile) : Two{};
            if (!query) return;
            put_pairs(row_high + word, row_low + word, first.row[0], second.row[0]);
            put_pairs(row_high + pair_stride + word, row_low + pair_stride + word, first.row[1], second.row[1]);
        });
    }
};

void backward_panel(MatrixUnit& unit, const BackwardJob<float>& job, const BackwardItem& item, const Rows& rows,
                    const Places& places, const BackwardBuffers& b, Ahead& ahead) {
    const Problem& p = *job.problem;
    const bool is_plain = plain(p);
    const int64_t lanes = padded(rows.n), half = smaller(lanes, kHalf);
    const int64_t dim = padded(p.dim), value_dim = padded(p.value_dim), total = places.total, depth = padded(total);
    const Left queries = panel_rows(p.query, item.batch, rows, p.dim, lanes, b.query_rows);
    const Left grads = panel_rows(job.grad_out, item.batch, rows, p.value_dim, lanes, b.grad_rows);
    ScoreGradients of(job, places, b, is_plain ? float(p.scale * kLog2e) : 1.0f);
    for (int m = 0; m < p.softmaxes(); ++m) set_lanes<float, kPanelWidth>(job, item.batch, rows, m, of.of[m]);
    const auto scores = [&](int64_t from, auto&& between) {
        multiply_scores(unit, p, from, half, queries, b.keys, places, b.p, b.key_stride, between);
        multiply(unit, half, value_dim, total, {grads.high + from * grads.stride, nullptr, grads.stride},
                 {b.values, nullptr, b.key_stride}, {b.dp + from * b.key_stride, b.key_stride, nullptr, 0}, between);
        if (!is_plain) finish_scores(p, item.batch, rows, from, from + half, places, b.p, b.key_stride);
    };
    const auto by_query = [&](int64_t from, auto&& between) {
        const int64_t at = from * b.pair_stride;
        multiply(unit, half, depth, to_tiles(p.dim),
                 {reinterpret_cast<const uint16_t*>(b.ds_row_high + at),
                  reinterpret_cast<const uint16_t*>(b.ds_row_low + at), 2 * b.pair_stride},
                 {b.key_pairs, nullptr, b.dim_stride}, {b.dq + from * b.dim_stride, b.dim_stride, nullptr, 0}, between);
    };
    // Sums over the queries.
    const auto add = [&](int64_t width, const uint16_t* columns, const float* pairs, float* sums, auto&& between) {
        const auto* const words = reinterpret_cast<const uint32_t*>(pairs);
        multiply(unit, to_tiles(width), lanes, total, {columns, nullptr, kQueryStride},
                 {words, words + b.key_stride, 2 * b.key_stride}, {sums, b.key_stride, sums, b.key_stride}, between);
    };
    const auto weigh = [&](int64_t from, int64_t to) { of.weigh(from, to); };
    const int64_t calls = product_calls(half, dim, total) + product_calls(half, value_dim, total);
    ahead.spread(calls);
    scores(0, ahead);
    Spread first(half, half < lanes ? calls : 1, weigh);
    if (half < lanes) scores(half, first);
    first.rest();
    of.differentiate(0, half);
    const auto finish_second = [&](int64_t from, int64_t to) {
        // The sums of a group of rows are complete when its last row is.
        for (int64_t i = from; i < to; ++i) {
            const int64_t group = half + i * kLanes;
            of.weigh(group, group + kLanes);
            of.differentiate(group, group + kLanes);
        }
    };
    const int64_t query_calls = product_calls(half, depth, to_tiles(p.dim));
    Spread second((lanes - half) / kLanes, query_calls, finish_second);
    if (of.by_query) by_query(0, second);
    second.rest();
    // What the sums need, and what is left to write, beside products that need neither.
    const auto query_columns = [&](int64_t from, int64_t to) {
        transpose_rows(queries.high, queries.stride, dim, from, to, b.query_columns, kQueryStride);
    };
    const auto grad_columns = [&](int64_t from, int64_t to) {
        transpose_rows(grads.high, grads.stride, value_dim, from, to, b.grad_columns, kQueryStride);
    };
    const auto put = [&](int64_t from, int64_t to) {
        put_rows(b.dq, b.dim_stride, p.dim, nullptr, item.batch, rows, from, to, job.query.target,
                 item.query_run * job.query.run, job.query.add);
    };
    Spread queries_turned(of.by_key ? transposed_blocks(dim, lanes) : 0, query_calls, query_columns);
    Spread grads_turned(of.by_value ? transposed_blocks(value_dim, lanes) : 0,
                        product_calls(to_tiles(p.dim), lanes, total), grad_columns);
    Spread finished(of.by_query ? rows.n : 0, product_calls(to_tiles(p.value_dim), lanes, total), put);
    if (of.by_query && half < lanes) by_query(half, queries_turned);
    queries_turned.rest();
    if (of.by_key) add(p.dim, b.query_columns, b.dp, b.dk, grads_turned);
    grads_turned.rest();
    if (of.by_value) add(p.value_dim, b.grad_columns, b.p, b.dv, finished);
    finished.rest();
    for (int m = 0; job.grad_gates && m < p.softmaxes(); ++m)
        scatter(p, of.of[m].delta, item.batch, rows, job.grad_gates + m * p.batch * p.heads * p.rows);
}

void begin_head(const Problem& p, const BackwardItem& item, const Places& places, const BackwardBuffers& b) {
    const int64_t dim = padded(p.dim), value_dim = padded(p.value_dim), total = places.total;
    copy_keys(p, true, item.batch, item.head, places, b.rows);
    pair_columns(b.rows, half_stride(value_dim), value_dim, total, b.values, b.key_stride);
    copy_keys(p, false, item.batch, item.head, places, b.rows);
    pair_columns(b.rows, half_stride(dim), dim, total, b.keys, b.key_stride);
    pair_rows(b.rows, half_stride(dim), to_tiles(p.dim), total, b.key_pairs, b.dim_stride);
    clear(b.dk, b.dk_size);
    clear(b.dv, b.dv_size);
}

void end_head(const BackwardJob<float>& job, const BackwardItem& item, const Places& places, const BackwardBuffers& b) {
    const Problem& p = *job.problem;
    const auto end = [&](int j, const Accumulator& to, int64_t run, int64_t width, const float* sums) {
        if (!to.target.data) return;
        const int64_t there = places.count[j], head = key_head(p, j, item.head), stride = to_tiles(width);
        for (int64_t k = 0; k < there; k += kTile) {
            for (int64_t l = 0; l < kTile; l += kLanes)
                for (int64_t e = 0; e < stride; e += kLanes) {
                    Floats x[kLanes];
                    for (int64_t i = 0; i < kLanes; ++i)
                        x[i] = Simd<float>::load(sums + (e + i) * b.key_stride + places.first[j] + k + l);
                    Simd<float>::transpose(x);
                    for (int64_t i = 0; i < kLanes; ++i) Simd<float>::store(b.block + (l + i) * stride + e, x[i]);
                }
            flush<float>(to, run, item.batch, head, k, smaller(kTile, there - k), width, b.block, stride);
        }
        clear(b.block, stride);
        flush<float>(to, run, item.batch, head, there, p.sources[j].keys - there, width, b.block, 0);
    };
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
    Places places;
    set_places(p, item.batch, places);
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
        backward_panel(unit, job, now, rows, places, b, ahead);
    };
    if (together) {
        for (int64_t h = 0; h < item.heads; ++h) {
            const BackwardBuffers b = head(h);
            begin_head(p, now, places, b);
        }
        for (int64_t i = 0; i < item.panels; ++i)
            for (int64_t h = 0; h < item.heads; ++h) panel(i, h);
        for (int64_t h = 0; h < item.heads; ++h) {
            const BackwardBuffers b = head(h);
            end_head(job, now, places, b);
        }
        return;
    }
    for (int64_t h = 0; h < item.heads; ++h) {
        const BackwardBuffers b = head(h);
        begin_head(p, now, places, b);
        if (item.panels) panel(0, h);
        head(h);
        end_head(job, now, places, b);
    }
}

}  // namespace

void matrix_kernels_float(MatrixKernels& kernels) {
    kernels.panel = kRows;
    kernels.forward_scratch = forward_scratch;
    kernels.forward = forward;
    kernels.backward_scratch = backward_scratch;
    kernels.backward = backward;
}

}  // namespace MMFAST_ISA
}  // namespace fusion
}  // namespace mmfast
