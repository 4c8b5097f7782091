// Products of a tile on the matrix unit: each float32 factor as a sum of two bfloat16, x = h + l to 17 bits, and
// x y = h h' + h l' + l h', summed in float32. Included by mmd_tile.cpp for the instruction set amx.
//
// Note: [Split products]
//   What is left out, l l' and the rounding of l, is some 2^-18 of the product of the magnitudes and 2^-15 at worst, which
//   shows in sums of one or two products: a squared distance of centred points is off by about 2^-17 of its norms over
//   the root of the dimension. Kernels of the distance itself, whose error is largest where it is small, compute more of
//   them again from differences (compare_again). Products of points as they are (Metric::dot) are split only where that is
//   exact: bfloat16 has no l, and float16 is h + l, with l l' as well. Of infinity and NaN l is 0, so that they come out
//   of h h'.
//
// Note: [Cost of split products]
//   16 cycles for 16 x 16 x 32 multiplications, three times: 5.3 times as many as two AVX-512 units do. A pair of vectors is split
//   in 15 instructions (AVX512_BF16, which every processor with the unit has), and 8 shuffles a vector more where points go
//   along the lanes: points are split once when they are packed, the factors of product() at each call. In what order the
//   unit meets the 32 dimensions of a step does not matter, if it is that of both factors: those 16 apart are a pair, since
//   two vectors are at hand. A vector that is put together by two stores would wait for both of them, and one that the unit has
//   just stored for that: what comes out is read a block later.
#pragma once

#include "common/amx.h"
#include "common/simd.h"
#include "mmd/mmd_tile.h"

