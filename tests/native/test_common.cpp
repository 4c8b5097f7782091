// csrc/common, without torch.
#include <atomic>
#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/resource.h>
#endif

#include "check.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/scalar_types.h"
#include "common/work.h"

namespace {

// best_isa() reads the variable once, so each case needs a process of its own; this is the second half of main().
int check_isa(const char* limit) {
    try {
        const mmfast::Isa isa = mmfast::best_isa();
        assert(isa == mmfast::best_isa());
        assert(std::string(mmfast::isa_built()).find(mmfast::isa_name(isa)) != std::string::npos);
        if (std::string(limit) == "baseline") {
            assert(isa == mmfast::Isa::baseline);
        }
        if (std::string(limit) == "avx2") {
            assert(isa <= mmfast::Isa::avx2);
        }
        assert(std::string(limit) != "sse9");
    } catch (const std::invalid_argument& error) {
        assert(std::string(limit) == "sse9");
        assert(std::string(error.what()).find("MMFAST_CPU_ISA") != std::string::npos);
    }
    return 0;
}

void check_parallel_for() {
    std::vector<std::pair<int64_t, int64_t>> ranges;
    mmfast::parallel_for(3, 11, 2, [&](int64_t first, int64_t last) { ranges.emplace_back(first, last); });
    std::vector<int> seen(16, 0);
    for (auto [first, last] : ranges) {
        for (int64_t i = first; i < last; ++i) {
            seen[i] += 1;
        }
    }
    for (int i = 0; i < 16; ++i) {
        assert(seen[i] == (i >= 3 && i < 11));
    }
    ranges.clear();
    mmfast::parallel_for(5, 5, 1, [&](int64_t first, int64_t last) { ranges.emplace_back(first, last); });
    assert(ranges.empty());
}

// The number that 16 bits stand for, with `digits` of them for the fraction.
double decode(uint16_t bits, int digits) {
    const int exponent_bits = 15 - digits, bias = (1 << (exponent_bits - 1)) - 1;
    const int exponent = bits >> digits & ((1 << exponent_bits) - 1), fraction = bits & ((1 << digits) - 1);
    double x = std::ldexp(fraction, 1 - bias - digits);
    if (exponent == (1 << exponent_bits) - 1) {
        x = fraction ? NAN : INFINITY;
    } else if (exponent > 0) {
        x = std::ldexp(fraction + (1 << digits), exponent - bias - digits);
    }
    return bits >> 15 ? -x : x;
}

// All 65536 patterns there and back, and what lies between two neighbours: the nearer one, or the even one.
template <class Half>
void check_half(int digits) {
    const auto bits_of = [](Half h) {
        uint16_t bits;
        std::memcpy(&bits, &h, sizeof bits);
        return bits;
    };
    const uint16_t infinity = uint16_t(0x8000 - (1 << digits));
    for (uint32_t i = 0; i < 65536; ++i) {
        const uint16_t bits = uint16_t(i);
        Half h;
        std::memcpy(&h, &bits, sizeof h);
        const double should = decode(bits, digits);
        const float is = float(h);
        if (std::isnan(should)) {
            CHECK(std::isnan(is) && std::isnan(float(Half(is))), "%04x is NaN, not %g", i, double(is));
            continue;
        }
        CHECK(double(is) == should && std::signbit(is) == bool(i >> 15), "%04x is %g, not %g", i, should, double(is));
        CHECK(bits_of(Half(is)) == bits, "%04x comes back as %04x", i, bits_of(Half(is)));
        if ((i & 0x7fff) >= infinity) {
            continue;
        }
        // Past the largest number its successor is where the next one would be, and rounding there gives infinity.
        const uint16_t next = uint16_t(bits + 1);
        const double above = (next & 0x7fff) < infinity ? decode(next, digits) : 2 * should - decode(bits - 1, digits);
        const float middle = float((should + above) / 2), away = float(above);
        const uint16_t even = bits & 1 ? next : bits;
        CHECK(bits_of(Half(middle)) == even, "%a becomes %04x, not %04x", double(middle), bits_of(Half(middle)), even);
        CHECK(bits_of(Half(std::nextafter(middle, is))) == bits, "just short of %a: not %04x", double(middle), i);
        CHECK(bits_of(Half(std::nextafter(middle, away))) == next, "just past %a: not %04x", double(middle), next);
    }
}

void check_dispatch() {
    using mmfast::ScalarType;
    const std::pair<ScalarType, size_t> sizes[] = {{ScalarType::float32, 4},
                                                   {ScalarType::float64, 8},
                                                   {ScalarType::float16, 2},
                                                   {ScalarType::bfloat16, 2},
                                                   {ScalarType::int16, 2}};
    for (const auto& [type, size] : sizes) {
        size_t seen = 0;
        mmfast::dispatch(type, [&](auto* kind) { seen = sizeof *kind; });
        CHECK(seen == size, "scalar type %d has %zu bytes", int(type), seen);
    }
    static_assert(mmfast::scalar_type_of<float>() == ScalarType::float32);
    static_assert(mmfast::scalar_type_of<double>() == ScalarType::float64);
}

long page_faults() {
#if defined(__linux__)
    rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return usage.ru_minflt;
#else
    return 0;
#endif
}

void write_pages(char* data, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 4096) static_cast<volatile char*>(data)[i] = 1;
}

