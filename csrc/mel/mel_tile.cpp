// The kernels of the mel slice: a tile of frames, one frame in each lane of the vector unit. Compiled once per instruction
// set (common/isa.h), so it includes no torch header and no part of the standard library that has code.
//
// Note: [Frames in lanes]
//   samples  -- transposed as they are loaded: x[n] holds sample n of every frame -->  x   [window]
//   x        -- window, real four-step transform (fft_core.h), columns in place -->  x   [R + 1][S], then power [bins]
//   power    -- sparse filters ------------------------------------------------->  v   [bands]
//   v        -- log, range, affine, DCT ---------------------------------------->  features
//   Weights, twiddles and filters are scalars, broadcast by the load that feeds the multiply; no step moves data between
//   lanes except the first and, for features stored frame by frame, the last. At 400 / 160 / 80 the working set is 53 KB
//   and the transform of 16 frames takes 5500 vector operations, the rest half as many; two can issue in every cycle.
#include "mel/mel_core.h"

#include "common/simd.h"
#include "mel/mel.h"
#include "mel/mel_tile_adjoint.h"
#include "mel/mel_tile_scratch.h"
#include "mel/mel_tile_twenty.h"

namespace mmfast {
namespace mel {
namespace MMFAST_ISA {
namespace {

// x[n] = sample n of each lane. Where the frames overlap only the first `hop` samples are transposed: sample n of frame f
// is sample n - hop of frame f + 1, so the rest moves down by one lane and takes one new value.
template <class T>
void load_frames(const MelParams<T>& p, const FrameTile<T>& t, Vec<T>* x) {
    constexpr int N = Simd<T>::lanes;
    const int64_t length = p.framing.window, hop = p.framing.hop;
    const bool overlap = consecutive(t) && hop < length;
    const int64_t fresh = overlap ? hop : length;
    int64_t n = 0;
    for (; n + N <= fresh; n += N) Simd<T>::load_transposed(t.lane, n, x + n);
    if (n < fresh) {
        const int count = int(fresh - n);
        Vec<T> rows[N];
        for (int i = 0; i < N; ++i) rows[i] = Simd<T>::load(t.lane[i] + n, count);
        Simd<T>::transpose(rows);
        for (int i = 0; i < count; ++i) x[n + i] = rows[i];
    }
    if (shifts_in_columns(p, t)) return;
    const T* const last = t.lane[N - 1];
    for (n = fresh; n < length; ++n) x[n] = Simd<T>::shift_in(x[n - hop], last[n]);
}

// The reference's dither_noise: two hashes of (seed, row, frame, sample) and the cosine branch of Box-Muller.
template <class T>
void add_dither(const MelParams<T>& p, const FrameTile<T>& t, Vec<T>* x) {
    uint32_t key[16];
    const uint32_t row = mix32(mix32(p.seed) + uint32_t(t.row));
    for (int i = 0; i < Simd<T>::lanes; ++i) key[i] = mix32(row + uint32_t(t.frame + i));
    for (int64_t n = 0; n < p.framing.window; ++n) {
        for (int i = 0; i < Simd<T>::lanes; ++i) {
            const uint32_t a = mix32(key[i] + 2 * uint32_t(n)), b = mix32(key[i] + 2 * uint32_t(n) + 1);
            const double u = double((a >> 8) + 1) * 0x1p-24, w = double(b >> 8) * 0x1p-24;
            x[n][i] += p.dither * T(__builtin_sqrt(-2 * __builtin_log(u)) * __builtin_cos(kTwoPi * w));
        }
    }
}

template <class T>
MMFAST_INLINE Vec<T> log_energy(const MelParams<T>& p, Vec<T> sum) {
    const T least = energy_epsilon<T>();
    Vec<T> e = log(sum < least ? Simd<T>::splat(least) : sum);
    if (p.has_energy_floor) e = e < p.log_energy_floor ? Simd<T>::splat(p.log_energy_floor) : e;
    return e;
}

// Everything between the samples and the window; `raw`, if not null, keeps the samples that the energy is of.
template <class T>
void condition(const MelParams<T>& p, const FrameTile<T>& t, Vec<T>* x, Vec<T>* raw, Vec<T>* energy_sum) {
    using V = Vec<T>;
    const int64_t length = p.framing.window;
    if (p.input_scale != 1)
        for (int64_t n = 0; n < length; ++n) x[n] = x[n] * p.input_scale;
    if (p.dither != 0) add_dither(p, t, x);
    if (p.remove_dc) {
        V s0{}, s1{}, s2{}, s3{};
        int64_t n = 0;
        for (; n + 4 <= length; n += 4) {
            s0 += x[n];
            s1 += x[n + 1];
            s2 += x[n + 2];
            s3 += x[n + 3];
        }
        for (; n < length; ++n) s0 += x[n];
        const V mean = ((s0 + s1) + (s2 + s3)) / T(length);
        for (n = 0; n < length; ++n) x[n] -= mean;
    }
    const bool want_energy = p.energy != Energy::none;
    V sum{};
    if (want_energy && p.raw_energy) {
        V other{};
        int64_t n = 0;
        for (; n + 2 <= length; n += 2) {
            sum += x[n] * x[n];
            other += x[n + 1] * x[n + 1];
        }
        if (n < length) sum += x[n] * x[n];
        sum += other;
        if (raw)
            for (n = 0; n < length; ++n) raw[n] = x[n];
    }
    if (p.preemphasis != 0) {
        for (int64_t n = length - 1; n > 0; --n) x[n] -= x[n - 1] * p.preemphasis;
        x[0] -= x[0] * p.preemphasis;
    }
    if (want_energy && !p.raw_energy) {
        for (int64_t n = 0; n < length; ++n) {
            const V y = x[n] * p.energy_window[n];
            sum += y * y;
            if (raw) raw[n] = x[n];
        }
    }
    *energy_sum = sum;
}

template <class T, int R>
void columns(const MelParams<T>& p, const Workspace<T>& w) {
    using V = Vec<T>;
    const T* const window = p.window;
    const int64_t stride = w.row_stride;
    const V* const x = w.x;
    V* const y = w.y;
    real_columns<R, T, V>(
        p.fft, p.framing.window, [=](int64_t n) { return x[n] * window[n]; },
        [=](int64_t k, int64_t s, V re, V im) {
            y[(k ? 2 * k - 1 : 0) * stride + s] = re;
            if (k) y[2 * k * stride + s] = im;
        });
}

template <class T, int R>
void columns_adjoint(const MelParams<T>& p, const Complex<Vec<T>>* z, int64_t stride, Vec<T>* x) {
    const T* window = p.window;
    real_columns_adjoint<R, T, Vec<T>>(p.fft, p.framing.window, z, stride,
                                       [=](int64_t n, Vec<T> value) { x[n] = value * window[n]; });
}

#define MMFAST_FOR_RADIX(radix, call) \
    switch (radix) {                  \
        case 20: call(20); break;     \
        case 16: call(16); break;     \
        case 8: call(8); break;       \
        case 5: call(5); break;       \
        case 4: call(4); break;       \
        case 3: call(3); break;       \
        case 2: call(2); break;       \
        default: call(1);             \
    }

// Squared magnitudes of the frames in x, which are destroyed; with kKeep the spectrum is kept in z, bin k1 + R k2 at
// z[k1 * stride + k2].
//
// Note: [Rows in place]
//   The rows of the transform take the place of the samples: real parts of row k1 at y[(2 k1 - 1) * row_stride], imaginary
//   ones at y[2 k1 * row_stride], and row 0, of a real column, has no imaginary ones. Apart, samples and rows of 400 points
//   would together not fit into the first cache beside the power. Where rows are a multiple of 4 KiB long they would all
//   share its sets: they are put apart, each a line longer.
template <class T, bool kKeep>
void spectrum(const MelParams<T>& p, const FrameTile<T>& t, const Workspace<T>& s, Prefetch& prefetch) {
    using V = Vec<T>;
    const int64_t radix = p.fft.radix;
    V* const power = s.power;
    if (by_twenty(p) && p.framing.window == 400) {
        columns_of_twenty(p, t, s.x, prefetch);
    } else {
        prefetch.share_samples(radix / 2 + 1);
#define MMFAST_CALL(R) columns<T, R>(p, s)
        MMFAST_FOR_RADIX(radix, MMFAST_CALL)
#undef MMFAST_CALL
    }
    if (by_twenty(p)) return rows_of_twenty<T, kKeep>(s, prefetch);
    const V zero{};
    for (int64_t k1 = 0; k1 <= radix / 2; ++k1) {
        prefetch.step_samples();
        const V* const re = s.y + (k1 ? 2 * k1 - 1 : 0) * s.row_stride;
        const V* const im = k1 ? re + s.row_stride : &zero;
        const int64_t step = k1 ? 1 : 0;
        Complex<V>* const row = kKeep ? s.z + k1 * s.stride : nullptr;
        const int32_t* const bin = p.fft.bin + k1 * p.fft.columns;
        transform_row(
            p.fft.row,
            [=](int64_t i, V& a, V& b) {
                a = re[i];
                b = im[i * step];
            },
            s.w,
            [=](int64_t k2, V re, V im) {
                power[bin[k2]] = re * re + im * im;
                if (kKeep) row[k2] = {re, im};
            });
    }
}

// |X|^2 to (|X|^2 + offset)^(power / 2).
template <class T>
void raise(const MelParams<T>& p, const Vec<T>* power, Vec<T>* raised) {
    const int64_t bins = p.bins();
    if (p.power == 2)
        for (int64_t k = 0; k < bins; ++k) raised[k] = power[k] + p.power_offset;
    else if (p.power == 1)
        for (int64_t k = 0; k < bins; ++k) raised[k] = Simd<T>::sqrt(power[k] + p.power_offset);
    else
        for (int64_t k = 0; k < bins; ++k) raised[k] = mmfast::power(power[k] + p.power_offset, p.power / 2);
}

// What spoils a frame: NaN if any of x[at .. end - 1] is infinite or NaN, otherwise 0.
template <class T>
MMFAST_INLINE Vec<T> poison_of(const Vec<T>* x, int64_t at, int64_t end) {
    Vec<T> zero[4] = {};
    for (; at + 4 <= end; at += 4)
        for (int j = 0; j < 4; ++j) zero[j] += x[at + j] * T(0);
    for (; at < end; ++at) zero[0] += x[at] * T(0);
    return (zero[0] + zero[1]) + (zero[2] + zero[3]);
}

template <class T, class V>
MMFAST_INLINE V* eighths(V* x, uint32_t at) {
    return reinterpret_cast<V*>(intptr_t(x) + intptr_t(at) * int64_t(sizeof(Vec<T>) / 8));
}

// m = filters * power for the next rows, with kCount weights each or with their own count where that is negative.
template <class T, int kCount>
MMFAST_INLINE void filter_rows(const Filters<T>& f, const Vec<T>* power, const FilterRow*& row, const FilterRow* end,
                               const T*& weights, Vec<T>* m) {
    const T* w = weights;
    for (; row < end; ++row) {
        const Vec<T>* const x = eighths<T>(power, row->first8);
        const int64_t count = kCount < 0 ? f.count[row->row8 / 8] : kCount;
        Vec<T> a{}, b{};
        int64_t j = 0;
        for (; j + 2 <= count; j += 2) {
            a += x[j] * w[j];
            b += x[j + 1] * w[j + 1];
        }
        if (j < count) a += x[j] * w[j];
        *eighths<T>(m, row->row8) = a + b;
        w += count;
    }
    weights = w;
}
template <class T, int... kCount>
MMFAST_INLINE void filter_short_rows(const Filters<T>& f, const Vec<T>* power, const FilterRow*& row, const T*& weights,
                                     Vec<T>* m, std::integer_sequence<int, kCount...>) {
    (filter_rows<T, kCount>(f, power, row, f.order + f.short_end[kCount], weights, m), ...);
}

// m = filters * power, rows with as many weights after each other: loops of a known length, where a core could not guess the
// end of most, and of few instructions, which are the limit here. Zeros are not multiplied; but as in the dense product one
// infinite or NaN bin makes every band of its frame NaN.
template <class T>
void filter(const Filters<T>& f, const Vec<T>* power, int64_t bins, Vec<T>* m) {
    const FilterRow* row = f.order;
    const T* weights = f.weights;
    constexpr int kShort = Filters<T>::kShort;
    filter_short_rows<T>(f, power, row, weights, m, std::make_integer_sequence<int, kShort + 1>());
    filter_rows<T, -1>(f, power, row, f.order + f.rows, weights, m);
    // Bins in some row show there; what else is not finite there is a sum's own.
    const Vec<T> suspect =
        poison_of<T>(m, 0, f.rows) + poison_of<T>(power, 0, f.covered) + poison_of<T>(power, f.covered_end, bins);
    if (Simd<T>::all_zero(suspect)) return;
    const Vec<T> poison = poison_of<T>(power, 0, bins);
    for (int64_t i = 0; i < f.rows; ++i) m[i] += poison;
}

// f(v) for the v of every band but the constant ones; f must not mind the order.
template <class T, class F>
MMFAST_INLINE void for_each_varying(const MelParams<T>& p, const Vec<T>* v, const F& f) {
    constexpr int kTogether = 4;
    const int64_t bands = p.bands(), constant = p.constant_bands();
    const FilterRow* const order = p.filters.order;
    int64_t i = constant;
    const auto at = [&](int64_t k) { return constant ? *eighths<T>(v, order[k].row8) : v[k]; };
    for (; i + kTogether <= bands; i += kTogether)
        for (int j = 0; j < kTogether; ++j) f(at(i + j), j);
    for (; i < bands; ++i) f(at(i), 0);
}

template <class T>
void find_extrema(const MelParams<T>& p, const Vec<T>* v, FrameTile<T>& t) {
    using S = Simd<T>;
    using V = Vec<T>;
    // Four of each: the next value would wait for the comparison before.
    V highs[4], lows[4], sums[4] = {};
    for (int j = 0; j < 4; ++j) lows[j] = -(highs[j] = S::splat(-T(__builtin_inf())));
    for_each_varying(p, v, [&](V y, int j) {
        lows[j] = S::min(y, lows[j]);
        highs[j] = S::max(y, highs[j]);
        sums[j] += y;
    });
    V low = S::min(S::min(lows[0], lows[1]), S::min(lows[2], lows[3]));
    V high = S::max(S::max(highs[0], highs[1]), S::max(highs[2], highs[3]));
    for (int i = t.frames; i < S::lanes; ++i) low[i] = low[0], high[i] = high[0];
    t.lowest = S::lowest(low);
    t.highest = S::highest(high);
    // A NaN shows in the sum, and so do infinities of both signs.
    if (S::all_zero((sums[0] + sums[1] + sums[2] + sums[3]) * T(0))) return;
    bool nan = false;
    for_each_varying(p, v, [&](V y, int) {
        for (int i = 0; i < t.frames; ++i) nan |= y[i] != y[i];
    });
    if (nan) t.lowest = t.highest = T(__builtin_nan(""));
}

// v = log_scale ln(max(m, floor) + offset) + log_shift ; for top_db its extrema too.
template <class T>
void compress(const MelParams<T>& p, const Vec<T>* m, Vec<T>* v, FrameTile<T>& t, Prefetch& prefetch) {
    using S = Simd<T>;
    using V = Vec<T>;
    const V floor = S::splat(p.log_floor);
    const int64_t bands = p.bands();
    const auto some = [&](int64_t i, auto normal, auto count) {
        constexpr int kCount = decltype(count)::value;
        V y[kCount];
        for (int j = 0; j < kCount; ++j) y[j] = (m[i + j] < floor ? floor : m[i + j]) + p.log_offset;
        log_each<decltype(normal)::value, kCount>(y);
        for (int j = 0; j < kCount; ++j)  // both parts positive: infinity stays
            v[i + j] = y[j] * p.log_scale + (y[j] * p.log_scale_low + p.log_shift);
    };
    const auto logarithm = [&](auto normal) {
        int64_t i = 0;
        for (; i + 4 <= bands; i += 4) {
            prefetch.step_out();
            some(i, normal, std::integral_constant<int, 4>());
        }
        for (; i < bands; ++i) some(i, normal, std::integral_constant<int, 1>());
    };
    prefetch.share_out(p.log ? bands / 4 + 1 : 1);
    if (!p.log) {
        prefetch.step_out();
        for (int64_t i = 0; i < bands && v != m; ++i) v[i] = m[i];
    } else if (p.log_floor + p.log_offset >= T(1.17549435e-38)) {
        logarithm(std::true_type());
    } else {
        logarithm(std::false_type());
    }
    if (p.has_top_db) find_extrema(p, v, t);
}

// c[j * step] = sum over i < rows of v[i] dct[i][j * step], a few outputs at a time so that each v is loaded once for all.
template <class T, int kBlock>
MMFAST_INLINE void dct_block(const Vec<T>* v, int64_t rows, const T* dct, int64_t columns, int64_t step, Vec<T>* c) {
    Vec<T> sum[kBlock] = {};
    for (int64_t i = 0; i < rows; ++i, dct += columns)
        for (int j = 0; j < kBlock; ++j) sum[j] += v[i] * dct[j * step];
    for (int j = 0; j < kBlock; ++j) c[j * step] = sum[j];
}

template <class T>
MMFAST_INLINE void dct_columns(const Vec<T>* v, int64_t rows, const T* dct, int64_t columns, int64_t first,
                               int64_t step, Vec<T>* c) {
    int64_t j = first;
    for (; j + 9 * step < columns; j += 10 * step) dct_block<T, 10>(v, rows, dct + j, columns, step, c + j);
    for (; j + 3 * step < columns; j += 4 * step) dct_block<T, 4>(v, rows, dct + j, columns, step, c + j);
    for (; j < columns; j += step) dct_block<T, 1>(v, rows, dct + j, columns, step, c + j);
}

// c = v @ dct. The rows of a DCT mirror each other: with sums and differences of the v at both ends, half the products do.
template <class T>
void cepstra(const MelParams<T>& p, Vec<T>* v, Vec<T>* c) {
    const int64_t bands = p.bands();
    if (!p.dct_mirrored) return dct_columns(v, bands, p.dct, p.cepstra, 0, 1, c);
    const int64_t half = bands / 2;
    for (int64_t i = 0; i < half; ++i) {
        const Vec<T> a = v[i], b = v[bands - 1 - i];
        v[i] = a + b;
        v[bands - 1 - i] = a - b;
    }
    dct_columns(v, (bands + 1) / 2, p.dct, p.cepstra, 0, 2, c);
    // The differences stand at the far end in reverse order; brought forward, they meet the same rows.
    for (int64_t i = 0; i < half; ++i) v[i] = v[bands - 1 - i];
    if (p.cepstra > 1) dct_columns(v, half, p.dct, p.cepstra, 1, 2, c);
}

template <class T>
MMFAST_INLINE int64_t feature_count(const MelParams<T>& p) {
    return (p.cepstra ? p.cepstra : p.bands()) + (p.energy == Energy::prepend || p.energy == Energy::append);
}

template <class T>
void store_features(const FrameTile<T>& t, Vec<T>* features, int64_t count) {
    constexpr int N = Simd<T>::lanes;
    const int per_row = t.rows == 1 ? t.frames : t.frames / t.rows;
    if (t.frame_stride == 1) {
        T* out = t.out;
        if (t.rows == 1) {
            for (int64_t c = 0; c < count; ++c, out += t.feature_stride) Simd<T>::store(out, features[c], t.frames);
            return;
        }
        for (int64_t c = 0; c < count; ++c, out += t.feature_stride)
            for (int r = 0; r < t.rows; ++r)
                Simd<T>::store_lanes(out + r * t.row_stride, features[c], r * per_row, per_row);
        return;
    }
    for (int64_t c = 0; c < count; c += N) {  // feature_stride is 1
        const int n = count - c < N ? int(count - c) : N;
        Vec<T> rows[N];
        for (int i = 0; i < N; ++i) rows[i] = i < n ? features[c + i] : Vec<T>{};
        Simd<T>::transpose(rows);
        for (int r = 0; r < t.rows; ++r)
            for (int f = 0; f < per_row; ++f)
                Simd<T>::store(t.out + r * t.row_stride + f * t.frame_stride + c, rows[r * per_row + f], n);
    }
}

// Samples to v. On return s.features + 1 is free for the features (one place before it for a prepended energy).
template <class T, bool kBackward>
MMFAST_INLINE Vec<T> analyse(const MelParams<T>& p, FrameTile<T>& t, const Workspace<T>& s, Vec<T>** raised,
                             Vec<T>** m) {
    Vec<T> energy{};
    load_frames(p, t, s.x);
    if (p.conditions()) condition(p, t, s.x, s.raw, &energy);
    Prefetch prefetch = kBackward ? Prefetch() : Prefetch::of(t, feature_count(p));
    spectrum<T, kBackward>(p, t, s, prefetch);
    *raised = s.power;
    if (p.power != 2 || p.power_offset != 0) {
        if (kBackward) *raised = s.raised;
        raise(p, s.power, *raised);
    }
    *m = *raised;
    if (p.filters.rows) {
        *m = kBackward ? s.m : s.v;
        filter(p.filters, *raised, p.bins(), *m);
    }
    compress(p, *m, s.v, t, prefetch);
    return energy;
}

// Range and affine of v, in one pass over it.
template <class T>
void finish_bands(const MelParams<T>& p, const FrameTile<T>& t, Vec<T>* v) {
    const bool affine = p.output_offset != 0 || p.output_scale != 1;
    if (!t.clip && !affine) return;
    const bool all = t.threshold != t.threshold;
    const Vec<T> threshold = Simd<T>::splat(t.clip ? t.threshold : -T(__builtin_inf()));
    for (int64_t i = 0; i < p.bands(); ++i) {
        const Vec<T> raised = Simd<T>::max(threshold, v[i]);  // a NaN stays
        v[i] = affine ? (raised + p.output_offset) * p.output_scale : raised;
    }
    for (int64_t i = 0; t.clip && all && i < p.bands(); ++i) v[i] = threshold;
}

template <class T>
void forward(const MelParams<T>& p, FrameTile<T>& t, void* scratch) {
    using V = Vec<T>;
    const Workspace<T> s(p, scratch, false);
    V* const v = s.v;
    V* const kept = reinterpret_cast<V*>(t.kept);
    V energy;
    if (t.resume) {
        for (int64_t i = 0; i < p.bands(); ++i) v[i] = kept[i];
        energy = kept[p.bands()];
    } else {
        V *raised, *m;
        energy = analyse<T, false>(p, t, s, &raised, &m);
        if (t.first_round && !(t.lowest >= t.guess)) {
            t.deferred = kept != nullptr;
            if (t.deferred) {
                for (int64_t i = 0; i < p.bands(); ++i) kept[i] = v[i];
                kept[p.bands()] = energy;
                return;
            }
            t.guessed = t.clip = true;
            t.threshold = t.guess;
        }
    }
    finish_bands(p, t, v);
    if (p.has_top_db && !t.clip)
        for (int64_t k = 0; k < p.constant_bands(); ++k) *eighths<T>(v, p.filters.order[k].row8) = V{};
    V* features = v;
    if (p.cepstra || p.energy == Energy::prepend || p.energy == Energy::append) {
        features = s.features;
        V* const at = features + (p.energy == Energy::prepend);
        if (p.cepstra) {
            cepstra(p, v, at);
        } else {
            for (int64_t i = 0; i < p.bands(); ++i) at[i] = v[i];
        }
    }
    const int64_t count = feature_count(p);
    if (p.energy == Energy::prepend || p.energy == Energy::replace_first) features[0] = log_energy(p, energy);
    else if (p.energy != Energy::none) features[count - 1] = log_energy(p, energy);
    store_features(t, features, count);
}

// ---- The adjoint ----------------------------------------------------------------------------------------------------

template <class T>
void backward(const MelParams<T>& p, GradientTile<T>& t, void* scratch) {
    using V = Vec<T>;
    const Workspace<T> s(p, scratch, true);
    V *raised, *m;
    const V energy = analyse<T, true>(p, t.in, s, &raised, &m);

    const int64_t count = feature_count(p), bands = p.bands();
    V* const gradient = s.features;
    load_gradient(t, count, gradient);
    V energy_grad{};
    if (p.energy == Energy::prepend || p.energy == Energy::replace_first) {
        energy_grad = gradient[0];
        gradient[0] = V{};
    } else if (p.energy != Energy::none) {
        energy_grad = gradient[count - 1];
        gradient[count - 1] = V{};
    }
    if (t.share_only) energy_grad = V{};
    const V* const from = gradient + (p.energy == Energy::prepend);
    if (p.cepstra) cepstra_adjoint(p, from, s.g);
    for (int64_t i = 0; i < bands && !p.cepstra; ++i) s.g[i] = from[i] * p.output_scale;
    compress_adjoint(p, t, s.v, m, s.g);
    if (t.filters) filter_gradient(p, t, raised, s.g, s.rows);
    if (!t.samples) return;

    V* const h = s.raised;  // the raised power is not needed any more
    filter_adjoint(p, s.power, s.g, h);
    const int64_t n = p.fft.n, radix = p.fft.radix;
    for (int64_t k1 = 0; k1 <= radix / 2; ++k1) {
        Complex<V>* const row = s.z + k1 * s.stride;
        const auto load = [=](int64_t k2, V& re, V& im) {
            const int64_t bin = k1 + radix * k2;
            const V factor = h[2 * bin > n ? n - bin : bin];
            re = row[k2].im * factor;  // swapped: the inverse transform
            im = row[k2].re * factor;
        };
        transform_row(p.fft.row, load, s.w, [=](int64_t k2, V re, V im) { row[k2] = {re, im}; });
    }
    V* const d = s.x;
#define MMFAST_CALL(R) columns_adjoint<T, R>(p, s.z, s.stride, d)
    MMFAST_FOR_RADIX(radix, MMFAST_CALL)
#undef MMFAST_CALL
    if (p.conditions()) condition_adjoint(p, s, energy, energy_grad, d);
    overlap_add(p, t, d);
}

template <class T>
MMFAST_INLINE MelKernels<T> kernels_of() {
    return {Simd<T>::lanes, scratch_bytes<T, false>, scratch_bytes<T, true>, forward<T>, backward<T>};
}

}  // namespace

MelKernels<float> kernels_float() {
    return kernels_of<float>();
}
MelKernels<double> kernels_double() {
    return kernels_of<double>();
}

}  // namespace MMFAST_ISA
}  // namespace mel
}  // namespace mmfast
