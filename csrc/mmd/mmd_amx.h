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
//   16 cycles for 16 x 16 x 32 multiplications, three times: 5.3 times as many as two AVX-512 units do. Splitting a vector
//   takes about 20 instructions: points are split once when they are packed, the factors of product() at each call, which
//   costs about as much as a third of its multiplications when it is 256 wide.
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

constexpr int64_t kPart = kTileRows * kTileBytes / 2;  // bfloat16 values in a tile
constexpr uint32_t kHighHalf = 0xffff0000u, kExponent = 0x7f800000u;

// bfloat16 in the upper halves: the nearest, ties to even.
MMFAST_INLINE Words rounded(Floats x) {
    const Words u = Simd<float>::bits<Floats, Words>(x);
    const Words nearest = (u + 0x7fffu + ((u >> 16) & 1u)) & kHighHalf;
    return x == x ? nearest : (u & kHighHalf) | 0x00400000u;
}

struct Halves {
    Words high, low;  // in the upper half of each lane
};

MMFAST_INLINE Halves split(Floats x) {
    const Words high = rounded(x);
    const Words low = rounded(x - Simd<float>::bits<Words, Floats>(high));
    return {high, (high & kExponent) == kExponent ? Words{} : low};
}

// Lane by lane the pair (first, second) of bfloat16 in the order of memory.
MMFAST_INLINE Words paired(Words first, Words second) {
    return (first >> 16) | second;
}

MMFAST_INLINE void put(uint16_t* to, Words x) {
    __builtin_memcpy(to, &x, sizeof x);
}
MMFAST_INLINE void put_upper(uint16_t* to, Words x) {
    const __m256i half = _mm512_cvtepi32_epi16((__m512i)(x >> 16));
    __builtin_memcpy(to, &half, sizeof half);
}

MMFAST_INLINE void transpose(Words (&x)[16]) {
    Floats f[16];
    for (int i = 0; i < 16; ++i) f[i] = Simd<float>::bits<Words, Floats>(x[i]);
    Simd<float>::transpose(f);
    for (int i = 0; i < 16; ++i) x[i] = Simd<float>::bits<Floats, Words>(f[i]);
}

// ---- Points --------------------------------------------------------------------------------------------------------

// rows[i] of `to`: the high parts of its dimensions, then the low ones; zero for what is not there.
inline void split_rows(int64_t count, int64_t dimension, const Points<float>& to) {
    const int64_t depth = split_depth(dimension), step = split_row_stride(dimension);
    for (int64_t i = 0; i < (count + 31) / 32 * 32; ++i)
        for (int64_t k = 0; k < depth; k += 16) {
            const bool there = i < count && k < to.stride;
            const Halves x = split(there ? Simd<float>::load(to.rows + i * to.stride + k) : Floats{});
            put_upper(to.split_rows + i * step + k, x.high);
            put_upper(to.split_rows + i * step + depth + k, x.low);
        }
}

// Tiles of 16 points, a point along the lanes: for each 16 points and each 32 dimensions the high parts and the low ones.
// What has no point repeats the last one.
inline void split_columns(int64_t count, int64_t dimension, const Points<float>& to) {
    const int64_t depth = split_depth(dimension);
    for (int64_t j = 0; j < (count + 31) / 32 * 32; j += 16)
        for (int64_t k = 0; k < depth; k += 32) {
            Words high[16], low[16];
            for (int64_t i = 0; i < 16; ++i) {
                const float* const row = to.rows + (j + i < count ? j + i : count - 1) * to.stride;
                Halves x[2];
                for (int64_t half = 0; half < 2; ++half) {
                    const int64_t at = k + 16 * half;
                    x[half] = split(at < to.stride ? Simd<float>::load(row + at) : Floats{});
                }
                // Dimensions 2 p and 2 p + 1 side by side, for p = 0 ... 15.
                const auto narrow = [](Words a, Words b) __attribute__((always_inline)) {
                    alignas(64) uint16_t both[32];
                    put_upper(both, a);
                    put_upper(both + 16, b);
                    Words w;
                    __builtin_memcpy(&w, both, sizeof w);
                    return w;
                };
                high[i] = narrow(x[0].high, x[1].high);
                low[i] = narrow(x[0].low, x[1].low);
            }
            transpose(high);
            transpose(low);
            uint16_t* const tile = to.split_columns + j * 2 * depth + k / 32 * 2 * kPart;
            for (int64_t p = 0; p < 16; ++p) {
                put(tile + p * 32, high[p]);
                put(tile + kPart + p * 32, low[p]);
            }
        }
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

inline void compare_split(bool squared_distance, int64_t dimension, const Points<float>& a, int64_t first, int64_t rows,
                          const Points<float>& b, int64_t columns, float* z) {
    const int64_t depth = split_depth(dimension), step = split_row_stride(dimension), group = 32 * depth;
    {
        MatrixUnit unit;
        for (int64_t i = 0; i < rows; i += 32)
            for (int64_t j = 0; j < columns; j += 32) {
                unit.zero();
                for (int64_t k = 0; k < depth; k += 32) {
                    const uint16_t* const left = a.split_rows + (first + i) * step + k;
                    const uint16_t* const right = b.split_columns + j / 16 * group + k / 32 * 2 * kPart;
                    add_products(unit, a.passes, left, left + depth, step, right, right + group);
                }
                store_sums(unit, z + i * kTile + j, kTile);
            }
    }
    if (!squared_distance) return;
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; j += 16) {
            float* const at = z + i * kTile + j;
            const Floats s = (a.norms[first + i] + Simd<float>::load(b.norms + j)) - 2.0f * Simd<float>::load(at);
            Simd<float>::store(at, s < 0 ? s * 0 : s);  // a NaN stays
        }
}

