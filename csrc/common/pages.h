// Large results in large pages.
//
// Note: [Pages]
//   Memory that the system hands out afresh costs a fault for each page of 4 KiB written first, 0.7 to 2.5 us each: up to half
//   of what writing a gradient of 25 MB takes, and malloc gives results of that size back whenever they are freed. Where
//   the system leaves the choice to programs ("madvise" in /sys/kernel/mm/transparent_hugepage/enabled), large results ask
//   for pages of 2 MiB, as NumPy does for its arrays. No memory outside of the result is taken.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mmfast {

// For memory that is about to be written whole. Below a few large pages it does nothing.
inline void prefer_large_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t kLargePage = uintptr_t(2) << 20;
    if (bytes < 2 * kLargePage) return;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kLargePage - 1) / kLargePage * kLargePage;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kLargePage * kLargePage;
    if (first < end) (void)madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);  // advice: may fail
#endif
}

}  // namespace mmfast
