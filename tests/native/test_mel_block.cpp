// The GPU kernels' blocks of threads, run on the host: every phase of every shape against the CPU kernels, the items of each
// phase in an order that changes, since no result may depend on it.
#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "mel/mel.h"
#include "mel/mel_block_backward.h"
#include "mel/mel_block_tables.h"

using namespace mmfast;
using namespace mmfast::mel;

namespace {

// Runs the items of a phase backwards, forwards or from the middle.
struct HostBlock {
    mutable int phase = 0;
    template <class F>
    void each(int n, const F& f) const {
        ++phase;
        for (int i = 0; i < n; ++i) f(phase % 3 == 0 ? i : phase % 3 == 1 ? n - 1 - i : (i + n / 2) % n);
    }
    template <class F>
    void lanes(int lanes, int n, const F& f) const {
        each(lanes * n, [&](int i) { f(i % lanes, i / lanes, n); });
    }
    template <class F>
    void rising(int n, const F& f) const {
        each(n, f);
    }
    template <class Load, class Store>
    void fetch(int n, const Load& load, const Store& store) const {
        each(n, [&](int i) { load(i)->to(store(i)); });
    }
    template <class Load, class Store>
    void copy(int n, const Load& load, const Store& store) const {
        each(n, [&](int i) { store(i, load(i)); });
    }
};

struct Case {
    std::string name;
    Spec spec;
    int64_t filters = 0, cepstra = 0, rows = 2, length = 3000;
    int64_t group = 1;
    bool ragged = false, empty_filter = false, int16 = false;
    float bad = 0;  // a sample of the first row, if not 0
};

Spec spec_of(int64_t n_fft, int64_t window, int64_t hop, int64_t first, PadMode mode) {
    Spec s;
    s.n_fft = n_fft;
    s.framing = {window, hop, first, -2 * first + hop - n_fft, 1, 0, mode};
    if (first == 0) s.framing.count_offset = hop - window;
    return s;
}

std::vector<Case> cases() {
    std::vector<Case> all;
    const auto add = [&](const char* name, Spec s, int64_t filters, int64_t cepstra = 0) -> Case& {
        all.push_back({name, s, filters, cepstra});
        return all.back();
    };
    const auto logarithm = [](Spec s) {
        s.log = true;
        s.log_floor = 1e-6;
        s.log_scale = 4.342944819;
        return s;
    };
    for (int64_t n : {400, 512, 1024, 2048, 4096}) {
        Spec s = logarithm(spec_of(n, n, n / 4, -n / 2, PadMode::reflect));
        add("tuned", s, 40).length = 9000 + 3 * n;
        s.time_major = true;
        s.has_top_db = true;
        s.top_db = 30;
        Case& c = add("tuned_mfcc", s, 40, 13);
        c.length = 9000 + 3 * n;
        c.group = 0;
        c.ragged = true;
    }
    Spec whisper = logarithm(spec_of(400, 400, 160, -200, PadMode::reflect));
    whisper.has_top_db = true;
    whisper.top_db = 20;
    whisper.output_offset = 4;
    whisper.output_scale = 0.25;
    add("whisper", whisper, 80).length = 16000;
    for (bool time_major : {false, true}) {  // features that lie side by side are raised four at a time
        whisper.time_major = time_major;
        for (Energy energy : {Energy::none, Energy::append, Energy::replace_first}) {
            whisper.energy = energy;
            Case& c = add("whisper_by_four", whisper, 20);
            c.length = 15840;
            c.rows = 4;
            c.ragged = true;
        }
    }
    whisper.time_major = false;
    whisper.energy = Energy::none;
    Spec kaldi = logarithm(spec_of(512, 400, 160, 0, PadMode::constant));
    kaldi.remove_dc = true;
    kaldi.preemphasis = 0.97;
    kaldi.input_scale = 3;
    kaldi.time_major = true;
    add("kaldi", kaldi, 23).length = 12000;
    for (Energy e : {Energy::prepend, Energy::append, Energy::replace_first, Energy::replace_last}) {
        kaldi.energy = e;
        kaldi.raw_energy = e == Energy::prepend || e == Energy::replace_last;
        kaldi.energy_floor = 1e-3;
        kaldi.fill = -7;
        kaldi.normalized = e == Energy::append;
        Case& c = add("kaldi_energy", kaldi, 23, e == Energy::append ? 0 : 13);
        c.ragged = true;
        c.length = 12000;
    }
    for (int64_t n : {1, 2, 3, 7, 8, 20, 31, 64, 101, 225, 401, 600, 882}) {
        Spec s = logarithm(spec_of(n, n - n / 5, std::max<int64_t>(1, n / 3), -(n / 2), PadMode::mirror));
        s.framing.count_offset = 0;
        add("general", s, n > 30 ? 12 : 0).length = 3 * n + 50;
    }
    for (PadMode mode : {PadMode::reflect, PadMode::constant, PadMode::replicate, PadMode::circular, PadMode::mirror}) {
        for (int64_t pad : {0, 13}) {
            Spec s = logarithm(spec_of(64, 50, 20, -70, mode));
            s.framing.pad = pad;
            s.framing.count_offset = 100;
            s.framing.min_length = 1;
            s.power = 1;
            Case& c = add("padding", s, 10);
            c.length = 150;
            c.ragged = true;
            c.rows = 4;
        }
    }
    for (double power : {0.5, 1.0, 3.0}) {
        Spec s = logarithm(spec_of(64, 64, 20, -32, PadMode::reflect));
        s.power = power;
        s.power_offset = 1e-5;
        add("power", s, 10);
        s.n_fft = s.framing.window = 512;
        add("power_tuned", s, 20);
    }
    Spec far = logarithm(spec_of(400, 400, 500, -200, PadMode::reflect));
    add("hop_beyond_window", far, 40).length = 30000;
    Spec emphasis = logarithm(spec_of(400, 400, 160, -200, PadMode::constant));
    emphasis.preemphasis = 0.97;
    emphasis.preemphasis_of_signal = true;
    emphasis.normalized = 1;
    Case& e = add("signal_preemphasis", emphasis, 40);
    e.ragged = true;
    e.int16 = true;
    Spec dither = logarithm(spec_of(64, 64, 20, -32, PadMode::reflect));
    dither.dither = 0.5;
    add("dither", dither, 10);
    Spec db = whisper;
    db.n_fft = db.framing.window = 64;
    db.framing.hop = 20;
    db.framing.first = -32;
    Case& d = add("empty_filters", db, 20, 7);
    d.empty_filter = true;
    d.rows = 5;
    d.group = 2;
    db.top_db = 0;
    add("top_db_0", db, 20).group = 0;
    for (int64_t n : {64, 400, 512, 1024, 4096}) {
        for (float bad : {INFINITY, NAN, 1e25f}) {  // the last one overflows in the power
            for (double power : {2.0, 1.0}) {
                Spec s = logarithm(spec_of(n, n, n / 4, -n / 2, PadMode::reflect));
                s.power = power;
                Case& spoilt = add("spoilt", s, 20);
                spoilt.empty_filter = true;
                spoilt.bad = bad;
                spoilt.length = 16 * n;
            }
        }
    }
    add("spectrum", logarithm(spec_of(400, 400, 160, -200, PadMode::reflect)), 0);
    return all;
}

template <class T>
struct Problem {
    Case c;
    Plan plan;
    std::vector<float> wave;
    std::vector<int16_t> wave16;
    std::vector<int64_t> lengths;
    std::vector<T> window, filters, dct;
    std::vector<T> scaled, weights;  // as the device's preparation leaves them
    std::vector<int32_t> row_first, row_count, bin_first, bin_count;
    int64_t frames, features, groups;

