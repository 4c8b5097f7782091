// What is subtracted from the points of a sweep first; part of mmd_sweep.h.
//
// Note: [Centres]
//   Kernels of a distance do not change when all points move. Products lose the digits that all points have in common, so
//   a centre is subtracted first: of x for pairs in x, of y for pairs in y, half way for pairs of both. It need not be exact,
//   but must not follow a single point that lies far off: the others, less such a centre, would be rounded to nothing. So
//   it is the median of three means of some of the points, of its finite parts. Few dimensions have their differences
//   taken, which needs no centre.
#pragma once

#include "mmd/mmd_sweep.h"

namespace mmfast {
namespace mmd {

// centres_[batch][group][layer][kind][dimension]
template <class T>
void Sweep<T>::make_centres() {
    int64_t size = 0;
    for (const auto& g : groups_) {
        centre_at_.emplace_back();
        for (const Layer& l : g.kernel.layers) {
            centre_at_.back().push_back(size);
            size += 3 * padded<T>(l.dimension);
        }
    }
    centres_size_ = size;
    centres_.assign(batch_ * size, 0);
    for (int64_t b = 0; b < batch_; ++b)
        for (size_t q = 0; q < groups_.size(); ++q)
            for (size_t l = 0; l < groups_[q].kernel.layers.size(); ++l) {
                const Layer& layer = groups_[q].kernel.layers[l];
                if (!has_centre(layer)) continue;
                T* const c = centres_.data() + b * size + centre_at_[q][l];
                const int64_t d = layer.dimension, s = padded<T>(d);
                find_centre(b, q, l, 0, c);
                if (pairs_ == Pairs::within_x) continue;
                find_centre(b, q, l, 1, c + s);
                for (int64_t k = 0; k < d; ++k) c[2 * s + k] = (c[k] + c[s + k]) / 2;
                if (passes(layer, groups_[q].x->type) && lie_together(b, q, l, c, s))
                    for (int64_t k = 0; k < s; ++k) c[k] = c[s + k] = c[2 * s + k];
                else one_centre_ = false;
            }
}

template <class T>
void Sweep<T>::find_centre(int64_t b, size_t q, size_t l, int side, T* centre) const {
    constexpr int64_t kSome = 16, kGroups = 3;
    const Set& set = side ? *groups_[q].y : *groups_[q].x;
    const int64_t n = std::min(set.count, kSome), d = groups_[q].kernel.layers[l].dimension, stride = padded<T>(d);
    if (!n) return;
    const Scratch scratch(((1 + kGroups) * stride + 16) * sizeof(T));
    T* const means = reinterpret_cast<T*>(scratch.data());
    T* const row = means + kGroups * stride;
    std::fill(means, row, T(0));
    const int64_t groups = n < kGroups ? 1 : kGroups;
    for (int64_t i = 0; i < n; ++i) {
        const int64_t at = i * set.count / n, g = i % groups;
        tiles<T>().pack(source(b, q, l, side), at, 1, nullptr, {row, nullptr, row + stride, stride});
        const T part = T(1) / T((n - g + groups - 1) / groups);
        for (int64_t k = 0; k < d; ++k) means[g * stride + k] += row[k] * part;
    }
    for (int64_t k = 0; k < d; ++k) {
        const T u = means[k], v = means[stride + k], w = means[2 * stride + k];
        const T middle = groups == 1 ? u : std::max(std::min(u, v), std::min(std::max(u, v), w));
        centre[k] = std::isfinite(u + v + w) ? middle : T(0);
    }
}

// Whether the centres of both sides, `stride` apart, are nearer to each other than points are to them. With one centre for all
// pairs the errors that splitting makes in the sums of an MMD are alike: it is off by a third of what it is otherwise.
template <class T>
bool Sweep<T>::lie_together(int64_t b, size_t q, size_t l, const T* centres, int64_t stride) const {
    constexpr int64_t kSome = 16;
    const Scratch scratch((stride + 16) * sizeof(T));
    T* const row = reinterpret_cast<T*>(scratch.data());
    double spread = 0, apart = 0;
    for (int side = 0; side < 2; ++side) {
        const Set& set = side ? *groups_[q].y : *groups_[q].x;
        const int64_t n = std::min(set.count, kSome);
        for (int64_t i = 0; i < n; ++i) {
            tiles<T>().pack(source(b, q, l, side), i * set.count / n, 1, centres + side * stride,
                            {row, nullptr, row + stride, stride});
            spread += double(row[stride]) / double(n);
        }
    }
    for (int64_t k = 0; k < stride; ++k)
        apart += double(centres[k] - centres[stride + k]) * (centres[k] - centres[stride + k]);
    return apart <= spread;
}

template <class T>
const T* Sweep<T>::centre(int64_t b, size_t q, size_t l, int kind) const {
    const Layer& layer = groups_[q].kernel.layers[l];
    if (!has_centre(layer)) return nullptr;
    return centres_.data() + b * centres_size_ + centre_at_[q][l] + kind * padded<T>(layer.dimension);
}

}  // namespace mmd
}  // namespace mmfast
