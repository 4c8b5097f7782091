// The GPU kernels of the mel slice as a block of threads runs them: a tile of frames, in memory that the block shares.
// No CUDA header is needed, so that a host can run the same code (tests/native/test_mel_block.cpp).
//
// Note: [Phases]
//   A kernel is a sequence of phases. Each is a loop over independent items, block.each(n, f), after which all threads wait for
//   each other. What one item writes no other item of the phase touches; so the order of items does not matter, which the
//   host test checks by changing it. One exception: any item may spoil() a frame, and all that do write the same NaN.
//
// Note: [Frames in lanes, shared]
//   As on the CPU the frame is the fastest index, so neighbouring threads hold neighbouring frames: whatever depends on the column,
//   the row or the filter is the same for many of them. A thread takes four frames where that saves reading it again: in the
//   columns, of a TunedShape, frames f, f + G, f + 2 G and f + 3 G, for which z has four parts (spot), in the filters V of them
//   side by side. Paddings keep the threads of a warp in different banks.
//     samples  -- read once, coalesced; frames overlap in place ------->  x    [span], see Layout::skew
//     x        -- DC, pre-emphasis, window, columns of the transform -->  z    [F/G][R/2 + 1][S][G], in two planes
//     z        -- rows of the transform, in place --------------------->  power [K][F], over x
//     power    -- sparse filters, log ---------------------------------->  v    [M][F | 1], over z
//     v        -- range, affine, DCT ---------------------------------->  features, coalesced in either layout
//
// Note: [Cost on a GPU], per frame at 400 / 160 / 80
//   10.5 k floating point operations, 960 bytes of device memory: floors on an H200 of 4.5 G frames/s (4.3 TB/s) and, at 35 %
//   of its 67 TFLOP/s, 2.2 G. Shared memory and L1: 95 wavefronts, one a cycle of a multiprocessor. Instructions: about 645 of a
//   warp for 32 frames each, at most four a cycle: 161 cycles. Measured on an H200: 1.03 G frames/s. benchmarks/results/gpu.md has
//   the parts.
#pragma once

#include <type_traits>

#include "mel/mel_block_shape.h"

namespace mmfast {
namespace mel {

// A tile: the frames [frame, frame + frames) of a row, and the phases that compute them.
template <class T, class Shape, class Block>
struct Tile {
    const BlockJob<T>& job;
    const Shape& shape;
    const Block& block;
    const Layout& at;
    T* const memory;
    // Few and short, for they take registers from first to last. A tuned kernel has at most 2^30 tiles (Launch).
    using Index = std::conditional_t<Shape::tuned, uint32_t, int64_t>;
    Index index, row;
    int frames;  // of the row in this tile
    Planes<T> z;
    T maximum;  // of v over the group, once it is known

    MMFAST_INLINE Tile(const BlockJob<T>& j, const Shape& s, const Block& b, const Layout& layout, T* m, Index i)
        : job(j), shape(s), block(b), at(layout), memory(m), index(i), row(row_of(i)) {
        frames = limited(j.count(row) - frame());
        if constexpr (Shape::tuned) z = {m, m + Shape::plane()};  // a distance that the compiler knows
        else z = {m + at.z, m + at.z + at.plane};
        maximum = j.maxima ? j.maxima[row / j.group] : T(0);
    }

    MMFAST_INLINE Index row_of(Index i) const {
        if constexpr (Shape::tuned) return at.row_of(i);
        else return i / Index(job.tiles);
    }
    MMFAST_INLINE Index tile() const { return index - row * Index(job.tiles); }  // of the row
    MMFAST_INLINE int64_t frame() const { return int64_t(tile()) * shape.frames(); }
    // Places for frames in the features.
    MMFAST_INLINE int here() const { return limited(job.frames - frame()); }
    MMFAST_INLINE int limited(int64_t n) const { return n <= 0 ? 0 : n < shape.frames() ? int(n) : shape.frames(); }
    MMFAST_INLINE T* x() const { return memory + at.x; }
    MMFAST_INLINE T* power() const { return memory + at.x; }
    MMFAST_INLINE T* part() const { return memory + at.part; }
    MMFAST_INLINE int window() const { return int(job.p.framing.window); }
    // Adds NaN to every band of a frame: in a dense product with the filters one infinite or NaN bin does that.
    MMFAST_INLINE void spoil(int f) const { memory[at.poison + f] = T(__builtin_nanf("")); }
    MMFAST_INLINE int64_t group() const { return row / job.group; }

