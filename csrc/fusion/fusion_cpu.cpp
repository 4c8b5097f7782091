// Which thread computes what, and where the parts of a sum go.
#include "fusion/fusion.h"

#include <algorithm>
#include <array>
#include <memory>
#include <numeric>
#include <vector>

#include "common/cache.h"
#include "common/isa.h"
#include "common/work.h"
#include "fusion/fusion_tile.h"

namespace mmfast {
namespace fusion {
namespace {

template <class T>
const TileKernels<T>& kernels();

template <>
const TileKernels<float>& kernels() {
    static const TileKernels<float> k = [] {
        TileKernels<float> result{};
        MMFAST_FOR_ISA(best_isa(), fusion, forward_kernels_float)(result);
        MMFAST_FOR_ISA(best_isa(), fusion, backward_kernels_float)(result);
        MMFAST_FOR_ISA(best_isa(), fusion, weights_kernels_float)(result);
        return result;
    }();
    return k;
}

template <>
const TileKernels<double>& kernels() {
    static const TileKernels<double> k = [] {
        TileKernels<double> result{};
        MMFAST_FOR_ISA(best_isa(), fusion, forward_kernels_double)(result);
        MMFAST_FOR_ISA(best_isa(), fusion, backward_kernels_double)(result);
        MMFAST_FOR_ISA(best_isa(), fusion, weights_kernels_double)(result);
        return result;
    }();
    return k;
}

// Neighbouring heads that have the same keys in every source.
int64_t shared_heads(const Problem& p) {
    int64_t fold = p.heads;
    for (int j = 0; j < p.count; ++j) fold = std::gcd(fold, p.heads / p.sources[j].heads);
    return std::max<int64_t>(1, fold);
}

int64_t all_keys(const Problem& p) {
    int64_t total = 0;
    for (int j = 0; j < p.count; ++j) total += p.sources[j].keys;
    return total;
}

// With each source's filled up to whole tiles.
int64_t tiled_keys(const Problem& p) {
    int64_t total = 0;
    for (int j = 0; j < p.count; ++j) total += up_to_multiple(p.sources[j].keys, kTileKeys);
    return total;
}

// Whether all keys and values are read where they lie, each head's rows next to each other: copies give nothing then.
template <class T>
bool compact(const Problem& p) {
    const auto fits = [](const View& x, int64_t width) {
        return x.type == scalar_type_of<T>() && x.column == 1 && x.row == width;
    };
    bool result = p.value_dim * sizeof(T) % 512 != 0;  // else a head's values are copied after all: see in_place()
    for (int j = 0; j < p.count; ++j)
        result = result && fits(p.sources[j].key, p.dim) && fits(p.sources[j].value, p.value_dim);
    return result;
}

// Of fewer queries or features the tiles of the matrix unit would hold little else than zeros.
constexpr int64_t kMatrixRows = 16, kMatrixFeatures = 16;

// What the matrix unit does: nothing, keys that all stay in the second cache, or more of them: see fusion_matrix.cpp.
enum class Matrix { no, resident, streamed };

template <class T>
Matrix on_matrix_unit(const Problem& p) {
    const auto fits = [](const View& x) { return x.type == ScalarType::bfloat16 && x.column == 1; };
    bool result = sizeof(T) == 4 && matrix_kernels().panel && fits(p.query) &&
                  std::min(p.dim, p.value_dim) >= kMatrixFeatures && shared_heads(p) * p.rows >= kMatrixRows;
    const int64_t keys = all_keys(p);
    for (int j = 0; j < p.count; ++j) result = result && fits(p.sources[j].key) && fits(p.sources[j].value);
    if (!result || keys < kMatrixRows) return Matrix::no;
    return keys <= kResidentKeys ? Matrix::resident : p.decoupled ? Matrix::no : Matrix::streamed;
}

template <class T>
bool weighs_on_matrix_unit(const Problem& p) {
    return on_matrix_unit<T>(p) != Matrix::no && p.rows >= kMatrixRows;
}

int64_t divide_up(int64_t n, int64_t by) {
    return (n + by - 1) / by;
}

// Nanoseconds of one product of a panel with so many keys and features.
template <class T>
double cost_of(int64_t panel, int64_t keys, int64_t features) {
    const double multiply_adds = double(panel) * double(std::max<int64_t>(keys, 8)) * double(features);
    return multiply_adds / (sizeof(T) == 4 ? 20 : 8);
}

// From so many keys on the queries of one item go through them with all their heads: see the note [Wide].
constexpr int64_t kWideFrom = 96;
// Gradients of at most so many queries have features in the lanes, however few the keys; with more of them lanes of queries
// are full enough.
constexpr int64_t kFewGradientRows = 5;

// What items may keep in the second cache: of Order::wide, and of copies that all panels use.
int64_t wide_bytes() {
    return second_cache() / 8 * 5;
}
int64_t kept_bytes() {
    return second_cache() / 8 * 3;
}

// Items enough to keep the threads busy to the end.
int64_t wanted_items() {
    return 4 * max_threads();
}

// How many folds of heads an item has: see the notes [Heads of an item] and [Ahead]. `kept`: of each head's keys and values,
// how many times their size has to stay in the second cache until the last panel.
template <class T>
int64_t heads_together(const Problem& p, int64_t folds, int64_t panels, int64_t items, int64_t kept) {
    if (panels > 1 && p.query.row <= p.query.head) return 1;
    const int64_t bytes = all_keys(p) * (p.dim + p.value_dim) * int64_t(sizeof(T)) * kept;
    int64_t most = kept ? kept_bytes() / std::max<int64_t>(1, bytes) : folds;
    most = std::min(most, folds * p.batch * items / wanted_items());  // items enough for the threads
    const int64_t parts = divide_up(folds, std::clamp<int64_t>(most, 1, folds));
    return divide_up(folds, parts);
}

}  // namespace

// Note: [Few queries]
//   Items are panels of queries. Where there are fewer than threads could use, the keys are shared out too, and what the
//   shares give is merged: few queries read long keys at the speed of the memory, which takes all threads.
template <class T>
void forward_cpu(const Problem& p, const Target& out, T* lse) {
    if (p.batch * p.heads * p.rows == 0) return;
    const TileKernels<T>& k = kernels<T>();
    const Matrix by = on_matrix_unit<T>(p);
    const bool matrix = by != Matrix::no, streamed = by == Matrix::streamed;
    const int64_t panel_size = matrix ? matrix_kernels().panel : k.panel;
    const int64_t fold = shared_heads(p), folds = p.heads / fold, keys = all_keys(p);
    const int64_t panels = divide_up(fold * p.rows, panel_size), groups = p.batch * folds;
    const int64_t panel_rows = std::min(panel_size, fold * p.rows);
    const double cost = cost_of<T>(panel_rows, keys, p.dim + p.value_dim + 16);
    const int64_t threads = max_threads();
    const bool few = !matrix && fold * p.rows <= kFewRows && !p.decoupled;
    const bool single = few || (!matrix && fold * p.rows <= kSingleRows && !p.decoupled && keys > kWideFrom);
    int64_t splits = 1;
    const int64_t units = single ? p.batch : groups * panels;
    if (!p.decoupled && threads > 1 && units < wanted_items())
        splits = std::clamp<int64_t>(std::min(divide_up(wanted_items(), units), keys / 512), 1,
                                     std::max<int64_t>(1, int64_t(cost * double(single ? folds * panels : 1) / 50e3)));
    // Sums of very many keys keep their digits in parts.
    if (single) splits = std::max(splits, keys / 16384);
    ForwardJob<T> job{&p, fold, panels, out, lse, nullptr};
    const int64_t size = (p.value_dim + 2) * panel_size;
    const Scratch partial(splits > 1 ? size_t(groups * panels * splits * size) * sizeof(T) : 64);
    if (splits > 1) job.partial = reinterpret_cast<T*>(partial.data());
    const bool shared =
        !matrix && !single && panels > 1 && !p.decoupled && keys > kResidentKeys && splits == 1 && !compact<T>(p);
    const Order order = few ? Order::few : single || shared ? Order::wide : Order::panels;
    int64_t heads = single   ? heads_together<T>(p, folds, 1, splits, 0)
                    : shared ? folds
                             : heads_together<T>(p, folds, panels, panels * splits, panels > 1);
    // Neighbouring panels are one item: what is converted for the first serves the others.
    int64_t run =
        splits > 1 ? 1 : std::clamp<int64_t>(p.batch * divide_up(folds, heads) * panels / (8 * threads), 1, 8);
    if (order == Order::wide) {
        const int64_t row = std::max<int64_t>(1, (p.dim + p.value_dim) * int64_t(sizeof(T)));
        const int64_t lanes = up_to_multiple(panel_rows, 16);
        const int64_t most =
            std::clamp<int64_t>((wide_bytes() / row - kWideKeys) / lanes, 1, std::min(panels, kWideRows / panel_size));
        run = single ? panels : divide_up(panels, divide_up(panels, most));
        heads = std::clamp<int64_t>(wide_bytes() / ((run * lanes + kWideKeys) * row), 1, heads);
        if (shared) {  // items enough for the threads
            heads = std::clamp<int64_t>(groups * divide_up(panels, run) / wanted_items(), 1, heads);
            run = std::clamp<int64_t>(groups * panels / wanted_items(), 1, run);
        }
        heads = divide_up(folds, divide_up(folds, heads));
    }
    if (streamed) {
        heads = 1;
        run =
            std::clamp<int64_t>(groups * panels * splits / wanted_items(), 1, std::min(panels, kWideRows / panel_size));
        run = divide_up(panels, divide_up(panels, run));
    }
    const int64_t parts = divide_up(folds, heads), runs = divide_up(panels, run);
    const int64_t heads_kept = run > 1 || single || shared ? heads : 1;
    const size_t bytes = size_t(streamed ? matrix_kernels().forward_long_scratch(p, run)
                                : matrix ? matrix_kernels().forward_scratch(p, heads_kept)
                                         : k.forward_scratch(p, heads_kept, run, order)) *
                         sizeof(T);
    deal_out(p.batch * parts * runs * splits, cost * double(heads * run) / double(splits), bytes,
             [&](int64_t i, char* scratch) {
                 const int64_t split = i % splits, panel = i / splits % runs * run, part = i / splits / runs % parts;
                 const int64_t batch = i / splits / runs / parts, first = part * heads;
                 const Item item{batch,
                                 first * fold,
                                 std::min(heads, folds - first),
                                 panel,
                                 std::min(run, panels - panel),
                                 order,
                                 split,
                                 splits,
                                 ((batch * folds + first) * panels + panel) * splits + split};
                 if (item.heads <= 0) return;
                 if constexpr (sizeof(T) == 4) {
                     const MatrixKernels& m = matrix_kernels();
                     if (matrix)
                         return (streamed ? m.forward_long : m.forward)(job, item, reinterpret_cast<T*>(scratch));
                 }
                 k.forward(job, item, reinterpret_cast<T*>(scratch));
             });
    if (splits == 1) return;
    deal_out(groups * panels, double(size) * double(splits), bytes, [&](int64_t i, char* scratch) {
        const int64_t group = i / panels;
        const Item item{group / folds, group % folds * fold, 1, i % panels, 1, Order::panels, 0, splits, i * splits};
        k.merge(job, item, reinterpret_cast<T*>(scratch));
    });
}

namespace {

// Bytes of a result of which little is left in a second cache when it is done.
constexpr int64_t kLarge = 8 << 20;

// Runs of one gradient: the copies that items write, and their sum.
template <class T>
class Runs {
public:
    // sizes: batch, heads, rows, columns of the result. `writes_once`: no element is written twice, so that with one run
    // the result itself can be given out.
    Runs(const Target& result, const std::array<int64_t, 4>& sizes, int64_t runs, bool writes_once)
        : result_(result), sizes_(sizes), runs_(runs) {
        accumulator_.target = result;
        const int64_t size = sizes[0] * sizes[1] * sizes[2] * sizes[3];
        if (!result.data || (runs == 1 && writes_once)) {
            accumulator_.large = size * int64_t(sizeof(T)) >= kLarge;
            return;
        }
        accumulator_.add = !writes_once;
        if (runs == 1 && result.type == scalar_type_of<T>()) {
            for_rows([&](T* row, int64_t) { std::fill_n(row, sizes_[3], T(0)); });
            return;
        }
        copies_.reset(new Scratch(size_t(std::max<int64_t>(1, runs * size)) * sizeof(T)));
        T* const data = reinterpret_cast<T*>(copies_->data());
        if (accumulator_.add) std::fill_n(data, runs * size, T(0));
        accumulator_.target = {data, scalar_type_of<T>(), sizes[0] == 1 ? 0 : sizes[1] * sizes[2] * sizes[3],
                               sizes[2] * sizes[3], sizes[3]};
        accumulator_.run = size;
    }
    const Accumulator& accumulator() const { return accumulator_; }

