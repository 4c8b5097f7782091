// Attention weights of bfloat16 on the matrix unit, as fusion_weights.cpp gives them. For the instruction set amx only.
//
// Note: [Weights on the matrix unit]
//   Rows of the left factor are keys where they lie, the right one has pairs of features of a panel of queries, arranged once a
//   head: products come out with queries in the lanes, as elsewhere, and keys are neither copied nor transposed. What is
//   left are the exponentials: of 4 x 8 heads of 64 features, 448 x 1500, they take 5 ms at 8 cycles a vector and the
//   products 3 ms, where the kernel of avx512 takes 23.
#include "common/amx.h"
#include "fusion/fusion_panel.h"

namespace mmfast {
namespace fusion {
namespace MMFAST_ISA {
namespace {

using Floats = Vec<float>;

constexpr int kWidth = kPanelWidth;  // vectors of a panel
constexpr int64_t kLanes = Simd<float>::lanes, kRows = kPanel<float>;
constexpr int64_t kTile = kTileRows, kStep = 32;  // features that are multiplied at once
constexpr int64_t kBlockKeys = 64;                // scores and sums, 32 KiB, stay in the first cache

struct Buffers {
    float *tile, *sum, *mask;  // [key][lane]
    uint16_t *rows, *keys;     // copies
    float* queries;            // of each head: [pair of features][lane]
    int64_t width;             // features with zeros behind them
};

int64_t lay_out(const Problem& p, float* scratch, Buffers& b) {
    b.width = up_to_multiple(p.dim, kStep);
    int64_t at = 0;
    const auto take = [&](auto*& to, int64_t bytes) MMFAST_LAMBDA {
        to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(scratch + at);
        at += up_to_multiple(bytes, 64) / 4;
    };
    for (float** tile : {&b.tile, &b.sum, &b.mask}) take(*tile, kBlockKeys * kRows * 4);
    take(b.rows, kRows * b.width * 2);
    take(b.keys, kBlockKeys * b.width * 2);
    take(b.queries, p.heads * kRows * b.width * 2);
    return at;
}

int64_t scratch_size(const Problem& p) {
    Buffers b;
    return lay_out(p, nullptr, b);
}

// `count` rows of x, and zeros behind them up to `rows`.
void copy_rows(const View& x, int64_t at, int64_t count, int64_t dim, int64_t rows, int64_t width, uint16_t* to) {
    const uint16_t* from = static_cast<const uint16_t*>(x.data) + at;
    for (int64_t k = 0; k < rows; ++k, from += x.row, to += width) {
        const int64_t here = k < count ? dim : 0;
        if (here) __builtin_memcpy(to, from, size_t(here) * 2);
        __builtin_memset(to + here, 0, size_t(width - here) * 2);
    }
}

// Words of a panel's rows by columns.
void pair_features(const uint16_t* from, int64_t width, float* to) {
    for (int64_t l = 0; l < kRows; l += kLanes) {
        const float* rows[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) rows[i] = reinterpret_cast<const float*>(from + (l + i) * width);
        for (int64_t k = 0; k < width / 2; k += kLanes) {
            Floats columns[kLanes];
            Simd<float>::load_transposed(rows, k, columns);
            for (int64_t i = 0; i < kLanes; ++i) Simd<float>::store(to + (k + i) * kRows + l, columns[i]);
        }
    }
}

// tile[key][lane] of one or two tiles of keys.
template <int R>
void multiply(MatrixUnit& unit, const uint16_t* keys, int64_t stride, int64_t width, const float* queries,
              float* tile) {
    static_assert(kRows % (2 * kTile) == 0);
    for (int64_t l = 0; l < kRows; l += 2 * kTile) {
        unit.zero();
        for (int64_t k = 0; k < width; k += kStep) {
            const float* const pairs = queries + k / 2 * kRows + l;
            unit.load<4>(keys + k, stride * 2);
            if constexpr (R == 2) unit.load<5>(keys + kTile * stride + k, stride * 2);
            unit.load<6>(pairs, kRows * 4);
            unit.load<7>(pairs + kTile, kRows * 4);
            unit.multiply_add<R, 2>();
        }
        float *const to = tile + l, *const down = to + kTile * kRows;
        unit.store<0>(to, kRows * 4);
        unit.store<1>(to + kTile, kRows * 4);
        if constexpr (R == 2) {
            unit.store<2>(down, kRows * 4);
            unit.store<3>(down + kTile, kRows * 4);
        }
    }
}

// sum[key][lane] = or += factor 2^(by x - shift)
template <bool kAdd>
void add_weights(int64_t count, const float* tile, float by, const float* shifts, float factor, float* sum) {
    Floats shift[kWidth];
    for (int v = 0; v < kWidth; ++v) shift[v] = Simd<float>::load(shifts + v * kLanes);
    for (int64_t k = 0; k < count; ++k)
#pragma GCC unroll 4
        for (int v = 0; v < kWidth; ++v) {
            const int64_t at = k * kRows + v * kLanes;
            const Floats e = factor * mmfast::exp2(by * Simd<float>::load(tile + at) - shift[v]);
            Simd<float>::store(sum + at, kAdd ? Simd<float>::load(sum + at) + e : e);
        }
}

void weights(const WeightsJob<float>& job, const WeightsItem& item, float* scratch) {
    const Problem& p = *job.problem;
    Buffers b;
    lay_out(p, scratch, b);
    Keys keys;
    set_keys(p, item.batch, false, keys);
    const float scale = float(p.scale * kLog2e), factor = 1.0f / float(item.heads);
    const bool plain = plain_scores<float>(p);
    Rows rows;
    for (int64_t h = 0; h < item.heads; ++h) {
        set_rows<float>(p, 1, item.head + h, item.panel, rows);
        copy_rows(p.query, p.query.at(item.batch, item.head + h, rows.row[0]), rows.n, p.dim, kRows, b.width, b.rows);
        pair_features(b.rows, b.width, b.queries + h * kRows * b.width / 2);
    }
    MatrixUnit unit;
    const auto add = [&](const Segment& s, int64_t h) MMFAST_LAMBDA {
        const int64_t head = item.head + h, tiles = up_to_multiple(s.count, kTile);
        const View& key = p.sources[s.source].key;
        const int64_t first = key.at(item.batch, key_head(p, s.source, head), s.first);
        const uint16_t* from = static_cast<const uint16_t*>(key.data) + first;
        int64_t stride = key.row;
        if (p.dim != b.width || s.count != tiles) {
            copy_rows(key, first, s.count, p.dim, tiles, b.width, b.keys);
            from = b.keys;
            stride = b.width;
        }
        const float* const queries = b.queries + h * kRows * b.width / 2;
        unit.fence();
        for (int64_t k = 0; k < tiles; k += 2 * kTile)
            (tiles - k > kTile ? multiply<2> : multiply<1>)(unit, from + k * stride, stride, b.width, queries,
                                                            b.tile + k * kRows);
        unit.fence();
        set_rows<float>(p, 1, head, item.panel, rows);
        alignas(64) float shift[kRows];
        gather(p, job.lse, item.batch, rows, 0.0f, shift);
        for (float& x : shift) x = shift_of(x);
        if (!plain) {
            for (int64_t i = 0; i < s.count * kRows; i += kLanes)
                Simd<float>::store(b.tile + i, scale * Simd<float>::load(b.tile + i));
            mask_scores<float, kWidth>(p, item.batch, rows, s, b.tile, b.mask);
        }
        (h ? add_weights<true> : add_weights<false>)(s.count, b.tile, plain ? scale : 1.0f, shift, factor, b.sum);
    };
    for (int j = 0; j < p.count; ++j) {
        const int64_t end = keys.start[j + 1];
        for (int64_t lo = keys.start[j]; lo < end; lo += kBlockKeys)
            for_segments(p, keys, rows.last, lo, smaller(lo + kBlockKeys, end), [&](const Segment& s) MMFAST_LAMBDA {
                for (int64_t h = 0; h < item.heads; ++h) add(s, h);
                if (item.heads > 1)
                    for (int64_t i = 0; i < rows.n; ++i) rows.head[i] = 0;
                unpack_columns<float>(b.sum, s.count, static_cast<const float*>(nullptr), item.batch, rows,
                                      job.weights[j], s.first, false, kRows);
            });
    }
}

}  // namespace

void matrix_weights_float(MatrixWeights& kernels) {
    kernels.panel = kRows;
    kernels.scratch = scratch_size;
    kernels.weights = weights;
}

}  // namespace MMFAST_ISA
}  // namespace fusion
}  // namespace mmfast
