// The reductions: what each does with a tile of kernel values, and with a tile of derivatives.
#include <limits>
#include <mutex>
#include <numeric>

#include "mmd/mmd_sweep.h"

namespace mmfast {
namespace mmd {

// ---- Kernels as they are computed ----------------------------------------------------------------------------------

// Note: [Chains]
//   exp(-2 g s) is the square of exp(-g s): Gaussians whose gammas are powers of two apart take one exp, of the widest, and
//   squarings, which also keep small what has become small. A squaring doubles the relative error: after the four that a
//   chain may take (DAN's five Gaussians) it is near 16 units in the last place.
template <class T>
Program<T> program_of(const Layer& layer) {
    Program<T> p{};
    p.metric = layer.metric;
    std::vector<const Term<double>*> gaussians;
    for (const Term<double>& t : layer.terms) {
        const Term<T> same{t.family, T(t.weight), T(t.gamma), T(t.offset), T(t.exponent)};
        p.term[p.terms++] = same;
        p.roots |= needs_root(t.family);
        if (t.family == Family::gaussian && p.chains + int(gaussians.size()) < Program<T>::kMostTerms)
            gaussians.push_back(&t);
        else p.other[p.others++] = same;
    }
    std::stable_sort(gaussians.begin(), gaussians.end(), [](auto* a, auto* b) { return a->gamma < b->gamma; });
    while (!gaussians.empty()) {
        if (p.chains == Program<T>::kMostChains) {
            for (auto* t : gaussians) p.other[p.others++] = {t->family, T(t->weight), T(t->gamma), T(0), T(0)};
            break;
        }
        Chain<T>& c = p.chain[p.chains++];
        std::vector<const Term<double>*> left;
        double last = gaussians[0]->gamma;
        int total = 0;
        c.exponent = T(-last);
        for (auto* t : gaussians) {
            const double ratio = last > 0 ? t->gamma / last : t->gamma == last ? 1 : 0;
            const int squarings = ratio >= 0.5 ? int(std::lround(std::log2(ratio))) : -1;
            if (c.count == Chain<T>::kMost || squarings < 0 || total + squarings > 4 ||
                std::abs(std::ldexp(1.0, squarings) - ratio) > 1e-9 * ratio) {
                left.push_back(t);
                continue;
            }
            total += squarings;
            c.squarings[c.count] = squarings;
            c.weight[c.count] = T(t->weight);
            c.slope[c.count++] = T(-t->weight * t->gamma);
            last = t->gamma;
        }
        gaussians = left;
    }
    const int* const squarings = p.chain[0].squarings;
    p.doubles = p.chains == 1 && p.others == 0 && squarings[0] == 0 &&
                std::all_of(squarings + 1, squarings + p.chain[0].count, [](int n) { return n == 1; });
    return p;
}

namespace {

constexpr bool kAll[3] = {true, true, true};

// to[batch][width] = the sums over the slots of each item of the batch.
void add_slots(const std::vector<double>& from, int64_t batch, int64_t width, double* to) {
    const int64_t slots = batch ? int64_t(from.size()) / (batch * width) : 0;
    std::fill_n(to, batch * width, 0.0);
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t i = 0; i < slots * width; ++i) to[b * width + i % width] += from[b * slots * width + i];
}

// Rows with room behind the last, so that a whole tile can be read from any place.
template <class T>
class Rows {
public:
    Rows(int64_t rows, int64_t width, int64_t stride)
        : width_(width), stride_(stride), data_((rows + kTile) * stride) {}
    void fill(const T* from, int64_t rows, int64_t column = 0) {
        for (int64_t i = 0; i < rows; ++i) std::copy_n(from + i * width_, width_, data_.data() + i * stride_ + column);
    }
    T* operator[](int64_t i) { return data_.data() + i * stride_; }
    const T* operator[](int64_t i) const { return data_.data() + i * stride_; }
    int64_t stride() const { return stride_; }

private:
    int64_t width_, stride_;
    std::vector<T> data_;
};

// What reducers have in common: nothing happens at the ends of a task, nothing is kept through it.
template <class T>
struct Reducer {
    size_t scratch_bytes(int64_t) const { return 0; }
    void begin(const Tile<T>&, int64_t) const {}
    void end(const Tile<T>&, int64_t) const {}
    void weigh(const Tile<T>& tile, int q, T* x) const { tiles<T>().multiply(tile.rows, tile.g[q], x); }
    // Whether a tile's values are only added up, the derivative by each being `factor`; then add() gets the sum.
    bool is_sum(const Tile<T>&, T&) const { return false; }
    void add(const Tile<T>&, double) const {}
};

// ---- Weighted sums -------------------------------------------------------------------------------------------------

template <class T>
class Quadratic : public Reducer<T> {
public:
    Quadratic(int64_t batch, int64_t slots, int64_t n, int64_t m, const T* wx, const T* wy, const double* coefs,
              const Gradients<T>& gradients)
        : n_{n, m}, coefs_(coefs), gradients_(gradients), sums_(slots * 3) {
        const T* const from[2] = {wx, wy};
        for (int side = 0; side < 2; ++side) {
            if (!from[side]) continue;
            // Whole tiles for each item: a NaN of the next would count even where the kernel's values are 0.
            stride_[side] = whole_tiles(n_[side]);
            weights_[side].resize(batch * stride_[side]);
            for (int64_t b = 0; b < batch; ++b)
                std::copy_n(from[side] + b * n_[side], n_[side], weights_[side].data() + b * stride_[side]);
        }
    }

