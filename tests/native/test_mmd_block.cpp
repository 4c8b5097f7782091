// The GPU's block of threads for few features, run on the host against double loops, the items of each phase in an order
// that changes, since no result may depend on it.
#include <cassert>
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <vector>

#include "mmd/mmd_block.h"

using namespace mmfast;
using namespace mmfast::mmd;

namespace {

struct HostBlock {
    mutable int phase = 0;
    template <class F>
    void each(int n, const F& f) const {
        ++phase;
        for (int i = 0; i < n; ++i) f(phase % 3 == 0 ? i : phase % 3 == 1 ? n - 1 - i : (i + n / 2) % n);
    }
};

struct Case {
    const char* name;
    std::vector<Family> families;
    std::vector<double> parameters;
    int64_t n, m;
    int dimension, shares;
    bool weighted, gradient;
    std::vector<double> coefs;
};

double measure(Metric metric, const double* p, const double* q, int dimension) {
    double z = 0;
    for (int d = 0; d < dimension; ++d)
        z += metric == Metric::dot  ? p[d] * q[d]
             : metric == Metric::l2 ? (p[d] - q[d]) * (p[d] - q[d])
                                    : std::fabs(p[d] - q[d]);
    return z;
}

// As the GPU runs a job; `any` is the code for any terms.
template <class T, int D>
void run_block(const FewJob<T>& job, const HostBlock& block, FewMemory<T, D>& memory, int64_t index, bool any) {
    const Few<T, D, HostBlock> few(job, block, memory, index);
    if (any || !all_gaussians(job)) return few.run();
    if (job.terms == 1)
        return job.gradient ? few.template run_gaussians<true, true>() : few.template run_gaussians<false, true>();
    if (job.gradient) return few.template run_gaussians<true, false>();
    few.template run_gaussians<false, false>();
}

template <class T, int D>
void run(const Case& c, double tolerance, bool any = false) {
    std::mt19937 random(7);
    std::normal_distribution<double> normal;
    const int64_t batch = 2, total = c.n + c.m;
    const auto numbers = [&](int64_t count, bool positive) {
        std::vector<T> v(count);
        for (T& t : v) t = T(positive ? std::fabs(normal(random)) + 0.1 : normal(random));
        return v;
    };
    std::vector<T> x = numbers(batch * c.n * c.dimension, false), y = numbers(batch * c.m * c.dimension, false);
    for (int d = 0; d < c.dimension; ++d) y[d] = x[d];  // points that coincide
    const std::vector<T> wx = numbers(batch * c.n, true), wy = numbers(batch * c.m, true);
    std::vector<double> sums(batch * c.shares * 2 * total, NAN);
    std::vector<T> gradient(batch * c.shares * total * c.dimension, T(NAN));
    FewJob<T> job{batch,
                  c.n,
                  c.m,
                  c.dimension,
                  x.data(),
                  y.data(),
                  c.weighted ? wx.data() : nullptr,
                  c.weighted ? wy.data() : nullptr,
                  c.coefs.data(),
                  c.parameters.data(),
                  int(c.families.size()),
                  {},
                  c.shares,
                  false,
                  sums.data(),
                  c.gradient ? gradient.data() : nullptr};
    for (size_t t = 0; t < c.families.size(); ++t) job.families[t] = uint8_t(c.families[t]);
    const auto memory = std::make_unique<FewMemory<T, D>>();
    const HostBlock block;
    const int64_t blocks = few_tiles(c.n, c.m, kFewRows) * c.shares * batch;
    for (int64_t i = blocks - 1; i >= 0; --i) run_block<T, D>(job, block, *memory, i, any);

    const Metric metric = metric_of(c.families[0]);
    double worst_sum = 0, worst_gradient = 0, size_sum = 0, size_gradient = 0;
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t i = 0; i < total; ++i) {
            double expected[2] = {0, 0};
            std::vector<double> by(c.dimension, 0.0), p(c.dimension), q(c.dimension);
            const auto point = [&](int64_t r, std::vector<double>& to) {
                for (int d = 0; d < c.dimension; ++d)
                    to[d] = r < c.n ? x[(b * c.n + r) * c.dimension + d] : y[(b * c.m + r - c.n) * c.dimension + d];
            };
            const auto weight = [&](int64_t r) {
                return !c.weighted ? 1.0 : r < c.n ? double(wx[b * c.n + r]) : double(wy[b * c.m + r - c.n]);
            };
            point(i, p);
            for (int64_t j = 0; j < total; ++j) {
                const bool second = j >= c.n, of_y = i >= c.n;
                const double coef = second != of_y ? c.coefs[2] : 2 * c.coefs[second];
                if (j == i || coef == 0) continue;
                point(j, q);
                const double z = measure(metric, p.data(), q.data(), c.dimension);
                for (size_t t = 0; t < c.families.size(); ++t) {
                    const double* const v = &c.parameters[4 * t];
                    const Value<double> k =
                        value<Numbers<double>>(Term<double>{c.families[t], v[0], v[1], v[2], v[3]}, z);
                    expected[second] += weight(j) * k.k;
                    for (int d = 0; d < c.dimension; ++d) {
                        const double difference = p[d] - q[d];
                        const double slope = metric == Metric::dot  ? q[d]
                                             : metric == Metric::l2 ? 2 * difference
                                                                    : double((difference > 0) - (difference < 0));
                        by[d] += coef * weight(i) * weight(j) * k.h * slope;
                    }
                }
            }
            for (int s = 0; s < 2; ++s) {
                double found = 0;
                for (int64_t h = 0; h < c.shares; ++h) found += sums[((b * c.shares + h) * 2 + s) * total + i];
                worst_sum = std::fmax(worst_sum, std::fabs(found - expected[s]));
                size_sum = std::fmax(size_sum, std::fabs(expected[s]));
                assert(found == found);
            }
            for (int d = 0; c.gradient && d < c.dimension; ++d) {
                double found = 0;
                for (int64_t h = 0; h < c.shares; ++h)
                    found += gradient[((b * c.shares + h) * total + i) * c.dimension + d];
                assert(found == found);
                worst_gradient = std::fmax(worst_gradient, std::fabs(found - by[d]));
                size_gradient = std::fmax(size_gradient, std::fabs(by[d]));
            }
        }
    std::printf("%-12s %zu bytes, D %2d: sums %.1e, gradient %.1e\n", c.name, sizeof(T), c.dimension,
                worst_sum / size_sum, c.gradient ? worst_gradient / size_gradient : 0.0);
    assert(worst_sum <= tolerance * size_sum);
    assert(worst_gradient <= tolerance * size_gradient);
}

}  // namespace

