// common/simd.h for the instruction set that this file is compiled for. Nothing of the standard library that could
// leave code for other files to share, and no such instruction before main has asked for the processor.
#include "common/simd.h"

#include <cmath>
#include <limits>

#include "check.h"
#include "common/isa.h"

namespace {

using mmfast::Simd;

template <class T>
T nth(int i) {
    return T(i + 1);
}

template <class T>
void check_memory() {
    using S = Simd<T>;
    constexpr int N = S::lanes;
    static_assert(sizeof(typename S::V) == N * sizeof(T) && (N & (N - 1)) == 0);
    for (int offset = 0; offset < N; ++offset) {
        for (int n = 0; n <= N; ++n) {
            const test::Buffer<T> from(n, offset), to(n, offset), wide(N, offset);
            for (int i = 0; i < n; ++i) {
                from[i] = nth<T>(i);
            }
            typename S::V v = S::load(from.data(), n);
            for (int i = 0; i < N; ++i) {
                CHECK(v[i] == (i < n ? nth<T>(i) : 0), "lane %d of %d loaded: %g", i, n, double(v[i]));
            }
            S::store(to.data(), v + T(1), n);
            for (int i = 0; i < n; ++i) {
                CHECK(to[i] == nth<T>(i) + 1, "lane %d of %d stored: %g", i, n, double(to[i]));
            }
            S::store(wide.data(), S::splat(T(7)));
            S::store(wide.data(), v, n);
            v = S::load(wide.data());
            for (int i = 0; i < N; ++i) {
                CHECK(v[i] == (i < n ? nth<T>(i) : 7), "lane %d after storing %d: %g", i, n, double(v[i]));
            }
            if (n == 0) continue;
            for (int i = 0; i < N; ++i) v[i] = nth<T>(i);
            for (int first = 0; first + n <= N; ++first) {
                S::store_lanes(to.data(), v, first, n);
                for (int i = 0; i < n; ++i) {
                    CHECK(to[i] == nth<T>(first + i), "lane %d of %d from %d: %g", i, n, first, double(to[i]));
                }
            }
        }
    }
}

template <class T>
void check_shuffles() {
    using S = Simd<T>;
    constexpr int N = S::lanes;
    typename S::V v{}, square[N], columns[N];
    for (int i = 0; i < N; ++i) {
        v[i] = nth<T>(i);
    }
    CHECK(S::highest(v) == nth<T>(N - 1) && S::lowest(v) == nth<T>(0), "extrema %g %g", double(S::lowest(v)),
          double(S::highest(v)));
    typename S::V other = v;
    for (int i = 0; i < N; ++i) {
        other[i] = i % 3 == 0 ? T(__builtin_nan("")) : i % 3 == 1 ? v[i] + 1 : v[i] - 1;
    }
    for (int i = 0; i < N; ++i) {
        CHECK(S::min(other, v)[i] == (i % 3 == 2 ? other : v)[i], "lane %d of min: %g", i, double(S::min(other, v)[i]));
        CHECK(S::max(other, v)[i] == (i % 3 == 1 ? other : v)[i], "lane %d of max: %g", i, double(S::max(other, v)[i]));
    }
    CHECK(S::min(v, other)[0] != S::min(v, other)[0], "a NaN in the second place is left");
    v = S::shift_in(v, T(-1));
    for (int i = 0; i < N; ++i) {
        CHECK(v[i] == (i + 1 < N ? nth<T>(i + 1) : -1), "lane %d shifted: %g", i, double(v[i]));
    }
    // Rows in memory of their own, each just long enough for N elements at 3.
    T* rows[N];
    const T* const_rows[N];
    for (int i = 0; i < N; ++i) {
        const_rows[i] = rows[i] = static_cast<T*>(std::malloc(sizeof(T) * (N + 3)));
        for (int j = 0; j < N; ++j) {
            rows[i][j + 3] = square[i][j] = T(100 * i + j);
        }
    }
    S::load_transposed(const_rows, 3, columns);
    S::transpose(square);
    for (int i = 0; i < N; ++i) {
        for (int j = 0; j < N; ++j) {
            CHECK(square[i][j] == T(100 * j + i), "transposed %d %d: %g", i, j, double(square[i][j]));
            CHECK(columns[i][j] == T(100 * j + i), "loaded transposed %d %d: %g", i, j, double(columns[i][j]));
        }
        std::free(rows[i]);
    }
}

double ulp(float x) {
    return double(std::nextafter(std::fabs(x), INFINITY)) - std::fabs(double(x));
}

template <bool kNormal>
double check_log(float x) {
    using S = Simd<float>;
    S::V v = S::splat(1);
    const int lane = S::lanes - 1;
    v[lane] = x;
    S::V several[3] = {S::splat(1), v, S::splat(2)};
    mmfast::log_each<kNormal, 3>(several);
    v = mmfast::log<kNormal>(v);
    CHECK(v[0] == 0, "log 1 is %g beside %g", double(v[0]), double(x));
    CHECK(several[0][lane] == 0 && several[2][lane] == mmfast::log(S::splat(2))[0], "neighbours of log %g", double(x));
    CHECK(std::memcmp(&several[1], &v, sizeof v) == 0 || v[lane] != v[lane], "log %g is %g among others", double(x),
          double(several[1][lane]));
    const double should = std::log(double(x)), is = v[lane];
    if (!std::isfinite(should)) {
        CHECK(std::isnan(should) ? std::isnan(is) : is == should, "log %a is %g", double(x), is);
        return 0;
    }
    const double error = std::fabs(is - should) / ulp(float(should));
    CHECK(error <= 1, "log %a is %a, off by %.2f ulp", double(x), is, error);
    return error;
}

float from_bits(uint32_t u) {
    float x;
    std::memcpy(&x, &u, sizeof x);
    return x;
}

void check_logs() {
    const float smallest = std::numeric_limits<float>::min(), infinity = std::numeric_limits<float>::infinity();
    double worst = 0;
    // Every sign and exponent, subnormal ones and NaN too, with a prime step; then densely where log is near zero.
    for (uint64_t u = 0; u < uint64_t(1) << 32; u += 4099) {
        const float x = from_bits(uint32_t(u));
        const double error = check_log<false>(x);
        worst = std::fmax(worst, error);
        if (!(x < smallest)) {
            check_log<true>(x);
        }
    }
    for (uint32_t u = 0x3f7f0000; u < 0x3f810000; ++u) {
        worst = std::fmax(worst, check_log<false>(from_bits(u)));
        check_log<true>(from_bits(u));
    }
    for (float x : {0.0f, -0.0f, infinity, -infinity, std::nanf(""), -1.0f, smallest, -smallest, smallest / 2,
                    -smallest / 2, std::numeric_limits<float>::denorm_min(), std::numeric_limits<float>::max(),
                    from_bits(0x3f3504f2), from_bits(0x3f3504f3), from_bits(0x3f3504f4)}) {
        check_log<false>(x);
        if (!(x < smallest)) {
            check_log<true>(x);
        }
    }
    std::printf("log: within %.2f ulp\n", worst);
}

// e^x or 2^x of one lane, beside zeros.
template <class T, bool kTwo>
double exponential(T x) {
    using S = Simd<T>;
    typename S::V v{};
    const int lane = S::lanes - 1;
    v[lane] = x;
    if constexpr (kTwo) {
        v = mmfast::exp2(v);
    } else {
        v = mmfast::exp(v);
    }
    CHECK(v[0] == 1, "%s 0 is %g beside %g", kTwo ? "exp2" : "exp", double(v[0]), double(x));
    return v[lane];
}

template <bool kTwo>
double check_exponential(float x) {
    const char* const name = kTwo ? "exp2" : "exp";
    const double should = kTwo ? std::exp2(double(x)) : std::exp(double(x)), is = exponential<float, kTwo>(x);
    if (std::isnan(should)) {
        CHECK(std::isnan(is), "%s NaN is %g", name, is);
        return 0;
    }
    const float smallest = std::numeric_limits<float>::min();
    if (should < 1.001 * smallest) {  // 0 may stand for what is no normal number
        CHECK(is >= 0 && is <= 1.002 * smallest && std::fabs(is - should) <= smallest, "%s %a is %a", name, double(x),
              is);
        return 0;
    }
    const double error = std::fabs(is - should) / ulp(float(should));
    CHECK(error <= 2, "%s %a is %a, off by %.2f ulp", name, double(x), is, error);
    return error;
}

// Several vectors at once are several times one.
template <class T, int kCount>
void check_exp2_each() {
    using S = Simd<T>;
    typename S::V x[kCount], each[kCount];
    const volatile T step = T(-11.3);  // what the compiler knows it would compute itself, and round otherwise
    for (int k = 0; k < kCount; ++k) {
        for (int i = 0; i < S::lanes; ++i) {
            x[k][i] = step * T(k * S::lanes + i);  // the last are 0, in float
        }
        x[k][k % S::lanes] = k % 2 ? std::numeric_limits<T>::quiet_NaN() : -std::numeric_limits<T>::infinity();
        each[k] = x[k];
    }
    mmfast::exp2_each<kCount>(each);
    for (int k = 0; k < kCount; ++k) {
        const typename S::V one = mmfast::exp2(x[k]);
        for (int i = 0; i < S::lanes; ++i) {
            CHECK(each[k][i] == one[i] || (std::isnan(x[k][i]) && std::isnan(each[k][i])),
                  "vector %d of %d, lane %d: %g", k, kCount, i, double(each[k][i]));
        }
    }
}

// exp2 of anything: as exp2 within its limits, and far outside them large or next to nothing.
void check_exp2_limited() {
    using S = Simd<float>;
    const float infinity = std::numeric_limits<float>::infinity();
    const auto limited = [](float x) {
        typename S::V v{};
        v[S::lanes - 1] = x;
        v = mmfast::exp2_limited(v);
        CHECK(v[0] == 1, "exp2 0 is %g beside %g", double(v[0]), double(x));
        return v[S::lanes - 1];
    };
    for (int i = -124500; i <= 119500; ++i) {
        const float x = float(i) * 1e-3f, should = std::exp2(x);
        const double error = std::fabs(limited(x) - should) / ulp(should);
        CHECK(error <= 2, "exp2 %a is off by %.2f ulp", double(x), error);
    }
    for (const float x : {-125.0f, -126.5f, -140.0f, -1000.0f, -3e38f, -infinity})
        CHECK((limited(x) >= 0 && limited(x) <= 0x1.001p-125f), "exp2 %g is %g", double(x), double(limited(x)));
    for (const float x : {120.0f, 127.4f, 128.0f, 129.0f, 255.0f, 256.0f, 1e10f, 3e38f, infinity, std::nanf("")})
        CHECK(!(limited(x) >= 0 && limited(x) < 0x1.ffp119f), "exp2 %g is %g", double(x), double(limited(x)));
}

// Exp2NearSteps, from -kExp2Near to 0. What results have in common is what counts: of a sum of many it is all that is left.
void check_exp2_near() {
    using S = Simd<float>;
    double common = 0;
    int count = 0;
    for (int i = 0; i <= int(mmfast::kExp2Near * 1e5f); ++i, ++count) {
        const float x = float(i) * -1e-5f;
        mmfast::Exp2NearSteps<1> steps;
        steps.x[0] = S::splat(x + mmfast::kExp2NearMiddle);
        steps.step<0>();
        steps.step<1>();
        steps.step<2>();
        const double should = std::exp2(double(x)), is = steps.x[0][S::lanes - 1];
        CHECK(std::fabs(is - should) <= 1.5 * ulp(float(should)), "exp2 near %a is %.9g beside %.9g", double(x), is,
              should);
        common += is / should - 1;
    }
    CHECK(std::fabs(common / count) < 2e-9, "exp2 near 0 is off by %g in the mean", common / count);
}

void check_exponentials() {
    check_exp2_each<float, 1>();
    check_exp2_each<float, 4>();
    check_exp2_each<double, 4>();
    check_exp2_limited();
    check_exp2_near();
    const float infinity = std::numeric_limits<float>::infinity();
    double two = 0, e = 0;
    // Everything that is not positive, -0 and NaN too, with a prime step; what is positive as far as it stays small.
    for (uint64_t u = 0x80000000; u <= 0xffffffff; u += 1009) {
        const float x = from_bits(uint32_t(u));
        two = std::fmax(two, check_exponential<true>(x));
        e = std::fmax(e, check_exponential<false>(x));
        if (-x < 80) {
            check_exponential<true>(-x);
            check_exponential<false>(-x);
        }
    }
    // Where the normal numbers end, and where the fraction changes its sign.
    for (int i = -3000; i <= 3000; ++i) {
        for (const float at : {-0.5f, -1.5f, -125.5f, -126.0f, -127.0f, -149.0f, -150.0f}) {
            check_exponential<true>(at + float(i) * 1e-5f);
        }
        for (const float at : {-0.34657359f, -1.0397208f, -87.3f, -87.33654f, -88.0f, -103.97208f, -104.0f}) {
            check_exponential<false>(at + float(i) * 1e-5f);
        }
    }
    for (const float x : {0.0f, -0.0f, -infinity, -std::numeric_limits<float>::max(), std::nanf(""),
                          -std::numeric_limits<float>::denorm_min()}) {
        check_exponential<true>(x);
        check_exponential<false>(x);
    }
    CHECK((exponential<float, true>(-infinity) == 0 && exponential<float, false>(-infinity) == 0 &&
           exponential<float, true>(-1000) == 0 && exponential<float, false>(-1000) == 0),
          "%s", "far out it is not 0");
    std::printf("exp2: within %.2f ulp, exp: within %.2f ulp\n", two, e);
    for (const double x : {0.0, -0.0, -1e-300, -0.3, -1.0, -700.0, -1000.0, -1100.0, 3.0, double(-infinity)}) {
        const double a = exponential<double, true>(x), b = exponential<double, false>(x);
        CHECK(std::fabs(a - std::exp2(x)) <= 4e-16 * std::exp2(x), "exp2 %g is %g", x, a);
        CHECK(std::fabs(b - std::exp(x)) <= 4e-16 * std::exp(x), "exp %g is %g", x, b);
    }
    CHECK(std::isnan(exponential<double, true>(NAN)) && std::isnan(exponential<double, false>(NAN)), "%s", "NaN");
}

template <class T>
void check_sum() {
    using S = Simd<T>;
    constexpr int N = S::lanes;
    typename S::V v{};
    CHECK(S::sum(v) == 0, "%s", "sum of zeros");
    for (int i = 0; i < N; ++i) {
        v[i] = nth<T>(i);
    }
    CHECK(S::sum(v) == T(N * (N + 1) / 2), "sum of 1 to %d: %g", N, double(S::sum(v)));
    for (int i = 0; i < N; ++i) {
        typename S::V one{}, spoilt = v;
        one[i] = T(3);
        spoilt[i] = std::numeric_limits<T>::quiet_NaN();
        CHECK(S::sum(one) == 3 && std::isnan(S::sum(spoilt)), "lane %d does not count", i);
    }
}

template <class T>
void check_functions() {
    using S = Simd<T>;
    for (T x : {T(0), T(1e-30), T(0.3), T(2), T(1e30), std::numeric_limits<T>::infinity()}) {
        typename S::V v = S::splat(x);
        v[0] = T(-1);
        v[1] = std::numeric_limits<T>::quiet_NaN();
        const typename S::V root = S::sqrt(v), power = mmfast::power(v, T(0.7)), log = mmfast::log(v);
        CHECK(std::isnan(root[0]) && std::isnan(root[1]) && std::isnan(power[0]) && std::isnan(power[1]) &&
                  std::isnan(log[0]) && std::isnan(log[1]),
              "%s", "functions of -1 and NaN");
        const int last = S::lanes - 1;
        if (last > 1) {
            CHECK(root[last] == std::sqrt(x), "sqrt %g is %g", double(x), double(root[last]));
            CHECK(power[last] == std::pow(x, T(0.7)), "%g ^ 0.7 is %g", double(x), double(power[last]));
            CHECK(sizeof(T) == 4 || log[last] == std::log(x), "log %g is %g", double(x), double(log[last]));
        }
    }
}

__attribute__((noinline)) void check_all() {
    check_memory<float>();
    check_memory<double>();
    check_shuffles<float>();
    check_shuffles<double>();
    check_logs();
    check_exponentials();
    check_sum<float>();
    check_sum<double>();
    check_functions<float>();
    check_functions<double>();
}

}  // namespace

int main() {
    const mmfast::Isa least = mmfast::kVectorBytes == 64   ? mmfast::Isa::avx512
                              : mmfast::kVectorBytes == 32 ? mmfast::Isa::avx2
                                                           : mmfast::Isa::baseline;
    if (mmfast::best_isa() < least) {
        std::puts("this machine does not have it");
        return test::kSkipped;
    }
    check_all();
    std::puts("ok");
    return 0;
}
