// The backward pass on the matrix unit. For fusion_matrix.cpp.
//
// Note: [Pieces on the matrix unit]
//   More keys than kResidentKeys come in pieces, each with all panels of queries before the next: sums of the gradients of its
//   keys and values stay in the second cache, those of the queries are added up in float32 in memory. Delta is then taken from
//   the output, so that P and dS of a row are made in one pass over its scores. Pieces of 128 or 256 keys, which the first
//   cache would hold for half a panel, are no faster than those of 512: they read and write the gradients of queries more often.
//
// Note: [Products meanwhile]
//   A panel is two halves. What is done with the scores of one is spread over the products of the other. What is made takes the
//   place of what it is made from, so that what a half is busy with stays near.
#pragma once

#include "fusion/fusion_gradients.h"
#include "fusion/fusion_matrix_panel.h"

namespace mmfast {
namespace fusion {
namespace MMFAST_ISA {
namespace {

struct BackwardBuffers {
    uint16_t *rows, *query_rows, *grad_rows;  // rows of a head's keys or values; queries and gradients of the output
    uint16_t *query_columns, *grad_columns;   // [feature][query]
    // [query][key] of P and dP, then halves of pairs of rows, those of dS in the place of dP; [query][feature].
    float *p, *dp, *dq;
    uint32_t *ds_row_high, *ds_row_low;  // [query][pair of keys]
    float* block;                        // gradients of 16 keys
    // Of each head: [pair of features][key] of keys and values, [pair of keys][feature] of keys, [feature][key] of sums.
    uint32_t *keys, *values, *key_pairs;
    float *dk, *dv;
    int64_t keys_size, values_size, key_pairs_size, dk_size, dv_size;
    int64_t key_stride, pair_stride, dim_stride;
    MMFAST_INLINE BackwardBuffers of_panel(int64_t slot) const {
        BackwardBuffers b = *this;
        b.p += slot * kRows * key_stride;
        b.dp += slot * kRows * key_stride;
        b.query_columns += slot * kRows;
        b.grad_columns += slot * kRows;
        return b;
    }
    MMFAST_INLINE BackwardBuffers of_head(int64_t h) const {
        BackwardBuffers b = *this;
        b.keys += h * keys_size;
        b.values += h * values_size;
        b.key_pairs += h * key_pairs_size;
        b.dk += h * dk_size;
        b.dv += h * dv_size;
        return b;
    }
};

// Panels of queries over which the gradients of keys and values are summed up at a time.
constexpr int64_t kTogether = 2;
constexpr int64_t kQueryStride = half_stride(kTogether * kRows);

int64_t lay_out(const Problem& p, int64_t heads, int64_t keys, float* scratch, BackwardBuffers& b) {
    const int64_t n = padded(keys), dim = padded(p.dim), value_dim = padded(p.value_dim);
    Pieces pieces(scratch);
    b.key_stride = row_stride(n);
    b.pair_stride = row_stride(n / 2);
    b.dim_stride = row_stride(to_tiles(p.dim));
    pieces.take(b.rows, n * half_stride(larger(dim, value_dim)));
    pieces.take(b.query_rows, kRows * half_stride(dim));
    pieces.take(b.grad_rows, kRows * half_stride(value_dim));
    pieces.take(b.query_columns, dim * kQueryStride);
    pieces.take(b.grad_columns, value_dim * kQueryStride);
    for (float** to : {&b.p, &b.dp}) pieces.take(*to, kTogether * kRows * b.key_stride);
    pieces.take(b.dq, kRows * b.dim_stride);
    for (uint32_t** to : {&b.ds_row_high, &b.ds_row_low}) pieces.take(*to, kRows * b.pair_stride);
    pieces.take(b.block, kTile * larger(dim, value_dim));
    b.keys_size = dim / 2 * b.key_stride;
    b.values_size = value_dim / 2 * b.key_stride;
    b.key_pairs_size = n / 2 * b.dim_stride;
    b.dk_size = dim * b.key_stride;
    b.dv_size = value_dim * b.key_stride;
    pieces.take(b.keys, heads * b.keys_size);
    pieces.take(b.values, heads * b.values_size);
    pieces.take(b.key_pairs, heads * b.key_pairs_size);
    pieces.take(b.dk, heads * b.dk_size);
    pieces.take(b.dv, heads * b.dv_size);
    return pieces.taken();
}

int64_t backward_scratch(const Problem& p, int64_t heads, int64_t keys) {
    BackwardBuffers b;
    return lay_out(p, heads, keys, nullptr, b);
}

// Whether a gradient of any source's keys, or values, is wanted.
bool any_wanted(const Accumulator* to, int count) {
    bool result = false;
    for (int j = 0; j < count; ++j) result = result || to[j].target.data;
    return result;
}

// P and scale dS of a panel.
struct ScoreGradients {
    const Problem& p;
    const Places& places;
    const BackwardBuffers& b;
    float factor;
    bool by_query, by_key, by_value;
    Lanes<float> of[kMostSources];
    // scale dS = P (slope dP + offset)
    alignas(64) float slope[kMostSources][kRows];
    alignas(64) float offset[kMostSources][kRows];
    Floats deltas[kMostSources][kLanes], totals[kMostSources][kLanes];  // of rows under way
    bool whole;  // all keys: delta is a mean over them, as set_delta() says; else it is taken from the output

