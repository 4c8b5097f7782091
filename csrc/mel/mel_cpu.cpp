// Drives the tile kernels over a batch: where the samples of a tile come from, who computes which tile, what is done
// about the maximum of a group, and where gradients of overlapping frames meet.
//
// Every tile is computed the same way whoever computes it, and sums across tiles are taken in an order that depends on
// the shapes alone: results do not change with the number of threads.
#include "mel/mel.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <new>

#include "common/isa.h"
#include "common/parallel.h"

namespace mmfast {
namespace mel {

template <>
const RealPlan<float>& Plan::fft<float>() const {
    std::call_once(once_[0], [this] { float_ = std::make_unique<FftTables<float>>(spec.n_fft); });
    return float_->plan();
}
template <>
const RealPlan<double>& Plan::fft<double>() const {
    std::call_once(once_[1], [this] { double_ = std::make_unique<FftTables<double>>(spec.n_fft); });
    return double_->plan();
}

int64_t feature_count(const Spec& spec, int64_t n_filters, int64_t cepstra) {
    const int64_t bands = cepstra ? cepstra : n_filters ? n_filters : spec.n_fft / 2 + 1;
    return bands + (spec.energy == Energy::prepend || spec.energy == Energy::append);
}

namespace {

template <class T>
MelKernels<T> kernels();
template <>
MelKernels<float> kernels<float>() {
    return MMFAST_FOR_ISA(best_isa(), mel, kernels_float)();
}
template <>
MelKernels<double> kernels<double>() {
    return MMFAST_FOR_ISA(best_isa(), mel, kernels_double)();
}

// Memory of a thread, kept from call to call: a fresh page costs as much as computing several frames. More than
// kKeep is given back.
class Scratch {
public:
    static constexpr size_t kKeep = size_t(4) << 20;
    explicit Scratch(size_t bytes) {
        Kept& k = kept();
        if (k.busy || bytes > kKeep) {
            own_ = allocate(bytes);
            data_ = own_;
            return;
        }
        if (k.size < bytes) {
            std::free(k.data);
            k.data = nullptr;
            k.size = 0;
            k.data = allocate(bytes);
            k.size = bytes;
        }
        k.busy = true;
        data_ = k.data;
    }
    ~Scratch() {
        if (own_) std::free(own_);
        else kept().busy = false;
    }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    char* data() const { return static_cast<char*>(data_); }

private:
    struct Kept {
        void* data = nullptr;
        size_t size = 0;
        bool busy = false;
        ~Kept() { std::free(data); }
    };
    static Kept& kept() {
        thread_local Kept k;
        return k;
    }
    static void* allocate(size_t bytes) {
        void* p = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
        if (!p) throw std::bad_alloc();
        return p;
    }
    void *data_ = nullptr, *own_ = nullptr;
};

// f(i, scratch) for i in [0, n), by as many threads as `cost` (nanoseconds each, roughly) makes worth waking. Runs of
// neighbours are dealt out as threads become free; each thread has `bytes` of scratch.
template <class F>
void deal_out(int64_t n, double cost, size_t bytes, const F& f) {
    constexpr double kWorthAThread = 30e3;
    const int64_t worth = int64_t(double(n) * cost / kWorthAThread);
    const int64_t threads = std::max<int64_t>(1, std::min({n, max_threads(), worth}));
    const int64_t run = std::clamp<int64_t>(n / (threads * 8), 1, 16);
    std::atomic<int64_t> next{0};
    parallel_for(0, threads, 1, [&](int64_t, int64_t) {
        const Scratch scratch(bytes);
        for (int64_t i; (i = next.fetch_add(run, std::memory_order_relaxed)) < n;)
            for (int64_t j = i; j < std::min(n, i + run); ++j) f(j, scratch.data());
    });
}

// One call: the parameters the kernels read and what they point to.
template <class T>
struct Job {
    const Spec& spec;
    const Waveform& wave;
    MelKernels<T> kernel = kernels<T>();
    MelParams<T> p;
    int64_t frames, tiles, features, group, groups;
    std::vector<T> window, weights, bin_weight;
    std::vector<int64_t> first, offset, bin_offset;
    std::vector<int32_t> bin_filter;