    void sum() const {
        if (!copies_) return;
        dispatch(result_.type, [&](auto* kind) {
            using To = std::remove_pointer_t<decltype(kind)>;
            add_up<To>();
        });
    }

private:
    template <class To = T, class F>
    void for_rows(const F& f) const {
        const int64_t rows = sizes_[0] * sizes_[1] * sizes_[2];
        parallel_for(0, rows, 32768 / std::max<int64_t>(1, sizes_[3] * runs_) + 1, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; ++i)
                f(static_cast<To*>(result_.data) +
                      result_.at(i / sizes_[2] / sizes_[1], i / sizes_[2] % sizes_[1], i % sizes_[2]),
                  i);
        });
    }
    template <class To>
    void add_up() const {
        const T* const data = reinterpret_cast<const T*>(copies_->data());
        for_rows<To>([&](To* row, int64_t i) {
            for (int64_t k = 0; k < sizes_[3]; ++k) {
                T total = 0;
                for (int64_t r = 0; r < runs_; ++r) total += data[r * accumulator_.run + i * sizes_[3] + k];
                row[k] = To(total);
            }
        });
    }
    Target result_;
    std::array<int64_t, 4> sizes_;
    int64_t runs_;
    Accumulator accumulator_;
    std::unique_ptr<Scratch> copies_;
};

}  // namespace

