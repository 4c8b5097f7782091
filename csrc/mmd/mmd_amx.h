// Products of a tile on the matrix unit: each float32 factor as a sum of two bfloat16, x = h + l to 17 bits, and
// x y = h h' + h l' + l h', summed in float32. Included by mmd_tile.cpp for the instruction set amx.
//
// Note: [Split products]
//   What is left out, l l' and the rounding of l, is some 2^-18 of the product of the magnitudes and 2^-15 at worst: a squared
//   distance of centred points is off by about 2^-17 of its norms over the root of the dimension, and the kernel's value at a
//   pair by up to 8e-6 (measured; 80 x 96 points of 64 and of 768 dimensions), where 3e-6 is the aim. Over many pairs that
//   averages out, so distances are split where only sums over pairs are wanted, of enough points (Sweep::passes); matrices,
//   products, row sums and dependence measures have whole float32 products. Lengths are those of the points as they
//   were: rounded as well, the error of an MMD would be five times as large, for then its points had moved. Kernels of the
//   distance itself, whose error is largest where it is small, compute more of them again from differences (compare_again).
//   Products of points as they are (Metric::dot) are split only where that is exact: bfloat16 has no l, and float16 is h + l,
//   with l l' as well. Of infinity and NaN l is 0, so that they come out of h h'.
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

// The nearest numbers of 8 bits, ties away from zero, in the upper halves; lower halves are arbitrary. Of NaN it may be anything.
MMFAST_INLINE Words rounded_half(Words x) {
    return x + 0x8000u;
}
// What is left of x, for upper_halves(): 0 of infinity, NaN of NaN.
MMFAST_INLINE Words rest_of(Floats x, Words high) {
    const Floats rest = x - as_floats(high);
#if defined(__AVX512F__)
    const __m512i infinity_to_zero_nan_to_nan = _mm512_set1_epi32(0x00880033);
    const Floats kept = (Floats)_mm512_fixupimm_ps((__m512)rest, (__m512)x, infinity_to_zero_nan_to_nan, 0);
#else
    const Floats infinity = Floats{} + __builtin_inff(), nan = Floats{} + __builtin_nanf("");
    const Floats kept = x != x ? nan : x == infinity || x == -infinity ? Floats{} : rest;
#endif
    return rounded_half(Simd<float>::bits<Floats, Words>(kept));
}
// The upper halves of the words of two vectors, as pairs.
MMFAST_INLINE Words upper_halves(Words first, Words second) {
    return (first >> 16) | (second & kHighHalf);
}

// Points [first, first + 32) in the forms that are asked for. Pairs are 16 dimensions apart where dimensions are summed up (rows,
// columns), and 16 points where points are (across, turned). A pair of tiles, high and low, holds in its rows
//   columns: the pairs of 32 dimensions, 16 points along;   across: the pairs of 32 points, 16 dimensions along;
//   turned: 16 dimensions, the pairs of 32 points along.
template <bool kRows, bool kColumns, bool kAcross, bool kTurned>
void split_points(int64_t first, int64_t dimension, const Points<float>& to) {
    const int64_t depth = split_depth(dimension), stride = to.stride, row = split_row_stride(dimension);
    const float* const from = to.rows + first * stride;
    for (int64_t k = 0; k < depth; k += 32) {
        Words columns[2][2][16], turned[2][2][16];  // [points or dimensions][high, low]
        const bool both = k + 16 < stride;
#pragma GCC unroll 2
        for (int64_t p = 0; p < 16; ++p) {
            Words high[2][2], low[2][2];  // [point][dimensions]
            for (int64_t i = 0; i < 2; ++i)
                for (int64_t v = 0; v < 2; ++v) {
                    const Floats x =
                        v == 0 || both ? Simd<float>::load(from + (p + 16 * i) * stride + k + 16 * v) : Floats{};
                    high[i][v] = rounded_half(Simd<float>::bits<Floats, Words>(x)) & kHighHalf;
                    low[i][v] = rest_of(x, high[i][v]);
                }
            if (kRows || kColumns)
                for (int64_t i = 0; i < 2; ++i) {
                    const Words h = upper_halves(high[i][0], high[i][1]), l = upper_halves(low[i][0], low[i][1]);
                    if (kRows) {
                        put(to.split_rows + (first + p + 16 * i) * row + k, h);
                        put(to.split_rows + (first + p + 16 * i) * row + depth + k, l);
                    }
                    if (kColumns) {
                        columns[i][0][p] = h;
                        columns[i][1][p] = l;
                    }
                }
            if (kAcross || kTurned)
                for (int64_t v = 0; v < 2; ++v) {
                    const Words h = upper_halves(high[0][v], high[1][v]), l = upper_halves(low[0][v], low[1][v]);
                    if (kAcross) {
                        uint16_t* const tile = to.split_across + (first / 32 * (depth / 16) + k / 16 + v) * 2 * kPart;
                        put(tile + p * 32, h);
                        put(tile + kPart + p * 32, l);
                    }
                    if (kTurned) {
                        turned[v][0][p] = h;
                        turned[v][1][p] = l;
                    }
                }
        }
        const auto turn = [&](Words(&x)[2][16], uint16_t* tile) MMFAST_LAMBDA {
            for (int64_t part = 0; part < 2; ++part) {
                transpose(x[part]);
                for (int64_t p = 0; p < 16; ++p) put(tile + part * kPart + p * 32, x[part][p]);
            }
        };
        for (int64_t i = 0; i < 2; ++i) {
            if (kColumns) turn(columns[i], to.split_columns + (first + 16 * i) * 2 * depth + k / 32 * 2 * kPart);
            if (kTurned) turn(turned[i], to.split_turned + (first / 32 * (depth / 16) + k / 16 + i) * 2 * kPart);
        }
    }
}

