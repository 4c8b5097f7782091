// Whole strips of pairs on the matrix unit: the points of a block with a tile's columns, values and gradients, of one chain of
// Gaussians each the square of the one before. Part of mmd_amx.h's code for the instruction set amx.
//
// Note: [Values between products]
//   While tiles are loaded and multiplied, the second of the two units of 512 bits adds and compares bits but does not multiply,
//   so vectors have half of their speed at most, and whatever waits for it stands in the way of the products that follow.
//   Measured on an Emerald Rapids: six products and their loads take 112 cycles; with 14 multiply-adds after each, which take 45
//   by themselves, 124; with 24 of them 164. So the values of 128 rows are computed between the products of the next ones,
//   some 14 instructions after each product, a step of the exponential at a time for four vectors. What is left
//   when the products are done follows alone. With gradients it is twice as many, since there are few products in the
//   64 dimensions that are usual: where the unit has enough registers (see [Few tiles] in amx.h) that is no gain and no loss.
//   Floors a pair: 3 D / 512 cycles for each product of D dimensions in three parts, of which values take one and gradients
//   two more; values of five Gaussians 22 operations for 16 pairs, with derivatives 37, at two a cycle; where exponents are
//   near, 17 and 32.
//
// Note: [Near exponents]
//   By the lengths of its points alone a strip may know that all of its exponents are from -1.5 to 0: with a bandwidth about as
//   large as the mean of distances most have. 2^x is one polynomial then, and squares are added up by additions, for which
//   both units are there while tiles are under way. It leaves registers for two rows at once, which is worth it where there are
//   few products for each row.
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

constexpr int kPlaces = 6;  // products of a step, after each of which something else is woven in

// Sums of 16 x 32 products, in few tiles: see [Few tiles] in amx.h.
class Blocks {
public:
    // 32 rows, of `steps` x 32 dimensions; added to what is there, or not. After a step's i-th product woven.place<i>() is
    // called. If kPassing the rows are not used again soon: see [Passing by] in amx.h.
    template <bool kPassing, class Woven>
    MMFAST_INLINE void two(bool adds, int64_t steps, const Left& a, const Right& b, float* to, int64_t stride,
                           Woven& woven) {
#pragma GCC unroll 1
        for (int64_t i = 0; i < 2; ++i)
            one<kPassing>(adds, steps, a.at + i * a.next, a, b, to + i * 16 * stride, 4 * stride, woven);
    }
    MMFAST_INLINE void fence() { unit_.fence(); }

private:
    template <int kNumber, bool kPassing>
    MMFAST_INLINE void load(const uint16_t* from, int64_t bytes) {
        if constexpr (kPassing) unit_.template load_passing<kNumber>(from, bytes);
        else unit_.template load<kNumber>(from, bytes);
    }
    template <int kSum, int kLeft, int kPlace, class Woven>
    MMFAST_INLINE void multiply(Woven& woven) {
        unit_.template multiply<kSum, kLeft, 6>();
        woven.template place<kPlace>();
    }
    template <bool kPassing, class Woven>
    MMFAST_INLINE void one(bool adds, int64_t steps, const uint16_t* left, const Left& a, const Right& b, float* to,
                           int64_t bytes, Woven& woven) {
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
            unit_.template load<6>(right, kTileBytes);
            multiply<0, 4, 0>(woven);
            multiply<0, 5, 1>(woven);
            unit_.template load<6>(right + kPart, kTileBytes);
            multiply<0, 4, 2>(woven);
            unit_.template load<6>(right + b.next, kTileBytes);
            multiply<1, 4, 3>(woven);
            multiply<1, 5, 4>(woven);
            unit_.template load<6>(right + b.next + kPart, kTileBytes);
            multiply<1, 4, 5>(woven);
        }
        unit_.template store<0>(to, bytes);
        unit_.template store<1>(to + 16, bytes);
    }

    MatrixUnit unit_;
};

