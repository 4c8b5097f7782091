// The reductions of kernel matrices by their definitions, pair by pair in double loops, with a bound on the error that an
// implementation in a given precision may make. Nothing of csrc/ but the structures that describe the task.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <tuple>
#include <vector>

#include "check.h"
#include "mmd/mmd.h"

namespace test {

using mmfast::mmd::Family;
using mmfast::mmd::Kernel;
using mmfast::mmd::Layer;
using mmfast::mmd::Metric;
using Term = mmfast::mmd::Term<double>;
using Real = long double;

// Value and error bound.
struct Approx {
    Real v = 0;
    double e = 0;
    void add(Real w, Real x, double error) {
        v += w * x;
        e += std::abs(double(w)) * error;
    }
    double size() const { return std::abs(double(v)); }
};

// [batch][count][features] as they are stored, so exactly what the implementation reads.
struct Sample {
    int64_t batch = 1, count = 0, features = 0;
    std::vector<double> values;
    const double* row(int64_t b, int64_t i) const { return values.data() + (b * count + i) * features; }
};

// ---- One term ------------------------------------------------------------------------------------------------------

inline Real whole_power(Real x, int n) {
    Real y = 1;
    for (int i = 0; i < n; ++i) {
        y *= x;
    }
    return y;
}

inline Real term_value(const Term& t, Real z) {
    const Real w = t.weight, g = t.gamma;
    const Real a = z < 0 ? 0 : g * std::sqrt(z);
    switch (t.family) {
        case Family::gaussian:
        case Family::laplacian_l1: return w * std::exp(-g * z);
        case Family::laplacian: return w * std::exp(-a);
        case Family::power: return w * std::pow(1 + g * z, -Real(t.exponent));
        case Family::matern32: return w * (1 + a) * std::exp(-a);
        case Family::matern52: return w * (1 + a + a * a / 3) * std::exp(-a);
        case Family::energy: return z < 0 ? 0 : -w * std::sqrt(z);
        case Family::polynomial: break;
    }
    return w * whole_power(g * z + t.offset, int(t.exponent));
}

// The derivative by z; 0 by convention where a function of the distance has none.
inline Real term_slope(const Term& t, Real z) {
    const Real w = t.weight, g = t.gamma;
    if (t.family == Family::polynomial) {
        return w * t.exponent * g * whole_power(g * z + t.offset, int(t.exponent) - 1);
    }
    if (z < 0) {
        z = 0;
    }
    const Real d = std::sqrt(z), a = g * d;
    switch (t.family) {
        case Family::gaussian:
        case Family::laplacian_l1: return -g * w * std::exp(-g * z);
        case Family::laplacian: return z == 0 ? 0 : -g * w * std::exp(-a) / (2 * d);
        case Family::power: return -t.exponent * g * w * std::pow(1 + g * z, -Real(t.exponent) - 1);
        case Family::matern32: return -g * g / 2 * w * std::exp(-a);
        case Family::matern52: return -g * g / 6 * w * (1 + a) * std::exp(-a);
        default: return z == 0 ? 0 : -w / (2 * d);
    }
}

inline bool has_parameter(Family f, int which) {
    return which == 0 || (which == 1 && f != Family::energy) || (which == 2 && f == Family::polynomial) ||
           (which == 3 && f == Family::power);
}

// The derivative by a parameter, by central differences: within 1e-11 of itself and of the scale of the value.
inline Real term_derivative(const Term& t, int which, Real z) {
    if (!has_parameter(t.family, which)) {
        return 0;
    }
    if (which == 0) {  // linear
        Term one = t;
        one.weight = 1;
        return term_value(one, z);
    }
    if (which == 2) {
        return term_slope(t, z) / t.gamma;
    }
    double Term::* const field = which == 1 ? &Term::gamma : &Term::exponent;
    const double step = 0x1p-16 * std::max(0x1p-10, std::abs(t.*field));
    const auto slope = [&](double h) {
        Term above = t, below = t;
        above.*field += h;
        below.*field -= h;
        return (term_value(above, z) - term_value(below, z)) / (Real(above.*field) - Real(below.*field));
    };
    return (4 * slope(step) - slope(2 * step)) / 3;
}

// ---- All pairs -----------------------------------------------------------------------------------------------------

// K(x, y) of one item of a batch, or of K(x, x) without its diagonal, with the derivatives by what each layer measures.
class Pairs {
public:
    struct PerLayer {
        std::vector<Approx> z, slope;  // slope: dK / dz
        int64_t column;
        std::vector<double> spread;  // of each feature, over both samples
    };
    int64_t n, m;
    bool own;
    std::vector<Approx> k;
    std::vector<PerLayer> layers;