    bool is_sum(const Tile<T>& t, T& factor) const {
        factor = this->factor(t);
        return weights_[0].empty() && weights_[1].empty() && !gradients_.weights_x && !gradients_.weights_y;
    }
    void add(const Tile<T>& t, double sum) { sums_[t.slot * 3 + kind(t)] += times(t) * sum; }

    void take(const Tile<T>& t) {
        const int kind = this->kind(t);
        const double times = this->times(t);
        const T *u = weights(t.batch, t.a, t.i0), *v = weights(t.batch, t.b, t.j0);
        double *const to_a = gradient(t.batch, t.a, t.i0), *const to_b = gradient(t.batch, t.b, t.j0);
        double rows[kTile] = {}, columns[kTile] = {};
        sums_[t.slot * 3 + kind] +=
            times * tiles<T>().reduce(t.rows, t.k[0], u, v, to_a ? rows : nullptr, to_b ? columns : nullptr, nullptr);
        for (int64_t i = 0; to_a && i < t.rows; ++i) to_a[i] += times * coefs_[kind] * rows[i];
        for (int64_t j = 0; to_b && j < t.columns; ++j) to_b[j] += times * coefs_[kind] * columns[j];
    }

    void weigh(const Tile<T>& t, int, T* x) const {
        tiles<T>().scale(t.rows, factor(t), weights(t.batch, t.a, t.i0), weights(t.batch, t.b, t.j0), x);
    }

    void put(int64_t batch, double* sums) const { add_slots(sums_, batch, 3, sums); }

private:
    static int kind(const Tile<T>& t) { return t.within() ? t.a : 2; }
    static double times(const Tile<T>& t) { return t.within() ? 2 : 1; }  // a pair stands for both its orders
    T factor(const Tile<T>& t) const { return T(coefs_[kind(t)] * times(t)); }
    const T* weights(int64_t batch, int side, int64_t i) const {
        return weights_[side].empty() ? nullptr : weights_[side].data() + batch * stride_[side] + i;
    }
    double* gradient(int64_t batch, int side, int64_t i) const {
        double* const to = side ? gradients_.weights_y : gradients_.weights_x;
        return to ? to + batch * n_[side] + i : nullptr;
    }

