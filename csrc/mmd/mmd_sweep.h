// A sweep over all pairs of points, tile by tile, with a reducer that takes each tile of kernel values and may say what
// the derivative by each value is.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "common/work.h"
#include "mmd/mmd.h"
#include "mmd/mmd_tile.h"

namespace mmfast {
namespace mmd {

template <class T>
Program<T> program_of(const Layer& layer);

// The distance between rows: whole vectors, and an odd number of cache lines, or rows a power of two apart would share one
// set of the cache.
template <class T>
int64_t padded(int64_t width) {
    constexpr int64_t line = 64 / sizeof(T);
    const int64_t lines = std::max<int64_t>(1, (width + line - 1) / line);
    return (lines | 1) * line;
}

constexpr int64_t kMostLayers = 8;
// Points of more dimensions are taken slice by slice where gradients are wanted (mmd_slices.h).
constexpr int64_t kWide = 384;

// Points of both samples from which on the errors of split products average out.
constexpr int64_t kManyPoints = 256;

// One kernel of a sweep and what it is evaluated on.
template <class T>
struct Group {
    const Kernel& kernel;
    const Set *x, *y;  // y may be null
    Gradients<T> gradients;
};

enum class Pairs { within_x, within_and_between, between };

struct Block {
    int side;  // 0: x, 1: y
    int64_t first, count, index;
};
// A task in the order of rounds: its blocks, how many tasks use them before it, and where its round begins.
struct Turn {
    int a, b, before_a, before_b;
    int64_t first, count;
};
struct BlockPair {
    int64_t batch = 0;
    const Block *a = nullptr, *b = nullptr;
    const Turn* turn = nullptr;
};

// A tile as a reducer sees it: rows i0 .. of side a, columns j0 .. of side b. The values beyond `columns`, and those of a
// pair that is met elsewhere, are 0.
template <class T>
struct Tile {
    int64_t batch, first, i0, j0, rows, columns;  // `first`: the block's first row
    int a, b;                                     // sides
    int64_t slot;                                 // where sums go: no other task adds to it at the same time
    bool diagonal;                                // pairs i < j only
    const T* z;     // what the first layer of the first group compares: distances or products
    T* k[2];        // values, of each group
    T* g[2];        // for the reducer: the derivatives by the values
    char* scratch;  // the reducer's own, kept through a task
    bool within() const { return a == b; }
};

template <class T>
class Sweep {
public:
    // `averaged`: of the values only sums over many pairs are wanted.
    Sweep(int64_t batch, Pairs pairs, std::vector<Group<T>> groups, bool averaged = false)
        : batch_(batch), pairs_(pairs), groups_(groups) {
        splits_ = averaged && groups_[0].x->count + (groups_[0].y ? groups_[0].y->count : 0) >= kManyPoints;
        for (const auto& g : groups_) {
            programs_.emplace_back();
            column_.emplace_back();
            int64_t column = 0;
            for (const Layer& l : g.kernel.layers) {
                programs_.back().push_back(program_of<T>(l));
                widest_ = std::max(widest_, padded<T>(l.dimension));
                column_.back().push_back(column);
                column += l.dimension;
            }
            gradients_ |= g.gradients.x || g.gradients.y;
            parameters_ |= g.gradients.parameters != nullptr;
        }
        simple_ = groups_.size() == 1 && programs_[0].size() == 1 && !parameters_;
        sliced_ = simple_ && takes_slices();
        const Layer& layer = groups_[0].kernel.layers[0];
        const Program<T>& program = programs_[0][0];
        strips_ = simple_ && !sliced_ && tiles<T>().strip_sums && program.doubles && program.chain[0].exponent < 0 &&
                  layer.metric == Metric::l2 && passes(layer, groups_[0].x->type);
        make_blocks();
        make_centres();
        lay_out();
        lay_out_packed();
    }

    int64_t blocks() const { return int64_t(blocks_.size()); }
    bool differentiates() const { return gradients_ || parameters_; }

    using Tasks = std::vector<std::pair<int, int>>;

