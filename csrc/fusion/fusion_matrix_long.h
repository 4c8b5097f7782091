// The forward pass on the matrix unit of any number of keys, of one softmax. For fusion_matrix.cpp.
//
// Note: [Long keys on the matrix unit]
//   Keys come block by block, arranged once for all panels of an item; outputs so far stay in the second cache. What is
//   done at a time is a unit: half a panel and a block, whose scores and the next unit's are all that the first cache has to
//   hold beside the block. While the exponentials of a unit are taken the matrix unit multiplies P of the one before by its
//   values, and then the queries of the one behind by its keys, into the place that P has left: whatever one leaves for the
//   other has long reached the cache. In time it gains nothing on the first processors with the unit, which issue one vector
//   instruction a cycle, not two, while they multiply tiles; it costs nothing either.
//   Exponentials are less a maximum that is replaced only where it is exceeded by kSlack: P and its sums are as exact as less
//   the true one, and the outputs so far are hardly ever to be scaled.
#pragma once

#include "fusion/fusion_matrix_panel.h"
#include "fusion/fusion_softmax.h"

namespace mmfast {
namespace fusion {
namespace MMFAST_ISA {
namespace {

constexpr int64_t kLongBlock = 128;  // keys
constexpr float kSlack = 8;          // in units of ln 2
constexpr int64_t kLongStride = row_stride(kLongBlock);
static_assert(kLongBlock % kTwoTiles == 0);

// Of the rows of a panel.
struct LongPanel {
    Rows rows;
    Left queries;
    float* out;  // [row][feature], not yet divided by the sums
    alignas(64) float maximum[kRows];
    alignas(64) float sum[kRows];
    alignas(64) float factor[kRows];  // by which the outputs so far are yet to be multiplied
    bool stale[2];                    // of half a panel: one of its factors is not 1
};

// A block of keys, arranged.
struct LongBlock {
    Places places;
    int64_t from, to;         // as for_tiles() counts
    uint32_t *keys, *values;  // [pair of features][key], [pair of keys][feature]
};

struct LongBuffers {
    LongPanel* panels;
    LongBlock blocks[3];  // of the unit before, of this one and of the next
    uint16_t *rows, *queries;
    float *scores[2], *out;
    int64_t query_stride, value_stride;
};

int64_t lay_out(const Problem& p, int64_t panels, float* scratch, LongBuffers& b) {
    const int64_t dim = padded(p.dim), value_dim = padded(p.value_dim);
    Pieces pieces(scratch);
    b.query_stride = half_stride(dim);
    b.value_stride = row_stride(to_tiles(p.value_dim));
    pieces.take(b.panels, panels);
    for (LongBlock& block : b.blocks) {
        pieces.take(block.keys, dim / 2 * kLongStride);
        pieces.take(block.values, kLongBlock / 2 * b.value_stride);
    }
    pieces.take(b.rows, kLongBlock * half_stride(larger(dim, value_dim)));
    for (float*& scores : b.scores) pieces.take(scores, kHalf * kLongStride);
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
    panel.queries = panel_rows(p.query, item.batch, panel.rows, p.dim, to_tiles(panel.rows.n),
                               b.queries + i * kRows * b.query_stride);
    panel.out = b.out + i * kRows * b.value_stride;
    for (int64_t k = 0; k < kRows * b.value_stride; k += kLanes) Simd<float>::store(panel.out + k, Floats{});
    for (int64_t r = 0; r < kRows; ++r) {
        panel.maximum[r] = -infinity<float>();
        panel.sum[r] = 0;
    }
    panel.stale[0] = panel.stale[1] = false;
}

void arrange(const Problem& p, int64_t batch, int64_t head, const LongBuffers& b, LongBlock& block) {
    const Places& places = block.places;
    const Left keys = key_rows(p, false, batch, head, places, b.rows);
    pair_columns(keys.high, keys.stride, padded(p.dim), places.total, block.keys, kLongStride);
    const Left values = key_rows(p, true, batch, head, places, b.rows);
    pair_rows(values.high, values.stride, to_tiles(p.value_dim), places.total, block.values, b.value_stride);
}

void block_ahead(const Problem& p, int64_t batch, int64_t head, int64_t from, int64_t to, Ahead& ahead) {
    for_tiles(p, batch, true, from, to, [&](int j, int64_t first, int64_t count) {
        const View &key = p.sources[j].key, &value = p.sources[j].value;
        ahead.add(key, batch, key_head(p, j, head), first, count, p.dim);
        ahead.add(value, batch, key_head(p, j, head), first, count, p.value_dim);
    });
}

// Half a panel and a block.
struct LongUnit {
    LongPanel* panel = nullptr;
    LongBlock* block = nullptr;
    float* scores = nullptr;  // of its first row
    int half = 0;
    int64_t rows = 0;

