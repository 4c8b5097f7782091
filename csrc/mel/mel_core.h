// Scalar mathematics of the mel slice and the plain structures that its kernels take: no torch, no CUDA headers.
#pragma once

#include <cstdint>

#include "mel/fft_core.h"

namespace mmfast {

enum class PadMode : int { reflect, constant, replicate, circular, mirror };
enum class Energy : int { none, prepend, append, replace_first, replace_last };

// Where the frames of a waveform of `length` samples lie (MelConfig.first_sample, count_offset, min_length).
struct Framing {
    int64_t window, hop, first, count_offset, min_length, pad;
    PadMode mode;

    MMFAST_INLINE int64_t count(int64_t length) const {
        const int64_t a = length + count_offset;
        return length < min_length || a < 0 ? 0 : a / hop;
    }

    // Sample that position q (0 is the first of the signal) reads, or -1 for zero: first `pad` zeros are put on both
    // sides, then the result is extended by `mode`.
    MMFAST_INLINE int64_t source(int64_t q, int64_t length) const {
        if (q >= 0 && q < length) return q;
        const int64_t padded = length + 2 * pad;
        q += pad;
        if (q < 0 || q >= padded) {
            if (padded == 0 || mode == PadMode::constant) return -1;
            if (mode == PadMode::replicate) {
                q = q < 0 ? 0 : padded - 1;
            } else if (mode == PadMode::circular) {
                q %= padded;
                if (q < 0) q += padded;
            } else {
                const int64_t edge = mode == PadMode::mirror;  // 1: the edge is repeated
                // One reflection is the rule; signals shorter than the padding take the remainder.
                q = q < 0 ? -q - edge : 2 * (padded - 1) + edge - q;
                if (q < 0 || q >= padded) {
                    const int64_t period = 2 * (padded - 1 + edge);
                    q = period ? q % period : 0;
                    if (q < 0) q += period;
                    if (q >= padded) q = period - edge - q;
                }
            }
        }
        q -= pad;
        return q >= 0 && q < length ? q : -1;
    }

    // f(q) for every position q in [begin, end) that reads sample t: source(q, length) == t. In a fixed order.
    template <class F>
    MMFAST_INLINE void for_each_reader(int64_t t, int64_t length, int64_t begin, int64_t end, const F& f) const {
        if (t >= begin && t < end) f(t);
        const int64_t left = begin < 0 ? -begin : 0, right = end > length ? end - length : 0;
        const int64_t reach = left > right ? left : right;
        if (mode == PadMode::constant || reach == 0 || (t > reach && t < length - 1 - reach)) return;
        const int64_t padded = length + 2 * pad, u = t + pad, low = begin + pad, high = end + pad;
        const auto outside = [&](int64_t v, int64_t period) {  // every period-th position outside the padded signal
            if (v < low) v += (low - v + period - 1) / period * period;
            else v -= (v - low) / period * period;
            for (; v < high; v += period)
                if (v < 0 || v >= padded) f(v - pad);
        };
        if (mode == PadMode::circular) {
            outside(u, padded);
            return;
        }
        const int64_t edge = mode == PadMode::mirror, period = 2 * (padded - 1 + edge);
        if (mode == PadMode::replicate || period == 0) {
            for (int64_t v = low; u == 0 && v < high && v < 0; ++v) f(v - pad);
            for (int64_t v = low > padded ? low : padded; u == padded - 1 && v < high; ++v) f(v - pad);
            return;
        }
        outside(u, period);
        const int64_t other = period - edge - u;
        if (other >= padded && other < period) outside(other, period);
    }
};

// 32-bit mixer (two multiply-xorshift rounds); U is uint32_t or a vector of it.
template <class U>
MMFAST_INLINE U mix32(U x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    x ^= x >> 16;
    return x;
}

// A row of filters: 8 times its first bin and its number, so that an address takes one addition.
struct FilterRow {
    uint32_t first8, row8;
};

// Filters by row (each its weights from the first non-zero one to the last) and, for the adjoint, by bin.
template <class T>
struct Filters {
    int64_t rows = 0;
    const int32_t* count = nullptr;  // [rows]: weights of each
    // Those with few weights first: order[short_end[c - 1]] to order[short_end[c]] have c of them; and their weights in this order.
    static constexpr int kShort = 12;
    const FilterRow* order = nullptr;    // [rows]
    const int32_t* short_end = nullptr;  // [kShort + 1]
    const T* weights = nullptr;
    int64_t covered = 0, covered_end = 0;  // a run of bins of which each is in some row
    const int64_t* bin_offset = nullptr;   // [bins + 1] into bin_filter, bin_weight
    const int32_t* bin_filter = nullptr;
    const T* bin_weight = nullptr;
};

// One configured front end, in the form the kernels read (MelConfig gives the formulas).
template <class T>
struct MelParams {
    RealPlan<T> fft;
    Framing framing;
    const T* window = nullptr;         // [framing.window], normalisation included
    const T* energy_window = nullptr;  // the same without: the energy is of the frame, not of the spectrum
    T input_scale = 1, preemphasis = 0, dither = 0, log_energy_floor = 0;
    uint32_t seed = 0;
    bool remove_dc = false, raw_energy = true, has_energy_floor = false;
    Energy energy = Energy::none;
    T power = 2, power_offset = 0;
    Filters<T> filters;  // rows = 0: the bare spectrum
    bool log = false, has_top_db = false;
    T log_floor = 0, log_offset = 0, log_shift = 0;
    T log_scale = 1,
      log_scale_low = 0;  // v = log_scale ln(max(m, floor) + offset) + log_shift, the scale in two positive parts
    T top_db = 0;
    T output_offset = 0, output_scale = 1;
    int64_t cepstra = 0;        // 0: no DCT
    const T* dct = nullptr;     // [bands][cepstra]
    bool dct_mirrored = false;  // row bands - 1 - i is row i with the odd columns negated
    bool time_major = false;    // features of a frame stand together