    // `eps` is the unit roundoff of the implementation, and `each` the error of one product of a weight with a feature.
    Pairs(const Kernel& kernel, const Sample& x, const Sample& y, int64_t b, bool same, double eps, double each = 0)
        : n(x.count), m(y.count), own(same), k(n * m), kernel_(kernel), x_(x), y_(y), b_(b), eps_(eps), each_(each) {
        int64_t column = 0;
        for (const Layer& l : kernel.layers) {
            layers.push_back(measure(l, column));
            column += l.dimension;
        }
        combine();
    }

    bool skip(int64_t i, int64_t j) const { return own && i == j; }
    const Approx& at(int64_t i, int64_t j) const { return k[i * m + j]; }

    // The derivatives of all K_ij by a parameter of a term, computed when they are first asked for.
    const std::vector<Approx>& by_parameter(size_t layer, size_t term, int which) const {
        std::vector<Approx>& all = by_parameter_[{layer, term, which}];
        if (all.empty()) {
            all.resize(n * m);
            for (int64_t at = 0; at < n * m; ++at) {
                if (const int64_t twin = twin_of(at); twin != at) all[at] = all[twin];
                else if (!skip(at / m, at % m)) all[at] = parameter_at(layer, term, which, at);
            }
        }
        return all;
    }

    // Adds the derivatives by the features: weights[i][j] = dL / dk_ij; `to` [n][features], `to_y` [m][features].
    void add_gradients(const std::vector<Approx>& weights, Approx* to, Approx* to_y) const {
        const int64_t all = x_.features;
        for (size_t l = 0; l < layers.size(); ++l) {
            const Layer& layer = kernel_.layers[l];
            for (int64_t i = 0; i < n; ++i) {
                for (int64_t j = 0; j < m; ++j) {
                    const Approx w = product(weights[i * m + j], layers[l].slope[i * m + j]);
                    if (skip(i, j)) {
                        continue;
                    }
                    const double *p = x_.row(b_, i) + layers[l].column, *q = y_.row(b_, j) + layers[l].column;
                    Approx* const a = to + i * all + layers[l].column;
                    Approx* const b = to_y + j * all + layers[l].column;
                    for (int64_t c = 0; c < layer.dimension; ++c) {
                        add_feature(layer.metric, w, p[c], q[c], layers[l].spread[c], a[c], b[c]);
                    }
                }
            }
        }
    }

private:
    // Of a sample's own pairs (i, j) and (j, i) are the same to the bit: that of them which comes first.
    int64_t twin_of(int64_t at) const {
        const int64_t i = at / m, j = at % m;
        return own && j < i ? j * m + i : at;
    }

    Approx parameter_at(size_t layer, size_t term, int which, int64_t at) const {
        const Term& t = kernel_.layers[layer].terms[term];
        const Approx& z = layers[layer].z[at];
        Approx d{term_derivative(t, which, z.v)};
        for (double e = z.e; e > z.e / 1000; e /= 4) {  // it need not grow with z all the way
            d.e = std::max(d.e, 2 * std::abs(double(term_derivative(t, which, z.v + e) - d.v)));
        }
        // A derivative by an exponent has the logarithm of something near 1.
        const double scale = std::abs(double(term_value(t, z.v)));
        d.e += (16 + 8 * t.exponent) * eps_ * d.size() + 1e-11 * (d.size() + scale);
        d.e += std::pow(0x1p-14 * std::log(std::max(scale, 1e-308)), 4) * d.size();  // of the differences, far out
        d.e += which == 3 ? 4 * eps_ * scale : 0;
        return times_others(d, layer, at);
    }

