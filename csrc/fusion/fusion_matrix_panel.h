// What the passes of a panel share on the matrix unit: where keys lie, scores and rows of results. For fusion_matrix.cpp.
#pragma once

#include <utility>

#include "fusion/fusion_matrix_product.h"

namespace mmfast {
namespace fusion {
namespace MMFAST_ISA {
namespace {

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

// Where the keys of the sources lie, or some of them: each source begins a tile.
struct Places {
    int64_t first[kMostSources + 1], count[kMostSources];
    int64_t key[kMostSources],
        all[kMostSources];  // the first of the source; how many there are, those beyond its length too
    int64_t total;
    bool full;                                   // no tile holds anything but keys
    int8_t source[kMostTiles];                   // of a tile
    alignas(64) float none[kMostTiles * kTile];  // to be added to scores: -inf where there is no key
};

// Keys with each source's filled up to whole tiles; only those within its length, or all.
int64_t tiled_keys(const Problem& p, int64_t batch, bool existing) {
    int64_t total = 0;
    for (int j = 0; j < p.count; ++j) total += to_tiles(existing ? p.sources[j].length(batch) : p.sources[j].keys);
    return total;
}

// f(source, first key, number) of what lies from the place `from` to `to` when they are counted as tiled_keys() does.
template <class F>
void for_tiles(const Problem& p, int64_t batch, bool existing, int64_t from, int64_t to, const F& f) {
    int64_t start = 0;
    for (int j = 0; j < p.count; ++j) {
        const int64_t keys = existing ? p.sources[j].length(batch) : p.sources[j].keys;
        const int64_t first = larger(from - start, 0), last = smaller(to - start, keys);
        if (first < last) f(j, first, last - first);
        start += to_tiles(keys);
    }
}

void set_places(const Problem& p, int64_t batch, bool existing, int64_t from, int64_t to, Places& places) {
    for (int j = 0; j < p.count; ++j) places.key[j] = places.all[j] = 0;
    for_tiles(p, batch, existing, from, to, [&](int j, int64_t first, int64_t count) {
        places.key[j] = first;
        places.all[j] = count;
    });
    places.first[0] = 0;
    places.full = true;
    for (int j = 0; j < p.count; ++j) {
        const int64_t count = larger(0, smaller(places.all[j], p.sources[j].length(batch) - places.key[j]));
        const int64_t first = places.first[j], next = first + to_tiles(count);
        places.count[j] = count;
        places.first[j + 1] = next;
        places.full = places.full && next == first + count;
        for (int64_t k = first; k < next; k += kTile) places.source[k / kTile] = int8_t(j);
        for (int64_t k = first; k < first + count; k += kLanes) Simd<float>::store(places.none + k, Floats{});
        for (int64_t k = first + count; k < next; ++k) places.none[k] = -infinity<float>();
    }
    places.total = places.first[p.count];
}

// Whether a query up to the row `last` sees any of them by the causal rule.
bool seen(const Problem& p, int64_t batch, int64_t from, int64_t to, int64_t last) {
    bool result = false;
    for_tiles(p, batch, true, from, to, [&](int, int64_t first, int64_t) { result = result || first <= last; });
    return result;
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
        const uint16_t* const from =
            static_cast<const uint16_t*>(x.data) + x.at(batch, key_head(p, j, head), places.key[j]);
        const int64_t there = places.count[j], all = places.first[j + 1] - places.first[j];
        copy_rows(from, x.row, there, count, width, to, stride);
        copy_rows(from, 0, all - there, 0, width, to + there * stride, stride);
        to += all * stride;
    }
}

// Keys or values of one head: where they lie if nothing is to be filled up with zeros, or copied.
Left key_rows(const Problem& p, bool values, int64_t batch, int64_t head, const Places& places, uint16_t* buffer) {
    const int64_t width = values ? p.value_dim : p.dim;
    for (int j = 0; j < p.count && width % kTwoTiles == 0; ++j) {
        const View& x = values ? p.sources[j].value : p.sources[j].key;
        if (places.count[j] == places.total)
            return {static_cast<const uint16_t*>(x.data) + x.at(batch, key_head(p, j, head), places.key[j]), x.row};
    }
    copy_keys(p, values, batch, head, places, buffer);
    return {buffer, half_stride(padded(width))};
}

// What is wanted soon of a head's keys and values, counted as for_tiles() does.
void keys_ahead(const Problem& p, int64_t batch, int64_t head, bool existing, int64_t from, int64_t to, Ahead& ahead) {
    for_tiles(p, batch, existing, from, to, [&](int j, int64_t first, int64_t count) {
        const View &key = p.sources[j].key, &value = p.sources[j].value;
        ahead.add(key, batch, key_head(p, j, head), first, count, p.dim);
        ahead.add(value, batch, key_head(p, j, head), first, count, p.value_dim);
    });
}

// Whether a head's keys and values are to be asked for while the head before is worked on: they are more than what caches keep from
// who made them to here. Else to ask takes longer than to wait.
bool keys_are_far(const Problem& p) {
    constexpr int64_t kNear = 8 << 20;
    int64_t bytes = 0;
    for (int j = 0; j < p.count; ++j)
        bytes += p.batch * p.sources[j].heads * p.sources[j].keys * (p.dim + p.value_dim) * int64_t(sizeof(uint16_t));
    return bytes > kNear;
}

// The queries first .. last - 1 of x, zeros where there are no more: where they lie or in `buffer`. So many columns of them
// are `read`, zeros from the `count`-th on.
Left panel_rows(const View& x, int64_t batch, const Rows& rows, int64_t count, int64_t read, int64_t first,
                int64_t last, uint16_t* buffer) {
    const uint16_t* const data = static_cast<const uint16_t*>(x.data);
    const int64_t width = padded(count), stride = half_stride(width);
    if (rows.one_head && last <= rows.n) {
        const uint16_t* const from = data + x.at(batch, rows.head[0], rows.row[0]) + first * x.row;
        if (read == count) return {from, x.row};
        copy_rows(from, x.row, last - first, count, width, buffer, stride);
        return {buffer, stride};
    }
    for (int64_t r = first; r < last; ++r) {
        const bool there = r < rows.n;
        copy_rows(there ? data + x.at(batch, rows.head[r], rows.row[r]) : data, 0, 1, there ? count : 0, width,
                  buffer + (r - first) * stride, stride);
    }
    return {buffer, stride};
}

// Whether scores are the products times a factor above 0, and no more.
bool plain(const Problem& p) {
    return p.scale > 0 && plain_scores<float>(p);
}

// Masks, to the scores of rows from .. to - 1 of one source.
void add_mask(const View& mask, int64_t batch, const Rows& rows, int64_t from, int64_t to, int64_t key, int64_t count,
              float* scores, int64_t stride) {
    dispatch_mask(mask, [&](auto* kind) MMFAST_LAMBDA {
        using From = std::remove_pointer_t<decltype(kind)>;
        for (int64_t r = from; r < to; ++r) {
            const From* const row =
                static_cast<const From*>(mask.data) + mask.at(batch, rows.head[r], rows.row[r]) + key * mask.column;
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
            if (mask.data) add_mask(mask, batch, rows, from, to, places.key[j], places.count[j], first, stride);
        for (int64_t r = from; p.causal && r < to; ++r)
            for (int64_t k = larger(0, rows.row[r] + 1 - places.key[j]); k < places.count[j]; ++k)
                first[r * stride + k] = -infinity<float>();
    }
}

// Scores of `count` rows from `from` on, of these queries, before finish_scores().
template <class F>
void multiply_scores(MatrixUnit& unit, const Problem& p, int64_t from, int64_t count, const Left& queries,
                     const Right& keys, const Places& places, float* scores, int64_t stride, F&& between) {
    multiply(unit, count, to_depth(p.dim), places.total, queries, keys,
             {scores + from * stride, stride, plain(p) && !places.full ? places.none : nullptr, 0}, between);
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

MMFAST_INLINE Floats add_up(Floats* x) {
    return fold(x, [](Floats a, Floats b) MMFAST_LAMBDA { return a + b; });
}
// Lane i is the largest of the columns first .. last - 1 of row i.
MMFAST_INLINE Floats largest_of_rows(const float* rows, int64_t stride, int64_t first, int64_t last) {
    const auto max = [](Floats a, Floats b) MMFAST_LAMBDA { return Simd<float>::max(a, b); };
    Floats largest[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) largest[i] = Simd<float>::splat(-infinity<float>());
    for (int64_t k = first; k < last; k += kLanes)
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes; ++i) largest[i] = max(Simd<float>::load(rows + i * stride + k), largest[i]);
    return fold(largest, max);
}

// f<tiles>(first column) of each two tiles of a row, and of one that is left.
template <class F>
MMFAST_INLINE void for_tiles_of_row(int64_t total, const F& f) {
    int64_t k = 0;
    for (; k + kTile < total; k += kTwoTiles) f.template operator()<2>(k);
    if (k < total) f.template operator()<1>(k);
}
// f<kBoth>(tile, first column, word) for each pair of vectors of them: of a tile, and if kBoth of the next one.
template <class F>
MMFAST_INLINE void for_pairs(int64_t total, const F& f) {
    for_tiles_of_row(total, [&]<int kTiles>(int64_t k) MMFAST_LAMBDA {
#pragma GCC unroll 2
        for (int64_t l = 0; l < kTile; l += kLanes) f.template operator()<kTiles == 2>(k / kTile, k + l, k / 2 + l);
    });
}

// A row in bfloat16 in its place, of x(first column of a vector), with zeros up to two tiles.
template <class F>
MMFAST_INLINE void round_row(float* row, int64_t total, const F& x) {
    for_tiles_of_row(total, [&]<int kTiles>(int64_t k) MMFAST_LAMBDA {
        Floats part[kVectors];
        for (int64_t i = 0; i < kVectors; ++i) part[i] = i * kLanes < kTiles * kTile ? x(k + i * kLanes) : Floats{};
        put_rounded(reinterpret_cast<uint16_t*>(row) + k, part);
    });
}
// Such rows.
MMFAST_INLINE Left rounded_rows(const float* rows, int64_t stride) {
    return {reinterpret_cast<const uint16_t*>(rows), 2 * stride};
}

// The same of exponentials of a row of scores; their sum, lane by lane.
MMFAST_INLINE Floats exponentials_of_row(float* row, int64_t total, float by, float less) {
    const Floats shift = Simd<float>::splat(less);
    Floats sum{};
    round_row(row, total, [&](int64_t k) MMFAST_LAMBDA {
        const Floats e = mmfast::exp2(Simd<float>::load(row + k) * by - shift);
        sum += e;
        return e;
    });
    return sum;
}

// Rows first .. last - 1 of x, as far as there are queries, times factor[row] or as they are.
void put_rows(const float* x, int64_t stride, int64_t count, const float* factor, int64_t batch, const Rows& rows,
              int64_t first, int64_t last, const Target& to, int64_t offset, bool add) {
    last = smaller(last, rows.n);
    if (first >= last) return;
    const auto put = [&](auto* kind) MMFAST_LAMBDA {
        using To = std::remove_pointer_t<decltype(kind)>;
        // Column by column, as in copy_rows().
        for (int64_t k = 0; k < count; k += kLanes) {
            To* at = static_cast<To*>(to.data) + offset + k + to.at(batch, rows.head[first], rows.row[first]);
            const int64_t lanes = smaller(kLanes, count - k);
            for (int64_t r = first; r < last; ++r, at += to.row) {
                if (!rows.one_head)
                    at = static_cast<To*>(to.data) + offset + k + to.at(batch, rows.head[r], rows.row[r]);
                Floats part = Simd<float>::load(x + r * stride + k) * (factor ? factor[r] : 1.0f);
                if (add) part += load_as<float>(at, lanes);
#if defined(__AVX512BF16__)
                if constexpr (std::is_same_v<To, BFloat16>) {
                    _mm256_mask_storeu_epi16(at, __mmask16((1u << lanes) - 1),
                                             (__m256i)_mm512_cvtneps_pbh((__m512)part));
                    continue;
                }
#endif
                store_as<float>(at, part, lanes);
            }
        }
    };
    dispatch<float>(to.type, put);
}

}  // namespace
}  // namespace MMFAST_ISA
}  // namespace fusion
}  // namespace mmfast