    explicit Problem(const Case& given) : c(given), plan(given.spec) {
        std::mt19937 random(unsigned(c.spec.n_fft + c.length));
        std::normal_distribution<float> normal;
        const int64_t bins = c.spec.n_fft / 2 + 1, W = c.spec.framing.window, M = c.filters;
        wave.resize(c.rows * c.length);
        for (size_t i = 0; i < wave.size(); ++i) wave[i] = normal(random) * (i % 2000 < 1000 ? 1.0f : 0.01f);
        if (c.bad != 0) wave[c.length / 3] = c.bad;
        if (c.int16) {
            for (float& x : wave) wave16.push_back(int16_t(x = float(int16_t(x * 1000))));
        }
        if (c.ragged)
            for (int64_t b = 0; b < c.rows; ++b)
                lengths.push_back(b == 1 ? c.length / 3 : b == 3 ? 0 : c.length - 100 * b);
        for (int64_t n = 0; n < W; ++n) window.push_back(T(0.55 - 0.45 * std::cos(6.2831853 * (n + 0.5) / W)));
        filters.assign(bins * M, T(0));
        for (int64_t m = 0; m < M; ++m) {
            if (c.empty_filter && m % 5 == 1) continue;
            const int64_t low = m * bins / (M + 2), high = std::min(bins, (m + 3) * bins / (M + 2) + 1);
            for (int64_t k = low; k < high; ++k)
                if (k % 7 != 3) filters[k * M + m] = T(0.1 + std::abs(normal(random)));
        }
        for (int64_t i = 0; i < (M ? M : bins) * c.cepstra; ++i) dct.push_back(T(normal(random)));
        frames = c.spec.framing.count(c.length);
        features = feature_count(c.spec, M, c.cepstra);
        const int64_t group = c.group ? c.group : c.rows;
        groups = (c.rows + group - 1) / group;
        prepare(bins, M);
    }

