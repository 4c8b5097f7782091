// Whole strips of pairs on the matrix unit: the points of a block with a tile's columns, values and gradients, of one chain of
// Gaussians each the square of the one before. Part of mmd_amx.h's code for the instruction set amx.
//
// Note: [Products, then values]
//   A product of two tiles takes 16 cycles of the port that half of all vector instructions want as well, and shuffles and
//   comparisons want no other. Measured on an Emerald Rapids: 12 products and 64 multiply-adds take 196 cycles, 12 products
//   and 384 take 730, where one after the other would be 384. So they do not alternate: products of some tiles, then their
//   values, then what these add to the gradients. The unit falls asleep meanwhile, see [Sleep] in amx.h: a few tiles go
//   together, so that waking it up is a fiftieth, less than keeping it awake would cost.
//   Floors a pair: 3 D / 512 cycles for each product of D dimensions in three parts, of which values take one and gradients
//   two more; values of five Gaussians 19 instructions for 16 pairs, with derivatives 34, at two a cycle.
//
// Note: [Sums of powers]
//   The value of a chain is the sum of w_i t^(2^i), t of its widest Gaussian. Each power is added up by itself, and the sums
//   are weighted at the end: a square and its addition are one multiply-add. Sums of up to 32 values are in float before they
//   go on in double. That loses digits of kernels that are nearly constant; these are left to the other code (see common_value).
//
// Note: [Weights as factors]
//   A derivative w is the left factor in sum_j w_ij b_j, a row of which meets 32 columns in a step, and the right one in
//   sum_i a_i w_ij: nothing is transposed but the points of a, once a block, and the sums for b, once a tile. The pairs that
//   the unit multiplies together are 16 apart, columns in the first case and rows in the second, so that words of both are
//   made of vectors as they are.
#pragma once

#include "mmd/mmd_amx.h"

namespace mmfast {
namespace mmd {
namespace MMFAST_ISA {
namespace {

struct Nothing {};

constexpr int kMostPowers = 5;  // a chain takes four squarings at most
constexpr float kNearlyConstant = 0.75f;

// Results below the normal numbers, and operands, are zeros: they would cost 150 cycles each.
class FlushTinyNumbers {
#if defined(__AVX512F__)
public:
    FlushTinyNumbers() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040u); }
    ~FlushTinyNumbers() { _mm_setcsr(before_); }
    FlushTinyNumbers(const FlushTinyNumbers&) = delete;

private:
    unsigned before_;
#else
public:
    FlushTinyNumbers() {}
#endif
};

// ---- Blocks of sums --------------------------------------------------------------------------------------------------

// Rows of a left factor: `bytes` apart, the low parts `low` values behind the high ones, the next 32 dimensions `step`, the
// next 16 rows `next` values on.
struct Left {
    const uint16_t* at;
    int64_t next, low, step, bytes;
};
// 16 columns of a right factor in tiles, high and low: the next 32 dimensions `step`, the next 16 columns `next` values on.
struct Right {
    const uint16_t* at;
    int64_t next, step;
};

// Sums of 16 x 32 products, in few tiles: see [Few tiles] in amx.h.
class Blocks {
public:
    // 32 rows, of `steps` x 32 dimensions; added to what is there, or not. If kPassing the rows are not used again soon: see
    // [Passing by] in amx.h.
    template <bool kPassing = false>
    MMFAST_INLINE void two(bool adds, int64_t steps, const Left& a, const Right& b, float* to, int64_t stride) {
        one<kPassing>(adds, steps, a.at, a, b, to, 4 * stride);
        one<kPassing>(adds, steps, a.at + a.next, a, b, to + 16 * stride, 4 * stride);
    }
    MMFAST_INLINE void fence() { unit_.fence(); }

private:
    template <int kNumber, bool kPassing>
    MMFAST_INLINE void load(const uint16_t* from, int64_t bytes) {
        if constexpr (kPassing) unit_.template load_passing<kNumber>(from, bytes);
        else unit_.template load<kNumber>(from, bytes);
    }
    template <int kSum>
    MMFAST_INLINE void multiply(const uint16_t* right) {
        unit_.template load<6>(right, kTileBytes);
        unit_.template multiply<kSum, 4, 6>();
        unit_.template multiply<kSum, 5, 6>();
        unit_.template load<6>(right + kPart, kTileBytes);
        unit_.template multiply<kSum, 4, 6>();
    }
    template <bool kPassing>
    MMFAST_INLINE void one(bool adds, int64_t steps, const uint16_t* left, const Left& a, const Right& b, float* to,
                           int64_t bytes) {
        if (adds) {
            unit_.template load<0>(to, bytes);
            unit_.template load<1>(to + 16, bytes);
        } else {
            unit_.template zero<0>();
            unit_.template zero<1>();
        }
        const uint16_t* right = b.at;
        for (int64_t k = 0; k < steps; ++k, left += a.step, right += b.step) {
            load<4, kPassing>(left, a.bytes);
            load<5, kPassing>(left + a.low, a.bytes);
            multiply<0>(right);
            multiply<1>(right + b.next);
        }
        unit_.template store<0>(to, bytes);
        unit_.template store<1>(to + 16, bytes);
    }

