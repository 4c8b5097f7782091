// The work on one tile of pairs: compare, evaluate, reduce, multiply. Lanes are points of b (or features, in product()).
// Values and their sums are in mmd_values.h.
//
// Note: [Cost of a tile]
//   compare() of D dimensions is D multiply-adds a pair, evaluate() about 11 instructions a vector for one exp and 3 more
//   for each further Gaussian of a chain, a gradient 2 D multiply-adds a pair. The tiles in between are written and read
//   once: 16 KiB in float, which stays in the first cache and costs 2 instructions a vector; for that each step is written
//   once and serves every reduction.
#include <cstdint>
#include <cstring>

#include "common/simd.h"
#include "mmd/mmd_tile.h"
#include "mmd/mmd_values.h"
#if defined(MMFAST_AMX_TILES)
#include "mmd/mmd_amx_strip.h"
#endif

namespace mmfast {
namespace mmd {
namespace MMFAST_ISA {
namespace {

// Rows and vectors of a product that stay in registers: half of AVX-512's 32, which hides the latency of its two units,
// and three quarters of 16. Steps of a product between two jumps: a step of 256-bit vectors is short, and a thread that shares
// its core waits for the next instructions after each jump.
#if defined(__AVX512F__)
constexpr int kGroup = 8, kSteps = 1;
#else
constexpr int kGroup = 6, kSteps = 4;
#endif
// Dimensions whose panels fit into the first cache.
constexpr int64_t kDepth = 128;
// Rows fetched ahead of the one that is packed: a row waits for the third cache, and a page ends any prefetcher's guess.
constexpr int64_t kAhead = 6;

// ---- Points --------------------------------------------------------------------------------------------------------

// One row less the centre (which is as long as the row's stride, or null), and the square of its length. What lies `ahead`
// is fetched meanwhile.
template <class T, class From>
MMFAST_INLINE T pack_row(const From* from, int64_t step, int64_t ahead, int64_t dimension, const T* centre,
                         int64_t stride, T* to) {
    constexpr int64_t N = Simd<T>::lanes;
    Vec<T> square{};
    int64_t k = 0;
    const auto put = [&](Vec<T> x) MMFAST_LAMBDA {
        if (centre) x -= Simd<T>::load(centre + k);
        Simd<T>::store(to + k, x);
        square += x * x;
    };
    if constexpr (sizeof(From) == sizeof(T)) {
        if (step == 1)
            for (; k < dimension; k += N) {
                __builtin_prefetch(from + k + ahead);
                put(Simd<T>::load(reinterpret_cast<const T*>(from) + k, int(dimension - k)));
            }
    }
    for (; k < dimension; k += N) {
        alignas(64) T part[N] = {};
        const int64_t n = dimension - k < N ? dimension - k : N;
        for (int64_t i = 0; i < n; ++i) part[i] = T(from[(k + i) * step]);
        put(Simd<T>::load(part));
    }
    for (; k < stride; k += N) Simd<T>::store(to + k, Vec<T>{});
    return dimension <= kFewDimensions ? T(0) : Simd<T>::sum(square);  // few dimensions need no lengths
}

template <class T>
void pack(const Source& from, int64_t first, int64_t count, const T* centre, const Points<T>& to) {
    dispatch(from.type, [&](auto* kind) MMFAST_LAMBDA {
        using From = std::remove_pointer_t<decltype(kind)>;
        const From* const data = static_cast<const From*>(from.data);
        for (int64_t i = 0; i < count; ++i) {
            to.norms[i] = pack_row(data + (first + i) * from.row_stride, from.column_stride, kAhead * from.row_stride,
                                   from.dimension, centre, to.stride, to.rows + i * to.stride);
#if defined(MMFAST_AMX_TILES)
            if (i % 32 == 31) split_points(i - 31, from.dimension, to);  // before they leave the first cache
#endif
        }
    });
#if defined(MMFAST_AMX_TILES)
    if ((to.split_rows || to.split_columns) && count % kTile) {  // whole tiles, zero where there is no point
        const int64_t all = whole_tiles(count);
        std::memset(to.rows + count * to.stride, 0, size_t(all - count) * to.stride * sizeof(T));
        for (int64_t i = count / 32 * 32; i < all; i += 32) split_points(i, from.dimension, to);
    }
#endif
    if (to.panels || to.split_columns)
        for (int64_t i = count; i < kTile; ++i) to.norms[i] = to.norms[count - 1];
    if (!to.panels) return;
    // A panel is kStrip vectors wide; what has no point repeats the last one.
    constexpr int64_t N = Simd<T>::lanes, W = N * kStrip;
    for (int64_t j = 0; j < kTile && j / W * W < count; j += N) {
        const T* rows[N];
        for (int64_t i = 0; i < N; ++i) rows[i] = to.rows + (j + i < count ? j + i : count - 1) * to.stride;
        T* const panel = to.panels + j / W * W * to.stride + j % W;
        for (int64_t k = 0; k < from.dimension; k += N) {
            Vec<T> columns[N];
            Simd<T>::load_transposed(rows, k, columns);
            for (int64_t i = 0; i < N; ++i) Simd<T>::store(panel + (k + i) * W, columns[i]);
        }
    }
}

template <class T>
void add_rows(int64_t count, int64_t dimension, const T* rows, int64_t stride, double* sums) {
    constexpr int64_t N = Simd<double>::lanes;
    for (int64_t i = 0; i < count; ++i, rows += stride) {
        int64_t k = 0;
        for (; k + N <= dimension; k += N)
            Simd<double>::store(sums + k, Simd<double>::load(sums + k) + load_wide(rows + k));
        for (; k < dimension; ++k) sums[k] += double(rows[k]);
    }
}

template <class T>
double squares_about(int64_t count, int64_t dimension, const T* rows, int64_t stride, const double* centre) {
    constexpr int64_t N = Simd<double>::lanes;
    Vec<double> sum[2] = {};
    double rest = 0;
    for (int64_t i = 0; i < count; ++i, rows += stride) {
        int64_t k = 0;
        for (; k + 2 * N <= dimension; k += 2 * N)
            for (int64_t v = 0; v < 2; ++v) {
                const Vec<double> d = load_wide(rows + k + v * N) - Simd<double>::load(centre + k + v * N);
                sum[v] += d * d;
            }
        for (; k < dimension; ++k) rest += (double(rows[k]) - centre[k]) * (double(rows[k]) - centre[k]);
    }
    return Simd<double>::sum(sum[0] + sum[1]) + rest;
}

// ---- Products ------------------------------------------------------------------------------------------------------

// sum[r][v] += sum over k of a(r, k) b[k][v].
template <class T, int R, int S, bool kTransposed>
MMFAST_INLINE void multiply_add(int64_t depth, const T* a, int64_t a_stride, const T* b, int64_t b_stride,
                                Vec<T> (&sum)[R][S]) {
    constexpr int N = Simd<T>::lanes;
#pragma GCC unroll kSteps
    for (int64_t k = 0; k < depth; ++k) {
        Vec<T> column[S];
#pragma GCC unroll 8
        for (int v = 0; v < S; ++v) column[v] = Simd<T>::load(b + k * b_stride + v * N);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const T x = kTransposed ? a[k * a_stride + r] : a[r * a_stride + k];
#pragma GCC unroll 8
            for (int v = 0; v < S; ++v) sum[r][v] += x * column[v];
        }
    }
}

// f.template operator()<R>(i) for groups of R rows from i on that make up `rows`.
template <class F>
MMFAST_INLINE void for_groups(int64_t rows, const F& f) {
    int64_t i = 0;
    for (; i + kGroup <= rows; i += kGroup) f.template operator()<kGroup>(i);
    if (rows - i >= 4) {
        f.template operator()<4>(i);
        i += 4;
    }
    for (; i < rows; ++i) f.template operator()<1>(i);
}

template <class T, bool kTransposed, int S>
MMFAST_INLINE void product_strip(int64_t rows, int64_t depth, const T* a, const T* b, int64_t b_stride, T* c,
                                 int64_t c_stride) {
    constexpr int N = Simd<T>::lanes;
    for_groups(rows, [&]<int R>(int64_t i) MMFAST_LAMBDA {
        Vec<T> sum[R][S];
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < S; ++v) sum[r][v] = Simd<T>::load(c + (i + r) * c_stride + v * N);
        multiply_add<T, R, S, kTransposed>(depth, a + i * (kTransposed ? 1 : kTile), kTile, b, b_stride, sum);
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < S; ++v) Simd<T>::store(c + (i + r) * c_stride + v * N, sum[r][v]);
    });
}

template <class T>
void product(bool transposed, int64_t rows, int64_t depth, int64_t width, const T* a, const T* b, int64_t b_stride,
             T* c, int64_t c_stride) {
    constexpr int64_t N = Simd<T>::lanes;
    int64_t at = 0;
    for (; at + kStrip * N <= width; at += kStrip * N) {
        if (transposed) product_strip<T, true, kStrip>(rows, depth, a, b + at, b_stride, c + at, c_stride);
        else product_strip<T, false, kStrip>(rows, depth, a, b + at, b_stride, c + at, c_stride);
    }
    for (; at < width; at += N) {
        if (transposed) product_strip<T, true, 1>(rows, depth, a, b + at, b_stride, c + at, c_stride);
        else product_strip<T, false, 1>(rows, depth, a, b + at, b_stride, c + at, c_stride);
    }
}

// ---- Comparing -----------------------------------------------------------------------------------------------------

// z = (if it starts) or += the products of `depth` values from `at` on; then the squared distances.
template <class T>
MMFAST_INLINE void add_products(bool starts, bool ends_distance, int64_t at, int64_t depth, const Points<T>& a,
                                int64_t first, int64_t rows, const Points<T>& b, int64_t columns, T* z) {
    constexpr int N = Simd<T>::lanes, W = N * kStrip;
    const T* const a_norms =
        a.norms + first;  // for all that the compiler knows, storing z changes what Points point to
    const T* const a_rows = a.rows + first * a.stride + at;
    const int64_t a_stride = a.stride;
    for (int64_t j = 0; j < columns; j += W) {
        const T* const panel = b.panels + j * b.stride + at * W;
        const T* const b_norms = b.norms + j;
        for_groups(rows, [&]<int R>(int64_t i) MMFAST_LAMBDA {
            Vec<T> sum[R][kStrip];
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < kStrip; ++v)
                    sum[r][v] = starts ? Vec<T>{} : Simd<T>::load(z + (i + r) * kTile + j + v * N);
            multiply_add<T, R, kStrip, false>(depth, a_rows + i * a_stride, a_stride, panel, W, sum);
            if (ends_distance) {
                Vec<T> norms[kStrip];
                for (int v = 0; v < kStrip; ++v) norms[v] = Simd<T>::load(b_norms + v * N);
                for (int r = 0; r < R; ++r)
                    for (int v = 0; v < kStrip; ++v)  // a NaN stays
                        sum[r][v] = Simd<T>::max(Vec<T>{}, (a_norms[i + r] + norms[v]) - T(2) * sum[r][v]);
            }
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < kStrip; ++v) Simd<T>::store(z + (i + r) * kTile + j + v * N, sum[r][v]);
        });
    }
}

