// What the driver of the tile kernels (mel_cpu.cpp) knows of a call: parameters, samples and where features go.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/isa.h"
#include "mel/mel.h"

namespace mmfast {
namespace mel {

template <class T>
MelKernels<T> kernels();
template <>
inline MelKernels<float> kernels<float>() {
    return MMFAST_FOR_ISA(best_isa(), mel, kernels_float)();
}
template <>
inline MelKernels<double> kernels<double>() {
    return MMFAST_FOR_ISA(best_isa(), mel, kernels_double)();
}

// Where a tile begins: a frame of a row and of the `rows - 1` rows after it.
struct Place {
    int64_t row, frame, rows = 1;
};

// One call: the parameters the kernels read and what they point to.
template <class T>
struct Job {
    const Spec& spec;
    const Waveform& wave;
    MelKernels<T> kernel = kernels<T>();
    MelParams<T> p;
    int64_t frames, tiles, features, group, groups;
    int64_t sharing = 1;  // so many rows have their last frames in one tile; for Places of place()
    std::vector<T> window;
    std::unique_ptr<CompactFilters<T>> own_filters;

    Job(const Plan& plan, const Waveform& w, const Tables<T>& tables, int64_t group_, uint32_t seed, bool by_bin)
        : spec(plan.spec), wave(w) {
        p = kernel_params<T>(spec, seed);
        p.fft = plan.tile_fft<T>();
        p.cepstra = tables.cepstra;
        p.dct = tables.dct;
        p.dct_mirrored = tables.cepstra > 0 && mirrored(tables.dct, tables.n_filters, tables.cepstra);
        set_window(tables.window);
        if (tables.filters) set_filters(plan, tables.filters, tables.n_filters, by_bin);
        frames = p.framing.count(wave.length);
        tiles = (frames + kernel.lanes - 1) / kernel.lanes;
        features = feature_count(spec, tables.n_filters, tables.cepstra);
        group = group_ > 0 ? group_ : std::max<int64_t>(1, wave.rows);
        groups = (wave.rows + group - 1) / group;
        const int64_t tail = frames - (tiles - 1) * kernel.lanes;
        // Not with what depends on a row or has each its own number of frames.
        if (tiles && !wave.lengths && !p.has_top_db && p.dither == 0)
            sharing = std::clamp<int64_t>(kernel.lanes / tail, 1, std::max<int64_t>(1, wave.rows));
    }

    // Note: [Shared tails]
    //   The last tile of a row computes lanes that nobody asked for: of 256 clips of a second, 101 frames each, every seventh
    //   tile is two thirds empty. Where at least two tails fit into one tile, rows go in groups of `sharing`: first the other
    //   tiles of each, row by row, then one for the tails of all, read and written where they belong. A lane knows nothing of
    //   its neighbours, so no number changes. Such a tile can not take overlapping samples from the next lane.
    int64_t all_tiles() const { return tiles ? wave.rows * (tiles - 1) + (wave.rows + sharing - 1) / sharing : 0; }
    Place place(int64_t i) const {
        const int64_t full = tiles - 1, each = sharing * full + 1;
        const int64_t row = i / each * sharing, rows = std::min(sharing, wave.rows - row), j = i % each;
        if (j < rows * full) return {row + j / full, j % full * kernel.lanes};
        return {row, full * kernel.lanes, rows};
    }

    // To the last place of each number: not a table that was computed less exactly, or none of a DCT at all.
    static bool mirrored(const T* dct, int64_t rows, int64_t columns) {
        for (int64_t i = 0; i < rows / 2; ++i) {
            const T *a = dct + i * columns, *b = dct + (rows - 1 - i) * columns;
            for (int64_t j = 0; j < columns; ++j) {
                const T far = j % 2 ? -b[j] : b[j];
                const T size = std::max(std::abs(a[j]), std::abs(far)), eps = std::numeric_limits<T>::epsilon();
                if (!(std::abs(a[j] - far) <= eps * size || size <= eps * T(1e-6))) return false;
            }
        }
        // The middle row of an odd number is its own mirror image: its odd columns are taken as zero.
        if (rows % 2)
            for (int64_t j = 1; j < columns; j += 2)
                if (std::abs(dct[rows / 2 * columns + j]) > std::numeric_limits<T>::epsilon()) return false;
        return true;
    }

    void set_window(const T* given) {
        const int64_t n = p.framing.window;
        p.window = p.energy_window = given;
        if (!spec.normalized) return;
        double sum = 0;
        for (int64_t i = 0; i < n; ++i) sum += double(given[i]) * double(given[i]);
        const double scale = 1 / std::sqrt(spec.normalized == 1 ? sum : double(spec.n_fft));
        window.resize(n);
        for (int64_t i = 0; i < n; ++i) window[i] = T(given[i] * scale);
        p.window = window.data();
    }

