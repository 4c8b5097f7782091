// Mel problems for test_mel.cpp, drawn at random or spelled out, and the way to hand one to the kernels.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "common/scalar_types.h"
#include "slow_mel.h"

namespace test {

using mmfast::ScalarType;

enum class Kind { center, valid, kaldi };

// MelConfig's first_sample, count_offset and min_length.
inline Framing framing_of(Kind kind, bool centred_window, int64_t n_fft, int64_t window, int64_t hop,
                          int64_t center_pad, int64_t pad, PadMode mode, bool drop_last) {
    const int64_t frame = centred_window ? n_fft : window;
    if (kind != Kind::center) {
        center_pad = 0;
    }
    Framing f{window, hop, 0, 0, 0, pad, kind == Kind::valid ? PadMode::constant : mode};
    if (kind == Kind::kaldi) {
        f.first = hop / 2 - window / 2 - pad;
        f.count_offset = hop / 2 + 2 * pad;
    } else {
        f.first = (centred_window ? (n_fft - window) / 2 : 0) - pad - center_pad;
        f.count_offset = 2 * (pad + center_pad) - frame + hop;
    }
    f.count_offset -= drop_last ? hop : 0;
    if (kind == Kind::valid || (kind == Kind::center && center_pad == 0)) {
        return f;
    }
    int64_t need = 1;
    if (mode == PadMode::reflect) {
        need = kind == Kind::kaldi ? window : center_pad + 1;
    } else if (mode == PadMode::circular) {
        need = center_pad;
    } else if (mode == PadMode::constant) {
        need = 0;
    }
    f.min_length = std::max<int64_t>(0, need - 2 * pad);
    return f;
}

// A problem, and how its waveform lies in memory.
struct Case {
    Problem problem;
    ScalarType in = ScalarType::float32, out = ScalarType::float32;
    int64_t sample_stride = 1, row_gap = 0, offset = 0;  // in samples; the buffer begins `offset` after aligned memory
    bool same_rows = false;                              // row_stride 0: every row is the first
    std::string name;

