// The attention kernels of the instruction set that MMFAST_CPU_ISA allows, against the definition in double loops.
#include <algorithm>
#include <array>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "common/isa.h"
#include "fusion/fusion.h"
#include "fusion/fusion_tile.h"

namespace {

using namespace test;
using namespace mmfast;
using namespace mmfast::fusion;

std::string current;  // the case at hand
#define CHECK_CASE(condition, format, ...) CHECK(condition, format "\n  in %s", __VA_ARGS__, current.c_str())

size_t size_of(ScalarType type) {
    return type == ScalarType::float64 ? 8 : type == ScalarType::float32 ? 4 : 2;
}

double epsilon(ScalarType type) {
    switch (type) {
        case ScalarType::float64: return 0x1p-53;
        case ScalarType::float32: return 0x1p-24;
        case ScalarType::float16: return 0x1p-11;
        default: return 0x1p-8;
    }
}

using Sizes = std::array<int64_t, 4>;

// A tensor in memory that ends with it, in any order of its axes, or of all but the last; its values as they were rounded.
class Tensor {
public:
    Sizes sizes;
    std::vector<double> values;

    template <class F>
    Tensor(Random& random, const Sizes& of, ScalarType type, bool boolean, const F& value, bool whole_rows = false)
        : sizes(of), type_(type), boolean_(boolean) {
        for (int64_t d = 3, step = 1; d >= 0; --d) {
            step_[d] = sizes[d] == 1 ? 0 : step;
            step *= sizes[d];
        }
        std::array<int, 4> order{0, 1, 2, 3};
        for (int i = 3; i > 0 && random.chance(0.7); --i) std::swap(order[i - 1], order[random.below(i)]);
        if (random.chance(0.2) && !whole_rows) std::swap(order[3], order[random.below(4)]);
        int64_t size = random.chance(0.15) && !whole_rows ? 2 : 1;
        for (int i = 3; i >= 0; --i) {
            stride_[order[i]] = size;
            size *= sizes[order[i]];
        }
        const size_t bytes = boolean ? 1 : size_of(type);
        const int64_t elements = values_in() ? size : 0, offset = random.below(4);
        bytes_ = std::make_unique<Buffer<unsigned char>>(elements * bytes, offset * bytes);
        values.resize(values_in());
        for (int64_t i = 0; i < values_in(); ++i) values[i] = put(place(i), value());
    }
    double at(int64_t b, int64_t h, int64_t i, int64_t j) const {
        return values[b * step_[0] + h * step_[1] + i * step_[2] + j * step_[3]];
    }
    View view() const {
        int64_t s[4];
        for (int d = 0; d < 4; ++d) s[d] = sizes[d] == 1 ? (d == 3 ? 1 : 0) : stride_[d];
        return {bytes_->data(), type_, boolean_, s[0], s[1], s[2], s[3]};
    }
    // Broadcast along the columns too.
    View mask_view() const {
        View v = view();
        if (sizes[3] == 1) v.column = 0;
        return v;
    }

private:
    int64_t values_in() const { return sizes[0] * sizes[1] * sizes[2] * sizes[3]; }
    int64_t place(int64_t i) const {
        int64_t at = 0;
        for (int d = 3; d >= 0; --d) {
            at += i % sizes[d] * stride_[d];
            i /= sizes[d];
        }
        return at;
    }
    double put(int64_t at, double x) {
        double result = x;
        if (boolean_) {
            bytes_->data()[at] = x != 0;
            return x;
        }
        mmfast::dispatch(type_, [&](auto* kind) {
            using To = std::remove_pointer_t<decltype(kind)>;
            To to;
            if constexpr (sizeof(To) == 8) to = To(x);
            else to = To(float(x));
            std::memcpy(bytes_->data() + at * sizeof(To), &to, sizeof(To));
            if constexpr (sizeof(To) == 8) result = double(to);
            else result = double(float(to));
        });
        return result;
    }
    ScalarType type_;
    bool boolean_;
    int64_t stride_[4], step_[4];  // of an axis, in memory and in `values`
    std::unique_ptr<Buffer<unsigned char>> bytes_;
};

// A result, contiguous, with rows next to each other.
struct Result {
    Sizes sizes;
    ScalarType type;
    Buffer<unsigned char> bytes;
    Result(const Sizes& of, ScalarType t) : sizes(of), type(t), bytes(of[0] * of[1] * of[2] * of[3] * size_of(t), 0) {}
    Target target() {
        return {bytes.data(), type, sizes[0] == 1 ? 0 : sizes[1] * sizes[2] * sizes[3], sizes[2] * sizes[3], sizes[3]};
    }
    double operator[](int64_t i) {
        double result = 0;
        mmfast::dispatch(type, [&](auto* kind) {
            using From = std::remove_pointer_t<decltype(kind)>;
            From from;
            std::memcpy(&from, bytes.data() + i * sizeof(From), sizeof(From));
            if constexpr (sizeof(From) == 8) result = double(from);
            else result = double(float(from));
        });
        return result;
    }
};

// Sums and the sums of the magnitudes of what was added; and what they may be off for factors that are rounded on purpose.
struct Sum {
    double v = 0, size = 0, rounded = 0;
    void add(double x, double magnitude, double off = 0) {
        v += x;
        size += magnitude;
        rounded += off;
    }
    void add(double x) { add(x, std::abs(x)); }
};

struct Tally {
    double largest = 0;
    int64_t values = 0;
} tally;

void compare(double is, const Sum& should, double compute, double store, const char* what, int64_t at) {
    // Subnormal half precision numbers are 2^-24 apart.
    const double floor = store == epsilon(ScalarType::float16) ? 0x1p-25 : 0;
    const double bound =
        compute * should.size + 1.01 * (should.rounded + store * std::abs(should.v) + floor) + 1e-7 * compute;
    ++tally.values;
    if (bound > 0) tally.largest = std::max(tally.largest, std::abs(is - should.v) / bound);
    CHECK_CASE(std::abs(is - should.v) <= bound, "%s %ld is %.9g instead of %.9g, allowed is %.3g", what, long(at), is,
               should.v, bound);
}

struct TestSource {
    std::unique_ptr<Tensor> key, value, added[2], gate;
    std::vector<int64_t> lengths;
};

struct Case {
    Problem p;
    ScalarType type;
    std::unique_ptr<Tensor> query, grad_out;
    std::vector<TestSource> sources;
    bool with_grad_lse = false, with_output = false;
};

// Small, with a source of many keys, of these with few queries only, whose features are in the lanes, or as the matrix unit
// takes them: few keys, or many.
enum class Size { small, large, few, matrix, streamed };

Case random_case(Random& random, ScalarType type, Size size) {
    const bool large = size != Size::small, few = size == Size::few, streamed = size == Size::streamed;
    const bool matrix = size == Size::matrix || streamed;
    Case c;
    c.type = type;
    Problem& p = c.p;
    const auto shared = [&] { return random.chance(0.25) ? 1 : p.batch; };
    const auto normal = [&] { return random.normal(); };
    p.batch = random.between(1, large ? 2 : 3);
    p.heads = std::array<int64_t, 4>{1, 2, 4, 6}[random.below(large ? 2 : 4)];
    p.rows = random.between(1, few ? 8 : large ? 150 : 20);
    p.dim = random.between(1, large ? 70 : 20);
    p.value_dim = random.chance(0.5) ? p.dim : random.between(1, large ? 70 : 20);
    p.causal = random.chance(0.25) && !few;
    p.decoupled = random.chance(0.4) && !few && !streamed;
    p.scale = random.chance(0.8) ? 1 / std::sqrt(double(p.dim)) : -0.3;
    p.count = int(random.between(1, 4));
    if (matrix) {
        p.rows = random.between(16, 150);
        // Multiples of 32 are read where they lie.
        const auto features = [&] { return random.chance(0.3) ? 32 * random.between(1, 2) : random.between(16, 70); };
        p.dim = features();
        p.value_dim = features();
    }
    if (few) {  // of bfloat16 every second feature of two vectors is taken at a time
        const auto features = [&](int64_t n) { return random.chance(0.4) ? 32 * random.between(1, 4) : n; };
        p.dim = features(p.dim);
        p.value_dim = features(p.value_dim);
    }
    const bool whole_rows = matrix && random.chance(0.9);
    const auto tensor = [&](const Sizes& sizes) {
        return std::make_unique<Tensor>(random, sizes, type, false, normal, whole_rows);
    };
    c.query = tensor({shared(), p.heads, p.rows, p.dim});
    p.query = c.query->view();
    for (int j = 0; j < p.count; ++j) {
        Source& s = p.sources[j];
        TestSource& t = c.sources.emplace_back();
        s.keys = large && !p.decoupled && (!matrix || streamed) && j == 0 ? random.between(500, 1300)
                                                                          : random.between(0, large ? 120 : 12);
        do s.heads = random.between(1, p.heads);
        while (p.heads % s.heads);
        if (random.chance(0.5)) s.heads = p.heads;
        t.key = tensor({shared(), s.heads, s.keys, p.dim});
        t.value = tensor({shared(), s.heads, s.keys, p.value_dim});
        s.key = t.key->view();
        s.value = t.value->view();
        for (int m = 0; m < 2; ++m) {
            if (random.chance(0.7)) continue;
            const auto some = [&](int64_t n) { return random.chance(0.5) ? n : 1; };
            const Sizes sizes{some(p.batch), some(p.heads), some(p.rows), some(s.keys)};
            const bool boolean = m == 0 && random.chance(0.5);
            const double density = random.chance(0.2) ? 0.0 : 0.7;
            constexpr ScalarType kTypes[] = {ScalarType::float32, ScalarType::float64, ScalarType::bfloat16,
                                             ScalarType::float16};
            t.added[m] = std::make_unique<Tensor>(random, sizes, kTypes[random.below(4)], boolean, [&]() -> double {
                const bool may = random.chance(density);
                return boolean ? may : may ? random.normal() : -INFINITY;
            });
            s.added[m] = t.added[m]->mask_view();
        }
        if (random.chance(0.3)) {
            for (int64_t b = 0; b < p.batch; ++b) t.lengths.push_back(random.between(0, s.keys));
            s.lengths = t.lengths.data();
        }
        if (p.decoupled && random.chance(0.6)) {
            const auto some = [&](int64_t n) { return random.chance(0.5) ? n : 1; };
            const ScalarType in = type == ScalarType::float64 ? type : ScalarType::float32;
            const double open = random.chance(0.2) ? 0.0 : 0.9;
            t.gate = std::make_unique<Tensor>(random, Sizes{some(p.batch), some(p.heads), some(p.rows), 1}, in, false,
                                              [&] { return random.chance(open) ? random.normal() : 0.0; });
            s.gate = t.gate->view();
        }
    }
    c.grad_out = tensor({p.batch, p.heads, p.rows, p.value_dim});
    c.with_grad_lse = random.chance(0.5);
    return c;
}

double score(const Case& c, int j, int64_t b, int64_t h, int64_t i, int64_t k, double& size) {
    const Source& s = c.p.sources[j];
    const TestSource& t = c.sources[j];
    if (k >= s.length(b) || (c.p.causal && k > i)) return -INFINITY;
    Sum sum;
    for (int64_t d = 0; d < c.p.dim; ++d)
        sum.add(c.p.scale * c.query->at(b, h, i, d) * t.key->at(b, h * s.heads / c.p.heads, k, d));
    for (int m = 0; m < 2; ++m) {
        if (!t.added[m]) continue;
        const double x = t.added[m]->at(b, h, i, k);
        if (s.added[m].boolean ? x == 0 : x == -INFINITY) return -INFINITY;
        if (!s.added[m].boolean) sum.add(x);
    }
    size = std::max(size, sum.size);
    return sum.v;
}

// Those of each source.
struct Weights {
    bool mean;
    std::vector<std::unique_ptr<Result>> is;
    std::vector<std::vector<Sum>> should;
};

template <class T>
void run(const Case& c) {
    const Problem& p = c.p;
    const int softmaxes = p.softmaxes();
    const int64_t rows = p.batch * p.heads * p.rows;
    const double compute = sizeof(T) == 8 ? 0x1p-53 : 0x1p-24, store = epsilon(c.type);
    // What is multiplied in bfloat16: probabilities rounded to it for outputs; those of gradients, and gradients of scores, have 16
    // bits, or are rounded too for gradients of values and keys.
    const bool matrix = matrix_kernels().panel && c.type == ScalarType::bfloat16;
    const double factors = matrix ? store : 0, of_gradients = matrix ? 0x1p-21 : compute;
    const double of_sums = matrix && matrix_kernels().rounds_sums ? store : 0;
    const ScalarType compute_type = scalar_type_of<T>();
    // What the kernels give.
    Result its_out({p.batch, p.heads, p.rows, p.value_dim}, c.type);
    Buffer<T> its_lse(rows, 0);
    Result out({p.batch, p.heads, p.rows, p.value_dim}, c.type);
    Buffer<T> lse(softmaxes * rows, 0), grad_lse(softmaxes * rows, 0);
    forward_cpu<T>(p, out.target(), lse.data());
    Random random(7);
    for (int64_t i = 0; i < softmaxes * rows; ++i) grad_lse[i] = T(random.normal());
    Result by_query({c.query->sizes[0], p.heads, p.rows, p.dim}, c.type);
    std::vector<std::unique_ptr<Result>> by_keys, by_values;
    Result by_gates({p.count, p.batch, p.heads, p.rows}, compute_type);
    Gradients<T> gradients;
    gradients.query = by_query.target();
    gradients.query_batch = c.query->sizes[0];
    for (int j = 0; j < p.count; ++j) {
        by_keys.push_back(std::make_unique<Result>(c.sources[j].key->sizes, c.type));
        by_values.push_back(std::make_unique<Result>(c.sources[j].value->sizes, c.type));
        gradients.key[j] = by_keys[j]->target();
        gradients.value[j] = by_values[j]->target();
        gradients.key_batch[j] = c.sources[j].key->sizes[0];
        gradients.value_batch[j] = c.sources[j].value->sizes[0];
    }
    if (p.decoupled) gradients.gates = reinterpret_cast<T*>(by_gates.bytes.data());
    const Target o = out.target();
    const View of_out{o.data, o.type, false, o.batch, o.head, o.row, 1};
    backward_cpu<T>(p, c.grad_out->view(), c.with_grad_lse ? grad_lse.data() : nullptr, of_out, lse.data(), gradients);
    // Weights of each head, and their means, of one softmax, from the log-sum-exp and together with it; zero before where not all
    // are written.
    Weights weights[4];
    Problem of_keys = p;  // as fusion::weigh
    of_keys.value_dim = p.dim;
    for (int j = 0; j < p.count; ++j) of_keys.sources[j].value = p.sources[j].key;
    for (int way = 0; way < 4 && !p.decoupled; ++way) {
        Weights& w = weights[way];
        w.mean = way % 2;
        Target targets[kMostSources];
        for (int j = 0; j < p.count; ++j) {
            const Sizes sizes{p.batch, w.mean ? 1 : p.heads, p.rows, p.sources[j].keys};
            Result& result = *w.is.emplace_back(std::make_unique<Result>(sizes, c.type));
            const int64_t count = sizes[0] * sizes[1] * sizes[2] * sizes[3];
            w.should.emplace_back(count);
            if (p.causal || p.sources[j].lengths)
                std::fill_n(result.bytes.data(), count * size_of(c.type), static_cast<unsigned char>(0));
            targets[j] = result.target();
        }
        if (way < 2) weights_cpu<T>(of_keys, lse.data(), w.mean, targets);
        else forward_weighing_cpu<T>(p, its_out.target(), its_lse.data(), w.mean, targets);
    }

    // What the definition gives.
    std::vector<Sum> dq(c.query->values.size());
    std::vector<std::vector<Sum>> dk, dv;
    for (int j = 0; j < p.count; ++j) {
        dk.emplace_back(c.sources[j].key->values.size());
        dv.emplace_back(c.sources[j].value->values.size());
    }
    const auto flat = [](const Sizes& n, int64_t b, int64_t h, int64_t i) {
        return (((n[0] == 1 ? 0 : b) * n[1] + h) * n[2] + i) * n[3];
    };
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t i = r % p.rows, h = r / p.rows % p.heads, b = r / p.rows / p.heads;
        std::vector<Sum> o(p.value_dim);
        for (int m = 0; m < softmaxes; ++m) {
            const int first = p.decoupled ? m : 0, last = p.decoupled ? m + 1 : p.count;
            double largest = -INFINITY, total = 0, size = 1;
            std::vector<std::vector<double>> scores(p.count);
            for (int j = first; j < last; ++j)
                for (int64_t k = 0; k < p.sources[j].keys; ++k) {
                    scores[j].push_back(score(c, j, b, h, i, k, size));
                    largest = std::max(largest, scores[j].back());
                }
            if (largest == -INFINITY) largest = 0;
            for (int j = first; j < last; ++j)
                for (double& s : scores[j]) total += s = std::exp(s - largest);
            const double is = double(lse[m * rows + r]), eps = compute * (16 + 16 * size);
            for (const double l : {is, p.decoupled ? is : double(its_lse[r])}) {
                if (total == 0) CHECK_CASE(l == -INFINITY, "lse %ld is %g instead of -inf", long(r), l);
                else compare(l, {largest + std::log(total), size + 1}, eps, 0, "lse", r);
            }
            const double gate = p.decoupled && c.sources[m].gate ? c.sources[m].gate->at(b, h, i, 0) : 1;
            Sum delta;
            std::vector<std::vector<Sum>> dp(p.count);
            for (int j = first; j < last; ++j) {
                const int64_t kv = h * p.sources[j].heads / p.heads;
                for (int64_t k = 0; k < p.sources[j].keys; ++k) {
                    double& w = scores[j][k];
                    if (total) w /= total;
                    for (Weights& of : weights) {
                        if (p.decoupled) continue;
                        const double part = w / double(of.mean ? p.heads : 1);
                        of.should[j][flat(of.is[j]->sizes, b, of.mean ? 0 : h, i) + k].add(part,
                                                                                           part * (16 + 16 * size));
                    }
                    Sum& d = dp[j].emplace_back();
                    for (int64_t e = 0; e < p.value_dim; ++e) {
                        const double v = c.sources[j].value->at(b, kv, k, e), g = c.grad_out->at(b, h, i, e);
                        if (w) {
                            o[e].add(gate * w * v, std::abs(gate * w * v) * (16 + 16 * size),
                                     std::abs(gate * w * v) * factors);
                            dv[j][flat(c.sources[j].value->sizes, b, kv, k) + e].add(
                                gate * w * g, std::abs(gate * w * g) * (16 + 16 * size),
                                std::abs(gate * w * g) * of_sums);
                        }
                        d.add(g * v);
                    }
                    delta.add(w * d.v, w * d.size);
                }
            }
            // From the output, delta is as exact as that was rounded.
            int64_t keys = 0;
            for (int j = 0; j < p.count; ++j) keys += p.sources[j].keys;
            const double coarse = keys > kResidentKeys ? 1 + store / of_gradients / (16 + 16 * size) : 1;
            if (p.decoupled) compare(by_gates[m * rows + r], delta, compute * (32 + 32 * size), 0, "gate", r);
            const double dl = c.with_grad_lse ? double(grad_lse[m * rows + r]) : 0;
            for (int j = first; j < last; ++j) {
                const int64_t kv = h * p.sources[j].heads / p.heads;
                for (int64_t k = 0; k < p.sources[j].keys; ++k) {
                    const double w = scores[j][k];
                    if (!w) continue;
                    const double ds = p.scale * w * (gate * (dp[j][k].v - delta.v) + dl);
                    const double magnitude = std::abs(p.scale) * w *
                                             (std::abs(gate) * (dp[j][k].size + coarse * delta.size) + std::abs(dl)) *
                                             (16 + 16 * size);
                    for (int64_t e = 0; e < p.dim; ++e) {
                        const double key = c.sources[j].key->at(b, kv, k, e), q = c.query->at(b, h, i, e);
                        dq[flat(c.query->sizes, b, h, i) + e].add(ds * key, magnitude * std::abs(key));
                        dk[j][flat(c.sources[j].key->sizes, b, kv, k) + e].add(ds * q, magnitude * std::abs(q),
                                                                               std::abs(ds * q) * of_sums);
                    }
                }
            }
        }
        for (int64_t e = r * p.value_dim; e < (r + 1) * p.value_dim; ++e) {
            const Sum& should = o[e - r * p.value_dim];
            compare(out[e], should, compute, store, "output", e);
            if (!p.decoupled) compare(its_out[e], {should.v, should.size}, compute, store, "output with weights", e);
        }
    }
    const auto all = [&](Result& is, const std::vector<Sum>& should, const char* what) {
        for (size_t i = 0; i < should.size(); ++i)
            compare(is[int64_t(i)], should[i], of_gradients, store, what, int64_t(i));
    };
    all(by_query, dq, "gradient of the query");
    for (const Weights& w : weights)
        for (size_t j = 0; j < w.is.size(); ++j)
            for (size_t i = 0; i < w.should[j].size(); ++i)
                compare((*w.is[j])[int64_t(i)], w.should[j][i], compute, store, w.mean ? "mean weight" : "weight",
                        int64_t(i));
    for (int j = 0; j < p.count; ++j) {
        all(*by_keys[j], dk[j], "gradient of a key");
        all(*by_values[j], dv[j], "gradient of a value");
    }
}

}  // namespace

int main() {
    if (test::is_above(isa_name(best_isa()))) return test::kSkipped;
    std::printf("fusion kernels of %s\n", isa_name(best_isa()));
    constexpr ScalarType kTypes[] = {ScalarType::float32, ScalarType::float64, ScalarType::bfloat16,
                                     ScalarType::float16};
    constexpr const char* kNames[] = {"small", "large", "few", "matrix unit's", "matrix unit's long"};
    for (const Size size : {Size::small, Size::large, Size::few, Size::matrix, Size::streamed})
        for (int n = 0; n < (size == Size::small ? 400 : size == Size::matrix ? 96 : 24); ++n) {
            current = "case " + std::to_string(n) + " of the " + kNames[int(size)] + " ones";
            Random random(uint64_t(n + 1000 * int(size)));
            const Case c = random_case(random, size >= Size::matrix ? ScalarType::bfloat16 : kTypes[n % 4], size);
            if (c.type == ScalarType::float64) run<double>(c);
            else run<float>(c);
        }
    std::printf("  %ld values, errors up to %.2f of the bound\n", long(tally.values), tally.largest);
    CHECK(tally.largest > 0.005, "bounds that nothing comes near: %g", tally.largest);
}
