// Of the tile kernels: the adjoint steps, in the order in which gradients meet them. mel_tile.cpp, the only file that includes
// this, puts them together.
#pragma once

#include "mel/mel_tile_scratch.h"

namespace mmfast {
namespace mel {
namespace MMFAST_ISA {
namespace {

template <class T>
void load_gradient(const GradientTile<T>& t, int64_t count, Vec<T>* g) {
    constexpr int N = Simd<T>::lanes;
    const FrameTile<T>& in = t.in;
    if (in.frame_stride == 1) {
        for (int64_t c = 0; c < count; ++c) g[c] = Simd<T>::load(t.grad + c * in.feature_stride, in.frames);
        return;
    }
    for (int64_t c = 0; c < count; c += N) {
        const int n = count - c < N ? int(count - c) : N;
        Vec<T> rows[N];
        for (int f = 0; f < N; ++f)
            rows[f] = f < in.frames ? Simd<T>::load(t.grad + f * in.frame_stride + c, n) : Vec<T>{};
        Simd<T>::transpose(rows);
        for (int i = 0; i < n; ++i) g[c + i] = rows[i];
    }
}

// g[i] = output_scale times the sum over j of c[j] dct[i][j], of kBlock bands from the first on, whose sums do not wait for each
// other; of a mirrored DCT also those of the bands as far from the other end.
template <class T, int kBlock>
MMFAST_INLINE void cepstra_adjoint_block(const MelParams<T>& p, const Vec<T>* c, int64_t first, Vec<T>* g) {
    const T* const dct = p.dct + first * p.cepstra;
    Vec<T> even[kBlock] = {}, odd[kBlock] = {};
    int64_t j = 0;
    for (; j + 1 < p.cepstra; j += 2)
        for (int b = 0; b < kBlock; ++b) {
            even[b] += c[j] * dct[b * p.cepstra + j];
            odd[b] += c[j + 1] * dct[b * p.cepstra + j + 1];
        }
    for (int b = 0; b < kBlock && j < p.cepstra; ++b) even[b] += c[j] * dct[b * p.cepstra + j];
    for (int b = 0; b < kBlock; ++b) {
        if (p.dct_mirrored) g[p.bands() - 1 - first - b] = (even[b] - odd[b]) * p.output_scale;
        g[first + b] = (even[b] + odd[b]) * p.output_scale;
    }
}

template <class T>
void cepstra_adjoint(const MelParams<T>& p, const Vec<T>* c, Vec<T>* g) {
    const int64_t rows = p.dct_mirrored ? (p.bands() + 1) / 2 : p.bands();
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) cepstra_adjoint_block<T, 4>(p, c, i, g);
    for (; i < rows; ++i) cepstra_adjoint_block<T, 1>(p, c, i, g);
}

// Gradient of v to gradient of m, in place: range, then logarithm.
template <class T>
void compress_adjoint(const MelParams<T>& p, GradientTile<T>& t, const Vec<T>* v, const Vec<T>* m, Vec<T>* g) {
    using S = Simd<T>;
    using V = Vec<T>;
    if (t.share_only) {
        for (int64_t i = 0; i < p.bands(); ++i) g[i] = v[i] == t.maximum ? S::splat(t.share) : V{};
    } else if (t.in.clip) {
        const T threshold = t.in.threshold;
        V raised{};
        typename S::I hits{};
        for (int64_t i = 0; i < p.bands(); ++i) {
            const V kept = v[i] > threshold ? g[i] : v[i] == threshold ? g[i] * T(0.5) : V{};
            raised += g[i] - kept;
            hits -= v[i] == t.maximum;
            g[i] = kept;
        }
        t.raised = 0;
        t.hits = 0;
        for (int i = 0; i < t.in.frames; ++i) {
            t.raised += raised[i];
            t.hits += hits[i];
        }
    }
    if (!p.log) return;
    for (int64_t i = 0; i < p.bands(); ++i) {
        const V y = m[i] + p.log_offset;
        const V d = g[i] * p.log_scale / y;
        g[i] = m[i] < p.log_floor || y == T(0) ? V{} : d;
    }
}

// filters[i][k] += sum over frames of g[i] raised[k], the frames brought side by side first.
template <class T>
void filter_gradient(const MelParams<T>& p, const GradientTile<T>& t, const Vec<T>* raised, const Vec<T>* g, T* rows) {
    constexpr int N = Simd<T>::lanes;
    const int64_t bins = p.bins(), padded = (bins + 15) / 16 * 16;
    for (int64_t k = 0; k < padded; k += N) {
        Vec<T> block[N];
        for (int i = 0; i < N; ++i) block[i] = k + i < bins ? raised[k + i] : Vec<T>{};
        Simd<T>::transpose(block);
        for (int f = 0; f < N; ++f) Simd<T>::store(rows + f * padded + k, block[f]);
    }
    for (int64_t i = 0; i < p.bands(); ++i) {
        alignas(64) T weight[N];
        Simd<T>::store(weight, g[i]);
        T* const out = t.filters + i * padded;
        for (int64_t k = 0; k < padded; k += N) {
            Vec<T> sum = Simd<T>::load(out + k);
            for (int f = 0; f < t.in.frames; ++f) sum += Simd<T>::load(rows + f * padded + k) * weight[f];
            Simd<T>::store(out + k, sum);
        }
    }
}

// Gradient of m to the factor h[k] of each bin of the two-sided spectrum: 2 dP/d|X|^2 gP, halved where a bin counts twice.
template <class T>
void filter_adjoint(const MelParams<T>& p, const Vec<T>* power, const Vec<T>* g, Vec<T>* h) {
    using V = Vec<T>;
    const Filters<T>& f = p.filters;
    const int64_t n = p.fft.n;
    for (int64_t k = 0; k < p.bins(); ++k) {
        V sum{};
        if (f.rows) {
            for (int64_t j = f.bin_offset[k]; j < f.bin_offset[k + 1]; ++j) sum += g[f.bin_filter[j]] * f.bin_weight[j];
        } else {
            sum = g[k];
        }
        const T ends = k == 0 || 2 * k == n ? T(2) : T(1);
        if (p.power == 2) {
            h[k] = sum * ends;
            continue;
        }
        const V s = power[k] + p.power_offset;
        const V d = p.power == 1 ? T(0.5) / Simd<T>::sqrt(s) : mmfast::power(s, p.power / 2 - 1) * (p.power / 2);
        h[k] = s == T(0) ? V{} : sum * d * ends;
    }
}

// Gradient of the windowed frames (times the window, in d) to gradient of the samples, in place.
template <class T>
void condition_adjoint(const MelParams<T>& p, const Workspace<T>& s, Vec<T> energy_sum, Vec<T> energy_grad, Vec<T>* d) {
    using V = Vec<T>;
    const int64_t length = p.framing.window;
    V factor{};
    if (p.energy != Energy::none) {
        auto off = energy_sum < energy_epsilon<T>();
        if (p.has_energy_floor) off |= log(energy_sum) < p.log_energy_floor;
        factor = off ? V{} : energy_grad * T(2) / energy_sum;
        if (!p.raw_energy)
            for (int64_t n = 0; n < length; ++n) d[n] += s.raw[n] * (p.energy_window[n] * p.energy_window[n]) * factor;
    }
    if (p.preemphasis != 0) {
        const V first = d[0] * p.preemphasis;  // sample 0 is its own predecessor
        for (int64_t n = 0; n + 1 < length; ++n) d[n] -= d[n + 1] * p.preemphasis;
        d[0] -= first;
    }
    if (p.energy != Energy::none && p.raw_energy)
        for (int64_t n = 0; n < length; ++n) d[n] += s.raw[n] * factor;
    if (p.remove_dc) {
        V sum{};
        for (int64_t n = 0; n < length; ++n) sum += d[n];
        sum = sum / T(length);
        for (int64_t n = 0; n < length; ++n) d[n] -= sum;
    }
    if (p.input_scale != 1)
        for (int64_t n = 0; n < length; ++n) d[n] = d[n] * p.input_scale;
}

// Adds the frames in d to their places in the signal, a run of samples at a time.
template <class T>
void overlap_add(const MelParams<T>& p, const GradientTile<T>& t, const Vec<T>* d) {
    constexpr int N = Simd<T>::lanes;
    const int64_t length = p.framing.window;
    for (int64_t n = 0; n < length; n += N) {
        const int count = length - n < N ? int(length - n) : N;
        Vec<T> rows[N];
        for (int i = 0; i < N; ++i) rows[i] = i < count ? d[n + i] : Vec<T>{};
        Simd<T>::transpose(rows);
        for (int f = 0; f < t.in.frames; ++f) {
            T* const to = t.samples + f * p.framing.hop + n;
            Simd<T>::store(to, Simd<T>::load(to, count) + rows[f], count);
        }
    }
}

}  // namespace
}  // namespace MMFAST_ISA
}  // namespace mel
}  // namespace mmfast
