// Threads: torch's own pool inside the extension, a plain loop in the stand-alone tests.
#pragma once

#include <cstdint>

#if !defined(MMFAST_STANDALONE)
#include <ATen/Parallel.h>
#endif

namespace mmfast {

// True in a child of fork(): an OpenMP runtime that had threads before cannot start any there and would wait for ever.
bool forked();

// Threads that parallel_for may use here and now.
inline int64_t max_threads() {
#if defined(MMFAST_STANDALONE)
    return 1;
#else
    return forked() || at::in_parallel_region() ? 1 : at::get_num_threads();
#endif
}

// Calls f(first, last) on disjoint ranges that together are [begin, end), each of at least `grain` items if there are
// that many, possibly at the same time. Nested calls run in the calling thread. An exception of f reaches the caller.
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
#if defined(MMFAST_STANDALONE)
    (void)grain;
    if (begin < end) {
        f(begin, end);
    }
#else
    at::parallel_for(begin, end, grain, f);
#endif
}

}  // namespace mmfast
