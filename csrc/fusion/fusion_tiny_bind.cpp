// Attention with heads of a few features on the GPU, of torch's tensors, and what its launches were, for
// mmfast/fusion/recording.py to make them again.
#include <pybind11/pybind11.h>

#if defined(MMFAST_WITH_CUDA)
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>

#include "fusion/fusion_tiny_cuda.h"
#endif

namespace py = pybind11;

namespace mmfast {

#if defined(MMFAST_WITH_CUDA)
namespace {

using at::Tensor;
using fusion::TinyJob;
using fusion::TinyKernel;
using fusion::TinyView;
using std::optional;
using std::vector;

constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

// A launch as `Recording.add` takes it: the function, grid, threads and bytes of shared memory, its one argument word by
// word, and which of the words are addresses.
using Told = std::tuple<uint64_t, std::array<unsigned, 3>, unsigned, unsigned, vector<uint64_t>,
                        vector<std::pair<size_t, uint64_t>>>;

TinyView view_of(const Tensor& t, at::IntArrayRef sizes, const Tensor& like) {
    TORCH_CHECK_VALUE(t.is_cuda() && t.device() == like.device() && t.scalar_type() == at::kFloat && t.sizes() == sizes,
                      "no kernel for such tensors");
    // Only what is written is given as memory to write to.
    return {const_cast<float*>(t.const_data_ptr<float>()), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

float* row_values(const Tensor& t, const TinyJob& job) {
    TORCH_CHECK_VALUE(t.is_cuda() && t.scalar_type() == at::kFloat && t.is_contiguous() &&
                          t.numel() == job.batch * job.heads * job.rows,
                      "no kernel for such log-sum-exps");
    return const_cast<float*>(t.const_data_ptr<float>());
}

TinyJob job_of(const Tensor& query, const Tensor& key, const Tensor& value, const optional<Tensor>& lengths,
               double scale, const Tensor& out, const Tensor& lse) {
    TORCH_CHECK_VALUE(query.dim() == 4 && key.dim() == 4 && value.dim() == 4, "tensors must have 4 dimensions");
    TinyJob job{};
    job.batch = query.size(0), job.heads = query.size(1), job.rows = query.size(2), job.keys = key.size(2);
    job.dim = query.size(3), job.value_dim = value.size(3), job.scale = scale;
    TORCH_CHECK_VALUE(std::max(job.dim, job.value_dim) <= fusion::kTinyFeatures &&
                          job.batch * job.heads * std::max(job.rows, job.keys) <= kMost,
                      "no kernel for such sizes");
    job.query = view_of(query, {job.batch, job.heads, job.rows, job.dim}, query);
    job.key = view_of(key, {job.batch, job.heads, job.keys, job.dim}, query);
    job.value = view_of(value, {job.batch, job.heads, job.keys, job.value_dim}, query);
    job.out = view_of(out, {job.batch, job.heads, job.rows, job.value_dim}, query);
    job.lse = row_values(lse, job);
    if (lengths) {
        TORCH_CHECK_VALUE(lengths->is_cuda() && lengths->scalar_type() == at::kLong &&
                              lengths->sizes() == at::IntArrayRef({job.batch}),
                          "lengths must be (batch,)");
        job.lengths = lengths->const_data_ptr<int64_t>();
        job.lengths_stride = lengths->stride(0);
    }
    return job;
}

Told told(const fusion::TinyLaunch& launch, const TinyJob& job) {
    constexpr size_t kAddresses[] = {
        offsetof(TinyJob, query), offsetof(TinyJob, key),      offsetof(TinyJob, value),  offsetof(TinyJob, lengths),
        offsetof(TinyJob, out),   offsetof(TinyJob, lse),      offsetof(TinyJob, by_out), offsetof(TinyJob, by_lse),
        offsetof(TinyJob, less),  offsetof(TinyJob, by_query), offsetof(TinyJob, by_key), offsetof(TinyJob, by_value),
    };
    vector<uint64_t> words(sizeof job / sizeof(uint64_t));
    std::memcpy(words.data(), &job, sizeof job);
    vector<std::pair<size_t, uint64_t>> addresses;
    for (const size_t at : kAddresses)
        if (const uint64_t address = words[at / sizeof(uint64_t)])
            addresses.emplace_back(at / sizeof(uint64_t), address);
    return {reinterpret_cast<uint64_t>(fusion::tiny_function(launch.kernel)),
            {launch.blocks, 1, 1},
            fusion::kTinyThreads,
            0,
            std::move(words),
            std::move(addresses)};
}

// Starts the kernels one after the other; what was launched, if that is asked for.
vector<Told> start(std::initializer_list<TinyKernel> kernels, TinyJob& job, const at::Device& device, bool tell) {
    vector<Told> result;
    for (const TinyKernel kernel : kernels) {
        const fusion::TinyLaunch launch = fusion::tiny_launch(kernel, job, device.index());
        fusion::tiny_start(launch, job, c10::cuda::getCurrentCUDAStream());
        if (tell) result.push_back(told(launch, job));
    }
    return result;
}

// Into `out` (b, h, l, v) and `lse`, contiguous.
vector<Told> forward(const Tensor& query, const Tensor& key, const Tensor& value, const optional<Tensor>& lengths,
                     double scale, const Tensor& out, const Tensor& lse, bool tell) {
    const c10::cuda::CUDAGuard guard(query.device());
    TinyJob job = job_of(query, key, value, lengths, scale, out, lse);
    return start({TinyKernel::forward}, job, query.device(), tell);
}

// Into `by_query`, `by_key` and `by_value`; `less`: memory for a number of each row.
vector<Told> backward(const Tensor& by_out, const optional<Tensor>& by_lse, const Tensor& query, const Tensor& key,
                      const Tensor& value, const optional<Tensor>& lengths, double scale, const Tensor& out,
                      const Tensor& lse, const Tensor& less, const Tensor& by_query, const Tensor& by_key,
                      const Tensor& by_value, bool tell) {
    const c10::cuda::CUDAGuard guard(query.device());
    TinyJob job = job_of(query, key, value, lengths, scale, out, lse);
    job.by_out = view_of(by_out, out.sizes(), query);
    if (by_lse) job.by_lse = row_values(*by_lse, job);
    job.less = row_values(less, job);
    job.by_query = view_of(by_query, query.sizes(), query);
    job.by_key = view_of(by_key, key.sizes(), query);
    job.by_value = view_of(by_value, value.sizes(), query);
    return start({TinyKernel::of_query, TinyKernel::of_key}, job, query.device(), tell);
}

}  // namespace

void bind_fusion_tiny(py::module_& m) {
    using Release = py::call_guard<py::gil_scoped_release>;
    m.attr("fusion_tiny_features") = fusion::kTinyFeatures;
    m.def("fusion_tiny_forward", &forward, Release());
    m.def("fusion_tiny_backward", &backward, Release());
}

#else

void bind_fusion_tiny(py::module_&) {
}

#endif

}  // namespace mmfast
