#include "mmd/mmd_cuda.cuh"

#include <algorithm>

namespace mmfast {
namespace mmd {

int few_shares(int64_t batch, int64_t n, int64_t m, int device) {
    int processors = 0;
    check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "mmd: multiprocessors");
    const int64_t blocks = std::max<int64_t>(1, batch * few_tiles(n, m, kFewRows));
    const int64_t wanted = (8 * int64_t(processors) + blocks - 1) / blocks;
    return int(std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, few_tiles(n, m, kFewColumns))));
}

template void quadratic_few_cuda<float>(const FewJob<float>&, cudaStream_t);

}  // namespace mmd
}  // namespace mmfast