    ScoreGradients(const BackwardJob<float>& job, const Places& at, const BackwardBuffers& buffers, float by, bool all)
        : p(*job.problem), places(at), b(buffers), factor(by), by_query(job.query.target.data),
          by_key(any_wanted(job.key, p.count)), by_value(any_wanted(job.value, p.count)), whole(all) {}

    // P in place of the scores, and delta.
    void weigh(int64_t from, int64_t to) {
        const float by = factor;
        const int softmaxes = p.softmaxes();
        for (int64_t r = from; r < to; ++r) {
            float* const scores = b.p + r * b.key_stride;
            const float* const dp = b.dp + r * b.key_stride;
            for (int m = 0; m < softmaxes; ++m) {
                const int64_t end = p.decoupled ? places.first[m + 1] : places.total;
                const Floats lse = Simd<float>::splat(of[m].lse[r]);
                Floats delta{}, total{};
                for (int64_t k = p.decoupled ? places.first[m] : 0; k < end; k += kLanes) {
                    const Floats e = mmfast::exp2(Simd<float>::load(scores + k) * by - lse);
                    delta += e * Simd<float>::load(dp + k);
                    total += e;
                    Simd<float>::store(scores + k, e);
                }
                deltas[m][r % kLanes] = delta;
                totals[m][r % kLanes] = total;
            }
            if (r % kLanes == kLanes - 1)
                for (int m = 0; m < softmaxes; ++m) end_rows(r - r % kLanes, m);
        }
    }
    // Rows in pairs.
    void differentiate(int64_t from, int64_t to) {
        for (int64_t r = from; r < to; r += 2) {
            if (p.decoupled) differentiate_pair<true>(r);
            else differentiate_pair<false>(r);
        }
    }