    // Of mmd_rounds.h. The tasks of each round; `wanted[kind]`: pairs in x, in y, of both. With `flat` all in one, for
    // reducers that add to nothing but the slot of the task: those of a block follow each other, so that its points stay near.
    std::vector<Tasks> rounds(const bool (&wanted)[3], bool flat = false) const;

    // A task's slot is that of its first block in the batch, or with one round only its own.
    int64_t slots(const std::vector<Tasks>& rounds) const {
        return batch_ * (rounds.size() == 1 ? int64_t(rounds[0].size()) : blocks());
    }

    template <class R>
    void run(R& reducer, const std::vector<Tasks>& rounds);

private:
    struct Part {  // offsets in a thread's scratch, of one layer
        size_t a_rows, a_norms, a_split, b_rows, b_panels, b_norms, b_split, z, k, h, a_gradient, b_gradient;
        size_t a_turned, a_lanes, b_across, b_sums;  // of strips with gradients
        int64_t stride;
        int passes;  // of split products, or 0
    };

    std::vector<Turn> in_turn(const std::vector<Tasks>& rounds) const;  // of mmd_rounds.h

    void make_blocks() {
        int64_t count = groups_[0].x->count + (groups_[0].y && pairs_ != Pairs::within_x ? groups_[0].y->count : 0);
        // Large blocks are packed less often. With gradients a round has half as many tasks as there are blocks, and they
        // have to be enough for many threads.
        block_size_ = count >= 16384  ? 512
                      : count >= 4096 ? gradients_ ? 256 : 512
                      : count >= 1024 ? gradients_ && !strips_ ? 128 : 256
                                      : 64;
        // A block and its gradient stay in the second cache. Without a gradient the rows of a tile are read for so many
        // multiply-adds that they may come from the third.
        const int64_t most =
            sliced_ ? most_in_slices() : (int64_t(5) << (gradients_ ? 17 : 18)) / (widest_ * int64_t(sizeof(T)));
        while (block_size_ > kTile && block_size_ > most) block_size_ /= 2;
        const auto cut = [&](int side, int64_t n) {
            for (int64_t i = 0; i < n; i += block_size_)
                blocks_.push_back({side, i, std::min(block_size_, n - i), int64_t(blocks_.size())});
        };
        cut(0, groups_[0].x->count);
        x_blocks_ = int(blocks_.size());
        if (pairs_ != Pairs::within_x) cut(1, groups_[0].y->count);
    }

    // Of mmd_centres.h.
    void make_centres();
    void find_centre(int64_t b, size_t q, size_t l, int side, T* centre) const;
    bool lie_together(int64_t b, size_t q, size_t l, const T* centres, int64_t stride) const;
    static bool has_centre(const Layer& layer) {
        return layer.metric == Metric::l2 && layer.dimension > kFewDimensions;
    }
    const T* centre(int64_t b, size_t q, size_t l, int kind) const;

    static int64_t size_of(ScalarType type) {
        return type == ScalarType::float64 ? 8 : type == ScalarType::float32 ? 4 : 2;
    }

    Source source(int64_t b, size_t q, size_t l, int side) const {
        const Set& f = side ? *groups_[q].y : *groups_[q].x;
        const int64_t at = b * f.batch_stride + column_[q][l] * f.column_stride;
        return {static_cast<const char*>(f.data) + size_of(f.type) * at, f.type, f.row_stride, f.column_stride,
                groups_[q].kernel.layers[l].dimension};
    }

    // The next place in memory of which `size` is laid out.
    static size_t take(size_t& size, int64_t values) {
        const size_t here = size;
        size += (size_t(values) * sizeof(T) + 63) / 64 * 64;
        return here;
    }
    size_t take(int64_t values) { return take(sizes_, values); }  // of a thread's scratch

