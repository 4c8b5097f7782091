// Values of the kernel and its derivatives on a tile, and their sums; part of mmd_tile.cpp. For files compiled once per
// instruction set only.
#pragma once

#include <type_traits>

#include "common/simd.h"
#include "mmd/mmd_tile.h"

namespace mmfast {
namespace mmd {
namespace MMFAST_ISA {
namespace {

template <class T>
using Vec = typename Simd<T>::V;

// Vectors that are evaluated step by step together, and rows that are added up together.
constexpr int kWide = 4;
#if defined(__AVX512F__)
constexpr int kRowsAtOnce = 1;
#else
constexpr int kRowsAtOnce = 4;
#endif

template <class T>
struct Math {
    using V = Vec<T>;
    static MMFAST_INLINE V exp(V x) { return mmfast::exp(x); }
    static MMFAST_INLINE V log(V x) { return mmfast::log(x); }
    static MMFAST_INLINE V sqrt(V x) { return Simd<T>::sqrt(x); }
};

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
    if constexpr (sizeof(T) == 4) exp2_without_table<U>(t);
    else exp2_each<U>(t);
    for (int i = 0; i < c.count; ++i) {
        for (int q = c.squarings[i]; q > 0; --q)
            for (int u = 0; u < U; ++u) t[u] *= t[u];
        for (int u = 0; u < U; ++u) {
            k[u] += c.weight[i] * t[u];
            if (kSlope) h[u] += c.slope[i] * t[u];
        }
    }
}

template <class T, int U, bool kSlope>
MMFAST_INLINE void evaluate_doubling(const Chain<T>& c, T shift, const Vec<T> (&z)[U], Vec<T> (&k)[U], Vec<T> (&h)[U]) {
    Vec<T> t[U];
    const T exponent = c.exponent * T(1.4426950408889634);
    for (int u = 0; u < U; ++u) t[u] = exponent * z[u];
    if constexpr (sizeof(T) == 4) exp2_without_table<U>(t);
    else exp2_each<U>(t);
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
    if (p.doubles) {
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
    if (p.doubles)
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
    const auto some = [&]<int R>(int64_t i) MMFAST_LAMBDA {
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
        for (int64_t v = 0; v < 2; ++v) all[v].add_product(Wider<T>(a + at + v * N), Wider<T>(b + at + v * N));
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

}  // namespace
}  // namespace MMFAST_ISA
}  // namespace mmd
}  // namespace mmfast