template <class T>
void compare_products(bool squared_distance, int64_t dimension, const Points<T>& a, int64_t first, int64_t rows,
                      const Points<T>& b, int64_t columns, T* z) {
    for (int64_t at = 0; at == 0 || at < dimension; at += kDepth) {
        const int64_t depth = dimension - at < kDepth ? dimension - at : kDepth;
        add_products(at == 0, squared_distance && at + depth == dimension, at, depth, a, first, rows, b, columns, z);
    }
}

template <class T>
void compare_slice(bool starts, bool ends_distance, int64_t depth, const Points<T>& a, int64_t first, int64_t rows,
                   const Points<T>& b, int64_t columns, T* z) {
#if defined(MMFAST_AMX_TILES)
    if (a.split_rows && b.split_columns)
        return compare_split(starts, ends_distance, depth, a, first, rows, b, columns, z);
#endif
    add_products(starts, ends_distance, 0, depth, a, first, rows, b, columns, z);
}

// Differences: sums of their squares or of their magnitudes.
template <class T, bool kSquared>
MMFAST_INLINE void compare_differences(int64_t dimension, const Points<T>& a, int64_t first, int64_t rows,
                                       const Points<T>& b, int64_t columns, T* z) {
    constexpr int N = Simd<T>::lanes, W = N * kStrip;
    for (int64_t j = 0; j < columns; j += W) {
        const T* const panel = b.panels + j * b.stride;
        for_groups(rows, [&]<int R>(int64_t i) MMFAST_LAMBDA {
            Vec<T> sum[R][kStrip] = {};
            for (int64_t k = 0; k < dimension; ++k) {
                Vec<T> column[kStrip];
                for (int v = 0; v < kStrip; ++v) column[v] = Simd<T>::load(panel + k * W + v * N);
                for (int r = 0; r < R; ++r)
                    for (int v = 0; v < kStrip; ++v) {
                        const Vec<T> x = a.rows[(first + i + r) * a.stride + k] - column[v];
                        sum[r][v] += kSquared ? x * x : x < 0 ? -x : x;
                    }
            }
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < kStrip; ++v) Simd<T>::store(z + (i + r) * kTile + j + v * N, sum[r][v]);
        });
    }
}