    void prepare(int64_t bins, int64_t M) {
        T sum = 0;
        for (T w : window) sum += w * w;
        for (T w : window)
            scaled.push_back(c.spec.normalized ? w / std::sqrt(c.spec.normalized == 1 ? sum : T(c.spec.n_fft)) : w);
        weights.assign((bins + 1) / 2 * 2 * M, T(NAN));
        const auto range = [](int64_t n, auto some, std::vector<int32_t>& first, std::vector<int32_t>& count) {
            int64_t low = 0, high = -1;
            for (int64_t i = n - 1; i >= 0; --i)
                if (some(i)) low = i;
            for (int64_t i = 0; i < n; ++i)
                if (some(i)) high = i;
            first.push_back(int32_t(high < 0 ? 0 : low));
            count.push_back(int32_t(high < 0 ? 0 : high - low + 1));
        };
        for (int64_t m = 0; m < M; ++m) {
            range(bins, [&](int64_t k) { return filters[k * M + m] != 0; }, row_first, row_count);
            for (int j = 0; j < (row_count[m] + 1) / 2 * 2; ++j)
                weights[(j / 2 * M + m) * 2 + j % 2] = j < row_count[m] ? filters[(row_first[m] + j) * M + m] : T(0);
        }
        for (int64_t k = 0; M && k < bins; ++k)
            range(M, [&](int64_t m) { return filters[k * M + m] != 0; }, bin_first, bin_count);
    }