    void lay_out() {
        a_sums_ = take(block_size_ * 2 * kMostLayers * int64_t(sizeof(double) / sizeof(T)));
        if (sliced_) return lay_out_slices();
        for (size_t q = 0; q < groups_.size(); ++q) {
            parts_.emplace_back();
            const auto& layers = groups_[q].kernel.layers;
            product_[q] = layers.size() > 1 ? take(kTile * kTile) : 0;
            for (const Layer& l : layers) {
                Part p{};
                p.passes = passes(l, groups_[q].x->type);
                p.stride = padded<T>(p.passes ? split_depth(l.dimension) : l.dimension);
                p.a_rows = take(block_size_ * p.stride);
                p.a_norms = take(block_size_);
                p.b_rows = take(kTile * p.stride);
                p.a_split = p.passes ? take(block_size_ * split_row_stride(l.dimension) / 2) : 0;
                p.b_split = p.passes ? take(kTile * split_depth(l.dimension)) : 0;
                p.b_panels = p.passes ? 0 : take(kTile * p.stride);
                p.b_norms = take(kTile);
                p.z = take(kTile * kTile);
                p.k = take(kTile * kTile);
                p.h = differentiates() ? take(kTile * kTile) : 0;
                p.a_gradient = gradients_ ? take(block_size_ * p.stride) : 0;
                p.b_gradient = gradients_ ? take(kTile * p.stride) : 0;
                if (strips_ && gradients_) {
                    p.a_turned = take(block_size_ * split_depth(l.dimension));
                    p.a_lanes = take(block_size_ * 16);
                    p.b_across = take(kTile * split_depth(l.dimension));
                    p.b_sums = take(kTile * split_depth(l.dimension));
                }
                parts_.back().push_back(p);
            }
            g_[q] = take(kTile * kTile);
        }
    }

    // How the products of a layer are split for the matrix unit, see Note: [Split products]; 0 where they are not.
    int passes(const Layer& l, ScalarType type) const {
        if (!tiles<T>().splits || l.metric == Metric::l1) return 0;
        if (l.metric == Metric::l2) return splits_ && l.dimension > kFewDimensions ? 3 : 0;
        return type == ScalarType::bfloat16 ? 1 : type == ScalarType::float16 ? 4 : 0;
    }

    double task_cost() const {
        double pair = 0;
        for (const auto& g : groups_)
            for (const Layer& l : g.kernel.layers)
                pair += 0.013 * double(l.dimension) * (gradients_ ? 3 : 1) + 0.3 * double(l.terms.size());
        const double rows = double(std::min(block_size_, blocks_.empty() ? 0 : blocks_[0].count));
        return pair * rows * rows * sizeof(T) / 4;
    }

    Points<T> a_points(const Part& p, const Tile<T>& t, char* s) const {
        if (packed_.at) return packed_points(t.batch, t.a, t.first);
        Points<T> a{at(s, p.a_rows), nullptr, at(s, p.a_norms), p.stride};
        if (p.passes) a.split_rows = reinterpret_cast<uint16_t*>(s + p.a_split);
        if (p.a_turned) a.split_turned = reinterpret_cast<uint16_t*>(s + p.a_turned);
        a.passes = p.passes;
        return a;
    }
    Points<T> b_points(const Part& p, const Tile<T>& t, char* s) const {
        if (packed_.at) return packed_points(t.batch, t.b, t.j0);
        Points<T> b{at(s, p.b_rows), p.passes ? nullptr : at(s, p.b_panels), at(s, p.b_norms), p.stride};
        if (p.passes) b.split_columns = reinterpret_cast<uint16_t*>(s + p.b_split);
        if (p.b_across) b.split_across = reinterpret_cast<uint16_t*>(s + p.b_across);
        b.passes = p.passes;
        return b;
    }
    // Where the sums that make up the gradients of a task's rows and of a tile's columns go.
    T* a_gradient(const Part& p, const Tile<T>& t, char* s) const {
        return packed_.at ? packed_gradient(t.batch, t.a, t.first) : at(s, p.a_gradient);
    }
    T* b_gradient(const Part& p, const Tile<T>& t, char* s) const {
        return packed_.at ? packed_gradient(t.batch, t.b, t.j0) : at(s, p.b_gradient);
    }
    // A tile's points from a panel on; not for split columns.
    static Points<T> columns_from(Points<T> b, int64_t j) {
        if (j == 0) return b;
        b.rows += j * b.stride;
        b.panels += j * b.stride;
        b.norms += j;
        return b;
    }
    static T* at(char* scratch, size_t offset) { return reinterpret_cast<T*>(scratch + offset); }

