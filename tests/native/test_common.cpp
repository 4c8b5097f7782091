// csrc/common, without torch.
#include <cassert>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/isa.h"
#include "common/parallel.h"

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
            assert(isa != mmfast::Isa::avx512);
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

}  // namespace

int main(int argc, char** argv) {
    if (argc == 2) {
        setenv("MMFAST_CPU_ISA", argv[1], 1);
        return check_isa(argv[1]);
    }
    check_parallel_for();
    for (const char* limit : {"baseline", "avx2", "avx512", "sse9"}) {
        const int status = std::system((std::string(argv[0]) + " " + limit).c_str());
        assert(status == 0);
    }
    std::puts("ok");
    return 0;
}
