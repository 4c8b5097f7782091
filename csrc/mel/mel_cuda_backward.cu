// Backward pass of the mel slice on a GPU; see mel_block_backward.h for the kernels themselves.
//
// Every tile writes the gradient of the samples that nobody else reads, and leaves that of the others in a span of its own;
// these samples then gather what belongs to them, in an order that depends on the shapes alone. The same holds for the
// filters: a fixed number of blocks sums a fixed share of the tiles.
#include "mel/mel_cuda.cuh"

namespace mmfast {
namespace mel {

namespace {

constexpr int64_t kSlots = 128;  // not the number of multiprocessors: sums shall not depend on the device

template <class T>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const __grid_constant__ BlockJob<T> job, int tile_frames, int span) {
    for (int64_t row = blockIdx.y; row < job.rows; row += gridDim.y)
        for (int64_t tile = blockIdx.x; tile <= job.tiles; tile += gridDim.x)
            gather_between(job, tile_frames, span, row, tile, threadIdx.x, kThreads);
}

// The gradient that top_db takes from the values of a group, in equal parts for those that equal its maximum. A block a group.
template <class T>
__global__ void __launch_bounds__(kThreads)
    share_kernel(const __grid_constant__ BlockJob<T> job, T* group_highest, T* share) {
    const int64_t first = blockIdx.x * job.group * job.tiles,
                  last = min((blockIdx.x + 1) * job.group, job.rows) * job.tiles;
    T top = -infinity_of<T>();
    for (int64_t i = first + threadIdx.x; i < last; i += kThreads) top = larger(top, job.highest[i]);
    top = over_block(top, [](T a, T b) { return larger(a, b); });
    double sum = 0, count = 0;
    for (int64_t i = first + threadIdx.x; i < last; i += kThreads) {
        sum += double(job.raised[i]);
        if (job.highest[i] == top) count += job.hits[i];
    }
    const auto add = [](double a, double b) { return a + b; };
    sum = over_block(sum, add);
    count = over_block(count, add);
    if (threadIdx.x != 0) return;
    group_highest[blockIdx.x] = top;
    share[blockIdx.x] = count > 0 ? T(sum / count) : T(0);
}

template <class T>
__global__ void __launch_bounds__(kThreads) slots_kernel(const T* sums, int64_t slots, int64_t size, T* grad_filters) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= size) return;
    double sum = 0;
    for (int64_t s = 0; s < slots; ++s) sum += double(sums[s * size + i]);
    grad_filters[i] = T(sum);
}

template <class T>
struct BackwardMemory {
    T *spans, *sums, *raised, *highest, *group_highest, *share, *scratch;
    int32_t* hits;
    int64_t slots, filter_size, bytes;
    BackwardMemory(const Launch<T>& l, int span, bool need_waveform, bool need_filters, void* base) {
        DeviceArena arena{static_cast<char*>(base)};
        const int64_t limited = l.job.p.has_top_db ? l.total : 0;
        filter_size = l.job.bins() * l.job.filters.rows;
        slots = need_filters ? l.blocks : 0;
        spans = arena.take<T>(need_waveform ? l.total * span : 0);
        sums = arena.take<T>(slots * filter_size);
        raised = arena.take<T>(limited);
        highest = arena.take<T>(limited);
        group_highest = arena.take<T>(limited ? l.job.rows : 0);
        share = arena.take<T>(limited ? l.job.rows : 0);
        hits = arena.take<int32_t>(limited);
        scratch = arena.take<T>(l.in_shared ? 0 : l.blocks * (l.bytes / int64_t(sizeof(T))));
        bytes = arena.used;
    }
};

}  // namespace

template <class T>
void backward_cuda(const Plan& plan, const Waveform& wave, const Tables<T>& tables, const void* prepared, int64_t group,
                   uint32_t seed, const T* maxima, const T* grad, T* grad_wave, T* grad_filters, const Scratch& scratch,
                   int device, cudaStream_t stream) {
    const bool need_waveform = grad_wave != nullptr, need_filters = grad_filters != nullptr;
    Launch<T> launch(plan, wave, tables, prepared, group, seed, true, device);
    if (need_filters) launch.blocks = std::min(launch.blocks, kSlots);
    const int span = Layout(GeneralShape(launch.job.plan.fft, launch.frames), launch.job, true).span;
    const int64_t bytes = BackwardMemory<T>(launch, span, need_waveform, need_filters, nullptr).bytes;
    const BackwardMemory<T> memory(launch, span, need_waveform, need_filters, bytes ? scratch(bytes) : nullptr);
    BlockJob<T>& job = launch.job;
    job.maxima = job.p.has_top_db ? maxima : nullptr;
    job.grad = grad;
    job.grad_wave = grad_wave;
    job.spans = grad_wave ? memory.spans : nullptr;
    job.filter_sums = grad_filters ? memory.sums : nullptr;
    job.raised = memory.raised;
    job.highest = memory.highest;
    job.hits = memory.hits;
    if (grad_filters && launch.total)
        check_cuda(cudaMemsetAsync(memory.sums, 0, memory.slots * memory.filter_size * sizeof(T), stream),
                   "mel: memset");
    launch.template run<true>(memory.scratch, nullptr, stream);
    if (job.p.has_top_db && launch.total) {
        const int64_t groups = (job.rows + job.group - 1) / job.group;
        share_kernel<T><<<unsigned(groups), kThreads, 0, stream>>>(job, memory.group_highest, memory.share);
        check_cuda(cudaGetLastError(), "mel: launch");
        job.group_highest = memory.group_highest;
        job.share = memory.share;
        job.share_only = true;
        launch.template run<true>(memory.scratch, nullptr, stream);
    }
    if (grad_wave && job.rows > 0 && job.length > 0) {
        const dim3 blocks(unsigned(std::min(job.tiles + 1, kMostBlocks)), unsigned(std::min<int64_t>(job.rows, 65535)));
        gather_kernel<T><<<blocks, kThreads, 0, stream>>>(job, launch.frames, span);
        check_cuda(cudaGetLastError(), "mel: launch");
    }
    if (grad_filters && memory.filter_size) {
        const int64_t blocks = (memory.filter_size + kThreads - 1) / kThreads;
        slots_kernel<T>
            <<<unsigned(blocks), kThreads, 0, stream>>>(memory.sums, memory.slots, memory.filter_size, grad_filters);
        check_cuda(cudaGetLastError(), "mel: launch");
    }
}

#define MMFAST_INSTANTIATE(T)                                                                                      \
    template void backward_cuda<T>(const Plan&, const Waveform&, const Tables<T>&, const void*, int64_t, uint32_t, \
                                   const T*, const T*, T*, T*, const Scratch&, int, cudaStream_t);
MMFAST_INSTANTIATE(float)
MMFAST_INSTANTIATE(double)
#undef MMFAST_INSTANTIATE

}  // namespace mel
}  // namespace mmfast