    Job(const Plan& plan, const Waveform& w, const Tables<T>& tables, int64_t group_, uint32_t seed, bool by_bin)
        : spec(plan.spec), wave(w) {
        p.fft = plan.fft<T>();
        p.framing = spec.framing;
        p.input_scale = T(spec.input_scale);
        p.preemphasis = spec.preemphasis_of_signal ? T(0) : T(spec.preemphasis);
        p.dither = T(spec.dither);
        p.seed = seed;
        p.has_energy_floor = spec.energy_floor > 0;
        p.log_energy_floor = p.has_energy_floor ? T(std::log(spec.energy_floor)) : T(0);
        p.remove_dc = spec.remove_dc;
        p.raw_energy = spec.raw_energy;
        p.energy = spec.energy;
        p.power = T(spec.power);
        p.power_offset = T(spec.power_offset);
        p.log = spec.log;
        p.has_top_db = spec.has_top_db;
        p.log_floor = T(spec.log_floor);
        p.log_offset = T(spec.log_offset);
        p.log_scale = T(spec.log_scale);
        p.log_shift = T(spec.log_shift);
        p.top_db = T(spec.top_db);
        p.output_offset = T(spec.output_offset);
        p.output_scale = T(spec.output_scale);
        p.time_major = spec.time_major;
        p.cepstra = tables.cepstra;
        p.dct = tables.dct;
        set_window(tables.window);
        if (tables.filters) set_filters(tables.filters, tables.n_filters, by_bin);
        frames = p.framing.count(wave.length);
        tiles = (frames + kernel.lanes - 1) / kernel.lanes;
        features = feature_count(spec, tables.n_filters, tables.cepstra);
        group = group_ > 0 ? group_ : std::max<int64_t>(1, wave.rows);
        groups = (wave.rows + group - 1) / group;
    }

    void set_window(const T* given) {
        const int64_t n = p.framing.window;
        p.window = given;
        if (!spec.normalized) return;
        T sum = 0;
        for (int64_t i = 0; i < n; ++i) sum += given[i] * given[i];
        const T scale = T(1) / std::sqrt(spec.normalized == 1 ? sum : T(spec.n_fft));
        window.resize(n);
        for (int64_t i = 0; i < n; ++i) window[i] = given[i] * scale;
        p.window = window.data();
    }

    // Dense [bins][rows] to the run of bins between the first and the last non-zero weight of each row.
    void set_filters(const T* dense, int64_t rows, bool by_bin) {
        const int64_t bins = p.bins();
        std::vector<int32_t> low(rows, int32_t(bins)), high(rows, -1);
        for (int64_t k = 0; k < bins; ++k) {
            const T* w = dense + k * rows;
            for (int64_t m = 0; m < rows; ++m) {
                const bool some = w[m] != 0;
                low[m] = some && low[m] > k ? int32_t(k) : low[m];
                high[m] = some ? int32_t(k) : high[m];
            }
        }
        first.resize(rows);
        offset.assign(1, 0);
        for (int64_t m = 0; m < rows; ++m) {
            first[m] = high[m] < 0 ? 0 : low[m];
            offset.push_back(offset[m] + (high[m] < 0 ? 0 : high[m] - low[m] + 1));
        }
        weights.resize(offset[rows]);
        for (int64_t m = 0; m < rows; ++m)
            for (int64_t i = offset[m]; i < offset[m + 1]; ++i) weights[i] = dense[(first[m] + i - offset[m]) * rows + m];
        p.filters.rows = rows;
        p.filters.first = first.data();
        p.filters.offset = offset.data();
        p.filters.weights = weights.data();
        if (!by_bin) return;
        bin_offset.assign(1, 0);
        for (int64_t k = 0; k < bins; ++k) {
            for (int64_t m = 0; m < rows; ++m) {
                if (dense[k * rows + m] != 0) {
                    bin_filter.push_back(int32_t(m));
                    bin_weight.push_back(dense[k * rows + m]);
                }
            }
            bin_offset.push_back(int64_t(bin_filter.size()));
        }
        p.filters.bin_offset = bin_offset.data();
        p.filters.bin_filter = bin_filter.data();
        p.filters.bin_weight = bin_weight.data();
    }

    int64_t length(int64_t row) const {
        return wave.lengths ? std::clamp<int64_t>(wave.lengths[row], 0, wave.length) : wave.length;
    }
    int64_t count(int64_t row) const { return std::min(frames, p.framing.count(length(row))); }

