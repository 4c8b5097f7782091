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

// One call: the parameters the kernels read and what they point to.
template <class T>
struct Job {
    const Spec& spec;
    const Waveform& wave;
    MelKernels<T> kernel = kernels<T>();
    MelParams<T> p;
    int64_t frames, tiles, features, group, groups;
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

    // Samples that staging a tile takes, in one run of frames or in two.
    int64_t staging() const {
        return std::min(p.framing.hop, p.framing.window) * (kernel.lanes - 1) + 2 * p.framing.window;
    }

    // Points the lanes of `t` at frames [frame, frame + count) of a row: into the waveform itself where it is contiguous and in T.
    // Frames that reach outside the signal, the first or the last of a row, are staged.
    void point(int64_t row, int64_t frame, int count, T* staged, FrameTile<T>& t) const {
        const Framing& f = p.framing;
        const int64_t begin = f.first + frame * f.hop, end = begin + (count - 1) * f.hop + f.window;
        t.frames = count;
        t.row = row;
        t.frame = frame;
        int early = count, late = 0;
        if (readable_in_place()) {
            const auto frames_over = [&](int64_t samples) {
                return int(std::clamp<int64_t>((samples + f.hop - 1) / f.hop, 0, count));
            };
            early = frames_over(-begin);
            late = std::min(count - early, frames_over(end - length(row)));
        }
        staged = stage_frames(row, begin, early, staged, t.lane);
        const T* const x = static_cast<const T*>(wave.data) + row * wave.row_stride;
        for (int i = early; i < count - late; ++i) t.lane[i] = x + (begin + i * f.hop);
        stage_frames(row, begin + (count - late) * f.hop, late, staged, t.lane + count - late);
        for (int i = count; i < kernel.lanes; ++i) t.lane[i] = t.lane[count - 1];
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

    // What the tile at `frame` of a row will read, as far as it lies in the waveform; with `follows`, only what is new after
    // the tile before it.
    void announce(int64_t row, int64_t frame, bool follows, FrameTile<T>& t) const {
        t.next = t.next_end = nullptr;
        if (wave.type != scalar_type_of<T>() || wave.sample_stride != 1) return;
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
    // The same of all samples of the loudest frame, in which a single band may stand out. `scratch` has room for a tile.
    float loudest_frame(int64_t row, int64_t frame, int64_t count, T* scratch) const {
        const auto [low, high] = inside(row, frame, count);
        const T* x = static_cast<const T*>(wave.data) + (row * wave.row_stride + low);
        if (!readable_in_place()) {
            stage(row, low, high, scratch);
            x = scratch;
        }
        return never_nan(kernel.loudest(p, x, high - low));
    }
    int64_t tile_samples() const { return (kernel.lanes - 1) * p.framing.hop + p.framing.window; }

    std::pair<int64_t, int64_t> inside(int64_t row, int64_t frame, int64_t count) const {
        const int64_t begin = p.framing.first + frame * p.framing.hop;
        const int64_t low = std::clamp<int64_t>(begin, 0, length(row));
        return {low, std::clamp<int64_t>(begin + (count - 1) * p.framing.hop + p.framing.window, low, length(row))};
    }
    static float never_nan(float x) { return x >= 0 ? x : std::numeric_limits<float>::infinity(); }

    template <class Sample>
    static float some_samples(const Sample* x, int64_t stride, int64_t low, int64_t high) {
        constexpr int64_t kEvery = 512, kLook = 16;
        float sum[kLook] = {};
        for (int64_t q = low; q + kLook <= high; q += kEvery) {
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
            const auto outside = [&](int64_t q) {
                const int64_t i = p.framing.source(q, n);
                return i < 0 ? T(0) : sample(i);
            };
            for (int64_t q = begin; q < low; ++q) to[q - begin] = outside(q);
            if (c != 0) {
                for (int64_t q = low; q < high; ++q) to[q - begin] = sample(q);
            } else if (stride == 1 && low < high) {
                // Of its own, for it becomes a copy or vector code: the first and last tiles are staged.
                std::copy(x + low, x + high, to + (low - begin));
            } else {
                for (int64_t q = low; q < high; ++q) to[q - begin] = T(x[q * stride]);
            }
            for (int64_t q = high; q < end; ++q) to[q - begin] = outside(q);
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

    // Readies tile i: frames past the end of the row are filled; false if there are no others.
    bool begin(int64_t i, const int64_t* counts, char* scratch, FrameTile<T>& t) const {
        const int64_t row = i / job_.tiles, lanes = job_.kernel.lanes, frame = i % job_.tiles * lanes;
        const int64_t inside = std::clamp<int64_t>(counts[row] - frame, 0, lanes);
        const int64_t here = std::min<int64_t>(lanes, job_.frames - frame);
        if (inside < here) fill(row, frame + inside, here - inside);
        if (inside == 0) return false;
        T* const staged = reinterpret_cast<T*>(scratch + job_.kernel.forward_scratch(job_.p));
        job_.point(row, frame, int(inside), staged, t);
        if (frame + lanes < job_.frames) job_.announce(row, frame + lanes, true, t);
        else if (row + 1 < job_.wave.rows) job_.announce(row + 1, 0, false, t);
        t.out = direct() ? static_cast<T*>(out_) + row * row_stride_ + frame * frame_stride_ : staged + job_.staging();
        t.feature_stride = direct() ? feature_stride_ : lanes;
        t.frame_stride = direct() ? frame_stride_ : 1;
        return true;
    }
    void end(const FrameTile<T>& t) const {
        if (direct()) return;
        for_each(t.row, t.frame, t.frames, 0, job_.features, [&](auto& value, int64_t f, int64_t c) {
            value = std::remove_reference_t<decltype(value)>(t.out[c * t.feature_stride + f]);
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
