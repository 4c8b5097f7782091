// Attention of one panel of queries, source by source and block by block of keys.
#include "fusion/fusion_few.h"
#include "fusion/fusion_panel.h"
#include "fusion/fusion_softmax.h"

namespace mmfast {
namespace fusion {
namespace MMFAST_ISA {
namespace {

// Note: [Keys of a block]
//   A tile of 64 queries and 96 keys is 24 KiB in float: it stays in the first cache between the two products. Up to as
//   many keys the softmax is taken at once; with more of them the output so far is scaled where a maximum grows.
constexpr int64_t kBlockKeys = 96;

// Copies of keys and values: made for each block where they cannot be read in place; so, but of all keys at once, each at its
// place; or of all that a block has, from the key `base` on.
enum class Copies { now, resident, block };

template <class T>
struct Buffers {
    T *queries, *tile, *mask, *out, *sum_out, *keys, *values;
    bool at_once;  // see the note [Exponentials at once]
    int failures = 0;
    Copies copies = Copies::now;
    int64_t base = 0;
    Ahead ahead;
};

constexpr int64_t buffered_keys(const Problem& p) {
    int64_t total = 0;
    for (int j = 0; j < p.count; ++j) total += p.sources[j].keys;
    return total <= kResidentKeys ? larger(total, kBlockKeys) : kBlockKeys;
}

// Copies of the keys of one head, and of its values.
template <class T>
constexpr int64_t keys_size(const Problem& p) {
    return up_to_multiple(buffered_keys(p) * copy_stride<T>(p.dim), 16);
}
template <class T>
constexpr int64_t values_size(const Problem& p) {
    return up_to_multiple(buffered_keys(p) * copy_stride<T>(p.value_dim), 16);
}

// A head of forward_wide: queries, output, maxima and sums of a panel of `width`.
template <class T>
constexpr int64_t state_size(const Problem& p, int64_t width) {
    return width * (p.dim + p.value_dim + 2);
}

template <class T>
int64_t scratch_size(const Problem& p, int64_t heads, int64_t panels, Order order) {
    if (order == Order::few) return few_scratch<T>(p, heads);
    constexpr int64_t W = kPanel<T>;
    const int64_t tiles = W * (p.dim + 2 * p.value_dim + 2 * kBlockKeys);
    if (order == Order::wide)
        return tiles + heads * (panels * state_size<T>(p, W) +
                                kWideKeys * (copy_stride<T>(p.dim) + copy_stride<T>(p.value_dim)));
    return tiles + heads * (keys_size<T>(p) + values_size<T>(p));
}

template <class T>
MMFAST_INLINE void set_buffers(const Problem& p, int64_t heads, T* scratch, Buffers<T>& b) {
    constexpr int64_t W = kPanel<T>;
    b.at_once = plain_scores<T>(p);
    b.queries = scratch;
    b.tile = b.queries + W * p.dim;
    b.mask = b.tile + W * kBlockKeys;
    b.out = b.mask + W * kBlockKeys;
    b.sum_out = b.out + W * p.value_dim;
    b.keys = b.sum_out + W * p.value_dim;
    b.values = b.keys + heads * keys_size<T>(p);
}

// The places of an item's share of all keys.
struct Share {
    int64_t lo, hi;
};

MMFAST_INLINE Share share_of(const Problem& p, const Item& item, const Keys& keys) {
    const int64_t total = keys.start[p.count];
    return {total * item.split / item.splits, total * (item.split + 1) / item.splits};
}

// How the output of a block starts, its exponentials being in the tile, of `count` keys; factor as exponentials() leaves it.
template <class T, int S, class F>
MMFAST_INLINE Start block_exponentials(const Problem& p, const Item& item, const Rows& rows, const Keys& keys,
                                       int64_t from, int64_t to, Buffers<T>& b, Running<T, S>& running, bool started,
                                       int64_t& count, T* factor, const F& key_of) {
    constexpr int64_t W = S * Simd<T>::lanes;
    count = 0;
    for_segments(p, keys, rows.last, from, to, [&](const Segment& s) { count += s.count; });
    if constexpr (kAtOnce<T>) {
        if (b.at_once && count) {
            if (exponentials_at_once(p, keys, rows.last, from, to, b.queries, b.tile, b.ahead, running, started,
                                     key_of))
                return started ? Start::add : Start::zero;
            b.at_once = ++b.failures < kMostFailures;
        }
    }
    int64_t at = 0;
    for_segments(p, keys, rows.last, from, to, [&](const Segment& s) MMFAST_LAMBDA {
        scores<T, S>(p, item.batch, rows, s, key_of(s, at), b.queries, b.tile + at * W, b.mask, b.ahead);
        at += s.count;
    });
    if (count) exponentials<T, S>(count, b.tile, running, factor);
    return started ? Start::scale : Start::zero;
}

int64_t blocks_of(int64_t keys, int64_t most) {
    return (keys + most - 1) / most;
}

template <class T>
void keys_ahead(const Problem& p, const Item& item, const Keys& keys, int64_t last, int64_t lo, int64_t hi,
                Buffers<T>& b) {
    for_segments(p, keys, last, lo, hi, [&](const Segment& s) MMFAST_LAMBDA {
        const View &key = p.sources[s.source].key, &value = p.sources[s.source].value;
        const int64_t head = key_head(p, s.source, item.head);
        b.ahead.add(key, item.batch, head, s.first, s.count, p.dim);
        b.ahead.add(value, item.batch, head, s.first, s.count, p.value_dim);
    });
}

template <class T>
MMFAST_INLINE Block<T> find(const View& x, bool values, int64_t width, const Item& item, int64_t head, const Segment& s,
                            int64_t count, const Buffers<T>& b) {
    T* const buffer = values ? b.values : b.keys;
    const int64_t stride = copy_stride<T>(width);
    if (b.copies == Copies::block) return {buffer + (s.place - b.base) * stride, stride};
    const bool there = b.copies == Copies::resident;
    return block_of<T>(x, values, item.batch, head, s.first, s.count, width, there,
                       buffer + (there ? s.place : count) * stride);
}

// A block of keys; false if there was none of them to see yet.
template <class T, int S>
bool attend_block(const Problem& p, const Item& item, const Rows& rows, const Keys& keys, int64_t from, int64_t to,
                  Buffers<T>& b, Running<T, S>& running, bool started) {
    constexpr int64_t W = S * Simd<T>::lanes;
    alignas(64) T factor[W];
    int64_t count;
    Start start = block_exponentials<T, S>(p, item, rows, keys, from, to, b, running, started, count, factor,
                                           [&](const Segment& s, int64_t before) MMFAST_LAMBDA {
                                               return find(p.sources[s.source].key, false, p.dim, item,
                                                           key_head(p, s.source, item.head), s, before, b);
                                           });
    if (!count) return started;
    count = 0;
    for_segments(p, keys, rows.last, from, to, [&](const Segment& s) MMFAST_LAMBDA {
        const Block<T> value =
            find(p.sources[s.source].value, true, p.value_dim, item, key_head(p, s.source, item.head), s, count, b);
        product_panel<T, S, true>(p.value_dim, s.count, value.data, value.stride, b.tile + count * W, W, b.out, W,
                                  start, factor, b.ahead);
        start = Start::add;
        count += s.count;
    });
    return true;
}

template <class T, int S>
MMFAST_INLINE void clear_out(const Problem& p, T* out) {
    for (int64_t i = 0; i < p.value_dim * S; ++i) Simd<T>::store(out + i * Simd<T>::lanes, Vec<T>{});
}

// Keys lo .. hi - 1: out[value_dim][lane] is not yet divided by the sum.
template <class T, int S>
void attend(const Problem& p, const Item& item, const Rows& rows, const Keys& keys, int64_t lo, int64_t hi,
            Buffers<T>& b, Running<T, S>& running) {
    bool started = false;
    const int64_t blocks = blocks_of(hi - lo, kBlockKeys);
    for (int64_t i = 0; i < blocks; ++i) {
        const int64_t from = lo + (hi - lo) * i / blocks, to = lo + (hi - lo) * (i + 1) / blocks;
        if (i + 1 < blocks && b.copies == Copies::now)
            keys_ahead(p, item, keys, rows.last, to, lo + (hi - lo) * (i + 2) / blocks, b);
        b.ahead.spread((b.copies == Copies::now ? 1 : blocks - i) *
                       (product_steps(to - from) + product_steps(p.value_dim)));
        started = attend_block<T, S>(p, item, rows, keys, from, to, b, running, started);
    }
    if (!started) clear_out<T, S>(p, b.out);
}

// What one softmax over all sources gives: the result, or this share of it.
template <class T, int S>
void conclude(const ForwardJob<T>& job, const Item& item, const Rows& rows, const Running<T, S>& running,
              const T* out) {
    constexpr int64_t N = Simd<T>::lanes, W = S * N;
    const Problem& p = *job.problem;
    if (!job.partial) {
        alignas(64) T factor[W];
        finish<T, S>(job, item, rows, 0, running, factor);
        unpack_columns<T>(out, p.value_dim, factor, item.batch, rows, job.out, 0, false);
        return;
    }
    T* const to = partial_of(job, item.slot);
    for (int64_t i = 0; i < p.value_dim * W; i += N) Simd<T>::store(to + i, Simd<T>::load(out + i));
    store_running<T, S>(running, to + p.value_dim * W);
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
        const Share share = share_of(p, item, keys);
        reset(running);
        attend<T, S>(p, item, rows, keys, share.lo, share.hi, b, running);
        conclude<T, S>(job, item, rows, running, b.out);
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

constexpr int64_t kCopyAhead = 2;

// Copies of the keys or values of a segment, row by row as they lie: those of the item's head h from the `place`-th row on of
// to + h * size.
template <class T>
void copy_heads(const Problem& p, const Item& item, int64_t fold, const Segment& s, bool values, int64_t place,
                int64_t size, T* to) {
    const View& x = values ? p.sources[s.source].value : p.sources[s.source].key;
    const int64_t width = values ? p.value_dim : p.dim, stride = copy_stride<T>(width);
    dispatch<T>(x.type, [&](auto* kind) MMFAST_LAMBDA {
        using From = std::remove_pointer_t<decltype(kind)>;
        const From* const from = static_cast<const From*>(x.data);
        for (int64_t k = 0; k < s.count; ++k)
            for (int64_t h = 0; h < item.heads; ++h) {
                const From* const row =
                    from + x.at(item.batch, key_head(p, s.source, item.head + h * fold), s.first + k);
                // The hardware fetches ahead within a page, which has a row or two.
                for (int64_t at = 0; x.column == 1 && at < width; at += 64 / int64_t(sizeof(From)))
                    __builtin_prefetch(row + kCopyAhead * x.row + at, 0, 3);
                pack_row<T>(row, x.column, width, width, T(1), to + h * size + (place + k) * stride);
            }
    });
}

// Copies of all keys and values of an item that cannot be read in place.
template <class T>
void make_resident(const Problem& p, const Item& item, int64_t fold, const Keys& keys, const Buffers<T>& b) {
    for (int j = 0; j < p.count; ++j) {
        const Segment s{j, 0, keys.length[j], keys.start[j]};
        if (!in_place<T>(p.sources[j].key)) copy_heads(p, item, fold, s, false, s.place, keys_size<T>(p), b.keys);
        if (!in_place<T>(p.sources[j].value, true))
            copy_heads(p, item, fold, s, true, s.place, values_size<T>(p), b.values);
    }
}

// Asks for the keys and values of all heads of an item, lo .. hi - 1.
template <class T>
void heads_ahead(const Problem& p, const Item& item, int64_t fold, const Keys& keys, int64_t last, int64_t lo,
                 int64_t hi, Ahead& ahead) {
    for_segments(p, keys, last, lo, hi, [&](const Segment& s) {
        const auto add = [&](const View& x, int64_t width) {
            const int64_t first = key_head(p, s.source, item.head);
            const int64_t end = key_head(p, s.source, item.head + (item.heads - 1) * fold) + 1;
            if (x.head == width) return ahead.add(x, item.batch, first, s.first, s.count, (end - first) * width);
            for (int64_t head = first; head < end; ++head) ahead.add(x, item.batch, head, s.first, s.count, width);
        };
        add(p.sources[s.source].key, p.dim);
        add(p.sources[s.source].value, p.value_dim);
    });
}

// f<S>(head, panel, softmax so far) for every head of every panel of an item of Order::wide, whose state is one of `states`.
template <class T, class F>
MMFAST_INLINE void for_states(const ForwardJob<T>& job, const Item& item, T* states, Rows& rows, Item& now,
                              Buffers<T>& b, const F& f) {
    const Problem& p = *job.problem;
    const int64_t state = state_size<T>(p, kPanel<T>);
    for (int64_t h = 0; h < item.heads; ++h)
        for (int64_t i = 0; i < item.panels; ++i) {
            now.head = item.head + h * job.fold;
            now.slot = item.slot + (h * job.panels + i) * item.splits;
            set_rows<T>(p, job.fold, now.head, item.panel + i, rows);
            b.queries = states + (h * item.panels + i) * state;
            for_width<T>(rows.n, [&]<int S>() MMFAST_LAMBDA {
                constexpr int64_t W = S * Simd<T>::lanes;
                b.out = b.queries + W * p.dim;
                f.template operator()<S>(h, i, b.out + W * p.value_dim);
            });
        }
}

// The same states before the first key: queries packed, no softmax yet. The largest row.
template <class T>
int64_t begin_states(const ForwardJob<T>& job, const Item& item, T* states, Buffers<T>& b) {
    const Problem& p = *job.problem;
    Rows rows;
    Item now = item;
    int64_t last = 0;
    for_states(job, item, states, rows, now, b, [&]<int S>(int64_t, int64_t, T* so_far) {
        Running<T, S> running;
        pack_columns<T>(p.query, item.batch, rows, 0, p.dim, T(p.scale * kLog2e), b.queries);
        reset(running);
        store_running<T, S>(running, so_far);
        last = larger(last, rows.last);
    });
    return last;
}

// Note: [Wide]
//   More keys than stay in a cache, which every panel of an item needs once. To read and copy them would take most of the time
//   of a single panel and a quarter of that of several, one after the other. So they are read as they lie, whole rows with all
//   heads of the item, block by block, into copies that stay in the second cache, beside the queries, outputs and softmaxes
//   so far of all panels and heads; the next block is asked for meanwhile.
template <class T>
void forward_wide(const ForwardJob<T>& job, const Item& item, const Keys& keys, Buffers<T>& b, T* scratch) {
    const Problem& p = *job.problem;
    const int64_t count = item.heads * item.panels;
    T *const states = scratch, *const all_keys = states + count * state_size<T>(p, kPanel<T>),
             *const all_values = all_keys + item.heads * kWideKeys * copy_stride<T>(p.dim);
    Rows rows;
    Item now = item;
    const int64_t last = begin_states(job, item, states, b);
    bool started[kWideRows / kPanel<T>] = {};
    const auto [lo, hi] = share_of(p, item, keys);
    const int64_t blocks = blocks_of(hi - lo, kWideKeys);
    b.copies = Copies::block;
    for (int64_t i = 0; i < blocks; ++i) {
        const int64_t from = lo + (hi - lo) * i / blocks, to = lo + (hi - lo) * (i + 1) / blocks;
        b.base = from;
        for_segments(p, keys, last, from, to, [&](const Segment& s) MMFAST_LAMBDA {
            copy_heads(p, item, job.fold, s, false, s.place - from, kWideKeys * copy_stride<T>(p.dim), all_keys);
            copy_heads(p, item, job.fold, s, true, s.place - from, kWideKeys * copy_stride<T>(p.value_dim), all_values);
        });
        if (item.panels > 1) {
            heads_ahead<T>(p, item, job.fold, keys, last, to, lo + (hi - lo) * smaller(i + 2, blocks) / blocks,
                           b.ahead);
            b.ahead.spread(count * (product_steps(to - from) + product_steps(p.value_dim)));
        }
        bool any[kWideRows / kPanel<T>];
        for_states(job, item, states, rows, now, b, [&]<int S>(int64_t head, int64_t panel, T* so_far) {
            b.keys = all_keys + head * kWideKeys * copy_stride<T>(p.dim);
            b.values = all_values + head * kWideKeys * copy_stride<T>(p.value_dim);
            Running<T, S> running;
            load_running<T, S>(so_far, running);
            any[panel] = attend_block<T, S>(p, now, rows, keys, from, to, b, running, started[panel]);
            store_running<T, S>(running, so_far);
        });
        for (int64_t panel = 0; panel < item.panels; ++panel) started[panel] = any[panel];
    }
    for_states(job, item, states, rows, now, b, [&]<int S>(int64_t, int64_t panel, T* so_far) {
        Running<T, S> running;
        load_running<T, S>(so_far, running);
        if (!started[panel]) clear_out<T, S>(p, b.out);
        conclude<T, S>(job, now, rows, running, b.out);
    });
}

// Note: [Wide in place]
//   With features in the lanes of the output, too, keys and values are read where they lie and nothing is copied: each key
//   is broadcast to all queries, each value is a few whole vectors. Blocks are small, so that the rows of this one and of the
//   next, which is asked for meanwhile, stay in the second cache, and its values of one head in the first, where rows some
//   KB apart share few sets.
constexpr int64_t kInPlaceKeys = 32;

template <class T>
bool wide_in_place(const Problem& p, const ForwardJob<T>& job) {
    bool result = job.fold * p.rows <= kSingleRows && p.value_dim % Simd<T>::lanes == 0;
    for (int j = 0; j < p.count; ++j)
        result = result && in_place<T>(p.sources[j].key) && in_place<T>(p.sources[j].value);
    return result;
}

// As attend_block, of an output [row][value_dim].
template <class T, int S>
bool attend_in_place(const Problem& p, const Item& item, const Rows& rows, const Keys& keys, int64_t from, int64_t to,
                     Buffers<T>& b, Running<T, S>& running, bool started) {
    constexpr int64_t N = Simd<T>::lanes, W = S * N;
    alignas(64) T factor[W];
    int64_t count;
    const auto at = [&](const View& x, const Segment& s) {
        return static_cast<const T*>(x.data) + x.at(item.batch, key_head(p, s.source, item.head), s.first);
    };
    Start start = block_exponentials<T, S>(p, item, rows, keys, from, to, b, running, started, count, factor,
                                           [&](const Segment& s, int64_t) MMFAST_LAMBDA {
                                               const View& key = p.sources[s.source].key;
                                               return Block<T>{at(key, s), key.row};
                                           });
    if (!count) return started;
    if (start == Start::scale) {
        for (int64_t r = 0; r < rows.n; ++r)
            for (int64_t d = 0; factor[r] != 1 && d < p.value_dim; d += N) {
                T* const out = b.out + r * p.value_dim + d;
                Simd<T>::store(out, factor[r] * Simd<T>::load(out));
            }
        start = Start::add;
    }
    count = 0;
    for_segments(p, keys, rows.last, from, to, [&](const Segment& s) MMFAST_LAMBDA {
        const View& value = p.sources[s.source].value;
        product_rows<T, true>(rows.n, s.count, p.value_dim, b.tile + count * W, W, at(value, s), value.row, b.out,
                              p.value_dim, start, b.ahead);
        start = Start::add;
        count += s.count;
    });
    return true;
}

template <class T>
void forward_in_place(const ForwardJob<T>& job, const Item& item, const Keys& keys, Buffers<T>& b, T* states) {
    const Problem& p = *job.problem;
    Rows rows;
    Item now = item;
    const int64_t last = begin_states(job, item, states, b);
    const auto [lo, hi] = share_of(p, item, keys);
    const int64_t blocks = blocks_of(hi - lo, kInPlaceKeys);
    const int64_t size = blocks ? up_to_multiple((hi - lo + blocks - 1) / blocks, 4) : 0;
    // A few keys that are left are no block of their own, which would read and write all outputs once more.
    const auto end_of = [&](int64_t from) { return hi - from < size + size / 4 ? hi : from + size; };
    bool started[kSingleRows / kPanel<T>] = {};
    for (int64_t from = lo, to; from < hi; from = to) {
        to = end_of(from);
        heads_ahead<T>(p, item, job.fold, keys, last, to, end_of(to), b.ahead);
        b.ahead.spread(item.heads * item.panels *
                       (product_steps(to - from) / 2 + product_steps(smaller(kPanel<T>, job.fold * p.rows))));
        bool any[kSingleRows / kPanel<T>];
        for_states(job, item, states, rows, now, b, [&]<int S>(int64_t, int64_t panel, T* so_far) {
            Running<T, S> running;
            load_running<T, S>(so_far, running);
            any[panel] = attend_in_place<T, S>(p, now, rows, keys, from, to, b, running, started[panel]);
            store_running<T, S>(running, so_far);
        });
        for (int64_t panel = 0; panel < item.panels; ++panel) started[panel] = any[panel];
    }
    for_states(job, item, states, rows, now, b, [&]<int S>(int64_t, int64_t panel, T* so_far) {
        Running<T, S> running;
        load_running<T, S>(so_far, running);
        if (!started[panel]) clear_out<T, S>(p, b.out);
        int64_t offsets[kPanel<T>];
        for (int64_t r = 0; r < rows.n; ++r) offsets[r] = r * p.value_dim;
        pack_columns_of<T>(b.out, offsets, rows.n, 1, p.value_dim, T(1), b.sum_out);
        conclude<T, S>(job, now, rows, running, b.sum_out);
    });
}

template <class T>
void forward_few(const ForwardJob<T>& job, const Item& item, T* scratch) {
    constexpr int64_t N = Simd<T>::lanes;
    const Problem& p = *job.problem;
    const int64_t width = up_to_multiple(p.value_dim, N);
    Keys keys;
    set_keys(p, item.batch, true, keys);
    const auto [lo, hi] = share_of(p, item, keys);
    attend_few<T>(p, item, job.fold, keys, lo, hi, scratch,
                  [&](int64_t h, const Rows& rows, const T* out, const T* maximum, const T* sum) {
                      Item now = item;
                      now.head = item.head + h * job.fold;
                      now.slot = item.slot + h * job.panels * item.splits;
                      for_width<T>(rows.n, [&]<int S>() MMFAST_LAMBDA {
                          constexpr int64_t W = S * N;
                          Running<T, S> running;
                          alignas(64) T at[2 * W] = {}, factor[W];
                          for (int64_t r = 0; r < rows.n; ++r) {
                              at[r] = maximum[r];
                              at[W + r] = sum[r];
                          }
                          load_running<T, S>(at, running);
                          if (!job.partial) {
                              finish<T, S>(job, now, rows, 0, running, factor);
                              unpack_rows<T>(out, width, p.value_dim, factor, item.batch, rows, job.out, 0, false);
                              return;
                          }
                          T* const to = partial_of(job, now.slot);
                          for (int64_t k = 0; k < p.value_dim; ++k)
                              for (int64_t r = 0; r < W; ++r) to[k * W + r] = r < rows.n ? out[r * width + k] : T(0);
                          store_running<T, S>(running, to + p.value_dim * W);
                      });
                  });
}

// Note: [Heads of an item]
//   All heads of a panel come before the next panel: together they read and write whole rows. Which heads share an item is
//   for forward_cpu to say: those whose keys stay in the second cache, or all where there is only one panel.
template <class T>
void forward(const ForwardJob<T>& job, const Item& item, T* scratch) {
    const Problem& p = *job.problem;
    if (item.order == Order::few) return forward_few(job, item, scratch);
    const bool together = item.panels > 1;  // the keys of all heads are used again
    Buffers<T> b;
    set_buffers(p, together ? item.heads : 1, scratch, b);
    T *const all_keys = b.keys, *const all_values = b.values;
    Keys keys;
    set_keys(p, item.batch, true, keys);
    if (item.order == Order::wide)
        return wide_in_place<T>(p, job) ? forward_in_place(job, item, keys, b, b.keys)
                                        : forward_wide(job, item, keys, b, b.keys);
    const bool resident = keys.start[p.count] <= buffered_keys(p);
    b.copies = resident ? Copies::resident : Copies::now;
    if (resident && together) make_resident(p, item, job.fold, keys, b);
    const auto set = [&](int64_t panel, int64_t h, Rows& rows, Item& of) MMFAST_LAMBDA {
        of = item;
        of.heads = 1;
        of.head = item.head + h * job.fold;
        of.slot = item.slot + (h * job.panels + panel) * item.splits;
        set_rows<T>(p, job.fold, of.head, item.panel + panel, rows);
    };
    Rows rows;
    Item now;
    // What the head after this one will read before it asks for more itself.
    const auto keys_of_next = [&]() {
        for (int j = 0; j < (p.decoupled ? p.count : 1); ++j) {
            const auto [lo, hi] = p.decoupled ? Share{keys.start[j], keys.start[j + 1]} : share_of(p, item, keys);
            keys_ahead(p, now, keys, rows.last, lo, resident ? hi : smaller(lo + kBlockKeys, hi), b);
        }
    };
    for (int64_t i = 0; i < item.panels; ++i)
        for (int64_t h = 0; h < item.heads; ++h) {
            const bool last_head = h + 1 == item.heads;
            if (!last_head || i + 1 < item.panels) {
                set(last_head ? i + 1 : i, last_head ? 0 : h + 1, rows, now);
                if (rows.one_head) {
                    b.ahead.add(p.query, now.batch, now.head, rows.row[0], rows.n, p.dim);
                    if (!job.partial) b.ahead.add(job.out, now.batch, now.head, rows.row[0], rows.n, p.value_dim);
                }
                if (i == 0 && !last_head) keys_of_next();
            }
            set(i, h, rows, now);
            if (resident && !together) make_resident(p, now, job.fold, keys, b);
            if (together) {
                b.keys = all_keys + h * keys_size<T>(p);
                b.values = all_values + h * values_size<T>(p);
            }
            for_width<T>(rows.n, [&]<int S>() MMFAST_LAMBDA { forward_panel<T, S>(job, now, rows, keys, b); });
        }
}

template <class T, int S>
void merge_panel(const ForwardJob<T>& job, const Item& item, const Rows& rows, T* out) {
    constexpr int N = Simd<T>::lanes;
    constexpr int64_t W = S * Simd<T>::lanes;
    const Problem& p = *job.problem;
    const int64_t size = partial_size<T>(p);
    const T* const first = partial_of(job, item.slot);
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
    for_width<T>(rows.n, [&]<int S>() MMFAST_LAMBDA { merge_panel<T, S>(job, item, rows, scratch); });
}

}  // namespace
}  // namespace MMFAST_ISA
}  // namespace fusion
}  // namespace mmfast

#include "fusion/fusion_weighing.h"

namespace mmfast {
namespace fusion {
namespace MMFAST_ISA {
namespace {

template <class T>
MMFAST_INLINE void set_kernels(TileKernels<T>& kernels) {
    kernels.panel = kPanel<T>;
    kernels.forward_scratch = scratch_size<T>;
    kernels.forward = forward<T>;
    kernels.merge = merge<T>;
    kernels.weighing_scratch = weighing_scratch<T>;
    kernels.forward_weighing = forward_weighing<T>;
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
