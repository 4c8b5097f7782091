// The forward pass where values are raised to a distance below the maximum of a group of rows.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <mutex>
#include <numeric>
#include <type_traits>
#include <vector>

#include "common/work.h"
#include "mel/mel_job.h"

namespace mmfast {
namespace mel {

// Note: [Two rounds]
//   top_db needs the maximum of the group before any of its values is final. The first round takes what is known of it (it only
//   grows) for the maximum; the second computes anew, or without a DCT just raises, the tiles that took a maximum that was not
//   the last. Speech in a quiet room has values below in nearly every tile, so the maximum must be met early. It stands in one of
//   the frames with the most energy: the tiles that are loudest where a few samples are looked at come before all others as
//   scouts, the very loudest of them first. While they are computed little is known: with a DCT they are left unfinished where
//   they lie below, v kept, as long as kKept bytes a thread have room, and so are those of groups too small to have any scouts.
//   (All samples of the likely tiles, looked at to find fewer and better ones, cost more: a third of the waveform read twice.)
//   What is computed twice, and by whom, changes with the order of events; the values do not.
template <class T>
class TwoRounds {
public:
    TwoRounds(const Job<T>& job, const Output<T>& output, const int64_t* counts, T* maxima)
        : job_(job), p_(job.p), output_(output), counts_(counts), maxima_(maxima), total_(job.wave.rows * job.tiles),
          lowest_(total_, kInfinity), highest_(total_, -kInfinity), guess_(total_, std::nan("")),
          threshold_(job.groups), kept_(p_.cepstra ? total_ : 0), known_(job.groups) {
        for (auto& k : known_) k.store(-kInfinity, std::memory_order_relaxed);
        kept_size_ = (p_.bands() + 1) * job.kernel.lanes;
        in_block_ = int64_t(kKept / (kept_size_ * sizeof(T)));
        capacity_ = in_block_ * max_threads();  // asked here: among the threads the answer is 1
    }

    void run() {
        choose_scouts();
        const int64_t scouts = int64_t(scouts_.size());
        deal_out(scouts + total_, job_.tile_cost(), output_.scratch_bytes(), [&](int64_t i, char* scratch) {
            if (i < scouts) first(scouts_[i], i + 1 < scouts ? scouts_[i + 1] : -1, true, scratch);
            else if (scouts == 0) first(i, -1, true, scratch);
            else if (!is_scout_[i - scouts]) first(i - scouts, after(i - scouts), false, scratch);
        });
        for (int64_t g = 0; g < job_.groups; ++g) {
            T top = -kInfinity;
            for (int64_t i = begin_of(g); i < begin_of(g + 1); ++i)
                if (top == top && !(highest_[i] <= top)) top = highest_[i];  // a NaN stays
            maxima_[g] = top;
            threshold_[g] = top - p_.top_db;
        }
        p_.cepstra ? finish_cepstra() : finish_bands();
    }

private:
    static constexpr T kInfinity = std::numeric_limits<T>::infinity();
    static constexpr size_t kKept = size_t(7) << 19;
    static constexpr int64_t kScouts = 8, kLeads = 64;  // one tile in so many

    int64_t begin_of(int64_t group) const { return std::min(group * job_.group * job_.tiles, total_); }
    bool below(int64_t i) const { return !(lowest_[i] >= threshold_[i / job_.tiles / job_.group]); }
    // Below, and not finished with the last threshold.
    bool wrong(int64_t i) const { return below(i) && guess_[i] != threshold_[i / job_.tiles / job_.group]; }