    void set_filters(const Plan& plan, const T* dense, int64_t rows, bool by_bin) {
        const CompactFilters<T>* sparse = plan.prepared(dense, rows);
        if (!sparse) {
            own_filters = std::make_unique<CompactFilters<T>>(dense, p.bins(), rows, by_bin);
            sparse = own_filters.get();
        }
        p.filters = sparse->view();
    }

    int64_t length(int64_t row) const {
        return wave.lengths ? std::clamp<int64_t>(wave.lengths[row], 0, wave.length) : wave.length;
    }
    int64_t count(int64_t row) const { return std::min(frames, p.framing.count(length(row))); }

    // Roughly the nanoseconds of a tile, to judge whether another thread is worth waking.
    double tile_cost() const { return 8.0 * double(spec.n_fft) + 0.5 * double(p.bands() * p.cepstra); }

    // Samples that staging a tile takes: of each of its rows one run of frames or two.
    int64_t staging() const {
        return std::min(p.framing.hop, p.framing.window) * (kernel.lanes - 1) + 2 * sharing * p.framing.window;
    }

    // Points the lanes of `t` at `count` frames of each row of `at`.
    void point(const Place& at, int count, T* staged, FrameTile<T>& t) const {
        t.frames = int(at.rows) * count;
        t.rows = int(at.rows);
        t.row = at.row;
        t.frame = at.frame;
        for (int r = 0; r < t.rows; ++r) staged = point(at.row + r, at.frame, count, staged, t.lane + r * count);
        for (int i = t.frames; i < kernel.lanes; ++i) t.lane[i] = t.lane[t.frames - 1];
    }

    // Into the waveform itself where it is contiguous and in T. Frames that reach outside the signal, the first or the last of a
    // row, are staged. Returns the end of what was.
    T* point(int64_t row, int64_t frame, int count, T* staged, const T** lane) const {
        const Framing& f = p.framing;
        const int64_t begin = f.first + frame * f.hop, end = begin + (count - 1) * f.hop + f.window;
        int early = count, late = 0;
        if (readable_in_place()) {
            const auto frames_over = [&](int64_t samples) {
                return int(std::clamp<int64_t>((samples + f.hop - 1) / f.hop, 0, count));
            };
            early = frames_over(-begin);
            late = std::min(count - early, frames_over(end - length(row)));
        }
        staged = stage_frames(row, begin, early, staged, lane);
        const T* const x = static_cast<const T*>(wave.data) + row * wave.row_stride;
        for (int i = early; i < count - late; ++i) lane[i] = x + (begin + i * f.hop);
        return stage_frames(row, begin + (count - late) * f.hop, late, staged, lane + count - late);
    }

    bool readable_in_place() const {
        return wave.type == scalar_type_of<T>() && wave.sample_stride == 1 && !signal_preemphasis();
    }

    // `count` frames from `begin` on: frames that overlap are staged as one run. Returns the end of it.
    T* stage_frames(int64_t row, int64_t begin, int count, T* to, const T** lane) const {
        const int64_t hop = p.framing.hop, window = p.framing.window, step = std::min(hop, window);
        const int together = hop <= window ? count : 1;
        for (int i = 0; i < count; ++i) lane[i] = to + i * step;
        for (int i = 0; i < count; i += together)
            stage(row, begin + i * hop, begin + (i + together - 1) * hop + window, to + i * step);
        return count ? to + (count - 1) * step + window : to;
    }

    // What will be read after the tile at `at`, as far as it lies in the waveform.
    void announce_after(const Place& at, FrameTile<T>& t) const {
        const int64_t frame = at.frame + kernel.lanes;
        if (frame < frames) announce(at.row, frame, true, t);
        else if (sharing == 1) announce(at.row + 1, 0, false, t);
        if (sharing == 1 || frame >= frames || frame + kernel.lanes < frames || wave.row_stride != wave.length) return;
        // The turn of the tail comes later, at once that of the next row, which stands beside it.
        FrameTile<T> next;
        announce(at.row + 1, 0, false, next);
        if (next.next) t.next_end = next.next_end;
    }
    // What the tile at `frame` of a row will read; with `follows`, only what is new after the tile before it.
    void announce(int64_t row, int64_t frame, bool follows, FrameTile<T>& t) const {
        t.next = t.next_end = nullptr;
        if (row >= wave.rows || wave.type != scalar_type_of<T>() || wave.sample_stride != 1) return;
        const Framing& f = p.framing;
        const int64_t begin = f.first + frame * f.hop, span = (kernel.lanes - 1) * f.hop + f.window;
        const int64_t known = follows ? std::max<int64_t>(0, f.window - f.hop) : 0;
        const T* const x = static_cast<const T*>(wave.data) + row * wave.row_stride;
        t.next = x + std::clamp<int64_t>(begin + known, 0, wave.length);
        t.next_end = x + std::clamp<int64_t>(begin + span, 0, wave.length);
    }

