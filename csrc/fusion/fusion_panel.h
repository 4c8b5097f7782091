// What forward and backward kernels share: rows of a panel, packing, and the scores of a block of keys.
//
// Note: [Lanes are queries]
//   All tiles have the queries of a panel along the lanes and keys or features along the other side. Maxima, sums and
//   exponentials of a softmax then need no exchange between lanes, keys and values are read where they lie as the
//   broadcast side of a product (common/product.h), and a head of 6 features costs 6 multiply-adds, not 16.
//   Rows of a tile are as wide as the vectors that the queries fill, or a narrow panel would use a part of the cache.
#pragma once

#include <limits>

#include "common/convert.h"
#include "common/product.h"
#include "fusion/fusion_tile.h"

namespace mmfast {
namespace fusion {
namespace MMFAST_ISA {
namespace {

template <class T>
using Vec = typename Simd<T>::V;

// Vectors of a panel: more than a product keeps in registers where those are few, as the gradients of keys are sums over the
// queries of a panel, which are read and written once for each.
constexpr int kPanelWidth = 4;
template <class T>
constexpr int64_t kPanel = kPanelWidth * Simd<T>::lanes;

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

template <class T>
MMFAST_INLINE T infinity() {
    return T(__builtin_inff());
}

// What backward passes subtract from scores, which have the factor log2 e too. Without keys every probability is 0:
// exp(-inf - inf).
template <class T>
MMFAST_INLINE T shift_of(T lse) {
    const T shift = lse * T(kLog2e), lowest = std::numeric_limits<T>::lowest();
    return lse == -infinity<T>() ? infinity<T>() : shift < lowest ? lowest : shift;
}

// Calls f<S>() for the number of vectors that n lanes fill, kMost at most.
template <class T, int kMost = kPanelWidth, class F>
MMFAST_INLINE void for_width(int64_t n, const F& f) {
    const int64_t vectors = (n + Simd<T>::lanes - 1) / Simd<T>::lanes;
    if constexpr (kMost >= 4) {
        if (vectors == 4) return f.template operator()<4>();
        if (vectors == 3) return f.template operator()<3>();
    }
    if (vectors == 2) return f.template operator()<2>();
    f.template operator()<1>();
}

// As product_strip, of any number of vectors a row; `between` is called as often as by one strip.
template <class T, int S, bool kTransposed, class F = Nothing, class E = Unchanged>
MMFAST_INLINE void product_panel(int64_t rows, int64_t depth, const T* a, int64_t a_stride, const T* b,
                                 int64_t b_stride, T* c, int64_t c_stride, Start start, const T* factor = nullptr,
                                 F&& between = {}, E&& finish = {}) {
    constexpr int kFirst = smaller(S, kProductWidth), kAt = kFirst * Simd<T>::lanes;
    product_strip<T, kFirst, kTransposed>(rows, depth, a, a_stride, b, b_stride, c, c_stride, start, factor, between,
                                          finish);
    if constexpr (S > kFirst) {
        const auto of_rest = [&](Vec<T> x, int v, T* to) MMFAST_LAMBDA { return finish(x, kFirst + v, to); };
        product_panel<T, S - kFirst, kTransposed>(rows, depth, a, a_stride, b + kAt, b_stride, c + kAt, c_stride, start,
                                                  factor ? factor + kAt : nullptr, Nothing(), of_rest);
    }
}

// c[rows][width] = or += a[rows][depth] b[depth][width] with features in the lanes; `width` in whole vectors.
template <class T, bool kTransposed, class F = Nothing>
void product_rows(int64_t rows, int64_t depth, int64_t width, const T* a, int64_t a_stride, const T* b,
                  int64_t b_stride, T* c, int64_t c_stride, Start start, F&& between = {}) {
    constexpr int64_t N = Simd<T>::lanes;
    for (int64_t at = 0; at < width;) {
        const int64_t vectors = smaller(kProductWidth, (width - at) / N);
        for_width<T, kProductWidth>(vectors * N, [&]<int S>() MMFAST_LAMBDA {
            product_strip<T, S, kTransposed>(rows, depth, a, a_stride, b + at, b_stride, c + at, c_stride, start,
                                             nullptr, between);
        });
        at += vectors * N;
    }
}

// The queries in the lanes of a panel.
struct Rows {
    int64_t n, last;  // number; largest row
    bool one_head;
    int64_t head[64], row[64];
};

template <class T>
MMFAST_INLINE void set_rows(const Problem& p, int64_t fold, int64_t head, int64_t panel, Rows& rows) {
    const int64_t first = panel * kPanel<T>;
    rows.n = smaller(kPanel<T>, fold * p.rows - first);
    rows.last = 0;
    head += first / p.rows;
    for (int64_t r = 0, row = first % p.rows; r < rows.n; row = 0, ++head) {
        const int64_t here = smaller(rows.n - r, p.rows - row);
        for (int64_t i = 0; i < here; ++i) {
            rows.head[r + i] = head;
            rows.row[r + i] = row + i;
        }
        r += here;
        rows.last = larger(rows.last, row + here - 1);
    }
    rows.one_head = rows.head[0] == rows.head[rows.n - 1];
}

// offsets[r]: where row r lies in x, a View or Target.
template <class X>
MMFAST_INLINE void set_offsets(const X& x, int64_t batch, const Rows& rows, int64_t* offsets) {
    const int64_t first = x.at(batch, rows.head[0], rows.row[0]);
    if (rows.one_head)
        for (int64_t r = 0; r < rows.n; ++r) offsets[r] = first + r * x.row;
    else
        for (int64_t r = 0; r < rows.n; ++r) offsets[r] = x.at(batch, rows.head[r], rows.row[r]);
}

// Note: [Ahead]
//   Projections leave the heads inside the rows: of a row a head has a few lines, and its part of the next row is a page or
//   so away, where no hardware prefetcher follows; waiting for memory then takes longer than the products. So what the
//   next block of keys or the next head will read is asked for into the second cache, some rows before each block of a
//   product: not more at a time than the core can have on the way.
class Ahead {
public:
    // `rows` rows of `bytes`, `stride` bytes apart.
    void add(const char* first, int64_t stride, int64_t rows, int64_t bytes) {
        if (next_ == count_) next_ = count_ = 0;
        if (count_ == kMost || rows <= 0 || bytes <= 0) return;
        if (stride == bytes) {  // one piece of memory, perhaps asked for a little beyond its end
            rows = (rows * bytes + 255) / 256;
            stride = bytes = 256;
        }
        parts_[count_++] = {first, stride, rows, bytes};
        lines_ += rows * (bytes / 64 + 1);
    }
    // The same of a View or Target.
    template <class X>
    void add(const X& x, int64_t batch, int64_t head, int64_t first, int64_t rows, int64_t columns) {
        if (x.column > 1) return;
        const int64_t size = x.type == ScalarType::float64 ? 8 : x.type == ScalarType::float32 ? 4 : 2;
        add(static_cast<const char*>(x.data) + x.at(batch, head, first) * size, x.row * size, rows, columns * size);
    }
    // What was added is to be asked for in so many steps.
    void spread(int64_t steps) { step_ = next_ < count_ ? lines_ / steps + 1 : 0; }
    MMFAST_INLINE void operator()() {
        if (step_) step();
    }

private:
    struct Part {
        const char* first;
        int64_t stride, rows, bytes;
    };
    // Rows until their lines are as many as asked for; out of line, where all of it stays in registers.
    __attribute__((noinline)) void step() {
        int64_t lines = step_;
        for (; next_ < count_; ++next_) {
            Part& part = parts_[next_];
            const char* first = part.first;
            int64_t rows = part.rows;
            for (; rows > 0 && lines > 0; --rows, first += part.stride)
                for (const char* at = first - reinterpret_cast<uintptr_t>(first) % 64; at < first + part.bytes;
                     at += 64) {
                    __builtin_prefetch(at, 0, 2);
                    --lines;
                }
            part.first = first;
            part.rows = rows;
            if (rows > 0) break;
        }
        lines_ -= step_ - lines;
        if (next_ == count_) step_ = lines_ = 0;
    }
    static constexpr int kMost = 4 * kMostSources;
    Part parts_[kMost];
    int next_ = 0, count_ = 0;
    int64_t lines_ = 0, step_ = 0;  // to go, and a call
};

// ---- Packing -------------------------------------------------------------------------------------------------------

// A boolean mask as what is added to the scores.
struct Allowed {
    uint8_t value;
    template <class T>
    MMFAST_INLINE operator T() const {
        return value ? T(0) : -infinity<T>();
    }
};

template <class T, class From>
MMFAST_INLINE Vec<T> load_columns(const From* p, int64_t n) {
    if constexpr (std::is_same_v<From, Allowed>) {
        typename VectorOf<int8_t, Simd<T>::lanes>::type part{};
        if (n >= Simd<T>::lanes) __builtin_memcpy(&part, p, sizeof part);
        else
            for (int i = 0; i < n; ++i) part[i] = int8_t(p[i].value);
        return __builtin_convertvector(part, typename Simd<T>::I) != 0 ? Vec<T>{} : Simd<T>::splat(-infinity<T>());
    } else {
        return load_as<T>(p, n);
    }
}

// Calls f with a null pointer of the type that queries, keys, values and outputs are stored in if T is computed in.
template <class T, class F>
MMFAST_INLINE void dispatch(ScalarType type, const F& f) {
    if constexpr (sizeof(T) == 8) f(static_cast<double*>(nullptr));
    else if (type == ScalarType::bfloat16) f(static_cast<BFloat16*>(nullptr));
    else if (type == ScalarType::float16) f(static_cast<Float16*>(nullptr));
    else f(static_cast<float*>(nullptr));
}

// Masks may be of any type, whatever the queries are.
template <class F>
MMFAST_INLINE void dispatch_mask(const View& v, const F& f) {
    if (v.boolean) f(static_cast<Allowed*>(nullptr));
    else if (v.type == ScalarType::float64) f(static_cast<double*>(nullptr));
    else dispatch<float>(v.type, f);
}

template <class T, class From>
MMFAST_INLINE void pack_columns_of(const From* data, const int64_t* offsets, int64_t n, int64_t step, int64_t count,
                                   T factor, T* to, int64_t width = 0) {
    constexpr int64_t N = Simd<T>::lanes;
    const int64_t W = larger(width, up_to_multiple(n, N));
    for (int64_t v = 0; v < n; v += N) {
        const int64_t lanes = smaller(N, n - v);
        const From* rows[N];
        for (int64_t i = 0; i < N; ++i) rows[i] = data + offsets[v + (i < lanes ? i : 0)];
        if (step != 1) {
            for (int64_t k = 0; k < count; ++k) {
                alignas(64) T part[N] = {};
                for (int64_t i = 0; i < lanes; ++i) part[i] = T(rows[i][k * step]) * factor;
                Simd<T>::store(to + k * W + v, Simd<T>::load(part));
            }
            continue;
        }
        const auto put = [&](int64_t k, Vec<T> column) MMFAST_LAMBDA {
            Vec<T> x = column * factor;
            if (lanes < N)
                for (int64_t l = lanes; l < N; ++l) x[l] = 0;
            Simd<T>::store(to + k * W + v, x);
        };
        // As many columns at a time as are transposed in registers, their number known to the compiler.
        constexpr bool kDirect =
            sizeof(From) == sizeof(T) && !std::is_integral_v<From> && !std::is_same_v<From, Allowed>;
        constexpr int64_t kColumns = kDirect && sizeof(T) == 4 && N == 16 ? 4 : N;
        int64_t k = 0;
        const auto group = [&](int64_t some) MMFAST_LAMBDA {
            Vec<T> columns[N];
            if constexpr (kDirect) {
                Simd<T>::load_transposed(reinterpret_cast<const T* const*>(rows), k, columns, some);
            } else {
                for (int64_t i = 0; i < N; ++i) columns[i] = load_columns<T>(rows[i] + k, count - k);
                Simd<T>::transpose(columns);
            }
            for (int64_t i = 0; i < some; ++i) put(k + i, columns[i]);
        };
        for (; k + kColumns <= count; k += kColumns) group(kColumns);
        if (k < count) group(count - k);
    }
}

// to[column][lane] = factor * x[row][column], zero in the lanes behind the rows as far as they fill vectors; `width` lanes from
// one column to the next, or as many as these.
template <class T, bool kMask = false>
void pack_columns(const View& x, int64_t batch, const Rows& rows, int64_t first, int64_t count, T factor, T* to,
                  int64_t width = 0) {
    int64_t offsets[64];
    set_offsets(x, batch, rows, offsets);
    const auto pack = [&](auto* kind) MMFAST_LAMBDA {
        using From = std::remove_pointer_t<decltype(kind)>;
        const From* const data = static_cast<const From*>(x.data) + first * x.column;
        pack_columns_of<T>(data, offsets, rows.n, x.column, count, factor, to, width);
    };
    if constexpr (kMask) dispatch_mask(x, pack);
    else dispatch<T>(x.type, pack);
}

// A vector of n elements at most, `step` apart.
template <class T, class From>
MMFAST_INLINE Vec<T> load_step(const From* p, int64_t step, int64_t n) {
    if (step == 1) return load_as<T>(p, n);
    alignas(64) T part[Simd<T>::lanes] = {};
    for (int64_t i = 0; i < smaller(n, Simd<T>::lanes); ++i) part[i] = T(p[i * step]);
    return Simd<T>::load(part);
}

template <class T, class From>
MMFAST_INLINE void pack_row(const From* from, int64_t step, int64_t count, int64_t width, T factor, T* to) {
    constexpr int64_t N = Simd<T>::lanes;
    int64_t k = 0;
    for (; k < count; k += N) {
        const Vec<T> x = load_step<T>(from + k * step, step, count - k);
        if (k + N <= width) Simd<T>::store(to + k, x * factor);
        else Simd<T>::store(to + k, x * factor, int(width - k));
    }
    for (; k < width; k += N) Simd<T>::store(to + k, Vec<T>{}, int(width - k));
}

// to[lane][column] = factor * x[row][column], zero from `count` to `width`.
template <class T>
void pack_rows(const View& x, int64_t batch, const Rows& rows, int64_t count, int64_t width, T factor, T* to) {
    dispatch<T>(x.type, [&](auto* kind) MMFAST_LAMBDA {
        using From = std::remove_pointer_t<decltype(kind)>;
        for (int64_t r = 0; r < rows.n; ++r)
            pack_row<T>(static_cast<const From*>(x.data) + x.at(batch, rows.head[r], rows.row[r]), x.column, count,
                        width, factor, to + r * width);
    });
}

// Rows of keys or values, `stride` apart.
template <class T>
struct Block {
    const T* data;
    int64_t stride;
};

// Whether the kernels can read x where it lies. By columns, a few features of each key in turn, they cannot where the rows
// are multiples of 512 bytes apart, as powers of two are: so many lines fall into few sets of the first cache.
template <class T>
MMFAST_INLINE bool in_place(const View& x, bool by_columns = false) {
    return x.type == scalar_type_of<T>() && x.column == 1 && !(by_columns && x.row * sizeof(T) % 512 == 0);
}

// From one row of a copy to the next.
template <class T>
constexpr int64_t copy_stride(int64_t width) {
    return width * sizeof(T) % 512 == 0 ? width + Simd<T>::lanes : width;
}

template <class T>
void pack_block(const View& x, int64_t batch, int64_t head, int64_t first, int64_t count, int64_t width, T* to) {
    dispatch<T>(x.type, [&](auto* kind) MMFAST_LAMBDA {
        using From = std::remove_pointer_t<decltype(kind)>;
        const From* const from = static_cast<const From*>(x.data) + x.at(batch, head, first);
        for (int64_t k = 0; k < count; ++k)
            pack_row<T>(from + k * x.row, x.column, width, width, T(1), to + k * copy_stride<T>(width));
    });
}

// The keys or values first .. of a source: where they lie, or a copy in `buffer`, made now unless it is `there`.
template <class T>
MMFAST_INLINE Block<T> block_of(const View& x, bool by_columns, int64_t batch, int64_t head, int64_t first,
                                int64_t count, int64_t width, bool there, T* buffer) {
    if (in_place<T>(x, by_columns)) return {static_cast<const T*>(x.data) + x.at(batch, head, first), x.row};
    if (!there) pack_block<T>(x, batch, head, first, count, width, buffer);
    return {buffer, copy_stride<T>(width)};
}

// target[row][column] = (or +=) factor[lane] * x[column][lane]; factor null for ones, `width` as of pack_columns.
template <class T>
void unpack_columns(const T* x, int64_t count, const T* factor, int64_t batch, const Rows& rows, const Target& to,
                    int64_t offset, bool add, int64_t width = 0) {
    constexpr int64_t N = Simd<T>::lanes;
    const int64_t W = larger(width, up_to_multiple(rows.n, N));
    int64_t offsets[64];
    set_offsets(to, batch, rows, offsets);
    dispatch<T>(to.type, [&](auto* kind) MMFAST_LAMBDA {
        using To = std::remove_pointer_t<decltype(kind)>;
        To* const data = static_cast<To*>(to.data) + offset;
        for (int64_t v = 0; v < rows.n; v += N) {
            const Vec<T> f = factor ? Simd<T>::load(factor + v) : Simd<T>::splat(T(1));
            for (int64_t k = 0; k < count; k += N) {
                Vec<T> part[N];
                for (int64_t i = 0; i < N; ++i)
                    part[i] = k + i < count ? f * Simd<T>::load(x + (k + i) * W + v) : Vec<T>{};
                Simd<T>::transpose(part);
                const int64_t lanes = smaller(N, rows.n - v);
                for (int64_t i = 0; i < lanes; ++i) {
                    To* const at = data + offsets[v + i] + k;
                    if (add) part[i] += load_as<T>(at, count - k);
                    store_as<T>(at, part[i], count - k);
                }
            }
        }
    });
}

// The same of rows: target[row][column] = (or +=) factor[row] * x[row][column], `stride` from one row of x to the next.
template <class T>
void unpack_rows(const T* x, int64_t stride, int64_t count, const T* factor, int64_t batch, const Rows& rows,
                 const Target& to, int64_t offset, bool add) {
    constexpr int64_t N = Simd<T>::lanes;
    dispatch<T>(to.type, [&](auto* kind) MMFAST_LAMBDA {
        using To = std::remove_pointer_t<decltype(kind)>;
        for (int64_t r = 0; r < rows.n; ++r, x += stride) {
            To* const at = static_cast<To*>(to.data) + offset + to.at(batch, rows.head[r], rows.row[r]);
            for (int64_t k = 0; k < count; k += N) {
                Vec<T> part = factor[r] * Simd<T>::load(x + k);
                if (add) part += load_as<T>(at + k, count - k);
                store_as<T>(at + k, part, count - k);
            }
        }
    });
}

// ---- Keys ----------------------------------------------------------------------------------------------------------

// Keys first .. of one source, from the `place`-th on of all.
struct Segment {
    int source;
    int64_t first, count, place;
};

// Where the sources' keys lie when all are counted one after the other: `size` keys each, of which a query may see the
// first `length`.
struct Keys {
    int64_t start[kMostSources + 1], length[kMostSources];
};

MMFAST_INLINE void set_keys(const Problem& p, int64_t batch, bool existing_only, Keys& keys) {
    keys.start[0] = 0;
    for (int j = 0; j < p.count; ++j) {
        keys.length[j] = p.sources[j].length(batch);
        keys.start[j + 1] = keys.start[j] + (existing_only ? keys.length[j] : p.sources[j].keys);
    }
}

// f(segment) for what lies between the places lo and hi and can be seen by a row up to `last`.
template <class F>
MMFAST_INLINE void for_segments(const Problem& p, const Keys& keys, int64_t last, int64_t lo, int64_t hi, const F& f) {
    for (int j = 0; j < p.count; ++j) {
        const int64_t length = p.causal ? smaller(keys.length[j], last + 1) : keys.length[j];
        const int64_t from = larger(lo - keys.start[j], 0), to = smaller(hi - keys.start[j], length);
        if (from < to) f(Segment{j, from, to - from, keys.start[j] + from});
    }
}

MMFAST_INLINE int64_t key_head(const Problem& p, int source, int64_t head) {
    return head / (p.heads / p.sources[source].heads);
}

// ---- Scores --------------------------------------------------------------------------------------------------------

template <class T>
T value_at(const View& x, int64_t at) {
    T result = 0;
    dispatch_mask(x, [&](auto* kind) MMFAST_LAMBDA {
        result = T(static_cast<const std::remove_pointer_t<decltype(kind)>*>(x.data)[at]);
    });
    return result;
}

// A score, times log2 e, and what a mask adds to it. The lowest number, which many masks hold, stays one.
template <class T, class X>
MMFAST_INLINE X masked(X score, X mask) {
    const X added = mask * T(kLog2e), lowest = X{} + std::numeric_limits<T>::lowest();
    // What is excluded may be infinite.
    return mask == -infinity<T>() ? mask : score + (added < lowest ? lowest : added);
}

template <class T, int S>
void add_mask(const View& mask, int64_t batch, const Rows& rows, int64_t first, int64_t count, T* tile, T* buffer) {
    constexpr int N = Simd<T>::lanes, W = S * N;
    if (mask.row == 0 && (mask.head == 0 || rows.one_head)) {  // the same for all lanes
        for (int64_t k = 0; k < count; ++k) {
            const T added = value_at<T>(mask, mask.at(batch, rows.head[0], 0) + (first + k) * mask.column);
            if (added == 0) continue;
            for (int v = 0; v < S; ++v)
                Simd<T>::store(tile + k * W + v * N,
                               masked<T>(Simd<T>::load(tile + k * W + v * N), Simd<T>::splat(added)));
        }
        return;
    }
    const int64_t columns = mask.column ? count : 1;
    pack_columns<T, true>(mask, batch, rows, mask.column ? first : 0, columns, T(1), buffer, W);
    for (int64_t k = 0; k < count; ++k)
        for (int v = 0; v < S; ++v) {
            const Vec<T> added = Simd<T>::load(buffer + (mask.column ? k : 0) * W + v * N);
            Simd<T>::store(tile + k * W + v * N, masked<T>(Simd<T>::load(tile + k * W + v * N), added));
        }
}

// Whether exponentials are taken of a product's vectors before they are stored: see [Exponentials at once].
template <class T>
constexpr bool kAtOnce = sizeof(T) == 4;

// Whether it can be done: scores() is the product and no more.
template <class T>
MMFAST_INLINE bool plain_scores(const Problem& p) {
    bool result = kAtOnce<T> && !p.causal;
    for (int j = 0; j < p.count; ++j)
        for (const View& mask : p.sources[j].added) result = result && !mask.data;
    return result;
}

// Masks and the causal rule, to the products in tile[key][lane].
template <class T, int S>
MMFAST_INLINE void mask_scores(const Problem& p, int64_t batch, const Rows& rows, const Segment& s, T* tile,
                               T* buffer) {
    constexpr int N = Simd<T>::lanes, W = S * N;
    for (const View& mask : p.sources[s.source].added)
        if (mask.data) add_mask<T, S>(mask, batch, rows, s.first, s.count, tile, buffer);
    if (!p.causal) return;
    alignas(64) T row[W] = {};
    for (int64_t r = 0; r < rows.n; ++r) row[r] = T(rows.row[r]);
    for (int64_t k = 0; k < s.count; ++k)
        for (int v = 0; v < S; ++v) {
            const Vec<T> x = Simd<T>::load(tile + k * W + v * N);
            Simd<T>::store(tile + k * W + v * N,
                           Simd<T>::load(row + v * N) < T(s.first + k) ? Simd<T>::splat(-infinity<T>()) : x);
        }
}

// tile[key][lane]: what the softmax is taken of, times log2 e. `queries` are packed with that factor and the scale.
template <class T, int S>
void scores(const Problem& p, int64_t batch, const Rows& rows, const Segment& s, const Block<T>& key, const T* queries,
            T* tile, T* buffer, Ahead& ahead) {
    constexpr int64_t W = S * Simd<T>::lanes;
    product_panel<T, S, false>(s.count, p.dim, key.data, key.stride, queries, W, tile, W, Start::zero, nullptr, ahead);
    mask_scores<T, S>(p, batch, rows, s, tile, buffer);
}

// Where in an array (batch, heads, rows) row r lies.
MMFAST_INLINE int64_t place_of(const Problem& p, int64_t batch, const Rows& rows, int64_t r) {
    return (batch * p.heads + rows.head[r]) * p.rows + rows.row[r];
}

// values[lane] = from[batch][head][row] of such an array, `other` in the lanes behind the rows.
template <class T>
MMFAST_INLINE void gather(const Problem& p, const T* from, int64_t batch, const Rows& rows, T other, T* values) {
    const T* const first = from + place_of(p, batch, rows, 0);
    if (rows.one_head)
        for (int64_t r = 0; r < rows.n; ++r) values[r] = first[r];
    else
        for (int64_t r = 0; r < rows.n; ++r) values[r] = from[place_of(p, batch, rows, r)];
    for (int64_t r = rows.n; r < kPanel<T>; ++r) values[r] = other;
}

template <class T>
MMFAST_INLINE void scatter(const Problem& p, const T* values, int64_t batch, const Rows& rows, T* to) {
    T* const first = to + place_of(p, batch, rows, 0);
    if (rows.one_head)
        for (int64_t r = 0; r < rows.n; ++r) first[r] = values[r];
    else
        for (int64_t r = 0; r < rows.n; ++r) to[place_of(p, batch, rows, r)] = values[r];
}

// The gate of each lane, or ones.
template <class T>
MMFAST_INLINE void gates_of(const Source& s, int64_t batch, const Rows& rows, T* values) {
    const T* const from = static_cast<const T*>(s.gate.data);
    for (int64_t r = 0; r < kPanel<T>; ++r)
        values[r] = from && r < rows.n ? from[s.gate.at(batch, rows.head[r], rows.row[r])] : T(1);
}

}  // namespace
}  // namespace MMFAST_ISA
}  // namespace fusion
}  // namespace mmfast