    T* gradient(size_t q, int side) const { return side ? groups_[q].gradients.y : groups_[q].gradients.x; }

    // The sums of the derivatives of a block's rows, for layer l of group q.
    double* row_sums(char* scratch, size_t q, size_t l) const {
        return reinterpret_cast<double*>(scratch + a_sums_) + (q * kMostLayers + l) * block_size_;
    }

    // `next` gives the blocks of the thread's next task, if any.
    template <class R, class Next>
    void task(int64_t batch, int64_t slot, const Block& a, const Block& b, char* s, R& reducer, const Next& next) {
        const int kind = a.side != b.side ? 2 : a.side;
        const bool diagonal = a.index == b.index;
        Tile<T> tile{};
        tile.batch = batch;
        tile.first = a.first;
        tile.a = a.side;
        tile.b = b.side;
        tile.slot = slot;
        for_layers([&](size_t q, size_t l, const Part& p) {
            if (!packed_.at)
                tiles<T>().pack(source(batch, q, l, a.side), a.first, a.count, centre(batch, q, l, kind),
                                a_points(p, tile, s));
            if (!gradients_) return;
            // A strip of all rows sets what the next ones add to.
            if (!packed_.at && (!strips_ || diagonal))
                std::memset(at(s, p.a_gradient), 0, a.count * p.stride * sizeof(T));
            if (strips_) std::memset(at(s, p.a_lanes), 0, whole_tiles(a.count) * 16 * sizeof(T));
            std::fill_n(row_sums(s, q, l), a.count, 0.0);
        });
        tile.scratch = s + sizes_;
        tile.z = at(s, parts_[0][0].z);
        for (size_t q = 0; q < groups_.size(); ++q) {
            tile.k[q] = at(s, parts_[q].size() > 1 ? product_[q] : parts_[q][0].k);
            tile.g[q] = at(s, g_[q]);
        }
        reducer.begin(tile, a.count);
        for (int64_t j = 0; j < b.count; j += kTile) {
            tile.j0 = b.first + j;
            tile.columns = std::min(kTile, b.count - j);
            for_layers([&](size_t q, size_t l, const Part& p) {
                if (!packed_.at)
                    tiles<T>().pack(source(batch, q, l, b.side), tile.j0, tile.columns, centre(batch, q, l, kind),
                                    b_points(p, tile, s));
                if (gradients_ && !packed_.at) std::memset(at(s, p.b_gradient), 0, tile.columns * p.stride * sizeof(T));
            });
            double column_sums[2 * kMostLayers][kTile];
            if (gradients_)
                for_layers([&](size_t q, size_t l, const Part&) {
                    std::fill_n(column_sums[q * kMostLayers + l], kTile, 0.0);
                });
            int64_t i = 0;
            T factor = 0;
            if (strips_ && take_strip(tile, a, b, j, s, column_sums[0], reducer, next)) i = a.count;
            else if (strips_ && gradients_ && !packed_.at && j == 0 && !diagonal)
                std::memset(at(s, parts_[0][0].a_gradient), 0, a.count * parts_[0][0].stride * sizeof(T));
            for (; i < a.count && !(diagonal && i > j); i += kTile) {
                tile.i0 = a.first + i;
                tile.rows = std::min(kTile, a.count - i);
                tile.diagonal = diagonal && i == j;
                if (simple_ && tile.columns == kTile && !tile.diagonal && reducer.is_sum(tile, factor)) {
                    reducer.add(tile, compute_sum(tile, i, s, factor, column_sums[0]));
                    continue;
                }
                compute(tile, i, s);
                reducer.take(tile);
                if (differentiates()) differentiate(tile, i, s, reducer, column_sums);
            }
            if (gradients_)
                for_layers([&](size_t q, size_t l, const Part& p) {
                    put_gradient(q, l, b.side, batch, tile.j0, tile.columns, b_gradient(p, tile, s),
                                 b_points(p, tile, s).rows, p.stride, column_sums[q * kMostLayers + l], 0,
                                 groups_[q].kernel.layers[l].dimension);
                });
        }
        if (gradients_)
            for_layers([&](size_t q, size_t l, const Part& p) {
                if (strips_) add_lanes(a.count, at(s, p.a_lanes), row_sums(s, q, l));
                put_gradient(q, l, a.side, batch, a.first, a.count, a_gradient(p, tile, s), a_points(p, tile, s).rows,
                             p.stride, row_sums(s, q, l), 0, groups_[q].kernel.layers[l].dimension);
            });
        reducer.end(tile, a.count);
    }

