// What the CUDA sources of the mel slice share: the block of threads, the kernel around a tile, and which one to launch.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>

#include "common/check_cuda.h"
#include "mel/mel_block_backward.h"
#include "mel/mel_block_tables.h"
#include "mel/mel_cuda.h"

namespace mmfast {
namespace mel {

constexpr int kThreads = 288;  // 9 warps: a warp for each of the 9 rows of a 16-point first step

// See [Phases].
struct CudaBlock {
    template <class F>
    __device__ __forceinline__ void each(int n, const F& f) const {
        for (int i = int(threadIdx.x); i < n; i += kThreads) f(i);
        __syncthreads();
    }
    // The same for items of which later ones take longer: those of the round that has none for some threads are the first.
    template <class F>
    __device__ __forceinline__ void rising(int n, const F& f) const {
        const int rest = n % kThreads;
        for (int i = int(threadIdx.x); i < n; i += kThreads) f(i + rest < n ? i + rest : i + rest - n);
        __syncthreads();
    }
    // f(lane, first, step) for the items first, first + step, … < n of each of L lanes, of which the threads are a multiple.
    template <class F>
    __device__ __forceinline__ void lanes(int L, int, const F& f) const {
        f(int(threadIdx.x) % L, int(threadIdx.x) / L, kThreads / L);
        __syncthreads();
    }
    // 16 bytes from global memory at load(i) to shared memory at store(i), i < n, past the registers.
    template <class Load, class Store>
    __device__ __forceinline__ void fetch(int n, const Load& load, const Store& store) const {
        for (int i = int(threadIdx.x); i < n; i += kThreads)
            asm volatile(
                "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(unsigned(__cvta_generic_to_shared(store(i)))),
                "l"(__cvta_generic_to_global(load(i)))
                : "memory");
        asm volatile("cp.async.wait_all;" ::: "memory");
        __syncthreads();
    }
    // Eight loads, or five of four values each, are on their way before the first value is stored.
    template <class Load, class Store>
    __device__ __forceinline__ void copy(int n, const Load& load, const Store& store) const {
        constexpr int kAhead = sizeof(load(0)) > 8 ? 5 : 8;
        for (int i = int(threadIdx.x); i < n; i += kAhead * kThreads) {
            decltype(load(0)) value[kAhead];
#pragma unroll
            for (int j = 0; j < kAhead; ++j)
                value[j] = load(min(i + j * kThreads, n - 1));  // a condition would send them by way of the stack
#pragma unroll
            for (int j = 0; j < kAhead; ++j)
                if (i + j * kThreads < n) store(i + j * kThreads, value[j]);
        }
        __syncthreads();
    }
};

constexpr int kWarps = kThreads / 32;

// f over the values of all threads, which all receive it; in an order that is always the same.
template <class X, class F>
__device__ X over_block(X x, const F& f) {
    __shared__ X parts[kWarps];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = f(x, __shfl_down_sync(0xffffffff, x, step));
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    x = parts[0];
#pragma unroll
    for (int i = 1; i < kWarps; ++i) x = f(x, parts[i]);
    __syncthreads();
    return x;
}

// Bytes of shared memory that group_maximum declares: they count towards what a block may have.
template <class T>
constexpr int kStaticShared = kWarps * int(sizeof(T));

// The larger one; NaN stays NaN.
template <class T>
__device__ T larger(T a, T b) {
    Extrema<T> e{a, a};
    widen(e, b, b);
    return e.highest;
}

// Maximum over the group of a tile, from what the first round wrote; every thread receives it.
template <class T>
__device__ T group_maximum(const Extrema<T>* extrema, int64_t first, int64_t last) {
    T top = -infinity_of<T>();
    for (int64_t i = first + threadIdx.x; i < last; i += kThreads) top = larger(top, extrema[i].highest);
    return over_block(top, [](T a, T b) { return larger(a, b); });
}

using Tuned400 = TunedShape<1, 25, 32>;
using Tuned512 = TunedShape<1, 32, 32>;
using Tuned1024 = TunedShape<8, 8, 16>;
using Tuned2048 = TunedShape<8, 16, 8>;
using Tuned4096 = TunedShape<16, 16, 4>;

// Blocks that shall share a multiprocessor, which limits their registers. One where shared memory has room for no more, as on
// all GPUs before sm_90.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kMostTogether = 1;
#else
constexpr int kMostTogether = 2;
#endif
template <bool kBackward, class Shape>
constexpr int kTogether = kMostTogether;
template <bool kBackward>
constexpr int kTogether<kBackward, GeneralShape> = 1;
template <>
inline constexpr int kTogether<true, Tuned512> = 1;
template <>
inline constexpr int kTogether<true, Tuned1024> = 1;

// The tiles blockIdx.x, blockIdx.x + gridDim.x, … of `total`. `scratch`, if not null, is used in place of shared memory.
// Second round of the forward pass: `maxima`, if not null, receives the maxima of the groups, which every block then searches
// job.extrema for.
template <bool kBackward, class T, class Shape>
__global__ void __launch_bounds__(kThreads, kTogether<kBackward, Shape>)
    tile_kernel(const __grid_constant__ BlockJob<T> job, const __grid_constant__ Layout layout, const Shape shape,
                int64_t total, T* scratch, T* maxima) {
    extern __shared__ __align__(16) double shared[];
    T* const memory = Shape::tuned || !scratch ? reinterpret_cast<T*>(shared) : scratch + blockIdx.x * layout.size;
    const CudaBlock block;
    // A tuned forward kernel has a block for each tile: what a loop needs would cost it registers.
    constexpr bool kOne = Shape::tuned && !kBackward;
    using Index = typename Tile<T, Shape, CudaBlock>::Index;
    for (Index i = blockIdx.x; kOne || i < total;) {
        Tile<T, Shape, CudaBlock> tile(job, shape, block, layout, memory, i);
        if constexpr (kBackward) {
            tile.backward(blockIdx.x);
        } else {
            if (maxima) {
                const int64_t first = tile.group() * job.group, last = min(first + job.group, job.rows);
                tile.maximum = group_maximum(job.extrema, first * job.tiles, last * job.tiles);
                if (tile.row == first && tile.tile() == 0 && threadIdx.x == 0) maxima[tile.group()] = tile.maximum;
            }
            tile.forward();
        }
        if constexpr (kOne) return;
        i = tile.index + Index(gridDim.x);
    }
}

// What a plan keeps on a device.
template <class T>
struct DeviceTables {
    T* values = nullptr;
    BlockPlan<T> plan;
    int processors = 1, most_shared = 48 << 10;