// Squared distances that are small beside the norms have lost their digits: these are computed again from differences.
template <class T>
MMFAST_INLINE void compare_again(T share, const Points<T>& a, int64_t first, int64_t rows, const Points<T>& b,
                                 int64_t columns, T* z) {
    constexpr int64_t N = Simd<T>::lanes;
    for (int64_t i = 0; i < rows; ++i) {
        const T* const x = a.rows + (first + i) * a.stride;
        const T norm = a.norms[first + i];
        for (int64_t j = 0; j < columns; j += N) {
            T* const at = z + i * kTile + j;
            const auto small = Simd<T>::load(at) < (Simd<T>::load(b.norms + j) + norm) * share;
            if (Simd<T>::all_zero((Vec<T>)small)) continue;  // true is a NaN
            for (int64_t v = 0; v < N && j + v < columns; ++v) {
                if (!small[v]) continue;
                const T* const y = b.rows + (j + v) * b.stride;
                Vec<T> sum{};
                for (int64_t k = 0; k < a.stride; k += N) {
                    const Vec<T> d = Simd<T>::load(x + k) - Simd<T>::load(y + k);
                    sum += d * d;
                }
                at[v] = Simd<T>::sum(sum);
            }
        }
    }
}

template <class T>
void compare(Metric metric, bool roots, int64_t dimension, const Points<T>& a, int64_t first, int64_t rows,
             const Points<T>& b, int64_t columns, T* z) {
    if (metric == Metric::l1) return compare_differences<T, false>(dimension, a, first, rows, b, columns, z);
    const bool l2 = metric == Metric::l2;
    if (l2 && dimension <= kFewDimensions)
        return compare_differences<T, true>(dimension, a, first, rows, b, columns, z);
    T share = T(1.0 / 128);
#if defined(MMFAST_AMX_TILES)
    if (a.split_rows && b.split_columns) {
        compare_split(true, l2, dimension, a, first, rows, b, columns, z);
        share = T(1.0 / 8);
    } else
#endif
        compare_products(l2, dimension, a, first, rows, b, columns, z);
    if (l2 && roots) compare_again(share, a, first, rows, b, columns, z);
}

