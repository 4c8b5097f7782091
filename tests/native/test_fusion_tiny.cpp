// The GPU's block of threads for heads of a few features, run on the host against sums in double, its threads in an order
// that changes from phase to phase, since no result may depend on it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <vector>

#include "check.h"
#include "fusion/fusion_tiny.h"

using namespace mmfast;
using namespace mmfast::fusion;

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

struct HostBlock {
    template <class T>
    struct Kept {
        std::vector<T> own = std::vector<T>(kTinyThreads);
        T& operator[](int t) { return own[t]; }
    };
    mutable int phase = 0;
    template <class F>
    void each(const F& f) const {
        constexpr int n = kTinyThreads;
        ++phase;
        for (int t = 0; t < n; ++t) f(phase % 3 == 0 ? t : phase % 3 == 1 ? n - 1 - t : (t + n / 2) % n);
    }
};

// (batch, heads, rows, width), rows outside heads as projections make it, or the reverse of everything.
class Tensor {
public:
    Tensor(int64_t batch, int64_t heads, int64_t rows, int64_t width, bool reversed)
        : numbers_(batch * heads * rows * width, 0) {
        if (reversed) view = {numbers_.data(), 1, batch, batch * heads, batch * heads * rows};
        else view = {numbers_.data(), rows * heads * width, width, heads * width, 1};
    }
    float& at(int64_t b, int64_t h, int64_t r, int64_t d) const {
        return view.data[b * view.batch + h * view.head + r * view.row + d * view.feature];
    }
    TinyView view;

private:
    test::Buffer<float> numbers_;
};

struct Case {
    const char* name;
    int64_t rows, keys, dim, value_dim;
    int row_warps = 1;
    double size = 1;  // of queries, and of scores with them
    bool lengths = false, by_lse = false, reversed = false;
    double scale = 0.5;
};

template <class Kernel, int D>
void run(const TinyJob& job, int64_t rows) {
    const auto memory = std::make_unique<TinyMemory<D>>();
    const HostBlock block;
    for (int64_t i = tiny_blocks(job.batch, job.heads, rows, job.row_warps, Kernel::kPer) - 1; i >= 0; --i)
        Kernel(job, block, *memory, i).run();
}

// As a GPU runs a job: forward, or the two kernels of the gradients.
template <int D>
void run(const TinyJob& job, bool gradients) {
    if (!gradients) return run<TinyForward<D, HostBlock>, D>(job, job.rows);
    run<TinyOfQuery<D, HostBlock>, D>(job, job.rows);
    run<TinyOfKey<D, HostBlock>, D>(job, job.keys);
}

void run(const TinyJob& job, bool gradients) {
    const int64_t wide = std::max(job.dim, job.value_dim);
    if (wide <= 4) return run<4>(job, gradients);
    if (wide <= 6) return run<6>(job, gradients);
    if (wide <= 8) return run<8>(job, gradients);
    if (wide <= 12) return run<12>(job, gradients);
    run<16>(job, gradients);
}

// The largest difference, relative to the largest value; what is not finite must be the same.
class Worst {
public:
    void add(double found, double expected, const char* name, const char* what) {
        if (std::isnan(expected) || std::isinf(expected)) {
            CHECK(std::isnan(expected) ? std::isnan(found) : found == expected, "%s, %s: %g where there is %g", name,
                  what, found, expected);
            return;
        }
        CHECK(!std::isnan(found), "%s, %s: NaN where there is %g", name, what, expected);
        difference_ = std::fmax(difference_, std::fabs(found - expected));
        size_ = std::fmax(size_, std::fabs(expected));
    }
    double value() const { return size_ ? difference_ / size_ : difference_; }

private:
    double difference_ = 0, size_ = 0;
};

struct Problem {
    static constexpr int64_t batch = 3, heads = 2;
    Case c;
    Tensor query, key, value, out, by_out, by_query, by_key, by_value;
    std::vector<int64_t> lengths;
    std::vector<float> lse, by_lse, less;
    TinyJob job;