    static void add_lanes(int64_t rows, const T* lanes, double* sums) {
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t l = 0; l < 16; ++l) sums[i] += double(lanes[i * 16 + l]);
    }

    // All rows of a with a tile of b at once; false where they have to be taken tile by tile.
    template <class R, class Next>
    bool take_strip(Tile<T>& tile, const Block& a, const Block& b, int64_t j, char* s, double* column_sums, R& reducer,
                    const Next& next) const {
        const auto& t = tiles<T>();
        const Part& p = parts_[0][0];
        const int64_t dimension = groups_[0].kernel.layers[0].dimension;
        const bool diagonal = a.index == b.index;
        tile.i0 = a.first;
        tile.rows = diagonal ? std::min(a.count, j + kTile) : a.count;
        tile.diagonal = false;
        StripGradients<T> to{};
        double sum = 0;
        if (!reducer.is_sum(tile, to.factor)) return false;
        if (gradients_) {
            to.row_lanes = at(s, p.a_lanes);
            to.column_sums = column_sums;
            to.stride = p.stride;
            to.first = j == 0 && !diagonal && !packed_.at;
            if (gradient(0, a.side)) to.rows = a_gradient(p, tile, s);
            if (gradient(0, b.side)) {
                to.columns = at(s, p.b_sums);
                if (diagonal && j == 0) std::memset(to.columns, 0, split_depth(dimension) * kTile * sizeof(T));
            }
        }
        if (!t.strip_sums(programs_[0][0], dimension, a_points(p, tile, s), tile.rows, b_points(p, tile, s),
                          tile.columns, diagonal ? j : -1, packed_.at ? wanted_soon(tile, a, b, j, next) : Soon{},
                          gradients_ ? &to : nullptr, &sum))
            return false;
        reducer.add(tile, sum);
        if (to.columns) t.add_turned(tile.columns, dimension, to.columns, b_gradient(p, tile, s), p.stride);
        return true;
    }

    // What a strip's own gradients and the next strip read. The gradients in memory that a task adds to, and the points of the
    // next one in all of their forms, are too much: they push out what the strip itself comes back to.
    template <class Next>
    Soon wanted_soon(const Tile<T>& tile, const Block& a, const Block& b, int64_t j, const Next& next) const {
        const int64_t dimension = groups_[0].kernel.layers[0].dimension;
        const int64_t bytes = 2 * split_depth(dimension) * int64_t(sizeof(uint16_t));  // of a point in parts
        Soon soon;
        const auto add_tile_of = [&](int64_t batch, int side, int64_t first) {
            const Points<T> points = packed_points(batch, side, first);
            soon.add(points.split_columns, kTile * bytes);
            if (gradients_) soon.add(points.split_across, kTile * bytes);
        };
        if (j == 0 && gradients_) {
            soon.add(packed_points(tile.batch, a.side, a.first).split_turned, a.count * bytes);
            if (gradient(0, a.side))
                soon.add(packed_gradient(tile.batch, a.side, a.first), a.count * packed_.stride * int64_t(sizeof(T)),
                         true);
        }
        if (j + kTile < b.count) {
            add_tile_of(tile.batch, tile.b, tile.j0 + kTile);
            return soon;
        }
        const BlockPair then = next();
        if (!then.a) return soon;
        add_tile_of(then.batch, then.b->side, then.b->first);
        if (then.a->index != a.index || then.batch != tile.batch)
            soon.add(packed_points(then.batch, then.a->side, then.a->first).split_rows,
                     then.a->count * split_row_stride(dimension) * int64_t(sizeof(uint16_t)));
        return soon;
    }

