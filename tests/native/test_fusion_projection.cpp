// Linear layers on the matrix unit or in vectors, or on what emulates either, against their definition in double loops.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "check.h"
#include "common/isa.h"
#include "common/scalar_types.h"
#include "fusion/fusion_projection.h"

namespace {

using namespace test;
using namespace mmfast;
using namespace mmfast::fusion;

std::string current;  // the case at hand
double largest;       // error, in units of its bound

// Rows of bfloat16 in memory that ends with the last one; NaN between them, and everywhere at first.
class Matrix {
public:
    Matrix(int64_t rows, int64_t columns, int64_t gap = 0)
        : rows_(rows), columns_(columns), stride_(columns + gap),
          memory_(rows ? (rows - 1) * stride_ + columns : 0, 0) {}
    void fill(Random& random) {
        for (int64_t r = 0; r < rows_; ++r)
            for (int64_t c = 0; c < columns_; ++c) memory_[r * stride_ + c] = BFloat16(float(random.normal())).bits;
    }
    HalfRows all() const { return {memory_.data(), stride_}; }
    uint16_t* data() const { return memory_.data(); }
    double operator()(int64_t r, int64_t c) const {
        BFloat16 x;
        x.bits = memory_[r * stride_ + c];
        return double(float(x));
    }
    bool operator==(const Matrix& other) const {
        return !memory_.size() || !std::memcmp(data(), other.data(), size_t(memory_.size()) * 2);
    }

private:
    int64_t rows_, columns_, stride_;
    Buffer<uint16_t> memory_;
};

// A result rounded once, of a sum in float32 whose terms have this sum of magnitudes.
void compare(const char* what, double got, double expected, double magnitudes) {
    const double bound = std::fabs(expected) * 0x1p-8 + magnitudes * 0x1p-18 + 1e-30;
    const double error = std::fabs(got - expected) / bound;
    CHECK(error <= 1, "%s: %g in place of %g\n  in %s", what, got, expected, current.c_str());
    largest = std::max(largest, error);
}

template <class F>
void compare_sum(const char* what, double got, int64_t count, const F& term, double first = 0) {
    double sum = first, magnitudes = std::fabs(first);
    for (int64_t i = 0; i < count; ++i) {
        const double x = term(i);
        sum += x;
        magnitudes += std::fabs(x);
    }
    compare(what, got, sum, magnitudes);
}

void run(Random& random, int64_t rows, int64_t in, const std::vector<int64_t>& parts, bool with_bias, int64_t gap) {
    current = std::to_string(rows) + " x " + std::to_string(in) + " to";
    int64_t all = 0;
    for (const int64_t out : parts) {
        current.append(" ").append(std::to_string(out));
        all += out;
    }
    Projection p{};
    p.rows = rows;
    p.in = in;
    Matrix x(rows, in, gap), weight(all, in, gap), bias(1, all);
    for (Matrix* m : {&x, &weight, &bias}) m->fill(random);
    p.x = x.all();
    p.weight = weight.all();
    p.bias = with_bias ? bias.data() : nullptr;
    std::vector<Matrix*> made;
    for (const int64_t out : parts) {
        made.push_back(new Matrix(rows, out, gap));
        p.out[p.parts] = out;
        p.y[p.parts++] = made.back()->all();
    }
    project_cpu(p);
    // Some rows, the first and the last among them.
    const auto each = [&](int64_t count, const auto& f) {
        for (int64_t i = 0; i < count; i += 1 + random.below(std::max<int64_t>(1, count / 6))) f(i);
        if (count) f(count - 1);
    };
    int64_t before = 0;
    for (int j = 0; j < p.parts; before += p.out[j++])
        each(rows, [&](int64_t r) {
            for (int64_t o = 0; o < p.out[j]; ++o)
                compare_sum(
                    "a result", (*made[j])(r, o), in, [&](int64_t k) { return x(r, k) * weight(before + o, k); },
                    with_bias ? bias(0, before + o) : 0);
        });

    // Gradients of the results take their places.
    for (Matrix* y : made) y->fill(random);
    Matrix grad_x(rows, in, gap), grad_weight(all, in), grad_bias(1, all);
    p.grad_x = grad_x.all();
    p.grad_weight = grad_weight.data();
    p.grad_bias = grad_bias.data();
    project_backward_cpu(p);
    each(rows, [&](int64_t r) {
        for (int64_t k = 0; k < in; ++k) {
            double sum = 0, magnitudes = 0;
            int64_t at = 0;
            for (int j = 0; j < p.parts; at += p.out[j++])
                for (int64_t o = 0; o < p.out[j]; ++o) {
                    const double term = (*made[j])(r, o) * weight(at + o, k);
                    sum += term;
                    magnitudes += std::fabs(term);
                }
            compare("a gradient of x", grad_x(r, k), sum, magnitudes);
        }
    });
    before = 0;
    for (int j = 0; j < p.parts; before += p.out[j++])
        each(p.out[j], [&](int64_t o) {
            for (int64_t k = 0; k < in; ++k)
                compare_sum("a gradient of the weight", grad_weight(before + o, k), rows,
                            [&](int64_t r) { return (*made[j])(r, o) * x(r, k); });
        });
    before = 0;
    for (int j = 0; j < p.parts; before += p.out[j++])
        for (int64_t o = 0; o < p.out[j]; ++o)
            compare_sum("a gradient of the bias", grad_bias(0, before + o), rows,
                        [&](int64_t r) { return (*made[j])(r, o); });

    // Each alone, and what is not wanted is not touched: null.
    Matrix alone_x(rows, in, gap), alone_weight(all, in), alone_bias(1, all);
    Projection one = p;
    one.grad_weight = one.grad_bias = nullptr;
    one.grad_x = alone_x.all();
    project_backward_cpu(one);
    one.grad_x = {};
    one.grad_weight = alone_weight.data();
    project_backward_cpu(one);
    one.grad_weight = nullptr;
    one.grad_bias = alone_bias.data();
    project_backward_cpu(one);
    CHECK(alone_x == grad_x && alone_weight == grad_weight && alone_bias == grad_bias, "not the same alone: %s",
          current.c_str());
    for (Matrix* y : made) delete y;
}

}  // namespace

int main() {
    if (test::is_above(isa_name(best_isa()))) return test::kSkipped;
    if (!projects()) {
        std::puts("no matrix unit");
        return test::kSkipped;
    }
    Random random(1);
    run(random, 1, 32, {32}, true, 0);
    run(random, 16, 64, {32, 96}, false, 8);
    run(random, 33, 32, {64}, true, 0);
    run(random, 31, 96, {32, 32, 64}, true, 24);
    run(random, 150, 160, {96}, true, 1);
    run(random, 513, 64, {32, 64}, true, 0);  // rows of x and gradients in two pieces
    run(random, 1100, 32, {32}, false, 3);    // three
    run(random, 40, 544, {576}, true, 0);     // more blocks of weights than one
    run(random, 64, 1056, {32, 160, 32, 64}, true, 0);
    std::printf("  errors up to %.2f of the bound\n", largest);
    CHECK(largest > 0.5, "bounds that nothing comes near: %g", largest);
}