    // Of one softmax whose delta is known: both at once.
    void finish(int64_t from, int64_t to) {
        for (int64_t r = from; r < to; r += 2) differentiate_pair<false, true>(r);
    }
    void set_delta_of_output(const BackwardJob<float>& job, int64_t batch, const Rows& rows, const Left& grads) {
        dispatch<float>(job.out.type, [&](auto* kind) MMFAST_LAMBDA {
            using From = std::remove_pointer_t<decltype(kind)>;
            for (int64_t r = 0; r < rows.n; r += kLanes) {
                Floats sum[kLanes];
                for (int64_t i = 0; i < kLanes; ++i) {
                    sum[i] = Floats{};
                    const int64_t row = smaller(r + i, rows.n - 1);
                    const auto* const grad = reinterpret_cast<const BFloat16*>(grads.data + row * grads.stride);
                    const From* const out =
                        static_cast<const From*>(job.out.data) + job.out.at(batch, rows.head[row], rows.row[row]);
                    for (int64_t k = 0; k < p.value_dim; k += kLanes)
                        sum[i] += load_as<float>(grad + k, p.value_dim - k) * load_as<float>(out + k, p.value_dim - k);
                }
                set_offset(r, 0, add_up(sum));
            }
        });
        for (int64_t r = up_to_multiple(rows.n, kLanes); r < kRows; r += kLanes) set_offset(r, 0, Floats{});
    }

private:
    // delta as set_delta() says.
    void end_rows(int64_t r, int m) {
        const Floats total = add_up(totals[m]), sum = add_up(deltas[m]);
        set_offset(r, m, total == 0 ? Floats{} : sum / total);
    }
    void set_offset(int64_t r, int m, Floats delta) {
        const Floats gate = Simd<float>::load(of[m].gate + r), grad_lse = Simd<float>::load(of[m].grad_lse + r);
        Simd<float>::store(of[m].delta + r, delta);
        Simd<float>::store(slope[m] + r, gate * float(p.scale));
        Simd<float>::store(offset[m] + r, (grad_lse - gate * delta) * float(p.scale));
    }
    template <bool kGated, bool kFused = false>
    void differentiate_pair(int64_t r) {
        const int64_t stride = b.key_stride, pair_stride = b.pair_stride;
        float *const weights = b.p + r * stride, *const dp = b.dp + r * stride;
        uint32_t *const row_high = b.ds_row_high + r * pair_stride, *const row_low = b.ds_row_low + r * pair_stride;
        const bool query = by_query, key = by_key, value = by_value;
        const float by = factor;
        for_pairs(places.total, [&]<bool kBoth>(int64_t tile, int64_t k, int64_t word) MMFAST_LAMBDA {
            // Of two rows, whose halves are put side by side; those of dS are given back.
            struct Two {
                Halves row[2];
            };
            const auto of_tile = [&](int64_t m, int64_t at) MMFAST_LAMBDA {
                const auto row = [&](const float* x, int i)
                                     MMFAST_LAMBDA { return Simd<float>::load(x + i * stride + at); };
                const auto put = [&](float* to, const auto& upper, const auto& lower) MMFAST_LAMBDA {
                    uint32_t* const words = reinterpret_cast<uint32_t*>(to + at);
                    if constexpr (kSumOnTheRight) put_pairs(words, words + stride, upper, lower);
                    else put_rounded_pair(words, upper, lower);
                };
                const auto weight = [&](int i) MMFAST_LAMBDA {
                    const Floats x = row(weights, i);
                    return kFused ? mmfast::exp2(x * by - Simd<float>::splat(of[0].lse[r + i])) : x;
                };
                const Floats e[] = {weight(0), weight(1)};
                const auto ds = [&](int i)
                                    MMFAST_LAMBDA { return e[i] * (row(dp, i) * slope[m][r + i] + offset[m][r + i]); };
                const auto gated = [&](int i) MMFAST_LAMBDA { return kGated ? e[i] * of[m].gate[r + i] : e[i]; };
                const Floats of_rows[] = {ds(0), ds(1)};
                const Two result{{split<false>(of_rows[0]), split<false>(of_rows[1])}};
                if constexpr (kSumOnTheRight) {
                    if (value) put(weights, split<!kGated>(gated(0)), split<!kGated>(gated(1)));
                    if (key) put(dp, result.row[0], result.row[1]);
                } else {
                    if (value) put(weights, gated(0), gated(1));
                    if (key) put(dp, of_rows[0], of_rows[1]);
                }
                return result;
            };
            const Two first = of_tile(kGated ? places.source[tile] : 0, k);
            const Two second = kBoth ? of_tile(kGated ? places.source[tile + 1] : 0, k + kTile) : Two{};
            if (!query) return;
            for (int i = 0; i < 2; ++i) {
                const int64_t to = i * pair_stride + word;
                put_pairs(row_high + to, row_low + to, first.row[i], second.row[i]);
            }
        });
    }
};

// The `slot`-th panel of those that are summed up together; the last one ends it.
void backward_panel(MatrixUnit& unit, const BackwardJob<float>& job, const BackwardItem& item, const Rows& rows,
                    const Places& places, const BackwardBuffers& first_panel, int64_t slot, bool ends, Ahead& ahead) {
    const Problem& p = *job.problem;
    const int64_t before = slot * kRows;
    const BackwardBuffers b = first_panel.of_panel(slot);
    const bool is_plain = plain(p);
    const int64_t lanes = padded(rows.n), half = smaller(lanes, kHalf);
    const int64_t dim = padded(p.dim), value_dim = padded(p.value_dim), total = places.total, depth = padded(total);
    const Left queries = panel_rows(p.query, item.batch, rows, p.dim, dim, 0, lanes, b.query_rows);
    const Left grads = panel_rows(job.grad_out, item.batch, rows, p.value_dim, value_dim, 0, lanes, b.grad_rows);
    ScoreGradients of(job, places, b, is_plain ? float(p.scale * kLog2e) : 1.0f, item.whole);
    for (int m = 0; m < p.softmaxes(); ++m) set_lanes<float, kPanelWidth>(job, item.batch, rows, m, of.of[m]);
    if (!item.whole) of.set_delta_of_output(job, item.batch, rows, grads);
    const auto scores = [&](int64_t from, auto&& between) {
        multiply_scores(unit, p, from, half, rows_from(queries, from), {b.keys, b.key_stride}, places, b.p,
                        b.key_stride, between);
        multiply(unit, half, to_depth(p.value_dim), total, rows_from(grads, from), {b.values, b.key_stride},
                 {b.dp + from * b.key_stride, b.key_stride, nullptr, 0}, between);
        if (!is_plain) finish_scores(p, item.batch, rows, from, from + half, places, b.p, b.key_stride);
    };
    const auto by_query = [&](int64_t from, auto&& between) {
        const int64_t at = from * b.pair_stride;
        multiply(unit, half, depth, to_tiles(p.dim),
                 {reinterpret_cast<const uint16_t*>(b.ds_row_high + at), 2 * b.pair_stride,
                  reinterpret_cast<const uint16_t*>(b.ds_row_low + at)},
                 {b.key_pairs, b.dim_stride}, {b.dq + from * b.dim_stride, b.dim_stride, nullptr, 0}, between);
    };
    // Sums over the queries of all panels so far.
    const auto add = [&](int64_t width, const uint16_t* columns, const float* pairs, float* sums, auto&& between) {
        const auto* const words = reinterpret_cast<const uint32_t*>(pairs);
        multiply(unit, to_rows(width), before + lanes, total, {columns, kQueryStride},
                 {words, 2 * b.key_stride, kSumOnTheRight ? words + b.key_stride : nullptr},
                 {sums, b.key_stride, sums, b.key_stride}, between);
    };
    const auto calls_of = [&](int64_t width) {
        return ends ? product_calls(to_rows(width), before + lanes, total) : 1;
    };
    const auto weigh = [&](int64_t from, int64_t to) {
        if (item.whole) of.weigh(2 * from, 2 * to);
        else of.finish(2 * from, 2 * to);
    };
    const int64_t calls = product_calls(half, dim, total) + product_calls(half, value_dim, total);
    ahead.spread(larger(calls, 1));
    scores(0, ahead);
    Spread first(half / 2, half < lanes ? calls : 1, weigh);
    if (half < lanes) scores(half, first);
    first.rest();
    if (item.whole) of.differentiate(0, half);
    const auto finish_second = [&](int64_t from, int64_t to) {
        // The sums of a group of rows are complete when its last row is.
        for (int64_t i = from; i < to; ++i) {
            if (!item.whole) {
                of.finish(half + 2 * i, half + 2 * i + 2);
                continue;
            }
            const int64_t group = half + i * kLanes;
            of.weigh(group, group + kLanes);
            of.differentiate(group, group + kLanes);
        }
    };
    const int64_t query_calls = product_calls(half, depth, to_tiles(p.dim));
    Spread second((lanes - half) / (item.whole ? kLanes : 2), query_calls, finish_second);
    if (of.by_query) by_query(0, second);
    second.rest();
    // What the sums need, and what is left to write, beside products that need neither.
    const auto query_columns = [&](int64_t from, int64_t to) {
        transpose_rows(queries.data, queries.stride, dim, from, to, b.query_columns, kQueryStride);
    };
    const auto grad_columns = [&](int64_t from, int64_t to) {
        transpose_rows(grads.data, grads.stride, value_dim, from, to, b.grad_columns, kQueryStride);
    };
    const auto put = [&](int64_t from, int64_t to) {
        put_rows(b.dq, b.dim_stride, p.dim, nullptr, item.batch, rows, from, to, job.query.target,
                 item.query_run * job.query.run, job.query.add);
    };
    Spread queries_turned(of.by_key ? transposed_blocks(dim, lanes) : 0, query_calls, query_columns);
    Spread grads_turned(of.by_value ? transposed_blocks(value_dim, lanes) : 0, of.by_key ? calls_of(p.dim) : 1,
                        grad_columns);
    Spread finished(of.by_query ? rows.n : 0, of.by_value ? calls_of(p.value_dim) : 1, put);
    if (of.by_query && half < lanes) by_query(half, queries_turned);
    queries_turned.rest();
    if (of.by_key && ends) add(p.dim, first_panel.query_columns, first_panel.dp, b.dk, grads_turned);
    grads_turned.rest();
    if (of.by_value && ends) add(p.value_dim, first_panel.grad_columns, first_panel.p, b.dv, finished);
    finished.rest();
    for (int m = 0; job.grad_gates && m < p.softmaxes(); ++m)
        scatter(p, of.of[m].delta, item.batch, rows, job.grad_gates + m * p.batch * p.heads * p.rows);
}

void begin_head(const Problem& p, const BackwardItem& item, const Places& places, const BackwardBuffers& b) {
    const int64_t dim = padded(p.dim), value_dim = padded(p.value_dim), total = places.total;
    const Left values = key_rows(p, true, item.batch, item.head, places, b.rows);
    pair_columns(values.data, values.stride, value_dim, total, b.values, b.key_stride);
    const Left keys = key_rows(p, false, item.batch, item.head, places, b.rows);
    pair_columns(keys.data, keys.stride, dim, total, b.keys, b.key_stride);
    pair_rows<kTile>(keys.data, keys.stride, to_tiles(p.dim), total, b.key_pairs, b.dim_stride);
    clear(b.dk, b.dk_size);
    clear(b.dv, b.dv_size);
}

void end_head(const BackwardJob<float>& job, const BackwardItem& item, const Places& places, const BackwardBuffers& b) {
    const Problem& p = *job.problem;
    const auto end = [&](int j, const Accumulator& to, int64_t run, int64_t width, const float* sums) {
        if (!to.target.data) return;
        const int64_t there = places.count[j], head = key_head(p, j, item.head), stride = to_tiles(width);
        for (int64_t k = 0; k < there; k += kTile) {
            for (int64_t l = 0; l < kTile; l += kLanes)
                for (int64_t e = 0; e < stride; e += kLanes) {
                    Floats x[kLanes];
                    for (int64_t i = 0; i < kLanes; ++i)
                        x[i] = Simd<float>::load(sums + (e + i) * b.key_stride + places.first[j] + k + l);
                    Simd<float>::transpose(x);
                    for (int64_t i = 0; i < kLanes; ++i) Simd<float>::store(b.block + (l + i) * stride + e, x[i]);
                }
            flush<float>(to, run, item.batch, head, places.key[j] + k, smaller(kTile, there - k), width, b.block,
                         stride);
        }
        clear(b.block, stride);
        flush<float>(to, run, item.batch, head, places.key[j] + there, places.all[j] - there, width, b.block, 0);
    };
    for (int j = 0; j < p.count; ++j) {
        end(j, job.key[j], item.key_run[j], p.dim, b.dk);
        end(j, job.value[j], item.value_run[j], p.value_dim, b.dv);
    }
}

// As backward() of fusion_backward.cpp.
void backward(const BackwardJob<float>& job, const BackwardItem& item, float* scratch) {
    const Problem& p = *job.problem;
    const bool together = item.panels > 1, far = !together && keys_are_far(p);
    BackwardBuffers all;
    lay_out(p, together ? item.heads : 1, item.last - item.first, scratch, all);
    Places places;
    set_places(p, item.batch, false, item.first, item.last, places);
    MatrixUnit unit;
    Ahead ahead;
    Rows rows{};
    BackwardItem now = item;
    const auto head = [&](int64_t h) {
        now.head = item.head + h * job.fold;
        return all.of_head(together ? h : 0);
    };
    const auto set = [&](int64_t i, int64_t h) {
        head(h);
        set_rows<float>(p, job.fold, now.head, item.panel + i, rows);
    };
    // Nothing to add: no key, or none that these queries see.
    const auto is_empty = [&](int64_t i, int64_t h) {
        set(i, h);
        bool nothing = true;
        for (int j = 0; j < p.count; ++j)
            nothing = nothing && (!places.count[j] || (p.causal && places.key[j] > rows.last));
        return nothing && (job.query.add || !job.query.target.data) && !job.grad_gates;
    };
    // Panels first .. end - 1 of a head, which are summed up together, and what comes then.
    const auto panels = [&](int64_t first, int64_t end, int64_t h, int64_t next, int64_t next_head) {
        while (first < end && is_empty(first, h)) ++first;
        for (int64_t i = first; i < end; ++i) {
            const bool ends = i + 1 == end;
            if (!ends || next < item.panels) {
                set(ends ? next : i + 1, ends ? next_head : h);
                rows_ahead(job, now, rows, item.whole, ahead);
            }
            const BackwardBuffers b = head(h);
            set(i, h);
            backward_panel(unit, job, now, rows, places, b, i - first, ends, ahead);
        }
    };
    if (together) {
        for (int64_t h = 0; h < item.heads; ++h) {
            const BackwardBuffers b = head(h);
            begin_head(p, now, places, b);
        }
        for (int64_t i = 0; i < item.panels; i += kTogether)
            for (int64_t h = 0; h < item.heads; ++h) {
                const bool last = h + 1 == item.heads;
                panels(i, smaller(i + kTogether, item.panels), h, last ? i + kTogether : i, last ? 0 : h + 1);
            }
        for (int64_t h = 0; h < item.heads; ++h) {
            const BackwardBuffers b = head(h);
            end_head(job, now, places, b);
        }
        return;
    }
    for (int64_t h = 0; h < item.heads; ++h) {
        const BackwardBuffers b = head(h);
        begin_head(p, now, places, b);
        if (far && h + 1 < item.heads)
            keys_ahead(p, item.batch, now.head + job.fold, false, item.first, item.last, ahead);
        panels(0, item.panels, h, item.panels, 0);
        head(h);
        end_head(job, now, places, b);
    }
}

}  // namespace
}  // namespace MMFAST_ISA
}  // namespace fusion
}  // namespace mmfast
