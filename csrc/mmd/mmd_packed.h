// Points that are packed before a sweep, once; part of mmd_sweep.h.
//
// Note: [Packed once]
//   A task that packs the points of its two blocks, R rows in each, packs 2 D / R values for a pair, in each of the forms that
//   the matrix unit wants; so where strips of pairs are taken, and there is one centre for all of them, all points are packed
//   first. What that saves comes back in part: packed points then wait in the third cache, which gives a thread some 13 bytes a
//   cycle, and a task of 256 x 256 points of 256 dimensions reads and writes 40 bytes a pair of points and gradients. Hence
//   Ahead in mmd_amx_strip.h, and hence a task's strips add the sums over the other points to rows that lie here: the part that
//   is the point itself, times the sum of its derivatives, follows once at the end. The memory is that of the points for each
//   form. More than kMostPacked is left to the tasks.
#pragma once

#include "mmd/mmd_sweep.h"

namespace mmfast {
namespace mmd {

constexpr size_t kMostPacked = size_t(128) << 20;

template <class T>
void Sweep<T>::lay_out_packed() {
    if (!strips_ || !one_centre_) return;
    const int64_t depth = split_depth(groups_[0].kernel.layers[0].dimension);
    Packed& p = packed_;
    p.stride = parts_[0][0].stride;
    p.points = whole_tiles(groups_[0].x->count) + (pairs_ == Pairs::within_x ? 0 : whole_tiles(groups_[0].y->count));
    const int64_t all = batch_ * p.points;
    p.norms = take(p.bytes, all);
    p.split_rows = take(p.bytes, all * split_row_stride(depth) / 2);
    p.split_columns = take(p.bytes, all * depth);
    if (gradients_) {
        p.sums = take(p.bytes, all * int64_t(sizeof(double) / sizeof(T)));
        p.rows = take(p.bytes, all * p.stride);
        p.gradient = take(p.bytes, all * p.stride);
        p.across = take(p.bytes, all * depth);
        p.turned = take(p.bytes, all * depth);
    }
    if (p.bytes > kMostPacked) p = {};
}

// The place of a point, counted in tiles.
template <class T>
int64_t Sweep<T>::packed_at(int64_t batch, int64_t side, int64_t first) const {
    return batch * packed_.points + first + (side ? whole_tiles(groups_[0].x->count) : 0);
}

// From a row on that begins a tile.
template <class T>
Points<T> Sweep<T>::packed_points(int64_t batch, int64_t side, int64_t first) const {
    const Packed& p = packed_;
    const int64_t depth = split_depth(groups_[0].kernel.layers[0].dimension), i = packed_at(batch, side, first);
    const auto values = [&](size_t from, int64_t n) { return reinterpret_cast<uint16_t*>(p.at + from) + i * n; };
    Points<T> points{};
    points.norms = at(p.at, p.norms) + i;
    points.stride = p.stride;
    points.passes = parts_[0][0].passes;
    points.split_rows = values(p.split_rows, split_row_stride(depth));
    points.split_columns = values(p.split_columns, 2 * depth);
    if (!gradients_) return points;
    points.rows = at(p.at, p.rows) + i * p.stride;
    points.split_across = values(p.across, 2 * depth);
    points.split_turned = values(p.turned, 2 * depth);
    return points;
}

// The sums of the derivatives of all pairs of a point.
template <class T>
double* Sweep<T>::packed_sums(int64_t batch, int64_t side, int64_t first) const {
    return reinterpret_cast<double*>(packed_.at + packed_.sums) + packed_at(batch, side, first);
}

// The sums over the other points that a point's gradient is made of.
template <class T>
T* Sweep<T>::packed_gradient(int64_t batch, int64_t side, int64_t first) const {
    return at(packed_.at, packed_.gradient) + packed_at(batch, side, first) * packed_.stride;
}

// f(batch, side, first, count, scratch) for all tiles of points.
template <class T>
template <class F>
void Sweep<T>::for_packed(double cost, size_t bytes, const F& f) const {
    const int64_t x = whole_tiles(groups_[0].x->count) / kTile, n = packed_.points / kTile;
    deal_out(batch_ * n, cost, bytes, [&](int64_t i, char* scratch) {
        const int side = i % n >= x;
        const int64_t first = (i % n - side * x) * kTile;
        f(i / n, side, first, std::min(kTile, (side ? *groups_[0].y : *groups_[0].x).count - first), scratch);
    });
}

template <class T>
Scratch Sweep<T>::pack_all() {
    if (!packed_.bytes) return {};
    Scratch memory(packed_.bytes);
    packed_.at = memory.data();
    const int64_t values = kTile * packed_.stride;
    for_packed(double(values) * (gradients_ ? 2.5 : 1.3), size_t(values) * sizeof(T),
               [&](int64_t batch, int side, int64_t first, int64_t count, char* scratch) {
                   Points<T> to = packed_points(batch, side, first);
                   if (gradients_) {
                       std::fill_n(packed_sums(batch, side, first), kTile, 0.0);
                       std::fill_n(packed_gradient(batch, side, first), values, T(0));
                   } else {
                       to.rows = at(scratch, 0);
                   }
                   tiles<T>().pack(source(batch, 0, 0, side), first, count,
                                   centre(batch, 0, 0, pairs_ == Pairs::between ? 2 : side), to);
               });
    return memory;
}

// The gradients, when all sums are complete.
template <class T>
void Sweep<T>::put_packed() const {
    if (!packed_.at || !gradients_) return;
    for_packed(double(kTile * packed_.stride), 0, [&](int64_t batch, int side, int64_t first, int64_t count, char*) {
        T* const to = gradient(0, side);
        if (!to) return;
        const int64_t d = groups_[0].kernel.dimension(), n = (side ? *groups_[0].y : *groups_[0].x).count;
        tiles<T>().put(count, d, T(2), packed_gradient(batch, side, first), packed_points(batch, side, first).rows,
                       packed_.stride, packed_sums(batch, side, first), to + (batch * n + first) * d, d);
    });
}

}  // namespace mmd
}  // namespace mmfast