    template <class F>
    void for_layers(const F& f) const {
        for (size_t q = 0; q < parts_.size(); ++q)
            for (size_t l = 0; l < parts_[q].size(); ++l) f(q, l, parts_[q][l]);
    }

    // w += w', for w whose lower half is zero.
    static void add_transposed(int64_t rows, T* w) {
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < i; ++j) w[i * kTile + j] = w[j * kTile + i];
    }

    // Zeros where there is no pair, and in the lower half of a diagonal tile.
    static void mask(const Tile<T>& t, bool diagonal, T* x) {
        if (t.columns == kTile && !diagonal) return;
        for (int64_t i = 0; i < t.rows; ++i) {
            if (diagonal) std::fill_n(x + i * kTile, std::min(i + 1, kTile), T(0));
            std::fill(x + i * kTile + t.columns, x + (i + 1) * kTile, T(0));
        }
    }

    void compute(const Tile<T>& tile, int64_t i, char* s) {
        for_layers([&](size_t q, size_t l, const Part& p) {
            const Program<T>& program = programs_[q][l];
            // What a diagonal tile holds below its diagonal is masked: of each panel only the rows above its end count.
            const Points<T> b = b_points(p, tile, s);
            const int64_t width = tile.diagonal && !p.passes ? kStrip * tiles<T>().lanes : kTile;
            for (int64_t j = 0; j < tile.columns; j += width)
                tiles<T>().compare(program.metric, program.roots, groups_[q].kernel.layers[l].dimension,
                                   a_points(p, tile, s), i, width < kTile ? std::min(tile.rows, j + width) : tile.rows,
                                   columns_from(b, j), std::min(tile.columns - j, width), at(s, p.z) + j);
            mask(tile, tile.diagonal, at(s, p.z));
            tiles<T>().evaluate(program, tile.rows, at(s, p.z), at(s, p.k), differentiates() ? at(s, p.h) : nullptr);
            mask(tile, tile.diagonal, at(s, p.k));
            if (differentiates()) mask(tile, tile.diagonal, at(s, p.h));
        });
        for (size_t q = 0; q < parts_.size(); ++q) {
            if (parts_[q].size() == 1) continue;
            std::memcpy(tile.k[q], at(s, parts_[q][0].k), tile.rows * kTile * sizeof(T));
            for (size_t l = 1; l < parts_[q].size(); ++l)
                tiles<T>().multiply(tile.rows, at(s, parts_[q][l].k), tile.k[q]);
        }
    }

    // The sum of a whole tile's values, one kernel of one layer, each weighted with `factor` in what is differentiated: the
    // values are never stored, and the derivatives take the place of the distances.
    double compute_sum(const Tile<T>& tile, int64_t i, char* s, T factor, double* column_sums) const {
        const Part& p = parts_[0][0];
        const Program<T>& program = programs_[0][0];
        const int64_t dimension = groups_[0].kernel.layers[0].dimension;
        T* const z = at(s, p.z);
        tiles<T>().compare(program.metric, program.roots, dimension, a_points(p, tile, s), i, tile.rows,
                           b_points(p, tile, s), tile.columns, z);
        const bool sums = gradients_ && needs_sums(0, 0);
        const double sum =
            tiles<T>().evaluate_sum(program, tile.rows, gradients_, factor, z, sums ? row_sums(s, 0, 0) + i : nullptr,
                                    sums ? column_sums : nullptr);
        if (gradients_) multiply_gradient(0, 0, p, tile, i, s, z);
        return sum;
    }