    // Roughly the nanoseconds of a tile, to judge whether another thread is worth waking.
    double tile_cost() const { return 8.0 * double(spec.n_fft) + 0.5 * double(p.bands() * p.cepstra); }

    // Samples that staging a tile takes: frames that overlap are staged as one run.
    int64_t staging() const {
        return std::min(p.framing.hop, p.framing.window) * (kernel.lanes - 1) + p.framing.window;
    }

    // Points the lanes of `t` at frames [frame, frame + count) of a row: into the waveform itself where it is contiguous, in T
    // and inside the signal, else into `staged`.
    void point(int64_t row, int64_t frame, int count, T* staged, FrameTile<T>& t) const {
        const Framing& f = p.framing;
        const int64_t begin = f.first + frame * f.hop, end = begin + (count - 1) * f.hop + f.window;
        t.frames = count;
        t.row = row;
        t.frame = frame;
        const T* base;
        int64_t step = f.hop;
        if (wave.type == scalar_type_of<T>() && wave.sample_stride == 1 && !signal_preemphasis() && begin >= 0 &&
            end <= length(row)) {
            base = static_cast<const T*>(wave.data) + row * wave.row_stride + begin;
        } else {
            base = staged;
            if (f.hop <= f.window) {
                stage(row, begin, end, staged);
            } else {
                step = f.window;
                for (int i = 0; i < count; ++i)
                    stage(row, begin + i * f.hop, begin + i * f.hop + f.window, staged + i * step);
            }
        }
        for (int i = 0; i < kernel.lanes; ++i) t.lane[i] = base + std::min(i, count - 1) * step;
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
    int64_t block() const { return direct() ? 0 : job_.features * job_.kernel.lanes; }

    void begin(FrameTile<T>& t, T* block) const {
        t.out = direct() ? static_cast<T*>(out_) + at(t) : block;
        t.feature_stride = direct() ? feature_stride_ : job_.kernel.lanes;
        t.frame_stride = direct() ? frame_stride_ : 1;
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
    int64_t at(const FrameTile<T>& t) const { return t.row * row_stride_ + t.frame * frame_stride_; }
    const Job<T>& job_;
    void* out_;
    ScalarType type_;
    int64_t feature_stride_, frame_stride_, row_stride_;
};

}  // namespace

template <class T>
void forward_cpu(const Plan& plan, const Waveform& wave, const Tables<T>& tables, int64_t group, uint32_t seed,
                 void* features, ScalarType out_type, int64_t* counts, T* maxima) {
    const Job<T> job(plan, wave, tables, group, seed, false);
    const Output<T> output(job, features, out_type);
    const MelParams<T>& p = job.p;
    const int lanes = job.kernel.lanes;
    for (int64_t b = 0; b < wave.rows; ++b) counts[b] = job.count(b);

    const int64_t total = wave.rows * job.tiles;
    std::vector<T> lowest(p.has_top_db ? total : 0), highest(lowest.size());
    const int64_t kernel_bytes = job.kernel.forward_scratch(p);
    const size_t bytes = kernel_bytes + (job.staging() + output.block()) * sizeof(T);
    // Tile i with, in the second round, the threshold of its group.
    const auto run = [&](int64_t i, char* scratch, const T* threshold) {
        const int64_t row = i / job.tiles, frame = i % job.tiles * lanes;
        const int64_t inside = std::clamp<int64_t>(counts[row] - frame, 0, lanes);
        const int64_t here = std::min<int64_t>(lanes, job.frames - frame);
        if (!threshold && inside < here) output.fill(row, frame + inside, here - inside);
        if (inside == 0) {
            if (p.has_top_db) lowest[i] = std::numeric_limits<T>::infinity(), highest[i] = -lowest[i];
            return;
        }
        FrameTile<T> t;
        t.clip = threshold != nullptr;
        t.threshold = threshold ? *threshold : T(0);
        T* const staged = reinterpret_cast<T*>(scratch + kernel_bytes);
        job.point(row, frame, int(inside), staged, t);
        output.begin(t, staged + job.staging());
        job.kernel.forward(p, t, scratch);
        output.end(t);
        if (p.has_top_db && !threshold) lowest[i] = t.lowest, highest[i] = t.highest;
    };
    deal_out(total, job.tile_cost(), bytes, [&](int64_t i, char* scratch) { run(i, scratch, nullptr); });
    if (!p.has_top_db) return;

    std::vector<T> threshold(job.groups);
    for (int64_t g = 0; g < job.groups; ++g) {
        T top = -std::numeric_limits<T>::infinity();
        for (int64_t i = g * job.group * job.tiles; i < std::min((g + 1) * job.group * job.tiles, total); ++i)
            if (top == top && !(highest[i] <= top)) top = highest[i];  // a NaN stays
        maxima[g] = top;
        threshold[g] = top - p.top_db;
    }
    std::vector<int64_t> below;  // tiles with something to raise
    for (int64_t i = 0; i < total; ++i)
        if (!(lowest[i] >= threshold[i / job.tiles / job.group]) && counts[i / job.tiles] > i % job.tiles * lanes) below.push_back(i);
    const bool in_place = !p.cepstra;
    const int64_t c0 = p.energy == Energy::prepend || p.energy == Energy::replace_first;
    const int64_t c1 = job.features - (p.energy == Energy::append || p.energy == Energy::replace_last);
    deal_out(int64_t(below.size()), in_place ? 0.05 * job.tile_cost() : job.tile_cost(), in_place ? 0 : bytes,
                   [&](int64_t j, char* scratch) {
                       const int64_t i = below[j], row = i / job.tiles, frame = i % job.tiles * lanes;
                       const T limit = threshold[row / job.group];
                       if (!in_place) return run(i, scratch, &limit);
                       const T raised = (limit + p.output_offset) * p.output_scale;
                       output.for_each(row, frame, std::min<int64_t>(lanes, counts[row] - frame), c0, c1,
                                       [raised](auto& value, int64_t, int64_t) {
                                           using Value = std::remove_reference_t<decltype(value)>;
                                           const T v = T(value);
                                           value = raised != raised || v < raised ? Value(raised) : value;
                                       });
                   });
}

namespace {

// Gradient of samples [begin, begin + size) of the extended signal, still to be added to the samples they were read from.
template <class T>
struct Spill {
    int64_t begin = 0;
    std::vector<T> values;
    void set(int64_t at, const T* first, const T* last) {
        begin = at;
        if (first < last) values.assign(first, last);
    }
};

// Note: [Overlapping gradients]
//   A run of frames gathers the gradient of its samples in a buffer of its own. What no other run touches goes straight to
//   grad_wave: from its first sample to that of the next run. The rest (the overlap with the next run, and what was read
//   outside the signal) is kept and added afterwards, row by row, in order. Runs depend on the shapes alone.
template <class T>
class Backward {
public:
    Backward(const Job<T>& job, const T* maxima, const T* grad, T* grad_wave, T* grad_filters)
        : job_(job), p_(job.p), maxima_(maxima), grad_(grad), wave_(grad_wave), filters_(grad_filters) {
        const int64_t lanes = job.kernel.lanes, hop = p_.framing.hop;
        run_tiles_ = std::clamp<int64_t>((kRunSamples - p_.framing.window) / (lanes * hop), 1, 8);
        run_frames_ = run_tiles_ * lanes;
        runs_ = (job.tiles + run_tiles_ - 1) / run_tiles_;
        items_ = job.wave.rows * runs_;
        span_ = (run_frames_ - 1) * hop + p_.framing.window;
        padded_ = (p_.bins() + 15) / 16 * 16;
        kernel_bytes_ = job.kernel.backward_scratch(p_);
    }

