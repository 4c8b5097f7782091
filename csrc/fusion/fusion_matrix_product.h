// Packing for products of matrices of bfloat16, and those on the matrix unit or in vectors. For fusion_matrix.cpp, whose notes
// say why.
//
// Note: [Products in vectors]
//   VDPBF16PS adds the products of two pairs of bfloat16 to each lane: twice the products of a multiply-add, at the same pace where
//   it was measured (processors of the fifth generation of EPYC: two a cycle, six cycles from one sum to the next). Pairs are laid
//   out as for the matrix unit. A block keeps R x S sums in registers; a step loads S vectors of columns and broadcasts a pair of
//   each row, 11 loads for 24 products, where two of each are done a cycle. Products begin in 91 to 99 of 100 cycles that the
//   blocks of a head take; linear layers reach 1.0 of the 1.08 TFLOP/s that two such cores have.
#pragma once

#include "fusion/fusion_panel.h"

#if defined(MMFAST_AMX_TILES)
#include "common/amx.h"
#endif

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
constexpr int64_t kTile = kTileKeys, kTwoTiles = 2 * kTile;
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

// Two tiles of a row.
constexpr int64_t kVectors = kTwoTiles / kLanes;

// Rounded to bfloat16, in their order.
MMFAST_INLINE void put_rounded(uint16_t* to, const Floats (&x)[kVectors]) {
#if defined(__AVX512BF16__)
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]);
    __builtin_memcpy(to, &both, sizeof both);
#else
    for (int64_t i = 0; i < kVectors; ++i) store_as<float>(reinterpret_cast<BFloat16*>(to) + i * kLanes, x[i], kLanes);
#endif
}
// Lane by lane (first, second) in the order of memory.
MMFAST_INLINE void put_pair(uint32_t* to, Words first, Words second) {
    const Words pair = (first >> 16) | (second & 0xffff0000u);
    __builtin_memcpy(to, &pair, sizeof pair);
}
// The same, rounded.
MMFAST_INLINE void put_rounded_pair(uint32_t* to, Floats first, Floats second) {
#if defined(__AVX512BF16__)
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    const __m512i order = _mm512_set_epi32(  // of words of 16 bits: 0, 16, 1, 17 ...
        0x1f000f, 0x1e000e, 0x1d000d, 0x1c000c, 0x1b000b, 0x1a000a, 0x190009, 0x180008,  //
        0x170007, 0x160006, 0x150005, 0x140004, 0x130003, 0x120002, 0x110001, 0x100000);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, halves));
#else
    alignas(64) BFloat16 halves[2][kLanes];
    store_as<float>(halves[0], first, kLanes);
    store_as<float>(halves[1], second, kLanes);
    for (int64_t i = 0; i < kLanes; ++i) to[i] = halves[0][i].bits | uint32_t(halves[1][i].bits) << 16;
#endif
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