    int64_t first() const { return half * kHalf; }
};

// P in halves in place of the scores of a unit, row by row.
struct Weighing {
    const Problem& p;
    int64_t batch;
    bool is_plain;
    float factor;  // of products
    LongUnit of{};

    Weighing(const Problem& problem, int64_t b)
        : p(problem), batch(b), is_plain(plain(p)), factor(is_plain ? float(p.scale * kLog2e) : 1.0f) {}

    void weigh(int64_t from, int64_t to) {
        const int64_t total = of.block->places.total;
        const float by = factor;
        for (int64_t r = from; r < to; ++r) {
            if (r % kLanes == 0) begin_rows(r);
            float* const scores = of.scores + r * kLongStride;
            const Floats shift = Simd<float>::splat(shifts[r % kLanes]);
            Floats sum{};
            const auto half = [&](int64_t k) MMFAST_LAMBDA {
                const Floats e = mmfast::exp2(Simd<float>::load(scores + k) * by - shift);
                sum += e;
                return split<true>(e);
            };
            for_pairs(total, [&]<bool kBoth>(int64_t, int64_t k, int64_t) MMFAST_LAMBDA {
                const Halves first = half(k), second = kBoth ? half(k + kTile) : Halves{};
                uint32_t* const words = reinterpret_cast<uint32_t*>(scores + k);
                put_pairs(words, words + kTile, first, second);
            });
            sums[r % kLanes] = sum;
            if (r % kLanes == kLanes - 1) end_rows(r - r % kLanes);
        }
    }

private:
    Floats sums[kLanes];  // of rows under way
    alignas(64) float shifts[kLanes];