    // How loud frames [frame, frame + count) are, never NaN: the sum of squares of some of their samples, few cache lines of the
    // waveform.
    float loudness(int64_t row, int64_t frame, int64_t count) const {
        const auto [low, high] = inside(row, frame, count);
        float result = 0;
        dispatch(wave.type, [&, first = low, last = high](auto* kind) {
            using Sample = std::remove_pointer_t<decltype(kind)>;
            const Sample* const x = static_cast<const Sample*>(wave.data) + row * wave.row_stride;
            const auto look = [&](int64_t stride) { result = some_samples(x, stride, first, last); };
            wave.sample_stride == 1 ? look(1) : look(wave.sample_stride);
        });
        return never_nan(result);
    }
    // Asks for what loudness() will read: one line here and one there, which no core foresees.
    void announce_look(int64_t row, int64_t frame, int64_t count) const {
        const auto [low, high] = inside(row, frame, count);
        dispatch(wave.type, [&, first = low, last = high](auto* kind) {
            using Sample = std::remove_pointer_t<decltype(kind)>;
            const Sample* const x = static_cast<const Sample*>(wave.data) + row * wave.row_stride;
            if (wave.sample_stride != 1) return;
            for (int64_t q = first_line(x, first); q + kLook <= last; q += kEvery) __builtin_prefetch(x + q);
        });
    }
    std::pair<int64_t, int64_t> inside(int64_t row, int64_t frame, int64_t count) const {
        const int64_t begin = p.framing.first + frame * p.framing.hop;
        const int64_t low = std::clamp<int64_t>(begin, 0, length(row));
        return {low, std::clamp<int64_t>(begin + (count - 1) * p.framing.hop + p.framing.window, low, length(row))};
    }
    static float never_nan(float x) { return x >= 0 ? x : std::numeric_limits<float>::infinity(); }

    // Of so many samples so many are looked at.
    static constexpr int64_t kEvery = 256, kLook = 16;
    // The first sample from x + q on that begins a cache line.
    template <class Sample>
    static int64_t first_line(const Sample* x, int64_t q) {
        constexpr intptr_t kLine = 64 / sizeof(Sample);
        return q + (-(reinterpret_cast<intptr_t>(x + q) / intptr_t(sizeof(Sample))) & (kLine - 1));
    }
    template <class Sample>
    static float some_samples(const Sample* x, int64_t stride, int64_t low, int64_t high) {
        float sum[kLook] = {};
        for (int64_t q = stride == 1 ? first_line(x, low) : low; q + kLook <= high; q += kEvery) {
            for (int64_t i = 0; i < kLook; ++i) {
                const float value = float(x[(q + i) * stride]);
                sum[i] += value * value;
            }
        }
        return std::accumulate(sum, sum + kLook, 0.0f);
    }

    bool signal_preemphasis() const { return spec.preemphasis_of_signal && spec.preemphasis != 0; }

    // Samples [begin, end) of the extended signal.
    void stage(int64_t row, int64_t begin, int64_t end, T* to) const {
        dispatch(wave.type, [&](auto* kind) {
            using Sample = std::remove_pointer_t<decltype(kind)>;
            const Sample* x = static_cast<const Sample*>(wave.data) + row * wave.row_stride;
            const int64_t stride = wave.sample_stride, n = length(row);
            const int64_t low = std::clamp<int64_t>(0, begin, end), high = std::clamp<int64_t>(n, low, end);
            const T c = signal_preemphasis() ? T(spec.preemphasis) : T(0);
            const auto sample = [&](int64_t i) {
                const T value = T(x[i * stride]);
                return c != 0 && i > 0 ? value - c * T(x[(i - 1) * stride]) : value;
            };
            const auto outside = [&](int64_t q, int64_t stop) {
                if (q >= stop) return;
                const int64_t first = p.framing.source(q, n), last = p.framing.source(stop - 1, n);
                T* const out = to + (q - begin);
                // One reflection: samples in reverse.
                if (c == 0 && stride == 1 && p.framing.pad == 0 && last >= 0 && first - last == stop - 1 - q) {
                    std::reverse_copy(x + last, x + first + 1, out);
                    return;
                }
                for (int64_t k = 0; k < stop - q; ++k) {
                    const int64_t i = p.framing.source(q + k, n);
                    out[k] = i < 0 ? T(0) : sample(i);
                }
            };
            outside(begin, low);
            if (c != 0) {
                for (int64_t q = low; q < high; ++q) to[q - begin] = sample(q);
            } else if (stride == 1 && low < high) {
                // Of its own, for it becomes a copy or vector code: the first and last tiles are staged.
                std::copy(x + low, x + high, to + (low - begin));
            } else {
                for (int64_t q = low; q < high; ++q) to[q - begin] = T(x[q * stride]);
            }
            outside(high, end);
        });
    }
};

// Where tile output goes: straight into the features, or through a small block when they are of another type.
template <class T>
class Output {
public:
    Output(const Job<T>& job, void* features, ScalarType type) : job_(job), out_(features), type_(type) {
        const bool tm = job.p.time_major;
        feature_stride_ = tm ? 1 : job.frames;
        frame_stride_ = tm ? job.features : 1;
        row_stride_ = job.features * job.frames;
    }
    bool direct() const { return type_ == scalar_type_of<T>(); }
    size_t scratch_bytes() const {
        const int64_t block = direct() ? 0 : job_.features * job_.kernel.lanes;
        return job_.kernel.forward_scratch(job_.p) + (job_.staging() + block) * sizeof(T);
    }

