// The work on one tile of pairs: compare, evaluate, reduce, multiply. Lanes are points of b (or features, in product()).
//
// Note: [Cost of a tile]
//   compare() of D dimensions is D multiply-adds a pair, evaluate() about 11 instructions a vector for one exp and 3 more
//   for each further Gaussian of a chain, a gradient 2 D multiply-adds a pair. The tiles in between are written and read
//   once: 16 KiB in float, which stays in the first cache and costs 2 instructions a vector; for that each step is written
//   once and serves every reduction.
#include <cstdint>

#include "common/simd.h"
#include "mmd/mmd_tile.h"
#if defined(MMFAST_AMX_TILES)
#include "mmd/mmd_amx.h"
#endif

namespace mmfast {
namespace mmd {
namespace MMFAST_ISA {
namespace {

template <class T>
using Vec = typename Simd<T>::V;

// Rows and vectors of a product that stay in registers: half of AVX-512's 32, which hides the latency of its two units,
// and three quarters of 16. Steps of a product between two jumps: a step of 256-bit vectors is short, and a thread that shares
// its core waits for the next instructions after each jump.
#if defined(__AVX512F__)
constexpr int kGroup = 8, kSteps = 1, kRowsAtOnce = 1;
#else
constexpr int kGroup = 6, kSteps = 4, kRowsAtOnce = 4;
#endif
constexpr int kWide = 4;
// Dimensions whose panels fit into the first cache.
constexpr int64_t kDepth = 128;
// Rows fetched ahead of the one that is packed: a row waits for the third cache, and a page ends any prefetcher's guess.
constexpr int64_t kAhead = 6;

template <class T>
struct Math {
    using V = Vec<T>;
    static MMFAST_INLINE V exp(V x) { return mmfast::exp(x); }
    static MMFAST_INLINE V log(V x) { return mmfast::log(x); }
    static MMFAST_INLINE V sqrt(V x) { return Simd<T>::sqrt(x); }
};

// ---- Points --------------------------------------------------------------------------------------------------------

// One row less the centre (which is as long as the row's stride, or null), and the square of its length. What lies `ahead`
// is fetched meanwhile.
template <class T, class From>
MMFAST_INLINE T pack_row(const From* from, int64_t step, int64_t ahead, int64_t dimension, const T* centre,
                         int64_t stride, T* to) {
    constexpr int64_t N = Simd<T>::lanes;
    Vec<T> square{};
    int64_t k = 0;
    const auto put = [&](Vec<T> x) __attribute__((always_inline)) {
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
    dispatch(from.type, [&](auto* kind) __attribute__((always_inline)) {
        using From = std::remove_pointer_t<decltype(kind)>;
        const From* const data = static_cast<const From*>(from.data);
        for (int64_t i = 0; i < count; ++i)
            to.norms[i] = pack_row(data + (first + i) * from.row_stride, from.column_stride, kAhead * from.row_stride,
                                   from.dimension, centre, to.stride, to.rows + i * to.stride);
    });
#if defined(MMFAST_AMX_TILES)
    if (to.split_rows) split_rows(count, from.dimension, to);
    if (to.split_columns) split_columns(count, from.dimension, to);
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

// A vector of doubles.
template <class T>
MMFAST_INLINE Vec<double> load_wide(const T* from) {
    if constexpr (sizeof(T) == 4) {  // GCC converts in halves or quarters
#if defined(__AVX512F__)
        return (Vec<double>)_mm512_cvtps_pd(_mm256_loadu_ps(from));
#elif defined(__AVX2__)
        return (Vec<double>)_mm256_cvtps_pd(_mm_loadu_ps(from));
#endif
    }
    typename VectorOf<T, Simd<double>::lanes>::type part;
    __builtin_memcpy(&part, from, sizeof part);
    return __builtin_convertvector(part, Vec<double>);
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
    for_groups(rows, [&]<int R>(int64_t i) __attribute__((always_inline)) {
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
#if defined(MMFAST_AMX_TILES)
    if (width >= 2 * N) return product_split(transposed, rows, depth, width, a, b, b_stride, c, c_stride);
#endif
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
    const T* const a_norms = a.norms + first;  // for all that the compiler knows, storing z changes what Points point to
    const T* const a_rows = a.rows + first * a.stride + at;
    const int64_t a_stride = a.stride;
    for (int64_t j = 0; j < columns; j += W) {
        const T* const panel = b.panels + j * b.stride + at * W;
        const T* const b_norms = b.norms + j;
        for_groups(rows, [&]<int R>(int64_t i) __attribute__((always_inline)) {
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
    add_products(starts, ends_distance, 0, depth, a, first, rows, b, columns, z);
}

// Differences: sums of their squares or of their magnitudes.
template <class T, bool kSquared>
MMFAST_INLINE void compare_differences(int64_t dimension, const Points<T>& a, int64_t first, int64_t rows,
                                       const Points<T>& b, int64_t columns, T* z) {
    constexpr int N = Simd<T>::lanes, W = N * kStrip;
    for (int64_t j = 0; j < columns; j += W) {
        const T* const panel = b.panels + j * b.stride;
        for_groups(rows, [&]<int R>(int64_t i) __attribute__((always_inline)) {
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
        compare_split(l2, dimension, a, first, rows, b, columns, z);
        share = T(1.0 / 8);
    } else
#endif
        compare_products(l2, dimension, a, first, rows, b, columns, z);
    if (l2 && roots) compare_again(share, a, first, rows, b, columns, z);
}

// ---- The kernel ----------------------------------------------------------------------------------------------------

// What a vector holds, in double.
template <class T>
struct Wider {
    using Wide = Simd<double>;
    static constexpr int N = Simd<T>::lanes, kParts = int(sizeof(double) / sizeof(T));
    Wide::V part[kParts];
    explicit MMFAST_INLINE Wider(const T* from) {
        for (int i = 0; i < kParts; ++i) part[i] = load_wide(from + i * Wide::lanes);
    }
    explicit MMFAST_INLINE Wider(Vec<T> x) {
        if constexpr (kParts == 2) {  // as in load_wide
#if defined(__AVX512F__)
            part[0] = (Wide::V)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)x));
            part[1] = (Wide::V)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)x, 1));
            return;
#elif defined(__AVX2__)
            part[0] = (Wide::V)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x));
            part[1] = (Wide::V)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x, 1));
            return;
#endif
        }
        typename VectorOf<T, N / kParts>::type of[kParts];
        __builtin_memcpy(of, &x, sizeof x);
        for (int i = 0; i < kParts; ++i) part[i] = __builtin_convertvector(of[i], Wide::V);
    }
};

// Sums in double of what vectors hold.
template <class T>
struct Accumulator {
    using Wide = Simd<double>;
    static constexpr int kParts = Wider<T>::kParts;
    Wide::V sum[kParts] = {};
    MMFAST_INLINE void add(const Wider<T>& x, double factor = 1) {
        for (int i = 0; i < kParts; ++i) sum[i] += x.part[i] * factor;
    }
    MMFAST_INLINE void add_product(const Wider<T>& x, const Wider<T>& y) {
        for (int i = 0; i < kParts; ++i) sum[i] += x.part[i] * y.part[i];
    }
    MMFAST_INLINE double total() const {
        double s = 0;
        for (int i = 0; i < kParts; ++i) s += Wide::sum(sum[i]);
        return s;
    }
};

// sums[j] += the values of a row of vectors.
template <class T, size_t C>
MMFAST_INLINE void add_to(const Vec<T> (&columns)[C], double* sums) {
    constexpr int64_t N = Simd<T>::lanes;
    for (size_t c = 0; c < C; ++c)
        for (int64_t l = 0; l < N; ++l) sums[c * N + l] += double(columns[c][l]);
}

template <class T, int U, bool kSlope>
MMFAST_INLINE void evaluate_chain(const Chain<T>& c, const Vec<T> (&z)[U], Vec<T> (&k)[U], Vec<T> (&h)[U]) {
    Vec<T> t[U];
    const T exponent = c.exponent * T(1.4426950408889634);
    for (int u = 0; u < U; ++u) t[u] = exponent * z[u];
    exp2_each<U>(t);
    for (int i = 0; i < c.count; ++i) {
        for (int q = c.squarings[i]; q > 0; --q)
            for (int u = 0; u < U; ++u) t[u] *= t[u];
        for (int u = 0; u < U; ++u) {
            k[u] += c.weight[i] * t[u];
            if (kSlope) h[u] += c.slope[i] * t[u];
        }
    }
}

// One chain in which each Gaussian is the square of the one before, as DAN's are and as one alone is.
template <class T>
MMFAST_INLINE bool only_doubles(const Program<T>& p) {
    bool all = p.chains == 1 && p.others == 0 && p.chain[0].squarings[0] == 0;
    for (int i = 1; all && i < p.chain[0].count; ++i) all = p.chain[0].squarings[i] == 1;
    return all;
}

template <class T, int U, bool kSlope>
MMFAST_INLINE void evaluate_doubling(const Chain<T>& c, T shift, const Vec<T> (&z)[U], Vec<T> (&k)[U], Vec<T> (&h)[U]) {
    Vec<T> t[U];
    const T exponent = c.exponent * T(1.4426950408889634);
    for (int u = 0; u < U; ++u) t[u] = exponent * z[u];
    exp2_each<U>(t);
    for (int u = 0; u < U; ++u) {
        k[u] = c.weight[0] * t[u] - shift;
        if (kSlope) h[u] = c.slope[0] * t[u];
    }
    for (int i = 1; i < c.count; ++i)
        for (int u = 0; u < U; ++u) {
            t[u] *= t[u];
            k[u] += c.weight[i] * t[u];
            if (kSlope) h[u] += c.slope[i] * t[u];
        }
}

// ks = the kernel at zs, less `shift`; hs = its derivative.
template <class T, int U, bool kSlope>
MMFAST_INLINE void evaluate_vectors(const Program<T>& p, T shift, const Vec<T> (&zs)[U], Vec<T> (&ks)[U],
                                    Vec<T> (&hs)[U]) {
    for (int u = 0; u < U; ++u) {
        ks[u] = Vec<T>{} - shift;
        hs[u] = Vec<T>{};
    }
    for (int c = 0; c < p.chains; ++c) evaluate_chain<T, U, kSlope>(p.chain[c], zs, ks, hs);
    for (int t = 0; t < p.others; ++t)
        for (int u = 0; u < U; ++u) {
            const auto [value, slope] = mmd::value<Math<T>>(p.other[t], zs[u]);
            ks[u] += value;
            if (kSlope) hs[u] += slope;
        }
}

template <class T, bool kSlope, bool kDoubling>
MMFAST_INLINE void evaluate_tile(const Program<T>& p, int64_t rows, const T* z, T* k, T* h) {
    constexpr int U = kWide, N = Simd<T>::lanes;
    for (int64_t at = 0; at < rows * kTile; at += U * N) {
        Vec<T> zs[U], ks[U], hs[U];
        for (int u = 0; u < U; ++u) zs[u] = Simd<T>::load(z + at + u * N);
        if constexpr (kDoubling) evaluate_doubling<T, U, kSlope>(p.chain[0], T(0), zs, ks, hs);
        else evaluate_vectors<T, U, kSlope>(p, T(0), zs, ks, hs);
        for (int u = 0; u < U; ++u) {
            Simd<T>::store(k + at + u * N, ks[u]);
            if (kSlope) Simd<T>::store(h + at + u * N, hs[u]);
        }
    }
}

template <class T>
void evaluate(const Program<T>& p, int64_t rows, const T* z, T* k, T* h) {
    if (only_doubles(p)) {
        if (h) evaluate_tile<T, true, true>(p, rows, z, k, h);
        else evaluate_tile<T, false, true>(p, rows, z, k, h);
    } else {
        if (h) evaluate_tile<T, true, false>(p, rows, z, k, h);
        else evaluate_tile<T, false, false>(p, rows, z, k, h);
    }
}

// Rows whose values are added up before the sum goes on in double.
constexpr int64_t kRowsInFloat = 4;

// What the values of a tile have in common: the least of the first ones. Less it they are added up in T, which loses nothing of
// what sets a kernel apart that is nearly constant: an MMD of it is the small difference of large sums. It is in one multiply-add
// with the value, so it costs nothing.
template <class T, bool kDoubling>
MMFAST_INLINE T common_value(const Program<T>& p, const T* z) {
    constexpr int U = kWide, N = Simd<T>::lanes;
    Vec<T> zs[U], ks[U], hs[U];
    for (int u = 0; u < U; ++u) zs[u] = Simd<T>::load(z + u * N);
    if constexpr (kDoubling) evaluate_doubling<T, U, false>(p.chain[0], T(0), zs, ks, hs);
    else evaluate_vectors<T, U, false>(p, T(0), zs, ks, hs);
    Vec<T> least = ks[0], greatest = ks[0];
    for (int u = 1; u < U; ++u) {
        least = Simd<T>::min(least, ks[u]);
        greatest = Simd<T>::max(greatest, ks[u]);
    }
    const T low = Simd<T>::lowest(least), high = Simd<T>::highest(greatest);
    const T common = low > 0 ? low : high < 0 ? high : T(0);
    return __builtin_isfinite(common) ? common : T(0);
}

template <class T, bool kSlope, bool kDoubling>
MMFAST_INLINE double evaluate_sum_of(const Program<T>& p, int64_t rows, T factor, T* z, double* row_sums,
                                     double* column_sums) {
    constexpr int64_t U = kWide, N = Simd<T>::lanes, C = kTile / N;
    const T common = common_value<T, kDoubling>(p, z);
    Accumulator<T> all;
    Vec<T> columns[C] = {}, values{};
    for (int64_t i = 0; i < rows; ++i) {
        T* const row = z + i * kTile;
        Vec<T> slopes{};
#pragma GCC unroll 1
        for (int64_t c = 0; c < C; c += U) {
            Vec<T> zs[U], ks[U], hs[U];
            for (int u = 0; u < U; ++u) zs[u] = Simd<T>::load(row + (c + u) * N);
            if constexpr (kDoubling) evaluate_doubling<T, U, kSlope>(p.chain[0], common, zs, ks, hs);
            else evaluate_vectors<T, U, kSlope>(p, common, zs, ks, hs);
            for (int u = 0; u < U; ++u) {
                values += ks[u];
                if (!kSlope) continue;
                const Vec<T> h = factor * hs[u];
                Simd<T>::store(row + (c + u) * N, h);
                slopes += h;
                columns[c + u] += h;
            }
        }
        if (i % kRowsInFloat == kRowsInFloat - 1 || i == rows - 1) {
            all.add(Wider<T>(values));
            values = Vec<T>{};
        }
        if (kSlope && row_sums) row_sums[i] += Simd<T>::sum(slopes);
    }
    if (kSlope && column_sums) add_to<T>(columns, column_sums);
    return all.total() + double(common) * double(rows * kTile);
}

template <class T>
double evaluate_sum(const Program<T>& p, int64_t rows, bool slopes, T factor, T* z, double* row_sums,
                    double* column_sums) {
    if (only_doubles(p))
        return slopes ? evaluate_sum_of<T, true, true>(p, rows, factor, z, row_sums, column_sums)
                      : evaluate_sum_of<T, false, true>(p, rows, factor, z, nullptr, nullptr);
    return slopes ? evaluate_sum_of<T, true, false>(p, rows, factor, z, row_sums, column_sums)
                  : evaluate_sum_of<T, false, false>(p, rows, factor, z, nullptr, nullptr);
}

template <class T>
void parameters(const Program<T>& p, int64_t rows, const T* z, const T* g, double* sums) {
    constexpr int N = Simd<T>::lanes;
    for (int t = 0; t < p.terms; ++t) {
        const Family f = p.term[t].family;
        for (int64_t i = 0; i < rows; ++i) {
            ParameterGradient<Vec<T>> sum{};
            for (int64_t j = i * kTile; j < (i + 1) * kTile; j += N) {
                const Vec<T> w = Simd<T>::load(g + j);
                const auto d = parameter_gradient<Math<T>>(p.term[t], Simd<T>::load(z + j));
                sum.weight += w * d.weight;
                sum.gamma += w * d.gamma;
                sum.offset += w * d.offset;
                sum.exponent += w * d.exponent;
            }
            sums[4 * t] += Simd<T>::sum(sum.weight);
            // Those that the family lacks have no derivative, even where a value is NaN.
            if (f != Family::energy) sums[4 * t + 1] += Simd<T>::sum(sum.gamma);
            if (f == Family::polynomial) sums[4 * t + 2] += Simd<T>::sum(sum.offset);
            if (f == Family::power) sums[4 * t + 3] += Simd<T>::sum(sum.exponent);
        }
    }
}

// ---- Reductions ----------------------------------------------------------------------------------------------------

// Every value in double: what is made of these sums may be much smaller than they are. R rows together, since without AVX-512
// the sums of the columns do not stay in registers.
template <class T, bool kWeighted, bool kColumns, bool kSquares>
double reduce_tile(int64_t rows, const T* k, const T* u, const T* v, double* row_sums, double* column_sums,
                   double* squares) {
    constexpr int64_t N = Simd<T>::lanes, C = kTile / N, kParts = Wider<T>::kParts;
    Accumulator<T> all, square, columns[C];
    double total = 0;
    const auto some = [&]<int R>(int64_t i) __attribute__((always_inline)) {
        Accumulator<T> row[R];
        for (int64_t c = 0; c < C; ++c)
            for (int r = 0; r < R; ++r) {
                const Wider<T> x(k + (i + r) * kTile + c * N);
                if (kWeighted && v) row[r].add_product(x, Wider<T>(v + c * N));
                else row[r].add(x);
                if (kColumns) columns[c].add(x, kWeighted && u ? double(u[i + r]) : 1.0);
                if (kSquares) square.add_product(x, x);
            }
        for (int r = 0; r < R; ++r) {
            const double weight = kWeighted && u ? double(u[i + r]) : 1.0;
            if (row_sums) {
                const double sum = row[r].total();
                row_sums[i + r] += sum;
                total += weight * sum;
            } else {
                for (int q = 0; q < kParts; ++q) all.sum[q] += row[r].sum[q] * weight;
            }
        }
    };
    int64_t i = 0;
    for (; i + kRowsAtOnce <= rows; i += kRowsAtOnce) some.template operator()<kRowsAtOnce>(i);
    for (; i < rows; ++i) some.template operator()<1>(i);
    for (int64_t c = 0; kColumns && column_sums && c < C; ++c)
        for (int64_t l = 0; l < N; ++l) column_sums[c * N + l] += columns[c].sum[l / (N / kParts)][l % (N / kParts)];
    if (kSquares) *squares = square.total();
    return total + all.total();
}

template <class T>
double reduce(int64_t rows, const T* k, const T* u, const T* v, double* row_sums, double* column_sums,
              double* squares) {
    const auto with = [&](auto weighted) {
        constexpr bool w = decltype(weighted)::value;
        if (squares) return reduce_tile<T, w, true, true>(rows, k, u, v, row_sums, column_sums, squares);
        if (column_sums) return reduce_tile<T, w, true, false>(rows, k, u, v, row_sums, column_sums, squares);
        return reduce_tile<T, w, false, false>(rows, k, u, v, row_sums, column_sums, squares);
    };
    return u || v ? with(std::true_type()) : with(std::false_type());
}

template <class T>
void add_sums(int64_t rows, const T* w, double* row_sums, double* column_sums) {
    constexpr int64_t N = Simd<T>::lanes, C = kTile / N;
    Vec<T> columns[C] = {};
    for (int64_t i = 0; i < rows; ++i) {
        Vec<T> row{};
        for (int64_t c = 0; c < C; ++c) {
            const Vec<T> x = Simd<T>::load(w + i * kTile + c * N);
            row += x;
            columns[c] += x;
        }
        row_sums[i] += Simd<T>::sum(row);
    }
    add_to<T>(columns, column_sums);
}

template <class T>
double inner(int64_t rows, const T* a, const T* b) {
    constexpr int64_t N = Simd<T>::lanes;
    Accumulator<T> all[2];
    for (int64_t at = 0; at < rows * kTile; at += 2 * N)
        for (int64_t v = 0; v < 2; ++v)
            all[v].add_product(Wider<T>(a + at + v * N), Wider<T>(b + at + v * N));
    return all[0].total() + all[1].total();
}

// Vectors of doubles, rounded.
template <class T>
MMFAST_INLINE Vec<T> narrow(const Vec<double>* from) {
    constexpr int P = Wider<T>::kParts;
    if constexpr (P == 2) {  // as in load_wide
#if defined(__AVX512F__)
        return (Vec<T>)_mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps((__m512d)from[0])),
                                          _mm512_cvtpd_ps((__m512d)from[1]), 1);
#elif defined(__AVX2__)
        return (Vec<T>)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm256_cvtpd_ps((__m256d)from[0])),
                                            _mm256_cvtpd_ps((__m256d)from[1]), 1);
#endif
    }
    using Part = typename VectorOf<T, Simd<T>::lanes / P>::type;
    Part part[P];
    for (int i = 0; i < P; ++i) part[i] = __builtin_convertvector(from[i], Part);
    Vec<T> to;
    __builtin_memcpy(&to, part, sizeof to);
    return to;
}

