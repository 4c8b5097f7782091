// The forward pass on the matrix unit of any number of keys, of one softmax. For fusion_matrix.cpp.
//
// Note: [Long keys on the matrix unit]
//   Keys come block by block, arranged once for all panels of an item; outputs so far stay in the second cache. What is
//   done at a time is a unit, half a panel and a block: see [Units of the forward pass].
//   Exponentials are less a maximum that is replaced only where it is exceeded by kSlack: P and its sums are as exact as less
//   the true one, and the outputs so far are hardly ever to be scaled.
#pragma once

#include "fusion/fusion_matrix_panel.h"
#include "fusion/fusion_softmax.h"

namespace mmfast {
namespace fusion {
namespace MMFAST_ISA {
namespace {

constexpr int64_t kLongBlock = 96;  // keys
constexpr float kSlack = 8;         // in units of ln 2
constexpr int64_t kLongStride = row_stride(kLongBlock);
static_assert(kLongBlock % kTwoTiles == 0);

// Of the rows of a panel.
struct LongPanel {
    Rows rows;
    Left queries;
    float* out;  // [row][feature], not yet divided by the sums
    alignas(64) float maximum[kRows];
    alignas(64) float sum[kRows];
    alignas(64) float factor[kRows];  // by which the outputs so far are to be multiplied
};

// A block of keys, arranged.
struct LongBlock {
    Places places;
    int64_t from, to;         // as for_tiles() counts
    uint32_t *keys, *values;  // [pair of features][key], [pair of keys][feature]
};

struct LongBuffers {
    LongPanel* panels;
    LongBlock block;
    uint16_t *rows, *queries;
    float *scores, *out;
    int64_t query_stride, value_stride;
};

int64_t lay_out(const Problem& p, int64_t panels, float* scratch, LongBuffers& b) {
    const int64_t dim = padded(p.dim), value_dim = padded(p.value_dim);
    Pieces pieces(scratch);
    b.query_stride = half_stride(dim);
    b.value_stride = row_stride(to_tiles(p.value_dim));
    pieces.take(b.panels, panels);
    pieces.take(b.block.keys, dim / 2 * kLongStride);
    pieces.take(b.block.values, kLongBlock / 2 * b.value_stride);
    pieces.take(b.rows, kLongBlock * half_stride(larger(dim, value_dim)));
    pieces.take(b.scores, kHalf * kLongStride);
    pieces.take(b.queries, panels * kRows * b.query_stride);
    pieces.take(b.out, panels * kRows * b.value_stride);
    return pieces.taken();
}

int64_t forward_long_scratch(const Problem& p, int64_t panels) {
    LongBuffers b;
    return lay_out(p, panels, nullptr, b);
}

void begin_panel(const ForwardJob<float>& job, const Item& item, int64_t i, const LongBuffers& b) {
    const Problem& p = *job.problem;
    LongPanel& panel = b.panels[i];
    set_rows<float>(p, job.fold, item.head, item.panel + i, panel.rows);
    panel.queries = panel_rows(p.query, item.batch, panel.rows, p.dim, to_depth(p.dim), 0, to_tiles(panel.rows.n),
                               b.queries + i * kRows * b.query_stride);
    panel.out = b.out + i * kRows * b.value_stride;
    for (int64_t k = 0; k < kRows * b.value_stride; k += kLanes) Simd<float>::store(panel.out + k, Floats{});
    for (int64_t r = 0; r < kRows; ++r) {
        panel.maximum[r] = -infinity<float>();
        panel.sum[r] = 0;
    }
}

void arrange(const Problem& p, int64_t batch, int64_t head, const LongBuffers& b, LongBlock& block) {
    const Places& places = block.places;
    const Left keys = key_rows(p, false, batch, head, places, b.rows);
    pair_columns(keys.data, keys.stride, padded(p.dim), places.total, block.keys, kLongStride);
    const Left values = key_rows(p, true, batch, head, places, b.rows);
    pair_rows<1>(values.data, values.stride, to_tiles(p.value_dim), places.total, block.values, b.value_stride);
}

// Half a panel and a block.
struct LongUnit {
    LongPanel& panel;
    const LongBlock& block;
    float* scores;  // of its first row
    int64_t first, rows;
};

// P in place of the scores of a unit.
struct Weighing {
    const Problem& p;
    int64_t batch;
    bool is_plain;
    float factor;  // of products

    Weighing(const Problem& problem, int64_t b)
        : p(problem), batch(b), is_plain(plain(p)), factor(is_plain ? float(p.scale * kLog2e) : 1.0f) {}