    template <class R>
    void differentiate(const Tile<T>& tile, int64_t i, char* s, R& reducer,
                       double (&column_sums)[2 * kMostLayers][kTile]) {
        const auto& t = tiles<T>();
        for_layers([&](size_t q, size_t l, const Part& p) {
            T* const w = at(s, p.h);
            const auto complete = [&](T* x) {  // times the other layers, times the derivative by the value
                for (size_t other = 0; other < parts_[q].size(); ++other)
                    if (other != l) t.multiply(tile.rows, at(s, parts_[q][other].k), x);
                reducer.weigh(tile, int(q), x);
            };
            if (gradients_) {
                complete(w);
                add_gradient(q, l, p, tile, i, s, w, column_sums[q * kMostLayers + l]);
            }
            if (!groups_[q].gradients.parameters) return;
            std::fill_n(w, tile.rows * kTile, T(1));
            mask(tile, tile.diagonal, w);
            complete(w);
            t.parameters(programs_[q][l], int(tile.rows), at(s, p.z), w,
                         parameter_sums(tile.slot, q) + 4 * first_term(q, l));
        });
    }

    // What derivatives w by the distances (or products) of a tile add to the gradients of its rows and columns.
    void add_gradient(size_t q, size_t l, const Part& p, const Tile<T>& tile, int64_t i, char* s, T* w,
                      double* column_sums) const {
        if (needs_sums(q, l)) tiles<T>().add_sums(tile.rows, w, row_sums(s, q, l) + i, column_sums);
        multiply_gradient(q, l, p, tile, i, s, w);
    }

    // Squared distances from products need the sums of w as well.
    bool needs_sums(size_t q, size_t l) const {
        return programs_[q][l].metric == Metric::l2 && groups_[q].kernel.layers[l].dimension > kFewDimensions;
    }

    // The same but for the sums of w.
    void multiply_gradient(size_t q, size_t l, const Part& p, const Tile<T>& tile, int64_t i, char* s, T* w) const {
        const auto& t = tiles<T>();
        const int64_t width = (groups_[q].kernel.layers[l].dimension + t.lanes - 1) / t.lanes * t.lanes;
        const T* const from_a = a_points(p, tile, s).rows + i * p.stride;
        const T* const from_b = b_points(p, tile, s).rows;
        T* const to_a = a_gradient(p, tile, s) + i * p.stride;
        T* const to_b = b_gradient(p, tile, s);
        const Metric metric = programs_[q][l].metric;
        if (metric == Metric::l1)
            return t.signs(tile.rows, tile.columns, width, w, from_a, from_b, p.stride, to_a, to_b);
        if (metric == Metric::l2 && groups_[q].kernel.layers[l].dimension <= kFewDimensions)
            return t.differences(tile.rows, tile.columns, groups_[q].kernel.layers[l].dimension, w, from_a,
                                 b_points(p, tile, s), to_a, to_b);
        if (tile.diagonal) add_transposed(tile.rows, w);  // rows and columns are the same points: one product for both
        const auto product = splits_ ? t.product_averaged : t.product;
        if (gradient(q, tile.a)) product(false, tile.rows, tile.columns, width, w, from_b, p.stride, to_a, p.stride);
        if (gradient(q, tile.b) && !tile.diagonal)
            product(true, tile.columns, tile.rows, width, w, from_a, p.stride, to_b, p.stride);
    }

    int64_t first_term(size_t q, size_t l) const {
        int64_t n = 0;
        for (size_t i = 0; i < l; ++i) n += int64_t(groups_[q].kernel.layers[i].terms.size());
        return n;
    }

    // gradient[row] += 2 (sum of w times the row - sum of w times the others) for squared distances, else what was summed;
    // `width` dimensions of the layer from `at` on. Of points that are packed only the sums of w are taken here.
    void put_gradient(size_t q, size_t l, int side, int64_t batch, int64_t first, int64_t count, const T* summed,
                      const T* points, int64_t stride, const double* sums, int64_t at, int64_t width) const {
        T* const to = gradient(q, side);
        if (!to) return;
        const int64_t all = groups_[q].kernel.dimension();
        const int64_t n = (side ? *groups_[q].y : *groups_[q].x).count;
        const bool l2 = groups_[q].kernel.layers[l].metric == Metric::l2;
        if (packed_.at) {
            double* const total = packed_sums(batch, side, first);
            for (int64_t i = 0; i < count; ++i) total[i] += sums[i];
            return;
        }
        tiles<T>().put(count, width, l2 ? T(2) : T(-1), summed, l2 ? points : nullptr, stride, sums,
                       to + (batch * n + first) * all + column_[q][l] + at, all);
    }