    int64_t row_stride() const {
        return same_rows ? 0 : std::max<int64_t>(0, (problem.length - 1) * sample_stride + 1) + row_gap;
    }
};

template <class T>
inline Real rounded(double x) {
    return Real(double(T(x)));
}

inline Real rounded(ScalarType type, double x) {
    Real y = 0;
    mmfast::dispatch(type, [&](auto* kind) {
        using Sample = std::remove_pointer_t<decltype(kind)>;
        y = Real(double(Sample(x)));
    });
    return y;
}

inline double rounding(ScalarType type) {  // half an ulp, relative
    switch (type) {
        case ScalarType::float16: return 0x1p-11;
        case ScalarType::bfloat16: return 0x1p-8;
        case ScalarType::float32: return 0x1p-24;
        default: return 0x1p-53;
    }
}

struct Wanted {
    bool gradient = false;    // smooth enough, and small
    bool exact_float = true;  // tables that float holds
    double work = 2e6;        // about rows * frames * bins * window
    ScalarType in = ScalarType::float32, out = ScalarType::float32;
};

// A loudness that changes along the row, so that top_db leaves some tiles alone.
inline void fill_waveform(Case& c, const Wanted& wanted, Random& random) {
    Problem& p = c.problem;
    p.x.resize(p.rows * p.length);
    const double peak = c.in == ScalarType::int16 ? 8000 : 1;
    double loudness = 1;
    for (int64_t i = 0; i < int64_t(p.x.size()); ++i) {
        if (random.chance(0.02)) {
            loudness = random.chance(0.1) ? 0 : std::pow(10, (wanted.gradient ? -1.5 : -3) * random.uniform());
        }
        const double x = peak * loudness * (random.normal() + 0.3);
        p.x[i] = rounded(c.in, std::min(3.9 * peak, std::max(-3.9 * peak, x)));
    }
    for (int64_t b = 1; c.same_rows && b < p.rows; ++b) {
        std::copy(p.x.begin(), p.x.begin() + p.length, p.x.begin() + b * p.length);
    }
}

inline void fill_tables(Case& c, const Wanted& wanted, Random& random) {
    Problem& p = c.problem;
    const auto put = [&](double x) { return wanted.exact_float ? rounded<float>(x) : rounded<double>(x); };
    const int64_t n = p.spec.framing.window, bins = p.bins();
    for (int64_t i = 0; i < n; ++i) {
        p.window.push_back(
            put(n < 4 ? 1 : 0.02 + 0.98 * std::pow(std::sin(3.14159265 * (double(i) + 0.5) / double(n)), 2)));
    }
    p.filters.assign(bins * p.n_filters, 0);
    const bool negative = p.spec.log_floor > 0 && random.chance(0.1);
    for (int64_t m = 0; m < p.n_filters; ++m) {
        if (random.chance(0.15)) {
            continue;  // empty
        }
        const int64_t first = random.below(bins), last = std::min(bins - 1, first + random.below(1 + bins / 2));
        for (int64_t k = first; k <= last; ++k) {
            const double w = random.chance(0.1) ? 0 : 0.1 + random.uniform();
            p.filters[k * p.n_filters + m] = put(negative && random.chance(0.2) ? -w : w);
        }
    }
    for (int64_t i = 0; i < p.bands() * p.cepstra; ++i) {
        p.dct.push_back(put(random.normal() / std::sqrt(double(p.bands()))));
    }
}

inline void choose_spec(mmfast::mel::Spec& s, const Wanted& wanted, Random& random) {
    const int64_t sizes[] = {1,  2,  3,  4,  5,  6,  7,  8,  9,  11, 12, 13, 15, 16, 17, 20,  21,
                             24, 25, 28, 31, 32, 37, 40, 48, 55, 60, 64, 74, 80, 82, 96, 100, 128};
    s.n_fft = sizes[random.below(random.chance(0.5) ? 34 : 27)];
    const int64_t window = random.chance(0.4) ? s.n_fft : random.between(1, s.n_fft);
    const int64_t hop = random.chance(0.2) ? window + random.between(1, 20) : random.between(1, window);
    const Kind kind = Kind(random.below(3));
    const bool centred = random.chance(0.5);
    const int64_t center_pad = random.chance(0.7) ? (centred ? s.n_fft : window) / 2 : random.below(2 * s.n_fft);
    s.framing = framing_of(kind, centred, s.n_fft, window, hop, center_pad, random.chance(0.2) ? random.below(9) : 0,
                           PadMode(random.below(5)), random.chance(0.2));
    s.input_scale = wanted.in == ScalarType::int16 ? 1.0 / 8192 : random.chance(0.2) ? 1.7 : 1;
    s.dither = random.chance(0.15) ? 0.25 : 0;
    s.remove_dc = random.chance(0.3);
    s.preemphasis = random.chance(0.4) ? 0.97 : 0;
    s.preemphasis_of_signal = random.chance(0.5);
    s.energy = random.chance(0.5) ? Energy::none : Energy(random.below(5));
    s.raw_energy = random.chance(0.5);
    s.energy_floor = random.chance(0.3) ? 0.5 : 0;
    const double powers[] = {2, 2, 2, 1, 3, 1.4};
    s.power = powers[random.below(6)];
    s.power_offset = random.chance(0.2) ? 1e-3 : 0;
    s.normalized = random.chance(0.6) ? 0 : int(random.between(1, 2));
    s.log = random.chance(0.75);
    if (s.log) {
        const int floor = int(random.below(wanted.gradient ? 2 : 4));
        s.log_floor = floor == 0 ? 1e-3 : floor == 1 ? 0 : floor == 2 ? 1e-10 : 0;
        s.log_offset = floor == 1 || random.chance(0.2) ? 1e-3 : 0;
        s.log_scale = random.chance(0.5) ? 1 : 4.3429448190325175;
        s.log_shift = random.chance(0.3) ? -3.5 : 0;
        s.has_top_db = random.chance(0.5);
        const double ranges[] = {0, 4, 12, 40};
        s.top_db = ranges[random.below(4)];
    }
    if (random.chance(0.3)) {
        s.output_offset = 4;
        s.output_scale = 0.25;
    }
    s.fill = random.chance(0.5) ? -7.5 : 0;
    s.time_major = random.chance(0.5);
}

inline std::string describe(const Case& c) {
    const Problem& p = c.problem;
    const auto& s = p.spec;
    char text[800];
    std::snprintf(
        text, sizeof text,
        "%ld x %ld samples (type %d to %d, strides %ld %ld, offset %ld, ragged %d), n_fft %ld window %ld hop %ld "
        "first %ld offset %ld least %ld pad %ld mode %d, scale %g dither %g dc %d emphasis %g of signal %d, "
        "energy %d raw %d floor %g, power %g + %g normalized %d, %ld filters %ld cepstra, "
        "log %d %g %g %g %g, top_db %d %g group %ld, out %g %g, time major %d",
        long(p.rows), long(p.length), int(c.in), int(c.out), long(c.row_stride()), long(c.sample_stride),
        long(c.offset), !p.lengths.empty(), long(s.n_fft), long(s.framing.window), long(s.framing.hop),
        long(s.framing.first), long(s.framing.count_offset), long(s.framing.min_length), long(s.framing.pad),
        int(s.framing.mode), s.input_scale, s.dither, s.remove_dc, s.preemphasis, s.preemphasis_of_signal,
        int(s.energy), s.raw_energy, s.energy_floor, s.power, s.power_offset, s.normalized, long(p.n_filters),
        long(p.cepstra), s.log, s.log_floor, s.log_offset, s.log_scale, s.log_shift, s.has_top_db, s.top_db,
        long(p.group), s.output_offset, s.output_scale, s.time_major);
    return text;
}

inline void choose_lengths(Problem& p, Random& random) {
    for (int64_t b = 0; b < p.rows; ++b) {
        const int64_t choice = random.below(5);
        p.lengths.push_back(choice == 0   ? 0
                            : choice == 1 ? p.length
                            : choice == 2 ? p.length + 5
                                          : random.below(p.length + 1));
    }
}

inline Case random_case(Random& random, const Wanted& wanted) {
    Case c;
    c.in = wanted.in;
    c.out = wanted.out;
    Problem& p = c.problem;
    choose_spec(p.spec, wanted, random);
    const Framing& f = p.spec.framing;
    p.rows = random.between(1, 4);
    const double frame_work = double(p.rows) * double(p.bins() * f.window);
    const int64_t most = std::max<int64_t>(1, std::min<int64_t>(300, int64_t(wanted.work / frame_work)));
    const int64_t frames =
        random.chance(0.3) ? random.between(0, std::min<int64_t>(most, 18)) : random.between(0, most);
    p.length = std::max<int64_t>(0, frames * f.hop - f.count_offset + random.below(f.hop));
    if (random.chance(0.1)) {
        p.length = random.below(4);
    }
    p.n_filters = random.chance(0.3) ? 0 : random.between(1, 40);
    p.cepstra = p.n_filters && random.chance(0.4) ? random.between(1, std::min<int64_t>(p.n_filters, 25)) : 0;
    p.group = random.below(p.rows + 1);
    p.seed = uint32_t(random.bits());
    if (random.chance(0.4)) {
        choose_lengths(p, random);
    }
    c.sample_stride = random.chance(0.7) ? 1 : random.between(2, 3);
    c.row_gap = random.chance(0.5) ? 0 : random.below(7);
    c.offset = random.below(17);
    c.same_rows = random.chance(0.05);
    if (wanted.gradient && p.spec.has_top_db) {  // two equal maxima are a kink
        c.same_rows = false;
        p.spec.has_top_db = f.window > 1;
    }
    fill_tables(c, wanted, random);
    fill_waveform(c, wanted, random);
    c.name = describe(c);
    return c;
}

// Everything a call takes, each in a buffer of exactly its size. Samples that may not be read are NaN.
template <class T>
class Call {
public:
    explicit Call(const Case& c)
        : case_(c), plan(c.problem.spec), frames(c.problem.spec.framing.count(c.problem.length)),
          features(c.problem.features()), window_(int64_t(c.problem.window.size()), c.offset % 5),
          filters_(int64_t(c.problem.filters.size()), c.offset % 7), dct_(int64_t(c.problem.dct.size()), c.offset % 3),
          lengths_(int64_t(c.problem.lengths.size()), 0), counts(c.problem.rows, 0), maxima(groups(c.problem), 0) {
        const Problem& p = c.problem;
        const auto fill = [](auto& to, const auto& from) {
            for (size_t i = 0; i < from.size(); ++i) {
                to[int64_t(i)] = std::remove_reference_t<decltype(to[0])>(from[i]);
            }
        };
        fill(window_, p.window);
        fill(filters_, p.filters);
        fill(dct_, p.dct);
        fill(lengths_, p.lengths);
        mmfast::dispatch(c.in, [&](auto* kind) { make_wave(kind); });
    }