// One form after the other: two at once take more registers than there are, and half as long again.
inline void split_points(int64_t first, int64_t dimension, const Points<float>& to) {
    if (to.split_rows) split_points<true, false, false, false>(first, dimension, to);
    if (to.split_columns) split_points<false, true, false, false>(first, dimension, to);
    if (to.split_across) split_points<false, false, true, false>(first, dimension, to);
    if (to.split_turned) split_points<false, false, false, true>(first, dimension, to);
}

// ---- Products ------------------------------------------------------------------------------------------------------

// Adds up 32 x 16 products over one depth of 32; `passes` as in Points. The left factor's second tile lies 16 rows on.
template <int kRow>
MMFAST_INLINE void add_row(MatrixUnit& unit, int passes, const uint16_t* high, const uint16_t* low, int64_t bytes) {
    unit.load<4>(high, bytes);
    unit.multiply<kRow, 4, 6>();
    if (passes == 1) return;
    if (passes != 2) unit.multiply<kRow, 4, 7>();
    unit.load<4>(low, bytes);
    unit.multiply<kRow, 4, 6>();
    if (passes == 4) unit.multiply<kRow, 4, 7>();
}
MMFAST_INLINE void add_products(MatrixUnit& unit, int passes, const uint16_t* high, const uint16_t* low, int64_t step,
                                const uint16_t* right) {
    unit.load<6>(right, kTileBytes);
    if (passes > 2) unit.load<7>(right + kPart, kTileBytes);
    add_row<0>(unit, passes, high, low, 2 * step);
    add_row<1>(unit, passes, high + 16 * step, low + 16 * step, 2 * step);
}

MMFAST_INLINE void store_sums(MatrixUnit& unit, float* to, int64_t stride) {
    unit.store<0>(to, 4 * stride);
    unit.store<1>(to + 16 * stride, 4 * stride);
    unit.fence();
}

MMFAST_INLINE void load_sums(MatrixUnit& unit, const float* from, int64_t stride) {
    unit.load<0>(from, 4 * stride);
    unit.load<1>(from + 16 * stride, 4 * stride);
}

MMFAST_INLINE void clear_sums(MatrixUnit& unit) {
    unit.zero<0>();
    unit.zero<1>();
}

// Dimensions that a tile's products take before the next ones: 32 rows and 64 columns of them, 48 KiB, stay in the first cache.
constexpr int64_t kSplitDepth = 128;

// z = (if it starts) or += the products of `dimension` values.
MMFAST_INLINE void multiply_split(MatrixUnit& unit, bool starts, int64_t dimension, const Points<float>& a,
                                  int64_t first, int64_t rows, const Points<float>& b, int64_t columns, float* z) {
    const int64_t depth = split_depth(dimension), step = split_row_stride(dimension), group = 32 * depth;
    const int64_t slices = (depth + kSplitDepth - 1) / kSplitDepth, steps = depth / 32;
    for (int64_t slice = 0; slice < slices; ++slice)
        for (int64_t i = 0; i < rows; i += 32)
            for (int64_t n = 0; n < columns; n += 16) {
                // There and back, so that of two blocks in a row one factor is the same.
                const int64_t j = i % 64 == 0 || columns <= 16 ? n : (columns + 15) / 16 * 16 - 16 - n;
                float* const sums = z + i * kTile + j;
                if (starts && slice == 0) clear_sums(unit);
                else load_sums(unit, sums, kTile);
                for (int64_t k = slice * steps / slices * 32; k < (slice + 1) * steps / slices * 32; k += 32) {
                    const uint16_t* const left = a.split_rows + (first + i) * step + k;
                    const uint16_t* const right = b.split_columns + j / 16 * group + k / 32 * 2 * kPart;
                    add_products(unit, a.passes, left, left + depth, step, right);
                }
                store_sums(unit, sums, kTile);
            }
}

inline void compare_split(bool starts, bool ends_distance, int64_t dimension, const Points<float>& a, int64_t first,
                          int64_t rows, const Points<float>& b, int64_t columns, float* z) {
    {
        MatrixUnit unit;
        multiply_split(unit, starts, dimension, a, first, rows, b, columns, z);
    }
    if (!ends_distance) return;
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; j += 16) {
            float* const at = z + i * kTile + j;
            const Floats norms = a.norms[first + i] + Simd<float>::load(b.norms + j);
            Simd<float>::store(at, Simd<float>::max(Floats{}, norms - 2.0f * Simd<float>::load(at)));  // a NaN stays
        }
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
            for (int64_t c = 0; c < 32; c += 16) {
                clear_sums(unit);
                for (int64_t k = 0; k < depth; k += 32) {
                    add_products(unit, passes, high + i * kTile + k, low + i * kTile + k, kTile,
                                 parts + k / 32 * 4 * kPart + c / 16 * 2 * kPart);
                    add_some(8);
                }
                if (c) add_some(32);
                store_sums(unit, sums[block % 2] + c, 32);
            }
            last = {sums[block % 2], c + i * c_stride + at, rows - i < 32 ? rows - i : 32, columns, 0};
        }
    }
    add_some(32);
}

}  // namespace
}  // namespace MMFAST_ISA
}  // namespace mmd
}  // namespace mmfast
