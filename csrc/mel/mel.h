// What the mel slice offers to mel_bind.cpp, and the kernels that mel_cpu.cpp drives. Sizes: B rows of T samples,
// F frames, C features of a frame, K = n_fft / 2 + 1 bins, M filters.
#pragma once

#include <cmath>
#include <limits>
#include <memory>
#include <mutex>
#include <vector>

#include "common/scalar_types.h"
#include "mel/fft_plan.h"
#include "mel/mel_core.h"

namespace mmfast {
namespace mel {

// The kernels of each instruction set (mel_tile.cpp).
#define MMFAST_DECLARE(isa)              \
    namespace isa {                      \
    MelKernels<float> kernels_float();   \
    MelKernels<double> kernels_double(); \
    }
MMFAST_DECLARE(baseline)
MMFAST_DECLARE(avx2)
MMFAST_DECLARE(avx512)
#undef MMFAST_DECLARE

// A MelConfig in the terms of the kernels; the tensors (window, filters, dct) come with each call.
struct Spec {
    int64_t n_fft = 1;
    Framing framing{};
    double input_scale = 1, preemphasis = 0, dither = 0, energy_floor = 0;
    bool preemphasis_of_signal = false, remove_dc = false, raw_energy = true;
    Energy energy = Energy::none;
    double power = 2, power_offset = 0;
    int normalized = 0;  // 1: by sqrt(sum w^2), 2: by sqrt(n_fft)
    bool log = false, has_top_db = false;
    double log_floor = 0, log_offset = 0, log_scale = 1, log_shift = 0, top_db = 0;
    double output_offset = 0, output_scale = 1, fill = 0;
    bool time_major = false;
};

// What of a Spec the kernels of every device read; transform, window, filters and DCT are added.
template <class T>
MelParams<T> kernel_params(const Spec& s, uint32_t seed) {
    MelParams<T> p;
    p.framing = s.framing;
    p.input_scale = T(s.input_scale);
    p.preemphasis = s.preemphasis_of_signal ? T(0) : T(s.preemphasis);
    p.dither = T(s.dither);
    p.seed = seed;
    p.has_energy_floor = s.energy_floor > 0;
    p.log_energy_floor = p.has_energy_floor ? T(std::log(s.energy_floor)) : T(0);
    p.remove_dc = s.remove_dc;
    p.raw_energy = s.raw_energy;
    p.energy = s.energy;
    p.power = T(s.power);
    p.power_offset = T(s.power_offset);
    p.log = s.log;
    p.has_top_db = s.has_top_db;
    p.log_floor = T(s.log_floor);
    p.log_offset = T(s.log_offset);
    p.log_scale = T(s.log_scale);
    // Rounded down, so that the rest has the same sign and infinity times the one plus infinity times the other is infinity.
    if (double(p.log_scale) >= s.log_scale) p.log_scale = std::nextafter(p.log_scale, T(0));
    p.log_scale_low = T(s.log_scale - double(p.log_scale));
    if (p.log_scale_low == 0) p.log_scale_low = std::numeric_limits<T>::min();
    p.log_shift = T(s.log_shift);
    p.top_db = T(s.top_db);
    p.output_offset = T(s.output_offset);
    p.output_scale = T(s.output_scale);
    p.time_major = s.time_major;
    return p;
}

// A dense filter bank [K][M] without its zeros.
template <class T>
class CompactFilters {
public:
    CompactFilters(const T* dense, int64_t bins, int64_t rows, bool by_bin);
    Filters<T> view() const {
        Filters<T> f;
        f.rows = int64_t(count_.size());
        f.count = count_.data();
        f.order = order_.data();
        f.short_end = short_end_.data();
        f.weights = weights_.data();
        f.covered = covered_;
        f.covered_end = covered_end_;
        f.bin_offset = bin_offset_.data();
        f.bin_filter = bin_filter_.data();
        f.bin_weight = bin_weight_.data();
        return f;
    }

private:
    int64_t covered_, covered_end_;
    std::vector<FilterRow> order_;
    std::vector<int64_t> bin_offset_;
    std::vector<int32_t> count_, short_end_, bin_filter_;
    std::vector<T> weights_, bin_weight_;
};

// A Spec with its transform tables, made on first use of each precision; safe to share between threads.
class Plan {
public:
    explicit Plan(const Spec& s) : spec(s) {}
    const Spec spec;
    template <class T>
    const RealPlan<T>& fft() const;
    // What the tiles of the CPU use: the same, or where they know better (FftTables::tile_radix) one of their own.
    template <class T>
    const RealPlan<T>& tile_fft() const;

    // Looks through a filter bank once and for all. The caller keeps it alive and as it is. Not while others compute.
    void prepare(const float* dense, int64_t rows) {
        dense_ = dense;
        rows_ = rows;
        sparse_ = std::make_unique<CompactFilters<float>>(dense, spec.n_fft / 2 + 1, rows, true);
    }
    template <class T>
    const CompactFilters<T>* prepared(const T* dense, int64_t rows) const {
        if constexpr (sizeof(T) == sizeof(float)) return dense == dense_ && rows == rows_ ? sparse_.get() : nullptr;
        return nullptr;
    }

    // What code for other devices keeps with a plan: one object for each index, made by the first to ask.
    template <class Make>
    std::shared_ptr<void> keep(int index, const Make& make) const {
        const std::lock_guard<std::mutex> lock(mutex_);
        for (const auto& [i, object] : kept_)
            if (i == index) return object;
        kept_.emplace_back(index, make());
        return kept_.back().second;
    }

private:
    const float* dense_ = nullptr;
    int64_t rows_ = 0;
    std::unique_ptr<CompactFilters<float>> sparse_;
    mutable std::mutex mutex_;
    mutable std::vector<std::pair<int, std::shared_ptr<void>>> kept_;
    mutable std::once_flag once_[4];
    mutable std::unique_ptr<FftTables<float>> float_, tile_float_;
    mutable std::unique_ptr<FftTables<double>> double_, tile_double_;
};

struct Waveform {
    const void* data;
    ScalarType type;
    int64_t rows, length, row_stride, sample_stride;
    const int64_t* lengths;  // [B] or null; clamped to [0, T]
};

template <class T>
struct Tables {
    const T* window;   // [win_length]
    const T* filters;  // [K][M] or null
    int64_t n_filters;
    const T* dct;  // [bands][cepstra] or null
    int64_t cepstra;
};

int64_t feature_count(const Spec& spec, int64_t n_filters, int64_t cepstra);

// features: [B][C][F], or [B][F][C] with time_major, of out_type. counts: [B]. maxima: a value for each group of rows that
// shares a top_db maximum (group rows each, 0 is all).
template <class T>
void forward_cpu(const Plan& plan, const Waveform& wave, const Tables<T>& tables, int64_t group, uint32_t seed,
                 void* features, ScalarType out_type, int64_t* counts, T* maxima);

// grad: as features, in T. grad_wave: [B][T] or null. grad_filters: [K][M] or null. Both are overwritten.
template <class T>
void backward_cpu(const Plan& plan, const Waveform& wave, const Tables<T>& tables, int64_t group, uint32_t seed,
                  const T* maxima, const T* grad, T* grad_wave, T* grad_filters);

}  // namespace mel
}  // namespace mmfast
