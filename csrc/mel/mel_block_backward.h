// The adjoint of mel_block.h: recomputes a tile from its samples and takes a gradient of the features back to them.
#pragma once

#include "mel/mel_block_transform.h"

namespace mmfast {
namespace mel {

// Samples of the waveform that one tile alone reads, and at one place each: begin <= t < end. The tile writes their gradient
// itself; what is between the ranges of two tiles is gathered from the spans.
template <class T>
struct OwnSamples {
    int64_t begin, end;
    MMFAST_INLINE OwnSamples(const BlockJob<T>& job, int tile_frames, int64_t row, int64_t tile) : begin(0), end(0) {
        const Framing& f = job.p.framing;
        const int64_t length = job.row_length(row), count = job.count(row), run = tile_frames * f.hop;
        // The next tile but one reads none of them.
        if (job.signal_preemphasis != 0 || f.hop > f.window || f.window - f.hop > run || count == 0) return;
        const int64_t over = f.first + (count - 1) * f.hop + f.window - length;
        const int64_t reach = -f.first > over ? -f.first : over > 0 ? over : 0;
        const bool once = f.mode == PadMode::constant || reach == 0;
        const int64_t low = once ? 0 : reach + 1, high = once ? length : length - 1 - reach;
        if (low >= high) return;
        const int64_t first = tile * tile_frames, last = count - first, from = f.first + first * f.hop;
        begin = first == 0 ? from : last > 0 ? from + f.window - f.hop : high;
        end = last > tile_frames ? from + run : last > 0 ? from + (last - 1) * f.hop + f.window : high;
        begin = begin < low ? low : begin > high ? high : begin;
        end = end < begin ? begin : end > high ? high : end;
    }
};

// Gradient of the bands m from that of the features, left in g. The gradient of raised values goes to the maximum in a
// second pass (share_only); the first one counts it.
template <class T, class Shape, class Block>
MMFAST_INLINE void Tile<T, Shape, Block>::band_gradients() const {
    const MelParams<T>& p = job.p;
    const int F = shape.frames(), bands = int(job.bands()), lane_stride = at.lane_stride, n_cepstra = int(p.cepstra);
    const bool whole = p.has_top_db && !job.share_only;
    T *const m = memory + at.m, *const g = memory + at.g, *const grad = memory + at.grad, *const parts = part();
    T* const energy_grad = memory + at.energy_grad;
    // Nothing is read of frames past the last one that matters.
    if (p.time_major) {
        each_feature([&](int f, int c, int64_t i) {
            if (f < frames) grad[c * lane_stride + f] = job.grad[i];
        });
    } else {
        const int n = int(job.feature_count);
        block.lanes(F, n, [&](int f, int first, int step) {
            if (f >= frames) return;
            const T* from = job.grad + (row * job.feature_count + first) * job.frames + frame() + f;
            for (int c = first; c < n; c += step, from += step * job.frames) grad[c * lane_stride + f] = *from;
        });
    }
    if (p.energy != Energy::none) {
        block.each(F, [&](int f) {
            const bool first = p.energy == Energy::prepend || p.energy == Energy::replace_first;
            T& value = grad[(first ? 0 : job.feature_count - 1) * lane_stride + f];
            energy_grad[f] = job.share_only ? T(0) : value;
            value = 0;
        });
    }
    if (whole) {
        extrema([&](int band, int f) { return compress_value(p, m[band * lane_stride + f]); });
        block.each(1, [&](int) { job.highest[index] = parts[kParts * F]; });
    }
    const T threshold = p.has_top_db ? maximum - p.top_db : T(0);
    const T highest = whole ? parts[kParts * F] : job.share_only ? job.group_highest[group()] : T(0);
    const T share = job.share_only ? job.share[group()] : T(0);
    const T* const from = grad + (p.energy == Energy::prepend) * lane_stride;
    block.each(1, [](int) {});  // everyone has read parts
    block.each(kParts * F, [&](int i) {
        const int f = i % F;
        T raised = 0, hits = 0;
        for (int band = i / F; band < bands; band += kParts) {
            T sum = 0;
            if (n_cepstra) {
                for (int j = 0; j < n_cepstra; ++j)
                    sum += from[j * lane_stride + f] * p.dct[int64_t(band) * n_cepstra + j];
            } else {
                sum = from[band * lane_stride + f];
            }
            sum *= p.output_scale;
            const T value = m[band * lane_stride + f];
            if (p.has_top_db && f < frames) {
                const T v = compress_value(p, value);
                if (job.share_only) {
                    sum = v == highest ? share : T(0);
                } else {
                    const T kept = v > threshold ? sum : v == threshold ? sum * T(0.5) : T(0);
                    raised += sum - kept;
                    hits += v == highest;
                    sum = kept;
                }
            }
            g[band * lane_stride + f] = f < frames ? compress_gradient(p, value, sum) : T(0);
        }
        parts[i] = raised;
        parts[kParts * F + i] = hits;
    });
    if (!whole) return;
    block.each(2 * F, [&](int i) {
        T* const own = parts + i / F * kParts * F + i % F;
        for (int j = 1; j < kParts; ++j) own[0] += own[j * F];
    });
    block.each(1, [&](int) {
        T raised = 0, hits = 0;  // at most the bands times the frames of a tile: exact
        for (int f = 0; f < F; ++f) {
            raised += parts[f];
            hits += parts[kParts * F + f];
        }
        job.raised[index] = raised;
        job.hits[index] = int32_t(hits);
    });
}

// filter_sums[slot][k][i] += sum over the frames of g[i] power[k].
template <class T, class Shape, class Block>
MMFAST_INLINE void Tile<T, Shape, Block>::filter_gradients(int64_t slot) const {
    const int F = shape.frames(), rows_ = int(job.filters.rows), bins = int(job.bins()), lane_stride = at.lane_stride;
    const T *const g = memory + at.g, *const raised = power();
    T* const sums = job.filter_sums + slot * bins * rows_;
    block.each(bins * rows_, [&](int i) {
        const T *const a = g + i % rows_ * lane_stride, *const b = raised + i / rows_ * F;
        T sum = 0;
        for (int f = 0; f < frames; ++f) sum += a[f] * b[f];
        sums[i] += sum;
    });
}

// Rows of the spectrum, times the factors in power(), back to columns: the steps of tuned_rows in the opposite order. Real and
// imaginary parts are swapped, so that the transform is the inverse one.
template <class T, class Shape, class Block>
MMFAST_INLINE void Tile<T, Shape, Block>::tuned_rows_adjoint() const {
    constexpr int A = Shape::A, P = Shape::P, F = Shape::F, G = Shape::G, stride = Shape::stride();
    const T *const h = power(), *const tw = job.plan.row_twiddle;
    block.each(9 * A * F, [&](int i) {
        const int f = i % F, k1 = i / F % 9, a = i / (9 * F), base = spot(k1 * stride + a * P, f);
        const T *const up = h + bin_of(k1, a, 0) * F + f, *const down = h + bin_of(k1, a, P - 1) * F + f;
        T re[P], im[P];
        MMFAST_UNROLL
        for (int j = 0; j < P; ++j) {
            const T factor = 2 * j < P ? up[16 * A * F * j] : down[16 * A * F * (P - 1 - j)];
            re[j] = z.im[base + j * G] * factor;
            im[j] = z.re[base + j * G] * factor;
        }
        register_dft<P>(re, im);
        MMFAST_UNROLL
        for (int j = 0; j < P; ++j) {
            if (A > 1) twist(re[j], im[j], tw[2 * (a * P + j)], tw[2 * (a * P + j) + 1]);
            z.re[base + j * G] = re[j];
            z.im[base + j * G] = im[j];
        }
    });
    if constexpr (A > 1) {
        block.each(9 * P * F, [&](int i) {
            const int f = i % F, p = i / F % P, base = spot(i / (F * P) * stride + p, f);
            T re[A], im[A];
            MMFAST_UNROLL
            for (int a = 0; a < A; ++a) {
                re[a] = z.re[base + a * P * G];
                im[a] = z.im[base + a * P * G];
            }
            register_dft<A>(re, im);
            MMFAST_UNROLL
            for (int a = 0; a < A; ++a) {
                z.re[base + a * P * G] = re[a];
                z.im[base + a * P * G] = im[a];
            }
        });
    }
}

// Columns back to samples, times the window. Sample s + S r takes the place of the real (r even) or imaginary part of z at row
// r / 2, column s: all that an item writes it has read itself.
template <class T, class Shape, class Block>
template <int R>
MMFAST_INLINE void Tile<T, Shape, Block>::columns_adjoint() const {
    const int S = shape.columns(), F = shape.frames(), stride = shape.stride(), length_ = window();
    const T *const tw = job.plan.fft.twiddle, *const w = job.p.window;
    block.each(S * F, [&](int i) {
        const int f = i % F, s = i / F;
        T v[R], re[R / 2 + 1], im[R / 2 + 1];
        MMFAST_UNROLL
        for (int k = 0; k <= R / 2; ++k) {
            re[k] = z.im[(k * stride + s) * F + f];
            im[k] = z.re[(k * stride + s) * F + f];
            if (k) twist(re[k], im[k], tw[2 * ((k - 1) * S + s)], -tw[2 * ((k - 1) * S + s) + 1]);
        }
        RealDft<R, T, T>::inverse(re, im, v);
        MMFAST_UNROLL
        for (int r = 0; r < R; ++r) {
            const int n = s + S * r;
            T* const to = r % 2 ? z.im : z.re;  // GCC 12 with -fsanitize=undefined loses the index of (a ? b : c)[i]
            if (n < length_) to[(r / 2 * stride + s) * F + f] = v[r] * w[n];
        }
    });
}

// The same for a TunedShape, as tuned_columns.
template <class T, class Shape, class Block>
MMFAST_INLINE void Tile<T, Shape, Block>::tuned_columns_adjoint() const {
    constexpr int S = Shape::columns(), G = Shape::G, stride = Shape::stride();
    const int length_ = window();
    const T *const tw = job.plan.fft.twiddle, *const w = job.p.window;
    block.each(S * G, [&](int i) {
        const int s = i / G;
        T weight[16], c[8], d[8];
        MMFAST_UNROLL
        for (int r = 0; r < 16; ++r) weight[r] = s + S * r < length_ ? w[s + S * r] : T(0);
        MMFAST_UNROLL
        for (int k = 0; k < 8; ++k) {
            const Together<2, T> turn = Together<2, T>::of(tw + 2 * (k * S + s));
            c[k] = turn.value[0];
            d[k] = turn.value[1];
        }
        MMFAST_ROLLED
        for (int j = 0; j < Shape::kEach; ++j) {
            const int to = spot(s, i % G + G * j);
            T v[16], re[9], im[9];
            MMFAST_UNROLL
            for (int k = 0; k <= 8; ++k) {
                re[k] = z.im[to + k * stride * G];
                im[k] = z.re[to + k * stride * G];
                if (k) twist(re[k], im[k], c[k - 1], -d[k - 1]);
            }
            RealDft<16, T, T>::inverse(re, im, v);
            MMFAST_UNROLL
            for (int r = 0; r < 16; ++r) {
                T* const half = r % 2 ? z.im : z.re;  // as in columns_adjoint
                half[to + r / 2 * stride * G] = v[r] * weight[r];
            }
        }
    });
}

template <class T, class Shape, class Block>
MMFAST_INLINE void Tile<T, Shape, Block>::spectrum_adjoint() {
    const MelParams<T>& p = job.p;
    const SparseFilters<T>& filters = job.filters;
    const int F = shape.frames(), n = shape.n(), lane_stride = at.lane_stride;
    const T* const g = memory + at.g;
    T* const h = power();
    // Gradient of the bands to the factor of each bin: 2 dP/d|X|^2 gP, halved where a bin counts twice.
    constexpr int V = Shape::V;
    const int items = F / V;
    block.each(int(job.bins()) * items, [&](int i) {
        const int f = i % items * V, k = i / items;
        T sum[V] = {};
        if (filters.rows) {
            const T* const w = filters.dense + int64_t(k) * filters.rows;
            const int first = filters.bin_first[k], last = first + filters.bin_count[k];
            MMFAST_ROLLED
            for (int band = first; band < last; ++band) {
                const T weight = w[band];
                if (weight == 0) continue;
                MMFAST_UNROLL
                for (int v = 0; v < V; ++v) sum[v] += g[band * lane_stride + f + v] * weight;
            }
        } else {
            MMFAST_UNROLL
            for (int v = 0; v < V; ++v) sum[v] = g[k * lane_stride + f + v];
        }
        MMFAST_UNROLL
        for (int v = 0; v < V; ++v) {
            if (p.power != 2) {
                const int place = spot(place_of(k), f + v);
                sum[v] *= raise_power_slope(p, z.re[place] * z.re[place] + z.im[place] * z.im[place]);
            }
            h[k * F + f + v] = k == 0 || 2 * k == n ? sum[v] + sum[v] : sum[v];
        }
    });
    if constexpr (Shape::tuned) {
        tuned_rows_adjoint();
        tuned_columns_adjoint();
    } else {
        const int S = shape.columns(), stride = shape.stride(), R = shape.radix();
        block.each(shape.rows() * S * F, [&](int i) {
            const int k1 = i / (F * S), k2 = i / F % S, place = (k1 * stride + k2) * F + i % F, bin = k1 + R * k2;
            const T factor = h[(2 * bin > n ? n - bin : bin) * F + i % F], re = z.re[place];
            z.re[place] = z.im[place] * factor;
            z.im[place] = re * factor;
        });
        general_rows();
        switch (R) {
            case 16: columns_adjoint<16>(); break;
            case 8: columns_adjoint<8>(); break;
            case 5: columns_adjoint<5>(); break;
            case 4: columns_adjoint<4>(); break;
            case 3: columns_adjoint<3>(); break;
            case 2: columns_adjoint<2>(); break;
            default: columns_adjoint<1>();
        }
    }
}

// Gradient of sample n of frame f as it was staged, but for the scale and the mean; energy_grad holds the factor of the energy.
template <class T, class Shape, class Block>
MMFAST_INLINE T Tile<T, Shape, Block>::sample_gradient(int f, int n) const {
    const MelParams<T>& p = job.p;
    const int length_ = window();
    const auto windowed = [&](int i) {
        T d = windowed_gradient(f, i);
        if (p.energy != Energy::none && !p.raw_energy)
            d += conditioned(f, i) * (p.energy_window[i] * p.energy_window[i]) * memory[at.energy_grad + f];
        return d;
    };
    T d = windowed(n);
    if (p.preemphasis != 0) {
        const T own = d;
        if (n + 1 < length_) d -= windowed(n + 1) * p.preemphasis;
        if (n == 0) d -= own * p.preemphasis;  // sample 0 is its own predecessor
    }
    if (p.energy != Energy::none && p.raw_energy) d += centred(f, n) * memory[at.energy_grad + f];
    return d;
}

// The same without conditions, six samples of a frame at once: where a frame begins in z is found once for them. Sample
// place * step + n comes from frame place and the ones before it; the last places, past the frames of a tile, have a phase of
// their own.
template <class T, class Shape, class Block>
template <class Put>
MMFAST_INLINE void Tile<T, Shape, Block>::tuned_overlap_add(const Put& put) const {
    constexpr int S = Shape::columns(), F = Shape::F, G = Shape::G, stride = Shape::stride(), kAtOnce = 6;
    const int length_ = window(), step = at.step, over = (length_ - 1) / step, used = (frames - 1) * step + length_;
    const int odd = at.pad ? step | 1 : step;  // from place to place: other banks
    T* const to = x();
    const auto slot = [](int n) {
        const int r = n / S;
        return (r / 2 * stride + n - r * S) * G + r % 2 * Shape::plane();
    };
    block.lanes(F, step, [&](int place, int first, int stride_) {
        MMFAST_ROLLED
        for (int base = first; base < step; base += kAtOnce * stride_) {
            T total[kAtOnce] = {};
            MMFAST_ROLLED
            for (int j = over; j >= 0; --j) {
                if (place < j || place - j >= frames) continue;
                const T* const from = z.re + spot(0, place - j);
                MMFAST_UNROLL
                for (int k = 0; k < kAtOnce; ++k) {
                    const int n = base + k * stride_;
                    if (n < step && n + j * step < length_) total[k] += from[slot(n + j * step)];
                }
            }
            MMFAST_UNROLL
            for (int k = 0; k < kAtOnce; ++k)
                if (base + k * stride_ < step) to[place * odd + base + k * stride_] = total[k];
        }
    });
    block.each(over * step, [&](int i) {
        const int beyond = (step > 1 ? quotient(i, at.reciprocal) : i), place = F + beyond, n = i - beyond * step;
        T total = 0;
        for (int j = over; j > beyond; --j)
            if (place - j < frames && n + j * step < length_) total += z.re[spot(0, place - j) + slot(n + j * step)];
        if (place * step + n < used) to[place * odd + n] = total;
    });
    block.each(used, [&](int q) { put(q, to[q + (step > 1 ? quotient(q, at.reciprocal) : q) * (odd - step)]); });
}

// Sums the frames where they overlap, into the gradient of the waveform or the tile's span.
template <class T, class Shape, class Block>
MMFAST_INLINE void Tile<T, Shape, Block>::overlap_add() const {
    const MelParams<T>& p = job.p;
    const int F = shape.frames(), length_ = window(), step = at.step, used = (frames - 1) * step + length_;
    const int over = (length_ - 1) / step, places = frames + over;
    const bool energy = p.energy != Energy::none, conditions = p.conditions();
    T *const sum = memory + at.energy, *const factor = memory + at.energy_grad, *const to = x();
    T* const span = job.spans + int64_t(index) * at.span;
    // Where in the tile the samples stand that it writes itself.
    const OwnSamples<T> own(job, F, row, tile());
    const int64_t begin = p.framing.first + frame() * p.framing.hop;
    const int own_begin = own.begin < own.end ? int(own.begin - begin) : 0;
    const int own_end = own.begin < own.end ? int(own.end - begin) : 0;
    T* const wave = job.grad_wave + row * job.length + begin;
    if (energy) {
        stage();
        block.each(F, [&](int f) {
            const T e = sum[f];
            const bool off = e < T(0x1p-23) || (p.has_energy_floor && log_of(e) < p.log_energy_floor);
            factor[f] = off ? T(0) : factor[f] * T(2) / e;
        });
    }
    if (p.remove_dc) {
        sum_frames(length_, sum, [&](int f, int n) { return sample_gradient(f, n); });
    } else if (conditions) {
        block.each(F, [&](int f) { sum[f] = 0; });
    }
    const auto put = [&](int q, T value) {
        T* const place = q >= own_begin && q < own_end ? wave + q : span + q;
        *place = job.share_only ? *place + value : value;
    };
    if constexpr (Shape::tuned) {
        if (!conditions) {
            tuned_overlap_add(put);
            return;
        }
    }
    block.each(step * places, [&](int i) {
        const int place = i % places, q = place * step + i / places;
        if (q >= used) return;
        T total = 0;
        for (int j = over; j >= 0; --j) {
            const int f = place - j, n = i / places + j * step;
            if (f < 0 || f >= frames || n >= length_) continue;
            total +=
                conditions ? (sample_gradient(f, n) - sum[f] / T(length_)) * p.input_scale : windowed_gradient(f, n);
        }
        if (energy) put(q, total);  // the samples are still needed
        else to[at.skew(q)] = total;
    });
    if (!energy) block.each(used, [&](int q) { put(q, to[at.skew(q)]); });
}

template <class T, class Shape, class Block>
MMFAST_INLINE void Tile<T, Shape, Block>::backward(int64_t slot) {
    if (frames == 0) {
        if (job.p.has_top_db && !job.share_only) {
            block.each(1, [&](int) {
                job.highest[index] = -infinity_of<T>();
                job.raised[index] = 0;
                job.hits[index] = 0;
            });
        }
        return;
    }
    if (job.share_only && (job.share[group()] == 0 || job.highest[index] != job.group_highest[group()])) return;
    analyse<true>();
    filter<false>(memory + at.m);
    band_gradients();
    if (job.filter_sums) filter_gradients(slot);
    if (!job.spans) return;
    spectrum_adjoint();
    overlap_add();
}

// Gradient of sample t of the waveform: what the tiles' spans hold for every position that reads it.
template <class T>
MMFAST_INLINE T gather_sample(const BlockJob<T>& job, int tile_frames, int span, int64_t row, int64_t t) {
    const Framing& f = job.p.framing;
    const int64_t length = job.row_length(row), count = job.count(row);
    if (t >= length || count == 0) return T(0);
    const int64_t begin = f.first, end = f.first + (count - 1) * f.hop + f.window;
    const T* const spans = job.spans + row * job.tiles * span;
    const uint32_t window = uint32_t(f.window), hop = uint32_t(f.hop < 0xffffffff ? f.hop : 0xffffffff);
    const auto at = [&](int64_t sample) {
        T total = 0;
        f.for_each_reader(sample, length, begin, end, [&](int64_t position) {
            const uint32_t q = uint32_t(position - begin);
            uint32_t last = q / hop;
            if (last >= uint32_t(count)) last = uint32_t(count) - 1;
            if (hop > window) {  // the frames are staged one after the other
                if (q - last * hop < window)
                    total += spans[int64_t(last / tile_frames) * span + last % tile_frames * window + (q - last * hop)];
                return;
            }
            const uint32_t first = q < window ? 0 : (q - window) / hop + 1;
            for (uint32_t i = first / tile_frames; i <= last / tile_frames; ++i)
                total += spans[int64_t(i) * span + (q - i * tile_frames * hop)];
        });
        return total;
    };
    const T own = at(t), c = job.signal_preemphasis;
    return c != 0 && t + 1 < length ? own - c * at(t + 1) : own;
}

// The samples between those that tile - 1 and `tile` write themselves; thread of threads. tile from 0 to job.tiles.
template <class T>
MMFAST_INLINE void gather_between(const BlockJob<T>& job, int tile_frames, int span, int64_t row, int64_t tile,
                                  int64_t thread, int64_t threads) {
    const int64_t begin = tile > 0 ? OwnSamples<T>(job, tile_frames, row, tile - 1).end : 0;
    const int64_t end = tile < job.tiles ? OwnSamples<T>(job, tile_frames, row, tile).begin : job.length;
    for (int64_t t = begin + thread; t < end; t += threads)
        job.grad_wave[row * job.length + t] = gather_sample(job, tile_frames, span, row, t);
}

}  // namespace mel
}  // namespace mmfast
