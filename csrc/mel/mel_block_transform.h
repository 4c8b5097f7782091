// Samples to power: the transform of a tile, by phases. The steps are those of fft_core.h.
#pragma once

#include "mel/mel_block.h"

namespace mmfast {
namespace mel {

template <class T, class Shape, class Block>
template <int R>
MMFAST_INLINE void Tile<T, Shape, Block>::columns() const {
    const int S = shape.columns(), F = shape.frames(), stride = shape.stride(), length_ = window();
    const T *const tw = job.plan.fft.twiddle, *const w = job.p.window;
    const bool conditions = job.p.conditions();
    block.each(S * F, [&](int i) {
        const int f = i % F, s = i / F;
        if (s == 0) memory[at.poison + f] = 0;
        T v[R], re[R / 2 + 1], im[R / 2 + 1];
        MMFAST_UNROLL
        for (int r = 0; r < R; ++r) {
            const int n = s + S * r;
            v[r] = n < length_ ? (conditions ? conditioned(f, n) : staged(f, n)) * w[n] : T(0);
        }
        RealDft<R, T, T>::run(v, re, im);
        z.re[s * F + f] = re[0];
        z.im[s * F + f] = 0;
        MMFAST_UNROLL
        for (int k = 1; k <= R / 2; ++k) {
            const T* const t = tw + 2 * ((k - 1) * S + s);
            twist(re[k], im[k], t[0], t[1]);
            z.re[(k * stride + s) * F + f] = re[k];
            z.im[(k * stride + s) * F + f] = im[k];
        }
    });
}

// The same for a TunedShape. An item takes kEach frames of a column: what depends on the column alone, most of all addresses, is
// found once. Samples past the window have the weight 0 and the place of one that is in the frame anyway.
template <class T, class Shape, class Block>
template <bool kConditions>
MMFAST_INLINE void Tile<T, Shape, Block>::tuned_columns() const {
    constexpr int S = Shape::columns(), G = Shape::G, stride = Shape::stride();
    const int length_ = window();
    const T *const tw = job.plan.fft.twiddle, *const w = job.p.window;
    block.each(S * G, [&](int i) {
        const int s = i / G;
        T* to = z.re + spot(s, i % G);
        T weight[16], c[8], d[8];
        int place[16];
        MMFAST_UNROLL
        for (int r = 0; r < 16; ++r) {
            const int n = s + S * r;
            weight[r] = n < length_ ? w[n] : T(0);
            place[r] = at.skew(n < length_ ? n : 0);
            if (kConditions) place[r] |= at.skew(n && n < length_ ? n - 1 : 0) << 16;  // no place reaches 2^16
        }
        MMFAST_UNROLL
        for (int k = 0; k < 8; ++k) {
            const Together<2, T> turn = Together<2, T>::of(tw + 2 * (k * S + s));
            c[k] = turn.value[0];
            d[k] = turn.value[1];
        }
        const T scale = job.p.input_scale, emphasis = job.p.preemphasis;
        MMFAST_ROLLED
        for (int f = i % G; f < Shape::F; f += G, to += Shape::group_stride()) {
            const T* const from = begin_of(f);
            const T mean = kConditions ? memory[at.mean + f] : T(0);
            if (s == 0) memory[at.poison + f] = 0;
            T v[16], re[9], im[9];
            MMFAST_UNROLL
            for (int r = 0; r < 16; ++r) {
                if constexpr (kConditions) {  // as conditioned()
                    const T own = from[place[r] & 0xffff] * scale - mean, before = from[place[r] >> 16] * scale - mean;
                    v[r] = (own - before * emphasis) * weight[r];
                } else {
                    v[r] = from[place[r]] * weight[r];
                }
            }
            RealDft<16, T, T>::run(v, re, im);
            to[0] = re[0];
            MMFAST_UNROLL
            for (int k = 1; k <= 8; ++k) {
                twist(re[k], im[k], c[k - 1], d[k - 1]);
                to[k * stride * G] = re[k];
                to[Shape::plane() + k * stride * G] = im[k];
            }
        }
    });
}

// The rows of a TunedShape, to squared magnitudes. The imaginary part of row 0 is not stored before: it is 0.
template <class T, class Shape, class Block>
template <bool kKeep>
MMFAST_INLINE void Tile<T, Shape, Block>::tuned_rows() const {
    constexpr int A = Shape::A, P = Shape::P, F = Shape::F, G = Shape::G, stride = Shape::stride(), n = Shape::n();
    if constexpr (A > 1) {
        const T* const tw = job.plan.row_twiddle;
        block.each(9 * P * F, [&](int i) {
            const int f = i % F, p = i / F % P, k1 = i / (F * P), base = spot(k1 * stride + p, f);
            T re[A], im[A];
            MMFAST_UNROLL
            for (int a = 0; a < A; ++a) {
                re[a] = z.re[base + a * P * G];
                im[a] = k1 ? z.im[base + a * P * G] : T(0);
            }
            register_dft<A>(re, im);
            MMFAST_UNROLL
            for (int a = 0; a < A; ++a) {
                if (a) twist(re[a], im[a], tw[2 * (a * P + p)], tw[2 * (a * P + p) + 1]);
                z.re[base + a * P * G] = re[a];
                z.im[base + a * P * G] = im[a];
            }
        });
    }
    T* const out = power();
    block.each(9 * A * F, [&](int i) {
        const int f = i % F, k1 = i / F % 9, a = i / (9 * F), base = spot(k1 * stride + a * P, f);
        T re[P], im[P];
        MMFAST_UNROLL
        for (int j = 0; j < P; ++j) {
            re[j] = z.re[base + j * G];
            im[j] = A > 1 || k1 ? z.im[base + j * G] : T(0);
        }
        register_dft<P>(re, im);
        T *const up = out + bin_of(k1, a, 0) * F + f, *const down = out + bin_of(k1, a, P - 1) * F + f;
        const bool pairs = source(k1, a, P - 1);
        T nothing = 0;  // or NaN
        MMFAST_UNROLL
        for (int j = 0; j < P; ++j) {
            const T square = re[j] * re[j] + im[j] * im[j];
            nothing += square * T(0);
            if (2 * j < P) up[16 * A * F * j] = square;
            else if (2 * j == P ? source(k1, a, j) : pairs) down[16 * A * F * (P - 1 - j)] = square;
            if (kKeep) {
                z.re[base + j * G] = re[j];
                z.im[base + j * G] = im[j];
            }
        }
        if (nothing != 0) spoil(f);
        if (i < F) out[(n / 2 + 1) * F + f] = 0;  // what stands after the last bin is read with the weight 0
    });
}

template <class T, class Shape, class Block>
template <int R>
MMFAST_INLINE void Tile<T, Shape, Block>::stage_of(const Planes<T>& from, const Planes<T>& to, int m, int s,
                                                   const T* tw) const {
    const int F = shape.frames(), stride = shape.stride();
    block.each(shape.rows() * m * s * F, [&](int i) {
        const int f = i % F, t = i / F, q = t % s, p = t / s % m, base = t / (s * m) * stride;
        T re[R], im[R];
        MMFAST_UNROLL
        for (int a = 0; a < R; ++a) {
            const int j = (base + q + s * (p + m * a)) * F + f;
            re[a] = from.re[j];
            im[a] = from.im[j];
        }
        Dft<R, T, T>::run(re, im);
        MMFAST_UNROLL
        for (int k = 0; k < R; ++k) {
            if (k && tw) twist(re[k], im[k], tw[2 * (p * (R - 1) + k - 1)], tw[2 * (p * (R - 1) + k - 1) + 1]);
            const int j = (base + q + s * (R * p + k)) * F + f;
            to.re[j] = re[k];
            to.im[j] = im[k];
        }
    });
}

template <class T, class Shape, class Block>
MMFAST_INLINE void Tile<T, Shape, Block>::prime_stage_of(const Planes<T>& from, const Planes<T>& to, int m, int s,
                                                         int r, const T* roots, const T* tw) const {
    const int F = shape.frames(), stride = shape.stride();
    block.each(shape.rows() * m * s * F, [&](int i) {
        const int f = i % F, t = i / F, q = t % s, p = t / s % m, base = t / (s * m) * stride;
        T re[kMaxRadix], im[kMaxRadix];
        for (int k = 0; k < r; ++k) {
            T sr = 0, si = 0;
            for (int a = 0, j = 0; a < r; ++a, j = j + k < r ? j + k : j + k - r) {
                const int in = (base + q + s * (p + m * a)) * F + f;
                sr += from.re[in] * roots[2 * j] + from.im[in] * roots[2 * j + 1];
                si += from.im[in] * roots[2 * j] - from.re[in] * roots[2 * j + 1];
            }
            if (k && tw) twist(sr, si, tw[2 * (p * (r - 1) + k - 1)], tw[2 * (p * (r - 1) + k - 1) + 1]);
            re[k] = sr;
            im[k] = si;
        }
        for (int k = 0; k < r; ++k) {
            const int j = (base + q + s * (r * p + k)) * F + f;
            to.re[j] = re[k];
            to.im[j] = im[k];
        }
    });
}

// [Stockham] of every row: x to x in natural order, w is scratch. The two are exchanged after each stage but the last.
template <class T, class Shape, class Block>
MMFAST_INLINE void Tile<T, Shape, Block>::stages(const ComplexPlan<T>& c, Planes<T>& x, Planes<T>& w) const {
    int s = 1, len = int(c.size);
    for (int i = 0; i < c.stages; ++i) {
        const int r = c.radix[i], m = len / r;
        const Planes<T> to = m == 1 ? x : w;
        switch (r) {
            case 2: stage_of<2>(x, to, m, s, c.twiddle[i]); break;
            case 3: stage_of<3>(x, to, m, s, c.twiddle[i]); break;
            case 4: stage_of<4>(x, to, m, s, c.twiddle[i]); break;
            case 5: stage_of<5>(x, to, m, s, c.twiddle[i]); break;
            case 7: stage_of<7>(x, to, m, s, c.twiddle[i]); break;
            case 8: stage_of<8>(x, to, m, s, c.twiddle[i]); break;
            default: prime_stage_of(x, to, m, s, r, c.roots[i], c.twiddle[i]);
        }
        if (m > 1) {
            w = x;
            x = to;
        }
        s *= r;
        len = m;
    }
}

// Every row of z, of any size, as transform_row (fft_core.h).
template <class T, class Shape, class Block>
MMFAST_INLINE void Tile<T, Shape, Block>::general_rows() {
    const int64_t other = 2 * at.plane;
    Planes<T> w = z.re == memory + at.z ? Planes<T>{z.re + other, z.im + other} : Planes<T>{z.re - other, z.im - other};
    const ComplexPlan<T>& row_plan = job.plan.fft.row;
    if (!row_plan.inner) {
        stages(row_plan, z, w);
        return;
    }
    const int F = shape.frames(), stride = shape.stride(), size = int(row_plan.size), inner = int(row_plan.inner);
    const T *const chirp = row_plan.chirp, *const spectrum = row_plan.chirp_spectrum;
    Planes<T> y = z;
    block.each(shape.rows() * inner * F, [&](int i) {
        const int j = i / F % inner, k = (i / (F * inner) * stride + j) * F + i % F;
        T re = 0, im = 0;
        if (j < size) {
            re = y.re[k];
            im = y.im[k];
            twist(re, im, chirp[2 * j], chirp[2 * j + 1]);
        }
        y.re[k] = re;
        y.im[k] = im;
    });
    stages(job.plan.convolution, y, w);
    block.each(shape.rows() * inner * F, [&](int i) {
        const int j = i / F % inner, k = (i / (F * inner) * stride + j) * F + i % F;
        const T re = y.re[k], im = y.im[k], c = spectrum[2 * j], d = spectrum[2 * j + 1];
        y.re[k] = re * d + im * c;  // swapped: the inverse transform
        y.im[k] = re * c - im * d;
    });
    stages(job.plan.convolution, y, w);
    block.each(shape.rows() * size * F, [&](int i) {
        const int j = i / F % size, k = (i / (F * size) * stride + j) * F + i % F;
        T re = y.im[k], im = y.re[k];
        twist(re, im, chirp[2 * j], chirp[2 * j + 1]);
        y.re[k] = re;
        y.im[k] = im;
    });
    z = y;
}

// Samples to power; with kKeep the spectrum stays in z.
template <class T, class Shape, class Block>
template <bool kKeep>
MMFAST_INLINE void Tile<T, Shape, Block>::analyse() {
    const MelParams<T>& p = job.p;
    stage();
    if (p.conditions()) condition();
    const int F = shape.frames(), bins = int(job.bins());
    T* const out = power();
    if constexpr (Shape::tuned) {
        p.conditions() ? tuned_columns<true>() : tuned_columns<false>();
        tuned_rows<kKeep>();
    } else {
        switch (shape.radix()) {
            case 16: columns<16>(); break;
            case 8: columns<8>(); break;
            case 5: columns<5>(); break;
            case 4: columns<4>(); break;
            case 3: columns<3>(); break;
            case 2: columns<2>(); break;
            default: columns<1>();
        }
        general_rows();
        block.each((bins + 1) * F, [&](int i) {
            if (i >= bins * F) {  // read with the weight 0
                out[i] = 0;
                return;
            }
            const int k = place_of(i / F) * F + i % F;
            const T square = z.re[k] * z.re[k] + z.im[k] * z.im[k];
            out[i] = square;
            if (square * T(0) != 0) spoil(i % F);
        });
    }
    if (p.power == 2 && p.power_offset == 0) return;
    block.each(bins * F, [&](int i) {
        const T raised = raise_power(p, out[i]);
        out[i] = raised;
        if (raised * T(0) != 0) spoil(i % F);
    });
}

}  // namespace mel
}  // namespace mmfast
