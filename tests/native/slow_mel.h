// The mel front end by its definition (the formulas of MelConfig), in long double, with a bound on the error that an
// implementation in a given precision may make. Nothing of csrc/ but the structures that describe the task.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <vector>

#include "check.h"
#include "mel/mel.h"

namespace test {

using mmfast::Energy;
using mmfast::Framing;
using mmfast::PadMode;
using Real = long double;

inline const Real kPi = std::acos(Real(-1));
inline constexpr Real kInfinity = std::numeric_limits<Real>::infinity();

// Value and error bound.
struct Approx {
    Real v = 0, e = 0;
};

struct Problem {
    mmfast::mel::Spec spec;
    int64_t rows = 1, length = 0, n_filters = 0, cepstra = 0, group = 1;
    uint32_t seed = 0;
    std::vector<Real> x;           // [rows][length]
    std::vector<int64_t> lengths;  // [rows], or empty
    std::vector<Real> window, filters, dct;

    int64_t bins() const { return spec.n_fft / 2 + 1; }
    int64_t bands() const { return n_filters ? n_filters : bins(); }
    int64_t features() const {
        const bool more = spec.energy == Energy::prepend || spec.energy == Energy::append;
        return (cepstra ? cepstra : bands()) + more;
    }
    int64_t row_length(int64_t b) const {
        return lengths.empty() ? length : std::max<int64_t>(0, std::min(lengths[b], length));
    }
};

struct Solution {
    int64_t frames = 0, features = 0;
    std::vector<int64_t> counts;
    std::vector<Approx> value;   // [rows][frames][features], frames past the count: fill
    std::vector<Approx> maxima;  // [groups]
    const Approx& at(int64_t b, int64_t f, int64_t c) const { return value[(b * frames + f) * features + c]; }
};

// Frames are counted one by one.
inline int64_t slow_count(const Framing& f, int64_t length) {
    int64_t n = 0;
    if (length >= f.min_length) {
        while ((n + 1) * f.hop <= length + f.count_offset) {
            ++n;
        }
    }
    return n;
}

// The padded signal is walked back from q until it is reached.
inline int64_t slow_source(const Framing& f, int64_t q, int64_t length) {
    const int64_t n = length + 2 * f.pad;
    q += f.pad;
    while (q < 0 || q >= n) {
        if (n == 0 || f.mode == PadMode::constant) {
            return -1;
        }
        switch (f.mode) {
            case PadMode::replicate: q += q < 0 ? 1 : -1; break;
            case PadMode::circular: q += q < 0 ? n : -n; break;
            case PadMode::mirror: q = q < 0 ? -1 - q : 2 * n - 1 - q; break;
            default: q = n == 1 ? 0 : q < 0 ? -q : 2 * (n - 1) - q;
        }
    }
    q -= f.pad;
    return q >= 0 && q < length ? q : -1;
}

inline Real slow_noise(uint32_t seed, int64_t row, int64_t frame, int64_t n) {
    const auto mix = [](uint64_t x) {
        x &= 0xffffffffu;
        x = (x ^ (x >> 16)) * 0x7feb352du & 0xffffffffu;
        x = (x ^ (x >> 15)) * 0x846ca68bu & 0xffffffffu;
        return x ^ (x >> 16);
    };
    const uint64_t key = mix(mix(mix(seed) + uint64_t(row)) + uint64_t(frame));
    const Real u = Real((mix(key + 2 * uint64_t(n)) >> 8) + 1) / (1 << 24);
    const Real w = Real(mix(key + 2 * uint64_t(n) + 1) >> 8) / (1 << 24);
    return std::sqrt(-2 * std::log(u)) * std::cos(2 * kPi * w);
}

// cos and -sin of 2 pi j / n.
inline const std::vector<Approx>& slow_roots(int64_t n) {
    static std::map<int64_t, std::vector<Approx>> known;
    std::vector<Approx>& roots = known[n];
    for (int64_t j = int64_t(roots.size()); j < n; ++j) {
        roots.push_back({std::cos(2 * kPi * j / n), -std::sin(2 * kPi * j / n)});
    }
    return roots;
}

// f(v) for an increasing f, its own rounding aside.
template <class F>
Approx increasing(Approx a, const F& f) {
    const Real y = f(a.v);
    if (a.e == 0 || a.v != a.v) {
        return {y, 0};
    }
    return {y, std::max(f(a.v + a.e) - y, y - f(a.v - a.e))};
}

// Rounding does nothing to infinity.
inline Real size_of(Real v) {
    return std::isinf(v) ? 0 : std::abs(v);
}

class SlowMel {
public:
    // eps: machine epsilon of the implementation that the error bounds are for; 0 if they are not wanted.
    SlowMel(const Problem& problem, Real eps) : p_(problem), s_(problem.spec), eps_(eps) {
        for (Real w : p_.window) {
            window_square_ += w * w;
            widest_ = std::max(widest_, std::abs(w));
        }
    }