int main() {
    const std::vector<double> all = {0.3, 0.2, -0.5};
    const std::vector<Family> five(5, Family::gaussian);
    const std::vector<double> ladder = {1, 1.6, 0, 0, 1, 0.8, 0, 0, 0.5, 0.4, 0, 0, 1, 0.2, 0, 0, 2, 0.1, 0, 0};
    const std::vector<double> apart = {1, 1.7, 0, 0, 1, 0.8, 0, 0, 0.5, 0.4, 0, 0, 1, 0.2, 0, 0, 2, 0.1, 0, 0};
    const std::vector<Case> cases = {
        {"gaussian", {Family::gaussian}, {1.5, 0.3, 0, 0}, 130, 129, 3, 1, false, true, all},
        {"ladder", five, ladder, 128, 257, 2, 2, false, true, all},
        {"no ladder", five, apart, 100, 50, 3, 3, true, true, all},
        {"mixed",
         {Family::laplacian, Family::matern32, Family::matern52, Family::energy, Family::power},
         {1, 0.4, 0, 0, 0.5, 0.7, 0, 0, 1, 0.3, 0, 0, 0.1, 0, 0, 0, 1, 0.5, 0, 0.5},
         140,
         20,
         3,
         2,
         true,
         true,
         all},
        {"l1", {Family::laplacian_l1}, {1, 0.3, 0, 0}, 60, 140, 3, 1, true, true, all},
        {"polynomial", {Family::polynomial}, {1, 0.3, 1, 3}, 60, 140, 3, 2, false, true, all},
        {"no gradient", {Family::gaussian}, {1, 0.3, 0, 0}, 20, 30, 3, 1, false, false, all},
        {"left out", {Family::gaussian}, {1, 0.3, 0, 0}, 20, 30, 3, 1, false, true, {0.3, 0, -0.5}},
        {"one point", {Family::gaussian}, {1, 0.3, 0, 0}, 1, 1, 1, 1, false, true, all},
    };
    for (Case c : cases) {
        run<float, 3>(c, 2e-5);
        run<double, 3>(c, 1e-13);
        run<double, 3>(c, 1e-13, true);
        c.dimension = 13;
        run<float, 16>(c, 2e-5);
        run<double, 16>(c, 1e-13);
    }
    // Each number of rungs, around the size of a tile and of a group of columns, and each number of features.
    const int64_t sizes[] = {1, 7, 8, 9, 127, 128, 129, 135, 136};
    for (int i = 0; i < 36; ++i) {
        const int rungs = i % 9 + 1;
        Case c{"rungs",
               std::vector<Family>(rungs, Family::gaussian),
               {},
               sizes[i % 7],
               sizes[(i * 5 + 2) % 9],
               1,
               1 + i % 2,
               i % 4 < 2,
               i / 9 % 2 == 0,
               all};
        for (int t = 0; t < rungs; ++t)
            for (const double v : {0.5 + 0.25 * (t % 3), std::ldexp(0.04, rungs - 1 - t), 0.0, 0.0})
                c.parameters.push_back(v);
        if (i >= 18) c.parameters[1] *= 1.01;  // no ladder any more
        c.dimension = 1 + i % 2;
        run<float, 2>(c, 1e-5);
        run<double, 2>(c, 1e-13);
        c.dimension = 3 + i % 2;
        run<double, 4>(c, 1e-13);
        c.dimension = 5 + i % 4;
        run<float, 8>(c, 1e-5);
        c.dimension = 9 + i % 8;
        run<double, 16>(c, 1e-13);
    }
    std::puts("mmd_block: fine");
}