// ---- Gradients -----------------------------------------------------------------------------------------------------

// Lanes are points of b: with few dimensions most of a vector of features would be padding.
template <class T>
void differences(int64_t rows, int64_t columns, int64_t dimension, const T* w, const T* a, const Points<T>& b,
                 T* a_gradient, T* b_gradient) {
    constexpr int64_t N = Simd<T>::lanes, C = kTile / N, W = N * kStrip;
    const int64_t stride = b.stride;
    for (int64_t k = 0; k < dimension; ++k) {
        Vec<T> column[C], below[C] = {};
        for (int64_t c = 0; c < C; ++c) {
            const int64_t j = c * N, panel = j / W * W;  // w is 0 where there is no point
            column[c] = panel < columns ? Simd<T>::load(b.panels + panel * stride + k * W + j - panel) : Vec<T>{};
        }
        for (int64_t i = 0; i < rows; ++i) {
            const T x = a[i * stride + k];
            Vec<T> sum{};
            for (int64_t c = 0; c < C; ++c) {
                const Vec<T> d = x - column[c], f = Simd<T>::load(w + i * kTile + c * N);
                sum += f * d;
                below[c] += f * d;
            }
            a_gradient[i * stride + k] -= Simd<T>::sum(sum);
        }
        alignas(64) T sums[kTile];
        for (int64_t c = 0; c < C; ++c) Simd<T>::store(sums + c * N, below[c]);
        for (int64_t j = 0; j < columns; ++j) b_gradient[j * stride + k] += sums[j];
    }
}

