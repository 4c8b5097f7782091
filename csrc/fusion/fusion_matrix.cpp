// Attention of bfloat16 on the matrix unit: of keys that all stay in the second cache here, of more of them in
// fusion_matrix_long.h. For the instruction set amx only; what it does not take, the kernels of avx512 do.
//
// Note: [Attention on the matrix unit]
//   Rows of tiles are queries, unlike everywhere else: then queries, gradients of outputs and outputs are read and written as
//   they lie, and only keys and values are arranged, once for all panels. Products of inputs, scores and dP, are exact but for
//   their sums. P and dS are a sum of two bfloat16, x = h + l to 16 bits, as which they are multiplied twice: results are
//   rounded once, at the end, as those of the other kernels are, and the products still take less time than the exponentials.
//   Each source begins a new tile of keys. Features that are multiplied are filled up with zeros to multiples of 32, keys and
//   features that a product has as columns to multiples of 16. Gradients of keys and values are summed transposed, or dS and P
//   would have to be.
//   Which key is which place of a sum is free as long as both factors agree: pairs are the keys k and k + 16, so that a pair of
//   halves is made from two vectors without moving lanes.
//
// Note: [Products meanwhile]
//   A panel is two halves. What is done with the scores of one is spread over the products of the other: the vector units and
//   the matrix unit work at the same time, and P has left for the first cache, as loads of tiles need it, long before it is
//   multiplied. Halves take the place of what they are made from, so that what a half is busy with stays in the first cache.
#include "fusion/fusion_matrix_backward.h"
#include "fusion/fusion_matrix_long.h"
#include "fusion/fusion_matrix_panel.h"
#include "fusion/fusion_matrix_weights.h"
#include "fusion/fusion_softmax.h"

namespace mmfast {
namespace fusion {
namespace MMFAST_ISA {
namespace {

struct ForwardBuffers {
    uint16_t *rows, *queries;  // rows of a head's keys or values; queries
    float *scores, *out;       // [query][key]: P in halves, in the end; [query][feature]
    uint32_t *keys, *values;   // of each head: [pair of features][key], [pair of keys][feature]
    int64_t keys_size, values_size;
    int64_t key_stride, value_stride;
};

int64_t lay_out(const Problem& p, int64_t heads, float* scratch, ForwardBuffers& b) {
    const int64_t n = most_keys(p), dim = padded(p.dim), value_dim = padded(p.value_dim);
    Pieces pieces(scratch);
    b.key_stride = row_stride(n);
    b.value_stride = row_stride(to_tiles(p.value_dim));
    b.keys_size = dim / 2 * b.key_stride;
    b.values_size = n / 2 * b.value_stride;
    pieces.take(b.rows, n * half_stride(larger(dim, value_dim)));
    pieces.take(b.queries, kRows * half_stride(dim));
    pieces.take(b.scores, kRows * b.key_stride);
    pieces.take(b.out, kRows * b.value_stride);
    pieces.take(b.keys, heads * b.keys_size);
    pieces.take(b.values, heads * b.values_size);
    return pieces.taken();
}

int64_t forward_scratch(const Problem& p, int64_t heads) {
    ForwardBuffers b;
    return lay_out(p, heads, nullptr, b);
}

// Of the rows of a panel.
struct Softmax {
    alignas(64) float maximum[kRows];
    alignas(64) float sum[kRows];
    alignas(64) float shift[kRows];
    alignas(64) float gate[kRows];  // in the end divided by the sum
};

// The softmaxes of a panel.
struct Softmaxes {
    const Problem& p;
    const Places& places;
    const ForwardBuffers& b;
    float factor;
    Softmax of[kMostSources];
    Floats sums[kMostSources][kLanes];  // of rows under way

    // Nothing is cleared: it would take longer than a product.
    Softmaxes(const Problem& problem, const Places& at, const ForwardBuffers& buffers, float by)
        : p(problem), places(at), b(buffers), factor(by) {}

    int64_t first(int m) const { return p.decoupled ? places.first[m] : 0; }
    int64_t last(int m) const { return p.decoupled ? places.first[m + 1] : places.total; }