    // Readies a tile: frames past the end of the row are filled; false if there are no others.
    bool begin(const Place& at, const int64_t* counts, char* scratch, FrameTile<T>& t) const {
        const int64_t row = at.row, lanes = job_.kernel.lanes, frame = at.frame;
        const int64_t inside = std::clamp<int64_t>(counts[row] - frame, 0, lanes);
        const int64_t here = std::min<int64_t>(lanes, job_.frames - frame);
        if (inside < here) fill(row, frame + inside, here - inside);
        if (inside == 0) return false;
        T* const staged = reinterpret_cast<T*>(scratch + job_.kernel.forward_scratch(job_.p));
        job_.point(at, int(inside), staged, t);
        job_.announce_after(at, t);
        if (!direct()) {
            t.out = staged + job_.staging();
            t.feature_stride = lanes;
            t.frame_stride = 1;
            t.row_stride = inside;
            return true;
        }
        t.out = static_cast<T*>(out_) + row * row_stride_ + frame * frame_stride_;
        t.feature_stride = feature_stride_;
        t.frame_stride = frame_stride_;
        t.row_stride = row_stride_;
        t.next_out_begins = frame + lanes >= job_.frames || (job_.sharing > 1 && frame + 2 * lanes >= job_.frames);
        if (!t.next_out_begins) t.next_out = t.out + lanes * frame_stride_;
        else if (at.rows == 1 && row + 1 < job_.wave.rows) t.next_out = static_cast<T*>(out_) + (row + 1) * row_stride_;
        return true;
    }
    bool begin(int64_t i, const int64_t* counts, char* scratch, FrameTile<T>& t) const {
        return begin({i / job_.tiles, i % job_.tiles * job_.kernel.lanes}, counts, scratch, t);
    }
    void end(const FrameTile<T>& t) const {
        if (direct()) return;
        for (int r = 0; r < t.rows; ++r)
            for_each(t.row + r, t.frame, t.frames / t.rows, 0, job_.features, [&](auto& value, int64_t f, int64_t c) {
                value = std::remove_reference_t<decltype(value)>(t.out[r * t.row_stride + c * t.feature_stride + f]);
            });
    }
    void fill(int64_t row, int64_t frame, int64_t frames) const {
        const T fill = T(job_.spec.fill);
        for_each(row, frame, frames, 0, job_.features,
                 [&](auto& value, int64_t, int64_t) { value = std::remove_reference_t<decltype(value)>(fill); });
    }
    // f(value, frame, feature) of features [c0, c1).
    template <class F>
    void for_each(int64_t row, int64_t frame, int64_t frames, int64_t c0, int64_t c1, const F& f) const {
        dispatch(type_, [&](auto* kind) {
            using Value = std::remove_pointer_t<decltype(kind)>;
            Value* const out = static_cast<Value*>(out_) + row * row_stride_ + frame * frame_stride_;
            if (frame_stride_ == 1) {
                for (int64_t c = c0; c < c1; ++c)
                    for (int64_t i = 0; i < frames; ++i) f(out[c * feature_stride_ + i], i, c);
            } else {
                for (int64_t i = 0; i < frames; ++i)
                    for (int64_t c = c0; c < c1; ++c) f(out[i * frame_stride_ + c], i, c);
            }
        });
    }

private:
    const Job<T>& job_;
    void* out_;
    ScalarType type_;
    int64_t feature_stride_, frame_stride_, row_stride_;
};

}  // namespace mel
}  // namespace mmfast
