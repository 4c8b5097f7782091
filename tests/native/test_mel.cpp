// The mel kernels of the instruction set that MMFAST_CPU_ISA allows, against the definition in slow_mel.h.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <set>
#include <thread>

#include "common/isa.h"
#include "common/parallel.h"
#include "mel_cases.h"

namespace {

using namespace test;

// What a failed check prints about the case at hand.
const char* current = "";
#define CHECK_CASE(condition, format, ...) CHECK(condition, format "\n  in %s", __VA_ARGS__, current)

// ---- Framing -------------------------------------------------------------------------------------------------------

void check_framing() {
    Random random(1);
    std::set<int> modes;
    for (int i = 0; i < 6000; ++i) {
        const int64_t n_fft = random.between(1, 40), window = random.between(1, n_fft), hop = random.between(1, 45);
        const PadMode mode = PadMode(random.below(5));
        const Framing f = framing_of(Kind(random.below(3)), random.chance(0.5), n_fft, window, hop, random.below(50),
                                     random.chance(0.5) ? random.below(20) : 0, mode, random.chance(0.3));
        const int64_t length = random.chance(0.5) ? random.below(5) : random.below(200), count = f.count(length);
        CHECK(count == slow_count(f, length), "%ld frames of %ld samples instead of %ld", long(count), long(length),
              long(slow_count(f, length)));
        for (int64_t q = f.first; q < f.first + (count - 1) * hop + window; ++q) {
            const int64_t source = f.source(q, length);
            CHECK(source >= -1 && source < length, "position %ld of %ld samples reads %ld", long(q), long(length),
                  long(source));
        }
        for (int64_t q = -3 * length - 70; q < 4 * length + 70; ++q) {  // farther than any frame
            const int64_t source = f.source(q, length), should = slow_source(f, q, length);
            CHECK(source == should, "position %ld of %ld samples and %ld zeros, mode %d: %ld instead of %ld", long(q),
                  long(length), long(f.pad), int(f.mode), long(source), long(should));
        }
        if (count) {
            modes.insert(int(f.mode));
        }
    }
    CHECK(modes.size() == 5, "only %zu padding modes had frames", modes.size());
}

// ---- Forward -------------------------------------------------------------------------------------------------------

struct Tally {
    double largest = 0;  // error, in parts of the bound
    int64_t values = 0, vague = 0;
    void report(const char* what) const {
        std::printf("%s: %ld values, errors up to %.2f of the bound, %.2f%% vague\n", what, long(values), largest,
                    100.0 * double(vague) / double(values));
        // A bound so wide that it says little must stay the exception.
        CHECK(vague * 50 <= values, "%s: %ld of %ld values have a bound that says nothing", what, long(vague),
              long(values));
    }
};

void compare(double is, const Approx& should, ScalarType type, Tally& tally, int64_t b, int64_t f, int64_t k) {
    const double v = double(should.v);
    ++tally.values;
    if (std::isinf(should.e)) {  // the logarithm of what may as well be zero
        ++tally.vague;
        return;
    }
    if (!std::isfinite(v)) {
        CHECK_CASE(std::isnan(v) ? std::isnan(is) : is == v, "row %ld frame %ld feature %ld is %g instead of %g",
                   long(b), long(f), long(k), is, v);
        return;
    }
    const double least = type == ScalarType::float16 ? 0x1p-24 : type == ScalarType::float64 ? 1e-300 : 1e-37;
    const double bound = double(should.e) + rounding(type) * (std::abs(v) + double(should.e)) + least;
    tally.vague += double(should.e) > 0.1 * (std::abs(v) + 1);
    tally.largest = std::max(tally.largest, std::abs(is - v) / bound);
    CHECK_CASE(std::abs(is - v) <= bound, "row %ld frame %ld feature %ld is %.9g instead of %.9g, more than %.3g off",
               long(b), long(f), long(k), is, v, bound);
}

template <class T>
void check_forward(const Case& c, Tally& tally) {
    current = c.name.c_str();
    const Problem& p = c.problem;
    const Solution should = SlowMel(p, std::numeric_limits<T>::epsilon()).solve();
    const Call<T> call(c);
    CHECK_CASE(call.frames == should.frames, "%ld frames instead of %ld", long(call.frames), long(should.frames));
    CHECK_CASE(mmfast::mel::feature_count(p.spec, p.n_filters, p.cepstra) == should.features, "%ld features",
               long(should.features));
    mmfast::dispatch(c.out, [&](auto* kind) {
        using Value = std::remove_pointer_t<decltype(kind)>;
        const Buffer<Value> out(p.rows * call.frames * call.features, c.offset % 6),
            again(out.size(), (c.offset + 1) % 6);
        call.forward(out.data());
        for (int64_t b = 0; b < p.rows; ++b) {
            CHECK_CASE(call.counts[b] == should.counts[b], "row %ld has %ld frames", long(b), long(call.counts[b]));
            for (int64_t f = 0; f < call.frames; ++f) {
                for (int64_t k = 0; k < call.features; ++k) {
                    compare(double(out[call.at(b, f, k)]), should.at(b, f, k), c.out, tally, b, f, k);
                }
            }
        }
        for (int64_t g = 0; g < call.maxima.size(); ++g) {
            compare(double(call.maxima[g]), should.maxima[g], ScalarType::float64, tally, -1, g, -1);
        }
        call.forward(again.data());
        CHECK_CASE(out.size() == 0 || std::memcmp(out.data(), again.data(), size_t(out.size()) * sizeof(Value)) == 0,
                   "%s", "the second call gives other bits");
    });
}

template <class T>
void check_random_forward(int cases, uint64_t seed, const char* what) {
    Random random(seed);
    Tally tally;
    const ScalarType types[] = {ScalarType::float32, ScalarType::float16, ScalarType::bfloat16, ScalarType::int16,
                                ScalarType::float64};
    for (int i = 0; i < cases; ++i) {
        Wanted wanted;
        wanted.exact_float = sizeof(T) == 4;
        wanted.in = sizeof(T) == 8 && random.chance(0.7) ? ScalarType::float64 : types[random.below(5)];
        wanted.out = wanted.in == ScalarType::int16 ? ScalarType::float32 : wanted.in;
        if (random.chance(0.1)) {
            wanted.out = types[random.below(3)];
        }
        check_forward<T>(random_case(random, wanted), tally);
    }
    tally.report(what);
}

// ---- Backward ------------------------------------------------------------------------------------------------------

Real loss(const Problem& p, const std::vector<double>& grad, int64_t frames, int64_t features) {
    const Solution s = SlowMel(p, 0).solve();
    Real sum = 0;
    for (int64_t b = 0; b < p.rows; ++b) {
        for (int64_t f = 0; f < s.counts[b]; ++f) {
            for (int64_t k = 0; k < features; ++k) {
                sum += grad[(b * frames + f) * features + k] * s.at(b, f, k).v;
            }
        }
    }
    return sum;
}

// grad . direction against the difference of the loss at both sides; `values` are those of `p` that the gradient is of.
void check_direction(Problem p, std::vector<Real> Problem::* values, const std::vector<double>& grad_out,
                     int64_t frames, int64_t features, const double* gradient, const std::vector<Real>& direction,
                     const char* what) {
    const Real step = 1e-8L;
    const std::vector<Real> at = p.*values;
    Real side[2], dot = 0, size = 0;
    for (int i : {0, 1}) {
        for (size_t j = 0; j < at.size(); ++j) {
            (p.*values)[j] = at[j] + (i ? -step : step) * direction[j];
        }
        side[i] = loss(p, grad_out, frames, features);
    }
    for (size_t j = 0; j < at.size(); ++j) {
        dot += direction[j] * gradient[j];
        size += std::abs(direction[j] * gradient[j]);
    }
    const Real slope = (side[0] - side[1]) / (2 * step);
    const Real noise = 64 * std::numeric_limits<Real>::epsilon() * (std::abs(side[0]) + 1) / step;
    CHECK_CASE(std::abs(dot - slope) <= 2e-8L * size + noise + 1e-9L,
               "%s: slope %.12Lg instead of %.12Lg (scale %.3Lg)", what, dot, slope, size);
}

template <class T>
struct Gradients {
    Buffer<T> wave, filters;
    Gradients(const Case& c, int64_t offset)
        : wave(c.problem.rows * c.problem.length, offset), filters(int64_t(c.problem.filters.size()), offset) {}
};

// Forward, then backward with a gradient of exactly its size; `grad` is [B][F][C].
template <class T>
void differentiate(const Call<T>& call, const Case& c, const std::vector<double>& grad, bool wave, bool filters,
                   const Gradients<T>& to) {
    const Problem& p = c.problem;
    const Buffer<T> out(int64_t(grad.size()), 0), g(int64_t(grad.size()), c.offset % 4);
    Case same = c;
    same.out = mmfast::scalar_type_of<T>();
    mmfast::mel::forward_cpu<T>(call.plan, call.wave(), call.tables(), p.group, p.seed, out.data(), same.out,
                                call.counts.data(), call.maxima.data());
    for (int64_t b = 0; b < p.rows; ++b) {
        for (int64_t f = 0; f < call.frames; ++f) {
            for (int64_t k = 0; k < call.features; ++k) {
                g[call.at(b, f, k)] = T(grad[(b * call.frames + f) * call.features + k]);
            }
        }
    }
    call.backward(g.data(), wave ? to.wave.data() : nullptr, filters ? to.filters.data() : nullptr);
}

std::vector<double> random_gradient(Random& random, int64_t n) {
    std::vector<double> g(n);
    for (double& x : g) {
        x = float(random.normal());
    }
    return g;
}

void check_differences(const Case& c, const Call<double>& call, const std::vector<double>& grad,
                       const Gradients<double>& g, Random& random) {
    const Problem& p = c.problem;
    const int64_t length = p.length;
    // All samples; then a few near the ends, where paddings meet.
    for (bool ends : {false, true}) {
        std::vector<Real> direction(p.x.size(), 0);
        for (int64_t b = 0; b < p.rows; ++b) {
            const int64_t inside = p.row_length(b);
            for (int64_t i = 0; i < inside; ++i) {
                const bool near = i < 2 || i >= inside - 2;
                direction[b * length + i] = near || !ends ? random.normal() : 0;
            }
            for (int64_t i = inside; i < length; ++i) {
                CHECK_CASE(g.wave[b * length + i] == 0, "gradient %g past the end of row %ld", g.wave[b * length + i],
                           long(b));
            }
        }
        check_direction(p, &Problem::x, grad, call.frames, call.features, g.wave.data(), direction,
                        ends ? "ends of the waveform" : "waveform");
    }
    if (p.n_filters && call.frames) {
        // With a floor of 0 a weight that was zero may leave the domain of the logarithm.
        const bool inside = p.spec.log && p.spec.log_floor == 0;
        std::vector<Real> direction;
        for (Real w : p.filters) {
            direction.push_back((inside ? w : 1) * random.normal());
        }
        check_direction(p, &Problem::filters, grad, call.frames, call.features, g.filters.data(), direction, "filters");
    }
}

// Largest difference, relative to the largest value.
template <class A, class B>
double difference(const Buffer<A>& a, const Buffer<B>& b) {
    double most = 0, largest = 1e-30;
    for (int64_t i = 0; i < a.size(); ++i) {
        CHECK_CASE(std::isfinite(double(a[i])), "gradient %ld is %g", long(i), double(a[i]));
        most = std::max(most, std::abs(double(a[i]) - double(b[i])));
        largest = std::max(largest, std::abs(double(b[i])));
    }
    return most / largest;
}

double check_gradient(const Case& c, Random& random) {
    current = c.name.c_str();
    const Call<double> call(c);
    const Problem& p = c.problem;
    const std::vector<double> grad = random_gradient(random, p.rows * call.frames * call.features);
    const Gradients<double> g(c, c.offset % 9), alone(c, 0);
    differentiate(call, c, grad, true, p.n_filters > 0, g);
    check_differences(c, call, grad, g, random);
    differentiate(call, c, grad, true, false, alone);
    differentiate(call, c, grad, false, p.n_filters > 0, alone);
    CHECK_CASE(g.wave.size() == 0 || !std::memcmp(g.wave.data(), alone.wave.data(), size_t(g.wave.size()) * 8), "%s",
               "the gradient of the waveform depends on whether that of the filters is wanted");
    CHECK_CASE(
        g.filters.size() == 0 || !std::memcmp(g.filters.data(), alone.filters.data(), size_t(g.filters.size()) * 8),
        "%s", "the gradient of the filters depends on whether that of the waveform is wanted");
    const Call<float> single(c);
    const Gradients<float> f(c, c.offset % 9);
    differentiate(single, c, grad, true, p.n_filters > 0, f);
    const double worst = std::max(difference(f.wave, g.wave), difference(f.filters, g.filters));
    CHECK_CASE(worst <= 2e-4, "float and double gradients differ by %.2e", worst);
    return worst;
}

void check_random_gradients(int cases) {
    Random random(5);
    double worst = 0;
    int framed = 0;
    for (int i = 0; i < cases; ++i) {
        Wanted wanted;
        wanted.gradient = true;
        wanted.work = 1.5e5;
        const Case c = random_case(random, wanted);
        worst = std::max(worst, check_gradient(c, random));
        framed += c.problem.spec.framing.count(c.problem.length) > 0;
    }
    std::printf("gradients: float differs from double by up to %.1e\n", worst);
    CHECK(framed * 3 > cases * 2, "only %d of %d cases have frames", framed, cases);
}

// ---- Chosen cases --------------------------------------------------------------------------------------------------

struct Shape {
    int64_t rows, length, n_fft, hop, n_filters, cepstra;
};

Case plain_case(const Shape& s, const Framing& framing, Random& random, const Wanted& wanted = {}) {
    Case c;
    Problem& p = c.problem;
    p.rows = s.rows;
    p.length = s.length;
    p.spec.n_fft = s.n_fft;
    p.spec.framing = framing;
    p.n_filters = s.n_filters;
    p.cepstra = s.cepstra;
    p.spec.log = true;
    p.spec.log_floor = 1e-3;
    fill_tables(c, wanted, random);
    fill_waveform(c, wanted, random);
    c.name = describe(c);
    return c;
}

Framing centred(int64_t n_fft, int64_t hop, PadMode mode) {
    return framing_of(Kind::center, true, n_fft, n_fft, hop, n_fft / 2, 0, mode, false);
}

// The sizes of speech, of transforms with large primes, and shapes that take other ways through the driver.
void check_chosen() {
    Random random(7);
    Tally tally;
    const auto both = [&](const Case& c) {
        check_forward<float>(c, tally);
        check_forward<double>(c, tally);
    };
    both(plain_case({2, 160 * 37 + 11, 400, 160, 80, 0}, centred(400, 160, PadMode::reflect), random));
    Case speech = plain_case({1, 400 + 160 * 33, 512, 160, 23, 13},
                             framing_of(Kind::valid, false, 512, 400, 160, 0, 0, PadMode::reflect, false), random);
    speech.problem.spec.remove_dc = true;
    speech.problem.spec.preemphasis = 0.97;
    speech.problem.spec.energy = Energy::replace_first;
    both(speech);
    both(plain_case({1, 3000, 1009, 300, 20, 0}, centred(1009, 300, PadMode::circular), random));
    both(plain_case({1, 3000, 882, 441, 0, 0}, centred(882, 441, PadMode::mirror), random));

    // Quiet after a loud beginning: nearly every tile is deferred, more than there is room to keep, or one is too
    // large.
    for (const auto& [filters, frames] : {std::pair<int64_t, int64_t>(2000, 600), {50000, 20}}) {
        Case c = plain_case({1, 16 * frames, 16, 16, filters, 2}, centred(16, 16, PadMode::constant), random);
        c.problem.spec.has_top_db = true;
        c.problem.spec.top_db = 3;
        for (int64_t i = 100; i < c.problem.length; ++i) {
            c.problem.x[i] = float(c.problem.x[i] * 0.05L);
        }
        both(c);
    }
    tally.report("chosen cases");
}

void check_chosen_gradients() {
    Random random(8);
    const Wanted wanted{.gradient = true};
    const auto check = [&](const Case& c) { check_gradient(c, random); };
    // Several runs of tiles a row; a row that ends in the middle of one.
    Case c = plain_case({3, 1500, 8, 2, 3, 0}, centred(8, 2, PadMode::reflect), random, wanted);
    c.problem.lengths = {1500, 700, 5};
    check(c);
    c.problem.spec.has_top_db = true;
    c.problem.spec.top_db = 12;
    c.problem.group = 0;
    check(c);
    // One tile a run, and far apart; then a hop that no buffer could hold.
    check(plain_case({1, 5000 * 20, 16, 5000, 0, 0}, centred(16, 5000, PadMode::reflect), random, wanted));
    check(plain_case({2, 40, 16, int64_t(1) << 40, 0, 0}, centred(16, int64_t(1) << 40, PadMode::reflect), random,
                     wanted));
    check(plain_case({1, 500, 148, 50, 12, 5}, centred(148, 50, PadMode::mirror), random, wanted));
    check(plain_case({1, 700, 400, 160, 20, 0}, centred(400, 160, PadMode::reflect), random, wanted));
}

void check_empty() {
    Random random(9);
    Tally tally;
    const Framing framing = centred(16, 4, PadMode::constant);
    for (const auto& [rows, length] : {std::pair<int64_t, int64_t>(0, 100), {0, 0}, {3, 0}, {2, 1}}) {
        for (int top_db : {0, 1}) {
            Case c = plain_case({rows, length, 16, 4, 5, 3}, framing, random);
            c.problem.spec.has_top_db = top_db;
            check_forward<float>(c, tally);
            c.row_gap = 1;
            check_forward<double>(c, tally);
            check_gradient(c, random);
        }
    }
    Case c = plain_case({3, 50, 16, 4, 5, 0}, framing_of(Kind::valid, true, 16, 16, 4, 0, 0, PadMode::reflect, false),
                        random);
    c.problem.spec.has_top_db = true;
    c.problem.spec.top_db = 10;
    c.problem.lengths = {0, 15, -3};  // no frame anywhere
    check_forward<float>(c, tally);
    check_gradient(c, random);
    tally.report("empty shapes");
}

// A NaN stays in its frames, and with top_db in its group.
void check_nan() {
    Random random(10);
    Tally tally;
    for (int64_t cepstra : {0, 3}) {
        for (int64_t group : {-1, 1, 0}) {
            Case c = plain_case({3, 300, 16, 8, 6, cepstra}, centred(16, 8, PadMode::reflect), random);
            c.problem.spec.has_top_db = group >= 0;
            c.problem.spec.top_db = 6;
            c.problem.group = std::max<int64_t>(0, group);
            c.problem.spec.energy = Energy::append;
            c.problem.spec.power = group ? 2 : 1;
            c.problem.x[300 + 150] = std::numeric_limits<Real>::quiet_NaN();
            check_forward<float>(c, tally);
            check_forward<double>(c, tally);
        }
    }
    tally.report("NaN");
}

// ---- Threads and processes -----------------------------------------------------------------------------------------

struct Bits {
    std::vector<float> features, wave, filters;
    bool operator==(const Bits& other) const {
        const auto same = [](const std::vector<float>& a, const std::vector<float>& b) {
            return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
        };
        return same(features, other.features) && same(wave, other.wave) && same(filters, other.filters);
    }
};

// One call of each direction with the given plan; maxima and counts are the caller's own.
Bits compute(const Case& c, const Call<float>& call) {
    const Problem& p = c.problem;
    Bits out;
    out.features.resize(p.rows * call.frames * call.features);
    out.wave.resize(p.rows * p.length);
    out.filters.resize(p.filters.size());
    std::vector<int64_t> counts(p.rows);
    std::vector<float> maxima(p.rows);
    mmfast::mel::forward_cpu<float>(call.plan, call.wave(), call.tables(), 1, 0, out.features.data(),
                                    ScalarType::float32, counts.data(), maxima.data());
    mmfast::mel::backward_cpu<float>(call.plan, call.wave(), call.tables(), 1, 0, maxima.data(), out.features.data(),
                                     out.wave.data(), out.filters.data());
    return out;
}

// Threads share a plan, whose tables are made by whoever comes first, and the memory that calls leave behind.
void check_threads() {
    Random random(11);
    Case c = plain_case({2, 900, 37 * 8, 60, 12, 5}, centred(37 * 8, 60, PadMode::reflect), random);
    c.problem.spec.has_top_db = true;
    c.problem.spec.top_db = 9;
    const Bits should = compute(c, Call<float>(c));
    std::atomic<int> wrong{0};
    for (int round = 0; round < 5; ++round) {
        const Call<float> fresh(c);
        std::atomic<int> ready{0};
        std::vector<std::thread> threads;
        for (int i = 0; i < 4; ++i) {
            threads.emplace_back([&] {
                for (++ready; ready < 4;) {
                    std::this_thread::yield();
                }
                for (int k = 0; k < 20; ++k) {
                    wrong += !(compute(c, fresh) == should);
                }
            });
        }
        for (std::thread& t : threads) {
            t.join();
        }
    }
    CHECK(wrong == 0, "%d of 400 concurrent calls gave other bits", wrong.load());
}

// The child of a fork() computes the same, whatever other threads held when it was made: small calls, one after the other,
// spend much of their time with the lock on that memory.
void check_fork() {
    Random random(12);
    const Case c = plain_case({1, 4, 4, 4, 1, 1}, centred(4, 4, PadMode::constant), random);
    const Call<float> call(c);
    const Bits should = compute(c, call);
    std::atomic<bool> stop{false};
    std::vector<std::thread> busy;
#if !defined(__SANITIZE_ADDRESS__)  // its allocator does not survive such a fork in every version
    for (int i = 0; i < 3; ++i) {
        busy.emplace_back([&] {
            while (!stop) {
                compute(c, call);
            }
        });
    }
#endif
    for (int i = 0; i < 60; ++i) {
        const pid_t child = fork();
        CHECK(child >= 0, "%s", "fork");
        if (child == 0) {
            alarm(30);  // rather than wait for ever
            _exit(mmfast::forked() && compute(c, call) == should ? 0 : 1);
        }
        int status = 0;
        CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0,
              "a forked process ended with status %d", status);
    }
    stop = true;
    for (std::thread& t : busy) {
        t.join();
    }
    CHECK(!mmfast::forked(), "%s", "the parent takes itself for a child");
}

}  // namespace

int main() {
    if (test::is_above(mmfast::isa_name(mmfast::best_isa()))) return test::kSkipped;
    std::printf("instruction set: %s\n", mmfast::isa_name(mmfast::best_isa()));
    check_framing();
    check_random_forward<float>(200, 2, "float");
    check_random_forward<double>(120, 3, "double");
    check_random_gradients(100);
    check_chosen();
    check_chosen_gradients();
    check_empty();
    check_nan();
    check_threads();
    check_fork();
    std::puts("ok");
    return 0;
}
