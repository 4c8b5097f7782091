// Discrete Fourier transforms written once for any value type V: a scalar, or a vector whose lanes are independent
// transforms. No shuffles are needed in that layout and every radix costs the same per lane.
//
// Note: [Real four-step transform]
//   A real transform of n = R * S points, sample index s + S r, bin k1 + R k2:
//     1. for each column s: real DFT over r (R points), outputs k1 = 0 .. R/2 only, times exp(-2 pi i s k1 / n)
//     2. for each row k1:   complex DFT over s (S points); output k2 is bin k1 + R k2, or, past n / 2, the conjugate of
//                           bin n - (k1 + R k2).
//   Rows 0 .. R/2 hold every bin, so no split pass follows. The adjoint runs the steps backwards.
//
// Note: [Stockham]
//   Complex DFT of S points by autosorting decimation in frequency: with `len` points left and stride s,
//     y[q + s (r p + k)] = exp(-2 pi i p k / len) * sum_i x[q + s (p + m i)] exp(-2 pi i i k / r),   m = len / r.
//   The last stage has m = 1: no twiddles, and it may run in place.
#pragma once

#include <cstdint>

#include "common/hd.h"

#ifndef MMFAST_ISA
#define MMFAST_ISA host
#endif

namespace mmfast {

constexpr int kMaxStages = 32;
constexpr int kMaxRadix = 31;  // the largest prime with a stage of its own

// Complex transform of `size` points; the tables belong to whoever made the plan (fft_plan.h). A size with a prime factor
// over kMaxRadix is a convolution with a chirp (Bluestein) in an inner power of two, `inner` points long.
template <class T>
struct ComplexPlan {
    int64_t size = 1;
    int stages = 0;
    int radix[kMaxStages] = {};
    const T* twiddle[kMaxStages] = {};  // [m][radix - 1][cos, sin]; the last stage has none
    const T* roots[kMaxStages] = {};    // of a radix without a codelet: [radix][cos, sin]
    int64_t inner = 0;
    const T* chirp = nullptr;           // [size][cos, sin] of pi j^2 / size
    const T* chirp_spectrum = nullptr;  // [inner][re, im], over `inner`
    const ComplexPlan* convolution = nullptr;
};

template <class T>
struct RealPlan {
    int64_t n = 1;
    int radix = 1;               // R
    int64_t columns = 1;         // S
    const T* twiddle = nullptr;  // [S][R / 2][cos, sin]: column s, output k1 = 1 .. R/2
    // [R / 2 + 1][S]: the bin, of n / 2 + 1, that output k2 of row k1 is or is conjugate to
    const int32_t* bin = nullptr;
    ComplexPlan<T> row;
};

// A namespace for each instruction set: two copies of one inline function must never be merged by the linker. Data stand
// outside, since code for different instruction sets hands them on.
inline namespace MMFAST_ISA {

template <class V>
struct Complex {
    V re, im;
};

constexpr double kTwoPi = 6.283185307179586476925286766559;

// sin and cos of 2 pi k / n at compile time, reduced to the first octant so that the series converges at once.
constexpr double sin_series(double x) {
    double term = x, sum = x;
    for (int i = 1; i < 12; ++i) {
        term *= -x * x / ((2 * i) * (2 * i + 1));
        sum += term;
    }
    return sum;
}
constexpr double cos_series(double x) {
    double term = 1, sum = 1;
    for (int i = 1; i < 12; ++i) {
        term *= -x * x / ((2 * i - 1) * (2 * i));
        sum += term;
    }
    return sum;
}
constexpr double cos_turn(int64_t k, int64_t n);
constexpr double sin_turn(int64_t k, int64_t n) {
    k %= n;
    if (2 * k > n) return -sin_turn(n - k, n);
    if (4 * k > n) return 2 * k == n ? 0.0 : sin_turn(n - 2 * k, 2 * n);
    if (8 * k > n) return cos_turn(n - 4 * k, 4 * n);
    return sin_series(kTwoPi * double(k) / double(n));
}
constexpr double cos_turn(int64_t k, int64_t n) {
    k %= n;
    if (2 * k > n) k = n - k;
    if (4 * k > n) return -cos_turn(n - 2 * k, 2 * n);
    if (8 * k > n) return sin_turn(n - 4 * k, 4 * n);
    return cos_series(kTwoPi * double(k) / double(n));
}

// cos and sin of 2 pi k / N for a codelet's constants.
template <int N, class T>
struct Turns {
    T cos[N] = {}, sin[N] = {};
    constexpr Turns() {
        for (int k = 0; k < N; ++k) {
            cos[k] = T(cos_turn(k, N));
            sin[k] = T(sin_turn(k, N));
        }
    }
};
template <int N, class T>
MMFAST_CONSTANT Turns<N, T> kTurns{};

// (re, im) * (c - i s)
template <class V, class T>
MMFAST_INLINE void twist(V& re, V& im, T c, T s) {
    V t = re * c + im * s;
    im = im * c - re * s;
    re = t;
}

// Forward complex DFT of P points in place, P odd: pairs j, P - j share their products.
template <int P, class T, class V>
struct Dft {
    static MMFAST_INLINE void run(V* re, V* im) {
        constexpr int H = (P - 1) / 2;
        V sr[H + 1], si[H + 1], dr[H + 1], di[H + 1];
        V r0 = re[0], i0 = im[0];
        for (int j = 1; j <= H; ++j) {
            sr[j] = re[j] + re[P - j];
            si[j] = im[j] + im[P - j];
            dr[j] = re[j] - re[P - j];
            di[j] = im[j] - im[P - j];
            re[0] += sr[j];
            im[0] += si[j];
        }
        for (int k = 1; k <= H; ++k) {
            V ar = r0, ai = i0, br = dr[1] * kTurns<P, T>.sin[k], bi = di[1] * kTurns<P, T>.sin[k];
            for (int j = 1; j <= H; ++j) {
                ar += sr[j] * kTurns<P, T>.cos[j * k % P];
                ai += si[j] * kTurns<P, T>.cos[j * k % P];
                if (j > 1) {
                    br += dr[j] * kTurns<P, T>.sin[j * k % P];
                    bi += di[j] * kTurns<P, T>.sin[j * k % P];
                }
            }
            re[k] = ar + bi;
            im[k] = ai - br;
            re[P - k] = ar - bi;
            im[P - k] = ai + br;
        }
    }
};
template <class T, class V>
struct Dft<1, T, V> {
    static MMFAST_INLINE void run(V*, V*) {}
};
template <class T, class V>
struct Dft<2, T, V> {
    static MMFAST_INLINE void run(V* re, V* im) {
        V r = re[0] - re[1], i = im[0] - im[1];
        re[0] += re[1];
        im[0] += im[1];
        re[1] = r;
        im[1] = i;
    }
};
template <class T, class V>
struct Dft<4, T, V> {
    static MMFAST_INLINE void run(V* re, V* im) {
        V ar = re[0] + re[2], ai = im[0] + im[2], br = re[0] - re[2], bi = im[0] - im[2];
        V cr = re[1] + re[3], ci = im[1] + im[3], dr = re[1] - re[3], di = im[1] - im[3];
        re[0] = ar + cr;
        im[0] = ai + ci;
        re[1] = br + di;
        im[1] = bi - dr;
        re[2] = ar - cr;
        im[2] = ai - ci;
        re[3] = br - di;
        im[3] = bi + dr;
    }
};
// As any odd P, with a factor taken out of the two sines of each sum, so that it goes into the last addition: 32 operations
// instead of 36 where products are added in one.
template <class T, class V>
struct Dft<5, T, V> {
    static MMFAST_INLINE void run(V* re, V* im) {
        constexpr T c1 = T(cos_turn(1, 5)), c2 = T(cos_turn(2, 5)), s1 = T(sin_turn(1, 5)), s2 = T(sin_turn(2, 5));
        constexpr T up = T(sin_turn(2, 5) / sin_turn(1, 5)), down = T(sin_turn(1, 5) / sin_turn(2, 5));
        const V r0 = re[0], i0 = im[0];
        const V sr1 = re[1] + re[4], si1 = im[1] + im[4], dr1 = re[1] - re[4], di1 = im[1] - im[4];
        const V sr2 = re[2] + re[3], si2 = im[2] + im[3], dr2 = re[2] - re[3], di2 = im[2] - im[3];
        re[0] = r0 + sr1 + sr2;
        im[0] = i0 + si1 + si2;
        const V ar1 = r0 + sr1 * c1 + sr2 * c2, ai1 = i0 + si1 * c1 + si2 * c2;
        const V ar2 = r0 + sr1 * c2 + sr2 * c1, ai2 = i0 + si1 * c2 + si2 * c1;
        const V br1 = dr1 + dr2 * up, bi1 = di1 + di2 * up, br2 = dr1 - dr2 * down, bi2 = di1 - di2 * down;
        re[1] = ar1 + bi1 * s1;
        im[1] = ai1 - br1 * s1;
        re[4] = ar1 - bi1 * s1;
        im[4] = ai1 + br1 * s1;
        re[2] = ar2 + bi2 * s2;
        im[2] = ai2 - br2 * s2;
        re[3] = ar2 - bi2 * s2;
        im[3] = ai2 + br2 * s2;
    }
};
template <class T, class V>
struct Dft<8, T, V> {
    static MMFAST_INLINE void run(V* re, V* im) {
        V er[4] = {re[0], re[2], re[4], re[6]}, ei[4] = {im[0], im[2], im[4], im[6]};
        V qr[4] = {re[1], re[3], re[5], re[7]}, qi[4] = {im[1], im[3], im[5], im[7]};
        Dft<4, T, V>::run(er, ei);
        Dft<4, T, V>::run(qr, qi);
        constexpr T h = T(cos_turn(1, 8));
        V t1r = (qr[1] + qi[1]) * h, t1i = (qi[1] - qr[1]) * h;
        V t3r = (qi[3] - qr[3]) * h, t3i = (qr[3] + qi[3]) * -h;
        qr[1] = t1r;
        qi[1] = t1i;
        V t2 = qr[2];
        qr[2] = qi[2];
        qi[2] = -t2;
        qr[3] = t3r;
        qi[3] = t3i;
        for (int k = 0; k < 4; ++k) {
            re[k] = er[k] + qr[k];
            im[k] = ei[k] + qi[k];
            re[k + 4] = er[k] - qr[k];
            im[k + 4] = ei[k] - qi[k];
        }
    }
};

// DFT of R real points: re, im of bins 0 .. R/2. R a power of two (by halves) or odd (by pairs).
template <int R, class T, class V>
struct RealDft {
    static MMFAST_INLINE void run(const V* x, V* re, V* im) {
        if constexpr (R == 1) {
            re[0] = x[0];
            im[0] = V{};
        } else if constexpr (R == 2) {
            re[0] = x[0] + x[1];
            re[1] = x[0] - x[1];
            im[0] = im[1] = V{};
        } else if constexpr (R == 4) {
            V a = x[0] + x[2], b = x[1] + x[3];
            re[0] = a + b;
            re[2] = a - b;
            re[1] = x[0] - x[2];
            im[1] = x[3] - x[1];
            im[0] = im[2] = V{};
        } else if constexpr (R % 2 == 0) {
            constexpr int Q = R / 2;
            V even[Q], odd[Q], er[Q / 2 + 1], ei[Q / 2 + 1], dr[Q / 2 + 1], di[Q / 2 + 1];
            for (int i = 0; i < Q; ++i) {
                even[i] = x[2 * i];
                odd[i] = x[2 * i + 1];
            }
            RealDft<Q, T, V>::run(even, er, ei);
            RealDft<Q, T, V>::run(odd, dr, di);
            re[0] = er[0] + dr[0];
            re[Q] = er[0] - dr[0];
            im[0] = im[Q] = V{};
            for (int k = 1; k < Q / 2; ++k) {
                twist(dr[k], di[k], kTurns<R, T>.cos[k], kTurns<R, T>.sin[k]);
                re[k] = er[k] + dr[k];
                im[k] = ei[k] + di[k];
                re[Q - k] = er[k] - dr[k];
                im[Q - k] = di[k] - ei[k];
            }
            re[Q / 2] = er[Q / 2];  // a quarter turn; both halves are real there
            im[Q / 2] = -dr[Q / 2];
        } else {
            constexpr int H = (R - 1) / 2;
            V sum[H + 1], dif[H + 1];
            V total = x[0];
            for (int j = 1; j <= H; ++j) {
                sum[j] = x[j] + x[R - j];
                dif[j] = x[j] - x[R - j];
                total += sum[j];
            }
            re[0] = total;
            im[0] = V{};
            for (int k = 1; k <= H; ++k) {
                V a = x[0], b = V{};
                for (int j = 1; j <= H; ++j) {
                    a += sum[j] * kTurns<R, T>.cos[j * k % R];
                    b -= dif[j] * kTurns<R, T>.sin[j * k % R];
                }
                re[k] = a;
                im[k] = b;
            }
        }
    }

    // Transpose: x[n] = Re X_0 + Re X_{R/2} (-1)^n + 2 Re sum_{0<k<R/2} X_k exp(+2 pi i k n / R), destroying re and im.
    static MMFAST_INLINE void inverse(V* re, V* im, V* x) {
        if constexpr (R == 1) {
            x[0] = re[0];
        } else if constexpr (R == 2) {
            x[0] = re[0] + re[1];
            x[1] = re[0] - re[1];
        } else if constexpr (R % 2 == 0) {
            constexpr int Q = R / 2;
            V even[Q], odd[Q], er[Q / 2 + 1], ei[Q / 2 + 1], dr[Q / 2 + 1], di[Q / 2 + 1];
            er[0] = re[0] + re[Q];
            dr[0] = re[0] - re[Q];
            ei[0] = di[0] = V{};
            for (int k = 1; k < Q / 2; ++k) {
                er[k] = re[k] + re[Q - k];
                ei[k] = im[k] - im[Q - k];
                dr[k] = re[k] - re[Q - k];
                di[k] = im[k] + im[Q - k];
                twist(dr[k], di[k], kTurns<R, T>.cos[k], -kTurns<R, T>.sin[k]);
            }
            er[Q / 2] = re[Q / 2] + re[Q / 2];
            dr[Q / 2] = -(im[Q / 2] + im[Q / 2]);
            ei[Q / 2] = di[Q / 2] = V{};
            RealDft<Q, T, V>::inverse(er, ei, even);
            RealDft<Q, T, V>::inverse(dr, di, odd);
            for (int i = 0; i < Q; ++i) {
                x[2 * i] = even[i];
                x[2 * i + 1] = odd[i];
            }
        } else {
            constexpr int H = (R - 1) / 2;
            V total = re[0];
            for (int k = 1; k <= H; ++k) total += re[k] + re[k];
            x[0] = total;
            for (int n = 1; n <= H; ++n) {
                V a = re[0], b = V{};
                for (int k = 1; k <= H; ++k) {
                    a += re[k] * (2 * kTurns<R, T>.cos[k * n % R]);
                    b += im[k] * (2 * kTurns<R, T>.sin[k * n % R]);
                }
                x[n] = a - b;
                x[R - n] = a + b;
            }
        }
    }
};

// Complex values of scratch that transform_row needs.
template <class T>
MMFAST_INLINE int64_t row_scratch(const ComplexPlan<T>& p) {
    return p.inner ? 3 * p.inner : p.stages > 2 ? 2 * p.size : p.size;
}

// Stages read their input by load(i, re, im), each value once, all those of a butterfly before its first output.
template <class V>
struct Elements {
    const Complex<V>* x;
    MMFAST_INLINE void operator()(int64_t i, V& re, V& im) const {
        re = x[i].re;
        im = x[i].im;
    }
};

template <int R, class V, class Load>
MMFAST_INLINE void gather(const Load& load, int64_t first, int64_t step, V* re, V* im) {
    for (int i = 0; i < R; ++i) {
        load(first + i * step, re[i], im[i]);
    }
}

template <int R, class T, class V, class Load>
__attribute__((noinline)) void middle_stage(const Load& load, Complex<V>* y, int64_t m, int64_t s, const T* tw) {
    for (int64_t p = 0; p < m; ++p, tw += 2 * (R - 1)) {
        for (int64_t q = 0; q < s; ++q) {
            V re[R], im[R];
            gather<R>(load, q + s * p, s * m, re, im);
            Dft<R, T, V>::run(re, im);
            Complex<V>* out = y + q + s * R * p;
            out[0] = {re[0], im[0]};
            if (p > 0)  // else by one
                for (int k = 1; k < R; ++k) twist(re[k], im[k], tw[2 * k - 2], tw[2 * k - 1]);
            for (int k = 1; k < R; ++k) out[s * k] = {re[k], im[k]};
        }
    }
}

template <int R, class T, class V, class Load, class Sink>
MMFAST_INLINE void last_stage(const Load& load, int64_t s, const Sink& sink) {
    for (int64_t q = 0; q < s; ++q) {
        V re[R], im[R];
        gather<R>(load, q, s, re, im);
        Dft<R, T, V>::run(re, im);
        for (int k = 0; k < R; ++k) sink(q + s * k, re[k], im[k]);
    }
}

// Any prime radix up to kMaxRadix, by the definition; roots[j] = exp(-2 pi i j / r).
template <class T, class V, class Load, class Sink>
__attribute__((noinline)) void prime_stage(const Load& load, int64_t m, int64_t s, int r, const T* roots, const T* tw,
                                           const Sink& sink) {
    for (int64_t p = 0; p < m; ++p) {
        for (int64_t q = 0; q < s; ++q) {
            V inr[kMaxRadix], ini[kMaxRadix], re[kMaxRadix], im[kMaxRadix];
            for (int i = 0; i < r; ++i) {
                load(q + s * (p + m * i), inr[i], ini[i]);
            }
            for (int k = 0; k < r; ++k) {
                V ar = inr[0], ai = ini[0];
                for (int i = 1, j = k; i < r; ++i, j = j + k < r ? j + k : j + k - r) {
                    const V xr = inr[i], xi = ini[i];
                    const T c = roots[2 * j], d = roots[2 * j + 1];
                    ar += xr * c + xi * d;
                    ai += xi * c - xr * d;
                }
                if (k && tw) twist(ar, ai, tw[2 * (p * (r - 1) + k - 1)], tw[2 * (p * (r - 1) + k - 1) + 1]);
                re[k] = ar;
                im[k] = ai;
            }
            for (int k = 0; k < r; ++k) sink(q + s * (r * p + k), re[k], im[k]);
        }
    }
}

// Sizes of a transform. A convolution with a chirp has a power of two, 128 or more: three stages at least, of 4 and 8 alone.
// To compile nothing else for it takes half the time that this file costs.
enum class Sizes { all, convolution };

// Stage i of p, not the last: m groups of s butterflies each.
template <Sizes kSizes, class T, class V, class Load>
MMFAST_INLINE void run_stage(const ComplexPlan<T>& p, int i, int64_t m, int64_t s, const Load& load, Complex<V>* y) {
    const T* const tw = p.twiddle[i];
    if constexpr (kSizes == Sizes::convolution) {
        if (p.radix[i] == 8) middle_stage<8, T>(load, y, m, s, tw);
        else middle_stage<4, T>(load, y, m, s, tw);
        return;
    }
    switch (p.radix[i]) {
        case 2: middle_stage<2, T>(load, y, m, s, tw); break;
        case 3: middle_stage<3, T>(load, y, m, s, tw); break;
        case 4: middle_stage<4, T>(load, y, m, s, tw); break;
        case 5: middle_stage<5, T>(load, y, m, s, tw); break;
        case 7: middle_stage<7, T>(load, y, m, s, tw); break;
        case 8: middle_stage<8, T>(load, y, m, s, tw); break;
        default:
            prime_stage<T, V>(load, m, s, p.radix[i], p.roots[i], tw, [y](int64_t k, V re, V im) { y[k] = {re, im}; });
    }
}

template <Sizes kSizes, class T, class V, class Load, class Sink>
MMFAST_INLINE void run_last_stage(const ComplexPlan<T>& p, int64_t s, const Load& load, const Sink& sink) {
    const int r = p.radix[p.stages - 1];
    if constexpr (kSizes == Sizes::convolution) {
        if (r == 8) last_stage<8, T, V>(load, s, sink);
        else last_stage<4, T, V>(load, s, sink);
        return;
    }
    switch (r) {
        case 2: last_stage<2, T, V>(load, s, sink); break;
        case 3: last_stage<3, T, V>(load, s, sink); break;
        case 4: last_stage<4, T, V>(load, s, sink); break;
        case 5: last_stage<5, T, V>(load, s, sink); break;
        case 7: last_stage<7, T, V>(load, s, sink); break;
        case 8: last_stage<8, T, V>(load, s, sink); break;
        default: prime_stage<T, V>(load, int64_t(1), s, r, p.roots[p.stages - 1], (const T*)nullptr, sink);
    }
}

// DFT of the p.size values of load(i, re, im); sink(k, re, im) receives output k, none before everything is loaded. w is scratch.
template <Sizes kSizes = Sizes::all, class T, class V, class Load, class Sink>
MMFAST_INLINE void transform_direct(const ComplexPlan<T>& p, const Load& load, Complex<V>* w, const Sink& sink) {
    if constexpr (kSizes == Sizes::all) {
        if (p.stages == 0) {
            V re, im;
            load(0, re, im);
            sink(0, re, im);
            return;
        }
        if (p.stages == 1) {
            run_last_stage<kSizes, T, V>(p, 1, load, sink);
            return;
        }
    }
    int64_t s = p.radix[0], len = p.size / s;
    run_stage<kSizes>(p, 0, len, 1, load, w);
    Complex<V>*x = w, *y = w + p.size;
    for (int i = 1; i + 1 < p.stages; ++i) {
        len /= p.radix[i];
        run_stage<kSizes>(p, i, len, s, Elements<V>{x}, y);
        Complex<V>* const t = x;
        x = y;
        y = t;
        s *= p.radix[i];
    }
    run_last_stage<kSizes, T, V>(p, s, Elements<V>{x}, sink);
}

// The same for every size: sizes with a large prime factor go through the chirp, X_k = c_k sum_j (x_j c_j) conj(c_{k-j}),
// c_j = exp(-pi i j^2 / size).
template <class T, class V, class Load, class Sink>
MMFAST_INLINE void transform_row(const ComplexPlan<T>& p, const Load& load, Complex<V>* w, const Sink& sink) {
    if (!p.inner) {
        transform_direct(p, load, w, sink);
        return;
    }
    Complex<V>* const a = w + 2 * p.inner;
    const auto chirped = [&](int64_t j, V& re, V& im) {
        re = im = V{};
        if (j >= p.size) return;
        load(j, re, im);
        twist(re, im, p.chirp[2 * j], p.chirp[2 * j + 1]);
    };
    transform_direct<Sizes::convolution>(*p.convolution, chirped, w, [&](int64_t k, V re, V im) {
        const T c = p.chirp_spectrum[2 * k], d = p.chirp_spectrum[2 * k + 1];
        // the product, real and imaginary parts swapped: a forward transform of that is the inverse one, swapped
        a[k] = {re * d + im * c, re * c - im * d};
    });
    transform_direct<Sizes::convolution>(*p.convolution, Elements<V>{a}, w, [&](int64_t k, V im, V re) {
        if (k >= p.size) return;
        twist(re, im, p.chirp[2 * k], p.chirp[2 * k + 1]);
        sink(k, re, im);
    });
}

// Step 1 of [Real four-step transform]. load(n) gives windowed sample n (n < length; later ones are zero); store(k1, s, re,
// im) takes column s of row k1, all of it after the loads of the column.
template <int R, class T, class V, class Load, class Store>
MMFAST_INLINE void real_columns(const RealPlan<T>& p, int64_t length, const Load& load, const Store& store) {
    const T* tw = p.twiddle;
    for (int64_t s = 0; s < p.columns; ++s, tw += 2 * (R / 2)) {
        V x[R], re[R / 2 + 1], im[R / 2 + 1];
        MMFAST_UNROLL
        for (int r = 0; r < R; ++r) {
            const int64_t n = s + p.columns * r;
            x[r] = n < length ? load(n) : V{};
        }
        RealDft<R, T, V>::run(x, re, im);
        store(0, s, re[0], V{});
        for (int k = 1; k <= R / 2; ++k) {
            twist(re[k], im[k], tw[2 * k - 2], tw[2 * k - 1]);
            store(k, s, re[k], im[k]);
        }
    }
}

// Its transpose, real and imaginary parts of z swapped: store(n, value) receives
// sum over all n bins k of H_k exp(+2 pi i k n / N) for the Hermitian H whose rows were transformed back into z.
template <int R, class T, class V, class Store>
MMFAST_INLINE void real_columns_adjoint(const RealPlan<T>& p, int64_t length, const Complex<V>* z, int64_t stride,
                                        const Store& store) {
    const T* tw = p.twiddle;
    for (int64_t s = 0; s < p.columns; ++s, tw += 2 * (R / 2)) {
        V x[R], re[R / 2 + 1], im[R / 2 + 1];
        for (int k = 0; k <= R / 2; ++k) {
            re[k] = z[k * stride + s].im;
            im[k] = z[k * stride + s].re;
            if (k) twist(re[k], im[k], tw[2 * k - 2], -tw[2 * k - 1]);
        }
        RealDft<R, T, V>::inverse(re, im, x);
        MMFAST_UNROLL
        for (int r = 0; r < R; ++r) {
            const int64_t n = s + p.columns * r;
            if (n < length) store(n, x[r]);
        }
    }
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
