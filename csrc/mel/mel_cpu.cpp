// Drives the tile kernels over a batch: where the samples of a tile come from, who computes which tile, what is done
// about the maximum of a group, and where gradients of overlapping frames meet.
//
// Every tile is computed the same way whoever computes it, and sums across tiles are taken in an order that depends on
// the shapes alone: results do not change with the number of threads.
#include "mel/mel.h"

#include <algorithm>
#include <mutex>
#include <numeric>
#include <vector>

#include "common/work.h"
#include "mel/mel_job.h"
#include "mel/mel_two_rounds.h"

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
template <>
const RealPlan<float>& Plan::tile_fft<float>() const {
    const int radix = FftTables<float>::tile_radix(spec.n_fft);
    if (radix == FftTables<float>::real_radix(spec.n_fft)) return fft<float>();
    std::call_once(once_[2], [&] { tile_float_ = std::make_unique<FftTables<float>>(spec.n_fft, radix); });
    return tile_float_->plan();
}
template <>
const RealPlan<double>& Plan::tile_fft<double>() const {
    const int radix = FftTables<double>::tile_radix(spec.n_fft);
    if (radix == FftTables<double>::real_radix(spec.n_fft)) return fft<double>();
    std::call_once(once_[3], [&] { tile_double_ = std::make_unique<FftTables<double>>(spec.n_fft, radix); });
    return tile_double_->plan();
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
    std::vector<int32_t> order(rows);
    std::vector<char> inside(bins + 1);
    for (int64_t m = 0; m < rows; ++m) {
        if (high[m] < 0) low[m] = 0;
        count_.push_back(high[m] < 0 ? 0 : high[m] - low[m] + 1);
        std::fill_n(inside.begin() + low[m], count_[m], 1);
    }
    covered_ = std::find(inside.begin(), inside.end() - 1, 1) - inside.begin();
    covered_end_ = std::find(inside.begin() + covered_, inside.end(), 0) - inside.begin();
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return count_[a] < count_[b]; });
    for (const int32_t m : order) {
        order_.push_back({8 * uint32_t(low[m]), 8 * uint32_t(m)});
        for (int64_t k = low[m]; k < low[m] + count_[m]; ++k) weights_.push_back(dense[k * rows + m]);
    }
    for (int c = 0; c <= Filters<T>::kShort; ++c)
        short_end_.push_back(int32_t(std::count_if(count_.begin(), count_.end(), [&](int32_t n) { return n <= c; })));
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
    deal_out(job.all_tiles(), job.tile_cost(), output.scratch_bytes(), [&](int64_t i, char* scratch) {
        FrameTile<T> t{};
        if (output.begin(job.place(i), counts, scratch, t)) {
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
        job_.point({row, frame}, int(count), staged, t.in);
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
