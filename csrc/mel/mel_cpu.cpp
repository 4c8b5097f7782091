// Drives the tile kernels over a batch: where the samples of a tile come from, who computes which tile, what is done
// about the maximum of a group, and where gradients of overlapping frames meet.
//
// Every tile is computed the same way whoever computes it, and sums across tiles are taken in an order that depends on
// the shapes alone: results do not change with the number of threads.
#include "mel/mel.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <mutex>
#include <numeric>
#include <type_traits>
#include <vector>

#include "common/isa.h"
#include "common/work.h"

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

// The run of bins between the first and the last non-zero weight of each row and, `by_bin`, the non-zero weights of each bin.
template <class T>
CompactFilters<T>::CompactFilters(const T* dense, int64_t bins, int64_t rows, bool by_bin) {
    std::vector<int32_t> low(rows, int32_t(bins)), high(rows, -1);
    for (int64_t k = 0; k < bins; ++k) {
        const T* w = dense + k * rows;
        for (int64_t m = 0; m < rows; ++m) {
            const bool some = w[m] != 0;
            low[m] = some && low[m] > k ? int32_t(k) : low[m];
            high[m] = some ? int32_t(k) : high[m];
        }
    }
    first_.resize(rows);
    offset_.assign(1, 0);
    for (int64_t m = 0; m < rows; ++m) {
        first_[m] = high[m] < 0 ? 0 : low[m];
        offset_.push_back(offset_[m] + (high[m] < 0 ? 0 : high[m] - low[m] + 1));
    }
    weights_.resize(offset_[rows]);
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t i = offset_[m]; i < offset_[m + 1]; ++i)
            weights_[i] = dense[(first_[m] + i - offset_[m]) * rows + m];
    if (!by_bin) return;
    bin_offset_.assign(1, 0);
    for (int64_t k = 0; k < bins; ++k) {
        for (int64_t m = 0; m < rows; ++m) {
            if (dense[k * rows + m] == 0) continue;
            bin_filter_.push_back(int32_t(m));
            bin_weight_.push_back(dense[k * rows + m]);
        }
        bin_offset_.push_back(int64_t(bin_filter_.size()));
    }
}
template class CompactFilters<float>;
template class CompactFilters<double>;

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
        p.fft = plan.fft<T>();
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

// Note: [Two rounds]
//   top_db needs the maximum of the group before any of its values is final. Without a DCT the features themselves are raised
//   afterwards, in place, where a tile has values below. With a DCT, v is gone by then. So in the first round a tile that lies
//   below what is known of the maximum (it only grows) is left unfinished, v kept, as long as kKept bytes a thread have room;
//   further ones take what is known for the maximum. The second round finishes the former, and repeats what took a maximum
//   that was not the last, or only now turns out to lie below. What is computed twice, and by whom, changes with the order of
//   events; the values do not.
template <class T>
class TwoRounds {
public:
    TwoRounds(const Job<T>& job, const Output<T>& output, const int64_t* counts, T* maxima)
        : job_(job), p_(job.p), output_(output), counts_(counts), maxima_(maxima), total_(job.wave.rows * job.tiles),
          lowest_(total_, kInfinity), highest_(total_, -kInfinity), kept_(p_.cepstra ? total_ : 0),
          known_(p_.cepstra ? job.groups : 0), threshold_(job.groups), guess_(p_.cepstra ? total_ : 0, std::nan("")) {
        for (auto& k : known_) k.store(-kInfinity, std::memory_order_relaxed);
        kept_size_ = (p_.bands() + 1) * job.kernel.lanes;
        in_block_ = int64_t(kKept / (kept_size_ * sizeof(T)));
        capacity_ = in_block_ * max_threads();  // asked here: among the threads the answer is 1
        const int64_t runs = total_ / kRun;
        stride_ = std::max<int64_t>(1, int64_t(0.618 * double(runs)));
        while (std::gcd(stride_, runs) > 1) ++stride_;
    }

    void run() {
        deal_out(total_, job_.tile_cost(), output_.scratch_bytes(),
                 [&](int64_t i, char* scratch) { first(i, scratch); });
        for (int64_t g = 0; g < job_.groups; ++g) {
            T top = -kInfinity;
            for (int64_t i = g * job_.group * job_.tiles; i < std::min((g + 1) * job_.group * job_.tiles, total_); ++i)
                if (top == top && !(highest_[i] <= top)) top = highest_[i];  // a NaN stays
            maxima_[g] = top;
            threshold_[g] = top - p_.top_db;
        }
        p_.cepstra ? finish_cepstra() : finish_bands();
    }

private:
    static constexpr T kInfinity = std::numeric_limits<T>::infinity();
    static constexpr size_t kKept = size_t(7) << 19;
    static constexpr int64_t kRun = 8;

