// Of the tile kernels (mel_tile.cpp): 400 points as 20 x 20, the rows in place of the samples as [Rows in place] says. What other
// sizes read from a plan the compiler knows here, and an address is a constant away from the next.
#pragma once

#include "mel/fft_twenty.h"
#include "mel/mel_tile_scratch.h"

namespace mmfast {
namespace mel {
namespace MMFAST_ISA {
namespace {

template <class T>
MMFAST_INLINE bool by_twenty(const MelParams<T>& p) {
    return p.fft.radix == 20 && p.fft.columns == 20;
}

// Whether the samples after the first `hop` need not be in x, since columns_of_twenty has them in registers.
template <class T>
MMFAST_INLINE bool shifts_in_columns(const MelParams<T>& p, const FrameTile<T>& t) {
    const int64_t hop = p.framing.hop;
    return by_twenty(p) && p.framing.window == 400 && (hop == 160 || hop == 200) && consecutive(t) && !p.conditions();
}

// Columns of 400 samples. Those from 20 kFresh on are not read from x: with kFresh = hop / 20 sample n of a frame is sample
// n - hop of the next frame, which stands one lane further and kFresh points up the same column; `last` are the samples of
// the last lane.
template <class T, int kFresh>
__attribute__((noinline)) void columns_of_twenty(Vec<T>* x, const T* last, const T* window, const T* twiddle,
                                                 Prefetch& prefetch) {
    using V = Vec<T>;
    for (int s = 0; s < 20; ++s, ++x, ++last, ++window, twiddle += 20) {
        prefetch.step_samples();
        V v[20], re[11], im[11];
        MMFAST_UNROLL
        for (int r = 0; r < 20; ++r)
            v[r] = r < kFresh ? x[20 * r] : Simd<T>::shift_in(v[r < kFresh ? 0 : r - kFresh], last[20 * r]);
        MMFAST_UNROLL
        for (int r = 0; r < 20; ++r) v[r] = v[r] * window[20 * r];
        RealDft<20, T, V>::run(v, re, im);
        x[0] = re[0];
        MMFAST_UNROLL
        for (int k = 1; k <= 10; ++k) {
            twist(re[k], im[k], twiddle[2 * k - 2], twiddle[2 * k - 1]);
            x[20 * (2 * k - 1)] = re[k];
            x[20 * (2 * k)] = im[k];
        }
    }
}

template <class T>
MMFAST_INLINE void columns_of_twenty(const MelParams<T>& p, const FrameTile<T>& t, Vec<T>* x, Prefetch& prefetch) {
    prefetch.share_samples(31);
    const T* const last = t.lane[Simd<T>::lanes - 1];
    if (!shifts_in_columns(p, t)) columns_of_twenty<T, 20>(x, last, p.window, p.fft.twiddle, prefetch);
    else if (p.framing.hop == 160) columns_of_twenty<T, 8>(x, last, p.window, p.fft.twiddle, prefetch);
    else columns_of_twenty<T, 10>(x, last, p.window, p.fft.twiddle, prefetch);
}

// Squared magnitudes of row k1 > 0; with kKeep its spectrum too. The second half of row 10 is its first in reverse.
template <class T, bool kKeep, bool kMiddle>
__attribute__((noinline)) void row_of_twenty(const Vec<T>* re, int64_t k1, Vec<T>* power, Complex<Vec<T>>* row) {
    using V = Vec<T>;
    V *const up = power + k1, *const down = power + 400 - k1;
    dft_twenty<T, V>([=](int n, V& a, V& b) { a = re[n], b = re[20 + n]; },
                     [=](int k2, V a, V b) {
                         if (!kMiddle || k2 < 10) (k2 < 10 ? up + 20 * k2 : down - 20 * k2)[0] = a * a + b * b;
                         if (kKeep) row[k2] = {a, b};
                     });
}

// Row 0, of a real column.
template <class T, bool kKeep>
__attribute__((noinline)) void first_of_twenty(const Vec<T>* x, Vec<T>* power, Complex<Vec<T>>* row) {
    Vec<T> re[11], im[11];
    RealDft<20, T, Vec<T>>::run(x, re, im);
    MMFAST_UNROLL
    for (int k = 0; k < 11; ++k) {
        power[20 * k] = re[k] * re[k] + im[k] * im[k];
        if (kKeep) row[k] = {re[k], im[k]};
        if (kKeep && k % 10) row[20 - k] = {re[k], -im[k]};
    }
}

template <class T, bool kKeep>
MMFAST_INLINE void rows_of_twenty(const Workspace<T>& s, Prefetch& prefetch) {
    for (int64_t k1 = 0; k1 <= 10; ++k1) {
        prefetch.step_samples();
        Complex<Vec<T>>* const row = kKeep ? s.z + k1 * s.stride : nullptr;
        if (k1 == 10) row_of_twenty<T, kKeep, true>(s.y + (2 * k1 - 1) * 20, k1, s.power, row);
        else if (k1) row_of_twenty<T, kKeep, false>(s.y + (2 * k1 - 1) * 20, k1, s.power, row);
        else first_of_twenty<T, kKeep>(s.y, s.power, row);
    }
}

}  // namespace
}  // namespace MMFAST_ISA
}  // namespace mel
}  // namespace mmfast
