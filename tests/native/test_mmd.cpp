// The mmd kernels of the instruction set that MMFAST_CPU_ISA allows, against the definitions in slow_mmd.h.
#include <optional>

#include "mmd_cases.h"

namespace {

using namespace test;
using namespace mmfast::mmd;
using test::Pairs;  // not the sweep's

std::string current;  // the case at hand
#define CHECK_CASE(condition, format, ...) CHECK(condition, format "\n  in %s", __VA_ARGS__, current.c_str())

// Unit roundoff.
template <class T>
const double kEps = sizeof(T) == 8 ? 0x1p-53
                    : split()      ? 0x1.8p-22
                                   : 0x1p-24;

// What one product of split factors may be off by at worst, beside the mean that is part of kEps: factors just above a
// power of two, with l at its largest. Where a sum has many terms they cancel; of one or two it is all there is.
template <class T>
const double kEach = sizeof(T) == 4 && split() ? 0x1p-15 : 0;

// Sums in double are rounded with each value: errors that cancel, in float32 not worth a word. But the values of a kernel
// without features are all the same and so are the roundings, as long as the sum is between the same powers of two. At
// least four sums are taken side by side.
template <class T>
double of_sum(const Kernel& kernel, int64_t count) {
    for (const Layer& l : kernel.layers) {
        if (l.dimension) return 0;
    }
    return sizeof(T) == 8 ? double(count) / 4 * kEps<T> : 0;
}

struct Tally {
    double largest = 0;  // error, in parts of the bound
    int64_t values = 0, vague = 0;
    void report(const char* what) const {
        std::printf("  %s: %ld values, errors up to %.2f of the bound, %.2f%% vague\n", what, long(values), largest,
                    100.0 * double(vague) / double(std::max<int64_t>(1, values)));
        CHECK(values > 0 && vague * 20 <= values, "%s: %ld of %ld values have a bound that says nothing", what,
              long(vague), long(values));
    }
};
Tally sum_tally, product_tally, gradient_tally, parameter_tally, distance_tally;

template <class T>
void compare(double is, const Approx& exact, Tally& tally, const char* what, int64_t at) {
    ++tally.values;
    const struct {
        double v, e;
    } should{double(exact.v), exact.e};
    if (std::isnan(should.v)) {
        CHECK_CASE(std::isnan(is), "%s %ld is %g instead of NaN", what, long(at), is);
        return;
    }
    const double bound = should.e + 2 * kEps<T> * std::abs(should.v) + (sizeof(T) == 4 ? 1e-36 : 1e-290);
    tally.vague += should.e > 0.1 * (std::abs(should.v) + 1e-3);
    tally.largest = std::max(tally.largest, std::abs(is - should.v) / bound);
    CHECK_CASE(std::abs(is - should.v) <= bound, "%s %ld is %.17g instead of %.17g, off by %.3g, allowed %.3g", what,
               long(at), is, should.v, is - should.v, bound);
}

template <class T, class To>
void compare_all(const Buffer<To>& is, std::vector<Approx> should, double start, Tally& tally, const char* what) {
    CHECK_CASE(is.size() == int64_t(should.size()), "%s: %ld values instead of %ld", what, long(is.size()),
               long(should.size()));
    for (int64_t i = 0; i < is.size(); ++i) {
        should[i].v += start;
        should[i].e += 16 * kEps<T> * start;  // what was there is rounded with each sum
        compare<T>(double(is[i]), should[i], tally, what, i);
    }
}

// ---- Cases ---------------------------------------------------------------------------------------------------------

// Two samples, what is known of their kernel matrices, and room for gradients.
template <class T>
struct Case {
    Kernel kernel;
    Stored x, y;
    Random& random;
    std::vector<Pairs> xx, yy, xy;  // of each item of the batch

    Case(Kernel k, Sample a, Sample b, ScalarType type, Random& r)
        : kernel(std::move(k)), x(stored(std::move(a), type, r)), y(stored(std::move(b), type, r)), random(r) {
        current = std::string(sizeof(T) == 4 ? "float" : "double") + " type " + std::to_string(int(type)) + " b " +
                  std::to_string(batch()) + " n " + std::to_string(n()) + " m " + std::to_string(m()) +
                  describe(kernel);
        for (int64_t i = 0; i < batch(); ++i) {
            xx.emplace_back(kernel, x.sample, x.sample, i, true, kEps<T>, kEach<T>);
            yy.emplace_back(kernel, y.sample, y.sample, i, true, kEps<T>, kEach<T>);
            xy.emplace_back(kernel, x.sample, y.sample, i, false, kEps<T>, kEach<T>);
        }
    }
    Case(const Case&) = delete;