    const int64_t n_[2];
    const double* coefs_;
    const Gradients<T>& gradients_;
    int64_t stride_[2] = {};
    std::vector<T> weights_[2];  // [batch][stride]; none stand for ones
    std::vector<double> sums_;
};

// ---- Row sums, column sums, squares --------------------------------------------------------------------------------

template <class T>
struct Sums : Reducer<T> {
    int64_t n, m;
    double *rows, *columns;
    std::vector<double> squares;
    void take(const Tile<T>& t) {
        double column[kTile] = {}, square;
        tiles<T>().reduce(t.rows, t.k[0], nullptr, nullptr, rows + t.batch * n + t.i0, column, &square);
        double* const to = t.within() ? rows + t.batch * n : columns + t.batch * m;
        for (int64_t j = 0; j < t.columns; ++j) to[t.j0 + j] += column[j];
        squares[t.slot] += (t.within() ? 2 : 1) * square;
    }
};

template <class T>
struct SumsBackward : Reducer<T> {
    int64_t n, m;
    const double *rows, *columns, *squares;
    void take(const Tile<T>& t) {
        const double* const of = t.within() ? rows + t.batch * n : columns + t.batch * m;
        double column[kTile] = {};
        std::copy_n(of + t.j0, t.columns, column);
        const T twice = T((t.within() ? 4 : 2) * squares[t.batch]);
        tiles<T>().combine(t.rows, rows + t.batch * n + t.i0, column, twice, t.k[0], T(0), nullptr, t.g[0]);
        clear(t, t.g[0]);
    }
    static void clear(const Tile<T>& t, T* g) {
        for (int64_t i = 0; i < t.rows && t.columns < kTile; ++i)
            std::fill(g + i * kTile + t.columns, g + (i + 1) * kTile, T(0));
    }
};

// ---- K v -----------------------------------------------------------------------------------------------------------

template <class T>
struct MatMul : Reducer<T> {
    int64_t n, m;
    const Rows<T>& v;  // of all the batch
    Rows<T>& out;
    void take(const Tile<T>& t) {
        tiles<T>().product(false, t.rows, t.columns, v.stride(), t.k[0], v[t.batch * m + t.j0], v.stride(),
                           out[t.batch * n + t.i0], out.stride());
        if (t.within())
            tiles<T>().product(true, t.columns, t.rows, v.stride(), t.k[0], v[t.batch * m + t.i0], v.stride(),
                               out[t.batch * n + t.j0], out.stride());
    }
};

// The derivative by k_ij is grad_i . v_j, and with one set of points grad_j . v_i as well: products of the rows of `left`
// and `right`, which then hold both, one behind the other.
template <class T>
struct MatMulBackward : Reducer<T> {
    int64_t n, m, width;
    const Rows<T>&left, &right, &grad;
    Rows<T>& grad_v;
    size_t scratch_bytes(int64_t) const { return (kTile * 2 * padded<T>(width) + 2 * kTile) * sizeof(T); }
    void take(const Tile<T>& t) {
        const int64_t stride = padded<T>(width);
        T* const s = reinterpret_cast<T*>(t.scratch);
        const Points<T> b{s, s + kTile * stride, s + 2 * kTile * stride, stride};
        const Source from{right[t.batch * m], scalar_type_of<T>(), right.stride(), 1, width};
        tiles<T>().pack(from, t.j0, t.columns, nullptr, b);
        // Not changed, but Points are for writing as well.
        const Points<T> a{const_cast<T*>(left[t.batch * n + t.i0]), nullptr, nullptr, left.stride()};
        tiles<T>().compare(Metric::dot, false, width, a, 0, t.rows, b, t.columns, t.g[0]);
        SumsBackward<T>::clear(t, t.g[0]);
        tiles<T>().product(true, t.columns, t.rows, grad.stride(), t.k[0], grad[t.batch * n + t.i0], grad.stride(),
                           grad_v[t.batch * m + t.j0], grad_v.stride());
        if (t.within())
            tiles<T>().product(false, t.rows, t.columns, grad.stride(), t.k[0], grad[t.batch * n + t.j0], grad.stride(),
                               grad_v[t.batch * m + t.i0], grad_v.stride());
    }
};

// ---- Two kernels ---------------------------------------------------------------------------------------------------

template <class T>
struct Pair : Reducer<T> {
    int64_t n;
    double* rows[2];
    std::vector<double> products;
    void take(const Tile<T>& t) {
        for (int q = 0; q < 2; ++q) {
            double column[kTile] = {}, square;
            double* const to = rows[q] + t.batch * n;
            tiles<T>().reduce(t.rows, t.k[q], nullptr, nullptr, to + t.i0, column, &square);
            for (int64_t j = 0; j < t.columns; ++j) to[t.j0 + j] += column[j];
            products[t.slot * 3 + 1 + q] += 2 * square;
        }
        products[t.slot * 3] += 2 * tiles<T>().inner(t.rows, t.k[0], t.k[1]);
    }
};

template <class T>
struct PairBackward : Reducer<T> {
    int64_t n;
    const double* rows[2];
    const double* products;
    void take(const Tile<T>& t) {
        const double* const p = products + t.batch * 3;
        for (int q = 0; q < 2; ++q) {
            const double* const row = rows[q] + t.batch * n;
            double column[kTile] = {};
            std::copy_n(row + t.j0, t.columns, column);
            tiles<T>().combine(t.rows, row + t.i0, column, T(4 * p[1 + q]), t.k[q], T(2 * p[0]), t.k[1 - q], t.g[q]);
            SumsBackward<T>::clear(t, t.g[q]);
        }
    }
};

// ---- Permutations --------------------------------------------------------------------------------------------------

// Half of a' K a for many a at once: r = K a of the block's rows is kept through a task and multiplied by a at its end.
template <class T>
struct Permutations : Reducer<T> {
    const Rows<T>& members;       // [point][group], 0 or 1
    double* rows;                 // or null
    std::vector<double>& inside;  // [block][stride of members]
    size_t scratch_bytes(int64_t block) const { return block * members.stride() * sizeof(T); }
    void begin(const Tile<T>& t, int64_t count) const {
        std::fill_n(reinterpret_cast<T*>(t.scratch), count * members.stride(), T(0));
    }
    void take(const Tile<T>& t) {
        if (rows) {
            double column[kTile] = {};
            tiles<T>().reduce(t.rows, t.k[0], nullptr, nullptr, rows + t.i0, column, nullptr);
            for (int64_t j = 0; j < t.columns; ++j) rows[t.j0 + j] += column[j];
        }
        T* const r = reinterpret_cast<T*>(t.scratch) + (t.i0 - t.first) * members.stride();
        tiles<T>().product(false, t.rows, t.columns, members.stride(), t.k[0], members[t.j0], members.stride(), r,
                           members.stride());
    }
    void end(const Tile<T>& t, int64_t count) {
        const T* const r = reinterpret_cast<const T*>(t.scratch);
        double* const to = inside.data() + t.slot * members.stride();
        for (int64_t i = 0; i < count; ++i)
            for (int64_t g = 0; g < members.stride(); ++g)
                to[g] += double(2 * members[t.first + i][g] * r[i * members.stride() + g]);
    }
};

// ---- Order statistics ----------------------------------------------------------------------------------------------

// The order of the bits of what is not negative is the order of the values; NaN, of either sign, comes behind infinity.
template <class T>
auto bits_of(T x) {
    std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t> u;
    x = x == x ? x + T(0) : std::numeric_limits<T>::quiet_NaN();
    std::memcpy(&u, &x, sizeof u);
    return u;
}

// Counts, for each place that is sought, the values that begin with the bits known so far by their next bits.
template <class T>
struct Select : Reducer<T> {
    using Bits = decltype(bits_of(T()));
    static constexpr int kAtOnce = 12, kAll = int(8 * sizeof(T));
    struct Sought {
        Bits prefix;
        int64_t place;
        int64_t pair[2];
    };
    std::vector<Sought> sought;
    int known = 0;  // bits
    std::vector<std::vector<int64_t>> counts;
    std::mutex lock;