    mmfast::mel::Waveform wave() const {
        const Problem& p = case_.problem;
        return {wave_data_, case_.in, p.rows, p.length, case_.row_stride(), case_.sample_stride, lengths_.data()};
    }
    mmfast::mel::Tables<T> tables() const {
        return {window_.data(), filters_.data(), case_.problem.n_filters, dct_.data(), case_.problem.cepstra};
    }
    void forward(void* out) const {
        mmfast::mel::forward_cpu<T>(plan, wave(), tables(), case_.problem.group, case_.problem.seed, out, case_.out,
                                    counts.data(), maxima.data());
    }
    void backward(const T* grad, T* wave_grad, T* filter_grad) const {
        mmfast::mel::backward_cpu<T>(plan, wave(), tables(), case_.problem.group, case_.problem.seed, maxima.data(),
                                     grad, wave_grad, filter_grad);
    }
    // Place of a feature in the output.
    int64_t at(int64_t b, int64_t f, int64_t k) const {
        return case_.problem.spec.time_major ? (b * frames + f) * features + k : (b * features + k) * frames + f;
    }

private:
    static int64_t groups(const Problem& p) {
        const int64_t group = p.group > 0 ? p.group : std::max<int64_t>(1, p.rows);
        return p.spec.has_top_db ? (p.rows + group - 1) / group : 0;
    }
    template <class Sample>
    void make_wave(Sample*) {
        const Problem& p = case_.problem;
        const int64_t stored = case_.same_rows ? 1 : p.rows;
        const bool none = p.rows == 0 || p.length == 0;
        const int64_t size = none ? 0 : (stored - 1) * case_.row_stride() + (p.length - 1) * case_.sample_stride + 1;
        auto buffer = std::make_shared<Buffer<Sample>>(size, case_.offset);  // all NaN
        for (int64_t b = 0; b < p.rows; ++b) {
            for (int64_t i = 0; i < p.row_length(b); ++i) {
                (*buffer)[b * case_.row_stride() + i * case_.sample_stride] = Sample(double(p.x[b * p.length + i]));
            }
        }
        wave_data_ = buffer->data();
        wave_ = buffer;
    }

    const Case& case_;

public:
    const mmfast::mel::Plan plan;
    const int64_t frames, features;

private:
    Buffer<T> window_, filters_, dct_;
    Buffer<int64_t> lengths_;
    std::shared_ptr<void> wave_;
    const void* wave_data_ = nullptr;

public:
    Buffer<int64_t> counts;
    Buffer<T> maxima;
};

}  // namespace test