    Solution solve() const {
        Solution out;
        out.frames = slow_count(s_.framing, p_.length);
        out.features = p_.features();
        const int64_t bands = p_.bands();
        std::vector<Approx> v(p_.rows * out.frames * bands), energy(p_.rows * out.frames);
        for (int64_t b = 0; b < p_.rows; ++b) {
            out.counts.push_back(slow_count(s_.framing, p_.row_length(b)));
            for (int64_t f = 0; f < out.counts[b]; ++f) {
                one_frame(b, f, &v[(b * out.frames + f) * bands], &energy[b * out.frames + f]);
            }
        }
        out.maxima.assign(s_.has_top_db ? groups() : 0, {-kInfinity, 0});
        const std::vector<Approx> threshold = s_.has_top_db ? thresholds(out, v) : std::vector<Approx>();
        out.value.assign(p_.rows * out.frames * out.features, {Real(s_.fill), 0});
        for (int64_t b = 0; b < p_.rows; ++b) {
            for (int64_t f = 0; f < out.counts[b]; ++f) {
                const int64_t i = b * out.frames + f;
                finish(&v[i * bands], energy[i], s_.has_top_db ? &threshold[b / group()] : nullptr,
                       &out.value[i * out.features]);
            }
        }
        return out;
    }

private:
    int64_t group() const { return p_.group > 0 ? p_.group : std::max<int64_t>(1, p_.rows); }
    int64_t groups() const { return (p_.rows + group() - 1) / group(); }

    // With the magnitude that its rounding is relative to.
    Approx sample(int64_t b, int64_t q) const {
        const int64_t i = slow_source(s_.framing, q, p_.row_length(b));
        if (i < 0) {
            return {};
        }
        const Real* x = &p_.x[b * p_.length];
        const bool emphasis = s_.preemphasis_of_signal && s_.preemphasis != 0 && i > 0;
        const Real before = emphasis ? s_.preemphasis * x[i - 1] : 0;
        return {x[i] - before, std::abs(x[i]) + std::abs(before)};
    }