namespace mmfast {
namespace mmd {
namespace MMFAST_ISA {
namespace {

static_assert(Simd<float>::lanes == 16, "a vector is a row of a tile");
using Floats = Simd<float>::V;
using Words = Simd<float>::U;
using Shorts = VectorOf<uint16_t, 32>::type;

constexpr int64_t kPart = kTileRows * kTileBytes / 2;  // bfloat16 values in a tile
constexpr uint32_t kHighHalf = 0xffff0000u;
constexpr uint16_t kExponents = 0x7f80;

MMFAST_INLINE Floats as_floats(Words x) {
    return Simd<float>::bits<Words, Floats>(x);
}

#if defined(MMFAST_EMULATE_AMX)
// bfloat16 in the upper halves: the nearest, ties to even.
MMFAST_INLINE Words rounded(Floats x) {
    const Words u = Simd<float>::bits<Floats, Words>(x);
    const Words nearest = (u + 0x7fffu + ((u >> 16) & 1u)) & kHighHalf;
    return x == x ? nearest : (u & kHighHalf) | 0x00400000u;
}
#else
template <size_t... K>
MMFAST_INLINE Shorts interleaved(Shorts x, std::index_sequence<K...>) {
    return __builtin_shufflevector(x, x, (K / 2 + K % 2 * 16)...);
}
#endif

// Lane by lane the pair (first, second) of bfloat16, in the order of memory.
MMFAST_INLINE Words rounded(Floats first, Floats second) {
#if defined(MMFAST_EMULATE_AMX)
    return (rounded(first) >> 16) | rounded(second);
#else
    const Shorts both = (Shorts)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);  // all of `first` before the others
    return (Words)interleaved(both, std::make_index_sequence<32>());
#endif
}

struct Halves {
    Words high, low;  // pairs
};

MMFAST_INLINE Halves split(Floats first, Floats second) {
    const Words high = rounded(first, second);
    const Words low = rounded(first - as_floats(high << 16), second - as_floats(high & kHighHalf));
    const Shorts exponents = (Shorts)high & kExponents;
    return {high, (Words)(exponents == kExponents ? Shorts{} : (Shorts)low)};
}

MMFAST_INLINE void put(uint16_t* to, Words x) {
    __builtin_memcpy(to, &x, sizeof x);
}
MMFAST_INLINE void transpose(Words (&x)[16]) {
    Floats f[16];
    for (int i = 0; i < 16; ++i) f[i] = Simd<float>::bits<Words, Floats>(x[i]);
    Simd<float>::transpose(f);
    for (int i = 0; i < 16; ++i) x[i] = Simd<float>::bits<Floats, Words>(f[i]);
}

// ---- Points --------------------------------------------------------------------------------------------------------

// Dimensions [k, k + 32) of a row of points.
MMFAST_INLINE Halves split(const float* row, int64_t k, int64_t stride) {
    return split(k < stride ? Simd<float>::load(row + k) : Floats{},
                 k + 16 < stride ? Simd<float>::load(row + k + 16) : Floats{});
}

// Rows [first, first + 16) of `to`: the high parts of the dimensions, then the low ones; zero for what is not there.
inline void split_rows(int64_t first, int64_t count, int64_t dimension, const Points<float>& to) {
    const int64_t depth = split_depth(dimension), step = split_row_stride(dimension), stride = to.stride;
    for (int64_t i = first; i < first + 16; ++i) {
        const float* const row = to.rows + (i < count ? i : 0) * stride;
        uint16_t* const here = to.split_rows + i * step;
        for (int64_t k = 0; k < depth; k += 32) {
            const Halves x = i < count ? split(row, k, stride) : Halves{};
            put(here + k, x.high);
            put(here + depth + k, x.low);
        }
    }
}

// Points [first, first + 16), a point along the lanes: for each 32 dimensions the high parts and the low ones. What has no
// point repeats the last one.
inline void split_columns(int64_t first, int64_t count, int64_t dimension, const Points<float>& to) {
    const int64_t depth = split_depth(dimension), stride = to.stride;
    for (int64_t k = 0; k < depth; k += 32) {
        Words high[16], low[16];
        for (int64_t i = 0; i < 16; ++i) {
            const Halves x = split(to.rows + (first + i < count ? first + i : count - 1) * stride, k, stride);
            high[i] = x.high;
            low[i] = x.low;
        }
        transpose(high);
        transpose(low);
        uint16_t* const tile = to.split_columns + first * 2 * depth + k / 32 * 2 * kPart;
        for (int64_t p = 0; p < 16; ++p) {
            put(tile + p * 32, high[p]);
            put(tile + kPart + p * 32, low[p]);
        }
    }
}

// Points [first, first + 16) of `count`, or none of them where they only fill a block of the products.
inline void split_points(int64_t first, int64_t count, int64_t dimension, const Points<float>& to) {
    if (to.split_rows) split_rows(first, count, dimension, to);
    if (to.split_columns) split_columns(first, count, dimension, to);
}

// ---- Products ------------------------------------------------------------------------------------------------------

// Adds up 32 x 32 products over one depth of 32; `passes` as in Points. The left factor's second tile lies 16 rows on.
MMFAST_INLINE void add_products(MatrixUnit& unit, int passes, const uint16_t* high, const uint16_t* low, int64_t step,
                                const uint16_t* first, const uint16_t* second) {
    const int64_t bytes = 2 * step;
    unit.load<4>(high, bytes);
    unit.load<5>(high + 16 * step, bytes);
    unit.load<6>(first, kTileBytes);
    unit.load<7>(second, kTileBytes);
    unit.multiply_add();
    if (passes == 1) return;
    unit.load<4>(low, bytes);
    unit.load<5>(low + 16 * step, bytes);
    unit.multiply_add();
    if (passes == 2) return;
    unit.load<6>(first + kPart, kTileBytes);
    unit.load<7>(second + kPart, kTileBytes);
    if (passes == 4) unit.multiply_add();
    unit.load<4>(high, bytes);
    unit.load<5>(high + 16 * step, bytes);
    unit.multiply_add();
}

MMFAST_INLINE void store_sums(MatrixUnit& unit, float* to, int64_t stride) {
    const int64_t bytes = 4 * stride;
    unit.store<0>(to, bytes);
    unit.store<1>(to + 16, bytes);
    unit.store<2>(to + 16 * stride, bytes);
    unit.store<3>(to + 16 * stride + 16, bytes);
    unit.fence();
}

MMFAST_INLINE void load_sums(MatrixUnit& unit, const float* from, int64_t stride) {
    const int64_t bytes = 4 * stride;
    unit.load<0>(from, bytes);
    unit.load<1>(from + 16, bytes);
    unit.load<2>(from + 16 * stride, bytes);
    unit.load<3>(from + 16 * stride + 16, bytes);
}

// Dimensions that a tile's products take before the next ones: 32 rows and 64 columns of them, 48 KiB, stay in the first cache.
constexpr int64_t kSplitDepth = 128;

// z = (if it starts) or += the products of `dimension` values; between() is called 4 x (depth / 32) times.
template <class F>
MMFAST_INLINE void multiply_split(MatrixUnit& unit, bool starts, int64_t dimension, const Points<float>& a,
                                  int64_t first, int64_t rows, const Points<float>& b, int64_t columns, float* z,
                                  const F& between) {
    const int64_t depth = split_depth(dimension), step = split_row_stride(dimension), group = 32 * depth;
    const int64_t slices = (depth + kSplitDepth - 1) / kSplitDepth, steps = depth / 32;
    for (int64_t slice = 0; slice < slices; ++slice)
        for (int64_t i = 0; i < rows; i += 32)
            for (int64_t n = 0; n < columns; n += 32) {
                // There and back, so that of two blocks in a row one factor is the same.
                const int64_t j = i % 64 == 0 || columns <= 32 ? n : 32 - n;
                float* const sums = z + i * kTile + j;
                if (starts && slice == 0) unit.zero();
                else load_sums(unit, sums, kTile);
                for (int64_t k = slice * steps / slices * 32; k < (slice + 1) * steps / slices * 32; k += 32) {
                    const uint16_t* const left = a.split_rows + (first + i) * step + k;
                    const uint16_t* const right = b.split_columns + j / 16 * group + k / 32 * 2 * kPart;
                    add_products(unit, a.passes, left, left + depth, step, right, right + group);
                    between();
                }
                store_sums(unit, sums, kTile);
            }
}

inline void compare_split(bool starts, bool ends_distance, int64_t dimension, const Points<float>& a, int64_t first,
                          int64_t rows, const Points<float>& b, int64_t columns, float* z) {
    {
        MatrixUnit unit;
        multiply_split(unit, starts, dimension, a, first, rows, b, columns, z, []() MMFAST_LAMBDA {});
    }
    if (!ends_distance) return;
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; j += 16) {
            float* const at = z + i * kTile + j;
            const Floats norms = a.norms[first + i] + Simd<float>::load(b.norms + j);
            Simd<float>::store(at, Simd<float>::max(Floats{}, norms - 2.0f * Simd<float>::load(at)));  // a NaN stays
        }
}

// Note: [Values between products]
//   The unit works beside the vectors, but a core looks ahead over 512 operations, a third of what the values of a tile take. So
//   they are computed some rows after each step of the next tile's products: of 64 x 64 pairs products take 1500 cycles at
//   D = 64 and 6100 at D = 256, the values of DAN's five Gaussians about 3800.
inline double compare_sum(const Program<float>& p, int64_t dimension, const Points<float>& a, int64_t rows,
                          const Points<float>& b) {
    static_assert(kWide * 16 == kTile && kTile % kRowsInFloat == 0);
    alignas(64) float z[2][kTile * kTile];
    const int64_t steps = split_depth(dimension) / 32 * 4, each = (kTile + steps - 1) / steps;
    float common = 0;
    Accumulator<float> all;
    Floats values{};
    struct {
        const float *z, *norms;
        int64_t row;
    } last{nullptr, nullptr, kTile};
    const auto distances = [&](int64_t row, Floats(&zs)[kWide]) MMFAST_LAMBDA {
        for (int u = 0; u < kWide; ++u) {
            const Floats norms = last.norms[row] + Simd<float>::load(b.norms + 16 * u);
            zs[u] = Simd<float>::max(Floats{}, norms - 2.0f * Simd<float>::load(last.z + row * kTile + 16 * u));
        }
    };
    const auto add_rows = [&](int64_t count) MMFAST_LAMBDA {
        const int64_t end = last.row + count < kTile ? last.row + count : kTile;
        for (; last.row < end; ++last.row) {
            Floats zs[kWide], ks[kWide], hs[kWide];
            distances(last.row, zs);
            evaluate_doubling<float, kWide, false>(p.chain[0], common, zs, ks, hs);
            for (int u = 0; u < kWide; ++u) values += ks[u];
            if (last.row % kRowsInFloat < kRowsInFloat - 1) continue;
            all.add(Wider<float>(values));
            values = Floats{};
        }
    };
    MatrixUnit unit;
    for (int64_t i = 0; i < rows; i += kTile) {
        float* const here = z[i / kTile % 2];
        multiply_split(unit, true, dimension, a, i, kTile, b, kTile, here, [&]() MMFAST_LAMBDA { add_rows(each); });
        last = {here, a.norms + i, 0};
        if (i > 0) continue;
        alignas(64) float first[kTile];
        Floats zs[kWide];
        distances(0, zs);
        for (int u = 0; u < kWide; ++u) Simd<float>::store(first + 16 * u, zs[u]);
        common = common_value<float, true>(p, first);
    }
    add_rows(kTile);
    return all.total() + double(common) * double(rows * kTile);
}

// The left factor of product(): high and low parts, kTile to a row; zero beyond `rows` and `depth`.
inline void split_left(bool transposed, int64_t rows, int64_t depth, const float* a, uint16_t* high, uint16_t* low) {
    const int64_t all_rows = (rows + 31) / 32 * 32, all_depth = (depth + 31) / 32 * 32;
    if (!transposed) {
        for (int64_t i = 0; i < all_rows; ++i)
            for (int64_t k = 0; k < all_depth; k += 32) {
                const auto some = [&](int64_t at) MMFAST_LAMBDA {
                    return i < rows && at < depth ? Simd<float>::load(a + i * kTile + at, int(depth - at)) : Floats{};
                };
                const Halves x = split(some(k), some(k + 16));
                put(high + i * kTile + k, x.high);
                put(low + i * kTile + k, x.low);
            }
        return;
    }
    for (int64_t i = 0; i < all_rows; i += 16)
        for (int64_t k = 0; k < all_depth; k += 32) {
            Words h[16], l[16];
            for (int64_t p = 0; p < 16; ++p) {
                const auto row = [&](int64_t at) MMFAST_LAMBDA {
                    return at < depth && i < rows ? Simd<float>::load(a + at * kTile + i, int(rows - i)) : Floats{};
                };
                const Halves x = split(row(k + p), row(k + 16 + p));
                h[p] = x.high;
                l[p] = x.low;
            }
            transpose(h);
            transpose(l);
            for (int64_t r = 0; r < 16; ++r) {
                put(high + (i + r) * kTile + k, h[r]);
                put(low + (i + r) * kTile + k, l[r]);
            }
        }
}

// 32 columns of the right factor: for each depth of 32 and each 16 columns the high parts, then the low ones. False if all
// of these are zero.
inline bool split_right(int64_t depth, int64_t columns, const float* b, int64_t stride, uint16_t* to) {
    Words any{};
    for (int64_t k = 0; k < depth; k += 32)
        for (int64_t c = 0; c < 32; c += 16)
            for (int64_t p = 0; p < 16; ++p) {
                const auto row = [&](int64_t at) MMFAST_LAMBDA {
                    return at < depth && c < columns ? Simd<float>::load(b + at * stride + c) : Floats{};
                };
                const Halves x = split(row(k + p), row(k + 16 + p));
                uint16_t* const tile = to + (k / 32 * 2 + c / 16) * 2 * kPart + p * 32;
                put(tile, x.high);
                put(tile + kPart, x.low);
                any |= x.low;
            }
    return !Simd<float>::all_zero(as_floats(any));
}

inline void product_split(bool transposed, int64_t rows, int64_t depth, int64_t width, const float* a, const float* b,
                          int64_t b_stride, float* c, int64_t c_stride) {
    alignas(64) uint16_t high[kTile * kTile], low[kTile * kTile], right[2][kTile / 32 * 4 * kPart];
    alignas(64) float sums[2][32 * 32];
    split_left(transposed, rows, depth, a, high, low);
    // The sums of the block before, which are added between the products of this one: a load of what the unit has just stored
    // would wait for it.
    struct {
        const float* sums;
        float* to;
        int64_t rows, columns, row;
    } last{};
    const auto add_some = [&](int64_t count) MMFAST_LAMBDA {
        const int64_t end = last.row + count < last.rows ? last.row + count : last.rows;
        for (; last.row < end; ++last.row)
            for (int64_t v = 0; v < last.columns; v += 16) {
                float* const to = last.to + last.row * c_stride + v;
                Simd<float>::store(to, Simd<float>::load(to) + Simd<float>::load(last.sums + last.row * 32 + v));
            }
    };
    MatrixUnit unit;
    int64_t block = 0;
    for (int64_t at = 0; at < width; at += 32) {
        const int64_t columns = width - at < 32 ? width - at : 32;
        uint16_t* const parts = right[at / 32 % 2];
        const int passes = split_right(depth, columns, b + at, b_stride, parts) ? 3 : 2;
        unit.fence();
        for (int64_t i = 0; i < rows; i += 32, ++block) {
            unit.zero();
            for (int64_t k = 0; k < depth; k += 32) {
                const uint16_t* const tile = parts + k / 32 * 4 * kPart;
                add_products(unit, passes, high + i * kTile + k, low + i * kTile + k, kTile, tile, tile + 2 * kPart);
                add_some(16);
            }
            add_some(32);
            store_sums(unit, sums[block % 2], 32);
            last = {sums[block % 2], c + i * c_stride + at, rows - i < 32 ? rows - i : 32, columns, 0};
        }
    }
    add_some(32);
}

}  // namespace
}  // namespace MMFAST_ISA
}  // namespace mmd
}  // namespace mmfast
