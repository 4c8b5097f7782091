// Attention of one panel of queries, source by source and block by block of keys.
#include "fusion/fusion_panel.h"

namespace mmfast {
namespace fusion {
namespace MMFAST_ISA {
namespace {

// Note: [Keys of a block]
//   A tile of 64 queries and 96 keys is 24 KiB in float: it stays in the first cache between the two products. Up to as
//   many keys the softmax is taken at once; with more of them the output so far is scaled where a maximum grows.
constexpr int64_t kBlockKeys = 96;

template <class T>
struct Buffers {
    T *queries, *tile, *mask, *out, *sum_out, *keys, *values;
    bool resident;  // keys and values of all sources fit into the buffers, each at its place
    Ahead ahead;
};

constexpr int64_t buffered_keys(const Problem& p) {
    int64_t total = 0;
    for (int j = 0; j < p.count; ++j) total += p.sources[j].keys;
    return total <= kResidentKeys ? larger(total, kBlockKeys) : kBlockKeys;
}

// Copies of the keys of one head, and of its values.
constexpr int64_t keys_size(const Problem& p) {
    return up_to_multiple(buffered_keys(p) * p.dim, 16);
}
constexpr int64_t values_size(const Problem& p) {
    return up_to_multiple(buffered_keys(p) * p.value_dim, 16);
}

template <class T>
int64_t scratch_size(const Problem& p, int64_t heads) {
    constexpr int64_t W = kPanel<T>;
    return W * (p.dim + 2 * p.value_dim + 2 * kBlockKeys) + heads * (keys_size(p) + values_size(p));
}

template <class T>
MMFAST_INLINE void set_buffers(const Problem& p, int64_t heads, T* scratch, Buffers<T>& b) {
    constexpr int64_t W = kPanel<T>;
    b.queries = scratch;
    b.tile = b.queries + W * p.dim;
    b.mask = b.tile + W * kBlockKeys;
    b.out = b.mask + W * kBlockKeys;
    b.sum_out = b.out + W * p.value_dim;
    b.keys = b.sum_out + W * p.value_dim;
    b.values = b.keys + heads * keys_size(p);
    b.resident = false;
}

// Of a softmax so far: the maximum (in units of ln 2) and the sum of the exponentials less it.
template <class T, int S>
struct Running {
    Vec<T> maximum[S], sum[S];
};

// Exponentials in place of the scores; factor[lane] = what outputs so far are to be scaled by.
template <class T, int S>
void exponentials(int64_t count, T* tile, Running<T, S>& running, T* factor) {
    constexpr int N = Simd<T>::lanes, W = S * N;
    Vec<T> maximum[S], shift[S], sum[S];
    for (int v = 0; v < S; ++v) maximum[v] = running.maximum[v];
    for (int64_t k = 0; k < count; ++k)
#pragma GCC unroll 4
        for (int v = 0; v < S; ++v) {
            const Vec<T> x = Simd<T>::load(tile + k * W + v * N);
            maximum[v] = x > maximum[v] ? x : maximum[v];
        }
    for (int v = 0; v < S; ++v) {
        shift[v] = maximum[v] == -infinity<T>() ? Vec<T>{} : maximum[v];
        const Vec<T> f = mmfast::exp2(running.maximum[v] - shift[v]);
        Simd<T>::store(factor + v * N, f);
        sum[v] = running.sum[v] * f;
        running.maximum[v] = maximum[v];
    }
    for (int64_t k = 0; k < count; ++k)
#pragma GCC unroll 4
        for (int v = 0; v < S; ++v) {
            T* const at = tile + k * W + v * N;
            const Vec<T> e = mmfast::exp2(Simd<T>::load(at) - shift[v]);
            sum[v] += e;
            Simd<T>::store(at, e);
        }
    for (int v = 0; v < S; ++v) running.sum[v] = sum[v];
}

int64_t blocks_of(int64_t keys) {
    return (keys + kBlockKeys - 1) / kBlockKeys;
}

// Unless there are copies of them.
template <class T>
void keys_ahead(const Problem& p, const Item& item, const Keys& keys, int64_t last, int64_t lo, int64_t hi,
                Buffers<T>& b) {
    for_segments(p, keys, last, lo, hi, [&](const Segment& s) __attribute__((always_inline)) {
        const View &key = p.sources[s.source].key, &value = p.sources[s.source].value;
        const int64_t head = key_head(p, s.source, item.head);
        if (in_place<T>(key) || !b.resident) b.ahead.add(key, item.batch, head, s.first, s.count, p.dim);
        if (in_place<T>(value) || !b.resident) b.ahead.add(value, item.batch, head, s.first, s.count, p.value_dim);
    });
}

// Keys lo .. hi - 1: out[value_dim][lane] is not yet divided by the sum.
template <class T, int S>
void attend(const Problem& p, const Item& item, const Rows& rows, const Keys& keys, int64_t lo, int64_t hi,
            Buffers<T>& b, Running<T, S>& running) {
    constexpr int64_t W = S * Simd<T>::lanes;
    alignas(64) T factor[W];
    bool started = false;
    const int64_t blocks = blocks_of(hi - lo);
    for (int64_t i = 0; i < blocks; ++i) {
        const int64_t from = lo + (hi - lo) * i / blocks, to = lo + (hi - lo) * (i + 1) / blocks;
        if (i + 1 < blocks) keys_ahead(p, item, keys, rows.last, to, lo + (hi - lo) * (i + 2) / blocks, b);
        b.ahead.spread(product_steps(to - from) + product_steps(p.value_dim));
        int64_t count = 0;
        for_segments(p, keys, rows.last, from, to, [&](const Segment& s) __attribute__((always_inline)) {
            const int64_t head = key_head(p, s.source, item.head), place = b.resident ? s.place : count;
            const Block<T> key = block_of<T>(p.sources[s.source].key, item.batch, head, s.first, s.count, p.dim,
                                             b.resident, b.keys + place * p.dim);
            scores<T, S>(p, item.batch, rows, s, key, b.queries, b.tile + count * W, b.mask, b.ahead);
            count += s.count;
        });
        if (!count) continue;
        exponentials<T, S>(count, b.tile, running, factor);
        Start start = started ? Start::scale : Start::zero;
        count = 0;
        for_segments(p, keys, rows.last, from, to, [&](const Segment& s) __attribute__((always_inline)) {
            const int64_t head = key_head(p, s.source, item.head), place = b.resident ? s.place : count;
            const Block<T> value = block_of<T>(p.sources[s.source].value, item.batch, head, s.first, s.count,
                                               p.value_dim, b.resident, b.values + place * p.value_dim);
            product_strip<T, S, true>(p.value_dim, s.count, value.data, value.stride, b.tile + count * W, W, b.out, W,
                                      start, factor, b.ahead);
            start = Start::add;
            count += s.count;
        });
        started = true;
    }
    if (!started)
        for (int64_t k = 0; k < p.value_dim; ++k)
            for (int v = 0; v < S; ++v) Simd<T>::store(b.out + k * W + v * Simd<T>::lanes, Vec<T>{});
}

// factor[lane] = 1 / sum, and the log-sum-exp of softmax number `softmax`.
template <class T, int S>
MMFAST_INLINE void finish(const ForwardJob<T>& job, const Item& item, const Rows& rows, int softmax,
                          const Running<T, S>& running, T* factor) {
    constexpr int N = Simd<T>::lanes;
    const Problem& p = *job.problem;
    alignas(64) T lse[kPanel<T>];
    for (int v = 0; v < S; ++v) {
        const Vec<T> sum = running.sum[v];
        const auto nothing = sum == 0;
        Simd<T>::store(factor + v * N, nothing ? Vec<T>{} : T(1) / sum);
        Simd<T>::store(lse + v * N,
                       nothing ? Simd<T>::splat(-infinity<T>()) : running.maximum[v] * T(kLn2) + mmfast::log(sum));
    }
    scatter(p, lse, item.batch, rows, job.lse + softmax * p.batch * p.heads * p.rows);
}

template <class T, int S>
MMFAST_INLINE void reset(Running<T, S>& running) {
    for (int v = 0; v < S; ++v) {
        running.maximum[v] = Simd<T>::splat(-infinity<T>());
        running.sum[v] = Vec<T>{};
    }
}

template <class T, int S>
void forward_panel(const ForwardJob<T>& job, const Item& item, const Rows& rows, const Keys& keys, Buffers<T>& b) {
    constexpr int N = Simd<T>::lanes;
    constexpr int64_t W = S * Simd<T>::lanes;
    const Problem& p = *job.problem;
    alignas(64) T factor[W];
    Running<T, S> running;
    pack_columns<T>(p.query, item.batch, rows, 0, p.dim, T(p.scale * kLog2e), b.queries);
    if (!p.decoupled) {
        const int64_t total = keys.start[p.count];
        reset(running);
        attend<T, S>(p, item, rows, keys, total * item.split / item.splits, total * (item.split + 1) / item.splits, b,
                     running);
        if (job.partial) {
            T* const to = job.partial + item.slot * (p.value_dim + 2) * W;
            for (int v = 0; v < S; ++v) {
                for (int64_t k = 0; k < p.value_dim; ++k)
                    Simd<T>::store(to + k * W + v * N, Simd<T>::load(b.out + k * W + v * N));
                Simd<T>::store(to + p.value_dim * W + v * N, running.maximum[v]);
                Simd<T>::store(to + (p.value_dim + 1) * W + v * N, running.sum[v]);
            }
            return;
        }
        finish<T, S>(job, item, rows, 0, running, factor);
        unpack_columns<T>(b.out, p.value_dim, factor, item.batch, rows, job.out, 0, false);
        return;
    }
    for (int j = 0; j < p.count; ++j) {
        alignas(64) T gate[kPanel<T>];
        reset(running);
        attend<T, S>(p, item, rows, keys, keys.start[j], keys.start[j + 1], b, running);
        finish<T, S>(job, item, rows, j, running, factor);
        gates_of(p.sources[j], item.batch, rows, gate);
        for (int v = 0; v < S; ++v) {
            const Vec<T> f = Simd<T>::load(factor + v * N) * Simd<T>::load(gate + v * N);
            for (int64_t k = 0; k < p.value_dim; ++k) {
                const Vec<T> x = f * Simd<T>::load(b.out + k * W + v * N);
                T* const to = b.sum_out + k * W + v * N;
                Simd<T>::store(to, j ? Simd<T>::load(to) + x : x);
            }
        }
    }
    unpack_columns<T>(b.sum_out, p.value_dim, static_cast<const T*>(nullptr), item.batch, rows, job.out, 0, false);
}

// Copies of the keys and values of all heads of an item, row by row as they lie.
template <class T>
void make_resident(const Problem& p, const Item& item, int64_t fold, const Keys& keys, const Buffers<T>& b) {
    for (int j = 0; j < p.count; ++j)
        for (const bool of_keys : {true, false}) {
            const View& x = of_keys ? p.sources[j].key : p.sources[j].value;
            if (in_place<T>(x)) continue;
            const int64_t width = of_keys ? p.dim : p.value_dim, size = of_keys ? keys_size(p) : values_size(p);
            T* const to = (of_keys ? b.keys : b.values) + keys.start[j] * width;
            dispatch<T>(x.type, [&](auto* kind) __attribute__((always_inline)) {
                using From = std::remove_pointer_t<decltype(kind)>;
                const From* const from = static_cast<const From*>(x.data);
                for (int64_t k = 0; k < keys.length[j]; ++k)
                    for (int64_t h = 0; h < item.heads; ++h)
                        pack_row<T>(from + x.at(item.batch, key_head(p, j, item.head + h * fold), k), x.column, width,
                                    width, T(1), to + h * size + k * width);
            });
        }
}

// Note: [Heads of an item]
//   All heads of a panel come before the next panel: together they read and write whole rows. Which heads share an item is
//   for forward_cpu to say: those whose keys stay in the second cache, or all where there is only one panel.
template <class T>
void forward(const ForwardJob<T>& job, const Item& item, T* scratch) {
    const Problem& p = *job.problem;
    Buffers<T> b;
    set_buffers(p, item.heads, scratch, b);
    T *const all_keys = b.keys, *const all_values = b.values;
    Keys keys;
    set_keys(p, item.batch, true, keys);
    b.resident = keys.start[p.count] <= buffered_keys(p);
    if (b.resident) make_resident(p, item, job.fold, keys, b);
    const auto set = [&](int64_t panel, int64_t h, Rows& rows, Item& of) __attribute__((always_inline)) {
        of = item;
        of.head = item.head + h * job.fold;
        of.slot = item.slot + (h * job.panels + panel) * item.splits;
        set_rows<T>(p, job.fold, of.head, item.panel + panel, rows);
    };
    Rows rows;
    Item now;
    for (int64_t i = 0; i < item.panels; ++i)
        for (int64_t h = 0; h < item.heads; ++h) {
            const bool last_head = h + 1 == item.heads;
            if (!last_head || i + 1 < item.panels) {
                set(last_head ? i + 1 : i, last_head ? 0 : h + 1, rows, now);
                if (rows.one_head) {
                    b.ahead.add(p.query, now.batch, now.head, rows.row[0], rows.n, p.dim);
                    if (!job.partial) b.ahead.add(job.out, now.batch, now.head, rows.row[0], rows.n, p.value_dim);
                }
                if (i == 0 && !last_head)
                    for (int j = 0; j < (p.decoupled ? p.count : 1); ++j) {
                        const int64_t lo = p.decoupled ? keys.start[j] : keys.start[p.count] * item.split / item.splits;
                        const int64_t hi = p.decoupled ? keys.start[j + 1] : keys.start[p.count];
                        keys_ahead(p, now, keys, rows.last, lo, smaller(lo + kBlockKeys, hi), b);
                    }
            }
            set(i, h, rows, now);
            b.keys = all_keys + h * keys_size(p);
            b.values = all_values + h * values_size(p);
            for_width<T>(rows.n,
                         [&]<int S>() __attribute__((always_inline)) { forward_panel<T, S>(job, now, rows, keys, b); });
        }
}

template <class T, int S>
void merge_panel(const ForwardJob<T>& job, const Item& item, const Rows& rows, T* out) {
    constexpr int N = Simd<T>::lanes;
    constexpr int64_t W = S * Simd<T>::lanes;
    const Problem& p = *job.problem;
    const int64_t size = (p.value_dim + 2) * W;
    const T* const first = job.partial + item.slot * size;
    alignas(64) T factor[W];
    Running<T, S> running;
    for (int v = 0; v < S; ++v) {
        const T* const at = first + v * N;
        Vec<T> maximum = Simd<T>::splat(-infinity<T>()), sum{};
        for (int64_t i = 0; i < item.splits; ++i) {
            const Vec<T> m = Simd<T>::load(at + i * size + p.value_dim * W);
            maximum = m > maximum ? m : maximum;
        }
        const Vec<T> shift = maximum == -infinity<T>() ? Vec<T>{} : maximum;
        for (int64_t i = 0; i < item.splits; ++i) {
            const T* const from = at + i * size;
            const Vec<T> f = mmfast::exp2(Simd<T>::load(from + p.value_dim * W) - shift);
            sum += f * Simd<T>::load(from + (p.value_dim + 1) * W);
            for (int64_t k = 0; k < p.value_dim; ++k) {
                const Vec<T> x = f * Simd<T>::load(from + k * W);
                T* const to = out + k * W + v * N;
                Simd<T>::store(to, i ? Simd<T>::load(to) + x : x);
            }
        }
        running.maximum[v] = maximum;
        running.sum[v] = sum;
    }
    finish<T, S>(job, item, rows, 0, running, factor);
    unpack_columns<T>(out, p.value_dim, factor, item.batch, rows, job.out, 0, false);
}

template <class T>
void merge(const ForwardJob<T>& job, const Item& item, T* scratch) {
    Rows rows;
    set_rows<T>(*job.problem, job.fold, item.head, item.panel, rows);
    for_width<T>(rows.n, [&]<int S>() __attribute__((always_inline)) { merge_panel<T, S>(job, item, rows, scratch); });
}

template <class T>
MMFAST_INLINE void set_kernels(TileKernels<T>& kernels) {
    kernels.panel = kPanel<T>;
    kernels.forward_scratch = scratch_size<T>;
    kernels.forward = forward<T>;
    kernels.merge = merge<T>;
}

}  // namespace

void forward_kernels_float(TileKernels<float>& kernels) {
    set_kernels(kernels);
}
void forward_kernels_double(TileKernels<double>& kernels) {
    set_kernels(kernels);
}

}  // namespace MMFAST_ISA
}  // namespace fusion
}  // namespace mmfast