    int64_t batch() const { return x.sample.batch; }
    int64_t n() const { return x.sample.count; }
    int64_t m() const { return y.sample.count; }
    const Pairs& pairs(int64_t b, int kind) const { return kind == 0 ? xx[b] : kind == 1 ? yy[b] : xy[b]; }
};

// Memory for the gradients that are wanted, and the check of what came.
template <class T>
class Asked {
public:
    Gradients<T> pointers;

    Asked(const Kernel& kernel, const Sample& x, const Sample* y, bool weighted_x, bool weighted_y, Random& random,
          bool parameters = true)
        : start_(random.chance(0.3) ? 1 : 0) {
        const auto maybe = [&](auto& to, int64_t size, auto*& pointer, bool can) {
            if (can && random.chance(0.7)) {
                to.emplace(size, random.below(4));
                fill(*to, std::remove_reference_t<decltype((*to)[0])>(start_));
                pointer = to->data();
            }
        };
        maybe(x_, int64_t(x.values.size()), pointers.x, true);
        maybe(y_, y ? int64_t(y->values.size()) : 0, pointers.y, y);
        maybe(weights_x_, x.batch * x.count, pointers.weights_x, weighted_x);
        maybe(weights_y_, y ? y->batch * y->count : 0, pointers.weights_y, weighted_y);
        maybe(parameters_, x.batch * kernel.terms() * 4, pointers.parameters, parameters);
    }
    void check(const SlowGradients& should) const {
        if (x_) compare_all<T>(*x_, should.x, start_, gradient_tally, "gradient of x");
        if (y_) compare_all<T>(*y_, should.y, start_, gradient_tally, "gradient of y");
        if (weights_x_) compare_all<T>(*weights_x_, should.weights_x, start_, gradient_tally, "gradient of wx");
        if (weights_y_) compare_all<T>(*weights_y_, should.weights_y, start_, gradient_tally, "gradient of wy");
        if (parameters_) compare_all<T>(*parameters_, should.parameters, start_, parameter_tally, "parameter");
    }

private:
    double start_;
    std::optional<Buffer<T>> x_, y_;
    std::optional<Buffer<double>> weights_x_, weights_y_, parameters_;
};

// ---- Operations ----------------------------------------------------------------------------------------------------

// Kernels whose parameters have no gradients go another way.
template <class T>
void check_quadratic(Case<T>& c, bool parameters = true) {
    Random& random = c.random;
    const double eps = kEps<T>;
    std::unique_ptr<Buffer<T>> w[2];
    const int64_t count[2] = {c.n(), c.m()};
    for (int side = 0; side < 2; ++side) {
        if (random.chance(0.5)) w[side] = normals<T>(c.batch() * count[side], random, 1);
    }
    double coefs[3];
    for (double& v : coefs) v = random.chance(0.25) ? 0 : random.normal();
    const bool all_sums = random.chance(0.5);
    Asked<T> asked(c.kernel, c.x.sample, &c.y.sample, w[0] != nullptr, w[1] != nullptr, random, parameters);
    const Buffer<double> sums(c.batch() * 3, 0);
    quadratic_cpu<T>(c.batch(), c.kernel, c.x.set(), c.y.set(), w[0] ? w[0]->data() : nullptr,
                     w[1] ? w[1]->data() : nullptr, coefs, all_sums, sums.data(), asked.pointers);

    std::vector<Approx> should(c.batch() * 3);
    SlowGradients gradients(c.kernel, c.x.sample, c.y.sample, asked.pointers.parameters);
    for (int64_t b = 0; b < c.batch(); ++b) {
        for (int kind = 0; kind < 3; ++kind) {
            if (coefs[kind] == 0 && !all_sums) continue;
            const Pairs& p = c.pairs(b, kind);
            const int from = kind == 1, to = kind != 0;
            const double summed = of_sum<T>(c.kernel, p.n * p.m);
            auto& by_from = from ? gradients.weights_y : gradients.weights_x;
            auto& by_to = to ? gradients.weights_y : gradients.weights_x;
            std::vector<Approx> weights(p.n * p.m);
            for (int64_t i = 0; i < p.n; ++i) {
                for (int64_t j = 0; j < p.m; ++j) {
                    if (p.skip(i, j)) continue;
                    const int64_t at_u = b * count[from] + i, at_v = b * count[to] + j;
                    const double u = w[from] ? double((*w[from])[at_u]) : 1, v = w[to] ? double((*w[to])[at_v]) : 1;
                    const Approx& k = p.at(i, j);
                    should[b * 3 + kind].add(u * v, k.v, k.e + (8 * eps + summed) * k.size());
                    by_from[at_u].add(coefs[kind] * v, k.v, k.e + 8 * eps * k.size());
                    by_to[at_v].add(coefs[kind] * u, k.v, k.e + 8 * eps * k.size());
                    const double g = coefs[kind] * u * v;
                    weights[i * p.m + j] = {g, 4 * eps * std::abs(g)};
                }
            }
            gradients.add(c.kernel, p, b, from, to, weights, from ? c.y.sample : c.x.sample,
                          to ? c.y.sample : c.x.sample);
        }
    }
    compare_all<T>(sums, should, 0, sum_tally, "quadratic sum");
    asked.check(gradients);
}

// Values alone, of points without weights.
template <class T>
void check_values(Case<T>& c) {
    const double coefs[3] = {1, 1, -2};
    const Buffer<double> sums(3, 0);
    quadratic_cpu<T>(1, c.kernel, c.x.set(), c.y.set(), nullptr, nullptr, coefs, false, sums.data(), {});
    std::vector<Approx> should(3);
    for (int kind = 0; kind < 3; ++kind) {
        const Pairs& p = c.pairs(0, kind);
        const double summed = of_sum<T>(c.kernel, p.n * p.m);
        for (int64_t i = 0; i < p.n; ++i)
            for (int64_t j = 0; j < p.m; ++j) {
                if (p.skip(i, j)) continue;
                const Approx& k = p.at(i, j);
                should[kind].add(1, k.v, k.e + (8 * kEps<T> + summed) * k.size());
            }
    }
    compare_all<T>(sums, should, 0, sum_tally, "sum of values");
}

template <class T>
void check_sums(Case<T>& c, bool own) {
    const double eps = kEps<T>;
    const int64_t n = c.n(), m = own ? 0 : c.m(), batch = c.batch();
    const Buffer<double> rows(batch * n, 1), columns(batch * m, 2), squares(batch, 0);
    const Set none{};
    sums_cpu<T>(batch, c.kernel, c.x.set(), own ? none : c.y.set(), own, rows.data(), columns.data(), squares.data());
    const auto by_rows = normals<double>(batch * n, c.random), by_columns = normals<double>(batch * m, c.random);
    const auto by_squares = normals<double>(batch, c.random);
    Asked<T> asked(c.kernel, c.x.sample, own ? nullptr : &c.y.sample, false, false, c.random);
    sums_backward_cpu<T>(batch, c.kernel, c.x.set(), own ? none : c.y.set(), own, by_rows->data(), by_columns->data(),
                         by_squares->data(), asked.pointers);

    std::vector<Approx> r(batch * n), l(batch * m), s(batch);
    SlowGradients gradients(c.kernel, c.x.sample, own ? Sample{batch, 0, 0, {}} : c.y.sample,
                            asked.pointers.parameters);
    for (int64_t b = 0; b < batch; ++b) {
        const Pairs& p = own ? c.xx[b] : c.xy[b];
        const double summed = of_sum<T>(c.kernel, p.n * p.m);
        std::vector<Approx> weights(p.n * p.m);
        for (int64_t i = 0; i < p.n; ++i) {
            for (int64_t j = 0; j < p.m; ++j) {
                if (p.skip(i, j)) continue;
                const Approx& k = p.at(i, j);
                const double error = k.e + 8 * eps * k.size(), size = k.size();
                r[b * n + i].add(1, k.v, error);
                if (!own) l[b * m + j].add(1, k.v, error);
                s[b].add(1, k.v * k.v, 2 * size * error + k.e * k.e + summed * size * size);
                const double gr = (*by_rows)[b * n + i], gs = (*by_squares)[b];
                const double gc = own ? 0 : (*by_columns)[b * m + j];
                const Real g = gr + gc + 2 * gs * k.v;
                weights[i * p.m + j] = {
                    g, 8 * eps * (std::abs(gr) + std::abs(gc) + std::abs(gs) * size) + 2 * std::abs(gs) * error};
            }
        }
        gradients.add(c.kernel, p, b, 0, own ? 0 : 1, weights, c.x.sample, own ? c.x.sample : c.y.sample);
    }
    compare_all<T>(rows, r, 0, sum_tally, "row sum");
    compare_all<T>(columns, l, 0, sum_tally, "column sum");
    compare_all<T>(squares, s, 0, sum_tally, "sum of squares");
    asked.check(gradients);
}

template <class T>
void check_matmul(Case<T>& c, bool own, int64_t width) {
    const double eps = kEps<T>;
    const int64_t n = c.n(), m = own ? n : c.m(), batch = c.batch();
    const Sample& other = own ? c.x.sample : c.y.sample;
    const Set none{}, y = own ? none : c.y.set();
    const auto v = normals<T>(batch * m * width, c.random), g = normals<T>(batch * n * width, c.random);
    const Buffer<T> out(batch * n * width, 1), grad_v(batch * m * width, 2);
    Asked<T> asked(c.kernel, c.x.sample, own ? nullptr : &other, false, false, c.random);
    matmul_cpu<T>(batch, c.kernel, c.x.set(), y, own, v->data(), width, out.data());
    matmul_backward_cpu<T>(batch, c.kernel, c.x.set(), y, own, v->data(), g->data(), width, grad_v.data(),
                           asked.pointers);

    const double more_n = (8 + 2 * std::sqrt(double(m))) * eps + kEach<T>;
    const double more_m = (8 + 2 * std::sqrt(double(n))) * eps + kEach<T>;
    std::vector<Approx> should(out.size()), by_v(grad_v.size());
    SlowGradients gradients(c.kernel, c.x.sample, own ? Sample{batch, 0, 0, {}} : other, asked.pointers.parameters);
    for (int64_t b = 0; b < batch; ++b) {
        const Pairs& p = own ? c.xx[b] : c.xy[b];
        std::vector<Approx> weights(p.n * p.m);
        for (int64_t i = 0; i < p.n; ++i) {
            for (int64_t j = 0; j < p.m; ++j) {
                if (p.skip(i, j)) continue;
                const Approx& k = p.at(i, j);
                Real product = 0;
                double size = 0;
                for (int64_t q = 0; q < width; ++q) {
                    const double gi = (*g)[(b * n + i) * width + q], vj = (*v)[(b * m + j) * width + q];
                    should[(b * n + i) * width + q].add(vj, k.v, k.e + more_n * k.size());
                    by_v[(b * m + j) * width + q].add(gi, k.v, k.e + more_m * k.size());
                    product += Real(gi) * vj;
                    size += std::abs(gi * vj);
                }
                weights[i * p.m + j] = {product, (8 + std::sqrt(double(width))) * eps * size};
                if (own) {  // computed together with that of the pair (j, i)
                    for (int64_t q = 0; q < width; ++q) {
                        weights[i * p.m + j].e +=
                            8 * eps *
                            std::abs(double((*g)[(b * n + j) * width + q]) * double((*v)[(b * m + i) * width + q]));
                    }
                }
            }
        }
        gradients.add(c.kernel, p, b, 0, own ? 0 : 1, weights, c.x.sample, other);
    }
    compare_all<T>(out, should, 0, product_tally, "product");
    compare_all<T>(grad_v, by_v, 0, product_tally, "gradient of v");
    asked.check(gradients);
}

// K of the case's x and L of other features of as many points.
template <class T>
void check_pair(Case<T>& c, const Kernel& other, const Stored& z) {
    const double eps = kEps<T>;
    const int64_t n = c.n(), batch = c.batch();
    const Buffer<double> rows_x(batch * n, 1), rows_y(batch * n, 2), products(batch * 3, 0);
    pair_cpu<T>(batch, c.kernel, c.x.set(), other, z.set(), rows_x.data(), rows_y.data(), products.data());
    const auto gx = normals<double>(batch * n, c.random), gy = normals<double>(batch * n, c.random);
    const auto gp = normals<double>(batch * 3, c.random);
    Asked<T> asked_x(c.kernel, c.x.sample, nullptr, false, false, c.random);
    Asked<T> asked_y(other, z.sample, nullptr, false, false, c.random);
    pair_backward_cpu<T>(batch, c.kernel, c.x.set(), other, z.set(), gx->data(), gy->data(), gp->data(),
                         asked_x.pointers, asked_y.pointers);

    std::vector<Approx> rows[2] = {std::vector<Approx>(batch * n), std::vector<Approx>(batch * n)}, s(batch * 3);
    const Sample none{batch, 0, 0, {}};
    SlowGradients by_x(c.kernel, c.x.sample, none, asked_x.pointers.parameters);
    SlowGradients by_y(other, z.sample, none, asked_y.pointers.parameters);
    for (int64_t b = 0; b < batch; ++b) {
        const Pairs l(other, z.sample, z.sample, b, true, eps, kEach<T>);
        const double summed[2] = {of_sum<T>(c.kernel, n * n), of_sum<T>(other, n * n)};
        const Pairs* const p[2] = {&c.xx[b], &l};
        const double* const g = gp->data() + 3 * b;
        std::vector<Approx> weights[2] = {std::vector<Approx>(n * n), std::vector<Approx>(n * n)};
        for (int64_t i = 0; i < n; ++i) {
            for (int64_t j = 0; j < n; ++j) {
                if (i == j) continue;
                Real v[2];
                double e[2], size[2];
                for (int q = 0; q < 2; ++q) {
                    v[q] = p[q]->at(i, j).v;
                    size[q] = p[q]->at(i, j).size();
                    e[q] = p[q]->at(i, j).e + 8 * eps * size[q];
                    rows[q][b * n + i].add(1, v[q], e[q]);
                    s[b * 3 + 1 + q].add(1, v[q] * v[q], e[q] * (2 * size[q] + e[q]) + summed[q] * size[q] * size[q]);
                }
                const double both = std::min(summed[0], summed[1]) * size[0] * size[1];
                s[b * 3].add(1, v[0] * v[1], e[0] * size[1] + e[1] * size[0] + e[0] * e[1] + both);
                for (int q = 0; q < 2; ++q) {
                    const double row = (*(q ? gy : gx))[b * n + i];
                    weights[q][i * n + j] = {row + g[0] * v[1 - q] + 2 * g[1 + q] * v[q],
                                             8 * eps * std::abs(row) +
                                                 std::abs(g[0]) * (e[1 - q] + 4 * eps * size[1 - q]) +
                                                 2 * std::abs(g[1 + q]) * (e[q] + 4 * eps * size[q])};
                }
            }
        }
        by_x.add(c.kernel, c.xx[b], b, 0, 0, weights[0], c.x.sample, c.x.sample);
        by_y.add(other, l, b, 0, 0, weights[1], z.sample, z.sample);
    }
    compare_all<T>(rows_x, rows[0], 0, sum_tally, "row sum of K");
    compare_all<T>(rows_y, rows[1], 0, sum_tally, "row sum of L");
    compare_all<T>(products, s, 0, sum_tally, "sum of products");
    asked_x.check(by_x);
    asked_y.check(by_y);
}

template <class T>
void check_permutations(Case<T>& c, int64_t groups) {
    if (c.batch() != 1) return;
    const double eps = kEps<T>;
    const int64_t n = c.n();
    const Buffer<uint8_t> members(groups * n, 1);
    for (int64_t i = 0; i < members.size(); ++i) members[i] = c.random.chance(0.5);
    const Buffer<double> inside(groups, 1), rows(n, 0);
    permutations_cpu<T>(c.kernel, c.x.set(), members.data(), groups, inside.data(), rows.data());
    std::vector<Approx> sums(groups), r(n);
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < n; ++j) {
            const Approx& k = c.xx[0].at(i, j);
            if (i == j) continue;
            r[i].add(1, k.v, k.e + 8 * eps * k.size());
            for (int64_t g = 0; g < groups; ++g) {
                // A NaN is in all sums: 0 times NaN.
                const double in = members[g * n + i] && members[g * n + j];
                sums[g].add(in, k.v, k.e + ((8 + 2 * std::sqrt(double(n))) * eps + kEach<T>)*k.size());
            }
        }
    }
    compare_all<T>(inside, sums, 0, sum_tally, "sum inside");
    compare_all<T>(rows, r, 0, sum_tally, "row sum");
}