    DeviceTables(const RealPlan<T>& host, int steps, int device) {
        check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "mel: device");
        check_cuda(cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                   "mel: device");
        const BlockTables<T> tables(host, steps);
        const size_t bytes = std::max<size_t>(1, tables.values().size()) * sizeof(T);
        check_cuda(cudaMalloc(&values, bytes),
                   "mel: upload of the transform tables (not during the capture of a graph)");
        cudaError_t status = cudaMemcpy(values, tables.values().data(), bytes, cudaMemcpyHostToDevice);
        // From pageable memory the copy may return before the last bytes are there, and other streams do not wait for it.
        if (status == cudaSuccess) status = cudaStreamSynchronize(cudaStreamLegacy);
        if (status != cudaSuccess) cudaFree(values);
        check_cuda(status, "mel: upload of the transform tables");
        plan = tables.at(values);
    }
    DeviceTables(const DeviceTables&) = delete;
    DeviceTables& operator=(const DeviceTables&) = delete;
    ~DeviceTables() { cudaFree(values); }
};

// f(shape) with the tuned shape of n; false if there is none.
template <class F>
bool with_tuned(int64_t n, const F& f) {
    switch (n) {
        case 400: f(Tuned400()); return true;
        case 512: f(Tuned512()); return true;
        case 1024: f(Tuned1024()); return true;
        case 2048: f(Tuned2048()); return true;
        case 4096: f(Tuned4096()); return true;
        default: return false;
    }
}

template <class T>
const DeviceTables<T>& device_tables(const Plan& plan, int device) {
    const auto made = plan.keep(2 * device + (sizeof(T) == 8), [&]() -> std::shared_ptr<void> {
        int steps = 1;
        with_tuned(plan.spec.n_fft, [&](auto shape) { steps = shape.A; });
        return std::make_shared<DeviceTables<T>>(plan.fft<T>(), steps, device);
    });
    return *static_cast<const DeviceTables<T>*>(made.get());
}

// Memory cut into arrays aligned to 256 bytes; with a null base only their sizes are added up.
struct DeviceArena {
    char* base;
    int64_t used = 0;
    template <class X>
    X* take(int64_t n) {
        X* const at = base ? reinterpret_cast<X*>(base + used) : nullptr;
        used += (n * int64_t(sizeof(X)) + 255) / 256 * 256;
        return at;
    }
};

// The arrays of prepare_cuda.
template <class T>
struct Prepared {
    T *window, *weights;
    int32_t *row_first, *row_count, *bin_first, *bin_count;
    int64_t bytes;
    Prepared(const Spec& spec, int64_t n_filters, void* base) {
        DeviceArena arena{static_cast<char*>(base)};
        const int64_t bins = spec.n_fft / 2 + 1;
        window = arena.take<T>(spec.framing.window);
        weights = arena.take<T>((bins + 1) / 2 * 2 * n_filters);
        row_first = arena.take<int32_t>(n_filters);
        row_count = arena.take<int32_t>(n_filters);
        bin_first = arena.take<int32_t>(n_filters ? bins : 0);
        bin_count = arena.take<int32_t>(n_filters ? bins : 0);
        bytes = n_filters || spec.normalized ? arena.used : 0;
    }
};

constexpr int64_t kMostBlocks = int64_t(1) << 30;

// How much shared memory a kernel has been allowed on each device: asking CUDA takes as long as a short launch.
class SharedLimit {
public:
    template <class Kernel>
    void raise(Kernel kernel, int bytes, int device) {
        if (device < kDevices && allowed_[device].load(std::memory_order_acquire) >= bytes) return;
        const std::lock_guard<std::mutex> lock(mutex_);
        if (device < kDevices && allowed_[device].load(std::memory_order_relaxed) >= bytes) return;
        check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
                   "mel: shared memory");
        if (device < kDevices) allowed_[device].store(bytes, std::memory_order_release);
    }

private:
    static constexpr int kDevices = 64;
    std::mutex mutex_;
    std::atomic<int> allowed_[kDevices] = {};
};