    double* parameter_sums(int64_t slot, size_t q) {
        return parameter_sums_.data() + (slot * 2 + int64_t(q)) * most_terms() * 4;
    }
    int64_t most_terms() const {
        int64_t n = 0;
        for (const auto& g : groups_) n = std::max(n, g.kernel.terms());
        return n;
    }
    void add_up_parameters(int64_t slots) {
        for (size_t q = 0; q < groups_.size(); ++q)
            if (groups_[q].gradients.parameters)
                for (int64_t slot = 0; slot < batch_ * slots; ++slot) {
                    const int64_t n = groups_[q].kernel.terms() * 4;
                    double* const to = groups_[q].gradients.parameters + slot / slots * n;
                    for (int64_t i = 0; i < n; ++i) to[i] += parameter_sums(slot, q)[i];
                }
    }

    const int64_t batch_;
    const Pairs pairs_;
    const std::vector<Group<T>> groups_;
    std::vector<std::vector<Program<T>>> programs_;
    std::vector<std::vector<Part>> parts_;
    std::vector<Block> blocks_;
    std::vector<T> centres_;
    std::vector<std::vector<int64_t>> centre_at_, column_;
    std::vector<double> parameter_sums_;
    int64_t centres_size_ = 0, block_size_ = kTile, widest_ = 0;
    int x_blocks_ = 0;
    size_t product_[2] = {}, g_[2] = {}, a_sums_ = 0, sizes_ = 0;
    bool gradients_ = false, parameters_ = false;
    bool simple_ = false;  // one kernel of one layer, whose parameters have no gradients
    bool sliced_ = false;  // its points are taken slice by slice
    bool splits_ = false;  // distances may be computed from split products
    bool strips_ = false;  // its values may be added up by strip_sums()

    // Of mmd_packed.h.
    struct Packed {
        char* at;                                                                              // the memory, or null
        size_t rows, norms, split_rows, split_columns, across, turned, sums, gradient, bytes;  // offsets in it
        int64_t points, stride;  // of an item, with gaps after its x and its y; values of a row
    };
    Packed packed_{};
    bool one_centre_ = true;  // for all pairs of a batch
    void lay_out_packed();
    Points<T> packed_points(int64_t batch, int64_t side, int64_t first) const;
    int64_t packed_at(int64_t batch, int64_t side, int64_t first) const;
    double* packed_sums(int64_t batch, int64_t side, int64_t first) const;
    T* packed_gradient(int64_t batch, int64_t side, int64_t first) const;
    Scratch pack_all();
    void put_packed() const;
    template <class F>
    void for_packed(double cost, size_t bytes, const F& f) const;

    // Of mmd_slices.h.
    struct Slices {  // offsets in a thread's scratch
        size_t a_rows, a_norms, a_split, b_rows, b_panels, b_norms, b_split, norms, z, k, a_gradient, b_gradient;
        int64_t count, block;  // slices, and rows of each
        int passes;            // of split products, or 0
    };
    Slices slices_{};
    bool takes_slices() const;
    int64_t most_in_slices() const;
    void lay_out_slices();
    T* slice_z(char* s, int64_t i, int64_t j) const;
    void compare_slices(int64_t batch, const Block& a, const Block& b, char* s) const;
    void multiply_slices(int64_t batch, const Block& a, const Block& b, char* s) const;
    template <class R>
    void sliced_task(int64_t batch, int64_t slot, const Block& a, const Block& b, char* s, R& reducer);
};

}  // namespace mmd
}  // namespace mmfast

#include "mmd/mmd_centres.h"
#include "mmd/mmd_packed.h"
#include "mmd/mmd_rounds.h"
#include "mmd/mmd_slices.h"