// Dimensions of 32 points of b, 32 KiB of parts, that stay in the first cache while rows of a pass by.
constexpr int64_t kStripDepth = 256;

// z[rows][64] = the products of points of a, from `first` on, and the tile's of b.
template <class Woven>
MMFAST_INLINE void multiply_points(Blocks& blocks, int64_t dimension, const Points<float>& a, int64_t first,
                                   int64_t rows, const Points<float>& b, float* z, Woven& woven) {
    const int64_t depth = split_depth(dimension), row = split_row_stride(dimension), group = 32 * depth;
    const int64_t slices = (depth + kStripDepth - 1) / kStripDepth, steps = depth / 32;
    const auto two = [&]<bool kPassing>(int64_t slice, int64_t r, int64_t j) MMFAST_LAMBDA {
        const int64_t from = slice * steps / slices, to = (slice + 1) * steps / slices;
        blocks.two<kPassing>(
            slice > 0, to - from, {a.split_rows + (first + r) * row + 32 * from, 16 * row, depth, 32, 2 * row},
            {b.split_columns + j / 16 * group + from * 2 * kPart, group, 2 * kPart}, z + r * kTile + j, kTile, woven);
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

// Rows whose values are computed while the unit multiplies the next ones.
constexpr int64_t kPhase = 128;

// Weights as a left factor, [16 rows][32 columns][high, low], and as a right one, [32 rows][16 columns][high, low].
struct Weights {
    alignas(64) uint16_t left[2 * kPhase * kTile], right[2 * kPhase * kTile];
};

struct Scaled {
    // The exponent of 2 is this times the product of two points, and these, and the same of rows, for their norms; minus
    // infinity where there is no point.
    float of_products;
    alignas(64) float columns[kTile];
};

// A NaN becomes the one whose lower half is 0, which rounded_half() keeps.
inline void scale_norms(float exponent, const float* norms, int64_t count, int64_t all, float* to, float more = 0) {
    for (int64_t i = 0; i < all; ++i) {
        const float x = i < count ? exponent * norms[i] + more : -__builtin_inff();
        to[i] = x == x ? x : __builtin_nanf("");
    }
}

// The widest Gaussian of rows and columns of a tile: exponents first, then the steps. If kNear, those of Exp2NearSteps; the
// norms of rows have its middle added then.
template <int kRows, int kColumns, bool kNear>
struct Widest : std::conditional_t<kNear, Exp2NearSteps<kRows * kColumns>, Exp2Steps<kRows * kColumns>> {
    MMFAST_INLINE void exponents(const float* rows, const Floats (&columns)[kColumns], Floats of_products,
                                 const float* z, int64_t apart) {
        for (int r = 0; r < kRows; ++r)
            for (int u = 0; u < kColumns; ++u) {
                const Floats products = Simd<float>::load(z + r * apart * kTile + 16 * u);
                const Floats exponent = products * of_products + (rows[r * apart] + columns[u]);
                this->x[r * kColumns + u] = kNear ? exponent : Simd<float>::min(Floats{}, exponent);  // a NaN stays
            }
    }
    // What of the steps goes with a part of those who weave them: of kNear the first one with the exponents.
    template <int kPlace>
    MMFAST_INLINE void part() {
        constexpr int kOf = kNear ? kPlace : kPlace - 1;
        if constexpr (kOf >= 0 && kOf < Widest::kSteps) this->template step<kOf>();
    }
};
template <int kColumns>
MMFAST_INLINE void load_columns(const Scaled& s, int64_t j, Floats (&to)[kColumns]) {
    for (int u = 0; u < kColumns; ++u) to[u] = Simd<float>::load(s.columns + j + 16 * u);
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

// Lines of memory that are asked for while values are computed: tiles of the unit would wait for each.
class Ahead {
public:
    // In `parts` calls of fetch().
    Ahead(const Soon& soon, int64_t parts) : count_(soon.count) {
        for (int n = 0; n < count_; ++n) {
            const int64_t lines = (soon.range[n].bytes + 63) / 64;
            range_[n] = {static_cast<const char*>(soon.range[n].at), lines, (lines + parts - 1) / parts,
                         soon.range[n].written};
        }
    }
    MMFAST_INLINE void fetch() {
        for (int n = 0; n < count_; ++n) {
            Lines& l = range_[n];
            const int64_t some = l.each < l.left ? l.each : l.left;
            if (l.written)
                for (int64_t i = 0; i < some; ++i) __builtin_prefetch(l.at + 64 * i, 1);
            else
                for (int64_t i = 0; i < some; ++i) __builtin_prefetch(l.at + 64 * i, 0, 2);
            l.at += 64 * some;
            l.left -= some;
        }
    }

private:
    struct Lines {
        const char* at;
        int64_t left, each;
        bool written;
    };
    Lines range_[sizeof(Soon::range) / sizeof(Soon::Range)];
    int count_;
};

// t^(2^c) of kCount values, of the power before, and added up. A square is multiplied and then added: additions find a unit
// while tiles are under way.
template <int c, int C, int kCount>
MMFAST_INLINE void add_power(Floats (&t)[kCount], Floats (&sums)[C]) {
    if constexpr (c < C)
        for (int u = 0; u < kCount; ++u) {
            if (c) t[u] *= t[u];
            sums[c] += t[u];
        }
}

// Adds up the powers of rows, so many in a step's places.
template <int C, bool kNear, int kRows>
class Adding {
public:
    explicit Adding(Ahead& ahead) : ahead_(&ahead) {}
    void begin(const Scaled& s, const float* rows, const float* z, int64_t first, int64_t end, PowerSums<C>& sums) {
        rows_ = rows;
        of_products_ = Floats{} + s.of_products;
        load_columns(s, 0, columns_);
        z_ = z;
        row_ = first;
        end_ = end;
        sums_ = &sums;
    }
    template <int kPlace>
    MMFAST_INLINE void place() {
        if (row_ >= end_) return;
        part<kPlace>();
        if constexpr (kPlace == kPlaces - 1) next();
    }
    MMFAST_INLINE void finish() {
        while (row_ < end_) all(std::make_index_sequence<kPlaces>());
    }

private:
    template <size_t... K>
    MMFAST_INLINE void all(std::index_sequence<K...>) {
        (part<int(K)>(), ...);
        next();
    }
    template <int... c>
    MMFAST_INLINE void powers() {
        (add_power<c>(w_.x, some_), ...);
    }
    template <int kStep>
    MMFAST_INLINE void part() {
        if (kStep == 0 && row_ % 2 == 0) ahead_->fetch();
        if constexpr (kStep == 0) w_.exponents(rows_ + row_, columns_, of_products_, z_ + row_ * kTile, 1);
        w_.template part<kStep>();
        if constexpr (kNear) {
            if constexpr (kStep == 3) powers<0, 1>();
            if constexpr (kStep == 4) powers<2>();
        } else if constexpr (kStep == 4) {
            powers<0, 1, 2>();
        }
        if constexpr (kStep == 5) powers<3, 4>();
    }
    MMFAST_INLINE void next() {
        row_ += kRows;
        if (row_ % kRowsOfPowers) return;
        sums_->add(some_);
        for (int c = 0; c < C; ++c) some_[c] = Floats{};
    }

    Widest<kRows, kWide, kNear> w_;
    Floats some_[C] = {}, columns_[kWide] = {}, of_products_ = {};
    const float *rows_ = nullptr, *z_ = nullptr;
    PowerSums<C>* sums_ = nullptr;
    Ahead* ahead_;
    int64_t row_ = 0, end_ = 0;
};

// As Adding; derivatives by the squared distances as factors, and their sums by rows (of each lane) and columns.
template <int C, bool kNear>
class Differentiating {
public:
    Differentiating(const Chain<float>& chain, float factor, Ahead& ahead) : ahead_(&ahead) {
        for (int c = 0; c < C; ++c) slope_[c] = factor * chain.slope[c];
    }
    void begin(const Scaled& s, const float* rows, const float* z, int64_t first, int64_t end, PowerSums<C>& sums,
               Weights& w, float* row_lanes, double* column_sums) {
        s_ = &s;
        rows_ = rows;
        z_ = z;
        row_ = first;
        end_ = end;
        sums_ = &sums;
        weights_ = &w;
        row_lanes_ = row_lanes;
        column_sums_ = column_sums;
    }
    template <int kPlace>
    MMFAST_INLINE void place() {
        if (row_ >= end_) return;
        part<2 * kPlace>();
        part<2 * kPlace + 1>();
        if constexpr (kPlace == kPlaces - 1) next();
    }
    MMFAST_INLINE void finish() {
        while (row_ < end_) all(std::make_index_sequence<2 * kPlaces>());
        if (column_sums_) add_to<float>(columns_, column_sums_);
        for (auto& x : columns_) x = Floats{};
    }

private:
    template <size_t... K>
    MMFAST_INLINE void all(std::index_sequence<K...>) {
        (part<int(K)>(), ...);
        next();
    }
    template <int c>
    MMFAST_INLINE void power() {
        if constexpr (c < C)
            for (int u = 0; u < 4; ++u) {
                if (c) w_.x[u] *= w_.x[u];
                some_[c] += w_.x[u];
                h_[u] = c ? h_[u] + slope_[c] * w_.x[u] : slope_[c] * w_.x[u];
            }
    }
    // Two rows, 16 apart, of two vectors.
    template <int kStep>
    MMFAST_INLINE void part() {
        const int64_t i = row_;
        if (kStep == 0 && !q_) ahead_->fetch();
        if constexpr (kStep == 0) {
            Floats columns[2];
            load_columns(*s_, 32 * q_, columns);
            w_.exponents(rows_ + i, columns, Floats{} + s_->of_products, z_ + i * kTile + 32 * q_, 16);
        }
        w_.template part<kStep>();
        if constexpr (kNear) {
            if constexpr (kStep == 3) power<0>();
            if constexpr (kStep == 4) power<1>();
        } else if constexpr (kStep == 4) {
            power<0>();
            power<1>();
        }
        if constexpr (kStep == 5) power<2>();
        if constexpr (kStep == 6) power<3>();
        if constexpr (kStep == 7) power<4>();
        if constexpr (kStep == 8) {
            for (int r = 0; r < 2; ++r) {
                float* const lanes = row_lanes_ + (i + 16 * r) * 16;
                Simd<float>::store(lanes, Simd<float>::load(lanes) + (h_[2 * r] + h_[2 * r + 1]));
            }
            for (int u = 0; u < 2; ++u) columns_[2 * q_ + u] += h_[u] + h_[u + 2];
        }
        if constexpr (kStep == 9)
            for (int u = 0; u < 4; ++u) {
                high_[u] = rounded_half(Simd<float>::bits<Floats, Words>(h_[u])) & kHighHalf;
                low_[u] = rounded_half(Simd<float>::bits<Floats, Words>(h_[u] - as_floats(high_[u])));
            }
        if constexpr (kStep == 10)
            for (int r = 0; r < 2; ++r) {
                uint16_t* const left = weights_->left + ((i / 32 * 2 + r) * 2 + q_) * 2 * kPart + i % 16 * 32;
                put(left, upper_halves(high_[2 * r], high_[2 * r + 1]));
                put(left + kPart, upper_halves(low_[2 * r], low_[2 * r + 1]));
            }
        if constexpr (kStep == 11)
            for (int u = 0; u < 2; ++u) {
                uint16_t* const right = weights_->right + (i / 32 * 4 + 2 * q_ + u) * 2 * kPart + i % 16 * 32;
                put(right, upper_halves(high_[u], high_[u + 2]));
                put(right + kPart, upper_halves(low_[u], low_[u + 2]));
            }
    }
    MMFAST_INLINE void next() {
        q_ ^= 1;
        if (q_) return;
        ++row_;
        if (row_ % 16 == 0) row_ += 16;
        if (row_ % (kRowsOfPowers / 2)) return;
        sums_->add(some_);
        for (int c = 0; c < C; ++c) some_[c] = Floats{};
    }

    Widest<2, 2, kNear> w_;
    Floats h_[4], columns_[4] = {}, some_[C] = {};
    Words high_[4], low_[4];
    float slope_[C];
    const Scaled* s_ = nullptr;
    const float *rows_ = nullptr, *z_ = nullptr;
    PowerSums<C>* sums_ = nullptr;
    Weights* weights_ = nullptr;
    float* row_lanes_ = nullptr;
    double* column_sums_ = nullptr;
    Ahead* ahead_;
    int64_t row_ = 0, end_ = 0, q_ = 0;
};

// ---- Strips ----------------------------------------------------------------------------------------------------------

struct Strip {
    const Program<float>& program;
    int64_t dimension, rows, columns;
    const Points<float>&a, &b;
    int64_t diagonal;  // the row of a that is b's first column, or -1
    const Soon& soon;
    const StripGradients<float>* gradients;
};

// Whether digits would be lost, by the first row and its columns.
template <int C, bool kNear>
bool nearly_constant(const Strip& strip, const Scaled& s, const float* rows, const float* z) {
    const Chain<float>& chain = strip.program.chain[0];
    Floats lowest = Floats{} + 1;
    for (int64_t j = 0; j < strip.columns; j += 16) {
        Widest<1, 1, kNear> w;
        Floats columns[1];
        load_columns(s, j, columns);
        w.exponents(rows, columns, Floats{} + s.of_products, z + j, 0);
        w.template step<0>();
        w.template step<1>();
        w.template step<2>();
        for (int64_t l = strip.columns - j; l < 16; ++l) w.x[0][l] = 1;
        lowest = w.x[0] < lowest ? w.x[0] : lowest;
    }
    float least = Simd<float>::lowest(lowest), value = 0, all = 0;
    for (int c = 0; c < C; ++c, least *= least) {
        value += chain.weight[c] * least;
        all += chain.weight[c];
    }
    return __builtin_fabsf(value) > kNearlyConstant * __builtin_fabsf(all);
}

// The products of weights with points: rows [i, i + rows) with those of b, the first `pairs` of them as columns.
template <class Woven>
MMFAST_INLINE void add_gradients(Blocks& blocks, const Strip& strip, const Weights& w, int64_t i, int64_t rows,
                                 int64_t pairs, Woven& woven) {
    const StripGradients<float>& to = *strip.gradients;
    const int64_t depth = split_depth(strip.dimension), group = depth / 16 * 2 * kPart;  // of 32 points
    if (to.rows)
        for (int64_t d = 0; d < depth; d += 32) {
            const Right right{strip.b.split_across + d / 16 * 2 * kPart, 2 * kPart, group};
            for (int64_t r = 0; r < rows; r += 32)
                blocks.two<false>(!to.first, 2, {w.left + r / 16 * 4 * kPart, 4 * kPart, kPart, 2 * kPart, kTileBytes},
                                  right, to.rows + (i + r) * to.stride + d, to.stride, woven);
        }
    if (!to.columns || !pairs) return;
    for (int64_t d = 0; d < depth; d += 32) {
        const Left left{strip.a.split_turned + i / 32 * group + d / 16 * 2 * kPart, 2 * kPart, kPart, group,
                        kTileBytes};
        for (int64_t j = 0; j < kTile; j += 32)
            blocks.two<true>(i > 0, pairs / 32, left, {w.right + j / 16 * 2 * kPart, 2 * kPart, 8 * kPart},
                             to.columns + d * kTile + j, kTile, woven);
    }
}

// Some rows of a strip with all of its columns.
struct Phase {
    int64_t first, rows, all;  // of which `rows`, and `all` in whole blocks
    int64_t pairs;             // the rows up to those that are the columns' own points
};
inline Phase phase_of(const Strip& strip, int64_t number) {
    const int64_t i = number * kPhase, left = strip.rows - i, rows = left < kPhase ? left : kPhase;
    const int64_t all = (rows + 31) / 32 * 32;
    return {i, rows, all, strip.diagonal >= i && strip.diagonal < i + kPhase ? strip.diagonal - i : all};
}

// Whether all exponents are near by the lengths of points: |a - b| <= |a| + |b|.
inline bool all_near(const Strip& strip, float exponent) {
    if (strip.columns < kTile || strip.rows % 32) return false;  // what is no point is infinitely far
    const auto longest = [](const float* norms, int64_t count) {
        Floats most{};
        for (int64_t i = 0; i < count; i += 16) most = Simd<float>::max(most, Simd<float>::load(norms + i));
        return __builtin_sqrtf(Simd<float>::highest(most));
    };
    const float most = longest(strip.a.norms, strip.rows) + longest(strip.b.norms, kTile);
    return -exponent * most * most <= kExp2Near;
}

template <int C, bool kGradients, bool kNear>
bool strip_of(const Strip& strip, float exponent, double* sum) {
    const Chain<float>& chain = strip.program.chain[0];
    const StripGradients<float>* const to = strip.gradients;
    const FlushTinyNumbers flush;
    Blocks blocks;
    // While the products of a phase go into one, the values of the phase before are made of the other.
    alignas(64) float z[2][kPhase * kTile];
    alignas(64) double column_sums[kTile] = {};
    Scaled scaled;
    scaled.of_products = -2.0f * exponent;
    scale_norms(exponent, strip.b.norms, strip.columns, kTile, scaled.columns);
    float scaled_rows[2][kPhase], rows_with_diagonal[kPhase];
    PowerSums<C> sums, of_diagonal;
    Ahead ahead(strip.soon, (strip.rows + 1) / 2);
    const int64_t phases = (strip.rows + kPhase - 1) / kPhase;
    const auto products = [&](int64_t n, auto& woven) MMFAST_LAMBDA {
        const Phase p = phase_of(strip, n);
        multiply_points(blocks, strip.dimension, strip.a, p.first, p.all, strip.b, z[n % 2], woven);
        blocks.fence();
    };
    // False if digits would be lost.
    const auto prepare = [&](int64_t n) MMFAST_LAMBDA {
        const Phase p = phase_of(strip, n);
        float* const at = z[n % 2];
        scale_norms(exponent, strip.a.norms + p.first, p.rows, p.all, scaled_rows[n % 2], kNear ? kExp2NearMiddle : 0);
        if (n == 0 && nearly_constant<C, kNear>(strip, scaled, scaled_rows[n % 2], at)) return false;
        if (p.pairs == p.all) return true;
        // A point with itself is no pair: infinitely far.
        scale_norms(exponent, strip.a.norms + p.first, p.rows, p.all, rows_with_diagonal);
        for (int64_t r = p.pairs; r < p.rows; ++r) at[r * kTile + r - p.pairs] = -__builtin_inff();
        return true;
    };
    if constexpr (kGradients) {
        Weights weights[2];
        Differentiating<C, kNear> values(chain, to->factor, ahead);
        for (int64_t n = 0; n < phases + 2; ++n) {
            if (n < phases) products(n, values);
            if (n >= 2) {
                const Phase p = phase_of(strip, n - 2);
                add_gradients(blocks, strip, weights[n % 2], p.first, p.all, p.pairs, values);
            }
            values.finish();
            blocks.fence();
            if (n >= phases) continue;
            if (!prepare(n)) return false;
            const Phase p = phase_of(strip, n);
            float* const row_lanes = to->row_lanes + p.first * 16;
            if (p.pairs < p.all) {
                Differentiating<C, false> diagonal(chain, to->factor, ahead);
                diagonal.begin(scaled, rows_with_diagonal, z[n % 2], p.pairs, p.all, of_diagonal, weights[n % 2],
                               row_lanes, nullptr);
                diagonal.finish();
            }
            values.begin(scaled, scaled_rows[n % 2], z[n % 2], 0, p.pairs, sums, weights[n % 2], row_lanes,
                         column_sums);
        }
        for (int64_t j = 0; j < strip.columns; ++j) to->column_sums[j] += column_sums[j];
    } else {
        const auto add_up = [&](auto values) MMFAST_LAMBDA {
            for (int64_t n = 0; n < phases; ++n) {
                products(n, values);
                values.finish();
                if (!prepare(n)) return false;
                const Phase p = phase_of(strip, n);
                if (p.pairs < p.all) {
                    Adding<C, false, 1> diagonal(ahead);
                    diagonal.begin(scaled, rows_with_diagonal, z[n % 2], p.pairs, p.all, of_diagonal);
                    diagonal.finish();
                }
                values.begin(scaled, scaled_rows[n % 2], z[n % 2], 0, p.pairs, sums);
            }
            values.finish();
            return true;
        };
        // Where there are few products, twice the values between two of them.
        if (kNear && split_depth(strip.dimension) <= kStripDepth / 2) {
            if (!add_up(Adding<C, kNear, 2>(ahead))) return false;
        } else if (!add_up(Adding<C, kNear, 1>(ahead))) {
            return false;
        }
    }
    *sum = sums.weighted(chain) + of_diagonal.weighted(chain) / 2;
    return true;
}

template <int C>
bool strip_of(const Strip& strip, double* sum) {
    const float exponent = strip.program.chain[0].exponent * 1.4426950408889634f;
    if (all_near(strip, exponent))
        return strip.gradients ? strip_of<C, true, true>(strip, exponent, sum)
                               : strip_of<C, false, true>(strip, exponent, sum);
    return strip.gradients ? strip_of<C, true, false>(strip, exponent, sum)
                           : strip_of<C, false, false>(strip, exponent, sum);
}

inline bool strip_sums(const Program<float>& program, int64_t dimension, const Points<float>& a, int64_t rows,
                       const Points<float>& b, int64_t columns, int64_t diagonal, const Soon& soon,
                       const StripGradients<float>* gradients, double* sum) {
    const Strip strip{program, dimension, rows, columns, a, b, diagonal, soon, gradients};
    switch (program.chain[0].count) {
        case 1: return strip_of<1>(strip, sum);
        case 2: return strip_of<2>(strip, sum);
        case 3: return strip_of<3>(strip, sum);
        case 4: return strip_of<4>(strip, sum);
        case kMostPowers: return strip_of<kMostPowers>(strip, sum);
        default: return false;
    }
}

// rows[j][:] += the sums of a strip for its columns, [dimension][kTile].
inline void add_turned(int64_t columns, int64_t dimension, const float* sums, float* rows, int64_t stride) {
    for (int64_t k = 0; k < dimension; k += 16)
        for (int64_t j = 0; j < columns; j += 16) {
            Floats x[16];
            for (int64_t d = 0; d < 16; ++d) x[d] = Simd<float>::load(sums + (k + d) * kTile + j);
            Simd<float>::transpose(x);
            for (int64_t l = 0; l < 16 && j + l < columns; ++l) {
                float* const to = rows + (j + l) * stride + k;
                Simd<float>::store(to, Simd<float>::load(to) + x[l]);
            }
        }
}

}  // namespace
}  // namespace MMFAST_ISA
}  // namespace mmd
}  // namespace mmfast
