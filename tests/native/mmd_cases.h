// Random kernels and samples, stored in any layout and precision that the mmd kernels read.
#pragma once

#include <array>
#include <memory>
#include <numeric>
#include <string>

#include "common/isa.h"
#include "slow_mmd.h"

namespace test {

using mmfast::ScalarType;
using mmfast::mmd::Set;

inline size_t size_of(ScalarType type) {
    return type == ScalarType::float64 ? 8 : type == ScalarType::float32 ? 4 : 2;
}

// A sample in memory that ends with it; what the layout leaves out is NaN.
class Stored {
public:
    Sample sample;  // as it was rounded

    // `order`: the axes (batch, point, feature) from the outermost to the innermost; `step`: of the innermost.
    Stored(Sample values, ScalarType type, std::array<int, 3> order, int64_t step, int64_t offset)
        : sample(std::move(values)), type_(type) {
        const int64_t shape[3] = {sample.batch, sample.count, sample.features};
        int64_t size = step;
        for (int axis = 2; axis >= 0; --axis) {
            stride_[order[axis]] = size;
            size *= shape[order[axis]];
        }
        size = sample.values.empty() ? 0 : size - step + 1;
        bytes_ = std::make_unique<Buffer<unsigned char>>(size * size_of(type), offset * size_of(type));
        mmfast::dispatch(type, [&](auto* kind) {
            using From = std::remove_pointer_t<decltype(kind)>;
            From* const data = reinterpret_cast<From*>(bytes_->data());
            for (int64_t b = 0, at = 0; b < shape[0]; ++b) {
                for (int64_t i = 0; i < shape[1]; ++i) {
                    for (int64_t c = 0; c < shape[2]; ++c, ++at) {
                        From& to = data[b * stride_[0] + i * stride_[1] + c * stride_[2]];
                        if constexpr (sizeof(From) == 8) {
                            to = From(sample.values[at]);
                            sample.values[at] = double(to);
                        } else {
                            to = From(float(sample.values[at]));
                            sample.values[at] = double(float(to));
                        }
                    }
                }
            }
        });
    }
    Set set() const { return {sample.count, bytes_->data(), type_, stride_[0], stride_[1], stride_[2]}; }

private:
    ScalarType type_;
    int64_t stride_[3];
    std::unique_ptr<Buffer<unsigned char>> bytes_;
};

inline Stored stored(Sample sample, ScalarType type, Random& random) {
    std::array<int, 3> order = {0, 1, 2};
    int64_t step = 1;
    if (random.chance(0.5)) {
        for (int i = 2; i > 0; --i) {
            std::swap(order[i], order[random.below(i + 1)]);
        }
        step = random.between(1, 3);
    }
    return Stored(std::move(sample), type, order, step, random.below(4));
}

// Terms whose values are neither all 0 nor all the same for points of unit variance.
inline Layer random_layer(int64_t dimension, Random& random) {
    Layer layer{Metric(random.chance(0.7) ? 0 : random.below(3)), dimension, {}};
    const double typical = 1 / (2 * std::max(1.0, double(dimension)));
    const auto gamma = [&] { return typical * std::exp(random.normal()); };
    const auto weight = [&] { return random.chance(0.5) ? 1 : 1.5 * random.uniform() + 0.2; };
    if (layer.metric == Metric::l2 && random.chance(0.4)) {  // a ladder of Gaussians
        const double factors[] = {2, 2, 4, 16, 3};
        double g = gamma() / 8;
        const double factor = factors[random.below(5)];
        for (int64_t left = random.between(2, 7); left > 0; --left, g *= factor) {
            layer.terms.push_back({Family::gaussian, weight(), g, 0, 0});
        }
        if (random.chance(0.5)) {
            return layer;
        }
    }
    for (int64_t left = random.chance(0.6) ? 1 : random.between(2, 4); left > 0; --left) {
        const Family f = layer.metric == Metric::dot  ? Family::polynomial
                         : layer.metric == Metric::l1 ? Family::laplacian_l1
                                                      : Family(random.below(6));
        const double g = mmfast::mmd::needs_root(f) || layer.metric == Metric::l1 ? std::sqrt(gamma()) : gamma();
        const double exponents[] = {0.5, 1, 0.7, 2.3};
        Term t{f, weight(), layer.metric == Metric::l1 ? g * g * 2 : g, 0, 0};
        if (f == Family::power) {
            t.exponent = exponents[random.below(4)];
        } else if (f == Family::polynomial) {
            t.exponent = double(random.between(1, 4));
            t.offset = random.chance(0.3) ? 0 : random.normal();
        } else if (f == Family::energy) {
            t.gamma = 0;
        }
        layer.terms.push_back(t);
    }
    return layer;
}

inline Kernel random_kernel(const std::vector<int64_t>& dimensions, Random& random) {
    Kernel kernel;
    for (const int64_t d : dimensions) {
        kernel.layers.push_back(random_layer(d, random));
    }
    return kernel;
}

// Normal points about a mean that may be far from 0; with luck some that coincide.
inline Sample random_sample(int64_t batch, int64_t count, int64_t features, double mean, Random& random) {
    Sample s{batch, count, features, std::vector<double>(batch * count * features)};
    for (double& v : s.values) {
        v = mean + random.normal();
    }
    return s;
}

// Row i of `from` becomes row j of `to`.
inline void repeat(const Sample& from, int64_t i, Sample& to, int64_t j) {
    for (int64_t b = 0; b < to.batch; ++b) {
        std::copy_n(from.row(b, i), to.features, to.values.begin() + (b * to.count + j) * to.features);
    }
}

inline std::string describe(const Kernel& kernel) {
    std::string s;
    for (const Layer& l : kernel.layers) {
        s += " [metric " + std::to_string(int(l.metric)) + " d " + std::to_string(l.dimension);
        for (const Term& t : l.terms) {
            char part[120];
            std::snprintf(part, sizeof part, "; %d w %g g %g o %g e %g", int(t.family), t.weight, t.gamma, t.offset,
                          t.exponent);
            s += part;
        }
        s += "]";
    }
    return s;
}

template <class T>
void fill(const Buffer<T>& to, T value) {
    std::fill_n(to.data(), to.size(), value);
}

template <class T>
std::unique_ptr<Buffer<T>> normals(int64_t n, Random& random, double mean = 0) {
    auto b = std::make_unique<Buffer<T>>(n, random.below(4));
    for (int64_t i = 0; i < n; ++i) {
        (*b)[i] = T(mean + random.normal());
    }
    return b;
}

// The matrix unit multiplies what is rounded to 17 bits, with errors of either sign.
inline bool split() {
    return mmfast::best_isa() == mmfast::Isa::amx;
}

}  // namespace test