// The value at each place is one that can stand there, and is that of the pair that comes with it.
template <class T>
void check_select(const Stored& x, const Stored& y, bool own, Random& random) {
    const Kernel energy{{{Metric::l2, x.sample.features, {{Family::energy, 1, 0, 0, 0}}}}};
    const Pairs p(energy, x.sample, own ? x.sample : y.sample, 0, own, kEps<T>);
    std::vector<Approx> z;
    for (int64_t i = 0; i < p.n; ++i) {
        for (int64_t j = own ? i + 1 : 0; j < p.m; ++j) z.push_back(p.layers[0].z[i * p.m + j]);
    }
    if (z.empty()) return;
    const int64_t count = int64_t(z.size());
    std::vector<int64_t> places = {0, count - 1, count / 2, count / 2, (count - 1) / 2};
    for (int i = 0; i < 4; ++i) places.push_back(random.below(count));
    const Buffer<T> values(int64_t(places.size()), 1);
    const Buffer<int64_t> pairs(2 * int64_t(places.size()), 0);
    const Set none{};
    select_cpu<T>(x.set(), own ? none : y.set(), x.sample.features, own, places, values.data(), pairs.data());
    for (size_t r = 0; r < places.size(); ++r) {
        const int64_t i = pairs[2 * r], j = pairs[2 * r + 1];
        CHECK_CASE(i >= 0 && i < p.n && j < p.m && (own ? j > i : j >= 0), "pair %ld %ld", long(i), long(j));
        compare<T>(double(values[r]), p.layers[0].z[i * p.m + j], distance_tally, "distance", int64_t(r));
        int64_t below = 0, upto = 0;
        const double v = double(values[r]);
        for (const Approx& a : z) {
            below += double(a.v) + a.e < v || (std::isnan(v) && !std::isnan(a.v));
            upto += double(a.v) - a.e <= v || std::isnan(v);
        }
        CHECK_CASE(below <= places[r] && places[r] < upto, "%g at place %ld, but %ld are below, %ld up to it", v,
                   long(places[r]), long(below), long(upto));
    }
}