// Note: [Who owns a gradient]
//   An item has some of the queries and some of the keys of heads that share their keys. Where it has all the queries, it
//   alone writes the gradients of its keys, straight into the result; where it has all the keys, those of its queries.
//   What several items contribute to is summed in copies, one for each, afterwards and in a fixed order: no atomics, and
//   no half precision before the end.
template <class T>
void backward_cpu(const Problem& p, const View& grad_out, const T* grad_lse, const View& out, const T* lse,
                  const Gradients<T>& gradients) {
    const TileKernels<T>& k = kernels<T>();
    const Matrix by = on_matrix_unit<T>(p);
    const bool matrix = by != Matrix::no && grad_out.type == ScalarType::bfloat16 && grad_out.column == 1 &&
                        (by == Matrix::resident || out.column == 1);
    const int64_t panel_size = matrix ? matrix_kernels().panel : k.panel;
    const int64_t fold = shared_heads(p), folds = p.heads / fold, keys = all_keys(p);
    const int64_t panels = divide_up(fold * p.rows, panel_size);
    // What pieces are taken from.
    const int64_t places = matrix ? tiled_keys(p) : keys;
    const bool streamed = matrix && by == Matrix::streamed;
    const int64_t pieces =
        std::max<int64_t>(1, streamed ? divide_up(places, kPieceKeys) : divide_up(keys, kResidentKeys));
    const int64_t piece_places = up_to_multiple(divide_up(places, pieces), 2 * kTileKeys);  // on the matrix unit
    bool own_keys = true;  // no two folds of heads have keys in common
    for (int j = 0; j < p.count; ++j) own_keys = own_keys && p.heads / p.sources[j].heads == fold;
    // Delta is taken from the output there: from a rounded one only where nothing else can be done.
    const bool narrow = fold * p.rows <= kFewGradientRows && out.type == scalar_type_of<T>();
    const bool few =
        !matrix && own_keys && !p.decoupled && panels == 1 && (narrow || (pieces > 1 && fold * p.rows <= kFewRows));
    const int64_t most_shares = fold * p.rows >= keys ? std::max<int64_t>(1, panels / 4) : 1;
    const int64_t heads = few ? heads_together<T>(p, folds, 1, pieces, 0)
                          : own_keys && pieces == 1
                              ? heads_together<T>(p, folds, panels, most_shares, panels > 1 ? 2 : 0)
                              : 1;
    const int64_t parts = divide_up(folds, heads), items = p.batch * parts;
    // Shares of the queries or of the keys, whichever there are more of.
    int64_t query_shares = 1, key_shares = 1;
    if (max_threads() > 1 && items && items < wanted_items() && (heads > 1 || items % max_threads())) {
        const int64_t shares = divide_up(wanted_items(), items);
        if (fold * p.rows >= keys) query_shares = std::min(most_shares, shares);
        else key_shares = std::min(pieces, shares);
    }
    BackwardJob<T> job{&p, fold, grad_out, out, lse, grad_lse, gradients.gates, {}, {}, {}};
    const bool shared_query = gradients.query_batch != p.batch;
    const Runs<T> query(gradients.query, {gradients.query_batch, p.heads, p.rows, p.dim},
                        key_shares * (shared_query ? p.batch : 1), pieces == key_shares);
    job.query = query.accumulator();
    std::vector<Runs<T>> by_key, by_value;
    by_key.reserve(p.count);
    by_value.reserve(p.count);
    for (int j = 0; j < p.count; ++j) {
        const Source& s = p.sources[j];
        const int64_t once = p.heads / s.heads / fold * query_shares;
        const int64_t kb = gradients.key_batch[j], vb = gradients.value_batch[j];
        by_key.emplace_back(gradients.key[j], std::array{kb, s.heads, s.keys, p.dim},
                            once * (kb != p.batch ? p.batch : 1), true);
        by_value.emplace_back(gradients.value[j], std::array{vb, s.heads, s.keys, p.value_dim},
                              once * (vb != p.batch ? p.batch : 1), true);
        job.key[j] = by_key.back().accumulator();
        job.value[j] = by_value.back().accumulator();
    }
    const size_t bytes =
        size_t(matrix ? matrix_kernels().backward_scratch(p, heads, piece_places) : k.backward_scratch(p, heads, few)) *
        sizeof(T);
    const int64_t per_share = divide_up(panels, query_shares), pieces_per_share = divide_up(pieces, key_shares);
    const double cost =
        cost_of<T>(panel_size, keys, 4 * (p.dim + p.value_dim)) * double(per_share) / double(key_shares);
    deal_out(items * query_shares * key_shares, cost * double(heads), bytes, [&](int64_t i, char* scratch) {
        const int64_t key_share = i % key_shares, query_share = i / key_shares % query_shares;
        const int64_t group = i / key_shares / query_shares, first = group % parts * heads;
        BackwardItem item{};
        item.batch = group / parts;
        item.head = first * fold;
        item.heads = std::min(heads, folds - first);
        if (item.heads <= 0) return;
        item.panel = std::min(panels, query_share * per_share);
        item.panels = std::min(panels - item.panel, per_share);
        item.few = few;
        item.query_run = (shared_query ? item.batch : 0) * key_shares + key_share;
        for (int j = 0; j < p.count; ++j) {
            const int64_t within = p.heads / p.sources[j].heads / fold, nth = item.head / fold % within;
            const auto run = [&](int64_t b) {
                return ((b != p.batch ? item.batch : 0) * within + nth) * query_shares + query_share;
            };
            item.key_run[j] = run(gradients.key_batch[j]);
            item.value_run[j] = run(gradients.value_batch[j]);
        }
        for (int64_t piece = key_share * pieces_per_share; piece < std::min(pieces, (key_share + 1) * pieces_per_share);
             ++piece) {
            const auto start = [&](int64_t nth) {
                return matrix ? std::min(places, piece_places * nth) : keys * nth / pieces;
            };
            item.first = start(piece);
            item.last = start(piece + 1);
            item.whole = pieces == 1;
            if constexpr (sizeof(T) == 4) {
                if (matrix) {
                    matrix_kernels().backward(job, item, reinterpret_cast<T*>(scratch));
                    continue;
                }
            }
            k.backward(job, item, reinterpret_cast<T*>(scratch));
        }
    });
    query.sum();
    for (const auto& runs : by_key) runs.sum();
    for (const auto& runs : by_value) runs.sum();
}

