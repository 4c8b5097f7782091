// The caches of this machine.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(__linux__)
#include <unistd.h>
#endif

namespace mmfast {

// Bytes of a core's second cache: 256 KiB to 2 MiB in all processors of the last ten years, 1 MiB where nobody says.
inline int64_t second_cache() {
    static const int64_t size = [] {
        int64_t known = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
        known = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
        if (known <= 0) known = 1 << 20;
        return std::clamp<int64_t>(known, 256 << 10, 2 << 20);
    }();
    return size;
}

}  // namespace mmfast