    void find_maxima(int64_t from, int64_t to) {
        const auto max = [](Floats a, Floats b) MMFAST_LAMBDA { return Simd<float>::max(a, b); };
        for (int m = 0; m < p.softmaxes(); ++m)
            for (int64_t r = from; r < to; r += kLanes) {
                Floats largest[kLanes];
                for (int64_t i = 0; i < kLanes; ++i) largest[i] = Simd<float>::splat(-infinity<float>());
                for (int64_t k = first(m); k < last(m); k += kLanes)
#pragma GCC unroll 16
                    for (int64_t i = 0; i < kLanes; ++i)
                        largest[i] = max(Simd<float>::load(b.scores + (r + i) * b.key_stride + k), largest[i]);
                const Floats maximum = fold(largest, max) * factor;
                Simd<float>::store(of[m].maximum + r, maximum);
                Simd<float>::store(of[m].shift + r, maximum == -infinity<float>() ? Floats{} : maximum);
            }
    }
    // One softmax: P times their sum, in halves.
    void weigh(int64_t from, int64_t to) {
        const int64_t total = places.total;
        const float by = factor;
        for (int64_t r = from; r < to; ++r) {
            float* const scores = b.scores + r * b.key_stride;
            const Floats shift = Simd<float>::splat(of[0].shift[r]);
            Floats sum{};
            const auto half = [&](int64_t k) MMFAST_LAMBDA {
                const Floats e = mmfast::exp2(Simd<float>::load(scores + k) * by - shift);
                sum += e;
                return split<true>(e);
            };
            for_pairs(total, [&]<bool kBoth>(int64_t, int64_t k, int64_t) MMFAST_LAMBDA {
                const Halves first = half(k);
                put_in_place(scores + k, first, kBoth ? half(k + kTile) : Halves{});
            });
            sums[0][r % kLanes] = sum;
            if (r % kLanes == kLanes - 1) add_up(r - r % kLanes, 0);
        }
    }
    // Several: exponentials in place, and their sums; when those of kLanes rows are known, gate P in halves.
    void weigh_gated(int64_t from, int64_t to) {
        const float by = factor;
        for (int64_t r = from; r < to; ++r) {
            float* const scores = b.scores + r * b.key_stride;
            for (int m = 0, count = p.count; m < count; ++m) {
                const Floats shift = Simd<float>::splat(of[m].shift[r]);
                Floats sum{};
                for (int64_t k = first(m), end = last(m); k < end; k += kLanes) {
                    const Floats e = mmfast::exp2(Simd<float>::load(scores + k) * by - shift);
                    sum += e;
                    Simd<float>::store(scores + k, e);
                }
                sums[m][r % kLanes] = sum;
            }
            if (r % kLanes < kLanes - 1) continue;
            const int64_t group = r - r % kLanes;
            for (int m = 0; m < p.count; ++m) add_up(group, m);
            for (int64_t i = group; i <= r; ++i) apply_gates(i);
        }
    }

private:
    // In the place of the vectors that they were.
    static MMFAST_INLINE void put_in_place(float* to, const Halves& first, const Halves& second) {
        uint32_t* const words = reinterpret_cast<uint32_t*>(to);
        put_pairs(words, words + kTile, first, second);
    }
    void add_up(int64_t r, int m) {
        const Floats sum = fold(sums[m], [](Floats a, Floats b) MMFAST_LAMBDA { return a + b; });
        const Floats gate = Simd<float>::load(of[m].gate + r);
        Simd<float>::store(of[m].sum + r, sum);
        Simd<float>::store(of[m].gate + r, sum == 0 ? Floats{} : gate / sum);
    }
    void apply_gates(int64_t r) {
        float* const scores = b.scores + r * b.key_stride;
        const auto half = [&](int64_t tile, int64_t k) MMFAST_LAMBDA {
            return split<false>(Simd<float>::load(scores + k) * of[places.source[tile]].gate[r]);
        };
        for_pairs(places.total, [&]<bool kBoth>(int64_t tile, int64_t k, int64_t) MMFAST_LAMBDA {
            put_in_place(scores + k, half(tile, k), kBoth ? half(tile + 1, k + kTile) : Halves{});
        });
    }
};

void forward_panel(MatrixUnit& unit, const ForwardJob<float>& job, int64_t head, const Item& item, const Rows& rows,
                   const Places& places, const ForwardBuffers& b, Ahead& ahead) {
    const Problem& p = *job.problem;
    const bool is_plain = plain(p);
    const int64_t lanes = padded(rows.n), half = smaller(lanes, kHalf), depth = padded(places.total);
    const int64_t score_calls = product_calls(half, padded(p.dim), places.total);
    const int64_t output_calls = product_calls(half, depth, to_tiles(p.value_dim));
    const Left queries = panel_rows(p.query, item.batch, rows, p.dim, lanes, b.queries);
    const uint32_t* const keys = b.keys + head * b.keys_size;
    const uint32_t* const values = b.values + head * b.values_size;
    Softmaxes softmaxes(p, places, b, is_plain ? float(p.scale * kLog2e) : 1.0f);
    for (int m = 0; m < p.softmaxes(); ++m) {
        if (p.decoupled) gates_of(p.sources[m], item.batch, rows, softmaxes.of[m].gate);
        else
            for (float& gate : softmaxes.of[m].gate) gate = 1;
    }
    const auto scores = [&](int64_t from, auto&& between) {
        multiply_scores(unit, p, from, half, queries, keys, places, b.scores, b.key_stride, between);
        if (!is_plain) finish_scores(p, item.batch, rows, from, from + half, places, b.scores, b.key_stride);
        softmaxes.find_maxima(from, from + half);
    };
    const auto outputs = [&](int64_t from, auto&& between) {
        const auto* const halves = reinterpret_cast<const uint16_t*>(b.scores + from * b.key_stride);
        multiply(unit, half, depth, to_tiles(p.value_dim), {halves, halves + kTwoTiles, 2 * b.key_stride, 2},
                 {values, nullptr, b.value_stride}, {b.out + from * b.value_stride, b.value_stride, nullptr, 0},
                 between);
    };
    int64_t begin = 0;
    const auto weigh = [&](int64_t from, int64_t to) {
        if (p.decoupled) softmaxes.weigh_gated(begin + from, begin + to);
        else softmaxes.weigh(begin + from, begin + to);
    };
    ahead.spread(score_calls);
    scores(0, ahead);
    Spread first(half, half < lanes ? score_calls : 1, weigh);
    if (half < lanes) scores(half, first);
    first.rest();
    begin = half;
    Spread second(lanes - half, output_calls, weigh);
    outputs(0, second);
    second.rest();
    const auto put = [&](int64_t from, int64_t to) {
        put_rows(b.out, b.value_stride, p.value_dim, p.decoupled ? nullptr : softmaxes.of[0].gate, item.batch, rows,
                 from, to, job.out, 0, false);
    };
    Spread finished(half, output_calls, put);
    if (half < lanes) outputs(half, finished);
    finished.rest();
    put(half, lanes);
    for (int m = 0; m < p.softmaxes(); ++m) {
        alignas(64) float factor[kRows];
        Running<float, kPanelWidth> running;
        for (int v = 0; v < kPanelWidth; ++v) {
            running.maximum[v] = Simd<float>::load(softmaxes.of[m].maximum + v * kLanes);
            running.sum[v] = Simd<float>::load(softmaxes.of[m].sum + v * kLanes);
        }
        finish<float, kPanelWidth>(job, item, rows, m, running, factor);
    }
}

// As forward() of fusion_forward.cpp: see [Heads of an item] there.
void forward(const ForwardJob<float>& job, const Item& item, float* scratch) {
    const Problem& p = *job.problem;
    const bool together = item.panels > 1;
    ForwardBuffers b;
    lay_out(p, together ? item.heads : 1, scratch, b);
    Places places;
    set_places(p, item.batch, true, 0, tiled_keys(p, item.batch, true), places);
    MatrixUnit unit;
    Ahead ahead;
    const auto keep = [&](int64_t h, int64_t at) {
        const int64_t head = item.head + h * job.fold, dim = padded(p.dim), value_dim = padded(p.value_dim);
        copy_keys(p, false, item.batch, head, places, b.rows);
        pair_columns(b.rows, half_stride(dim), dim, places.total, b.keys + at * b.keys_size, b.key_stride);
        copy_keys(p, true, item.batch, head, places, b.rows);
        pair_rows(b.rows, half_stride(value_dim), to_tiles(p.value_dim), places.total, b.values + at * b.values_size,
                  b.value_stride);
    };
    for (int64_t h = 0; together && h < item.heads; ++h) keep(h, h);
    Rows rows;
    for (int64_t i = 0; i < item.panels; ++i)
        for (int64_t h = 0; h < item.heads; ++h) {
            const int64_t following = i * item.heads + h + 1, next = following / item.heads;
            if (next < item.panels) {
                set_rows<float>(p, job.fold, item.head + following % item.heads * job.fold, item.panel + next, rows);
                if (rows.one_head) {
                    ahead.add(p.query, item.batch, rows.head[0], rows.row[0], rows.n, p.dim);
                    ahead.add(job.out, item.batch, rows.head[0], rows.row[0], rows.n, p.value_dim);
                }
            }
            set_rows<float>(p, job.fold, item.head + h * job.fold, item.panel + i, rows);
            if (!together) keep(h, 0);
            forward_panel(unit, job, together ? h : 0, item, rows, places, b, ahead);
        }
}

}  // namespace

void matrix_kernels_float(MatrixKernels& kernels) {
    kernels.panel = kRows;
    kernels.forward_scratch = forward_scratch;
    kernels.forward = forward;
    kernels.forward_long_scratch = forward_long_scratch;
    kernels.forward_long = forward_long;
    kernels.backward_scratch = backward_scratch;
    kernels.backward = backward;
    kernels.weights_scratch = weights_scratch;
    kernels.weights = weights;
}

}  // namespace MMFAST_ISA
}  // namespace fusion
}  // namespace mmfast