template <class T>
void weights_cpu(const Problem& p, const T* lse, bool mean, const Target* weights) {
    const TileKernels<T>& k = kernels<T>();
    WeightsJob<T> job{&p, lse, {}};
    std::copy_n(weights, p.count, job.weights);
    const bool matrix = weighs_on_matrix_unit<T>(p);
    const int64_t panel_size = matrix ? matrix_kernels().panel : k.panel;
    const int64_t panels = divide_up(p.rows, panel_size), heads = mean ? p.heads : 1,
                  groups = p.batch * p.heads / std::max<int64_t>(1, heads);
    // Neighbouring panels, for which keys are arranged once.
    int64_t run = matrix ? std::clamp<int64_t>(groups * panels / wanted_items(), 1, std::max<int64_t>(1, panels)) : 1;
    run = std::max<int64_t>(1, divide_up(panels, std::max<int64_t>(1, divide_up(panels, run))));
    const int64_t runs = divide_up(panels, run);
    const double cost = cost_of<T>(std::min(panel_size, p.rows), all_keys(p), p.dim + 16) * double(heads) * double(run);
    const size_t bytes = size_t(matrix ? matrix_kernels().weights_scratch(p, heads) : k.weights_scratch(p)) * sizeof(T);
    deal_out(groups * runs, cost, bytes, [&](int64_t i, char* scratch) {
        const int64_t group = i / runs, panel = i % runs * run;
        const WeightsItem item{mean ? group : group / p.heads, mean ? 0 : group % p.heads, heads, panel,
                               std::min(run, panels - panel)};
        if constexpr (sizeof(T) == 4) {
            if (matrix) return matrix_kernels().weights(job, item, reinterpret_cast<T*>(scratch));
        }
        k.weights(job, item, reinterpret_cast<T*>(scratch));
    });
}