    void choose_scouts() {
        if (job_.group * job_.tiles < 2 * kScouts) return;
        const std::vector<float> loudness = measure();
        std::vector<int64_t> order(total_);
        std::iota(order.begin(), order.end(), 0);
        // The `most` loudest of tiles [first, last) come first.
        const auto select = [&](int64_t first, int64_t most, int64_t last) {
            std::nth_element(
                order.begin() + first, order.begin() + first + most, order.begin() + last,
                [&](int64_t a, int64_t b) { return loudness[a] != loudness[b] ? loudness[a] > loudness[b] : a < b; });
        };
        is_scout_.resize(total_);
        for (int64_t g = 0; g < job_.groups; ++g) {
            const int64_t begin = begin_of(g), end = begin_of(g + 1);
            const int64_t scouts = (end - begin + kScouts - 1) / kScouts, leads = (end - begin + kLeads - 1) / kLeads;
            select(begin, scouts, end);
            select(begin, leads, begin + scouts);
            std::sort(order.begin() + begin, order.begin() + begin + leads);
            std::sort(order.begin() + begin + leads, order.begin() + begin + scouts);
            for (int64_t i = begin; i < begin + scouts; ++i) {
                scouts_.push_back(order[i]);
                is_scout_[order[i]] = 1;
            }
        }
    }

    std::vector<float> measure() const {
        std::vector<float> loudness(total_);
        const auto of = [&](int64_t i, const auto& f) {
            const int64_t row = i / job_.tiles, frame = i % job_.tiles * job_.kernel.lanes;
            f(row, frame, std::clamp<int64_t>(counts_[row] - frame, 0, job_.kernel.lanes));
        };
        deal_out(total_, 0.02 * job_.tile_cost(), 0, [&](int64_t i, char*) {
            constexpr int64_t kAhead = 2;
            if (i + kAhead < total_)
                of(i + kAhead, [&](auto row, auto frame, auto count) { job_.announce_look(row, frame, count); });
            of(i,
               [&](auto row, auto frame, auto count) { loudness[i] = count ? job_.loudness(row, frame, count) : 0; });
        });
        return loudness;
    }

    // The next tile that is no scout.
    int64_t after(int64_t i) const {
        for (++i; i < total_ && is_scout_[i]; ++i) {
        }
        return i < total_ ? i : -1;
    }

    // Tile i; `next`, unless negative, is the one that comes after it.
    void first(int64_t i, int64_t next, bool keep, char* scratch) {
        FrameTile<T> t{};
        if (!output_.begin(i, counts_, scratch, t)) return;
        if (next >= 0 && next != i + 1)
            job_.announce(next / job_.tiles, next % job_.tiles * job_.kernel.lanes, false, t);
        auto& known = known_[t.row / job_.group];
        t.first_round = true;
        t.guess = known.load(std::memory_order_relaxed) - p_.top_db;
        t.kept = keep && p_.cepstra ? take() : nullptr;
        const bool took = keep && p_.cepstra;
        job_.kernel.forward(p_, t, scratch);
        lowest_[i] = t.lowest;
        highest_[i] = t.highest;
        T top = known.load(std::memory_order_relaxed);
        while (top < t.highest && !known.compare_exchange_weak(top, t.highest, std::memory_order_relaxed)) {
        }
        if (t.guessed) guess_[i] = t.guess;
        if (t.deferred) kept_[i] = t.kept;
        else if (took) give_back(t.kept);
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
            if (wrong(i) || (some && !below(i) && !output_.direct())) {
                t.clip = true;
                t.threshold = threshold_[group];
                t.kept = kept_[i];
                t.resume = t.kept != nullptr;
                if (!output_.begin(i, counts_, scratch, t)) return;
                job_.kernel.forward(p_, t, scratch);
                output_.end(t);
            } else if (some && !below(i)) {
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
            if (wrong(i)) tiles.push_back(i);
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
    int64_t total_, kept_size_, in_block_, capacity_, used_ = 0;
    // Of each tile: extrema of v, and the threshold that the first round finished it with (NaN: none).
    std::vector<T> lowest_, highest_, guess_;
    std::vector<T> threshold_;  // of each group
    std::vector<int64_t> scouts_;
    std::vector<char> is_scout_;
    std::vector<T*> kept_, free_;
    std::vector<std::atomic<T>> known_;
    std::vector<Scratch> blocks_;
    std::atomic<int64_t> next_{0};
    std::mutex mutex_;
};

}  // namespace mel
}  // namespace mmfast
