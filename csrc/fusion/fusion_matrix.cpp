// Attention of bfloat16 on the matrix unit: of keys that all stay in the second cache here, of more of them in
// fusion_matrix_long.h. For the instruction set amx; and for avx512_bf16, where what is said of the matrix unit is done by vectors:
// see [Products in vectors]. What they do not take, the kernels of avx512 do.
//
// Note: [Attention on the matrix unit]
//   Rows of tiles are queries, unlike everywhere else: then queries, gradients of outputs and outputs are read and written as
//   they lie, and only keys and values are arranged, once for all panels. Products of inputs, scores and dP, are exact but for
//   their sums. P is rounded to bfloat16 to be multiplied by values, as in torch's kernel and in FlashAttention, whose errors
//   outputs have; its sums, and so log-sum-exps, are of what it was before. For gradients P and dS are a sum of two bfloat16,
//   x = h + l to 16 bits, as which they are multiplied twice: sums over thousands of queries are rounded once, at the end.
//   In vectors products are what takes the time, and those of gradients of keys and values are of P and dS rounded, in six products
//   where there were eight: errors are then those of outputs, 1.4 times what rounding results leaves. Not so for queries: dS of
//   a row add up to zero, so what keys have in common goes out of dQ, but for what rounding dS would leave of it.
//   Each source begins a new tile of keys. Features that are multiplied are filled up with zeros to multiples of 32, keys and
//   features that a product has as columns to multiples of 16. Gradients of keys and values are summed transposed, or dS and P
//   would have to be.
//
// Note: [Units of the forward pass]
//   What is done at a time is half a panel, 32 queries, one step after the other: then scores, P, keys and values of a head (77
//   keys of 40 features: 44 KB) stay in the first cache. Nothing is won by working on one half while another is multiplied:
//   loads and stores of tiles keep the vector units waiting as long as they last, and two halves do not fit.
//   Of 77 keys of 40 features, 16 queries: 19 products of tiles of 16 cycles, 8 of their sums stored, in all 460 cycles; 80
//   vectors of exponentials at 13 instructions, two a cycle, and maxima 660; rows in and out 250.
#include "fusion/fusion_matrix_backward.h"
#include "fusion/fusion_matrix_long.h"
#include "fusion/fusion_matrix_panel.h"
#include "fusion/fusion_matrix_projection.h"
#include "fusion/fusion_matrix_weights.h"
#include "fusion/fusion_softmax.h"

namespace mmfast {
namespace fusion {
namespace MMFAST_ISA {
namespace {

struct ForwardBuffers {
    uint16_t *rows, *queries;  // rows of a head's keys or values; queries
    float *scores, *out;       // [query][key], in the end P in bfloat16; [query][feature]
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
    pieces.take(b.queries, kHalf * half_stride(dim));
    pieces.take(b.scores, kHalf * b.key_stride);
    pieces.take(b.out, kHalf * b.value_stride);
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

    // Nothing is cleared: it would take longer than a product.
    Softmaxes(const Problem& problem, const Places& at, const ForwardBuffers& buffers, float by)
        : p(problem), places(at), b(buffers), factor(by) {}

    int64_t first(int m) const { return p.decoupled ? places.first[m] : 0; }
    int64_t last(int m) const { return p.decoupled ? places.first[m + 1] : places.total; }
    // Of a row, of the unit whose first one is `unit`.
    float* scores(int64_t r, int64_t unit) const { return b.scores + (r - unit) * b.key_stride; }