// A job and how it is launched.
template <class T>
struct Launch {
    BlockJob<T> job;
    bool tuned = false, in_shared = true;
    int device;
    int frames = 1;  // of a tile
    int64_t bytes = 0, total = 0, blocks = 0;

    Launch(const Plan& plan, const Waveform& wave, const Tables<T>& tables, const void* prepared, int64_t group,
           uint32_t seed, bool backward, int device_)
        : device(device_) {
        const Spec& spec = plan.spec;
        const DeviceTables<T>& on_device = device_tables<T>(plan, device);
        job = block_job<T>(spec, wave, group, seed);
        job.plan = on_device.plan;
        job.p.window = job.p.energy_window = tables.window;
        job.p.dct = tables.dct;
        job.p.cepstra = tables.cepstra;
        job.feature_count = mel::feature_count(spec, tables.n_filters, tables.cepstra);
        const Prepared<T> p(spec, tables.n_filters, const_cast<void*>(prepared));
        if (p.bytes) job.p.window = p.window;
        if (tables.n_filters)
            job.filters = {tables.n_filters, p.row_first, p.row_count,   p.bin_first,
                           p.bin_count,      p.weights,   tables.filters};
        const int most_shared = on_device.most_shared - (backward ? 0 : kStaticShared<T>);
        if constexpr (sizeof(T) == 4) {
            if (job.p.dither == 0) {  // the noise would cost the tuned kernels their registers
                with_tuned(spec.n_fft, [&](auto shape) {
                    const int64_t need = Layout(shape, job, backward).size * int64_t(sizeof(T));
                    const int64_t tiles = (job.frames + shape.frames() - 1) / shape.frames();
                    tuned = need <= most_shared && job.rows * tiles <= kMostBlocks;
                    if (tuned) frames = shape.frames(), bytes = need;
                });
            }
        }
        if (!tuned) choose_general(backward, most_shared);
        job.tiles = (job.frames + frames - 1) / frames;
        total = job.rows * job.tiles;
        constexpr int64_t kMostScratch = int64_t(1) << 29;
        blocks = std::min(
            total, in_shared ? kMostBlocks : std::clamp<int64_t>(kMostScratch / bytes, 1, 2 * on_device.processors));
    }

    // As many frames as leave room for several blocks on a multiprocessor, then as fit at all, then device memory.
    void choose_general(bool backward, int most_shared) {
        const auto need = [&](int f) {
            return Layout(GeneralShape(job.plan.fft, f), job, backward).size * int64_t(sizeof(T));
        };
        for (frames = 32; frames >= 1; frames /= 2)
            if ((bytes = need(frames)) <= std::min(64 << 10, most_shared)) return;
        if ((bytes = need(frames = 1)) <= most_shared) return;
        in_shared = false;
        bytes = need(frames = 4);
    }

    template <bool kBackward>
    void run(T* scratch, T* maxima, cudaStream_t stream) const {
        if (total == 0) return;
        if constexpr (sizeof(T) == 4) {
            if (tuned) {
                with_tuned(job.plan.fft.n, [&](auto shape) { start<kBackward>(shape, nullptr, maxima, stream); });
                return;
            }
        }
        start<kBackward>(GeneralShape(job.plan.fft, frames), in_shared ? nullptr : scratch, maxima, stream);
    }

private:
    template <bool kBackward, class Shape>
    void start(const Shape& shape, T* scratch, T* maxima, cudaStream_t stream) const {
        const auto kernel = tile_kernel<kBackward, T, Shape>;
        const int shared = in_shared ? int(bytes) : 0;
        if (shared + kStaticShared<T> > 48 << 10) {
            static SharedLimit limit;
            limit.raise(kernel, shared, device);
        }
        const Layout layout(shape, job, kBackward);
        kernel<<<unsigned(blocks), kThreads, shared, stream>>>(job, layout, shape, total, scratch, maxima);
        check_cuda(cudaGetLastError(), "mel: launch");
    }
};

}  // namespace mel
}  // namespace mmfast
