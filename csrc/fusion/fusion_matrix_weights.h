// Attention weights on the matrix unit, of each head or their mean. For fusion_matrix.cpp.
#pragma once

#include "fusion/fusion_matrix_long.h"

namespace mmfast {
namespace fusion {
namespace MMFAST_ISA {
namespace {

struct WeightsBuffers {
    uint16_t *rows, *queries;
    float *scores[2], *sums;  // [query of half a panel][key]
    uint32_t* keys;           // of each head, as LongBlock::keys
    int64_t keys_size;
};

int64_t lay_out(const Problem& p, int64_t heads, float* scratch, WeightsBuffers& b) {
    const int64_t dim = padded(p.dim);
    Pieces pieces(scratch);
    b.keys_size = dim / 2 * kLongStride;
    pieces.take(b.rows, kLongBlock * half_stride(dim));
    pieces.take(b.queries, kRows * half_stride(dim));
    for (float*& scores : b.scores) pieces.take(scores, kHalf * kLongStride);
    pieces.take(b.sums, kHalf * kLongStride);
    pieces.take(b.keys, heads * b.keys_size);
    return pieces.taken();
}

int64_t weights_scratch(const Problem& p, int64_t heads) {
    WeightsBuffers b;
    return lay_out(p, heads, nullptr, b);
}

// sums[row][key] = or += exp(score - lse) of rows from .. to - 1.
void add_weights(const float* scores, const float* shift, float by, bool first, int64_t total, int64_t from, int64_t to,
                 float* sums) {
    for (int64_t r = from; r < to; ++r) {
        const Floats less = Simd<float>::splat(shift[r]);
        for (int64_t k = r * kLongStride, end = k + total; k < end; k += kLanes) {
            const Floats e = mmfast::exp2(Simd<float>::load(scores + k) * by - less);
            Simd<float>::store(sums + k, first ? e : e + Simd<float>::load(sums + k));
        }
    }
}

// Half a panel, the `from`-th row of it on, and a block: all heads of the item, one after the other.
void weights_unit(MatrixUnit& unit, const WeightsJob<float>& job, const WeightsItem& item, int64_t panel, int64_t from,
                  const Places& places, const WeightsBuffers& b, Ahead& ahead) {
    const Problem& p = *job.problem;
    const bool is_plain = plain(p);
    const float by = is_plain ? float(p.scale * kLog2e) : 1.0f;
    Rows rows;
    alignas(64) float shift[2][kRows];
    int64_t count = 0;
    const auto scores = [&](int64_t h, auto&& between) {
        set_rows<float>(p, 1, item.head + h, panel, rows);
        count = smaller(kHalf, to_tiles(rows.n) - from);
        float* const lse = shift[h % 2];
        gather(p, job.lse, item.batch, rows, -infinity<float>(), lse);
        for (int64_t r = from; r < from + count; ++r) lse[r] = shift_of(lse[r]);
        const Left queries =
            panel_rows(p.query, item.batch, rows, p.dim, to_depth(p.dim), from, from + count, b.queries);
        float* const to = b.scores[h % 2] - from * kLongStride;
        multiply_scores(unit, p, from, count, queries, {b.keys + h * b.keys_size, kLongStride}, places, to, kLongStride,
                        between);
        if (!is_plain) finish_scores(p, item.batch, rows, from, from + count, places, to, kLongStride);
    };
    scores(0, ahead);
    for (int64_t h = 0; h < item.heads; ++h) {
        const auto add = [&](int64_t first, int64_t last) {
            add_weights(b.scores[h % 2], shift[h % 2] + from, by, h == 0, places.total, first, last, b.sums);
        };
        Spread adding(count, product_calls(count, padded(p.dim), places.total), add);
        if (h + 1 < item.heads)
            scores(h + 1, [&] {
                adding();
                ahead();
            });
        adding.rest();
    }
    alignas(64) float factor[kRows];
    for (int64_t r = 0; r < kRows; ++r) {
        factor[r] = 1.0f / float(item.heads);
        if (item.heads > 1) rows.head[r] = 0;
    }
    for (int j = 0; j < p.count; ++j)
        put_rows(b.sums + places.first[j] - from * kLongStride, kLongStride, places.count[j], factor, item.batch, rows,
                 from, from + count, job.weights[j], places.key[j], false);
}

void weights(const WeightsJob<float>& job, const WeightsItem& item, float* scratch) {
    const Problem& p = *job.problem;
    WeightsBuffers b;
    lay_out(p, item.heads, scratch, b);
    MatrixUnit unit;
    Ahead ahead;
    Places places;
    const int64_t total = tiled_keys(p, item.batch, true);
    const int64_t last = smaller(p.rows, (item.panel + item.panels) * kRows);
    for (int64_t block = 0; block < total; block += kLongBlock) {
        const int64_t end = smaller(block + kLongBlock, total), next = smaller(end + kLongBlock, total);
        if (p.causal && !seen(p, item.batch, block, end, last - 1)) continue;
        set_places(p, item.batch, true, block, end, places);
        for (int64_t h = 0; h < item.heads; ++h) {
            const Left keys = key_rows(p, false, item.batch, item.head + h, places, b.rows);
            pair_columns(keys.data, keys.stride, padded(p.dim), places.total, b.keys + h * b.keys_size, kLongStride);
            for_tiles(p, item.batch, true, end, next, [&](int j, int64_t first, int64_t count) {
                ahead.add(p.sources[j].key, item.batch, key_head(p, j, item.head + h), first, count, p.dim);
            });
        }
        ahead.spread(2 * item.panels * item.heads * product_calls(kHalf, padded(p.dim), kLongBlock));
        for (int64_t i = item.panel; i < item.panel + item.panels; ++i)
            for (int64_t from = 0; from < smaller(kRows, p.rows - i * kRows); from += kHalf)
                weights_unit(unit, job, item, i, from, places, b, ahead);
    }
}

}  // namespace
}  // namespace MMFAST_ISA
}  // namespace fusion
}  // namespace mmfast