template <class T>
void combine(int64_t rows, const double* row, const double* column, T own, const T* k, T cross, const T* l, T* g) {
    constexpr int64_t N = Simd<T>::lanes, P = Wider<T>::kParts, M = Simd<double>::lanes;
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < kTile; j += N) {
            const int64_t at = i * kTile + j;
            Vec<double> sum[P];
            for (int64_t q = 0; q < P; ++q) sum[q] = row[i] + Simd<double>::load(column + j + q * M);
            Vec<T> x = narrow<T>(sum) + own * Simd<T>::load(k + at);
            if (l) x += cross * Simd<T>::load(l + at);
            Simd<T>::store(g + at, x);
        }
}

template <class T>
void multiply(int64_t rows, const T* a, T* b) {
    for (int64_t at = 0; at < rows * kTile; at += Simd<T>::lanes)
        Simd<T>::store(b + at, Simd<T>::load(a + at) * Simd<T>::load(b + at));
}

template <class T>
void scale(int64_t rows, T c, const T* u, const T* v, T* h) {
    constexpr int64_t N = Simd<T>::lanes;
    for (int64_t i = 0; i < rows; ++i) {
        const T factor = u ? c * u[i] : c;
        for (int64_t j = 0; j < kTile; j += N) {
            const Vec<T> x = factor * Simd<T>::load(h + i * kTile + j);
            Simd<T>::store(h + i * kTile + j, v ? x * Simd<T>::load(v + j) : x);
        }
    }
}

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
void put(int64_t count, int64_t width, const T* summed, const T* points, int64_t stride, const double* sums, T* to,
         int64_t to_stride) {
    constexpr int64_t N = Simd<T>::lanes;
    for (int64_t i = 0; i < count; ++i, summed += stride, to += to_stride) {
        const T sum = points ? T(sums[i]) : T(0);
        const T* const x = points ? points + i * stride : nullptr;
        for (int64_t k = 0; k < width; k += N) {
            __builtin_prefetch(to + k + kAhead * to_stride, 1);
            const Vec<T> from = Simd<T>::load(summed + k);
            const Vec<T> more = x ? T(2) * (sum * Simd<T>::load(x + k) - from) : from;
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
MMFAST_INLINE TileKernels<T> tiles_of() {
#if defined(MMFAST_AMX_TILES)
    constexpr bool splits = true;
#else
    constexpr bool splits = false;
#endif
    return {Simd<T>::lanes,   splits,           pack<T>,     compare<T>,      add_rows<T>,
            squares_about<T>, compare_slice<T>, evaluate<T>, evaluate_sum<T>, parameters<T>,
            reduce<T>,        add_sums<T>,      inner<T>,    combine<T>,      multiply<T>,
            scale<T>,         product<T>,       differences<T>, put<T>,      signs<T>};
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