    void one_frame(int64_t b, int64_t f, Approx* v, Approx* energy) const {
        const int64_t n = s_.framing.window;
        std::vector<Real> y(n);
        Real size = 0, sum = 0;
        for (int64_t i = 0; i < n; ++i) {
            const Approx x = sample(b, s_.framing.first + f * s_.framing.hop + i);
            const Real noise = s_.dither != 0 ? s_.dither * slow_noise(p_.seed, b, f, i) : 0;
            const Real magnitude = x.e * std::abs(Real(s_.input_scale)) + std::abs(noise);
            y[i] = x.v * s_.input_scale + noise;
            size += magnitude * magnitude;
            sum += y[i];
        }
        size = std::sqrt(size) * (1 + std::abs(Real(s_.preemphasis)));
        if (s_.remove_dc) {
            for (Real& value : y) {
                value -= sum / n;
            }
        }
        Approx square = s_.raw_energy ? square_sum(y, size) : Approx();
        if (s_.preemphasis != 0 && !s_.preemphasis_of_signal) {
            for (int64_t i = n - 1; i >= 0; --i) {
                y[i] -= s_.preemphasis * y[std::max<int64_t>(i - 1, 0)];
            }
        }
        for (int64_t i = 0; i < n; ++i) {
            y[i] *= p_.window[i];
        }
        if (!s_.raw_energy) {
            square = square_sum(y, size * widest_);
        }
        *energy = log_energy(square);
        std::vector<Approx> power(p_.bins());
        spectrum(y, size * widest_, power);
        filter(power, v);
        for (int64_t i = 0; i < p_.bands() && s_.log; ++i) {
            v[i] = logarithm(v[i]);
        }
    }

    Approx square_sum(const std::vector<Real>& y, Real size) const {
        Real sum = 0;
        for (Real value : y) {
            sum += value * value;
        }
        return {sum, eps_ * (8 + Real(y.size()) / 2) * size * size};
    }

    Approx log_energy(Approx square) const {
        Approx e = increasing(square, [](Real x) { return std::log(std::max(x, Real(0x1p-23))); });
        e.e += 2 * eps_ * std::abs(e.v);
        if (s_.energy_floor > 0 && e.v < std::log(Real(s_.energy_floor))) {
            e.v = std::log(Real(s_.energy_floor));
            e.e += 2 * eps_ * std::abs(e.v);
        }
        return square.v != square.v ? square : e;
    }

    void spectrum(const std::vector<Real>& y, Real size, std::vector<Approx>& power) const {
        const std::vector<Approx>& roots = slow_roots(s_.n_fft);
        const Real d = eps_ * size * (4 + 2 * std::log2(Real(s_.n_fft)));
        const Real scale = s_.normalized == 1 ? window_square_ : s_.normalized == 2 ? Real(s_.n_fft) : 1;
        for (int64_t k = 0; k < p_.bins(); ++k) {
            Real re = 0, im = 0;
            int64_t j = 0;
            for (Real value : y) {
                re += value * roots[j].v;
                im += value * roots[j].e;
                j += k;
                j -= j >= s_.n_fft ? s_.n_fft : 0;
            }
            const Real square = re * re + im * im;
            Approx p{square / scale + s_.power_offset, (2 * std::sqrt(square) * d + d * d) / scale};
            p.e += 4 * eps_ * p.v;
            const Real exponent = Real(s_.power) / 2;
            power[k] = increasing(p, [exponent](Real x) {
                if (exponent == 1 || !(x > 0)) {
                    return x > 0 ? x : x * 0;
                }
                return exponent == 0.5L ? std::sqrt(x) : std::pow(x, exponent);
            });
            power[k].e += 8 * eps_ * power[k].v;
        }
    }

    void filter(const std::vector<Approx>& power, Approx* m) const {
        if (!p_.n_filters) {
            std::copy(power.begin(), power.end(), m);
            return;
        }
        for (int64_t i = 0; i < p_.n_filters; ++i) {
            Approx sum;
            Real size = 0;
            int64_t terms = 0;
            for (int64_t k = 0; k < p_.bins(); ++k) {
                const Real w = p_.filters[k * p_.n_filters + i];
                sum.v += w * power[k].v;
                sum.e += std::abs(w) * power[k].e;
                size += std::abs(w) * power[k].v;
                terms += w != 0;
            }
            sum.e += eps_ * Real(2 + terms / 4) * size;
            m[i] = sum;
        }
    }