// ---- Random cases --------------------------------------------------------------------------------------------------

template <class T>
void check_random(int cases, uint64_t seed) {
    Random random(seed);
    const int64_t sizes[] = {0, 1, 2, 63, 64, 65, 129, 300}, widths[] = {1, 2, 8, 9, 16, 17, 33, 65, 300, 400, 460};
    for (int i = 0; i < cases;) {
        const int64_t n = sizes[random.below(8)], m = sizes[random.below(8)];
        const int64_t batch = random.chance(0.6) ? 1 : random.below(4);
        std::vector<int64_t> dimensions;
        for (int64_t l = random.chance(0.7) ? 1 : random.between(2, 3); l > 0; --l) {
            dimensions.push_back(random.chance(0.02) ? 0 : widths[random.below(11)]);
        }
        const int64_t d = std::accumulate(dimensions.begin(), dimensions.end(), int64_t(0));
        const Kernel kernel = random_kernel(dimensions, random), other = random_kernel(dimensions, random);
        if (batch * (n + m) * (n + m) * (d + 30 * (kernel.terms() + other.terms())) > 4000000 * (1 + (i % 8 == 0))) {
            continue;
        }
        ++i;
        const double mean = random.chance(0.6) ? 0 : 10;
        Sample x = random_sample(batch, n, d, mean, random), y = random_sample(batch, m, d, mean, random);
        Sample z = random_sample(batch, n, d, 0, random);
        if (n > 1 && random.chance(0.5)) repeat(x, 0, x, n - 1);
        if (n > 1 && m > 1 && random.chance(0.5)) repeat(x, n / 2, y, m / 2);
        if (n > 1 && mean == 0 && random.chance(0.1) && !x.values.empty()) {  // a lone point has no pair to be NaN
            x.values[random.below(int64_t(x.values.size()))] = NAN;
        }
        const ScalarType half = random.chance(0.5) ? ScalarType::float16 : ScalarType::bfloat16;
        const ScalarType type = sizeof(T) == 8 ? ScalarType::float64 : random.chance(0.25) ? half : ScalarType::float32;
        Case<T> c(kernel, x, y, type, random);
        check_quadratic(c);
        check_sums(c, random.chance(0.5));
        check_matmul(c, random.chance(0.5), random.chance(0.1) ? 0 : random.between(1, 40));
        check_pair(c, other, stored(z, type, random));
        check_permutations(c, random.chance(0.1) ? 0 : random.between(1, 40));
        if (batch == 1) check_select<T>(c.x, c.y, random.chance(0.5), random);
    }
}