    // ---- Samples ----------------------------------------------------------------------------------------------------

    MMFAST_INLINE T signal(int64_t i) const {
        const int64_t base = row * job.row_stride;
        const T value = load_as<T>(job.data, job.type, base + i * job.sample_stride);
        if (job.signal_preemphasis == 0 || i == 0) return value;
        return value - job.signal_preemphasis * load_as<T>(job.data, job.type, base + (i - 1) * job.sample_stride);
    }

    template <class Sample, class Convert>
    MMFAST_INLINE void stage_inside(int64_t begin, int used, const Convert& convert) const {
        const Sample* const from = static_cast<const Sample*>(job.data) + row * job.row_stride + begin;
        T* const to = x();
        if constexpr (Shape::tuned && sizeof(Sample) == sizeof(T)) {  // then it is float
            using Four = Together<4, T>;
            if ((at.step | at.pad | used) % 4 == 0 && reinterpret_cast<uintptr_t>(from) % sizeof(Four) == 0) {
                block.fetch(
                    used / 4, [&](int q) { return reinterpret_cast<const Four*>(from) + q; },
                    [&](int q) { return to + at.skew(4 * q); });
                return;
            }
        }
        block.copy(used, [&](int q) { return T(convert(from[q])); }, [&](int q, T value) { to[at.skew(q)] = value; });
    }

    MMFAST_INLINE void stage() const {
        const Framing& f = job.p.framing;
        const int64_t begin = f.first + frame() * f.hop, length = job.row_length(row);
        const int used = (frames - 1) * at.step + window();
        if (f.hop <= f.window && begin >= 0 && begin + used <= length && job.sample_stride == 1 &&
            job.signal_preemphasis == 0 && sizeof(T) == 4) {
            if (job.type == ScalarType::float32) {  // first, for it is the usual one
                stage_inside<float>(begin, used, [](float sample) { return sample; });
                return;
            }
            switch (job.type) {
                case ScalarType::float16:
                    stage_inside<uint16_t>(begin, used, [](uint16_t bits) { return half_to_float(bits); });
                    return;
                case ScalarType::bfloat16:
                    stage_inside<uint16_t>(begin, used, [](uint16_t bits) { return bfloat_to_float(bits); });
                    return;
                default: stage_inside<int16_t>(begin, used, [](int16_t sample) { return sample; }); return;
            }
        }
        T* const to = x();
        block.each(used, [&](int q) {
            const int64_t position = begin + (f.hop <= f.window ? q : q / at.step * f.hop + q % at.step);
            const int64_t i = f.source(position, length);
            to[at.skew(q)] = i < 0 ? T(0) : signal(i);
        });
    }

    // Where frame f begins in x; frames past the last one read its samples.
    MMFAST_INLINE const T* begin_of(int f) const { return x() + (f < frames ? f : frames - 1) * (at.step + at.pad); }
    // Sample n of frame f as staged.
    MMFAST_INLINE T staged(int f, int n) const { return begin_of(f)[at.skew(n)]; }
    // The same with scale and dither.
    MMFAST_INLINE T scaled(int f, int n) const {
        T y = staged(f, n) * job.p.input_scale;
        if constexpr (!Shape::tuned)
            if (job.p.dither != 0) y += job.p.dither * dither_noise<T>(job.p.seed, row, frame() + f, n);
        return y;
    }
    MMFAST_INLINE T centred(int f, int n) const { return scaled(f, n) - memory[at.mean + f]; }
    MMFAST_INLINE T conditioned(int f, int n) const {
        const T y = centred(f, n);
        return job.p.preemphasis == 0 ? y : y - centred(f, n ? n - 1 : 0) * job.p.preemphasis;
    }