    explicit Problem(const Case& of)
        : c(of), query(batch, heads, c.rows, c.dim, c.reversed), key(batch, heads, c.keys, c.dim, false),
          value(batch, heads, c.keys, c.value_dim, c.reversed), out(batch, heads, c.rows, c.value_dim, false),
          by_out(batch, heads, c.rows, c.value_dim, c.reversed), by_query(batch, heads, c.rows, c.dim, false),
          by_key(batch, heads, c.keys, c.dim, c.reversed), by_value(batch, heads, c.keys, c.value_dim, false),
          lengths{c.keys, 0, c.keys / 2 + 1}, lse(batch * heads * c.rows, NAN), by_lse(lse.size()),
          less(lse.size(), NAN) {
        test::Random random(uint64_t(c.rows + 1000 * c.keys + c.dim));
        const auto fill = [&](Tensor& t, int64_t rows, int64_t width, double size) {
            for (int64_t b = 0; b < batch; ++b)
                for (int64_t h = 0; h < heads; ++h)
                    for (int64_t r = 0; r < rows; ++r)
                        for (int64_t d = 0; d < width; ++d) t.at(b, h, r, d) = float(size * random.normal());
        };
        fill(query, c.rows, c.dim, c.size);
        fill(key, c.keys, c.dim, 1);
        fill(value, c.keys, c.value_dim, 1);
        fill(by_out, c.rows, c.value_dim, 1);
        for (float& x : by_lse) x = float(random.normal());
        if (c.lengths)  // what does not exist is not looked at
            for (int64_t h = 0; h < heads; ++h)
                for (int64_t k = lengths[2]; k < c.keys; ++k) key.at(2, h, k, 0) = value.at(2, h, k, 0) = NAN;
        job = {batch,
               heads,
               c.rows,
               c.keys,
               c.dim,
               c.value_dim,
               c.row_warps,
               c.scale,
               query.view,
               key.view,
               value.view,
               c.lengths ? lengths.data() : nullptr,
               1,
               out.view,
               lse.data(),
               by_out.view,
               c.by_lse ? by_lse.data() : nullptr,
               less.data(),
               by_query.view,
               by_key.view,
               by_value.view};
    }

    int64_t there(int64_t b) const { return c.lengths ? std::min(lengths[b], c.keys) : c.keys; }
    double score(int64_t b, int64_t h, int64_t r, int64_t k) const {
        double s = 0;
        for (int64_t d = 0; d < c.dim; ++d) s += double(query.at(b, h, r, d)) * key.at(b, h, k, d);
        return c.scale * s;
    }

    double check_forward() const {
        Worst of_out, of_lse;
        for (int64_t b = 0; b < batch; ++b)
            for (int64_t h = 0; h < heads; ++h)
                for (int64_t r = 0; r < c.rows; ++r) {
                    double top = -kInf, sum = 0;
                    std::vector<double> expected(c.value_dim, 0.0);
                    for (int64_t k = 0; k < there(b); ++k) {
                        const double s = score(b, h, r, k);
                        if (std::isnan(s) || s > top) top = s;
                        if (std::isnan(top)) break;
                    }
                    for (int64_t k = 0; k < there(b); ++k) {
                        const double p = top == -kInf ? 0 : std::exp(score(b, h, r, k) - top);
                        sum += p;
                        for (int64_t d = 0; d < c.value_dim; ++d) expected[d] += p * value.at(b, h, k, d);
                    }
                    for (int64_t d = 0; d < c.value_dim; ++d)
                        of_out.add(out.at(b, h, r, d), sum == 0 ? 0 : expected[d] / sum, c.name, "output");
                    of_lse.add(lse[(b * heads + h) * c.rows + r], sum == 0 ? -kInf : top + std::log(sum), c.name,
                               "log-sum-exp");
                }
        return std::fmax(of_out.value(), of_lse.value());
    }

