// Attention weights on demand, from the log-sum-exp: those of each head, or their mean, of which alone is then written.
#include "fusion/fusion_panel.h"

namespace mmfast {
namespace fusion {
namespace MMFAST_ISA {
namespace {

constexpr int64_t kBlockKeys = 96;

template <class T>
int64_t scratch_size(const Problem& p) {
    return kPanel<T> * (p.heads * p.dim + 3 * kBlockKeys) + kBlockKeys * copy_stride<T>(p.dim);
}

// sum[key][lane] (+)= factor exp(score - lse)
template <class T, int S>
void add_weights(int64_t count, const T* tile, const T* lse, T factor, bool add, T* sum) {
    constexpr int N = Simd<T>::lanes, W = S * N;
    Vec<T> shift[S];
    for (int v = 0; v < S; ++v) shift[v] = Simd<T>::load(lse + v * N);
    for (int64_t k = 0; k < count; ++k)
#pragma GCC unroll 4
        for (int v = 0; v < S; ++v) {
            T* const to = sum + k * W + v * N;
            const Vec<T> e = factor * mmfast::exp2(Simd<T>::load(tile + k * W + v * N) - shift[v]);
            Simd<T>::store(to, add ? Simd<T>::load(to) + e : e);
        }
}

template <class T, int S>
void weights_panel(const WeightsJob<T>& job, const WeightsItem& item, const Keys& keys, T* scratch) {
    constexpr int64_t W = S * Simd<T>::lanes;
    const Problem& p = *job.problem;
    T *const queries = scratch, *const tile = queries + W * p.heads * p.dim, *const sum = tile + W * kBlockKeys;
    T *const mask = sum + W * kBlockKeys, *const copies = mask + W * kBlockKeys;
    Ahead ahead;
    Rows rows;
    for (int64_t h = 0; h < item.heads; ++h) {
        set_rows<T>(p, 1, item.head + h, item.panel, rows);
        pack_columns<T>(p.query, item.batch, rows, 0, p.dim, T(p.scale * kLog2e), queries + h * W * p.dim);
    }
    const T factor = T(1) / T(item.heads);
    for (int j = 0; j < p.count; ++j) {
        const int64_t end = keys.start[j + 1];
        for (int64_t lo = keys.start[j]; lo < end; lo += kBlockKeys)
            for_segments(p, keys, rows.last, lo, smaller(lo + kBlockKeys, end), [&](const Segment& s) {
                for (int64_t h = 0; h < item.heads; ++h) {
                    const int64_t head = item.head + h;
                    set_rows<T>(p, 1, head, item.panel, rows);
                    alignas(64) T lse[kPanel<T>];
                    gather(p, job.lse, item.batch, rows, T(0), lse);
                    for (int64_t i = 0; i < W; ++i) lse[i] = shift_of(lse[i]);
                    const Block<T> key =
                        block_of<T>(p.sources[s.source].key, false, item.batch, key_head(p, s.source, head), s.first,
                                    s.count, p.dim, false, copies);
                    scores<T, S>(p, item.batch, rows, s, key, queries + h * W * p.dim, tile, mask, ahead);
                    add_weights<T, S>(s.count, tile, lse, factor, h > 0, sum);
                }
                if (item.heads > 1)
                    for (int64_t i = 0; i < rows.n; ++i) rows.head[i] = 0;
                unpack_columns<T>(sum, s.count, static_cast<const T*>(nullptr), item.batch, rows, job.weights[j],
                                  s.first, false);
            });
    }
}

template <class T>
void weights(const WeightsJob<T>& job, const WeightsItem& item, T* scratch) {
    Keys keys;
    set_keys(*job.problem, item.batch, false, keys);
    for_width<T>(smaller(kPanel<T>, job.problem->rows - item.panel * kPanel<T>),
                 [&]<int S>() MMFAST_LAMBDA { weights_panel<T, S>(job, item, keys, scratch); });
}

template <class T>
MMFAST_INLINE void set_kernels(TileKernels<T>& kernels) {
    kernels.weights_scratch = scratch_size<T>;
    kernels.weights = weights<T>;
}

}  // namespace

void weights_kernels_float(TileKernels<float>& kernels) {
    set_kernels(kernels);
}
void weights_kernels_double(TileKernels<double>& kernels) {
    set_kernels(kernels);
}

}  // namespace MMFAST_ISA
}  // namespace fusion
}  // namespace mmfast