    // Terms are rounded once, and once more for each sum that they stand in.
    void add_feature(Metric metric, const Approx& w, double p, double q, double spread, Approx& a, Approx& b) const {
        const double more = (8 + std::sqrt(double(n + m))) * eps_ * w.size();
        if (metric == Metric::dot) {
            a.add(q, w.v, w.e + more + each_ * w.size());
            b.add(p, w.v, w.e + more + each_ * w.size());
            return;
        }
        const double d = metric == Metric::l2 ? 2 * (p - q) : p > q ? 1 : p < q ? -1 : (p - q) * 0;
        // Of squares the sums of w x and of w y come apart, about a centre among the points.
        const double size = metric == Metric::l2 ? 4 * spread : 1;
        a.add(d, w.v, w.e);
        b.add(-d, w.v, w.e);
        const double products = metric == Metric::l2 ? 2 * each_ * spread * w.size() : 0;
        a.e += more * size + products;
        b.e += more * size + products;
    }

    Approx product(const Approx& a, const Approx& b) const {
        return {a.v * b.v, a.size() * b.e + a.e * b.size() + a.e * b.e};
    }

    template <class F>
    Approx with_error(const F& f, const Approx& z) const {
        const Real v = f(z.v), above = f(Real(z.v) + z.e), below = f(Real(z.v) - z.e);
        return {v, double(std::max(std::abs(above - v), std::abs(below - v)))};
    }

    PerLayer measure(const Layer& l, int64_t column) const {
        PerLayer r{std::vector<Approx>(n * m), std::vector<Approx>(n * m), column, std::vector<double>(l.dimension)};
        double diameter = 0;
        for (int64_t c = 0; c < l.dimension; ++c) {
            double low = INFINITY, high = -INFINITY;
            for (const Sample* s : {&x_, &y_}) {
                for (int64_t i = 0; i < s->count; ++i) {
                    low = std::fmin(low, s->row(b_, i)[column + c]);
                    high = std::fmax(high, s->row(b_, i)[column + c]);
                }
            }
            r.spread[c] = high > low ? high - low : 0;
            diameter += r.spread[c] * r.spread[c];
        }
        for (int64_t at = 0; at < n * m; ++at) {
            const int64_t twin = twin_of(at);
            r.z[at] = twin != at
                          ? r.z[twin]
                          : distance(l, x_.row(b_, at / m) + column, y_.row(b_, at % m) + column, std::sqrt(diameter));
        }
        return r;
    }

    Approx distance(const Layer& l, const double* p, const double* q, double diameter) const {
        Real z = 0, size = 0;
        for (int64_t c = 0; c < l.dimension; ++c) {
            const Real d = Real(p[c]) - q[c];
            z += l.metric == Metric::dot ? Real(p[c]) * q[c] : l.metric == Metric::l1 ? std::abs(d) : d * d;
            size += std::abs(Real(p[c]) * q[c]);
        }
        // Errors of many additions mostly cancel: the root of their number, and some.
        const double grow = (4 + std::sqrt(double(l.dimension))) * eps_, v = double(z);
        if (l.metric == Metric::dot) {
            double offset = 0;
            for (const Term& t : l.terms) {
                offset = std::max(offset, std::abs(t.offset / t.gamma));
            }
            return {z, grow * double(size) + 2 * eps_ * (offset + std::abs(v))};
        }
        if (l.metric == Metric::l1) {
            return {z, grow * v};
        }
        // Points less the centre are rounded; and products lose what is small beside the norms, unless that is found out.
        const double direct = grow * v + 4 * eps_ * diameter * std::sqrt(v);
        if (l.dimension <= 8) {
            return {z, direct};
        }
        bool roots = false;
        for (const Term& t : l.terms) {
            roots = roots || mmfast::mmd::needs_root(t.family);
        }
        const double norms = 2 * diameter * diameter;
        return {z, direct + grow * (roots ? std::min(norms, 128 * v) : norms)};
    }