// The left factor of product(): high and low parts, kTile to a row; zero beyond `rows` and `depth`.
inline void split_left(bool transposed, int64_t rows, int64_t depth, const float* a, uint16_t* high, uint16_t* low) {
    const int64_t all_rows = (rows + 31) / 32 * 32, all_depth = (depth + 31) / 32 * 32;
    if (!transposed) {
        for (int64_t i = 0; i < all_rows; ++i)
            for (int64_t k = 0; k < all_depth; k += 16) {
                const bool there = i < rows && k < depth;
                const Halves x = split(there ? Simd<float>::load(a + i * kTile + k, int(depth - k)) : Floats{});
                put_upper(high + i * kTile + k, x.high);
                put_upper(low + i * kTile + k, x.low);
            }
        return;
    }
    for (int64_t i = 0; i < all_rows; i += 16)
        for (int64_t k = 0; k < all_depth; k += 32) {
            Words h[16], l[16];
            for (int64_t p = 0; p < 16; ++p) {
                const auto row = [&](int64_t at) __attribute__((always_inline)) {
                    const bool there = at < depth && i < rows;
                    return split(there ? Simd<float>::load(a + at * kTile + i, int(rows - i)) : Floats{});
                };
                const Halves even = row(k + 2 * p), odd = row(k + 2 * p + 1);
                h[p] = paired(even.high, odd.high);
                l[p] = paired(even.low, odd.low);
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
                const auto row = [&](int64_t at) __attribute__((always_inline)) {
                    return split(at < depth && c < columns ? Simd<float>::load(b + at * stride + c) : Floats{});
                };
                const Halves even = row(k + 2 * p), odd = row(k + 2 * p + 1);
                uint16_t* const tile = to + (k / 32 * 2 + c / 16) * 2 * kPart + p * 32;
                put(tile, paired(even.high, odd.high));
                put(tile + kPart, paired(even.low, odd.low));
                any |= even.low | odd.low;
            }
    uint32_t all = 0;
    for (int i = 0; i < 16; ++i) all |= any[i];
    return all != 0;
}

inline void product_split(bool transposed, int64_t rows, int64_t depth, int64_t width, const float* a, const float* b,
                          int64_t b_stride, float* c, int64_t c_stride) {
    alignas(64) uint16_t high[kTile * kTile], low[kTile * kTile], right[kTile / 32 * 4 * kPart];
    alignas(64) float sum[32 * 32];
    split_left(transposed, rows, depth, a, high, low);
    MatrixUnit unit;
    for (int64_t at = 0; at < width; at += 32) {
        const int64_t columns = width - at < 32 ? width - at : 32;
        const int passes = split_right(depth, columns, b + at, b_stride, right) ? 3 : 2;
        unit.fence();
        for (int64_t i = 0; i < rows; i += 32) {
            unit.zero();
            for (int64_t k = 0; k < depth; k += 32) {
                const uint16_t* const tile = right + k / 32 * 4 * kPart;
                add_products(unit, passes, high + i * kTile + k, low + i * kTile + k, kTile, tile, tile + 2 * kPart);
            }
            store_sums(unit, sum, 32);
            for (int64_t r = 0; r < 32 && i + r < rows; ++r)
                for (int64_t v = 0; v < columns; v += 16) {
                    float* const to = c + (i + r) * c_stride + at + v;
                    Simd<float>::store(to, Simd<float>::load(to) + Simd<float>::load(sum + r * 32 + v));
                }
        }
    }
}

}  // namespace
}  // namespace MMFAST_ISA
}  // namespace mmd
}  // namespace mmfast