// Threads that ask for memory in the same moment, again and again, as those of a loop in rounds do: each gets what it had.
void check_scratch_of_threads() {
    constexpr int kThreads = 4, kRounds = 300;
    constexpr size_t kBytes = size_t(1) << 20;
    std::atomic<int> waiting{0}, strange{0};
    std::atomic<long> faults{0};
    const auto meet = [&](int round) {
        waiting.fetch_add(1);
        while (waiting.load() < kThreads * (round + 1)) std::this_thread::yield();
    };
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t)
        threads.emplace_back([&] {
            const char* had = nullptr;
            for (int round = 0; round < kRounds; ++round) {
                const mmfast::Scratch scratch(kBytes);
                strange += had && scratch.data() != had;
                had = scratch.data();
                write_pages(scratch.data(), kBytes);
                meet(2 * round);  // all have one
                if (round == 0) faults = page_faults();
                meet(2 * round + 1);
            }
        });
    for (std::thread& t : threads) t.join();
    CHECK(strange == 0, "%d times in %d another block", strange.load(), kThreads * kRounds);
    const long fresh = page_faults() - faults;
    CHECK(fresh < kRounds, "%ld fresh pages in %d rounds", fresh, kRounds);
}

// Tasks that use two of a few things each, dealt out to threads: all use a thing in the order of their indices, and none at the
// same time as another.
void check_turns() {
    constexpr int kThreads = 4, kThings = 5, kTasks = 3000;
    test::Random random(7);
    std::vector<std::pair<int, int>> uses, before;
    std::vector<int> used(kThings);
    for (int i = 0; i < kTasks; ++i) {
        const int a = int(random.below(kThings)), b = int(random.below(kThings));
        uses.emplace_back(a, b);
        before.emplace_back(used[a], used[b]);
        ++used[a];
        if (a != b) ++used[b];
    }
    const auto run = [&](int failing, const auto& f) {
        mmfast::Turns turns(kThings);
        std::atomic<int64_t> dealt{0};
        std::atomic<int> given_up{0};
        std::vector<std::thread> threads;
        for (int t = 0; t < kThreads; ++t)
            threads.emplace_back([&, t] {
                mmfast::Hand hand(dealt, kTasks, 3, t % 2 ? kThreads : 0);
                for (int64_t i; (i = hand.take()) >= 0;) {
                    const auto [a, b] = uses[i];
                    if (!turns.wait(a, before[i].first) || !turns.wait(b, before[i].second)) {
                        ++given_up;
                        continue;
                    }
                    if (i == failing) {
                        turns.fail();
                        continue;
                    }
                    f(int(i), a, b);
                    turns.done(a);
                    if (a != b) turns.done(b);
                }
            });
        for (std::thread& t : threads) t.join();
        return given_up.load();
    };
    std::vector<std::vector<int>> users(kThings);  // no locks: the turns are what keeps threads apart
    CHECK(run(-1,
              [&](int i, int a, int b) {
                  users[a].push_back(i);
                  if (a != b) users[b].push_back(i);
              }) == 0,
          "gave up without a failure");
    for (int thing = 0; thing < kThings; ++thing) {
        CHECK(int(users[thing].size()) == used[thing], "%zu of %d tasks", users[thing].size(), used[thing]);
        for (size_t i = 1; i < users[thing].size(); ++i)
            CHECK(users[thing][i - 1] < users[thing][i], "task %d came after %d", users[thing][i - 1], users[thing][i]);
    }
    std::atomic<int> ran{0};
    const int given_up = run(kTasks / 2, [&](int, int, int) { ++ran; });
    CHECK(given_up > 0 && ran + given_up + 1 == kTasks, "%d ran and %d gave up", ran.load(), given_up);
}

// Large blocks are kept up to a limit, and are not spent on small requests.
void check_large_scratch() {
    using mmfast::Scratch;
    const auto place = [](size_t bytes) {
        const Scratch scratch(bytes);
        write_pages(scratch.data(), bytes);
        return scratch.data();
    };
    const char* const large = place(Scratch::kMostLent / 2);
    CHECK(place(Scratch::kLargest) != large, "a small request got a large block");
    const long faults = page_faults();
    for (int i = 0; i < 20; ++i) CHECK(place(Scratch::kMostLent / 2 - i) == large, "a large block was not kept");
    const long fresh = page_faults() - faults;
    CHECK(fresh < 100, "%ld fresh pages", fresh);
    // Two at once of more than half of what may be kept: one of them goes back to the system, so that it is fresh again.
    const auto two = [] {
        const size_t bytes = Scratch::kMostLent * 3 / 4;
        const Scratch one(bytes), other(bytes);
        CHECK(one.data() != other.data(), "one block for two");
        write_pages(one.data(), bytes);
        write_pages(other.data(), bytes);
    };
    two();
#if defined(__linux__)
    const long before = page_faults();
    two();
    CHECK(page_faults() > before, "more was kept than may be");
#endif
    const Scratch first(Scratch::kMostLent * 3 / 4), second(Scratch::kMostLent * 2);
    CHECK(first.data() != second.data(), "one block for two");
    write_pages(second.data(), Scratch::kMostLent * 2);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc == 2) {
        setenv("MMFAST_CPU_ISA", argv[1], 1);
        return check_isa(argv[1]);
    }
    check_parallel_for();
    check_half<mmfast::Float16>(10);
    check_half<mmfast::BFloat16>(7);
    check_dispatch();
    check_scratch_of_threads();
    check_large_scratch();
    check_turns();
    for (const char* limit : {"baseline", "avx2", "avx512", "avx512_bf16", "amx", "sse9"}) {
        const int status = std::system((std::string(argv[0]) + " " + limit).c_str());
        assert(status == 0);
    }
    std::puts("ok");
    return 0;
}