    // to[f] = last(sum over n < count of value(f, n)) for every frame, in parts. Frames and samples of a warp as in columns().
    template <class Value>
    MMFAST_INLINE void sum_frames(int count, T* to, const Value& value) const {
        sum_frames(count, to, value, [](T sum) { return sum; });
    }
    template <class Value, class Last>
    MMFAST_INLINE void sum_frames(int count, T* to, const Value& value, const Last& last) const {
        const int F = shape.frames(), G = shape.together();
        T* const parts = part();
        block.each(kParts * F, [&](int i) {
            const int f = i / (G * kParts) * G + i % G, first = i / G % kParts;
            T sum = 0;
            for (int n = first; n < count; n += kParts) sum += value(f, n);
            parts[first * F + f] = sum;
        });
        block.each(F, [&](int f) {
            T sum = 0;
            for (int i = 0; i < kParts; ++i) sum += parts[i * F + f];
            to[f] = last(sum);
        });
    }

    // Mean and energy of the frames.
    MMFAST_INLINE void condition() const {
        const MelParams<T>& p = job.p;
        const int F = shape.frames();
        T* const mean = memory + at.mean;
        if (p.remove_dc) {
            sum_frames(
                window(), mean, [&](int f, int n) { return scaled(f, n); }, [&](T sum) { return sum / T(window()); });
        } else {
            block.each(F, [&](int f) { mean[f] = 0; });
        }
        if (p.energy == Energy::none) return;
        if (p.raw_energy) {
            sum_frames(window(), memory + at.energy, [&](int f, int n) {
                const T y = centred(f, n);
                return y * y;
            });
        } else {
            sum_frames(window(), memory + at.energy, [&](int f, int n) {
                const T y = conditioned(f, n) * p.energy_window[n];
                return y * y;
            });
        }
    }

    MMFAST_INLINE T log_energy(int f) const {
        const T least = T(0x1p-23), sum = memory[at.energy + f];  // Kaldi: the float32 epsilon
        const T e = log_of(sum < least ? least : sum);
        return job.p.has_energy_floor && e < job.p.log_energy_floor ? job.p.log_energy_floor : e;
    }

    // ---- Transform --------------------------------------------------------------------------------------------------

    // Samples to z; no frame is spoilt yet.
    template <int R>
    MMFAST_INLINE void columns() const;
    template <bool kConditions>
    MMFAST_INLINE void tuned_columns() const;

    // Output j of row k1 of the second step of a TunedShape is this bin, or its conjugate. Where another output gives it too,
    // only one of them is its `source`.
    static MMFAST_INLINE constexpr int bin_of(int k1, int a, int j) {
        const int bin = k1 + 16 * (a + Shape::A * j);
        return 2 * j < Shape::P ? bin : Shape::n() - bin;
    }
    static MMFAST_INLINE constexpr bool source(int k1, int a, int j) {
        return 2 * j < Shape::P || k1 % 8 != 0 || (2 * j == Shape::P && k1 == 0 && a == 0);
    }
    // Where z holds a bin (or its conjugate).
    MMFAST_INLINE int place_of(int bin) const {
        const int R = shape.radix();
        int k1 = bin % R;
        if (2 * k1 > R) {
            bin = shape.n() - bin;
            k1 = R - k1;
        }
        return k1 * shape.stride() + shape.slot(bin / R);
    }
    // Where frame f of a place of z stands.
    MMFAST_INLINE int spot(int place, int f) const {
        const int G = shape.together();
        return f / G * shape.group_stride() + place * G + f % G;
    }

    template <bool kKeep>
    MMFAST_INLINE void tuned_rows() const;
    template <int R>
    MMFAST_INLINE void stage_of(const Planes<T>& from, const Planes<T>& to, int m, int s, const T* tw) const;
    MMFAST_INLINE void prime_stage_of(const Planes<T>& from, const Planes<T>& to, int m, int s, int r, const T* roots,
                                      const T* tw) const;
    MMFAST_INLINE void stages(const ComplexPlan<T>& c, Planes<T>& x, Planes<T>& w) const;
    MMFAST_INLINE void general_rows();
    template <bool kKeep>
    MMFAST_INLINE void analyse();

