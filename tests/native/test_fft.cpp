// fft_core.h and fft_plan.h: every codelet and plan against the definition in long double.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "check.h"
#include "mel/fft_core.h"
#include "mel/fft_plan.h"
#include "mel/fft_twenty.h"

namespace {

using mmfast::Complex;
using mmfast::ComplexPlan;
using mmfast::Dft;
using mmfast::FftTables;
using mmfast::RealDft;
using mmfast::RealPlan;
using test::Random;
using Real = long double;

const Real kPi = std::acos(Real(-1));

template <class T, int N>
struct VectorOf {
    typedef T type __attribute__((vector_size(N * sizeof(T))));
};

// Lanes of a value type: a scalar is its own only lane.
template <class T, class V>
struct Lanes {
    static constexpr int count = sizeof(V) / sizeof(T);
    static T get(const V& v, int lane) {
        if constexpr (count == 1) {
            return v;
        } else {
            return v[lane];
        }
    }
    static void set(V& v, int lane, T x) {
        if constexpr (count == 1) {
            v = x;
        } else {
            v[lane] = x;
        }
    }
};

// L2 distance relative to `size`, by default that of the right values.
class Distance {
public:
    void add(Real is, Real should) {
        error_ += (is - should) * (is - should);
        size_ += should * should;
        finite_ = finite_ && std::isfinite(is);
    }
    template <class T>
    Real in_eps() const {
        return in_eps<T>(std::sqrt(size_));
    }
    template <class T>
    Real in_eps(Real size) const {
        const Real infinity = std::numeric_limits<Real>::infinity();
        return finite_ ? std::sqrt(error_) / (size > 0 ? size : 1) / std::numeric_limits<T>::epsilon() : infinity;
    }

private:
    Real error_ = 0, size_ = 0;
    bool finite_ = true;
};

// A few eps log2 n; a chirp adds two transforms of up to four times the size.
Real allowed(int64_t n, bool chirp) {
    return (chirp ? 2 : 1) * (0.5L + 0.5L * std::log2(Real(n)));
}

// exp(-2 pi i j / n)
struct Roots {
    std::vector<Real> cos, sin;
    explicit Roots(int64_t n) {
        for (int64_t j = 0; j < n; ++j) {
            cos.push_back(std::cos(2 * kPi * j / n));
            sin.push_back(-std::sin(2 * kPi * j / n));
        }
    }
};

struct Spectrum {
    std::vector<Real> re, im;
};

// Bins 0 .. bins - 1 of the n values re + i im; im may be empty.
Spectrum definition(const std::vector<Real>& re, const std::vector<Real>& im, int64_t bins, const Roots& roots) {
    const int64_t n = int64_t(roots.cos.size());
    Spectrum out{std::vector<Real>(bins), std::vector<Real>(bins)};
    for (int64_t k = 0; k < bins; ++k) {
        Real a = 0, b = 0;
        int64_t j = 0;
        for (size_t i = 0; i < re.size(); ++i) {
            const Real x = re[i], y = im.empty() ? 0 : im[i];
            a += x * roots.cos[j] - y * roots.sin[j];
            b += x * roots.sin[j] + y * roots.cos[j];
            j += k;
            j -= j >= n ? n : 0;
        }
        out.re[k] = a;
        out.im[k] = b;
    }
    return out;
}

template <class T>
std::vector<Real> random_values(Random& random, int64_t n) {
    std::vector<Real> x(n);
    for (Real& v : x) {
        v = T(random.normal());
    }
    return x;
}

// ---- Codelets ------------------------------------------------------------------------------------------------------

template <class T, int P>
void check_dft(Random& random) {
    const std::vector<Real> re = random_values<T>(random, P), im = random_values<T>(random, P);
    const Spectrum should = definition(re, im, P, Roots(P));
    T a[P], b[P];
    std::copy(re.begin(), re.end(), a);
    std::copy(im.begin(), im.end(), b);
    Dft<P, T, T>::run(a, b);
    Distance d;
    for (int k = 0; k < P; ++k) {
        d.add(a[k], should.re[k]);
        d.add(b[k], should.im[k]);
    }
    CHECK(d.in_eps<T>() <= allowed(P, false), "complex codelet %d: off by %.2Lf eps", P, d.in_eps<T>());
}

template <class T, int R>
void check_real_dft(Random& random) {
    const std::vector<Real> x = random_values<T>(random, R);
    const Spectrum should = definition(x, {}, R / 2 + 1, Roots(R));
    T in[R], re[R / 2 + 1], im[R / 2 + 1];
    std::copy(x.begin(), x.end(), in);
    RealDft<R, T, T>::run(in, re, im);
    Distance d;
    for (int k = 0; k <= R / 2; ++k) {
        d.add(re[k], should.re[k]);
        d.add(im[k], should.im[k]);
    }
    CHECK(d.in_eps<T>() <= allowed(R, false), "real codelet %d: off by %.2Lf eps", R, d.in_eps<T>());
    CHECK(im[0] == 0 && (R % 2 || im[R / 2] == 0), "real codelet %d: imaginary parts of the real bins", R);

    // The transpose of both, by the definition: x[n] = sum over all R bins of H_k exp(+2 pi i k n / R), H Hermitian.
    std::vector<Real> hr = random_values<T>(random, R / 2 + 1), hi = random_values<T>(random, R / 2 + 1);
    hi[0] = 0;
    if (R % 2 == 0) {
        hi[R / 2] = 0;
    }
    std::copy(hr.begin(), hr.end(), re);
    std::copy(hi.begin(), hi.end(), im);
    RealDft<R, T, T>::inverse(re, im, in);
    Distance e;
    for (int n = 0; n < R; ++n) {
        Real sum = 0;
        for (int k = 0; k < R; ++k) {
            const int fold = 2 * k > R ? R - k : k;
            const Real angle = 2 * kPi * k * n / R;
            sum += hr[fold] * std::cos(angle) - (fold == k ? hi[fold] : -hi[fold]) * std::sin(angle);
        }
        e.add(in[n], sum);
    }
    CHECK(e.in_eps<T>() <= allowed(R, false), "transpose of real codelet %d: off by %.2Lf eps", R, e.in_eps<T>());
}

template <class T>
void check_codelets(Random& random) {
    check_dft<T, 1>(random), check_dft<T, 2>(random), check_dft<T, 3>(random), check_dft<T, 4>(random);
    check_dft<T, 5>(random), check_dft<T, 7>(random), check_dft<T, 8>(random);
    check_real_dft<T, 1>(random), check_real_dft<T, 2>(random), check_real_dft<T, 3>(random);
    check_real_dft<T, 4>(random), check_real_dft<T, 5>(random), check_real_dft<T, 8>(random);
    check_real_dft<T, 16>(random), check_real_dft<T, 20>(random);
}

void check_turns() {
    for (int64_t n : {1, 2, 3, 4, 5, 7, 8, 16, 31, 360, 1009, 4096}) {
        for (int64_t k = 0; k < 2 * n; ++k) {
            const Real c = std::cos(2 * kPi * k / n), s = std::sin(2 * kPi * k / n);
            const Real error = std::max(std::abs(mmfast::cos_turn(k, n) - c), std::abs(mmfast::sin_turn(k, n) - s));
            CHECK(error <= 2 * std::numeric_limits<double>::epsilon(), "turn %ld / %ld: off by %Lg", long(k), long(n),
                  error);
        }
    }
}

// ---- Complex plans -------------------------------------------------------------------------------------------------

// With 16 columns every size of row has a plan.
template <class T, class V>
void check_complex(int64_t size, bool in_place, Random& random) {
    using L = Lanes<T, V>;
    const FftTables<T> tables(16 * size);
    const ComplexPlan<T>& plan = tables.plan().row;
    CHECK(plan.size == size, "row of %ld points instead of %ld", long(plan.size), long(size));
    std::vector<Complex<V>> x(size), w(mmfast::row_scratch(plan)), out(size);
    std::vector<std::vector<Real>> re, im;
    for (int lane = 0; lane < L::count; ++lane) {
        re.push_back(random_values<T>(random, size));
        im.push_back(random_values<T>(random, size));
        for (int64_t i = 0; i < size; ++i) {
            L::set(x[i].re, lane, T(re[lane][i]));
            L::set(x[i].im, lane, T(im[lane][i]));
        }
    }
    std::vector<int> seen(size);
    Complex<V>* const to = in_place ? x.data() : out.data();
    mmfast::transform_row(plan, mmfast::Elements<V>{x.data()}, w.data(), [&](int64_t k, V a, V b) {
        CHECK(k >= 0 && k < size, "output %ld of %ld", long(k), long(size));
        ++seen[k];
        to[k] = {a, b};
    });
    const Roots roots(size);
    for (int lane = 0; lane < L::count; ++lane) {
        const Spectrum should = definition(re[lane], im[lane], size, roots);
        Distance d;
        for (int64_t k = 0; k < size; ++k) {
            CHECK(seen[k] == 1, "output %ld of %ld came %d times", long(k), long(size), seen[k]);
            d.add(L::get(to[k].re, lane), should.re[k]);
            d.add(L::get(to[k].im, lane), should.im[k]);
        }
        CHECK(d.in_eps<T>() <= allowed(size, plan.inner), "complex plan of %ld points: off by %.2Lf eps", long(size),
              d.in_eps<T>());
    }
}

// ---- Real plans ----------------------------------------------------------------------------------------------------

#define FOR_RADIX(radix, call)                                        \
    switch (radix) {                                                  \
        case 20: call(20); break;                                     \
        case 16: call(16); break;                                     \
        case 8: call(8); break;                                       \
        case 5: call(5); break;                                       \
        case 4: call(4); break;                                       \
        case 3: call(3); break;                                       \
        case 2: call(2); break;                                       \
        case 1: call(1); break;                                       \
        default: CHECK(false, "no codelet for radix %d", int(radix)); \
    }

// One plan, all lanes filled with different samples.
template <class T, class V>
struct RealCheck {
    using L = Lanes<T, V>;
    const RealPlan<T>& plan;
    const Roots& roots;
    const int64_t n, length, bins, stride, rows;  // samples past `length` are zero
    std::vector<std::vector<Real>> x;             // [lane][length]