// Rows, made `width` long with zeros. Column by column, so that what depends on how many there are is done once.
MMFAST_INLINE void copy_rows(const uint16_t* from, int64_t from_stride, int64_t rows, int64_t count, int64_t width,
                             uint16_t* to, int64_t stride) {
    for (int64_t k = 0; k < width; k += 2 * kLanes) {
        const int pairs = int(larger(0, smaller(kLanes, (count - k) / 2)));
        const uint16_t* source = from + k;
        float* target = reinterpret_cast<float*>(to + k);
        for (int64_t r = 0; r < rows; ++r, source += from_stride, target += stride / 2)
            Simd<float>::store(target, Simd<float>::load(reinterpret_cast<const float*>(source), pairs));
    }
    for (int64_t r = 0; count % 2 && r < rows; ++r) to[r * stride + count - 1] = from[r * from_stride + count - 1];
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

// Pairs of rows, so many apart: to[pair][column]. `count`: a multiple of 16; then there are rows of zeros up to one of 32.
template <int64_t kApart>
void pair_rows(const uint16_t* from, int64_t stride, int64_t width, int64_t count, uint32_t* to, int64_t to_stride) {
    for (int64_t r = 0; r < padded(count); r += 2 * kApart)
        for (int64_t i = r; i < r + kApart; ++i, to += to_stride)
            for (int64_t k = 0; k < width; k += kLanes) {
                const auto row = [&](int64_t at) MMFAST_LAMBDA {
                    return at < count ? load_upper(from + at * stride + k) : Words{};
                };
                put_pair(to + k, row(i), row(i + kApart));
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

// Rows of bfloat16; or pairs of rows, a word for each column.
template <class E>
struct Factor {
    const E* data;
    int64_t stride;
    const E* low = nullptr;  // of a sum of two bfloat16 the smaller one
};
using Left = Factor<uint16_t>;
using Right = Factor<uint32_t>;
MMFAST_INLINE Left rows_from(const Left& x, int64_t row) {
    return {x.data + row * x.stride, x.stride};
}

// Sums in `data`, which start from zero if `from` is null.
struct Sums {
    float* data;
    int64_t stride;
    const float* from;
    int64_t from_stride;
};

#if defined(MMFAST_AMX_TILES)
static_assert(kTile == kTileRows);
constexpr bool kSumOnTheRight = true;  // whether a right factor may be a sum of two bfloat16

// Rows and depth of a product that covers so many.
constexpr int64_t to_rows(int64_t n) {
    return to_tiles(n);
}
constexpr int64_t to_depth(int64_t n) {
    return padded(n);
}

// Steps of a product, each of which calls `between`.
constexpr int64_t product_calls(int64_t rows, int64_t depth, int64_t width) {
    return (rows + kTile) / kTwoTiles * (width / kTile) * (depth / kTwoTiles);
}

// R tiles of 16 columns: see [Few tiles] in amx.h.
template <int R, class F>
MMFAST_INLINE void multiply_block(MatrixUnit& unit, int64_t depth, const Left& left, const Right& right,
                                  const Sums& sums, F&& between) {
    const float* const from = sums.from;
    if (from) {
        unit.load<0>(from, sums.from_stride * 4);
        if constexpr (R == 2) unit.load<1>(from + kTile * sums.from_stride, sums.from_stride * 4);
    } else {
        unit.zero<0>();
        if constexpr (R == 2) unit.zero<1>();
    }
    const int64_t bytes = left.stride * 2, down = kTile * left.stride;
    for (int64_t k = 0; k < depth; k += kTwoTiles) {
        between();
        const int64_t at = k / 2 * right.stride;
        unit.load_passing<6>(right.data + at, right.stride * 4);
        if (right.low) unit.load_passing<7>(right.low + at, right.stride * 4);
        const auto row = [&]<int kRow>() MMFAST_LAMBDA {
            unit.load<4>(left.data + k + kRow * down, bytes);
            unit.multiply<kRow, 4, 6>();
            if (right.low) unit.multiply<kRow, 4, 7>();
            if (!left.low) return;
            unit.load<4>(left.low + k + kRow * down, bytes);
            unit.multiply<kRow, 4, 6>();
        };
        row.template operator()<0>();
        if constexpr (R == 2) row.template operator()<1>();
    }
    unit.store<0>(sums.data, sums.stride * 4);
    if constexpr (R == 2) unit.store<1>(sums.data + kTile * sums.stride, sums.stride * 4);
}

// sums[rows][width] = or += left[rows][depth] right[depth][width], the depth a multiple of 32, the others of 16.
template <class F>
void multiply(MatrixUnit& unit, int64_t rows, int64_t depth, int64_t width, const Left& left, const Right& right,
              const Sums& sums, F&& between) {
    unit.fence();
    for (int64_t i = 0; i < rows; i += kTwoTiles) {
        const int64_t down = i * left.stride;
        const Left l{left.data + down, left.stride, left.low ? left.low + down : nullptr};
        for (int64_t j = 0; j < width; j += kTile) {
            const Right r{right.data + j, right.stride, right.low ? right.low + j : nullptr};
            const Sums s{sums.data + i * sums.stride + j, sums.stride,
                         sums.from ? sums.from + i * sums.from_stride + j : nullptr, sums.from_stride};
            if (i + kTile < rows) multiply_block<2>(unit, depth, l, r, s, between);
            else multiply_block<1>(unit, depth, l, r, s, between);
        }
    }
    unit.fence();
}

#else

// There is none: vectors do what it would.
struct MatrixUnit {
    MMFAST_INLINE void stay_awake() {}
};
constexpr bool kSumOnTheRight = false;

constexpr int64_t kFewColumns = 2, kManyColumns = 3, kBlockRows = 8;  // vectors, and rows beside them

constexpr int64_t to_rows(int64_t n) {
    return up_to_multiple(n, kBlockRows);
}
constexpr int64_t to_depth(int64_t n) {
    return up_to_multiple(n, 2);
}

// Steps of a product, each of which calls `between`.
constexpr int64_t product_calls(int64_t rows, int64_t, int64_t width) {
    return rows / kBlockRows * (width / (kManyColumns * kLanes));
}

// a[2 i] b[2 i] + a[2 i + 1] b[2 i + 1], added to lane i.
MMFAST_INLINE Floats add_products(Floats sum, Words a, Words b) {
#if defined(__AVX512BF16__)
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else  // for tests
    const Floats odd = number_of(a & 0xffff0000u) * number_of(b & 0xffff0000u);
    return sum + odd + number_of(a << 16) * number_of(b << 16);
#endif
}

// Pairs of R rows, one after the other. A compiler would keep an address for each row, more than there are registers, and move some
// back and forth at each step. Here every third row has one, and the next two are one and two strides on, which an address of x86
// can say; how they go on is hidden, or there would be one for each again.
template <int R>
class Pairs {
public:
    MMFAST_INLINE Pairs(const uint16_t* first, int64_t stride) : stride_(2 * stride) {
        for (int i = 0; i < kAddresses; ++i) at_[i] = reinterpret_cast<const char*>(first) + 3 * i * stride_;
    }
    MMFAST_INLINE Words operator[](int row) const {
        uint32_t x;
        __builtin_memcpy(&x, at_[row / 3] + row % 3 * stride_, sizeof x);
        return Words{} + x;
    }
    MMFAST_INLINE void next() {
        for (int i = 0; i < kAddresses; ++i) {
            at_[i] += sizeof(uint32_t);
            __asm__("" : "+r"(at_[i]));
        }
    }

private:
    static constexpr int kAddresses = (R + 2) / 3;
    const char* at_[kAddresses];
    int64_t stride_;
};

// R rows by S vectors of columns. Of a left factor that is a sum both parts are multiplied.
template <int R, int S, bool kSum>
MMFAST_INLINE void multiply_block(int64_t depth, const Left& left, const Right& right, const Sums& sums) {
    const auto load = [](const auto* from) MMFAST_LAMBDA {
        Words x;
        __builtin_memcpy(&x, from, sizeof x);
        return x;
    };
    Floats sum[R][S];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < S; ++v) sum[r][v] = Floats{};
    Pairs<R> pairs(left.data, left.stride), low_pairs(kSum ? left.low : left.data, left.stride);
    const uint32_t* at = right.data;
    for (int64_t k = 0; k < depth; k += 2, at += right.stride) {
        Words columns[S];
#pragma GCC unroll 4
        for (int v = 0; v < S; ++v) columns[v] = load(at + v * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const Words pair = pairs[r];
#pragma GCC unroll 4
            for (int v = 0; v < S; ++v) sum[r][v] = add_products(sum[r][v], pair, columns[v]);
            if constexpr (kSum) {
                const Words low = low_pairs[r];
#pragma GCC unroll 4
                for (int v = 0; v < S; ++v) sum[r][v] = add_products(sum[r][v], low, columns[v]);
            }
        }
        pairs.next();
        if constexpr (kSum) low_pairs.next();
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < S; ++v) {
            // Only now added to what is there, as in common/product.h.
            if (sums.from) sum[r][v] += Simd<float>::load(sums.from + r * sums.from_stride + v * kLanes);
            Simd<float>::store(sums.data + r * sums.stride + v * kLanes, sum[r][v]);
        }
}

// As on the matrix unit, but that to_rows() and to_depth() say how many rows and what depth it takes.
template <bool kSum, class F>
void multiply_sums(int64_t rows, int64_t depth, int64_t width, const Left& left, const Right& right, const Sums& sums,
                   F&& between) {
    for (int64_t j = 0; j < width;) {
        const int64_t vectors = (width - j) / kLanes;
        const Right r{right.data + j, right.stride};
        const auto columns = [&]<int R, int S>() MMFAST_LAMBDA {
            for (int64_t i = 0; i < rows; i += R) {
                between();
                const int64_t down = i * left.stride;
                const Sums s{sums.data + i * sums.stride + j, sums.stride,
                             sums.from ? sums.from + i * sums.from_stride + j : nullptr, sums.from_stride};
                multiply_block<R, S, kSum>(depth, {left.data + down, left.stride, kSum ? left.low + down : nullptr}, r,
                                           s);
            }
            j += S * kLanes;
        };
        if (vectors == 1 && rows % (2 * kBlockRows) == 0) columns.template operator()<2 * kBlockRows, 1>();
        else if (vectors == 1) columns.template operator()<kBlockRows, 1>();
        else if (vectors == 2 || vectors == 4) columns.template operator()<kBlockRows, kFewColumns>();
        else columns.template operator()<kBlockRows, kManyColumns>();
    }
}

template <class F>
void multiply(MatrixUnit&, int64_t rows, int64_t depth, int64_t width, const Left& left, const Right& right,
              const Sums& sums, F&& between) {
    if (left.low) multiply_sums<true>(rows, depth, width, left, right, sums, between);
    else multiply_sums<false>(rows, depth, width, left, right, sums, between);
}

#endif

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

}  // namespace
}  // namespace MMFAST_ISA
}  // namespace fusion
}  // namespace mmfast