    // to[i][f] = m, band i of frame f, or v of it. A thread takes V frames, so that weights and places are read once for them.
    template <bool kCompress>
    MMFAST_INLINE void filter(T* to) const {
        constexpr int V = Shape::V;
        const int F = shape.frames(), items = F / V, lane_stride = at.lane_stride;
        const SparseFilters<T>& filters = job.filters;
        const T *const from = power(), *const poison = memory + at.poison;
        block.rising(int(job.bands()) * items, [&](int i) {  // mel filters are the wider the higher they are
            using Frames = Together<V, T>;
            const int f = i % items * V, band = i / items;
            Frames a = Frames::of(poison + f), b{};
            if (filters.rows) {
                const T* in = from + filters.row_first[band] * F + f;
                const T* w = filters.weights + 2 * band;
                const int64_t pair = 2 * filters.rows;
                const auto add = [&](const Together<2, T>& two, const Frames& p0, const Frames& p1) {
                    MMFAST_UNROLL
                    for (int v = 0; v < V; ++v) {
                        a.value[v] += p0.value[v] * two.value[0];
                        b.value[v] += p1.value[v] * two.value[1];
                    }
                };
                // Four bins at once, or a thread would wait for memory at each second one.
                int j = filters.row_count[band];
                MMFAST_ROLLED
                for (; j > 2; j -= 4, in += 4 * F, w += 2 * pair) {
                    const auto first = Together<2, T>::of(w), second = Together<2, T>::of(w + pair);
                    const Frames p0 = Frames::of(in), p1 = Frames::of(in + F), p2 = Frames::of(in + 2 * F),
                                 p3 = Frames::of(in + 3 * F);
                    add(first, p0, p1);
                    add(second, p2, p3);
                }
                if (j > 0) add(Together<2, T>::of(w), Frames::of(in), Frames::of(in + F));
            } else {
                a = Frames::of(from + band * F + f);
            }
            MMFAST_UNROLL
            for (int v = 0; v < V; ++v) a.value[v] += b.value[v];
            if (kCompress) compress_values<V>(job.p, a.value);
            MMFAST_UNROLL
            for (int v = 0; v < V; ++v) to[band * lane_stride + f + v] = a.value[v];
        });
    }

    // Extrema over the tile of value(i, f), band i of frame f, left in part()[0] and part()[F].
    template <class Value>
    MMFAST_INLINE void extrema(const Value& value) const {
        const int F = shape.frames(), bands = int(job.bands());
        T* const parts = part();
        block.each(kParts * F, [&](int i) {
            Extrema<T> e{infinity_of<T>(), -infinity_of<T>()};
            for (int band = i / F; band < bands && i % F < frames; band += kParts) {
                const T v = value(band, i % F);
                widen(e, v, v);
            }
            parts[i] = e.lowest;
            parts[kParts * F + i] = e.highest;
        });
        block.each(F, [&](int f) {
            Extrema<T> e{parts[f], parts[kParts * F + f]};
            for (int i = 1; i < kParts; ++i) widen(e, parts[i * F + f], parts[(kParts + i) * F + f]);
            parts[f] = e.lowest;
            parts[kParts * F + f] = e.highest;
        });
        block.each(1, [&](int) {
            Extrema<T> e{parts[0], parts[kParts * F]};
            for (int f = 1; f < F; ++f) widen(e, parts[f], parts[kParts * F + f]);
            parts[0] = e.lowest;
            parts[kParts * F] = e.highest;
        });
    }

    // ---- Features ---------------------------------------------------------------------------------------------------

    // f(frame, feature, index into the features) for the `here` frames of the tile, neighbours in memory by neighbouring threads.
    template <class F>
    MMFAST_INLINE void each_feature(const F& f) const {
        const int n = int(job.feature_count);
        const int64_t base = row * job.feature_count * job.frames;
        if (job.p.time_major) {
            block.each(n * here(), [&](int i) {
                const int q = at.line(i, n);
                f(q, i - q * n, base + frame() * n + i);
            });
        } else {
            const int L = shape.frames();
            block.each(n * L, [&](int i) {
                if (i % L < here()) f(i % L, i / L, base + (i / L) * job.frames + frame() + i % L);
            });
        }
    }
    MMFAST_INLINE bool is_energy(int feature) const {
        const Energy e = job.p.energy;
        if (e == Energy::none) return false;
        return e == Energy::prepend || e == Energy::replace_first ? feature == 0 : feature == job.feature_count - 1;
    }