// Blocks grow with the number of points.
template <class T>
void check_many_points(uint64_t seed) {
    Random random(seed);
    const int64_t shapes[][3] = {{1030, 6, 2}, {21, 1100, 17}, {33, 4100, 3}, {3, 16400, 9}};
    for (const auto& s : shapes) {
        const Kernel kernel{{{Metric::l2, s[2], {{Family::gaussian, 1, 0.2, 0, 0}}}}};
        // Only the pairs between the samples are written out: those inside the large one would be too many.
        const Stored x = stored(random_sample(1, s[0], s[2], 1, random), mmfast::scalar_type_of<T>(), random);
        const Stored y = stored(random_sample(1, s[1], s[2], 1, random), mmfast::scalar_type_of<T>(), random);
        current = "many points, " + std::to_string(s[0]) + " and " + std::to_string(s[1]);
        const Pairs p(kernel, x.sample, y.sample, 0, false, kEps<T>);
        const Buffer<double> rows(s[0], 0), columns(s[1], 0), squares(1, 0);
        sums_cpu<T>(1, kernel, x.set(), y.set(), false, rows.data(), columns.data(), squares.data());
        const auto v = normals<T>(s[1] * 3, random);
        const Buffer<T> out(s[0] * 3, 0);
        matmul_cpu<T>(1, kernel, x.set(), y.set(), false, v->data(), 3, out.data());
        std::vector<Approx> r(s[0]), l(s[1]), o(s[0] * 3);
        for (int64_t i = 0; i < s[0]; ++i) {
            for (int64_t j = 0; j < s[1]; ++j) {
                const Approx& k = p.at(i, j);
                r[i].add(1, k.v, k.e + 8 * kEps<T> * k.size());
                l[j].add(1, k.v, k.e + 8 * kEps<T> * k.size());
                for (int q = 0; q < 3; ++q) {
                    const double more = (8 + 2 * std::sqrt(double(s[1]))) * kEps<T> + kEach<T>;
                    o[i * 3 + q].add(double((*v)[j * 3 + q]), k.v, k.e + more * k.size());
                }
            }
        }
        compare_all<T>(rows, r, 0, sum_tally, "row sum");
        compare_all<T>(columns, l, 0, sum_tally, "column sum");
        compare_all<T>(out, o, 0, product_tally, "product");
    }
    // Pairs inside a sample of several larger blocks, a round of them left over; and more groups than fit at once.
    Case<T> c({{{Metric::l2, 2, {{Family::laplacian, 1, 0.5, 0, 0}}}}}, random_sample(1, 1100, 2, 0, random),
              random_sample(1, 1, 2, 0, random), mmfast::scalar_type_of<T>(), random);
    check_quadratic(c);
    check_sums(c, true);
    check_matmul(c, true, 5);
    Case<T> few({{{Metric::l2, 2, {{Family::gaussian, 1, 0.5, 0, 0}}}}}, random_sample(1, 40, 2, 0, random),
                random_sample(1, 1, 2, 0, random), mmfast::scalar_type_of<T>(), random);
    check_permutations(few, 1030);
}