    void run() {
        if (wave_) spills_.resize(2 * items_);
        if (p_.has_top_db) raised_.resize(items_), hits_.resize(job_.wave.rows * job_.tiles);
        const size_t bytes = kernel_bytes_ + (job_.staging() + (wave_ ? span_ : 0)) * sizeof(T);
        // Filter gradients are summed in slots, a fixed share of the items each.
        const int64_t slot_size = p_.bands() * padded_;
        const int64_t most = std::max<int64_t>(1, kSlotBytes / int64_t(slot_size * sizeof(T)));
        const int64_t slots = filters_ ? std::min({items_, int64_t(64), most}) : items_;
        if (filters_) sums_.assign(std::max<int64_t>(1, slots) * slot_size, T(0));
        const double cost = 2.5 * job_.tile_cost() * double(run_tiles_);
        deal_out(slots, cost * double(items_) / double(std::max<int64_t>(1, slots)), bytes, [&](int64_t s, char* scratch) {
            T* const sums = filters_ ? sums_.data() + s * slot_size : nullptr;
            for (int64_t i = s * items_ / slots; i < (s + 1) * items_ / slots; ++i) one_run(i, scratch, sums);
        });
        if (p_.has_top_db) give_to_maxima(bytes);
        if (wave_) deal_out(job_.wave.rows, 0.2 * double(job_.wave.length), 0, [&](int64_t b, char*) { finish_row(b); });
        if (filters_) sum_slots(slots, slot_size);
    }

private:
    static constexpr int64_t kRunSamples = 1 << 16, kSlotBytes = int64_t(32) << 20;