    // P times its sums in place of the scores of a unit.
    void weigh(MatrixUnit& matrix, int64_t unit, int64_t count) {
        for (int64_t r = unit; r < unit + count; r += kLanes) {
            matrix.stay_awake();
            for (int m = 0, n = p.softmaxes(); m < n; ++m) find_maxima(unit, r, m);
            if (p.decoupled) weigh_gated(unit, r);
            else weigh_rows(unit, r);
        }
    }

private:
    // Of kLanes rows, all of these.
    void find_maxima(int64_t unit, int64_t r, int m) {
        const Floats maximum = largest_of_rows(scores(r, unit), b.key_stride, first(m), last(m)) * factor;
        Simd<float>::store(of[m].maximum + r, maximum);
        Simd<float>::store(of[m].shift + r, maximum == -infinity<float>() ? Floats{} : maximum);
    }
    // One softmax.
    void weigh_rows(int64_t unit, int64_t r) {
        Floats sums[kLanes];
        for (int64_t i = 0; i < kLanes; ++i)
            sums[i] = exponentials_of_row(scores(r + i, unit), places.total, factor, of[0].shift[r + i]);
        end_rows(r, 0, sums);
    }
    // Several: exponentials in place and their sums, then gate P.
    void weigh_gated(int64_t unit, int64_t r) {
        const float by = factor;
        for (int m = 0; m < p.count; ++m) {
            Floats sums[kLanes];
            for (int64_t i = 0; i < kLanes; ++i) {
                float* const row = scores(r + i, unit);
                const Floats shift = Simd<float>::splat(of[m].shift[r + i]);
                Floats sum{};
                for (int64_t k = first(m), end = last(m); k < end; k += kLanes) {
                    const Floats e = mmfast::exp2(Simd<float>::load(row + k) * by - shift);
                    sum += e;
                    Simd<float>::store(row + k, e);
                }
                sums[i] = sum;
            }
            end_rows(r, m, sums);
        }
        for (int64_t i = r; i < r + kLanes; ++i) {
            float* const row = scores(i, unit);
            round_row(row, places.total, [&](int64_t k) MMFAST_LAMBDA {
                return Simd<float>::load(row + k) * of[places.source[k / kTile]].gate[i];
            });
        }
    }
    void end_rows(int64_t r, int m, Floats* sums) {
        const Floats sum = add_up(sums);
        const Floats gate = Simd<float>::load(of[m].gate + r);
        Simd<float>::store(of[m].sum + r, sum);
        Simd<float>::store(of[m].gate + r, sum == 0 ? Floats{} : gate / sum);
    }
};

void forward_panel(MatrixUnit& matrix, const ForwardJob<float>& job, int64_t head, const Item& item, const Rows& rows,
                   const Places& places, const ForwardBuffers& b, Ahead& ahead) {
    const Problem& p = *job.problem;
    const bool is_plain = plain(p);
    const int64_t lanes = to_tiles(rows.n), dim = padded(p.dim), depth = to_depth(places.total);
    const uint32_t* const keys = b.keys + head * b.keys_size;
    const uint32_t* const values = b.values + head * b.values_size;
    Softmaxes softmaxes(p, places, b, is_plain ? float(p.scale * kLog2e) : 1.0f);
    for (int m = 0; m < p.softmaxes(); ++m) {
        if (p.decoupled) gates_of(p.sources[m], item.batch, rows, softmaxes.of[m].gate);
        else
            for (float& gate : softmaxes.of[m].gate) gate = 1;
    }
    ahead.spread(larger(1, (lanes > kHalf ? 2 : 1) * product_calls(kHalf, dim, places.total)));
    for (int64_t unit = 0; unit < lanes; unit += kHalf) {
        const int64_t count = smaller(kHalf, lanes - unit);
        const Left queries =
            panel_rows(p.query, item.batch, rows, p.dim, to_depth(p.dim), unit, unit + count, b.queries);
        float* const scores = b.scores - unit * b.key_stride;
        multiply_scores(matrix, p, unit, count, queries, {keys, b.key_stride}, places, scores, b.key_stride, ahead);
        if (!is_plain) finish_scores(p, item.batch, rows, unit, unit + count, places, scores, b.key_stride);
        softmaxes.weigh(matrix, unit, count);
        multiply(matrix, count, depth, to_tiles(p.value_dim), rounded_rows(b.scores, b.key_stride),
                 {values, b.value_stride}, {b.out, b.value_stride, nullptr, 0}, Nothing());
        put_rows(b.out - unit * b.value_stride, b.value_stride, p.value_dim,
                 p.decoupled ? nullptr : softmaxes.of[0].gate, item.batch, rows, unit, unit + count, job.out, 0, false);
        matrix.stay_awake();
    }
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
    const bool together = item.panels > 1, far = !together && keys_are_far(p);
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
        pair_rows<1>(b.rows, half_stride(value_dim), to_tiles(p.value_dim), places.total, b.values + at * b.values_size,
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
            if (far && h + 1 < item.heads)
                keys_ahead(p, item.batch, item.head + (h + 1) * job.fold, true, 0, places.total, ahead);
            forward_panel(unit, job, together ? h : 0, item, rows, places, b, ahead);
        }
}

}  // namespace

void matrix_kernels_float(MatrixKernels& kernels) {
    kernels.panel = kRows;
    kernels.rounds_sums = !kSumOnTheRight;
    kernels.forward_scratch = forward_scratch;
    kernels.forward = forward;
    kernels.forward_long_scratch = forward_long_scratch;
    kernels.forward_long = forward_long;
    kernels.backward_scratch = backward_scratch;
    kernels.backward = backward;
    kernels.weights_scratch = weights_scratch;
    kernels.weights = weights;
    kernels.projection = {
        pack_outputs, pack_inputs, rows_scratch, project, project_back, projection_weights_scratch, projection_weights};
}

}  // namespace MMFAST_ISA
}  // namespace fusion
}  // namespace mmfast