// Points of so many dimensions that products are taken some of them at a time, and with gradients distances as well, in tiles that
// are whole and in tiles that are not.
template <class T>
void check_many_dimensions() {
    Random random(9);
    const int64_t shapes[][3] = {{130, 70, 150}, {70, 64, 460}, {129, 20, 400}};
    for (const auto& s : shapes)
        for (const Metric metric : {Metric::l2, Metric::dot}) {
            std::vector<mmfast::mmd::Term<double>> terms;
            if (metric == Metric::dot) terms = {{Family::polynomial, 1, 0.05, 1, 2}};
            else
                for (int i = 0; i < 3; ++i)
                    terms.push_back({Family::gaussian, 1 + 0.5 * i, 0.25 * double(1 << i) / double(s[2]), 0, 0});
            for (const ScalarType type : {mmfast::scalar_type_of<T>(), ScalarType::bfloat16}) {
                Case<T> c({{{metric, s[2], terms}}}, random_sample(1, s[0], s[2], 1, random),
                          random_sample(1, s[1], s[2], 1, random), type, random);
                check_quadratic(c, false);
                check_values(c);
            }
        }
    // Blocks of several tiles, of one step of products and of several, and what is left of them.
    for (const int64_t d : {20, 140}) {
        std::vector<mmfast::mmd::Term<double>> terms;
        for (int i = 0; i < 5; ++i)
            terms.push_back({Family::gaussian, 1 + 0.1 * i, 0.05 * double(1 << i) / double(d), 0, 0});
        Case<T> c({{{Metric::l2, d, terms}}}, random_sample(1, 700, d, 1, random), random_sample(1, 400, d, 0, random),
                  mmfast::scalar_type_of<T>(), random);
        check_values(c);
    }
}