    void one_run(int64_t item, char* scratch, T* sums) {
        const int64_t row = item / runs_, first = item % runs_ * run_frames_;
        const int64_t count = std::clamp<int64_t>(job_.count(row) - first, 0, run_frames_);
        T* const staged = reinterpret_cast<T*>(scratch + kernel_bytes_);
        T* const span = wave_ ? staged + job_.staging() : nullptr;
        const int64_t hop = p_.framing.hop, used = count ? (count - 1) * hop + p_.framing.window : 0;
        if (wave_) std::fill(span, span + used, T(0));
        double raised = 0;
        for (int64_t f = 0; f < count; f += job_.kernel.lanes) {
            GradientTile<T> t = tile(row, first + f, std::min<int64_t>(job_.kernel.lanes, count - f), staged);
            t.samples = wave_ ? span + f * hop : nullptr;
            t.filters = sums;
            job_.kernel.backward(p_, t, scratch);
            if (p_.has_top_db) {
                raised += t.raised;
                hits_[row * job_.tiles + (first + f) / job_.kernel.lanes] = t.hits;
            }
        }
        if (p_.has_top_db) raised_[item] = raised;
        if (wave_) hand_over(item, row, first, count, span, used);
    }

    GradientTile<T> tile(int64_t row, int64_t frame, int64_t count, T* staged) const {
        GradientTile<T> t{};
        job_.point(row, frame, int(count), staged, t.in);
        t.in.feature_stride = p_.time_major ? 1 : job_.frames;
        t.in.frame_stride = p_.time_major ? job_.features : 1;
        t.grad = grad_ + row * job_.features * job_.frames + frame * t.in.frame_stride;
        t.in.clip = p_.has_top_db;
        if (p_.has_top_db) {
            t.maximum = maxima_[row / job_.group];
            t.in.threshold = t.maximum - p_.top_db;
        }
        return t;
    }

    void hand_over(int64_t item, int64_t row, int64_t first, int64_t count, const T* span, int64_t used) {
        const int64_t length = job_.wave.length, inside = job_.length(row), hop = p_.framing.hop;
        T* const out = wave_ + row * length;
        const bool leads = first == 0, trails = first + count >= job_.count(row);
        if (count == 0) {
            if (leads) std::fill(out, out + length, T(0));
            return;
        }
        const int64_t begin = p_.framing.first + first * hop, end = begin + used;
        const int64_t owned = trails ? std::max(end, length) : begin + count * hop;
        const int64_t from = std::clamp<int64_t>(begin, 0, length), to = std::clamp<int64_t>(owned, from, length);
        // What lies past the row's own length was read elsewhere.
        const int64_t copied = std::clamp<int64_t>(std::min(end, inside), from, to);
        if (leads) std::fill(out, out + from, T(0));
        if (from < copied) std::copy(span + (from - begin), span + (copied - begin), out + from);
        std::fill(out + copied, out + to, T(0));
        spills_[2 * item].set(begin, span, span + std::clamp<int64_t>(from - begin, 0, used));
        const int64_t rest = std::max(copied, begin);
        if (rest < end) spills_[2 * item + 1].set(rest, span + (rest - begin), span + used);
    }