    int next() const { return std::min(kAtOnce, kAll - known); }
    void take(const Tile<T>& t) {
        const int shift = kAll - known - next();
        const T* const z = t.z;
        for (size_t r = 0; r < sought.size(); ++r) {
            if (known == kAll) {
                find(t, sought[r]);
                continue;
            }
            const bool repeated = r > 0 && sought[r].prefix == sought[r - 1].prefix;
            if (repeated) continue;
            std::vector<int32_t> here(size_t(1) << next());
            for (int64_t i = 0; i < t.rows; ++i)
                for (int64_t j = t.diagonal ? i + 1 : 0; j < t.columns; ++j) {
                    const Bits u = bits_of(z[i * kTile + j]);
                    if (known && (u >> (kAll - known)) != sought[r].prefix) continue;
                    ++here[(u >> shift) & ((Bits(1) << next()) - 1)];
                }
            const std::lock_guard guard(lock);
            for (size_t i = 0; i < here.size(); ++i) counts[r][i] += here[i];
        }
    }
    // The first such pair, whoever meets it.
    void find(const Tile<T>& t, Sought& s) {
        for (int64_t i = 0; i < t.rows; ++i)
            for (int64_t j = t.diagonal ? i + 1 : 0; j < t.columns; ++j) {
                if (bits_of(t.z[i * kTile + j]) != s.prefix) continue;
                const int64_t pair[2] = {t.i0 + i, t.j0 + j};
                const std::lock_guard guard(lock);
                if (s.pair[0] < 0 || std::lexicographical_compare(pair, pair + 2, s.pair, s.pair + 2))
                    std::copy_n(pair, 2, s.pair);
            }
    }
    void advance() {
        const int bits = next();
        for (size_t r = 0; r < sought.size(); ++r) {
            const size_t from = first_like(r);
            int64_t i = 0;
            while (i + 1 < (int64_t(1) << bits) && sought[r].place >= counts[from][i])
                sought[r].place -= counts[from][i++];
            pending_.push_back((sought[r].prefix << bits) | Bits(i));
        }
        for (size_t r = 0; r < sought.size(); ++r) sought[r].prefix = pending_[r];
        pending_.clear();
        known += bits;
        for (auto& c : counts) std::fill(c.begin(), c.end(), 0);
    }

private:
    size_t first_like(size_t r) const {
        while (r > 0 && sought[r].prefix == sought[r - 1].prefix) --r;
        return r;
    }
    std::vector<Bits> pending_;
};

}  // namespace

// ---- The operations ------------------------------------------------------------------------------------------------

template <class T>
void quadratic_cpu(int64_t batch, const Kernel& kernel, const Set& x, const Set& y, const T* wx, const T* wy,
                   const double* coefs, bool all_sums, double* sums, const Gradients<T>& gradients) {
    Sweep<T> sweep(batch, Pairs::within_and_between, {{kernel, &x, &y, gradients}}, true);
    const bool wanted[3] = {all_sums || coefs[0] != 0, all_sums || coefs[1] != 0, all_sums || coefs[2] != 0};
    const bool flat = !gradients.x && !gradients.y && !gradients.weights_x && !gradients.weights_y;
    const auto rounds = sweep.rounds(wanted, flat);
    Quadratic<T> reducer(batch, sweep.slots(rounds), x.count, y.count, wx, wy, coefs, gradients);
    sweep.run(reducer, rounds);
    reducer.put(batch, sums);
}

// Of parts that stay in the second cache: their own means and the squares about these, then what the means differ by (Chan,
// Golub & LeVeque 1983). Which parts there are depends on the sizes alone.
template <class T>
double squares_about_mean_cpu(int64_t dimension, const Set& x, const Set& y) {
    constexpr int64_t kPart = int64_t(1) << 17, kMostParts = 256;  // bytes
    struct Part {
        const Set* set;
        int64_t first, count;
        double squares;
    };
    const int64_t all = x.count + y.count, row = std::max<int64_t>(dimension, 1) * int64_t(sizeof(T));
    const int64_t rows = std::max({int64_t(1), kPart / row, (all + kMostParts - 1) / kMostParts});
    std::vector<Part> parts;
    for (const Set* s : {&x, &y})
        for (int64_t i = 0; i < s->count; i += rows) parts.push_back({s, i, std::min(rows, s->count - i), 0});
    std::vector<double> means(parts.size() * dimension);
    deal_out(int64_t(parts.size()), 0.6 * double(rows * dimension), 64, [&](int64_t i, char*) {
        Part& p = parts[i];
        const T* const from = static_cast<const T*>(p.set->data) + p.first * p.set->row_stride;
        double* const mean = means.data() + i * dimension;
        tiles<T>().add_rows(p.count, dimension, from, p.set->row_stride, mean);
        for (int64_t k = 0; k < dimension; ++k) mean[k] /= double(p.count);
        p.squares = tiles<T>().squares_about(p.count, dimension, from, p.set->row_stride, mean);
    });
    double squares = 0;
    for (const Part& p : parts) squares += p.squares;
    for (int64_t k = 0; k < dimension; ++k) {
        double mean = 0;
        for (size_t i = 0; i < parts.size(); ++i) mean += means[i * dimension + k] * double(parts[i].count);
        mean /= double(all);
        for (size_t i = 0; i < parts.size(); ++i) {
            const double apart = means[i * dimension + k] - mean;
            squares += apart * apart * double(parts[i].count);
        }
    }
    return squares;
}

template <class T>
void sums_cpu(int64_t batch, const Kernel& kernel, const Set& x, const Set& y, bool symmetric, double* rows,
              double* columns, double* squares) {
    Sweep<T> sweep(batch, symmetric ? Pairs::within_x : Pairs::between, {{kernel, &x, symmetric ? nullptr : &y, {}}});
    std::fill_n(rows, batch * x.count, 0.0);
    if (!symmetric) std::fill_n(columns, batch * y.count, 0.0);
    const auto rounds = sweep.rounds(kAll);
    Sums<T> reducer{{}, x.count, y.count, rows, columns, std::vector<double>(sweep.slots(rounds))};
    sweep.run(reducer, rounds);
    add_slots(reducer.squares, batch, 1, squares);
}

template <class T>
void sums_backward_cpu(int64_t batch, const Kernel& kernel, const Set& x, const Set& y, bool symmetric,
                       const double* rows, const double* columns, const double* squares,
                       const Gradients<T>& gradients) {
    Sweep<T> sweep(batch, symmetric ? Pairs::within_x : Pairs::between,
                   {{kernel, &x, symmetric ? nullptr : &y, gradients}});
    SumsBackward<T> reducer{{}, x.count, y.count, rows, columns, squares};
    sweep.run(reducer, sweep.rounds(kAll));
}

template <class T>
void matmul_cpu(int64_t batch, const Kernel& kernel, const Set& x, const Set& y, bool symmetric, const T* v,
                int64_t width, T* out) {
    const Set& columns = symmetric ? x : y;
    Rows<T> values(batch * columns.count, width, padded<T>(width)), result(batch * x.count, width, padded<T>(width));
    values.fill(v, batch * columns.count);
    Sweep<T> sweep(batch, symmetric ? Pairs::within_x : Pairs::between, {{kernel, &x, symmetric ? nullptr : &y, {}}});
    MatMul<T> reducer{{}, x.count, columns.count, values, result};
    sweep.run(reducer, sweep.rounds(kAll));
    for (int64_t i = 0; i < batch * x.count; ++i) std::copy_n(result[i], width, out + i * width);
}

template <class T>
void matmul_backward_cpu(int64_t batch, const Kernel& kernel, const Set& x, const Set& y, bool symmetric, const T* v,
                         const T* grad, int64_t width, T* grad_v, const Gradients<T>& gradients) {
    const int64_t n = x.count, m = symmetric ? n : y.count, both = symmetric ? 2 * width : width;
    Rows<T> left(batch * n, width, padded<T>(both)), right(batch * m, width, padded<T>(both));
    Rows<T> plain(batch * n, width, padded<T>(width)), result(batch * m, width, padded<T>(width));
    left.fill(grad, batch * n);
    right.fill(v, batch * m);
    if (symmetric) {
        left.fill(v, batch * n, width);
        right.fill(grad, batch * m, width);
    }
    plain.fill(grad, batch * n);
    Sweep<T> sweep(batch, symmetric ? Pairs::within_x : Pairs::between,
                   {{kernel, &x, symmetric ? nullptr : &y, gradients}});
    MatMulBackward<T> reducer{{}, n, m, both, left, right, plain, result};
    sweep.run(reducer, sweep.rounds(kAll));
    for (int64_t i = 0; grad_v && i < batch * m; ++i) std::copy_n(result[i], width, grad_v + i * width);
}

template <class T>
void pair_cpu(int64_t batch, const Kernel& kernel_x, const Set& x, const Kernel& kernel_y, const Set& y, double* rows_x,
              double* rows_y, double* products) {
    Sweep<T> sweep(batch, Pairs::within_x, {{kernel_x, &x, nullptr, {}}, {kernel_y, &y, nullptr, {}}});
    std::fill_n(rows_x, batch * x.count, 0.0);
    std::fill_n(rows_y, batch * x.count, 0.0);
    const auto rounds = sweep.rounds(kAll);
    Pair<T> reducer{{}, x.count, {rows_x, rows_y}, std::vector<double>(sweep.slots(rounds) * 3)};
    sweep.run(reducer, rounds);
    add_slots(reducer.products, batch, 3, products);
}

template <class T>
void pair_backward_cpu(int64_t batch, const Kernel& kernel_x, const Set& x, const Kernel& kernel_y, const Set& y,
                       const double* rows_x, const double* rows_y, const double* products,
                       const Gradients<T>& gradients_x, const Gradients<T>& gradients_y) {
    Sweep<T> sweep(batch, Pairs::within_x,
                   {{kernel_x, &x, nullptr, gradients_x}, {kernel_y, &y, nullptr, gradients_y}});
    PairBackward<T> reducer{{}, x.count, {rows_x, rows_y}, products};
    sweep.run(reducer, sweep.rounds(kAll));
}

template <class T>
void permutations_cpu(const Kernel& kernel, const Set& z, const uint8_t* members, int64_t groups, double* inside,
                      double* rows) {
    // As many at once as stay in the second cache beside the points; the kernel is computed once for each run of them.
    constexpr int64_t kAtOnce = 1024;
    std::fill_n(rows, z.count, 0.0);
    for (int64_t first = 0; first == 0 || first < groups; first += kAtOnce) {
        const int64_t count = std::min(kAtOnce, groups - first);
        Rows<T> a(z.count, count, padded<T>(count));
        for (int64_t g = 0; g < count; ++g)
            for (int64_t i = 0; i < z.count; ++i) a[i][g] = T(members[(first + g) * z.count + i] != 0);
        Sweep<T> sweep(1, Pairs::within_x, {{kernel, &z, nullptr, {}}});
        const auto rounds = sweep.rounds(kAll);
        std::vector<double> sums(sweep.slots(rounds) * a.stride());
        Permutations<T> reducer{{}, a, first ? nullptr : rows, sums};
        sweep.run(reducer, rounds);
        for (int64_t g = 0; g < count; ++g) {
            inside[first + g] = 0;
            for (size_t at = g; at < sums.size(); at += a.stride()) inside[first + g] += sums[at];
        }
    }
}

template <class T>
void select_cpu(const Set& x, const Set& y, int64_t dimension, bool symmetric, const std::vector<int64_t>& places,
                T* values, int64_t* pairs) {
    // Distances as those kernels need them that are functions of the root; the kernel itself is not looked at.
    const Kernel kernel{{{Metric::l2, dimension, {{Family::energy, 1, 0, 0, 0}}}}};
    Sweep<T> sweep(1, symmetric ? Pairs::within_x : Pairs::between, {{kernel, &x, symmetric ? nullptr : &y, {}}});
    const auto rounds = sweep.rounds(kAll, true);
    Select<T> reducer;
    std::vector<size_t> order(places.size());
    std::iota(order.begin(), order.end(), size_t(0));
    std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return places[a] < places[b]; });
    for (const size_t i : order) reducer.sought.push_back({0, places[i], {-1, -1}});
    reducer.counts.assign(places.size(), std::vector<int64_t>(size_t(1) << Select<T>::kAtOnce));
    while (reducer.known < Select<T>::kAll) {
        sweep.run(reducer, rounds);
        reducer.advance();
    }
    sweep.run(reducer, rounds);
    for (size_t r = 0; r < order.size(); ++r) {
        std::memcpy(values + order[r], &reducer.sought[r].prefix, sizeof(T));
        std::copy_n(reducer.sought[r].pair, 2, pairs + 2 * order[r]);
    }
}

