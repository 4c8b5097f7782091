// The tasks of a sweep over points of many dimensions, slice by slice; part of mmd_sweep.h.
//
// Note: [Slices]
//   A tile of 64 x 64 pairs reads, with gradients, eight times 64 rows: 1.6 MB at 768 dimensions, more than the second cache
//   holds, for 300 000 cycles of multiply-adds. So here the distances of a whole pair of blocks are kept (64 KiB for 128 x
//   128), and all tiles meet 128 dimensions before the next 128: what these need stays in the second cache, comes there once
//   for the distances and once for the gradients, and lies in rows of nine lines instead of a page apart. The sums of a
//   gradient are complete after its slice: they need no more room than that.
#pragma once

#include "mmd/mmd_sweep.h"

namespace mmfast {
namespace mmd {

// Distances that are computed again need whole rows. Values alone read half as much for each multiply-add, and what slices
// save there their packing costs.
template <class T>
bool Sweep<T>::takes_slices() const {
    const Layer& layer = groups_[0].kernel.layers[0];
    return gradients_ && layer.dimension > kWide && layer.metric != Metric::l1 && !programs_[0][0].roots;
}

// Rows of a block whose points, of both sides, find room in memory that is kept between calls.
template <class T>
int64_t Sweep<T>::most_in_slices() const {
    const int64_t row = 2 * (groups_[0].kernel.layers[0].dimension / kSlice<T> + 1) * (kSlice<T> + kLine<T>);
    return int64_t(Scratch::kLargest) * 3 / 4 / (row * int64_t(sizeof(T)));
}

template <class T>
void Sweep<T>::lay_out_slices() {
    const int64_t d = groups_[0].kernel.layers[0].dimension, stride = kSlice<T> + kLine<T>;
    Slices& p = slices_;
    p.count = (d + kSlice<T> - kLine<T> - 1) / kSlice<T>;  // the last one has a line more rather than one for itself
    p.block = block_size_ * stride;
    p.a_rows = take(p.count * p.block);
    p.b_rows = take(p.count * p.block);
    p.passes = passes(groups_[0].kernel.layers[0], groups_[0].x->type);
    p.a_split = p.passes ? take(block_size_ * split_row_stride(stride) / 2) : 0;
    p.b_split = p.passes ? take(kTile * split_depth(stride)) : 0;
    p.b_panels = p.passes ? 0 : take(p.block);
    p.a_norms = take(block_size_);
    p.b_norms = take(block_size_);
    p.norms = take(block_size_);
    p.z = take(block_size_ * block_size_);
    p.k = take(kTile * kTile);
    p.a_gradient = take(p.block);
    p.b_gradient = take(p.block);
    g_[0] = take(kTile * kTile);
}

// z of the tile at row i and column j of two blocks.
template <class T>
T* Sweep<T>::slice_z(char* s, int64_t i, int64_t j) const {
    return at(s, slices_.z) + (j / kTile * (block_size_ / kTile) + i / kTile) * kTile * kTile;
}

// z of all tiles of two blocks.
template <class T>
void Sweep<T>::compare_slices(int64_t batch, const Block& a, const Block& b, char* s) const {
    const Slices& p = slices_;
    const auto& t = tiles<T>();
    const Layer& layer = groups_[0].kernel.layers[0];
    const int kind = a.side != b.side ? 2 : a.side;
    const bool diagonal = a.index == b.index, l2 = layer.metric == Metric::l2;
    const int64_t stride = kSlice<T> + kLine<T>;
    T *const a_norms = at(s, p.a_norms), *const b_norms = at(s, p.b_norms), *const norms = at(s, p.norms);
    std::fill_n(a_norms, block_size_, T(0));
    std::fill_n(b_norms, block_size_, T(0));
    for (int64_t i = 0; i < p.count; ++i) {
        const int64_t first = i * kSlice<T>;
        const int64_t depth = i + 1 < p.count ? kSlice<T> : layer.dimension - first;
        const T* centre = this->centre(batch, 0, 0, kind);
        if (centre) centre += first;
        const auto slice = [&](int side) {
            Source from = source(batch, 0, 0, side);
            const Set& set = side ? *groups_[0].y : *groups_[0].x;
            from.data = static_cast<const char*>(from.data) + first * from.column_stride * size_of(set.type);
            from.dimension = depth;
            return from;
        };
        Points<T> to_a{at(s, p.a_rows) + i * p.block, nullptr, norms, stride};
        if (p.passes) to_a.split_rows = reinterpret_cast<uint16_t*>(s + p.a_split);
        to_a.passes = p.passes;
        t.pack(slice(a.side), a.first, a.count, centre, to_a);
        to_a.norms = a_norms;
        for (int64_t r = 0; r < a.count; ++r) a_norms[r] += norms[r];
        for (int64_t j = 0; j < b.count; j += kTile) {
            const int64_t columns = std::min(kTile, b.count - j);
            Points<T> to_b{at(s, p.b_rows) + i * p.block + j * stride, nullptr, norms, stride};
            if (p.passes) to_b.split_columns = reinterpret_cast<uint16_t*>(s + p.b_split);
            else to_b.panels = at(s, p.b_panels) + j * stride;
            to_b.passes = p.passes;
            t.pack(slice(b.side), b.first + j, columns, centre, to_b);
            to_b.norms = b_norms + j;
            for (int64_t r = 0; r < kTile; ++r) to_b.norms[r] += norms[r];
            for (int64_t r = 0; r < a.count && !(diagonal && r > j); r += kTile)
                t.compare_slice(i == 0, l2 && i + 1 == p.count, depth, to_a, r, std::min(kTile, a.count - r), to_b,
                                columns, slice_z(s, r, j));
        }
    }
}

// The gradients of both blocks, from the derivatives that have taken the place of z.
template <class T>
void Sweep<T>::multiply_slices(int64_t batch, const Block& a, const Block& b, char* s) const {
    const Slices& p = slices_;
    const auto& t = tiles<T>();
    const auto product = splits_ ? t.product_averaged : t.product;
    const int64_t stride = kSlice<T> + kLine<T>, dimension = groups_[0].kernel.layers[0].dimension;
    const bool diagonal = a.index == b.index, to_a = gradient(0, a.side), to_b = gradient(0, b.side);
    T *const a_gradient = at(s, p.a_gradient), *const b_gradient = at(s, p.b_gradient);
    for (int64_t i = 0; i < p.count; ++i) {
        const int64_t first = i * kSlice<T>, depth = i + 1 < p.count ? kSlice<T> : dimension - first;
        const int64_t width = (depth + t.lanes - 1) / t.lanes * t.lanes;
        const T *const a_rows = at(s, p.a_rows) + i * p.block, *const b_rows = at(s, p.b_rows) + i * p.block;
        std::memset(a_gradient, 0, a.count * stride * sizeof(T));
        std::memset(b_gradient, 0, b.count * stride * sizeof(T));
        for (int64_t j = 0; j < b.count; j += kTile) {
            const int64_t columns = std::min(kTile, b.count - j);
            for (int64_t r = 0; r < a.count && !(diagonal && r > j); r += kTile) {
                const int64_t rows = std::min(kTile, a.count - r);
                const T* const w = slice_z(s, r, j);
                if (to_a)
                    product(false, rows, columns, width, w, b_rows + j * stride, stride, a_gradient + r * stride,
                            stride);
                if (to_b && !(diagonal && r == j))
                    product(true, columns, rows, width, w, a_rows + r * stride, stride, b_gradient + j * stride,
                            stride);
            }
        }
        put_gradient(0, 0, b.side, batch, b.first, b.count, b_gradient, b_rows, stride, row_sums(s, 0, 1), first,
                     depth);
        put_gradient(0, 0, a.side, batch, a.first, a.count, a_gradient, a_rows, stride, row_sums(s, 0, 0), first,
                     depth);
    }
}

// task(), with the steps of all tiles before the next step.
template <class T>
template <class R>
void Sweep<T>::sliced_task(int64_t batch, int64_t slot, const Block& a, const Block& b, char* s, R& reducer) {
    const auto& t = tiles<T>();
    const Program<T>& program = programs_[0][0];
    const bool diagonal = a.index == b.index;
    // The sums of the derivatives of each row and of each column.
    const bool sums = needs_sums(0, 0);
    double *const of_rows = row_sums(s, 0, 0), *const of_columns = row_sums(s, 0, 1);
    std::fill_n(of_rows, block_size_, 0.0);
    std::fill_n(of_columns, block_size_, 0.0);
    Tile<T> tile{};
    tile.batch = batch;
    tile.first = a.first;
    tile.a = a.side;
    tile.b = b.side;
    tile.slot = slot;
    tile.scratch = s + sizes_;
    tile.k[0] = at(s, slices_.k);
    tile.g[0] = at(s, g_[0]);
    reducer.begin(tile, a.count);
    compare_slices(batch, a, b, s);
    for (int64_t j = 0; j < b.count; j += kTile) {
        tile.j0 = b.first + j;
        tile.columns = std::min(kTile, b.count - j);
        for (int64_t i = 0; i < a.count && !(diagonal && i > j); i += kTile) {
            tile.i0 = a.first + i;
            tile.rows = std::min(kTile, a.count - i);
            tile.diagonal = diagonal && i == j;
            T* const z = slice_z(s, i, j);
            T factor = 0;
            if (tile.columns == kTile && !tile.diagonal && reducer.is_sum(tile, factor)) {
                reducer.add(tile, t.evaluate_sum(program, tile.rows, true, factor, z, sums ? of_rows + i : nullptr,
                                                 sums ? of_columns + j : nullptr));
                continue;
            }
            tile.z = z;
            mask(tile, tile.diagonal, z);
            t.evaluate(program, tile.rows, z, tile.k[0], z);
            mask(tile, tile.diagonal, tile.k[0]);
            mask(tile, tile.diagonal, z);
            reducer.take(tile);
            reducer.weigh(tile, 0, z);
            if (sums) t.add_sums(tile.rows, z, of_rows + i, of_columns + j);
            if (tile.diagonal)
                add_transposed(tile.rows, z);  // rows and columns are the same points: one product for both
        }
    }
    multiply_slices(batch, a, b, s);
    reducer.end(tile, a.count);
}

}  // namespace mmd
}  // namespace mmfast