    Approx logarithm(Approx m) const {
        const Real floor = s_.log_floor, offset = s_.log_offset;
        const auto f = [&](Real x) { return std::log((x < floor ? floor : x) + offset); };
        const Real y = (m.v < floor ? floor : m.v) + offset;
        // Below zero the logarithm is of no use, nor is a comparison.
        Approx v{f(m.v), 0};
        if (m.e > 0) {
            const Real low = std::max(m.v - m.e, floor) + offset;
            v.e = low > 0 ? std::max(f(m.v + m.e) - v.v, v.v - f(m.v - m.e)) : kInfinity;
        }
        v.e += y > 0 ? 2 * eps_ * (std::abs(v.v) + 1) : 0;
        v.v = v.v * s_.log_scale + s_.log_shift;
        v.e = v.e * s_.log_scale + 2 * eps_ * (y > 0 ? std::abs(v.v) + std::abs(Real(s_.log_shift)) : 0);
        return v;
    }

    // A NaN anywhere in the group makes its maximum NaN.
    std::vector<Approx> thresholds(Solution& out, const std::vector<Approx>& v) const {
        std::vector<Approx> top(groups(), {-kInfinity, 0});
        const int64_t bands = p_.bands();
        for (int64_t b = 0; b < p_.rows; ++b) {
            Approx& t = top[b / group()];
            for (int64_t i = b * out.frames * bands; i < (b * out.frames + out.counts[b]) * bands; ++i) {
                if (t.v == t.v && !(v[i].v <= t.v)) {
                    t = v[i];
                }
            }
        }
        for (int64_t b = 0; b < p_.rows; ++b) {  // others may come out larger
            Approx& t = top[b / group()];
            for (int64_t i = b * out.frames * bands; i < (b * out.frames + out.counts[b]) * bands; ++i) {
                if (v[i].v + v[i].e > t.v + t.e) {
                    t.e = v[i].v + v[i].e - t.v;
                }
            }
        }
        for (int64_t g = 0; g < groups(); ++g) {
            out.maxima[g] = top[g];
            top[g].v -= s_.top_db;
            if (std::isfinite(top[g].v)) {
                top[g].e += 2 * eps_ * (std::abs(out.maxima[g].v) + s_.top_db);
            }
        }
        return top;
    }

    void finish(Approx* v, Approx energy, const Approx* threshold, Approx* out) const {
        const int64_t bands = p_.bands();
        for (int64_t i = 0; i < bands; ++i) {
            if (threshold) {
                const Real e = std::max(v[i].e, threshold->e);
                // What certainly lies below the threshold has its error alone.
                const bool below = v[i].v + v[i].e < threshold->v || threshold->v != threshold->v;
                const bool above = v[i].v - v[i].e > threshold->v;
                v[i] = {v[i].v > threshold->v ? v[i].v : threshold->v, below ? threshold->e : above ? v[i].e : e};
            }
            v[i].e = std::abs(Real(s_.output_scale)) *
                     (v[i].e + 3 * eps_ * (size_of(v[i].v) + std::abs(Real(s_.output_offset))));
            v[i].v = (v[i].v + s_.output_offset) * s_.output_scale;
        }
        const bool first = s_.energy == Energy::prepend;
        const int64_t count = p_.cepstra ? p_.cepstra : bands;
        for (int64_t j = 0; j < count; ++j) {
            Approx& c = out[j + first];
            if (!p_.cepstra) {
                c = v[j];
                continue;
            }
            c = {};
            for (int64_t i = 0; i < bands; ++i) {
                const Real w = p_.dct[i * p_.cepstra + j];
                c.v += w * v[i].v;
                c.e += std::abs(w) * (v[i].e + eps_ * Real(2 + bands / 2) * size_of(v[i].v));
            }
        }
        if (first || s_.energy == Energy::replace_first) {
            out[0] = energy;
        } else if (s_.energy != Energy::none) {
            out[p_.features() - 1] = energy;
        }
    }

    const Problem& p_;
    const mmfast::mel::Spec& s_;
    Real eps_, window_square_ = 0, widest_ = 0;
};

}  // namespace test