    MMFAST_INLINE void dct() const {
        constexpr int kBlock = 8;
        const int F = shape.frames(), bands = int(job.bands()), count = int(job.p.cepstra),
                  lane_stride = at.lane_stride;
        const T *const v = memory + at.v, *const table = job.p.dct;
        T* const out = memory + at.cepstra;
        block.each((count + kBlock - 1) / kBlock * F, [&](int i) {
            const int f = i % F, first = i / F * kBlock;
            T sum[kBlock] = {};
            for (int band = 0; band < bands; ++band) {
                const T value = v[band * lane_stride + f];
                const T* const row_ = table + int64_t(band) * count + first;
                MMFAST_UNROLL
                for (int j = 0; j < kBlock; ++j)
                    if (first + j < count) sum[j] += value * row_[j];
            }
            MMFAST_UNROLL
            for (int j = 0; j < kBlock; ++j)
                if (first + j < count) out[(first + j) * lane_stride + f] = sum[j];
        });
    }

    // Waveform to features. With job.clip it is the second round: the maxima are known.
    MMFAST_INLINE void forward() {
        const MelParams<T>& p = job.p;
        if (tile() == 0 && job.counts) block.each(1, [&](int) { job.counts[row] = job.count(row); });
        const auto threshold = [&] { return maximum - p.top_db; };  // anew each time: registers are dear
        if (job.clip && (frames == 0 || job.extrema[index].lowest >= threshold())) return;
        if (frames > 0) {
            analyse<false>();
            T* const v = memory + at.v;
            if (p.has_top_db && !job.clip) {
                filter<true>(v);
                extrema([&](int band, int f) { return v[band * at.lane_stride + f]; });
            } else {
                filter<true>(v);
            }
            if (job.clip || p.output_offset != 0 || p.output_scale != 1) {
                const int F = shape.frames();
                block.each(int(job.bands()) * F, [&](int i) {
                    T& value = v[i / F * at.lane_stride + i % F];
                    value = ((job.clip ? clip_value(value, threshold()) : value) + p.output_offset) * p.output_scale;
                });
            }
            if (p.cepstra) dct();
        }
        if (job.extrema && !job.clip) {
            block.each(1, [&](int) {
                Extrema<T> e{infinity_of<T>(), -infinity_of<T>()};
                if (frames > 0) e = {part()[0], part()[kParts * shape.frames()]};
                job.extrema[index] = e;
            });
        }
        switch (job.out_type) {
            case ScalarType::float16: store<uint16_t>([](T x) { return float_to_half(float(x)); }); break;
            case ScalarType::bfloat16: store<uint16_t>([](T x) { return float_to_bfloat(float(x)); }); break;
            case ScalarType::float64: store<double>([](T x) { return double(x); }); break;
            default: store<float>([](T x) { return float(x); });
        }
    }

    template <class Out, class Convert>
    MMFAST_INLINE void store(const Convert& convert) const {
        const int n = int(job.feature_count), L = shape.frames(), lane_stride = at.lane_stride;
        const Energy kind = job.p.energy;
        const bool before = kind == Energy::prepend || kind == Energy::replace_first,
                   after = kind != Energy::none && !before;
        const T* const from =
            memory + (job.p.cepstra ? at.cepstra : at.v) - (kind == Energy::prepend ? lane_stride : 0);
        Out* const to = static_cast<Out*>(job.features) + row * job.feature_count * job.frames;
        if (job.p.time_major) {
            each_feature([&](int f, int c, int64_t) {
                T x = job.fill;
                if (f < frames) x = is_energy(c) ? log_energy(f) : from[c * lane_stride + f];
                to[(frame() + f) * n + c] = convert(x);
            });
            return;
        }
        // What does not depend on the feature is asked once: of each feature a thread only reads a value and writes it.
        block.lanes(L, n, [&](int f, int first, int step) {
            if (f >= here()) return;
            Out* const column = to + frame() + f;
            const int64_t stride = int64_t(step) * job.frames;
            if (f >= frames) {
                Out* place = column + first * job.frames;
                MMFAST_ROLLED
                for (int c = first; c < n; c += step, place += stride) *place = convert(job.fill);
                return;
            }
            const int begin = before && first == 0 ? step : first, end = after ? n - 1 : n;
            const T* value = from + begin * lane_stride + f;
            Out* place = column + begin * job.frames;
            MMFAST_BY_THREE
            for (int c = begin; c < end; c += step, place += stride, value += step * lane_stride)
                *place = convert(*value);
            if (kind == Energy::none) return;
            const int energy = before ? 0 : n - 1;
            if (energy % step == first) column[energy * job.frames] = convert(log_energy(f));
        });
    }