    RealCheck(const RealPlan<T>& p, const Roots& r, int64_t length_, Random& random)
        : plan(p), roots(r), n(p.n), length(length_), bins(p.n / 2 + 1), stride(p.columns | 1), rows(p.radix / 2 + 1) {
        for (int lane = 0; lane < L::count; ++lane) {
            x.push_back(random_values<T>(random, length));
        }
    }

    void forward() const {
        std::vector<Complex<V>> z(rows * stride), w(mmfast::row_scratch(plan.row));
        const auto load = [this](int64_t i) {
            CHECK(i >= 0 && i < length, "sample %ld of %ld", long(i), long(length));
            V v{};
            for (int lane = 0; lane < L::count; ++lane) {
                L::set(v, lane, T(x[lane][i]));
            }
            return v;
        };
        const auto put = [&](int64_t k, int64_t s, V re, V im) { z[k * stride + s] = {re, im}; };
#define CALL(R) mmfast::real_columns<R, T, V>(plan, length, load, put)
        FOR_RADIX(plan.radix, CALL)
#undef CALL
        std::vector<int> seen(bins);
        std::vector<Distance> distance(L::count);
        std::vector<Spectrum> should;
        for (const auto& samples : x) {
            should.push_back(definition(samples, {}, bins, roots));
        }
        for (int64_t k1 = 0; k1 < rows; ++k1) {
            const mmfast::Elements<V> row{z.data() + k1 * stride};
            mmfast::transform_row(plan.row, row, w.data(), [&](int64_t k2, V re, V im) {
                const int64_t bin = k1 + plan.radix * k2;
                const bool folded = 2 * bin > n;
                const int64_t at = folded ? n - bin : bin;
                CHECK(at >= 0 && at < bins, "bin %ld of %ld", long(at), long(n));
                ++seen[at];
                for (int lane = 0; lane < L::count; ++lane) {
                    distance[lane].add(L::get(re, lane), should[lane].re[at]);
                    distance[lane].add(L::get(im, lane), folded ? -should[lane].im[at] : should[lane].im[at]);
                }
            });
        }
        for (int64_t k = 0; k < bins; ++k) {
            CHECK(seen[k] > 0, "bin %ld of %ld is missing", long(k), long(n));
        }
        for (const Distance& d : distance) {
            CHECK(d.in_eps<T>() <= allowed(n, plan.row.inner), "real plan of %ld points: off by %.2Lf eps", long(n),
                  d.in_eps<T>());
        }
    }