    MMFAST_INLINE int64_t bins() const { return fft.n / 2 + 1; }
    MMFAST_INLINE int64_t bands() const { return filters.rows ? filters.rows : bins(); }
    // A filter without weights gives the same v in every frame. With a DCT and top_db it is left out of the first round and
    // of FrameTile.lowest, for it lies below nearly every threshold; mel_cpu.cpp adds its part.
    MMFAST_INLINE bool constant_band(int64_t i) const { return cepstra && filters.rows && filters.count[i] == 0; }
    // So many, the first of filters.order. On the CPU.
    MMFAST_INLINE int64_t constant_bands() const { return cepstra && filters.rows ? filters.short_end[0] : 0; }
    // Whether samples change between the waveform and the window.
    MMFAST_INLINE bool conditions() const {
        return input_scale != 1 || dither != 0 || remove_dc || preemphasis != 0 || energy != Energy::none;
    }
};

// Up to `lanes` frames: consecutive ones of one waveform or, of each of `rows` waveforms, as many from the same one on.
template <class T>
struct FrameTile {
    const T* lane[16];         // [framing.window] samples each; lanes past `frames` repeat a valid one
    const T *next, *next_end;  // samples that will be wanted soon, to be fetched meanwhile; may be null
    int frames, rows;          // `rows` divides `frames`
    int64_t row, frame;        // of lane 0, for the dither
    bool clip;                 // raise values to `threshold` (or, where that is NaN, everything to NaN)
    T threshold;
    // [Two rounds] of mel_two_rounds.h. In the first, a tile with a v below `guess` either stops there, v saved at `kept`, or, where
    // that is null, goes on with `guess` as its threshold; `deferred` or `guessed` is written. In the second, with `resume`,
    // v comes from `kept`.
    bool first_round, resume, deferred, guessed;
    T guess;
    T* kept;
    T* out;  // feature c of frame f of waveform r at out[c * feature_stride + f * frame_stride + r * row_stride]
    int64_t feature_stride, frame_stride, row_stride;
    const T* next_out;     // where features of the next tile go, to be fetched meanwhile; may be null
    bool next_out_begins;  // there: nothing before them has been fetched either
    T lowest, highest;     // written: extrema of v over the tile; NaN where any v is
};

template <class T>
struct GradientTile {
    FrameTile<T> in;  // out is not used
    const T* grad;    // laid out as FrameTile::out
    T* samples;       // [(frames - 1) * hop + window]: the gradient of the samples is added here; null: not wanted
    T* filters;       // [rows][bins rounded up to 16], added to; null: not wanted
    T maximum;        // of v over the group, with clip
    // Gradient of the raised values goes to the maximum. First pass (share_only false): `raised` and `hits` are written.
    // Second pass (share_only true): only `share` counts, given to every v equal to `maximum`.
    bool share_only;
    T share;
    T raised;
    int64_t hits;
};

// The kernels of one instruction set.
template <class T>
struct MelKernels {
    int lanes;
    int64_t (*forward_scratch)(const MelParams<T>&);  // bytes, aligned to 64
    int64_t (*backward_scratch)(const MelParams<T>&);
    void (*forward)(const MelParams<T>&, FrameTile<T>&, void* scratch);
    void (*backward)(const MelParams<T>&, GradientTile<T>&, void* scratch);
};

}  // namespace mmfast