// Sums and gradients of so many points that distances may be split, block after block of rows, beside those in float64: of the
// largest gradient by less than pytest allows them, 5e-6. The widest Gaussians are near 1 at all pairs, or not.
void check_split() {
    Random random(11);
    const auto check = [&](int64_t n, int64_t m, int64_t d, int powers, double widest) {
        current = std::to_string(powers) + " Gaussians from " + std::to_string(widest) + " on, " + std::to_string(n) +
                  " and " + std::to_string(m) + " points";
        Kernel kernel{{{Metric::l2, d, {}}}};
        for (int i = 0; i < powers; ++i)
            kernel.layers[0].terms.push_back(
                {Family::gaussian, 1 + 0.1 * i, widest * double(1 << i) / double(d), 0, 0});
        const Stored x = stored(random_sample(1, n, d, 1, random), ScalarType::float32, random);
        const Stored y = stored(random_sample(1, m, d, 0, random), ScalarType::float32, random);
        const double coefs[3] = {1, 1.5, -2};
        const auto results = [&]<class T>(T, bool gradients) {
            const Stored of_x = stored(x.sample, mmfast::scalar_type_of<T>(), random);
            const Stored of_y = stored(y.sample, mmfast::scalar_type_of<T>(), random);
            const Buffer<T> to_x(n * d, 0), to_y(m * d, 0);
            fill(to_x, T(0));
            fill(to_y, T(0));
            std::vector<double> sums(3);
            quadratic_cpu<T>(1, kernel, of_x.set(), of_y.set(), nullptr, nullptr, coefs, false, sums.data(),
                             {gradients ? to_x.data() : nullptr, gradients ? to_y.data() : nullptr, nullptr, nullptr});
            std::vector<double> all(to_x.data(), to_x.data() + n * d);
            all.insert(all.end(), to_y.data(), to_y.data() + m * d);
            return std::pair{sums, all};
        };
        const auto [should_sums, should] = results(double(), true);
        const auto [sums, is] = results(float(), true);
        const auto sums_alone = results(float(), false).first;
        for (int kind = 0; kind < 3; ++kind)
            for (const double sum : {sums[kind], sums_alone[kind]})
                CHECK(std::abs(sum - should_sums[kind]) <= 1e-6 * std::abs(should_sums[kind]), "%s: %.9g, not %.9g",
                      current.c_str(), sum, should_sums[kind]);
        double largest = 0, worst = 0;
        for (size_t i = 0; i < is.size(); ++i) {
            largest = std::max(largest, std::abs(should[i]));
            worst = std::max(worst, std::abs(is[i] - should[i]));
        }
        CHECK(worst <= 5e-6 * largest, "%s: off by %g of %g", current.c_str(), worst, largest);
    };
    for (const auto& [n, m, d] : {std::array<int64_t, 3>{600, 230, 20}, {330, 150, 140}})
        for (const int powers : {1, 5})
            for (const double widest : {0.05, 0.4}) check(n, m, d, powers, widest);
}

