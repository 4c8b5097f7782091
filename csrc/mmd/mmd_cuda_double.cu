#include "mmd/mmd_cuda.cuh"

namespace mmfast {
namespace mmd {

template void quadratic_few_cuda<double>(const FewJob<double>&, cudaStream_t);

}  // namespace mmd
}  // namespace mmfast