    bool below(int64_t i) const { return !(lowest_[i] >= threshold_[i / job_.tiles / job_.group]); }

    // The order in which the first round takes tiles: runs of neighbours, far apart from one another, so that the maximum is
    // met early also where sounds grow louder through the batch.
    int64_t scattered(int64_t i) const {
        const int64_t runs = total_ / kRun;
        return i < runs * kRun ? i / kRun * stride_ % runs * kRun + i % kRun : i;
    }

    void first(int64_t place, char* scratch) {
        const int64_t i = p_.cepstra ? scattered(place) : place;
        FrameTile<T> t{};
        if (!output_.begin(i, counts_, scratch, t)) return;
        const int64_t group = t.row / job_.group;
        if (p_.cepstra) {
            t.first_round = true;
            t.guess = known_[group].load(std::memory_order_relaxed) - p_.top_db;
            t.kept = take();
        }
        job_.kernel.forward(p_, t, scratch);
        lowest_[i] = t.lowest;
        highest_[i] = t.highest;
        if (p_.cepstra) {
            T known = known_[group].load(std::memory_order_relaxed);
            while (known < t.highest &&
                   !known_[group].compare_exchange_weak(known, t.highest, std::memory_order_relaxed)) {
            }
            if (t.guessed) guess_[i] = t.guess;
            if (t.deferred) kept_[i] = t.kept;
            else give_back(t.kept);
        }
        if (!t.deferred) output_.end(t);
    }

    // Room for v of a tile, null when all is used; give_back is for the one just taken.
    T* take() {
        if (next_.fetch_add(1, std::memory_order_relaxed) >= capacity_) return nullptr;
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!free_.empty()) {
            T* const p = free_.back();
            free_.pop_back();
            return p;
        }
        if (used_ == int64_t(blocks_.size()) * in_block_) blocks_.emplace_back(kKept);
        return reinterpret_cast<T*>(blocks_.back().data()) + used_++ % in_block_ * kept_size_;
    }
    void give_back(T* p) {
        next_.fetch_sub(1, std::memory_order_relaxed);
        if (!p) return;
        const std::lock_guard<std::mutex> lock(mutex_);
        free_.push_back(p);
    }

    void finish_cepstra() {
        // What filters without weights add to each cepstrum, by group.
        std::vector<T> constant;
        bool some = false;
        for (int64_t m = 0; m < p_.bands(); ++m) some |= p_.constant_band(m);
        if (some) constant.resize(job_.groups * p_.cepstra);
        const T v0 =
            T(job_.spec.log_scale * std::log(double(p_.log_floor) + double(p_.log_offset)) + job_.spec.log_shift);
        for (int64_t g = 0; some && g < job_.groups; ++g) {
            const T v = (std::max(v0, threshold_[g]) + p_.output_offset) * p_.output_scale;
            for (int64_t m = 0; m < p_.bands(); ++m)
                for (int64_t j = 0; p_.constant_band(m) && j < p_.cepstra; ++j)
                    constant[g * p_.cepstra + j] += v * p_.dct[m * p_.cepstra + j];
        }
        const int64_t first = p_.energy == Energy::prepend;
        const int64_t from = first + (p_.energy == Energy::replace_first);
        const int64_t to = first + p_.cepstra - (p_.energy == Energy::replace_last);
        deal_out(total_, 0.3 * job_.tile_cost(), output_.scratch_bytes(), [&](int64_t i, char* scratch) {
            const int64_t row = i / job_.tiles, group = row / job_.group;
            FrameTile<T> t{};
            // Half-precision features are computed anew: adding to them would round twice.
            if (below(i) || (some && !output_.direct())) {
                t.clip = true;
                t.threshold = threshold_[group];
                t.kept = kept_[i];
                t.resume = t.kept != nullptr;
                if (!output_.begin(i, counts_, scratch, t)) return;
                job_.kernel.forward(p_, t, scratch);
                output_.end(t);
            } else if (some) {
                const int64_t frame = i % job_.tiles * job_.kernel.lanes;
                output_.for_each(row, frame, std::clamp<int64_t>(counts_[row] - frame, 0, job_.kernel.lanes), from, to,
                                 [&](auto& value, int64_t, int64_t c) {
                                     using Value = std::remove_reference_t<decltype(value)>;
                                     value = Value(T(value) + constant[group * p_.cepstra + c - first]);
                                 });
            }
        });
    }

    void finish_bands() {
        std::vector<int64_t> tiles;
        for (int64_t i = 0; i < total_; ++i)
            if (below(i)) tiles.push_back(i);
        const int64_t from = p_.energy == Energy::prepend || p_.energy == Energy::replace_first;
        const int64_t to = job_.features - (p_.energy == Energy::append || p_.energy == Energy::replace_last);
        deal_out(int64_t(tiles.size()), 0.05 * job_.tile_cost(), 0, [&](int64_t j, char*) {
            const int64_t i = tiles[j], row = i / job_.tiles, frame = i % job_.tiles * job_.kernel.lanes;
            const T raised = (threshold_[row / job_.group] + p_.output_offset) * p_.output_scale;
            output_.for_each(row, frame, std::clamp<int64_t>(counts_[row] - frame, 0, job_.kernel.lanes), from, to,
                             [raised](auto& value, int64_t, int64_t) {
                                 using Value = std::remove_reference_t<decltype(value)>;
                                 value = raised != raised || T(value) < raised ? Value(raised) : value;
                             });
        });
    }

    const Job<T>& job_;
    const MelParams<T>& p_;
    const Output<T>& output_;
    const int64_t* counts_;
    T* maxima_;
    int64_t total_, kept_size_, in_block_, capacity_, stride_ = 1, used_ = 0;
    std::vector<T> lowest_, highest_;
    std::vector<T*> kept_, free_;
    std::vector<std::atomic<T>> known_;
    std::vector<T> threshold_, guess_;  // what a tile was finished with in the first round; NaN: not
    std::vector<Scratch> blocks_;
    std::atomic<int64_t> next_{0};
    std::mutex mutex_;
};

}  // namespace

