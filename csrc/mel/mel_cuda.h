// The mel slice on a GPU: launchers that take device pointers, sizes and a stream. Nothing here allocates device memory or waits
// for the device, except for the first use of a plan on a device, which uploads its tables, and keep_prepared.
//
// All throw std::runtime_error for an error that CUDA reports.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <memory>

#include "mel/mel.h"

namespace mmfast {
namespace mel {

// The window with its normalisation, and sparse forms of the filters: made once for a pair of tensors by prepare_cuda.
// Zero bytes: the window can be used as it is.
template <class T>
int64_t prepared_bytes(const Spec& spec, int64_t n_filters);
template <class T>
void prepare_cuda(const Spec& spec, const Tables<T>& tables, void* prepared, cudaStream_t stream);

// The same in memory of its own, complete on return: for whatever stream, and for as long as it is held.
template <class T>
std::shared_ptr<void> keep_prepared(const Spec& spec, const Tables<T>& tables, cudaStream_t stream);

// Gives memory of the device until the launcher returns, aligned to 256; asked at most once, for more than no bytes.
using Scratch = std::function<void*(int64_t bytes)>;

// As forward_cpu and backward_cpu, all pointers to memory of `device`, which is the current one. Counts and maxima may be null:
// not wanted.
template <class T>
void forward_cuda(const Plan& plan, const Waveform& wave, const Tables<T>& tables, const void* prepared, int64_t group,
                  uint32_t seed, void* features, ScalarType out_type, int64_t* counts, T* maxima,
                  const Scratch& scratch, int device, cudaStream_t stream);
template <class T>
void backward_cuda(const Plan& plan, const Waveform& wave, const Tables<T>& tables, const void* prepared, int64_t group,
                   uint32_t seed, const T* maxima, const T* grad, T* grad_wave, T* grad_filters, const Scratch& scratch,
                   int device, cudaStream_t stream);

}  // namespace mel
}  // namespace mmfast
