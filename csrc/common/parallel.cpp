#include "common/parallel.h"

#if !defined(MMFAST_STANDALONE)
#include <ATen/Parallel.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace mmfast {
namespace {

bool in_child = false;

#if defined(__unix__) || defined(__APPLE__)
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { in_child = true; });
#endif

}  // namespace

bool forked() {
    return in_child;
}

int64_t max_threads() {
#if defined(MMFAST_STANDALONE)
    return 1;
#else
    return forked() || at::in_parallel_region() ? 1 : at::get_num_threads();
#endif
}

void parallel_ranges(int64_t begin, int64_t end, int64_t grain, const void* f,
                     void (*run)(const void* f, int64_t first, int64_t last)) {
#if defined(MMFAST_STANDALONE)
    (void)grain;
    if (begin < end) run(f, begin, end);
#else
    at::parallel_for(begin, end, grain, [=](int64_t first, int64_t last) { run(f, first, last); });
#endif
}

}  // namespace mmfast