    Waveform waveform() const {
        const void* data = c.int16 ? static_cast<const void*>(wave16.data()) : wave.data();
        return {data,
                c.int16 ? ScalarType::int16 : ScalarType::float32,
                c.rows,
                c.length,
                c.length,
                1,
                c.ragged ? lengths.data() : nullptr};
    }
    Tables<T> tables() const {
        return {window.data(), c.filters ? filters.data() : nullptr, c.filters, c.cepstra ? dct.data() : nullptr,
                c.cepstra};
    }
    BlockJob<T> job() const {
        BlockJob<T> j = block_job<T>(c.spec, waveform(), c.group, 77);
        j.p.window = scaled.data();
        j.p.energy_window = window.data();
        j.p.dct = dct.data();
        j.p.cepstra = c.cepstra;
        if (c.filters)
            j.filters = {c.filters,        row_first.data(), row_count.data(), bin_first.data(),
                         bin_count.data(), weights.data(),   filters.data()};
        j.feature_count = features;
        return j;
    }
};

template <class T>
void expect_close(const std::string& what, const std::vector<T>& ours, const std::vector<T>& theirs, double tolerance) {
    assert(ours.size() == theirs.size());
    double error = 0, size = 0;
    bool spoilt = false;
    for (size_t i = 0; i < ours.size(); ++i) {
        if (std::isnan(theirs[i]) != std::isnan(ours[i])) error = 1e30;
        if (std::isinf(theirs[i]) && ours[i] != theirs[i]) error = 1e30;
        if (!std::isfinite(theirs[i])) {
            spoilt = true;
            continue;
        }
        error += double(ours[i] - theirs[i]) * double(ours[i] - theirs[i]);
        size += double(theirs[i]) * double(theirs[i]);
    }
    if (!((size > 0 || spoilt) && std::sqrt(error) <= tolerance * std::sqrt(size))) {
        std::printf("%s: relative error %g\n", what.c_str(), std::sqrt(error / size));
        std::exit(1);
    }
}

template <class T>
std::vector<T> poisoned(int64_t n) {
    return std::vector<T>(n, std::numeric_limits<T>::has_quiet_NaN ? std::numeric_limits<T>::quiet_NaN() : T(-77));
}

template <class T, class Shape>
void check(const Problem<T>& problem, const Shape& shape, int steps) {
    const Case& c = problem.c;
    const std::string name = c.name + " " + std::to_string(c.spec.n_fft) + (Shape::tuned ? " tuned" : " general") +
                             (sizeof(T) == 8 ? " double" : "");
    const int64_t n_out = c.rows * problem.features * problem.frames, bins = c.spec.n_fft / 2 + 1;
    const BlockTables<T> tables(problem.plan.template fft<T>(), steps);
    const std::vector<T> values = tables.values();
    BlockJob<T> job = problem.job();
    job.plan = tables.at(values.data());
    job.tiles = (problem.frames + shape.frames() - 1) / shape.frames();
    const int64_t total = c.rows * job.tiles;
    std::vector<T> out = poisoned<T>(n_out), expected = poisoned<T>(n_out), maxima = poisoned<T>(problem.groups);
    std::vector<T> expected_maxima = maxima;
    std::vector<int64_t> counts(c.rows, -1), expected_counts(c.rows, -1);
    std::vector<Extrema<T>> extrema(total, Extrema<T>{T(NAN), T(NAN)});
    const HostBlock block;
    const auto over_tiles = [&](bool backward, const auto& f) {
        const Layout layout(shape, job, backward);
        for (int64_t i = total - 1; i >= 0; --i) {
            std::vector<T> memory = poisoned<T>(layout.size);  // a vector of its own: the sanitizer watches both ends
            Tile<T, Shape, HostBlock> tile(job, shape, block, layout, memory.data(), i);
            f(tile, i);
        }
    };
    const auto group_of = [&](int64_t i) { return i / job.tiles / job.group; };

    job.features = out.data();
    job.out_type = scalar_type_of<T>();
    job.counts = counts.data();
    job.extrema = c.spec.has_top_db ? extrema.data() : nullptr;
    over_tiles(false, [](auto& tile, int64_t) { tile.forward(); });
    if (c.spec.has_top_db) {
        std::fill(maxima.begin(), maxima.end(), -std::numeric_limits<T>::infinity());
        for (int64_t i = 0; i < total; ++i) maxima[group_of(i)] = std::max(maxima[group_of(i)], extrema[i].highest);
        job.maxima = maxima.data();
        job.clip = c.cepstra != 0;
        over_tiles(false, [&](auto& tile, int64_t) { job.clip ? tile.forward() : tile.clip_features(); });
        job.clip = false;
    }
    forward_cpu<T>(problem.plan, problem.waveform(), problem.tables(), c.group, 77, expected.data(),
                   scalar_type_of<T>(), expected_counts.data(), expected_maxima.data());
    assert(counts == expected_counts);
    const double tolerance = sizeof(T) == 8 ? 1e-11 : 3e-6;
    expect_close(name + " forward", out, expected, tolerance);

    std::mt19937 random(5);
    std::normal_distribution<float> normal;
    std::vector<T> grad;
    for (int64_t i = 0; i < n_out; ++i) grad.push_back(T(normal(random)));
    std::vector<T> grad_wave = poisoned<T>(c.rows * c.length), expected_wave = grad_wave;
    std::vector<T> grad_filters(bins * c.filters), expected_filters(bins * c.filters);
    const int span = Layout(shape, job, true).span, slots = 3;
    std::vector<T> spans = poisoned<T>(total * span), sums(slots * bins * c.filters), raised(total), highest(total);
    std::vector<int32_t> hits(total);
    job.grad = grad.data();
    job.spans = spans.data();
    job.grad_wave = grad_wave.data();
    job.filter_sums = c.filters ? sums.data() : nullptr;
    job.raised = raised.data();
    job.highest = highest.data();
    job.hits = hits.data();
    over_tiles(true, [](auto& tile, int64_t i) { tile.backward(i % slots); });
    if (c.spec.has_top_db) {
        std::vector<T> top(problem.groups, -std::numeric_limits<T>::infinity()), share(problem.groups);
        std::vector<double> sum(problem.groups), count(problem.groups);
        for (int64_t i = 0; i < total; ++i) top[group_of(i)] = std::max(top[group_of(i)], highest[i]);
        for (int64_t i = 0; i < total; ++i) {
            sum[group_of(i)] += raised[i];
            if (highest[i] == top[group_of(i)]) count[group_of(i)] += hits[i];
        }
        for (int64_t g = 0; g < problem.groups; ++g) share[g] = count[g] ? T(sum[g] / count[g]) : T(0);
        job.group_highest = top.data();
        job.share = share.data();
        job.share_only = true;
        over_tiles(true, [](auto& tile, int64_t i) { tile.backward(i % slots); });
    }
    for (int64_t b = 0; b < c.rows; ++b)
        for (int64_t tile = job.tiles; tile >= 0; --tile)
            for (int thread = 0; thread < 3; ++thread) gather_between(job, shape.frames(), span, b, tile, thread, 3);
    for (int64_t i = 0; i < bins * c.filters; ++i)
        for (int s = 0; s < slots; ++s) grad_filters[i] += sums[s * bins * c.filters + i];
    backward_cpu<T>(problem.plan, problem.waveform(), problem.tables(), c.group, 77, expected_maxima.data(),
                    grad.data(), expected_wave.data(), c.filters ? expected_filters.data() : nullptr);
    // The gradient of the logarithm magnifies what cancels in the weakest bands.
    expect_close(name + " gradient", grad_wave, expected_wave, sizeof(T) == 8 ? 1e-9 : 3e-4);
    if (c.filters) expect_close(name + " filters", grad_filters, expected_filters, sizeof(T) == 8 ? 1e-9 : 3e-4);
}

void check_readers() {
    for (PadMode mode : {PadMode::reflect, PadMode::constant, PadMode::replicate, PadMode::circular, PadMode::mirror}) {
        for (int64_t pad : {0, 1, 5}) {
            for (int64_t length : {1, 2, 3, 7, 40}) {
                for (int64_t begin : {-50, -9, -1, 0, 4}) {
                    for (int64_t end : {3, 41, 100}) {
                        const Framing f{8, 3, begin, 0, 0, pad, mode};
                        std::vector<std::vector<int64_t>> expected(length), found(length);
                        for (int64_t q = begin; q < end; ++q)
                            if (const int64_t t = f.source(q, length); t >= 0) expected[t].push_back(q);
                        for (int64_t t = 0; t < length; ++t) {
                            f.for_each_reader(t, length, begin, end, [&](int64_t q) { found[t].push_back(q); });
                            std::sort(found[t].begin(), found[t].end());
                            assert(found[t] == expected[t]);
                        }
                    }
                }
            }
        }
    }
}

// Each bin is written by exactly one output of the rows: two that agree but for rounding would be a race.
template <class Shape>
void check_bins(const Shape& shape) {
    BlockJob<float> job;
    job.tiles = 1;
    job.p.framing = {1, 1, 0, 0, 0, 0, PadMode::constant};
    const Layout layout(shape, job, false);
    const HostBlock block;
    using Bins = Tile<float, Shape, HostBlock>;
    const Bins tile(job, shape, block, layout, nullptr, 0);
    std::vector<int> seen(shape.n() / 2 + 1);
    for (int k1 = 0; k1 < shape.rows(); ++k1) {
        for (int a = 0; a < Shape::A; ++a) {
            for (int j = 0; j < Shape::P; ++j) {
                const int k2 = a + Shape::A * j, bin = Bins::bin_of(k1, a, j);
                assert(bin == k1 + 16 * k2 || bin == shape.n() - k1 - 16 * k2);
                assert(bin >= 0 && 2 * bin <= shape.n());
                if (!Bins::source(k1, a, j)) continue;
                ++seen[bin];
                assert(tile.place_of(bin) == k1 * shape.stride() + shape.slot(k2));
            }
        }
    }
    for (int count : seen) assert(count == 1);
}

// Two blocks of the forward kernels share a multiprocessor: 228 KB, of which each takes 1 KB more than it asks for, and the
// kernel a little over 1 KB of its own.
template <class Shape>
void check_shared_memory(const Shape& shape) {
    for (bool backward : {false, true}) {
        BlockJob<float> job;
        const int64_t n = shape.n();
        job.p.framing = {n, n == 400 || n == 512 ? 160 : n / 4, -n / 2, 0, 0, 0, PadMode::reflect};
        job.plan.fft.n = n;
        job.filters.rows = job.feature_count = 80;
        const int64_t bytes = Layout(shape, job, backward).size * int64_t(sizeof(float));
        std::printf("%5d points, %s: %6ld bytes of shared memory for %2d frames\n", int(n),
                    backward ? "backward" : "forward ", long(bytes), shape.frames());
        assert(backward ? bytes <= 163 << 10 : 2 * (bytes + (5 << 9)) <= 228 << 10);
    }
}

void check_scalars() {
    check_shared_memory(TunedShape<1, 25, 32>());
    check_shared_memory(TunedShape<1, 32, 32>());
    check_shared_memory(TunedShape<8, 8, 16>());
    check_shared_memory(TunedShape<8, 16, 8>());
    check_shared_memory(TunedShape<16, 16, 4>());
    check_bins(TunedShape<1, 25, 32>());
    check_bins(TunedShape<1, 32, 32>());
    check_bins(TunedShape<8, 8, 16>());
    check_bins(TunedShape<8, 16, 8>());
    check_bins(TunedShape<16, 16, 4>());
    for (uint32_t step : {1u, 2u, 3u, 7u, 100u, 160u, 512u, 4096u})
        for (int n : {0, 1, 2, 159, 160, 161, 4095, 65535})
            if (step > 1) assert(quotient(n, reciprocal_of(step)) == int(uint32_t(n) / step));
    for (uint32_t step : {1u, 2u, 3u, 7u, 94u, 4095u, 4096u, 1000003u, 0xffffffffu})
        for (uint32_t n : {0u, 1u, step - 1, step, 5 * step - 1, 5 * step, 0x3fffffffu, 0xfffffffeu, 0xffffffffu})
            assert(wide_quotient(n, wide_reciprocal_of(step)) == n / step);
    for (int n : {1, 3, 80, 513, 131073}) {  // the last one is past what a reciprocal can do
        const Problem<float> problem({"lines", spec_of(64, 64, 20, -32, PadMode::reflect), 10});
        BlockJob<float> job = problem.job();
        job.feature_count = n;
        const Layout layout(GeneralShape(problem.plan.fft<float>(), 4), job, false);
        for (int i = 0; i < 4 * n; ++i) assert(layout.line(i, n) == i / n);
    }
    for (uint32_t bits = 0; bits < 0x10000; bits += 7) {
        const float x = half_to_float(uint16_t(bits)), y = bfloat_to_float(uint16_t(bits));
        assert(x != x || float_to_half(x) == bits);
        assert(y != y || float_to_bfloat(y) == bits);
    }
    Extrema<float> e{1, 2};
    widen(e, 0.5f, 3.0f);
    assert(e.lowest == 0.5f && e.highest == 3.0f);
    widen(e, NAN, NAN);
    widen(e, -1.0f, 9.0f);
    assert(e.lowest != e.lowest && e.highest != e.highest);
}

}  // namespace

int main() {
    check_readers();
    check_scalars();
    for (const Case& c : cases()) {
        const Problem<float> problem(c);
        switch (c.spec.dither != 0 ? 0 : c.spec.n_fft) {
            case 400: check(problem, TunedShape<1, 25, 32>(), 1); break;
            case 512: check(problem, TunedShape<1, 32, 32>(), 1); break;
            case 1024: check(problem, TunedShape<8, 8, 16>(), 8); break;
            case 2048: check(problem, TunedShape<8, 16, 8>(), 8); break;
            case 4096: check(problem, TunedShape<16, 16, 4>(), 16); break;
            default: break;
        }
        if (c.spec.n_fft <= 1024) {
            check(problem, GeneralShape(problem.plan.fft<float>(), 4), 1);
            const Problem<double> in_double(c);
            check(in_double, GeneralShape(in_double.plan.fft<double>(), 2), 1);
        }
    }
    std::puts("ok");
    return 0;
}
