// Tables and parameters of mel_block.h, made on the host. Host only.
#pragma once

#include <cmath>
#include <vector>

#include "mel/mel.h"
#include "mel/mel_block_job.h"

namespace mmfast {
namespace mel {

// The tables of a plan one after the other, to be copied to where the kernels read them.
template <class T>
class BlockTables {
public:
    // steps: A of the TunedShape that will be used, 1 for none.
    BlockTables(const RealPlan<T>& plan, int steps) : host_(plan) {
        const int64_t S = plan.columns, half = plan.radix / 2;
        std::vector<T> columns, row;
        for (int64_t k = 1; k <= half; ++k)
            for (int64_t s = 0; s < S; ++s)
                for (int part = 0; part < 2; ++part) columns.push_back(plan.twiddle[2 * (s * half + k - 1) + part]);
        twiddle_ = keep(columns.data(), int64_t(columns.size()));
        for (int64_t a = 0; a < steps; ++a) {
            for (int64_t p = 0; p < S / steps; ++p) {
                row.push_back(T(cos_turn(a * p % S, S)));
                row.push_back(T(sin_turn(a * p % S, S)));
            }
        }
        row_twiddle_ = keep(row.data(), int64_t(row.size()));
        keep(plan.row, row_);
        if (plan.row.convolution) keep(*plan.row.convolution, convolution_);
    }

    const std::vector<T>& values() const { return values_; }

    // The plan for tables whose values stand at `base`.
    BlockPlan<T> at(const T* base) const {
        BlockPlan<T> plan;
        plan.fft = host_;
        plan.fft.twiddle = base + twiddle_;
        plan.row_twiddle = base + row_twiddle_;
        plan.fft.row = moved(host_.row, row_, base);
        if (host_.row.convolution) plan.convolution = moved(*host_.row.convolution, convolution_, base);
        return plan;
    }

private:
    struct Offsets {
        int64_t twiddle[kMaxStages] = {}, roots[kMaxStages] = {}, chirp = 0, spectrum = 0;
    };

    int64_t keep(const T* from, int64_t n) {
        const int64_t at = int64_t(values_.size());
        if (from) values_.insert(values_.end(), from, from + n);
        while (values_.size() % 4) values_.push_back(T(0));  // pairs are read as one
        return at;
    }
    void keep(const ComplexPlan<T>& c, Offsets& o) {
        int64_t len = c.size;
        for (int i = 0; i < c.stages; ++i) {
            const int64_t r = c.radix[i], m = len / r;
            o.twiddle[i] = keep(c.twiddle[i], m * (r - 1) * 2);
            o.roots[i] = keep(c.roots[i], 2 * r);
            len = m;
        }
        o.chirp = keep(c.chirp, 2 * c.size);
        o.spectrum = keep(c.chirp_spectrum, 2 * c.inner);
    }
    static ComplexPlan<T> moved(const ComplexPlan<T>& c, const Offsets& o, const T* base) {
        ComplexPlan<T> to = c;
        for (int i = 0; i < c.stages; ++i) {
            to.twiddle[i] = c.twiddle[i] ? base + o.twiddle[i] : nullptr;
            to.roots[i] = c.roots[i] ? base + o.roots[i] : nullptr;
        }
        to.chirp = c.chirp ? base + o.chirp : nullptr;
        to.chirp_spectrum = c.chirp_spectrum ? base + o.spectrum : nullptr;
        to.convolution = nullptr;
        return to;
    }

    RealPlan<T> host_;
    int64_t twiddle_ = 0, row_twiddle_ = 0;
    Offsets row_, convolution_;
    std::vector<T> values_;
};

// The part of a job that follows from the configuration and the waveform. Window, filters, DCT and plan are added.
template <class T>
BlockJob<T> block_job(const Spec& s, const Waveform& wave, int64_t group, uint32_t seed) {
    BlockJob<T> job;
    job.p = kernel_params<T>(s, seed);
    job.data = wave.data;
    job.type = wave.type;
    job.rows = wave.rows;
    job.length = wave.length;
    job.row_stride = wave.row_stride;
    job.sample_stride = wave.sample_stride;
    job.lengths = wave.lengths;
    job.signal_preemphasis = s.preemphasis_of_signal ? T(s.preemphasis) : T(0);
    job.fill = T(s.fill);
    job.frames = s.framing.count(wave.length);
    job.group = group > 0 ? group : wave.rows > 0 ? wave.rows : 1;
    return job;
}

}  // namespace mel
}  // namespace mmfast
