// Threads: torch's own pool inside the extension, a plain loop in the tests without torch (MMFAST_STANDALONE). parallel.cpp
// alone knows which: all that is computed is compiled once for both.
#pragma once

#include <cstdint>

namespace mmfast {

// True in a child of fork(): an OpenMP runtime that had threads before cannot start any there and would wait for ever.
bool forked();

// Threads that parallel_for may use here and now.
int64_t max_threads();

// parallel_for for run(f, first, last).
void parallel_ranges(int64_t begin, int64_t end, int64_t grain, const void* f,
                     void (*run)(const void* f, int64_t first, int64_t last));

// Calls f(first, last) on disjoint ranges that together are [begin, end), each of at least `grain` items if there are
// that many, possibly at the same time. Nested calls run in the calling thread. An exception of f reaches the caller.
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
    parallel_ranges(begin, end, grain, &f, [](const void* function, int64_t first, int64_t last) {
        (*static_cast<const F*>(function))(first, last);
    });
}

}  // namespace mmfast