// Gradients wait for memory as points do (pack_row): what lies ahead is fetched.
template <class T>
void put(int64_t count, int64_t width, T scale, const T* summed, const T* points, int64_t stride, const double* sums,
         T* to, int64_t to_stride) {
    constexpr int64_t N = Simd<T>::lanes;
    for (int64_t i = 0; i < count; ++i, to += to_stride) {
        const T sum = points ? T(sums[i]) : T(0);
        for (int64_t k = 0; k < width; k += N) {
            __builtin_prefetch(to + k + kAhead * to_stride, 1);
            const Vec<T> from = summed ? Simd<T>::load(summed + i * stride + k) : Vec<T>{};
            const Vec<T> more = scale * ((points ? sum * Simd<T>::load(points + i * stride + k) : Vec<T>{}) - from);
            if (width - k >= N) Simd<T>::store(to + k, Simd<T>::load(to + k) + more);
            else Simd<T>::store(to + k, Simd<T>::load(to + k, int(width - k)) + more, int(width - k));
        }
    }
}

template <class T>
void signs(int64_t rows, int64_t columns, int64_t width, const T* w, const T* a, const T* b, int64_t stride,
           T* a_gradient, T* b_gradient) {
    constexpr int64_t N = Simd<T>::lanes;
    for (int64_t k = 0; k < width; k += N)
        for (int64_t i = 0; i < rows; ++i) {
            const Vec<T> x = Simd<T>::load(a + i * stride + k);
            Vec<T> sum = Simd<T>::load(a_gradient + i * stride + k);
            for (int64_t j = 0; j < columns; ++j) {
                const Vec<T> d = x - Simd<T>::load(b + j * stride + k), f = Simd<T>::splat(w[i * kTile + j]);
                const Vec<T> part = d > 0 ? f : d < 0 ? -f : d * f;  // a NaN of either stays
                sum += part;
                T* const to = b_gradient + j * stride + k;
                Simd<T>::store(to, Simd<T>::load(to) - part);
            }
            Simd<T>::store(a_gradient + i * stride + k, sum);
        }
}

template <class T>
void product_averaged(bool transposed, int64_t rows, int64_t depth, int64_t width, const T* a, const T* b,
                      int64_t b_stride, T* c, int64_t c_stride) {
#if defined(MMFAST_AMX_TILES)
    if (width >= 2 * Simd<T>::lanes) return product_split(transposed, rows, depth, width, a, b, b_stride, c, c_stride);
#endif
    product(transposed, rows, depth, width, a, b, b_stride, c, c_stride);
}

template <class T>
MMFAST_INLINE TileKernels<T> tiles_of() {
#if defined(MMFAST_AMX_TILES)
    constexpr bool splits = true;
    constexpr auto strip_sums = mmd::MMFAST_ISA::strip_sums;
    constexpr auto add_turned = mmd::MMFAST_ISA::add_turned;
#else
    constexpr bool splits = false;
    constexpr auto strip_sums = nullptr, add_turned = nullptr;
#endif
    return {Simd<T>::lanes,   splits,           pack<T>,     compare<T>,      add_rows<T>,
            squares_about<T>, compare_slice<T>, evaluate<T>, evaluate_sum<T>, strip_sums,
            add_turned,       parameters<T>,    reduce<T>,   add_sums<T>,     inner<T>,
            combine<T>,       multiply<T>,      scale<T>,    product<T>,      product_averaged<T>,
            differences<T>,   put<T>,           signs<T>};
}

}  // namespace

TileKernels<float> mmd_tiles_float() {
    return tiles_of<float>();
}
#if !defined(MMFAST_AMX_TILES)
TileKernels<double> mmd_tiles_double() {
    return tiles_of<double>();
}
#endif

}  // namespace MMFAST_ISA
}  // namespace mmd
}  // namespace mmfast