    // The gradient of every raised value belongs to the maximum of its group, in equal parts if several are equal.
    void give_to_maxima(size_t bytes) {
        const Scratch scratch(bytes);
        T* const staged = reinterpret_cast<T*>(scratch.data() + kernel_bytes_);
        T* const span = staged + job_.staging();
        const int64_t rows = job_.wave.rows;
        for (int64_t g = 0; g < job_.groups; ++g) {
            const int64_t r0 = g * job_.group, r1 = std::min(rows, r0 + job_.group);
            double raised = 0;
            int64_t hits = 0;
            for (int64_t i = r0 * runs_; i < r1 * runs_; ++i) raised += raised_[i];
            for (int64_t i = r0 * job_.tiles; i < r1 * job_.tiles; ++i) hits += hits_[i];
            if (hits == 0 || raised == 0) continue;
            for (int64_t i = r0 * job_.tiles; i < r1 * job_.tiles; ++i) {
                if (!hits_[i]) continue;
                const int64_t row = i / job_.tiles, frame = i % job_.tiles * job_.kernel.lanes;
                const int64_t count = std::min<int64_t>(job_.kernel.lanes, job_.count(row) - frame);
                GradientTile<T> t = tile(row, frame, count, staged);
                t.share_only = true;
                t.share = T(raised / double(hits));
                t.filters = filters_ ? sums_.data() : nullptr;
                const int64_t used = (count - 1) * p_.framing.hop + p_.framing.window;
                if (wave_) {
                    std::fill(span, span + used, T(0));
                    t.samples = span;
                }
                job_.kernel.backward(p_, t, scratch.data());
                if (!wave_) continue;
                maximum_spills_.push_back({});
                maximum_rows_.push_back(row);
                maximum_spills_.back().set(p_.framing.first + frame * p_.framing.hop, span, span + used);
            }
        }
    }

    void finish_row(int64_t row) {
        const int64_t length = job_.length(row);
        T* const out = wave_ + row * job_.wave.length;
        const auto add = [&](const Spill<T>& spill) {
            for (size_t i = 0; i < spill.values.size(); ++i) {
                const int64_t at = p_.framing.source(spill.begin + int64_t(i), length);
                if (at >= 0) out[at] += spill.values[i];
            }
        };
        for (int64_t i = 2 * row * runs_; i < 2 * (row + 1) * runs_; ++i) add(spills_[i]);
        for (size_t i = 0; i < maximum_rows_.size(); ++i)
            if (maximum_rows_[i] == row) add(maximum_spills_[i]);
        if (job_.signal_preemphasis()) {
            const T c = T(job_.spec.preemphasis);
            for (int64_t i = 0; i + 1 < length; ++i) out[i] -= c * out[i + 1];
        }
    }

    void sum_slots(int64_t slots, int64_t slot_size) {
        const int64_t rows = p_.bands();
        for (int64_t k = 0; k < p_.bins(); ++k) {
            for (int64_t m = 0; m < rows; ++m) {
                double sum = 0;
                for (int64_t s = 0; s < slots; ++s) sum += double(sums_[s * slot_size + m * padded_ + k]);
                filters_[k * rows + m] = T(sum);
            }
        }
    }

    const Job<T>& job_;
    const MelParams<T>& p_;
    const T *maxima_, *grad_;
    T *wave_, *filters_;
    int64_t run_tiles_, run_frames_, runs_, items_, span_, padded_, kernel_bytes_;
    std::vector<Spill<T>> spills_, maximum_spills_;
    std::vector<int64_t> maximum_rows_, hits_;
    std::vector<double> raised_;
    std::vector<T> sums_;
};

}  // namespace

template <class T>
void backward_cpu(const Plan& plan, const Waveform& wave, const Tables<T>& tables, int64_t group, uint32_t seed,
                  const T* maxima, const T* grad, T* grad_wave, T* grad_filters) {
    const Job<T> job(plan, wave, tables, group, seed, true);
    if (job.tiles == 0) {
        if (grad_wave) std::fill(grad_wave, grad_wave + wave.rows * wave.length, T(0));
        if (grad_filters) std::fill(grad_filters, grad_filters + job.p.bins() * job.p.bands(), T(0));
        return;
    }
    Backward<T>(job, maxima, grad, grad_wave, grad_filters).run();
}

#define MMFAST_INSTANTIATE(T)                                                                                             \
    template void forward_cpu<T>(const Plan&, const Waveform&, const Tables<T>&, int64_t, uint32_t, void*, ScalarType,    \
                                 int64_t*, T*);                                                                           \
    template void backward_cpu<T>(const Plan&, const Waveform&, const Tables<T>&, int64_t, uint32_t, const T*, const T*, \
                                  T*, T*);
MMFAST_INSTANTIATE(float)
MMFAST_INSTANTIATE(double)
#undef MMFAST_INSTANTIATE

}  // namespace mel
}  // namespace mmfast