template <class T>
void forward_cpu(const Plan& plan, const Waveform& wave, const Tables<T>& tables, int64_t group, uint32_t seed,
                 void* features, ScalarType out_type, int64_t* counts, T* maxima) {
    const Job<T> job(plan, wave, tables, group, seed, false);
    const Output<T> output(job, features, out_type);
    const MelParams<T>& p = job.p;
    for (int64_t b = 0; b < wave.rows; ++b) counts[b] = job.count(b);

    if (p.has_top_db) {
        TwoRounds<T>(job, output, counts, maxima).run();
        return;
    }
    deal_out(wave.rows * job.tiles, job.tile_cost(), output.scratch_bytes(), [&](int64_t i, char* scratch) {
        FrameTile<T> t{};
        if (output.begin(i, counts, scratch, t)) {
            job.kernel.forward(p, t, scratch);
            output.end(t);
        }
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
        span_ = (std::min(run_frames_, job.frames) - 1) * hop + p_.framing.window;
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
        deal_out(slots, cost * double(items_) / double(std::max<int64_t>(1, slots)), bytes,
                 [&](int64_t s, char* scratch) {
                     T* const sums = filters_ ? sums_.data() + s * slot_size : nullptr;
                     for (int64_t i = s * items_ / slots; i < (s + 1) * items_ / slots; ++i) one_run(i, scratch, sums);
                 });
        if (p_.has_top_db) give_to_maxima(bytes);
        if (wave_)
            deal_out(job_.wave.rows, 0.2 * double(job_.wave.length), 0, [&](int64_t b, char*) { finish_row(b); });
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

#define MMFAST_INSTANTIATE(T)                                                                                          \
    template void forward_cpu<T>(const Plan&, const Waveform&, const Tables<T>&, int64_t, uint32_t, void*, ScalarType, \
                                 int64_t*, T*);                                                                        \
    template void backward_cpu<T>(const Plan&, const Waveform&, const Tables<T>&, int64_t, uint32_t, const T*,         \
                                  const T*, T*, T*);
MMFAST_INSTANTIATE(float)
MMFAST_INSTANTIATE(double)
#undef MMFAST_INSTANTIATE

}  // namespace mel
}  // namespace mmfast
