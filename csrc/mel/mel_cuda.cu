// Forward pass and preparation of the mel slice on a GPU; see mel_block.h for the kernels themselves.
#include "mel/mel_cuda.cuh"

namespace mmfast {
namespace mel {

namespace {

// Block m < rows packs filter m; the next ones find, a bin a thread, the filters that a bin feeds; the last scales the window.
template <class T>
__global__ void __launch_bounds__(kThreads) prepare_kernel(const T* window, int64_t length, int normalized, T n_fft,
                                                           const T* dense, int rows, int bins, const Prepared<T> to) {
    const int block = int(blockIdx.x), thread = int(threadIdx.x);
    if (block < rows) {
        __shared__ int low, high;
        if (thread == 0) low = bins, high = -1;
        __syncthreads();
        for (int k = thread; k < bins; k += kThreads) {
            if (dense[int64_t(k) * rows + block] != 0) {
                atomicMin(&low, k);
                atomicMax(&high, k);
            }
        }
        __syncthreads();
        const int first = high < 0 ? 0 : low, count = high < 0 ? 0 : high - low + 1;
        for (int j = thread; j < (count + 1) / 2 * 2; j += kThreads)
            to.weights[(int64_t(j / 2) * rows + block) * 2 + j % 2] =
                j < count ? dense[int64_t(first + j) * rows + block] : T(0);
        if (thread == 0) {
            to.row_first[block] = first;
            to.row_count[block] = count;
        }
    } else if (block + 1 < int(gridDim.x)) {
        const int k = (block - rows) * kThreads + thread;
        if (k >= bins) return;
        int low = rows, high = -1;
        for (int m = 0; m < rows; ++m) {
            if (dense[int64_t(k) * rows + m] != 0) {
                low = min(low, m);
                high = m;
            }
        }
        to.bin_first[k] = high < 0 ? 0 : low;
        to.bin_count[k] = high < 0 ? 0 : high - low + 1;
    } else {
        __shared__ T parts[kThreads];
        T sum = 0;
        for (int64_t i = thread; i < length; i += kThreads) sum += window[i] * window[i];
        parts[thread] = sum;
        __syncthreads();
        sum = 0;
        for (int i = 0; i < kThreads; ++i) sum += parts[i];
        const T scale = normalized ? T(1) / root_of(normalized == 1 ? sum : n_fft) : T(1);
        for (int64_t i = thread; i < length; i += kThreads) to.window[i] = window[i] * scale;
    }
}

// maxima[g], a block a group.
template <class T>
__global__ void __launch_bounds__(kThreads)
    maximum_kernel(const Extrema<T>* extrema, int64_t rows, int64_t tiles, int64_t group, T* maxima) {
    const int64_t first = blockIdx.x * group, last = min(first + group, rows);
    const T top = group_maximum(extrema, first * tiles, last * tiles);
    if (threadIdx.x == 0) maxima[blockIdx.x] = top;
}

// Second round without a DCT. `maxima` as for tile_kernel.
template <class T>
__global__ void __launch_bounds__(kThreads)
    clip_kernel(const __grid_constant__ BlockJob<T> job, const __grid_constant__ Layout layout,
                const GeneralShape shape, int64_t total, T* maxima) {
    const CudaBlock block;
    for (int64_t i = blockIdx.x; i < total; i += gridDim.x) {
        Tile<T, GeneralShape, CudaBlock> tile(job, shape, block, layout, nullptr, i);
        if (maxima) {
            const int64_t first = tile.group() * job.group, last = min(first + job.group, job.rows);
            tile.maximum = group_maximum(job.extrema, first * job.tiles, last * job.tiles);
            if (tile.row == first && tile.tile() == 0 && threadIdx.x == 0) maxima[tile.group()] = tile.maximum;
        }
        tile.clip_features();
    }
}

// A group of few tiles is searched for its maximum by every block of the second round; one launch less.
constexpr int64_t kSearched = 4 * kThreads;

template <class T>
struct ForwardMemory {
    Extrema<T>* extrema;
    T *maxima, *scratch;
    int64_t bytes;
    ForwardMemory(const Launch<T>& l, int64_t maxima_, void* base) {
        DeviceArena arena{static_cast<char*>(base)};
        extrema = arena.take<Extrema<T>>(l.job.p.has_top_db ? l.total : 0);
        maxima = arena.take<T>(maxima_);
        scratch = arena.take<T>(l.in_shared ? 0 : l.blocks * (l.bytes / int64_t(sizeof(T))));
        bytes = arena.used;
    }
};

}  // namespace

template <class T>
int64_t prepared_bytes(const Spec& spec, int64_t n_filters) {
    return Prepared<T>(spec, n_filters, nullptr).bytes;
}

template <class T>
void prepare_cuda(const Spec& spec, const Tables<T>& tables, void* prepared, cudaStream_t stream) {
    const int rows = int(tables.n_filters), bins = int(spec.n_fft / 2 + 1);
    const Prepared<T> to(spec, rows, prepared);
    if (to.bytes == 0) return;
    const int blocks = rows + (rows ? (bins + kThreads - 1) / kThreads : 0) + 1;
    prepare_kernel<T><<<blocks, kThreads, 0, stream>>>(tables.window, spec.framing.window, spec.normalized,
                                                       T(spec.n_fft), tables.filters, rows, bins, to);
    check_cuda(cudaGetLastError(), "mel: launch");
}

template <class T>
std::shared_ptr<void> keep_prepared(const Spec& spec, const Tables<T>& tables, cudaStream_t stream) {
    const int64_t bytes = prepared_bytes<T>(spec, tables.n_filters);
    void* memory = nullptr;
    if (bytes) check_cuda(cudaMalloc(&memory, bytes), "mel: memory for the filters");
    std::shared_ptr<void> result(memory, cudaFree);
    prepare_cuda<T>(spec, tables, memory, stream);
    check_cuda(cudaStreamSynchronize(stream), "mel: filters");
    return result;
}

template <class T>
void forward_cuda(const Plan& plan, const Waveform& wave, const Tables<T>& tables, const void* prepared, int64_t group,
                  uint32_t seed, void* features, ScalarType out_type, int64_t* counts, T* maxima,
                  const Scratch& scratch, int device, cudaStream_t stream) {
    if (wave.rows == 0) return;
    Launch<T> launch(plan, wave, tables, prepared, group, seed, false, device);
    const int64_t groups = (launch.job.rows + launch.job.group - 1) / launch.job.group;
    const int64_t own_maxima = launch.job.p.has_top_db && !maxima ? groups : 0;
    const int64_t bytes = ForwardMemory<T>(launch, own_maxima, nullptr).bytes;
    const ForwardMemory<T> memory(launch, own_maxima, bytes ? scratch(bytes) : nullptr);
    if (own_maxima) maxima = memory.maxima;
    BlockJob<T>& job = launch.job;
    job.features = features;
    job.out_type = out_type;
    job.counts = counts;
    job.extrema = job.p.has_top_db ? memory.extrema : nullptr;
    if (counts && launch.total == 0)
        check_cuda(cudaMemsetAsync(counts, 0, wave.rows * sizeof(int64_t), stream), "mel: counts");
    launch.template run<false>(memory.scratch, nullptr, stream);
    if (!job.p.has_top_db) return;

    const bool searched = job.tiles > 0 && job.tiles * std::min(job.group, job.rows) <= kSearched;
    if (!searched) {
        maximum_kernel<T>
            <<<unsigned(groups), kThreads, 0, stream>>>(job.extrema, job.rows, job.tiles, job.group, maxima);
        check_cuda(cudaGetLastError(), "mel: launch");
        job.maxima = maxima;
    }
    T* const found = searched ? maxima : nullptr;
    if (job.p.cepstra) {
        job.clip = true;
        launch.template run<false>(memory.scratch, found, stream);
    } else if (launch.total) {
        const GeneralShape shape(job.plan.fft, launch.frames);
        clip_kernel<T><<<unsigned(launch.total < (1 << 30) ? launch.total : 1 << 30), kThreads, 0, stream>>>(
            job, Layout(shape, job, false), shape, launch.total, found);
        check_cuda(cudaGetLastError(), "mel: launch");
    }
}

#define MMFAST_INSTANTIATE(T)                                                                                     \
    template int64_t prepared_bytes<T>(const Spec&, int64_t);                                                     \
    template void prepare_cuda<T>(const Spec&, const Tables<T>&, void*, cudaStream_t);                            \
    template std::shared_ptr<void> keep_prepared<T>(const Spec&, const Tables<T>&, cudaStream_t);                 \
    template void forward_cuda<T>(const Plan&, const Waveform&, const Tables<T>&, const void*, int64_t, uint32_t, \
                                  void*, ScalarType, int64_t*, T*, const Scratch&, int, cudaStream_t);
MMFAST_INSTANTIATE(float)
MMFAST_INSTANTIATE(double)
#undef MMFAST_INSTANTIATE

}  // namespace mel
}  // namespace mmfast