    // <F x, h> == <x, F^T h> for a random Hermitian h, and F^T h sample by sample.
    void adjoint(Random& random) const {
        std::vector<Complex<V>> z(rows * stride), w(mmfast::row_scratch(plan.row));
        std::vector<Spectrum> h;
        for (int lane = 0; lane < L::count; ++lane) {
            h.push_back({random_values<T>(random, bins), random_values<T>(random, bins)});
            h[lane].im[0] = 0;
            if (n % 2 == 0) {
                h[lane].im[n / 2] = 0;
            }
        }
        for (int64_t k1 = 0; k1 < rows; ++k1) {
            Complex<V>* const row = z.data() + k1 * stride;
            for (int64_t k2 = 0; k2 < plan.columns; ++k2) {
                const int64_t bin = k1 + plan.radix * k2, at = 2 * bin > n ? n - bin : bin;
                for (int lane = 0; lane < L::count; ++lane) {
                    L::set(row[k2].im, lane, T(h[lane].re[at]));
                    L::set(row[k2].re, lane, T(at == bin ? h[lane].im[at] : -h[lane].im[at]));
                }
            }
            mmfast::transform_row(plan.row, mmfast::Elements<V>{row}, w.data(),
                                  [row](int64_t k2, V re, V im) { row[k2] = {re, im}; });
        }
        std::vector<V> out(length);
        std::vector<int> seen(length);
        const auto store = [&](int64_t i, V value) {
            CHECK(i >= 0 && i < length, "sample %ld of %ld", long(i), long(length));
            out[i] = value;
            ++seen[i];
        };
#define CALL(R) mmfast::real_columns_adjoint<R, T, V>(plan, length, z.data(), stride, store)
        FOR_RADIX(plan.radix, CALL)
#undef CALL
        for (int lane = 0; lane < L::count; ++lane) {
            compare_adjoint(h[lane], out, seen, lane);
        }
    }

private:
    void compare_adjoint(const Spectrum& h, const std::vector<V>& out, const std::vector<int>& seen, int lane) const {
        std::vector<Real> re(n), im(n);
        for (int64_t k = 0; k < n; ++k) {
            const bool folded = 2 * k > n;
            re[k] = h.re[folded ? n - k : k];
            im[k] = folded ? h.im[n - k] : -h.im[k];  // conjugate: the forward definition then gives the inverse
        }
        const Spectrum inverse = definition(re, im, length, roots);
        const Spectrum fx = definition(x[lane], {}, n, roots);
        Distance d;
        Real left = 0, right = 0, norm_x = 0, norm_h = 0;
        for (int64_t k = 0; k < n; ++k) {
            norm_h += re[k] * re[k] + im[k] * im[k];
            left += fx.re[k] * re[k] - fx.im[k] * im[k];
        }
        for (int64_t i = 0; i < length; ++i) {
            CHECK(seen[i] == 1, "sample %ld of %ld came %d times", long(i), long(length), seen[i]);
            const Real value = L::get(out[i], lane);
            d.add(value, inverse.re[i]);
            right += x[lane][i] * value;
            norm_x += x[lane][i] * x[lane][i];
        }
        // Relative to what `length` samples of n have on average: the few asked for may themselves be small.
        const Real limit = allowed(n, plan.row.inner), size = std::sqrt(norm_h * length);
        CHECK(d.in_eps<T>(size) <= limit, "adjoint of %ld points: off by %.2Lf eps", long(n), d.in_eps<T>(size));
        const Real error = std::abs(left - right) / std::sqrt(norm_x) / size / std::numeric_limits<T>::epsilon();
        CHECK(error <= limit, "dot products of %ld points differ by %.2Lf eps", long(n), error);
    }
};

template <class T, class V>
void check_real(int64_t n, int64_t length, Random& random, int radix = 0) {
    const FftTables<T> tables(n, radix ? radix : FftTables<T>::real_radix(n));
    CHECK(tables.plan().n == n && tables.plan().radix * tables.plan().columns == n, "plan of %ld points", long(n));
    const Roots roots(n);
    const RealCheck<T, V> check(tables.plan(), roots, length, random);
    check.forward();
    check.adjoint(random);
}

template <class T>
void check_all(Random& random) {
    using V = typename VectorOf<T, 16 / sizeof(T)>::type;
    check_codelets<T>(random);
    for (int64_t n = 1; n <= 130; ++n) {
        check_real<T, T>(n, n, random);
        check_real<T, V>(n, 1 + random.below(n), random);  // zero-padded
        check_complex<T, T>(n, n % 2, random);
    }
    for (int64_t n : {400, 512, 600, 882, 1009, 1024, 2048}) {
        check_real<T, T>(n, n, random);
        check_real<T, T>(n, 3 * n / 4, random);
    }
    for (int64_t n : {20, 60, 100, 400}) {
        check_real<T, T>(n, n, random, 20);
        check_real<T, V>(n, 3 * n / 4, random, 20);
    }
    check_real<T, T>(4096, 4096, random);
    check_real<T, T>(4099, 1200, random);  // a prime; few samples, for the definition's sake
    for (int64_t n : {400, 512, 1009}) {
        check_real<T, V>(n, n, random);
    }
    for (int64_t n : {256, 343, 961, 1009, 1024, 1147}) {  // 7^3, 31^2, prime, 31 * 37
        check_complex<T, T>(n, false, random);
        check_complex<T, V>(n, true, random);
    }
}

}  // namespace

int main() {
    Random random(1);
    check_turns();
    check_all<float>(random);
    check_all<double>(random);
    std::puts("ok");
    return 0;
}
