// What the mmd kernels of the instruction set that MMFAST_CPU_ISA allows promise at the edges: nothing passes from one item
// or thread to another, ties have an order, and points far from the origin keep their precision.
#include <thread>

#include "mmd_cases.h"

namespace {

using namespace test;
using namespace mmfast::mmd;

// All results of one call of each operation on a batch of which one item may be spoilt.
template <class T>
std::vector<double> results_of_item(int64_t item, bool nan_features, bool nan_weights) {
    Random random(99);
    const int64_t batch = 3, n = 70, m = 5, d = 9, width = 3;
    const Kernel kernel{{{Metric::l2, d, {{Family::gaussian, 1, 0.1, 0, 0}, {Family::energy, 1, 0, 0, 0}}}}};
    Sample x = random_sample(batch, n, d, 0, random), y = random_sample(batch, m, d, 0, random);
    const auto wx = normals<T>(batch * n, random, 1), wy = normals<T>(batch * m, random, 1);
    const auto v = normals<T>(batch * m * width, random), g = normals<T>(batch * n * width, random);
    const auto rows = normals<double>(batch * n, random), columns = normals<double>(batch * m, random);
    const double squares[batch] = {1, 2, 3}, coefs[3] = {0.5, 2, -1};
    for (int64_t b = 0; b < batch; ++b) {
        if (b == item) continue;
        if (nan_features) {
            for (int64_t i = 0; i < n * d; ++i) x.values[b * n * d + i] = NAN;
            for (int64_t i = 0; i < m * d; ++i) y.values[b * m * d + i] = NAN;
        }
        if (nan_weights) {
            for (int64_t i = 0; i < n; ++i) (*wx)[b * n + i] = NAN;
            for (int64_t i = 0; i < m; ++i) (*wy)[b * m + i] = NAN;
            for (int64_t i = 0; i < m * width; ++i) (*v)[b * m * width + i] = NAN;
            for (int64_t i = 0; i < n * width; ++i) (*g)[b * n * width + i] = NAN;
            for (int64_t i = 0; i < n; ++i) (*rows)[b * n + i] = NAN;
            for (int64_t i = 0; i < m; ++i) (*columns)[b * m + i] = NAN;
        }
    }
    const ScalarType type = mmfast::scalar_type_of<T>();
    const Stored sx(x, type, {0, 1, 2}, 1, 0), sy(y, type, {0, 1, 2}, 1, 0);
    std::vector<double> results;
    const auto keep = [&](const auto& buffer) {
        const int64_t each = buffer.size() / batch;
        for (int64_t i = 0; i < each; ++i) results.push_back(double(buffer[item * each + i]));
    };
    for (int operation = 0; operation < 3; ++operation) {
        const Buffer<T> gx(batch * n * d, 0), gy(batch * m * d, 0);
        const Buffer<double> gwx(batch * n, 0), gwy(batch * m, 0), gp(batch * 8, 0), sums(batch * 3, 0);
        const Buffer<T> gv(batch * m * width, 0), out(batch * n * width, 0);
        fill(gx, T(0));
        fill(gy, T(0));
        for (const auto* b : {&gwx, &gwy, &gp}) fill(*b, 0.0);
        const Gradients<T> to{gx.data(), gy.data(), nullptr, nullptr, gp.data()};
        const Gradients<T> all{gx.data(), gy.data(), gwx.data(), gwy.data(), gp.data()};
        if (operation == 0) {
            quadratic_cpu<T>(batch, kernel, sx.set(), sy.set(), wx->data(), wy->data(), coefs, false, sums.data(), all);
            keep(sums);
            keep(gwx);
            keep(gwy);
        } else if (operation == 1) {
            sums_backward_cpu<T>(batch, kernel, sx.set(), sy.set(), false, rows->data(), columns->data(), squares, to);
        } else {
            matmul_cpu<T>(batch, kernel, sx.set(), sy.set(), false, v->data(), width, out.data());
            matmul_backward_cpu<T>(batch, kernel, sx.set(), sy.set(), false, v->data(), g->data(), width, gv.data(),
                                   to);
            keep(out);
            keep(gv);
        }
        keep(gx);
        keep(gy);
        keep(gp);
    }
    return results;
}

// What stands in other items of the batch changes no bit.
template <class T>
void check_neighbours() {
    for (int64_t item = 0; item < 3; ++item) {
        const std::vector<double> should = results_of_item<T>(item, false, false);
        for (int spoilt = 1; spoilt < 4; ++spoilt) {
            const std::vector<double> is = results_of_item<T>(item, spoilt & 1, spoilt & 2);
            for (size_t i = 0; i < should.size(); ++i) {
                CHECK(is[i] == should[i], "result %zu of item %ld is %g instead of %g beside NaN (%d)", i, long(item),
                      is[i], should[i], spoilt);
            }
        }
    }
}

// Values that overflow where a point meets itself, which is no pair.
void check_diagonal_overflow() {
    for (const int exponent : {1, 2}) {
        const Kernel kernel{{{Metric::dot, 2, {{Family::polynomial, 1, 1, 0, double(exponent)}}}}};
        const Stored x({1, 2, 2, {1e25, 0, 0, 1}}, ScalarType::float32, {0, 1, 2}, 1, 0);
        const Buffer<double> sums(3, 0), parameters(4, 0);
        const Buffer<float> gx(4, 0);
        fill(parameters, 0.0);
        fill(gx, 0.0f);
        const double coefs[3] = {1, 0, 0};
        quadratic_cpu<float>(1, kernel, x.set(), {0, nullptr, ScalarType::float32, 0, 2, 1}, nullptr, nullptr, coefs,
                             true, sums.data(), {gx.data(), nullptr, nullptr, nullptr, parameters.data()});
        const double by_offset = exponent == 1 ? 2 : 0;
        CHECK(sums[0] == 0 && parameters[0] == 0 && parameters[1] == 0 && parameters[2] == by_offset &&
                  parameters[3] == 0,
              "k = %g, derivatives %g %g %g %g", sums[0], parameters[0], parameters[1], parameters[2], parameters[3]);
        CHECK(gx[0] == 0 && (exponent == 2 || gx[1] == 2) && (exponent == 2 || gx[2] == 2e25f) && gx[3] == 0,
              "gradients %g %g %g %g", double(gx[0]), double(gx[1]), double(gx[2]), double(gx[3]));
    }
}

// Equal distances: the first pair of them, in the order of the points.
void check_ties() {
    const int64_t n = 130;
    Sample s{1, n, 9, std::vector<double>(n * 9)};
    for (int64_t i = 0; i < n; ++i) s.values[i * 9] = double(i % 2);
    const Stored x(s, ScalarType::float32, {0, 1, 2}, 1, 0);
    const int64_t equal = 2 * (65 * 64 / 2);
    const std::vector<int64_t> places = {equal, 0, equal - 1, n * (n - 1) / 2 - 1};
    const float values[] = {1, 0, 0, 1};
    const int64_t pairs[] = {0, 1, 0, 2, 0, 2, 0, 1};
    const Buffer<float> v(4, 0);
    const Buffer<int64_t> p(8, 0);
    select_cpu<float>(x.set(), {}, 9, true, places, v.data(), p.data());
    for (int i = 0; i < 8; ++i) {
        CHECK(v[i / 2] == values[i / 2] && p[i] == pairs[i], "place %ld: %g of %ld %ld", long(places[i / 2]),
              double(v[i / 2]), long(p[i / 2 * 2]), long(p[i / 2 * 2 + 1]));
    }
}

// Several callers at once get the bits that each gets alone.
void check_threads() {
    const std::vector<double> should = results_of_item<float>(1, false, false);
    std::vector<std::thread> threads;
    std::vector<int> wrong(4);
    for (int t = 0; t < 4; ++t) {
        threads.emplace_back([&, t] {
            Random random(t);
            const Kernel kernel{{{Metric::l2, 5, {{Family::gaussian, 1, 0.1, 0, 0}}}}};
            const Stored x(random_sample(1, 200, 5, 0, random), ScalarType::float32, {0, 1, 2}, 1, 0);
            std::vector<double> first;
            for (int i = 0; i < 30; ++i) {
                std::vector<double> rows(200);
                double squares;
                sums_cpu<float>(1, kernel, x.set(), {}, true, rows.data(), nullptr, &squares);
                rows.push_back(squares);
                if (i == 0) first = rows;
                wrong[t] += rows != first;
            }
        });
    }
    for (std::thread& t : threads) t.join();
    for (int t = 0; t < 4; ++t) CHECK(wrong[t] == 0, "thread %d got other bits %d times", t, wrong[t]);
    CHECK(results_of_item<float>(1, false, false) == should, "%s", "other bits later");
}

// Points of unit variance about 10: kernel values are right to 3e-6, with float's own products to 6e-7.
void check_far_from_origin() {
    Random random(7);
    for (const int64_t d : {64, 768}) {
        const int64_t n = 300;
        Sample s = random_sample(1, n + 1, d, 10, random);
        for (double& v : s.values) v = double(float(v));
        Kernel kernel{{{Metric::l2, d, {}}}};
        for (int i = 0; i < 5; ++i) kernel.layers[0].terms.push_back({Family::gaussian, 1, 2.0 / d / (1 << i), 0, 0});
        Sample x{1, n, d, {s.values.begin(), s.values.end() - d}}, y{1, 1, d, {s.values.end() - d, s.values.end()}};
        const Stored from(x, ScalarType::float32, {0, 1, 2}, 1, 0), to(y, ScalarType::float32, {0, 1, 2}, 1, 0);
        std::vector<double> rows(n);
        double column, squares, worst = 0;
        sums_cpu<float>(1, kernel, from.set(), to.set(), false, rows.data(), &column, &squares);
        for (int64_t i = 0; i < n; ++i) {
            double z = 0, k = 0;
            for (int64_t c = 0; c < d; ++c) z += std::pow(x.values[i * d + c] - y.values[c], 2);
            for (const auto& t : kernel.layers[0].terms) k += std::exp(-t.gamma * z);
            worst = std::max(worst, std::abs(rows[i] - k) / k);
        }
        std::printf("  relative error of the kernel, d %ld: %.2g\n", long(d), worst);
        CHECK(worst <= (split() ? 3e-6 : 6e-7), "%g", worst);
    }
}

}  // namespace

int main() {
    std::printf("instruction set: %s\n", mmfast::isa_name(mmfast::best_isa()));
    check_far_from_origin();
    check_ties();
    check_diagonal_overflow();
    check_neighbours<float>();
    check_neighbours<double>();
    check_threads();
    std::puts("ok");
    return 0;
}