// Ladders of Gaussians where the narrowest counts: each value as exact as its own exponential.
template <class T>
void check_ladders() {
    Random random(5);
    for (const double factor : {2.0, 4.0, 16.0, 1.5}) {
        for (const int count : {2, 5, 16, 20, 40}) {
            Kernel kernel{{{Metric::l2, 1, {}}}};
            for (int i = 0; i < count; ++i) {
                const double weight = i + 1 == count ? 1 : 0.01;
                kernel.layers[0].terms.push_back({Family::gaussian, weight, std::pow(factor, i - count), 0, 0});
            }
            const ScalarType type = mmfast::scalar_type_of<T>();
            const Stored x = stored(random_sample(1, 1, 1, 0, random), type, random);
            const Stored y = stored(random_sample(1, 200, 1, 0, random), type, random);
            current = "ladder of " + std::to_string(count) + " by " + std::to_string(factor);
            const Pairs p(kernel, x.sample, y.sample, 0, false, kEps<T>);
            const Buffer<double> rows(1, 0), columns(200, 0), squares(1, 0);
            sums_cpu<T>(1, kernel, x.set(), y.set(), false, rows.data(), columns.data(), squares.data());
            compare_all<T>(columns, p.k, 0, sum_tally, "value");
        }
    }
}

}  // namespace

int main(int argc, char** argv) {
    const int cases = argc > 1 ? std::atoi(argv[1]) : 30;
    const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
    if (test::is_above(mmfast::isa_name(mmfast::best_isa()))) return test::kSkipped;
    std::printf("instruction set: %s\n", mmfast::isa_name(mmfast::best_isa()));
    check_ladders<float>();
    check_ladders<double>();
    check_random<float>(cases, seed);
    check_random<double>(cases / 2, seed + 1);
    check_split();
    check_many_dimensions<float>();
    check_many_dimensions<double>();
    check_many_points<float>(3);
    check_many_points<double>(4);
    sum_tally.report("sums");
    product_tally.report("products");
    gradient_tally.report("gradients");
    parameter_tally.report("parameters");
    distance_tally.report("distances");
    std::puts("ok");
    return 0;
}
