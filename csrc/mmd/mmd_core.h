// Scalar mathematics of the kernels between two points: value and derivatives of one term, from what the points' metric
// gives. `M` says what to compute with: a type V (a number, or a vector of numbers) and exp, log, sqrt for it.
#pragma once

#include "common/hd.h"

namespace mmfast {
namespace mmd {

// With s = |x - y|^2, d = sqrt(s), p = x . y, d1 = |x - y|_1, w the weight and g the gamma of a term.
enum class Family : int {
    gaussian,      // w exp(-g s)
    laplacian,     // w exp(-g d)
    power,         // w (1 + g s)^(-exponent)
    matern32,      // w (1 + g d) exp(-g d)
    matern52,      // w (1 + g d + g^2 s / 3) exp(-g d)
    energy,        // -w d
    laplacian_l1,  // w exp(-g d1)
    polynomial,    // w (g p + offset)^exponent, the exponent a whole number
};
constexpr int kFamilies = 8;

enum class Metric : int { l2, l1, dot };

MMFAST_INLINE Metric metric_of(Family f) {
    return f == Family::polynomial ? Metric::dot : f == Family::laplacian_l1 ? Metric::l1 : Metric::l2;
}

// True where the value is a function of d, whose error is large where s is small.
MMFAST_INLINE bool needs_root(Family f) {
    return f == Family::laplacian || f == Family::matern32 || f == Family::matern52 || f == Family::energy;
}

template <class T>
struct Term {
    Family family;
    T weight, gamma, offset, exponent;
};

template <class V>
struct Value {
    V k;  // the kernel's value
    V h;  // its derivative by s, d1 or p
};

// b^e for a whole e >= 0; one multiplication a bit, and one more where the bit is set.
template <class V>
MMFAST_INLINE V whole_power(V b, int e) {
    V result = V{} + 1;
    for (; e > 0; e >>= 1) {
        if (e & 1) result = result * b;
        b = b * b;
    }
    return result;
}

// 1 / d, and 0 at d = 0: the derivative of a distance is taken as 0 where the points coincide.
template <class V>
MMFAST_INLINE V reciprocal_or_zero(V d) {
    return d == 0 ? d * 0 : 1 / d;
}

// The value at z (s, d1 or p) and its derivative by z.
template <class M, class T>
MMFAST_INLINE Value<typename M::V> value(const Term<T>& t, typename M::V z) {
    using V = typename M::V;
    const T g = t.gamma, w = t.weight;
    switch (t.family) {
        case Family::gaussian:
        case Family::laplacian_l1: {
            const V k = w * M::exp(-g * z);
            return {k, -g * k};
        }
        case Family::laplacian: {
            const V d = M::sqrt(z), k = w * M::exp(-g * d);
            return {k, T(-0.5) * g * k * reciprocal_or_zero(d)};
        }
        case Family::power: {
            const V u = 1 + g * z;
            const V k = t.exponent == T(1)     ? w / u
                        : t.exponent == T(0.5) ? w / M::sqrt(u)
                                               : w * M::exp(-t.exponent * M::log(u));
            return {k, -t.exponent * g * k / u};
        }
        case Family::matern32: {
            const V a = g * M::sqrt(z), e = w * M::exp(-a);
            return {(1 + a) * e, T(-0.5) * g * g * e};
        }
        case Family::matern52: {
            const V a = g * M::sqrt(z), e = w * M::exp(-a);
            return {(1 + a + a * a * T(1.0 / 3)) * e, T(-1.0 / 6) * g * g * (1 + a) * e};
        }
        case Family::energy: {
            const V d = M::sqrt(z);
            return {-w * d, T(-0.5) * w * reciprocal_or_zero(d)};
        }
        case Family::polynomial: break;
    }
    const int e = int(t.exponent);
    const V b = g * z + t.offset, lower = whole_power(b, e - 1);
    return {w * lower * b, w * t.exponent * g * lower};
}

template <class V>
struct ParameterGradient {
    V weight, gamma, offset, exponent;
};

// Derivatives of the value at z by the parameters of the term.
template <class M, class T>
MMFAST_INLINE ParameterGradient<typename M::V> parameter_gradient(const Term<T>& t, typename M::V z) {
    using V = typename M::V;
    Term<T> unit = t;
    unit.weight = 1;
    const V k = value<M>(unit, z).k, zero{};
    const T g = t.gamma, w = t.weight;
    switch (t.family) {
        case Family::gaussian:
        case Family::laplacian_l1: return {k, -w * z * k, zero, zero};
        case Family::laplacian: return {k, -w * M::sqrt(z) * k, zero, zero};
        case Family::power: {
            const V u = 1 + g * z;
            return {k, -w * t.exponent * z * k / u, zero, -w * M::log(u) * k};
        }
        case Family::matern32: return {k, -w * g * z * M::exp(-g * M::sqrt(z)), zero, zero};
        case Family::matern52: {
            const V a = g * M::sqrt(z);
            return {k, T(-1.0 / 3) * w * g * z * (1 + a) * M::exp(-a), zero, zero};
        }
        case Family::energy: return {k, zero, zero, zero};
        case Family::polynomial: break;
    }
    const V lower = w * t.exponent * whole_power(g * z + t.offset, int(t.exponent) - 1);
    return {k, z * lower, lower, zero};
}

}  // namespace mmd
}  // namespace mmfast