#define MMFAST_INSTANTIATE(T)                                                                                         \
    template void quadratic_cpu<T>(int64_t, const Kernel&, const Set&, const Set&, const T*, const T*, const double*, \
                                   bool, double*, const Gradients<T>&);                                               \
    template double squares_about_mean_cpu<T>(int64_t, const Set&, const Set&);                                       \
    template void sums_cpu<T>(int64_t, const Kernel&, const Set&, const Set&, bool, double*, double*, double*);       \
    template void sums_backward_cpu<T>(int64_t, const Kernel&, const Set&, const Set&, bool, const double*,           \
                                       const double*, const double*, const Gradients<T>&);                            \
    template void matmul_cpu<T>(int64_t, const Kernel&, const Set&, const Set&, bool, const T*, int64_t, T*);         \
    template void matmul_backward_cpu<T>(int64_t, const Kernel&, const Set&, const Set&, bool, const T*, const T*,    \
                                         int64_t, T*, const Gradients<T>&);                                           \
    template void pair_cpu<T>(int64_t, const Kernel&, const Set&, const Kernel&, const Set&, double*, double*,        \
                              double*);                                                                               \
    template void pair_backward_cpu<T>(int64_t, const Kernel&, const Set&, const Kernel&, const Set&, const double*,  \
                                       const double*, const double*, const Gradients<T>&, const Gradients<T>&);       \
    template void permutations_cpu<T>(const Kernel&, const Set&, const uint8_t*, int64_t, double*, double*);          \
    template void select_cpu<T>(const Set&, const Set&, int64_t, bool, const std::vector<int64_t>&, T*, int64_t*);
MMFAST_INSTANTIATE(float)
MMFAST_INSTANTIATE(double)
#undef MMFAST_INSTANTIATE

}  // namespace mmd
}  // namespace mmfast