    // Maxima of kLanes rows from r on.
    void begin_rows(int64_t r) {
        const Places& places = of.block->places;
        const int64_t row = of.first() + r;
        if (!is_plain)
            finish_scores(p, batch, of.panel->rows, row, row + kLanes, places, of.scores - of.first() * kLongStride,
                          kLongStride);
        const auto max = [](Floats a, Floats b) MMFAST_LAMBDA { return Simd<float>::max(a, b); };
        Floats largest[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) largest[i] = Simd<float>::splat(-infinity<float>());
        for (int64_t k = 0; k < places.total; k += kLanes)
#pragma GCC unroll 16
            for (int64_t i = 0; i < kLanes; ++i)
                largest[i] = max(Simd<float>::load(of.scores + (r + i) * kLongStride + k), largest[i]);
        const Floats now = fold(largest, max) * factor, before = Simd<float>::load(of.panel->maximum + row);
        const auto exceeds = now > before + kSlack;
        const Floats maximum = exceeds ? now : before;
        const Floats shift = maximum == -infinity<float>() ? Floats{} : maximum;
        const Floats by = exceeds ? mmfast::exp2(before - shift) : Simd<float>::splat(1.0f);
        Simd<float>::store(shifts, shift);
        Simd<float>::store(of.panel->maximum + row, maximum);
        Simd<float>::store(of.panel->factor + row, by);
        if (!Simd<float>::all_zero(by - 1.0f)) of.panel->stale[of.half] = true;
    }
    void end_rows(int64_t r) {
        const Floats sum = fold(sums, [](Floats a, Floats b) MMFAST_LAMBDA { return a + b; });
        float* const to = of.panel->sum + of.first() + r;
        Simd<float>::store(to, Simd<float>::load(to) * Simd<float>::load(of.panel->factor + of.first() + r) + sum);
    }
};

void scale_out(const Problem& p, int64_t stride, const LongUnit& of) {
    bool& stale = of.panel->stale[of.half];
    if (!stale) return;
    stale = false;
    for (int64_t r = of.first(); r < of.first() + of.rows; ++r) {
        const float factor = of.panel->factor[r];
        if (factor == 1) continue;
        for (int64_t k = 0; k < p.value_dim; k += kLanes) {
            float* const at = of.panel->out + r * stride + k;
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
    Weighing weighing(p, item.batch);
    const auto weigh = [&](int64_t from, int64_t to) { weighing.weigh(from, to); };
    // Where the next unit is. A block is arranged only for the sake of one at least: see LongBuffers::blocks.
    int64_t block = lo, panel = 0, count = 0;
    int half = 0;
    const auto next = [&](LongUnit& to) {
        while (block < hi) {
            if (panel == 0 && half == 0) {
                const int64_t end = smaller(block + kLongBlock, hi);
                if (p.causal && !seen(p, item.batch, block, end, last)) {
                    block = end;
                    continue;
                }
                LongBlock& now = b.blocks[count++ % 3];
                now.from = block;
                now.to = end;
                set_places(p, item.batch, true, block, end, now.places);
                arrange(p, item.batch, item.head, b, now);
                block_ahead(p, item.batch, item.head, end, smaller(end + kLongBlock, hi), ahead);
                ahead.spread(2 * item.panels * product_calls(kHalf, padded(p.dim), kLongBlock));
            }
            to.panel = b.panels + panel;
            to.block = &b.blocks[(count - 1) % 3];
            to.half = half;
            to.rows = smaller(kHalf, to_tiles(to.panel->rows.n) - to.first());
            half = to.first() + kHalf < to.panel->rows.n ? 1 - half : 0;
            if (half == 0 && ++panel == item.panels) {
                panel = 0;
                block += kLongBlock;
            }
            if (!p.causal || seen(p, item.batch, to.block->from, to.block->to, to.panel->rows.last)) return true;
        }
        return false;
    };
    const auto scores = [&](const LongUnit& of, auto&& between) {
        multiply_scores(unit, p, of.first(), of.rows, of.panel->queries, of.block->keys, of.block->places,
                        of.scores - of.first() * kLongStride, kLongStride, between);
    };
    const auto outputs = [&](const LongUnit& of, auto&& between) {
        scale_out(p, b.value_stride, of);
        const auto* const halves = reinterpret_cast<const uint16_t*>(of.scores);
        float* const out = of.panel->out + of.first() * b.value_stride;
        multiply(unit, of.rows, padded(of.block->places.total), to_tiles(p.value_dim),
                 {halves, halves + kTwoTiles, 2 * kLongStride, 2}, {of.block->values, nullptr, b.value_stride},
                 {out, b.value_stride, out, b.value_stride}, between);
    };
    const auto output_calls = [&](const LongUnit& of) {
        return of.panel ? product_calls(of.rows, padded(of.block->places.total), to_tiles(p.value_dim)) : 0;
    };
    LongUnit before, now, behind;
    behind.scores = b.scores[0];
    bool more = next(behind);
    if (more) scores(behind, ahead);
    while (more) {
        now = behind;
        behind = {};
        behind.scores = now.scores == b.scores[0] ? b.scores[1] : b.scores[0];
        more = next(behind);
        weighing.of = now;
        const int64_t calls =
            output_calls(before) + (more ? product_calls(behind.rows, padded(p.dim), behind.block->places.total) : 0);
        Spread spread(now.rows, calls, weigh);
        const auto between = [&] {
            spread();
            ahead();
        };
        if (before.panel) outputs(before, between);
        if (more) scores(behind, between);
        spread.rest();
        before = now;
    }
    if (before.panel) outputs(before, ahead);
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
