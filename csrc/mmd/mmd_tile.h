// What the sweeps of mmd_cpu.cpp ask of one tile; mmd_tile.cpp implements it once per instruction set, and for float also
// with the matrix unit (amx).
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/scalar_types.h"
#include "mmd/mmd_core.h"

namespace mmfast {
namespace mmd {

// A tile is kTile x kTile pairs of points, its rows kTile values apart.
constexpr int64_t kTile = 64;
constexpr int64_t whole_tiles(int64_t points) {
    return (points + kTile - 1) / kTile * kTile;
}
// Vectors of points in a panel of a tile's columns.
constexpr int kStrip = 2;
// Points of at most so many dimensions are compared difference by difference, which is exact and no slower.
constexpr int64_t kFewDimensions = 8;

// A chain of Gaussians, each 2^squarings times as narrow as the one before: one exp for all of them.
template <class T>
struct Chain {
    static constexpr int kMost = 16;
    T exponent;  // -gamma of the widest
    int count;
    int squarings[kMost];  // before this one
    T weight[kMost], slope[kMost];
};

// Sum of the terms of one layer, in the form in which it is computed.
template <class T>
struct Program {
    static constexpr int kMostChains = 16, kMostTerms = 64;
    Metric metric;
    bool roots;    // a term is a function of the distance itself
    bool doubles;  // one chain in which each Gaussian is the square of the one before, as DAN's are and as one alone is
    int chains, others, terms;
    Chain<T> chain[kMostChains];
    Term<T> other[kMostTerms];  // what stands in no chain
    Term<T> term[kMostTerms];   // all, in the caller's order
};

// Points of one layer that are ready to be compared.
template <class T>
struct Points {
    T* rows;    // [n][stride], less the centre, zero beyond the dimension
    T* panels;  // the same with the point along the lanes, for each kTile points; or null
    T* norms;   // [n] |row|^2
    int64_t stride;
    // For the matrix unit (mmd_amx.h), else null: parts of bfloat16, of rows on the left and of columns on the right.
    uint16_t *split_rows = nullptr, *split_columns = nullptr;
    int passes = 0;  // products of parts: 1 is high high, 3 all but low low, 4 all
    // The same parts as factors of weights, of columns (across) and of rows (turned); see mmd_amx_strip.h.
    uint16_t *split_across = nullptr, *split_turned = nullptr;
};

// bfloat16 values of a part of a row; from a row of both parts to the next: lines of the cache that do not coincide.
constexpr int64_t split_depth(int64_t dimension) {
    return (dimension + 31) / 32 * 32;
}
constexpr int64_t split_row_stride(int64_t dimension) {
    return 2 * split_depth(dimension) + 32;
}

// Dimensions of a slice of points (mmd_slices.h); the last has up to a line of the cache more.
template <class T>
constexpr int64_t kLine = 64 / int64_t(sizeof(T));
template <class T>
constexpr int64_t kSlice = 8 * kLine<T>;

struct Source {
    const void* data;
    ScalarType type;
    int64_t row_stride, column_stride, dimension;
};

// Memory that is read before long.
struct Soon {
    struct Range {
        const void* at;
        int64_t bytes;
        bool written;
    };
    Range range[5];
    int count = 0;
    void add(const void* at, int64_t bytes, bool written = false) { range[count++] = {at, bytes, written}; }
};

// Where a strip's derivatives by the squared distances go: times `factor`, their sums by rows (one for each of 16 lanes) and
// columns, the sums of each row of a with the points of b, and of each column of b with those of a, [dimension][kTile].
template <class T>
struct StripGradients {
    T factor;
    T* row_lanes;         // += [rows][16], with room for whole tiles
    double* column_sums;  // +=
    T* rows;              // `stride` apart, with room for whole tiles and 32 dimensions; or null
    int64_t stride;
    bool first;  // nothing is in `rows` yet
    T* columns;  // or null; zero where there is no pair
};

template <class T>
struct TileKernels {
    int64_t lanes;
    bool splits;  // has a use for Points::split_rows and split_columns
    // Points `first` .. of a source. With panels, at most kTile of them.
    void (*pack)(const Source& from, int64_t first, int64_t count, const T* centre, const Points<T>& to);
    // z[i][j] for `rows` points of a (from `first` on) and the kTile of b's panels.
    void (*compare)(Metric metric, bool roots, int64_t dimension, const Points<T>& a, int64_t first, int64_t rows,
                    const Points<T>& b, int64_t columns, T* z);
    // sums[:] += rows of T without gaps between their values.
    void (*add_rows)(int64_t count, int64_t dimension, const T* rows, int64_t stride, double* sums);
    // The sum of the squared distances of such rows to a centre.
    double (*squares_about)(int64_t count, int64_t dimension, const T* rows, int64_t stride, const double* centre);
    // What compare() does, from some of the dimensions at a time, at most kSlice<T> and a line: z = or += the products, and
    // at the end of a squared distance, when the lengths are complete, what follows from them.
    void (*compare_slice)(bool starts, bool ends_distance, int64_t depth, const Points<T>& a, int64_t first,
                          int64_t rows, const Points<T>& b, int64_t columns, T* z);
    // k = the kernel at z; h = its derivative by z, unless null. Either may take the place of z.
    void (*evaluate)(const Program<T>& program, int64_t rows, const T* z, T* k, T* h);
    // The sum of the kernel's values at z; with `slopes`, z becomes factor times the derivatives by z, whose sums are added to
    // row_sums[i] and column_sums[j] unless null.
    double (*evaluate_sum)(const Program<T>& program, int64_t rows, bool slopes, T factor, T* z, double* row_sums,
                           double* column_sums);
    // The sum of the kernel's values for the first `rows` of a and the `columns` of b, split points, of a program that only doubles,
    // and with `gradients` what derivatives add to them. The tile of a that begins at row `diagonal` holds the points of b: each of
    // its pairs counts once, a point with itself not. What is wanted `soon` is brought near meanwhile. False, and nothing
    // done, where digits would be lost. Null where nothing is gained by it.
    bool (*strip_sums)(const Program<T>& program, int64_t dimension, const Points<T>& a, int64_t rows,
                       const Points<T>& b, int64_t columns, int64_t diagonal, const Soon& soon,
                       const StripGradients<T>* gradients, double* sum);
    // rows[j][:] += sums[:][j], [dimension][kTile] in whole vectors. Null as strip_sums.
    void (*add_turned)(int64_t columns, int64_t dimension, const T* sums, T* rows, int64_t stride);
    // sums[term][4] += the derivatives by the parameters, weighted with g.
    void (*parameters)(const Program<T>& program, int64_t rows, const T* z, const T* g, double* sums);
    // Sum of u_i v_j k_ij; null stands for ones. row_sums[i] += sum_j v_j k_ij, column_sums[j] += sum_i u_i k_ij and
    // *squares = sum of k_ij^2 unless null.
    double (*reduce)(int64_t rows, const T* k, const T* u, const T* v, double* row_sums, double* column_sums,
                     double* squares);
    // row_sums[i] += sum_j w_ij, column_sums[j] += sum_i w_ij, of derivatives: summed up in T within the tile.
    void (*add_sums)(int64_t rows, const T* w, double* row_sums, double* column_sums);
    double (*inner)(int64_t rows, const T* a, const T* b);  // sum of a_ij b_ij
    // g_ij = row[i] + column[j] + own k_ij + cross l_ij, without the last where there is no l; `column` has kTile values.
    void (*combine)(int64_t rows, const double* row, const double* column, T own, const T* k, T cross, const T* l,
                    T* g);
    void (*multiply)(int64_t rows, const T* a, T* b);                // b *= a
    void (*scale)(int64_t rows, T c, const T* u, const T* v, T* h);  // h_ij *= c u_i v_j
    // c[i][:] += sum_k a_ik b[k][:] (a_ki if transposed), `width` values a row, a whole number of vectors.
    void (*product)(bool transposed, int64_t rows, int64_t depth, int64_t width, const T* a, const T* b,
                    int64_t b_stride, T* c, int64_t c_stride);
    // The same where errors of some 2^-17 of each term average out.
    void (*product_averaged)(bool transposed, int64_t rows, int64_t depth, int64_t width, const T* a, const T* b,
                             int64_t b_stride, T* c, int64_t c_stride);
    // a_gradient[i][:] -= sum_j w_ij (a_i - b_j), b_gradient[j][:] += sum_i w_ij (a_i - b_j), for few dimensions. The rows
    // of both gradients are b.stride apart.
    void (*differences)(int64_t rows, int64_t columns, int64_t dimension, const T* w, const T* a, const Points<T>& b,
                        T* a_gradient, T* b_gradient);
    // to[i][:] += scale (sums[i] points[i][:] - summed[i][:]), where points or summed may be null for zeros. The rows of both are
    // `stride` apart.
    void (*put)(int64_t count, int64_t width, T scale, const T* summed, const T* points, int64_t stride,
                const double* sums, T* to, int64_t to_stride);
    // a_gradient[i][:] += sum_j w_ij sign(a_i - b_j), b_gradient[j][:] -= sum_i w_ij sign(a_i - b_j)
    void (*signs)(int64_t rows, int64_t columns, int64_t width, const T* w, const T* a, const T* b, int64_t stride,
                  T* a_gradient, T* b_gradient);
};

// Those of best_isa() (mmd_isa.cpp).
template <class T>
const TileKernels<T>& tiles();
template <>
const TileKernels<float>& tiles();
template <>
const TileKernels<double>& tiles();

#define MMFAST_DECLARE_TILES(isa)           \
    namespace isa {                         \
    TileKernels<float> mmd_tiles_float();   \
    TileKernels<double> mmd_tiles_double(); \
    }
MMFAST_DECLARE_TILES(baseline)
#if defined(MMFAST_X86)
MMFAST_DECLARE_TILES(avx2)
MMFAST_DECLARE_TILES(avx512)
#endif
#if defined(MMFAST_AMX)
MMFAST_DECLARE_TILES(amx)  // of float only
#endif
#undef MMFAST_DECLARE_TILES

}  // namespace mmd
}  // namespace mmfast