    void combine() {
        values_.resize(layers.size());
        for (size_t l = 0; l < layers.size(); ++l) {
            const Layer& layer = kernel_.layers[l];
            std::vector<Approx>& values = values_[l];
            values.resize(n * m);
            int gaussians = 0;
            for (const Term& t : layer.terms) {
                gaussians += t.family == Family::gaussian;
            }
            for (int64_t at = 0; at < n * m; ++at) {
                if (const int64_t twin = twin_of(at); twin != at) {
                    values[at] = values[twin];
                    layers[l].slope[at] = layers[l].slope[twin];
                    continue;
                }
                for (const Term& t : layer.terms) {
                    // A Gaussian may be the sixteenth power of another.
                    const double rounded = (t.family == Family::gaussian && gaussians > 1 ? 64 : 12) * eps_;
                    const double powers = t.family == Family::power ? t.exponent * eps_ : 0;
                    const Approx v = with_error([&](Real z) { return term_value(t, z); }, layers[l].z[at]);
                    const Approx s = with_error([&](Real z) { return term_slope(t, z); }, layers[l].z[at]);
                    values[at].add(1, v.v, v.e + (rounded + 8 * powers) * v.size());
                    layers[l].slope[at].add(1, s.v, s.e + (rounded + 8 * powers) * s.size());
                }
            }
        }
        for (int64_t at = 0; at < n * m; ++at) {
            Approx all = values_[0][at];
            for (size_t l = 1; l < layers.size(); ++l) {
                all = product(all, values_[l][at]);
                all.e += eps_ * all.size();
            }
            k[at] = all;
            for (size_t l = 0; l < layers.size(); ++l) {
                layers[l].slope[at] = times_others(layers[l].slope[at], l, at);
            }
            if (skip(at / m, at % m)) {
                k[at] = {};
            }
        }
    }

    Approx times_others(Approx a, size_t layer, int64_t at) const {
        for (size_t l = 0; l < layers.size(); ++l) {
            if (l != layer) {
                a = product(a, values_[l][at]);
                a.e += eps_ * a.size();
            }
        }
        return a;
    }

    const Kernel& kernel_;
    const Sample &x_, &y_;
    int64_t b_;
    double eps_, each_;
    std::vector<std::vector<Approx>> values_;  // of each layer
    mutable std::map<std::tuple<size_t, size_t, int>, std::vector<Approx>> by_parameter_;
};

// Gradients of one kernel, of all the batch.
struct SlowGradients {
    std::vector<Approx> x, y, weights_x, weights_y, parameters;  // those of parameters only where they are wanted
    SlowGradients(const Kernel& kernel, const Sample& a, const Sample& b, bool with_parameters)
        : x(a.values.size()), y(b.values.size()), weights_x(a.batch * a.count), weights_y(a.batch * b.count),
          parameters(with_parameters ? a.batch * kernel.terms() * 4 : 0) {}

    // What a loss adds whose derivatives by the kernel's values are `weights`; the item's own kernel, with `own`, of x.
    void add(const Kernel& kernel, const Pairs& pairs, int64_t b, int from, int to, const std::vector<Approx>& weights,
             const Sample& a, const Sample& c) {
        Approx* const left = (from ? y : x).data() + b * a.count * a.features;
        Approx* const right = (to ? y : x).data() + b * c.count * c.features;
        pairs.add_gradients(weights, left, right);
        if (parameters.empty()) {
            return;
        }
        int64_t at = b * kernel.terms() * 4;
        for (size_t l = 0; l < kernel.layers.size(); ++l) {
            for (size_t t = 0; t < kernel.layers[l].terms.size(); ++t) {
                for (int which = 0; which < 4; ++which, ++at) {
                    if (has_parameter(kernel.layers[l].terms[t].family, which)) {
                        add_parameter(pairs, l, t, which, weights, parameters[at]);
                    }
                }
            }
        }
    }

private:
    static void add_parameter(const Pairs& pairs, size_t l, size_t t, int which, const std::vector<Approx>& weights,
                              Approx& to) {
        const std::vector<Approx>& derivatives = pairs.by_parameter(l, t, which);
        for (int64_t i = 0; i < pairs.n; ++i) {
            for (int64_t j = 0; j < pairs.m; ++j) {
                const Approx &w = weights[i * pairs.m + j], &d = derivatives[i * pairs.m + j];
                if (!pairs.skip(i, j)) {
                    to.add(w.v, d.v, d.e);
                    to.e += w.e * (d.size() + d.e);
                }
            }
        }
    }
};

}  // namespace test