    // Whether the outputs so far are to be multiplied by factors that are not all 1.
    bool weigh(MatrixUnit& unit, const LongUnit& of) const {
        bool scales = false;
        for (int64_t r = 0; r < of.rows; r += kLanes) {
            unit.stay_awake();
            scales |= weigh_rows(of, r);
        }
        return scales;
    }

private:
    // kLanes of them.
    bool weigh_rows(const LongUnit& of, int64_t r) const {
        const Places& places = of.block.places;
        const int64_t row = of.first + r;
        float* const scores = of.scores + r * kLongStride;
        if (!is_plain)
            finish_scores(p, batch, of.panel.rows, row, row + kLanes, places, of.scores - of.first * kLongStride,
                          kLongStride);
        const Floats now = largest_of_rows(scores, kLongStride, 0, places.total) * factor;
        const Floats before = Simd<float>::load(of.panel.maximum + row);
        const auto exceeds = now > before + kSlack;
        const Floats maximum = exceeds ? now : before;
        const Floats shift = maximum == -infinity<float>() ? Floats{} : maximum;
        const Floats by = exceeds ? mmfast::exp2(before - shift) : Simd<float>::splat(1.0f);
        alignas(64) float shifts[kLanes];
        Simd<float>::store(shifts, shift);
        Simd<float>::store(of.panel.maximum + row, maximum);
        Simd<float>::store(of.panel.factor + row, by);
        Floats sums[kLanes];
        for (int64_t i = 0; i < kLanes; ++i)
            sums[i] = exponentials_of_row(scores + i * kLongStride, places.total, factor, shifts[i]);
        const Floats sum = add_up(sums);
        float* const to = of.panel.sum + row;
        Simd<float>::store(to, Simd<float>::load(to) * by + sum);
        return !Simd<float>::all_zero(by - 1.0f);
    }
};

void scale_out(const Problem& p, int64_t stride, const LongUnit& of) {
    for (int64_t r = of.first; r < of.first + of.rows; ++r) {
        const float factor = of.panel.factor[r];
        if (factor == 1) continue;
        for (int64_t k = 0; k < p.value_dim; k += kLanes) {
            float* const at = of.panel.out + r * stride + k;
            Simd<float>::store(at, Simd<float>::load(at) * factor);
        }
    }
}

void conclude(const ForwardJob<float>& job, const Item& item, const LongPanel& panel, int64_t stride, int64_t slot) {
    const Problem& p = *job.problem;
    const Rows& rows = panel.rows;
    alignas(64) float factor[kRows];
    Running<float, kPanelWidth> running;
    for (int v = 0; v < kPanelWidth; ++v) {
        running.maximum[v] = Simd<float>::load(panel.maximum + v * kLanes);
        running.sum[v] = Simd<float>::load(panel.sum + v * kLanes);
    }
    if (!job.partial) {
        finish<float, kPanelWidth>(job, item, rows, 0, running, factor);
        return put_rows(panel.out, stride, p.value_dim, factor, item.batch, rows, 0, rows.n, job.out, 0, false);
    }
    int64_t offsets[kRows];
    for (int64_t r = 0; r < rows.n; ++r) offsets[r] = r * stride;
    const int64_t width = up_to_multiple(rows.n, kLanes);
    float* const to = partial_of(job, slot);
    pack_columns_of<float>(panel.out, offsets, rows.n, 1, p.value_dim, 1.0f, to);
    std::memcpy(to + p.value_dim * width, panel.maximum, size_t(width) * sizeof(float));
    std::memcpy(to + (p.value_dim + 1) * width, panel.sum, size_t(width) * sizeof(float));
}

// The panels of an item and one head.
void forward_long_head(MatrixUnit& unit, const ForwardJob<float>& job, const Item& item, LongBuffers& b, Ahead& ahead) {
    const Problem& p = *job.problem;
    int64_t last = 0;  // row
    for (int64_t i = 0; i < item.panels; ++i) {
        begin_panel(job, item, i, b);
        last = larger(last, b.panels[i].rows.last);
    }
    const int64_t total = tiled_keys(p, item.batch, true) / kTile;
    const int64_t lo = total * item.split / item.splits * kTile, hi = total * (item.split + 1) / item.splits * kTile;
    const Weighing weighing(p, item.batch);
    LongBlock& block = b.block;
    for (block.from = lo; block.from < hi; block.from = block.to) {
        block.to = smaller(block.from + kLongBlock, hi);
        if (p.causal && !seen(p, item.batch, block.from, block.to, last)) continue;
        set_places(p, item.batch, true, block.from, block.to, block.places);
        arrange(p, item.batch, item.head, b, block);
        keys_ahead(p, item.batch, item.head, true, block.to, smaller(block.to + kLongBlock, hi), ahead);
        ahead.spread(2 * item.panels * product_calls(kHalf, padded(p.dim), kLongBlock));
        for (int64_t i = 0; i < item.panels; ++i) {
            LongPanel& panel = b.panels[i];
            if (p.causal && !seen(p, item.batch, block.from, block.to, panel.rows.last)) continue;
            for (int64_t first = 0; first < panel.rows.n; first += kHalf) {
                const int64_t count = smaller(kHalf, to_tiles(panel.rows.n) - first);
                const LongUnit of{panel, block, b.scores, first, count};
                multiply_scores(unit, p, first, of.rows, rows_from(panel.queries, first), {block.keys, kLongStride},
                                block.places, b.scores - first * kLongStride, kLongStride, ahead);
                if (weighing.weigh(unit, of)) scale_out(p, b.value_stride, of);
                float* const out = panel.out + first * b.value_stride;
                multiply(unit, of.rows, to_depth(block.places.total), to_tiles(p.value_dim),
                         rounded_rows(b.scores, kLongStride), {block.values, b.value_stride},
                         {out, b.value_stride, out, b.value_stride}, Nothing());
            }
        }
    }
    for (int64_t i = 0; i < item.panels; ++i)
        conclude(job, item, b.panels[i], b.value_stride, item.slot + i * item.splits);
}

void forward_long(const ForwardJob<float>& job, const Item& item, float* scratch) {
    LongBuffers b;
    lay_out(*job.problem, item.panels, scratch, b);
    MatrixUnit unit;
    Ahead ahead;
    Item now = item;
    for (int64_t h = 0; h < item.heads; ++h) {
        now.head = item.head + h * job.fold;
        now.slot = item.slot + h * job.panels * item.splits;
        forward_long_head(unit, job, now, b, ahead);
    }
}

}  // namespace
}  // namespace MMFAST_ISA
}  // namespace fusion
}  // namespace mmfast