// What the exponentials of a panel and their sums may take of the second cache: that of a panel of 64 queries and 1500 keys
// fits into 1 MiB.
int64_t weighing_bytes() {
    return second_cache() / 4 * 3;
}

template <class T>
bool weighs_at_once(const Problem& p, bool mean) {
    const int64_t panel = kernels<T>().panel;
    const int64_t items = p.batch * (mean ? 1 : p.heads) * divide_up(p.rows, panel);
    // Where heads share keys, or few queries read them, the kernels of forward_cpu that know it are the faster.
    return p.heads > 0 && !p.decoupled && p.rows > kFewRows && shared_heads(p) == 1 && !weighs_on_matrix_unit<T>(p) &&
           2 * all_keys(p) * panel * int64_t(sizeof(T)) <= weighing_bytes() &&
           (max_threads() == 1 || items >= wanted_items());
}

template <class T>
void forward_weighing_cpu(const Problem& p, const Target& out, T* lse, bool mean, const Target* weights) {
    const TileKernels<T>& k = kernels<T>();
    const int64_t panels = divide_up(p.rows, k.panel), heads = mean ? p.heads : 1, parts = p.heads / heads;
    const ForwardJob<T> job{&p, 1, panels, out, lse, nullptr};
    WeightsJob<T> by{&p, nullptr, {}};
    std::copy_n(weights, p.count, by.weights);
    const double cost = cost_of<T>(std::min(k.panel, p.rows), all_keys(p), p.dim + p.value_dim + 32) * double(heads);
    deal_out(p.batch * parts * panels, cost, size_t(k.weighing_scratch(p)) * sizeof(T), [&](int64_t i, char* scratch) {
        const int64_t part = i / panels % parts, batch = i / panels / parts;
        const Item item{batch, part * heads, heads, i % panels, 1, Order::panels, 0, 1, 0};
        k.forward_weighing(job, by, item, reinterpret_cast<T*>(scratch));
    });
}

template bool weighs_at_once<float>(const Problem&, bool);
template bool weighs_at_once<double>(const Problem&, bool);
template void forward_weighing_cpu(const Problem&, const Target&, float*, bool, const Target*);
template void forward_weighing_cpu(const Problem&, const Target&, double*, bool, const Target*);
template void forward_cpu(const Problem&, const Target&, float*);
template void forward_cpu(const Problem&, const Target&, double*);
template void weights_cpu(const Problem&, const float*, bool, const Target*);
template void weights_cpu(const Problem&, const double*, bool, const Target*);
template void backward_cpu(const Problem&, const View&, const float*, const View&, const float*,
                           const Gradients<float>&);
template void backward_cpu(const Problem&, const View&, const double*, const View&, const double*,
                           const Gradients<double>&);

}  // namespace fusion
}  // namespace mmfast