    MatrixUnit unit_;
};

// Dimensions of 32 points of b, 32 KiB of parts, that stay in the first cache while rows of a pass by.
constexpr int64_t kStripDepth = 256;

// z[rows][64] = the products of points of a, from `first` on, and the tile's of b.
MMFAST_INLINE void multiply_points(Blocks& blocks, int64_t dimension, const Points<float>& a, int64_t first,
                                   int64_t rows, const Points<float>& b, float* z) {
    const int64_t depth = split_depth(dimension), row = split_row_stride(dimension), group = 32 * depth;
    const int64_t slices = (depth + kStripDepth - 1) / kStripDepth, steps = depth / 32;
    const auto two = [&]<bool kPassing>(int64_t slice, int64_t r, int64_t j) MMFAST_LAMBDA {
        const int64_t from = slice * steps / slices, to = (slice + 1) * steps / slices;
        blocks.two<kPassing>(
            slice > 0, to - from, {a.split_rows + (first + r) * row + 32 * from, 16 * row, depth, 32, 2 * row},
            {b.split_columns + j / 16 * group + from * 2 * kPart, group, 2 * kPart}, z + r * kTile + j, kTile);
    };
    if (depth <= kStripDepth / 2) {  // all of b's are there
        for (int64_t r = 0; r < rows; r += 32)
            for (int64_t j = 0; j < kTile; j += 32) two.template operator()<false>(0, r, j);
        return;
    }
    for (int64_t slice = 0; slice < slices; ++slice)
        for (int64_t j = 0; j < kTile; j += 32)
            for (int64_t r = 0; r < rows; r += 32) two.template operator()<true>(slice, r, j);
}

// ---- Values ----------------------------------------------------------------------------------------------------------

// Rows whose products are computed before their values.
constexpr int64_t kPhase = 256, kGradientPhase = 128;

// Weights as a left factor, [16 rows][32 columns][high, low], and as a right one, [32 rows][16 columns][high, low].
struct Weights {
    alignas(64) uint16_t left[2 * kGradientPhase * kTile], right[2 * kGradientPhase * kTile];
};

struct Scaled {
    float of_products;  // the exponent of 2 is this times the product of two points,
    alignas(64) float rows[kPhase],
        columns[kTile];  // and these for their norms; minus infinity where there is no point
};

// A NaN becomes the one whose lower half is 0, which rounded_half() keeps.
inline void scale_norms(float exponent, const float* norms, int64_t count, int64_t all, float* to) {
    for (int64_t i = 0; i < all; ++i) {
        const float x = i < count ? exponent * norms[i] : -__builtin_inff();
        to[i] = x == x ? x : __builtin_nanf("");
    }
}

// t = the widest Gaussian of rows and columns of a tile.
template <int kRows, int kColumns>
MMFAST_INLINE void widest(const Scaled& s, const float* z, int64_t i, int64_t rows_apart, int64_t j,
                          Floats (&t)[kRows * kColumns]) {
    for (int r = 0; r < kRows; ++r)
        for (int u = 0; u < kColumns; ++u) {
            const Floats norms = s.rows[i + r * rows_apart] + Simd<float>::load(s.columns + j + 16 * u);
            const Floats products = Simd<float>::load(z + (i + r * rows_apart) * kTile + j + 16 * u);
            t[r * kColumns + u] = Simd<float>::min(Floats{}, products * s.of_products + norms);  // a NaN stays
        }
    exp2_without_table<kRows * kColumns, false>(t);
}

template <int C>
struct PowerSums {
    Accumulator<float> total[C];
    MMFAST_INLINE void add(const Floats (&some)[C]) {
        for (int c = 0; c < C; ++c) total[c].add(Wider<float>(some[c]));
    }
    double weighted(const Chain<float>& chain) const {
        double sum = 0;
        for (int c = 0; c < C; ++c) sum += double(chain.weight[c]) * total[c].total();
        return sum;
    }
};

constexpr int64_t kRowsOfPowers = 8;  // whose powers are added up before the sums go on in double: 32 to a lane

template <int C>
MMFAST_INLINE void add_powers(const Scaled& s, const float* z, int64_t first, int64_t rows, PowerSums<C>& sums) {
    for (int64_t i = first; i < first + rows; i += kRowsOfPowers) {
        Floats some[C] = {};
        for (int64_t r = i; r < i + kRowsOfPowers; ++r) {
            Floats t[kWide];
            widest<1, kWide>(s, z, r, 0, 0, t);
            for (int u = 0; u < kWide; ++u) some[0] += t[u];
            for (int c = 1; c < C; ++c)
                for (int u = 0; u < kWide; ++u) {
                    some[c] += t[u] * t[u];
                    if (c + 1 < C) t[u] *= t[u];
                }
        }
        sums.add(some);
    }
}

// Lines of memory that are asked for while values are computed: tiles of the unit would wait for each.
class Ahead {
public:
    void add(const void* from, int64_t bytes) { range_[count_++] = {static_cast<const char*>(from), bytes}; }
    // A share of 1 / `parts` of each, at the `part`-th call.
    MMFAST_INLINE void fetch(int64_t part, int64_t parts) const {
        for (int64_t n = 0; n < count_; ++n) {
            const int64_t each = (range_[n].bytes / 64 + parts - 1) / parts * 64;
            const char* const from = range_[n].at + part * each;
            for (int64_t i = 0; i < each; i += 64) __builtin_prefetch(from + i, 0, 2);
        }
    }

private:
    struct Range {
        const char* at;
        int64_t bytes;
    };
    Range range_[4];
    int64_t count_ = 0;
};

// As add_powers; derivatives by the squared distances as factors, and their sums by rows (of each lane) and columns.
template <int C>
MMFAST_INLINE void differentiate(const Scaled& s, const Chain<float>& chain, float factor, const float* z,
                                 int64_t first, int64_t rows, PowerSums<C>& sums, Weights& w, float* row_lanes,
                                 double* column_sums, const Ahead& ahead) {
    float slope[C];
    for (int c = 0; c < C; ++c) slope[c] = factor * chain.slope[c];
    Floats columns[kTile / 16] = {};
    for (int64_t g = first; g < first + rows; g += 32)
        for (int64_t p = 0; p < 16; p += kRowsOfPowers / 2) {
            Floats some[C] = {};
            for (int64_t i = g + p; i < g + p + kRowsOfPowers / 2; ++i) {
                ahead.fetch((g - first) / 2 + i - g, rows / 2);
                Floats row[2] = {Simd<float>::load(row_lanes + i * 16), Simd<float>::load(row_lanes + (i + 16) * 16)};
#pragma GCC unroll 2
                for (int64_t q = 0; q < 2; ++q) {
                    Floats t[4], h[4];  // two rows, 16 apart, of two vectors
                    widest<2, 2>(s, z, i, 16, 32 * q, t);
                    for (int u = 0; u < 4; ++u) {
                        some[0] += t[u];
                        h[u] = slope[0] * t[u];
                    }
                    for (int c = 1; c < C; ++c)
                        for (int u = 0; u < 4; ++u) {
                            t[u] *= t[u];
                            some[c] += t[u];
                            h[u] += slope[c] * t[u];
                        }
                    for (int r = 0; r < 2; ++r) row[r] += h[2 * r] + h[2 * r + 1];
                    columns[2 * q] += h[0] + h[2];
                    columns[2 * q + 1] += h[1] + h[3];
                    Words high[4], low[4];
                    for (int u = 0; u < 4; ++u) {
                        high[u] = rounded_half(Simd<float>::bits<Floats, Words>(h[u])) & kHighHalf;
                        low[u] = rounded_half(Simd<float>::bits<Floats, Words>(h[u] - as_floats(high[u])));
                    }
                    for (int r = 0; r < 2; ++r) {
                        uint16_t* const left = w.left + ((g / 16 + r) * 2 + q) * 2 * kPart + (i - g) * 32;
                        put(left, upper_halves(high[2 * r], high[2 * r + 1]));
                        put(left + kPart, upper_halves(low[2 * r], low[2 * r + 1]));
                    }
                    for (int u = 0; u < 2; ++u) {
                        uint16_t* const right = w.right + (g / 32 * 4 + 2 * q + u) * 2 * kPart + (i - g) * 32;
                        put(right, upper_halves(high[u], high[u + 2]));
                        put(right + kPart, upper_halves(low[u], low[u + 2]));
                    }
                }
                for (int r = 0; r < 2; ++r) Simd<float>::store(row_lanes + (i + 16 * r) * 16, row[r]);
            }
            sums.add(some);
        }
    add_to<float>(columns, column_sums);
}

// ---- Strips ----------------------------------------------------------------------------------------------------------

struct Strip {
    const Program<float>& program;
    int64_t dimension, rows, columns;
    const Points<float>&a, &b;
    int64_t diagonal;  // the row of a that is b's first column, or -1
    bool cold, more;   // a's points were not met before; another tile follows b's in memory
    const StripGradients<float>* gradients;
};

// Whether digits would be lost, by the first row and its columns.
template <int C>
bool nearly_constant(const Strip& strip, const Scaled& s, const float* z) {
    const Chain<float>& chain = strip.program.chain[0];
    float least = 1, value = 0, all = 0;
    for (int64_t j = 0; j < strip.columns; j += 16) {
        Floats t[1];
        widest<1, 1>(s, z, 0, 0, j, t);
        for (int64_t l = 0; l < 16 && j + l < strip.columns; ++l) least = t[0][l] < least ? t[0][l] : least;
    }
    for (int c = 0; c < C; ++c, least *= least) {
        value += chain.weight[c] * least;
        all += chain.weight[c];
    }
    return __builtin_fabsf(value) > kNearlyConstant * __builtin_fabsf(all);
}

// What the products after the values of rows [i, i + rows), and those of the next ones, read that is in no near cache.
inline Ahead what_follows(const Strip& strip, int64_t i, int64_t rows) {
    const int64_t depth = split_depth(strip.dimension), row = split_row_stride(strip.dimension), next = i + rows;
    Ahead ahead;
    if (strip.cold) {
        ahead.add(strip.a.split_turned + i * 2 * depth, rows * 4 * depth);
        if (next < strip.rows) ahead.add(strip.a.split_rows + next * row, rows * 2 * row);
    }
    if (strip.more) {
        const int64_t parts = (strip.rows + rows - 1) / rows, share = kTile * 2 * depth / parts;
        for (const uint16_t* tile : {strip.b.split_columns, strip.b.split_across})
            ahead.add(tile + kTile * 2 * depth + i / rows * share, 2 * share);
    }
    return ahead;
}

// The products of weights with points: rows [i, i + rows) with those of b, the first `pairs` of them as columns.
MMFAST_INLINE void add_gradients(Blocks& blocks, const Strip& strip, const Weights& w, int64_t i, int64_t rows,
                                 int64_t pairs) {
    const StripGradients<float>& to = *strip.gradients;
    const int64_t depth = split_depth(strip.dimension), group = depth / 16 * 2 * kPart;  // of 32 points
    if (to.rows)
        for (int64_t d = 0; d < depth; d += 32) {
            const Right right{strip.b.split_across + d / 16 * 2 * kPart, 2 * kPart, group};
            for (int64_t r = 0; r < rows; r += 32)
                blocks.two(!to.first, 2, {w.left + r / 16 * 4 * kPart, 4 * kPart, kPart, 2 * kPart, kTileBytes}, right,
                           to.rows + (i + r) * to.stride + d, to.stride);
        }
    if (!to.columns || !pairs) return;
    for (int64_t d = 0; d < depth; d += 32) {
        const Left left{strip.a.split_turned + i / 32 * group + d / 16 * 2 * kPart, 2 * kPart, kPart, group,
                        kTileBytes};
        for (int64_t j = 0; j < kTile; j += 32)
            blocks.two<true>(i > 0, pairs / 32, left, {w.right + j / 16 * 2 * kPart, 2 * kPart, 8 * kPart},
                             to.columns + d * kTile + j, kTile);
    }
}

template <int C, bool kGradients>
bool strip_of(const Strip& strip, double* sum) {
    constexpr int64_t kRows = kGradients ? kGradientPhase : kPhase;
    const Chain<float>& chain = strip.program.chain[0];
    const float exponent = chain.exponent * 1.4426950408889634f;
    const StripGradients<float>* const to = strip.gradients;
    const FlushTinyNumbers flush;
    Blocks blocks;
    alignas(64) float z[kRows * kTile];
    alignas(64) double column_sums[kTile] = {};
    [[maybe_unused]] std::conditional_t<kGradients, Weights, Nothing> w;
    Scaled s;
    s.of_products = -2.0f * exponent;
    scale_norms(exponent, strip.b.norms, strip.columns, kTile, s.columns);
    PowerSums<C> sums, of_diagonal;
    for (int64_t i = 0; i < strip.rows; i += kRows) {
        const int64_t left = strip.rows - i, rows = left < kRows ? left : kRows, all = (rows + 31) / 32 * 32;
        // The tile of b's own points is the last one; a point with itself is no pair.
        const bool diagonal = strip.diagonal >= i && strip.diagonal < i + kRows;
        const int64_t pairs = diagonal ? strip.diagonal - i : all;
        multiply_points(blocks, strip.dimension, strip.a, i, all, strip.b, z);
        blocks.fence();
        scale_norms(exponent, strip.a.norms + i, rows, all, s.rows);
        if (i == 0 && nearly_constant<C>(strip, s, z)) return false;
        for (int64_t r = pairs; r < rows; ++r) z[r * kTile + r - pairs] = -__builtin_inff();
        if constexpr (kGradients) {
            double no_sums[kTile] = {};
            float* const lanes = to->row_lanes + i * 16;
            const Ahead ahead = what_follows(strip, i, kRows);
            if (pairs) differentiate<C>(s, chain, to->factor, z, 0, pairs, sums, w, lanes, column_sums, ahead);
            if (diagonal)
                differentiate<C>(s, chain, to->factor, z, pairs, all - pairs, of_diagonal, w, lanes, no_sums, ahead);
            blocks.fence();
            add_gradients(blocks, strip, w, i, all, pairs);
        } else {
            add_powers<C>(s, z, 0, pairs, sums);
            add_powers<C>(s, z, pairs, all - pairs, of_diagonal);
        }
    }
    blocks.fence();
    if constexpr (kGradients)
        for (int64_t j = 0; j < strip.columns; ++j) to->column_sums[j] += column_sums[j];
    *sum = sums.weighted(chain) + of_diagonal.weighted(chain) / 2;
    return true;
}

template <int C>
bool strip_of(const Strip& strip, double* sum) {
    return strip.gradients ? strip_of<C, true>(strip, sum) : strip_of<C, false>(strip, sum);
}

inline bool strip_sums(const Program<float>& program, int64_t dimension, const Points<float>& a, int64_t rows,
                       const Points<float>& b, int64_t columns, int64_t diagonal, bool cold, bool more,
                       const StripGradients<float>* gradients, double* sum) {
    const Strip strip{program, dimension, rows, columns, a, b, diagonal, cold, more, gradients};
    switch (program.chain[0].count) {
        case 1: return strip_of<1>(strip, sum);
        case 2: return strip_of<2>(strip, sum);
        case 3: return strip_of<3>(strip, sum);
        case 4: return strip_of<4>(strip, sum);
        case kMostPowers: return strip_of<kMostPowers>(strip, sum);
        default: return false;
    }
}

// rows[j][:] = the sums of a strip for its columns, [dimension][kTile].
inline void turn_sums(int64_t columns, int64_t dimension, const float* sums, float* rows, int64_t stride) {
    for (int64_t k = 0; k < dimension; k += 16)
        for (int64_t j = 0; j < columns; j += 16) {
            Floats x[16];
            for (int64_t d = 0; d < 16; ++d) x[d] = Simd<float>::load(sums + (k + d) * kTile + j);
            Simd<float>::transpose(x);
            for (int64_t l = 0; l < 16 && j + l < columns; ++l) Simd<float>::store(rows + (j + l) * stride + k, x[l]);
        }
}

}  // namespace
}  // namespace MMFAST_ISA
}  // namespace mmd
}  // namespace mmfast
