// Tables of the transforms in fft_core.h, computed in double precision. Host only.
#pragma once

#include <cmath>
#include <memory>
#include <vector>

#include "mel/fft_core.h"

namespace mmfast {

// Owns what a RealPlan points to.
template <class T>
class FftTables {
public:
    explicit FftTables(int64_t n) : FftTables(n, real_radix(n)) {}
    FftTables(int64_t n, int radix) {
        plan_.n = n;
        plan_.radix = radix;
        plan_.columns = n / plan_.radix;
        std::vector<T> tw;
        for (int64_t s = 0; s < plan_.columns; ++s)
            for (int64_t k = 1; k <= plan_.radix / 2; ++k) push(tw, s * k, n);
        plan_.twiddle = keep(std::move(tw));
        for (int64_t k1 = 0; k1 <= plan_.radix / 2; ++k1) {
            for (int64_t k2 = 0; k2 < plan_.columns; ++k2) {
                const int64_t bin = k1 + plan_.radix * k2;
                bins_.push_back(int32_t(2 * bin > n ? n - bin : bin));
            }
        }
        plan_.bin = bins_.data();
        plan_.row = complex_plan(plan_.columns);
    }
    FftTables(const FftTables&) = delete;
    FftTables& operator=(const FftTables&) = delete;

    const RealPlan<T>& plan() const { return plan_; }

    // Codelets of RealDft exist for these; the largest that divides n leaves the fewest redundant bins.
    static int real_radix(int64_t n) {
        for (int r : {16, 8, 4, 2, 5, 3})
            if (n % r == 0) return r;
        return 1;
    }

    // The same for the tiles of the CPU, which have codelets of 20 points too (fft_twenty.h).
    static int tile_radix(int64_t n) { return n == 400 ? 20 : real_radix(n); }

private:
    static void push(std::vector<T>& to, int64_t k, int64_t n) {
        k %= n;
        to.push_back(T(cos_turn(k, n)));
        to.push_back(T(sin_turn(k, n)));
    }

    const T* keep(std::vector<T> values) {
        kept_.push_back(std::move(values));
        return kept_.back().data();
    }

    static std::vector<int> factors(int64_t n) {
        int twos = 0;
        for (; n % 2 == 0; n /= 2) ++twos;
        // Few stages, and no radix 2 where two of 4 do as well.
        const int fours = twos == 1 ? 0 : twos % 3 == 1 ? 2 : twos % 3 == 2;
        std::vector<int> found(twos == 1 ? 0 : (twos - 2 * fours) / 3, 8);
        found.resize(found.size() + fours, 4);
        if (twos == 1) found.push_back(2);
        for (int r = 3; r <= kMaxRadix; r += 2)
            for (; n % r == 0; n /= r) found.push_back(r);
        if (n > 1) found.assign(1, 0);  // a prime factor without a stage
        return found;
    }

    ComplexPlan<T> complex_plan(int64_t size) {
        ComplexPlan<T> p;
        p.size = size;
        const std::vector<int> radices = factors(size);
        if (radices.size() == 1 && radices[0] == 0) {
            plan_chirp(p);
            return p;
        }
        int64_t len = size;
        for (int r : radices) {
            const int64_t m = len / r;
            const int i = p.stages++;
            p.radix[i] = r;
            if (r > 8) {
                std::vector<T> roots;
                for (int j = 0; j < r; ++j) push(roots, j, r);
                p.roots[i] = keep(std::move(roots));
            }
            if (m > 1) {
                std::vector<T> tw;
                for (int64_t q = 0; q < m; ++q)
                    for (int k = 1; k < r; ++k) push(tw, q * k, len);
                p.twiddle[i] = keep(std::move(tw));
            }
            len = m;
        }
        return p;
    }

    void plan_chirp(ComplexPlan<T>& p) {
        const int64_t n = p.size;
        for (p.inner = 1; p.inner < 2 * n - 1;) p.inner *= 2;
        std::vector<T> chirp;
        std::vector<double> re(p.inner), im(p.inner);
        for (int64_t j = 0, square = 0; j < n; square = (square + 2 * j + 1) % (2 * n), ++j) {
            const double c = cos_turn(square, 2 * n), s = sin_turn(square, 2 * n);
            chirp.push_back(T(c));
            chirp.push_back(T(s));
            re[j] = re[(p.inner - j) % p.inner] = c / double(p.inner);
            im[j] = im[(p.inner - j) % p.inner] = s / double(p.inner);
        }
        p.chirp = keep(std::move(chirp));
        p.chirp_spectrum = keep(spectrum(re, im));
        convolution_ = std::make_unique<ComplexPlan<T>>(complex_plan(p.inner));
        p.convolution = convolution_.get();
    }

    // DFT of the points of a convolution, by the transform itself in double precision.
    static std::vector<T> spectrum(const std::vector<double>& re, const std::vector<double>& im) {
        const int64_t n = int64_t(re.size());
        FftTables<double> tables(FftTables<double>::PowerOfTwo{n});
        std::vector<Complex<double>> x(n), w(2 * n);
        for (int64_t i = 0; i < n; ++i) x[i] = {re[i], im[i]};
        std::vector<T> out(2 * n);
        transform_direct<Sizes::convolution>(tables.plan().row, Elements<double>{x.data()}, w.data(),
                                             [&](int64_t k, double a, double b) {
                                                 out[2 * k] = T(a);
                                                 out[2 * k + 1] = T(b);
                                             });
        return out;
    }

    struct PowerOfTwo {
        int64_t n;
    };
    explicit FftTables(PowerOfTwo size) { plan_.row = complex_plan(size.n); }
    template <class U>
    friend class FftTables;

    RealPlan<T> plan_;
    std::vector<std::vector<T>> kept_;
    std::vector<int32_t> bins_;
    std::unique_ptr<ComplexPlan<T>> convolution_;
};

}  // namespace mmfast
