// What the stand-alone tests share: checks that are not switched off by NDEBUG, random numbers that are the same
// everywhere, and memory that ends where the data end.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

// Ends the program with a message in the manner of printf when `condition` does not hold.
#define CHECK(condition, ...)                                                                \
    do {                                                                                     \
        if (!(condition)) {                                                                  \
            std::fprintf(stderr, "%s:%d: not true: %s\n  ", __FILE__, __LINE__, #condition); \
            std::fprintf(stderr, __VA_ARGS__);                                               \
            std::fputc('\n', stderr);                                                        \
            std::abort();                                                                    \
        }                                                                                    \
    } while (false)

#if defined(__SANITIZE_ADDRESS__)
// What checks undefined behaviour ends in an instruction that is none: the report is to name the line.
extern "C" __attribute__((used, visibility("default"))) inline const char* __asan_default_options() {
    return "handle_sigill=1";
}
#endif

namespace test {

// What ctest takes for a test that was skipped.
constexpr int kSkipped = 77;

// Whether MMFAST_CPU_ISA asks for more than `best`, which is all that there is and has a run of its own.
inline bool is_above(const char* best) {
    const char* const asked = std::getenv("MMFAST_CPU_ISA");
    const bool above = asked && std::strcmp(asked, best) != 0;
    if (above) std::puts("this machine does not have it");
    return above;
}

class Random {
public:
    explicit Random(uint64_t seed) : state_(seed) {}
    uint64_t bits() {  // splitmix64
        uint64_t z = state_ += 0x9e3779b97f4a7c15u;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }
    double uniform() { return double(bits() >> 11) * 0x1p-53; }
    double normal() { return std::sqrt(-2 * std::log(1 - uniform())) * std::cos(6.283185307179586 * uniform()); }
    int64_t below(int64_t n) { return int64_t(bits() % uint64_t(n)); }
    int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }
    bool chance(double p) { return uniform() < p; }

private:
    uint64_t state_;
};

// n elements that end exactly where the allocation ends, for AddressSanitizer, and begin `offset` elements after its
// aligned beginning. What stands before them is watched; they themselves begin as NaN (or as a large integer).
template <class T>
class Buffer {
public:
    Buffer(int64_t n, int64_t offset) : size_(n), offset_(offset) {
        const size_t bytes = size_t(n + offset) * sizeof(T);
        block_ = static_cast<unsigned char*>(std::malloc(bytes ? bytes : 1));
        if (bytes) std::memset(block_, 0xff, bytes);
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() {
        for (size_t i = 0; i < size_t(offset_) * sizeof(T); ++i) {
            CHECK(block_[i] == 0xff, "byte %zu before a buffer was written", i);
        }
        std::free(block_);
    }
    // Null when empty, as an empty tensor's.
    T* data() const { return size_ ? reinterpret_cast<T*>(block_) + offset_ : nullptr; }
    int64_t size() const { return size_; }
    T& operator[](int64_t i) const { return data()[i]; }

private:
    unsigned char* block_;
    int64_t size_, offset_;
};

}  // namespace test
