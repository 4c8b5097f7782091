// Of the tile kernels (mel_tile.cpp): where their arrays lie, cache lines asked for ahead, and what both directions use.
#pragma once

#include "common/simd.h"
#include "mel/mel.h"
#include "mel/mel_core.h"

namespace mmfast {
namespace mel {
namespace MMFAST_ISA {
namespace {

template <class T>
using Vec = typename Simd<T>::V;

constexpr int64_t kEnergyFloorExponent = -23;  // Kaldi: the float32 epsilon

template <class T>
MMFAST_INLINE T energy_epsilon() {
    return T(1.0 / double(int64_t(1) << -kEnergyFloorExponent));
}

// Scratch cut into arrays, each aligned to a cache line.
struct Arena {
    char* at;
    template <class X>
    MMFAST_INLINE X* take(int64_t n) {
        X* p = reinterpret_cast<X*>(at);
        at += (n * int64_t(sizeof(X)) + 63) / 64 * 64;
        return p;
    }
};

template <class T>
struct Workspace {
    using V = Vec<T>;
    V *x, *y, *raw, *power, *raised, *v, *m, *g, *features;
    T* rows;
    Complex<V>*z, *w;
    int64_t stride, row_stride;

    MMFAST_INLINE Workspace(const MelParams<T>& p, void* scratch, bool backward) {
        Arena a{static_cast<char*>(scratch)};
        stride = p.fft.columns | 1;  // rows a power of two apart would share the sets of the cache
        const bool apart = p.fft.columns % 64 == 0;
        row_stride = p.fft.columns + apart;
        x = a.take<V>(apart ? p.framing.window : (p.fft.radix + 1) * row_stride);
        y = apart ? a.take<V>((p.fft.radix + 1) * row_stride) : x;
        w = a.take<Complex<V>>(row_scratch(p.fft.row));
        power = a.take<V>(p.bins());
        v = a.take<V>(p.bands());
        features = a.take<V>((p.cepstra > p.bands() ? p.cepstra : p.bands()) + 1);
        raised = m = g = raw = nullptr;
        rows = nullptr;
        z = nullptr;
        if (backward) {
            z = a.take<Complex<V>>((p.fft.radix / 2 + 1) * stride);
            raw = a.take<V>(p.framing.window);
            raised = a.take<V>(p.bins());
            m = a.take<V>(p.bands());
            g = a.take<V>(p.bands());
            rows = a.take<T>(Simd<T>::lanes * ((p.bins() + 15) / 16 * 16));
        }
        end = a.at;
    }
    char* end;
};

template <class T, bool kBackward>
int64_t scratch_bytes(const MelParams<T>& p) {
    return reinterpret_cast<intptr_t>(Workspace<T>(p, nullptr, kBackward).end);
}

// Whether the frame of each lane follows that of the lane before, so that most of its samples are known.
template <class T>
MMFAST_INLINE bool consecutive(const FrameTile<T>& t) {
    return t.frames == Simd<T>::lanes && t.rows == 1;
}

// Cache lines that will be wanted, asked for a few at a time while a tile is computed, since a core waits for a dozen at
// most: samples during the transform, output during the logarithm. There are too many streams (a row
// of samples in each lane, a row of features in each band) for the hardware to see.
struct Prefetch {
    const char *samples = nullptr, *samples_end = nullptr;
    const char* out = nullptr;
    int64_t out_rows = 0, out_row = 0, out_stride = 0, out_bytes = 0, out_from = 0, lines_a_step = 0, rows_a_step = 0;

    template <class T>
    static MMFAST_INLINE Prefetch of(const FrameTile<T>& t, int64_t features) {
        Prefetch f;
        f.samples = reinterpret_cast<const char*>(t.next);
        f.samples_end = reinterpret_cast<const char*>(t.next_end);
        const bool by_frame = t.frame_stride != 1;
        // That of the next tile: asked for and wanted in the same tile, it comes late.
        f.out = reinterpret_cast<const char*>(t.next_out);
        f.out_rows = !t.next_out ? 0 : by_frame ? Simd<T>::lanes : features;
        f.out_stride = (by_frame ? t.frame_stride : t.feature_stride) * int64_t(sizeof(T));
        f.out_bytes = (by_frame ? features : Simd<T>::lanes) * int64_t(sizeof(T));
        // Of a short row only the last line: the one before has been the last of the tile before.
        f.out_from = f.out_bytes <= 64 && !t.next_out_begins ? 63 : 0;
        return f;
    }
    // The number of steps that the samples, or the output, are asked for in. Once and in 32 bits: a division by a number of
    // 64 takes as long as a butterfly.
    MMFAST_INLINE void share_samples(int64_t steps) {
        lines_a_step = (uint32_t((samples_end - samples + 63) / 64) + uint32_t(steps) - 1) / uint32_t(steps);
    }
    MMFAST_INLINE void share_out(int64_t steps) {
        rows_a_step = (uint32_t(out_rows) + uint32_t(steps) - 1) / uint32_t(steps);
    }
    MMFAST_INLINE void step_samples() {
        for (int64_t i = 0; i < lines_a_step && samples < samples_end; ++i, samples += 64)
            __builtin_prefetch(samples, 0, 2);
    }
    MMFAST_INLINE void step_out() {
        for (int64_t i = 0; i < rows_a_step && out_row < out_rows; ++i, ++out_row) {
            const char* const row = out + out_row * out_stride;
            for (int64_t b = out_from; b < out_bytes + 63; b += 64)
                __builtin_prefetch(row + (b < out_bytes ? b : out_bytes - 1), 1, 3);
        }
    }
};

}  // namespace
}  // namespace MMFAST_ISA
}  // namespace mel
}  // namespace mmfast
