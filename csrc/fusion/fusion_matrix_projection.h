// Linear layers on the matrix unit. For fusion_matrix.cpp.
//
// Note: [Blocks of linear layers]
//   A block of 2 tiles of sums takes three loads for two products; tiles of one factor come from the first cache, since they are
//   used again for the next block, those of the other from the second. For results, and gradients of x, 512 columns of 32 rows
//   of x stay, and the weights, which are packed once in panels of 32 columns, pass by: half a megabyte of them for some such
//   rows, before the next ones are fetched, and the sums wait in between.
//   For gradients of weights rows of x and of the gradients are both to be arranged: for some hundred rows at a time, so that
//   what is arranged stays in the second cache beside the sums, which are those of one block of weights and are written once,
//   after the last rows.
//   Every sum goes over the rows in their order, whatever the blocks: results depend on no number of threads.
#pragma once

#include "fusion/fusion_matrix_panel.h"
#include "fusion/fusion_projection.h"

namespace mmfast {
namespace fusion {
namespace MMFAST_ISA {
namespace {

constexpr int64_t kPanelColumns = kTwoTiles;  // of a packed right factor: [panel][pair of rows][column]
constexpr int64_t kWeightRows = 512;          // of x and the gradients, arranged at a time
constexpr int64_t kSlice = 512, kGroup = 16;  // columns of x that stay; panels of weights that do
static_assert(kPanelColumns == kProjectionStep);

// Panels of sums, results and right factors all are so many columns wide.
MMFAST_INLINE void round_block(const float* from, int64_t rows, const Floats (&bias)[kVectors], HalfRows to) {
    for (int64_t r = 0; r < rows; ++r, from += kPanelColumns, to.data += to.stride) {
        Floats x[kVectors];
        for (int64_t i = 0; i < kVectors; ++i) x[i] = Simd<float>::load(from + i * kLanes) + bias[i];
        put_rounded(to.data, x);
    }
}

void pack_outputs(const Projection& p, int64_t panel, uint32_t* packed) {
    const uint16_t* const from = p.weight.data + panel * kPanelColumns * p.weight.stride;
    pair_columns(from, p.weight.stride, p.in, kPanelColumns, packed, kPanelColumns);
}

void pack_inputs(const Projection& p, int64_t panel, uint32_t* packed) {
    pair_rows<1>(p.weight.data + panel * kPanelColumns, p.weight.stride, kPanelColumns, p.all_out(), packed,
                 kPanelColumns);
}

// Left factors side by side: `depth` columns of each.
struct Side {
    HalfRows rows;
    int64_t depth;
};

constexpr int64_t kSums = kTwoTiles * kPanelColumns;

int64_t rows_scratch(const Projection& p) {
    return (kProjectionRows / kTwoTiles * kGroup + 1) * kSums + kTwoTiles * larger(p.in, p.all_out()) / 2;
}

// Rows first .. last - 1, at most kProjectionRows, of all panels. f(panel, bias) is where the rows of one go from row 0 on, and
// what is added to them.
template <class F>
void multiply_rows(const Side* sides, int count, int64_t rows, int64_t first, int64_t last, int64_t panels,
                   const uint32_t* packed, float* scratch, const F& f) {
    MatrixUnit unit;
    float *const result = scratch, *const kept = scratch + kSums;
    // The last rows, filled up with zeros to whole tiles, if they are not.
    const int64_t whole = last == rows ? rows / kTile * kTile : last, rest = last - last % kTwoTiles;
    Side ends[kMostParts];
    uint16_t* copy = reinterpret_cast<uint16_t*>(kept + kProjectionRows / kTwoTiles * kGroup * kSums);
    int64_t all = 0;
    for (int j = 0; j < count; ++j) {
        const int64_t depth = sides[j].depth, there = last - rest;
        all += depth;
        if (whole == last) continue;
        const HalfRows& from = sides[j].rows;
        copy_rows(from.data + rest * from.stride, from.stride, there, depth, depth, copy, depth);
        copy_rows(from.data, 0, to_tiles(there) - there, 0, depth, copy + there * depth, depth);
        ends[j].rows = {copy, depth};
        copy += kTwoTiles * depth;
    }
    for (int64_t group = 0; group < panels; group += kGroup) {
        const int64_t in_group = smaller(kGroup, panels - group);
        int64_t before = 0;
        for (int j = 0; j < count; ++j)
            for (int64_t k = 0; k < sides[j].depth; k += kSlice) {
                const int64_t depth = smaller(kSlice, sides[j].depth - k);
                const bool begins = before == 0, ends_here = before + depth == all;
                for (int64_t r = first; r < last; r += kTwoTiles) {
                    const int64_t there = smaller(kTwoTiles, last - r);
                    HalfRows left = r == rest && whole < last
                                        ? ends[j].rows
                                        : HalfRows{sides[j].rows.data + r * sides[j].rows.stride, sides[j].rows.stride};
                    left.data += k;
                    for (int64_t i = 0; i < in_group; ++i) {
                        const uint32_t* const right = packed + ((group + i) * all + before) / 2 * kPanelColumns;
                        float* const sums = kept + ((r - first) / kTwoTiles * kGroup + i) * kSums;
                        float* const to = ends_here ? result : sums;
                        Floats bias[kVectors] = {};
                        HalfRows target = f(group + i, bias);
                        target.data += r * target.stride;
                        int64_t asked = 0;
                        multiply(unit, to_tiles(there), depth, kPanelColumns, {left.data, left.stride},
                                 {right, kPanelColumns}, {to, kPanelColumns, begins ? nullptr : sums, kPanelColumns},
                                 [&]() MMFAST_LAMBDA {
                                     if (asked < there) __builtin_prefetch(target.data + asked++ * target.stride, 1);
                                 });
                        if (ends_here) round_block(result, there, bias, target);
                    }
                }
                before += depth;
            }
    }
}

void project(const Projection& p, int64_t first, int64_t last, const uint32_t* packed, float* scratch) {
    const Side side{p.x, p.in};
    multiply_rows(&side, 1, p.rows, first, last, p.all_out() / kPanelColumns, packed, scratch,
                  [&](int64_t panel, Floats* bias) {
                      int64_t column = panel * kPanelColumns;
                      for (int64_t i = 0; p.bias && i < kVectors; ++i)
                          bias[i] = number_of(load_upper(p.bias + column + i * kLanes));
                      int part = 0;
                      for (; column >= p.out[part]; ++part) column -= p.out[part];
                      return HalfRows{p.y[part].data + column, p.y[part].stride};
                  });
}

void project_back(const Projection& p, int64_t first, int64_t last, const uint32_t* packed, float* scratch) {
    Side sides[kMostParts];
    for (int j = 0; j < p.parts; ++j) sides[j] = {p.y[j], p.out[j]};
    multiply_rows(
        sides, p.parts, p.rows, first, last, p.in / kPanelColumns, packed, scratch,
        [&](int64_t panel, Floats*) { return HalfRows{p.grad_x.data + panel * kPanelColumns, p.grad_x.stride}; });
}

constexpr int64_t kTurnedStride = half_stride(kWeightRows);

struct WeightBuffers {
    float *sums, *bias;     // [32 results][32 features][result][feature]; sums of gradients
    uint16_t *left, *tail;  // [result][row]; the last rows, filled up with zeros
    uint32_t* right;        // [32 features][pair of rows][feature]
};

int64_t lay_out(const WeightBlock& block, float* scratch, WeightBuffers& b) {
    Pieces pieces(scratch);
    pieces.take(b.sums, block.outs * block.ins);
    pieces.take(b.bias, block.outs);
    pieces.take(b.left, block.outs * kTurnedStride);
    pieces.take(b.right, block.ins / 2 * kWeightRows);
    pieces.take(b.tail, kTwoTiles * larger(block.outs, block.ins));
    return pieces.taken();
}

int64_t projection_weights_scratch(const WeightBlock& largest) {
    WeightBuffers b;
    return lay_out(largest, nullptr, b);
}

// 32 rows of `width` columns, zeros where there are no more: where they lie or in `buffer`.
HalfRows rows_or_zeros(const HalfRows& x, int64_t first, int64_t rows, int64_t column, int64_t width,
                       uint16_t* buffer) {
    const HalfRows from{x.data + first * x.stride + column, x.stride};
    const int64_t there = smaller(kTwoTiles, rows - first);
    if (there == kTwoTiles) return from;
    copy_rows(from.data, from.stride, there, width, width, buffer, width);
    copy_rows(from.data, 0, kTwoTiles - there, 0, width, buffer + there * width, width);
    return {buffer, width};
}

// Adds the columns of 32 rows to `sums`: of each two vectors the even columns, then the odd ones.
void add_columns(const HalfRows& from, int64_t width, float* sums) {
    for (int64_t k = 0; k < width; k += 2 * kLanes) {
        Floats even = Simd<float>::load(sums + k), odd = Simd<float>::load(sums + k + kLanes);
        for (int64_t r = 0; r < kTwoTiles; ++r) {
            Words row;
            __builtin_memcpy(&row, from.data + r * from.stride + k, sizeof row);
            even += number_of(row << 16);
            odd += number_of(row & 0xffff0000u);
        }
        Simd<float>::store(sums + k, even);
        Simd<float>::store(sums + k + kLanes, odd);
    }
}

void projection_weights(const Projection& p, const WeightBlock& block, float* scratch) {
    WeightBuffers b;
    lay_out(block, scratch, b);
    MatrixUnit unit;
    clear(b.bias, block.outs);
    const HalfRows& y = p.y[block.part];
    for (int64_t r = 0; r < larger(p.rows, 1); r += kWeightRows) {
        const int64_t depth = smaller(kWeightRows, padded(p.rows - r));
        for (int64_t k = 0; k < depth; k += kTwoTiles) {
            const HalfRows grads = rows_or_zeros(y, r + k, p.rows, block.first_out, block.outs, b.tail);
            add_columns(grads, block.outs, b.bias);
            transpose_rows(grads.data, grads.stride, block.outs, 0, transposed_blocks(block.outs, kTwoTiles),
                           b.left + k, kTurnedStride);
            const HalfRows x = rows_or_zeros(p.x, r + k, p.rows, block.first_in, block.ins, b.tail);
            for (int64_t c = 0; c < block.ins; c += kPanelColumns)
                pair_rows<1>(x.data + c, x.stride, kPanelColumns, kTwoTiles,
                             b.right + (c * kWeightRows + k * kPanelColumns) / 2, kPanelColumns);
        }
        if (!p.grad_weight) continue;
        for (int64_t o = 0; o < block.outs; o += kTwoTiles)
            for (int64_t c = 0; c < block.ins; c += kPanelColumns) {
                float* const sums = b.sums + o * block.ins + c * kTwoTiles;
                multiply(unit, kTwoTiles, depth, kPanelColumns, {b.left + o * kTurnedStride, kTurnedStride},
                         {b.right + c * kWeightRows / 2, kPanelColumns},
                         {sums, kPanelColumns, r ? sums : nullptr, kPanelColumns}, Nothing());
            }
    }
    int64_t before = block.first_out;
    for (int j = 0; j < block.part; ++j) before += p.out[j];
    const Floats none[kVectors] = {};
    for (int64_t o = 0; p.grad_weight && o < block.outs; o += kTwoTiles)
        for (int64_t c = 0; c < block.ins; c += kPanelColumns)
            round_block(b.sums + o * block.ins + c * kTwoTiles, kTwoTiles, none,
                        {p.grad_weight + (before + o) * p.in + block.first_in + c, p.in});
    // Even and odd columns were added up apart.
    for (int64_t o = 0; p.grad_bias && block.first_in == 0 && o < block.outs; ++o) {
        const int64_t in = o % (2 * kLanes), at = o - in + in % 2 * kLanes + in / 2;
        p.grad_bias[before + o] = BFloat16(b.bias[at]).bits;
    }
}

}  // namespace
}  // namespace MMFAST_ISA
}  // namespace fusion
}  // namespace mmfast