    // Second round without a DCT: the features that lie below the threshold are raised in place.
    MMFAST_INLINE void clip_features() const {
        const MelParams<T>& p = job.p;
        const T threshold = maximum - p.top_db;
        if (frames == 0 || job.extrema[index].lowest >= threshold) return;
        const T raised = (threshold + p.output_offset) * p.output_scale;
        switch (job.out_type) {
            case ScalarType::float16:
                raise_features<1, uint16_t>(
                    raised, [](uint16_t bits) { return half_to_float(bits); },
                    [](T x) { return float_to_half(float(x)); });
                break;
            case ScalarType::bfloat16:
                raise_features<1, uint16_t>(
                    raised, [](uint16_t bits) { return bfloat_to_float(bits); },
                    [](T x) { return float_to_bfloat(float(x)); });
                break;
            case ScalarType::float64:
                raise_features<1, double>(raised, [](double x) { return x; }, [](T x) { return double(x); });
                break;
            default:
                const int64_t row_size = p.time_major ? job.feature_count * job.frames : job.frames;
                const auto same = [](float x) { return x; };
                const auto out = [](T x) { return float(x); };
                if (row_size % 4 == 0 && shape.frames() % 4 == 0) raise_features<4, float>(raised, same, out);
                else raise_features<1, float>(raised, same, out);
        }
    }

    // N features that lie side by side at once: the memory is far away, and there is nothing to do until they come.
    template <int N, class Out, class In, class Convert>
    MMFAST_INLINE void raise_features(T raised, const In& in, const Convert& convert) const {
        using Some = Together<N, Out>;
        const bool time_major = job.p.time_major, all = raised != raised, energies = job.p.energy != Energy::none;
        const int n = int(job.feature_count), each = time_major ? n * frames : shape.frames() / N;
        const uint32_t reciprocal = reciprocal_of(uint32_t(each));
        Out* const to =
            static_cast<Out*>(job.features) + row * job.feature_count * job.frames + frame() * (time_major ? n : 1);
        const Out value = convert(raised);
        // Of a feature's frames in a tile: past the last one, read what is there already, and write nothing.
        const int last = (frames - 1) / N;
        const auto line = [&](int i) { return each > 1 ? quotient(i, reciprocal) : i; };
        const auto place = [&](int i) {
            if (time_major) return to + int64_t(i) * N;
            const int c = line(i), q = i - c * each;
            return to + c * job.frames + (q < last ? q : last) * N;
        };
        block.copy(
            time_major ? (each + N - 1) / N : n * each, [&](int i) { return Some::of(place(i)); },
            [&](int i, Some some) {
                const int c = time_major ? 0 : line(i), first = (time_major ? i : i - c * each) * N;
                const int end = time_major ? each : frames;
                if (energies && !time_major && is_energy(c)) return;
                bool changed = false;
                MMFAST_UNROLL
                for (int v = 0; v < N; ++v) {
                    if (first + v >= end || !(all || T(in(some.value[v])) < raised)) continue;
                    if (energies && time_major && is_energy(first + v - at.line(first + v, n) * n)) continue;
                    some.value[v] = value;
                    changed = true;
                }
                if (changed) some.to(place(i));
            });
    }

    MMFAST_INLINE void backward(int64_t slot);
    MMFAST_INLINE void band_gradients() const;
    MMFAST_INLINE void filter_gradients(int64_t slot) const;
    MMFAST_INLINE void tuned_rows_adjoint() const;
    MMFAST_INLINE void tuned_columns_adjoint() const;
    template <int R>
    MMFAST_INLINE void columns_adjoint() const;
    MMFAST_INLINE void spectrum_adjoint();
    // Gradient of sample n of frame f after the window, from z.
    MMFAST_INLINE T windowed_gradient(int f, int n) const {
        const int r = n / shape.columns();
        const T* const from = r % 2 ? z.im : z.re;
        return from[spot(r / 2 * shape.stride() + n % shape.columns(), f)];
    }
    MMFAST_INLINE T sample_gradient(int f, int n) const;
    template <class Put>
    MMFAST_INLINE void tuned_overlap_add(const Put& put) const;
    MMFAST_INLINE void overlap_add() const;
};

}  // namespace mel
}  // namespace mmfast