    double check_gradients() const {
        Worst of_query, of_key, of_value;
        for (int64_t b = 0; b < batch; ++b)
            for (int64_t h = 0; h < heads; ++h) {
                std::vector<double> q(c.rows * c.dim, 0.0), k(c.keys * c.dim, 0.0), v(c.keys * c.value_dim, 0.0);
                for (int64_t r = 0; r < c.rows; ++r) {
                    const int64_t at = (b * heads + h) * c.rows + r;
                    double less = c.by_lse ? by_lse[at] : 0;
                    for (int64_t d = 0; d < c.value_dim; ++d)
                        less -= double(by_out.at(b, h, r, d)) * out.at(b, h, r, d);
                    for (int64_t j = 0; j < there(b); ++j) {
                        const double p = lse[at] == -kInf ? 0 : std::exp(score(b, h, r, j) - lse[at]);
                        double u = less;
                        for (int64_t d = 0; d < c.value_dim; ++d) {
                            u += double(by_out.at(b, h, r, d)) * value.at(b, h, j, d);
                            v[j * c.value_dim + d] += p * by_out.at(b, h, r, d);
                        }
                        for (int64_t d = 0; d < c.dim; ++d) {
                            q[r * c.dim + d] += c.scale * p * u * key.at(b, h, j, d);
                            k[j * c.dim + d] += c.scale * p * u * query.at(b, h, r, d);
                        }
                    }
                }
                for (int64_t i = 0; i < c.rows * c.dim; ++i)
                    of_query.add(by_query.at(b, h, i / c.dim, i % c.dim), q[i], c.name, "gradient of queries");
                for (int64_t i = 0; i < c.keys * c.dim; ++i)
                    of_key.add(by_key.at(b, h, i / c.dim, i % c.dim), k[i], c.name, "gradient of keys");
                for (int64_t i = 0; i < c.keys * c.value_dim; ++i)
                    of_value.add(by_value.at(b, h, i / c.value_dim, i % c.value_dim), v[i], c.name,
                                 "gradient of values");
            }
        return std::fmax(of_query.value(), std::fmax(of_key.value(), of_value.value()));
    }
};

void check(const Case& c, double tolerance, double of_gradients) {
    Problem problem(c);
    run(problem.job, false);
    const double forward = problem.check_forward();
    run(problem.job, true);
    const double gradients = problem.check_gradients();
    std::printf("%-14s %4lld x %4lld, %2lld %2lld: %.1e, gradients %.1e\n", c.name, static_cast<long long>(c.rows),
                static_cast<long long>(c.keys), static_cast<long long>(c.dim), static_cast<long long>(c.value_dim),
                forward, gradients);
    CHECK(forward <= tolerance, "%s: %g", c.name, forward);
    CHECK(gradients <= of_gradients, "%s: gradients %g", c.name, gradients);
}

// Scores that are not finite, and so large that float holds no fraction of them.
void check_extremes() {
    for (int which = 0; which < 5; ++which) {
        Case c{"extremes", 70, 45, 3, 2, 1};
        c.name = which == 0 ? "NaN" : which == 1 ? "-inf" : which == 2 ? "inf" : which == 3 ? "all -inf" : "huge";
        Problem problem(c);
        for (int64_t r = 0; r < c.rows; ++r) problem.query.at(1, 1, r, 1) = float(1 + r);
        const auto key = [&](int64_t k) -> float& { return problem.key.at(1, 1, k, 1); };
        if (which == 0) key(44) = problem.query.at(0, 0, 3, 0) = NAN;
        if (which == 1) key(0) = key(20) = -INFINITY;
        if (which == 2) key(37) = INFINITY;
        for (int64_t k = 0; k < c.keys && which >= 3; ++k)
            key(k) = which == 3 ? -INFINITY : 1e12f * float(7 * k % 45 - 20);
        run(problem.job, false);
        const double worst = problem.check_forward();
        std::printf("%-14s %.1e\n", c.name, worst);
        CHECK(worst < 1e-5, "%s: %g", c.name, worst);
        if (which != 1 && which != 3) continue;  // of others the weights are NaN, or not to be had from a log-sum-exp
        run(problem.job, true);
        CHECK(problem.check_gradients() < 1e-5, "%s: gradients", c.name);
    }
}

}  // namespace

int main() {
    for (int64_t dim = 1; dim <= kTinyFeatures; ++dim)
        check({"features", 37, 45, dim, 1 + (5 * dim) % kTinyFeatures}, 1e-5, 2e-5);
    for (const int64_t rows : {1, 31, 129, 300})
        for (const int64_t keys : {1, 7, 8, 130, 515, 1100})
            check({"sizes", rows, keys, 6, 6, rows > 128 ? 2 : 1, 1, false, true}, 1e-5, 5e-5);
    check({"lengths", 140, 200, 6, 5, 2, 1, true, true}, 1e-5, 2e-5);
    check({"lengths", 33, 700, 12, 16, 1, 1, true, false, true}, 1e-5, 2e-5);
    check({"reversed", 140, 70, 8, 7, 2, 1, false, true, true}, 1e-5, 2e-5);
    check({"large scores", 70, 600, 6, 6, 1, 300, false, true}, 1e-3, 3e-3);
    check({"no scale", 20, 30, 4, 4, 1, 1, false, true, false, 0.0}, 1e-5, 2e-5);
    check({"negative scale", 20, 30, 4, 4, 1, 1, false, true, false, -1.3}, 1e-5, 2e-5);
    check_extremes();
}
