// Attention in float32 with heads of a few features, as a block of threads of a GPU runs it: products in registers, where
// tiles of a matrix unit would be mostly padding. No CUDA header is needed, so that a host can run the same code
// (tests/native/test_fusion_tiny.cpp).
//
// Note: [Rows in registers]
//   A thread owns some rows, queries or, for the gradients of keys and values, keys, and meets all others, which stand in
//   shared memory tile by tile. A row's sums stay with its thread: no atomics, one order. Warps that own the same rows
//   share the others out among them, and their sums are added at the end.
//
// Note: [Shift]
//   Weights are 2^(s - shift). The shift is a score that has been seen, moved up only where the weights of a group of keys
//   become large (or NaN): then scores are computed again. So a pair asks for no maximum, and with the shift at most
//   log2(kTinyMost) below the largest score neither sums nor products lose anything.
//
// Note: [Instructions of a pair]
//   In the SASS for sm_90a, a warp's for its lanes' rows and one of the others, loads and loop included; the exponential
//   takes the time of 8 beside them. No loop spills; two blocks, 16 warps, share a multiprocessor, in the backward beyond 12
//   features one.
//     D   forward   gradient of queries   of keys and values
//     4      11.9                  15.3                 19.8
//     6      16.4                  21.4                 28.0
//     8      21.5                  29.5                 38.5
//     12     30.6                  42.3                 55.5
//     16     39.6                  55.5                 72.5
//
// Note: [Phases]
//   As in mel/mel_block.h: block.each(f) runs f for each thread and waits for all of them. What a thread keeps from phase
//   to phase is Block::Kept.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "common/exp2.h"

namespace mmfast {
namespace fusion {

constexpr int kTinyThreads = 256, kTinyWarps = kTinyThreads / 32, kTinyFeatures = 16;
constexpr float kTinyMost = 65536, kTinyLowest = -1.7e38f;
constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

// Strides in elements of (batch, head, row, feature).
struct TinyView {
    float* data;
    int64_t batch, head, row, feature;
};

// A call; every member takes 8 bytes, so that it can be written down word by word.
struct TinyJob {
    int64_t batch, heads, rows, keys, dim, value_dim;
    int64_t row_warps;  // warps of a block that own different rows
    double scale;
    TinyView query, key, value;
    const int64_t* lengths;  // [batch] or null
    int64_t lengths_stride;
    TinyView out;                         // written, or read for gradients
    float* lse;                           // [batch][heads][rows]
    TinyView by_out;                      // gradients that come in: of the output,
    const float* by_lse;                  // of the log-sum-exp, [batch][heads][rows], or null,
    float* less;                          // and what they leave for rows of dS, [batch][heads][rows]
    TinyView by_query, by_key, by_value;  // and go out
};

static_assert(std::is_trivially_copyable_v<TinyJob> && sizeof(TinyJob) % 8 == 0);

// What is compiled for heads of up to D features: as many rows of a thread as registers hold (128 where two blocks share a
// multiprocessor), and the rows of a tile that forward are weighed at once.
template <int D>
struct TinyShape {
    static constexpr int kTile = D <= 8 ? 512 : 256;
    static constexpr int kKeyPitch = 2 * D, kQueryPitch = (2 * D + 2 + 3) / 4 * 4;
    static constexpr int kForward = D <= 8 ? 4 : 2, kOfQuery = D <= 6 ? 4 : 2, kOfKey = D <= 6 ? 4 : 2;
    static constexpr int kGroup = D == 8 ? 4 : 8;
    static constexpr int kFloats = kTile * kQueryPitch;
};

// A row of a tile: key and value, or query, gradient of the output and two numbers.
template <int N>
struct alignas(16) TinyRow {
    float at[N];
};

// Whose rows a block owns. In shared memory: in registers it would take the place of rows.
struct TinyPlace {
    int64_t b, h, row0, base;  // base: of the log-sum-exps
    int keys, count;           // of the item; rows of the block
};

template <int D>
struct alignas(16) TinyMemory {
    float at[TinyShape<D>::kFloats];
    TinyPlace place;
};

MMFAST_INLINE int64_t tiny_blocks(int64_t batch, int64_t heads, int64_t rows, int64_t row_warps, int per) {
    const int64_t size = row_warps * 32 * per;
    return batch * heads * ((rows + size - 1) / size);
}

MMFAST_INLINE float tiny_load(const float* p) {
#if defined(__CUDA_ARCH__)
    return __ldg(p);
#else
    return *p;
#endif
}

// What the three kernels have in common: whose rows a block owns, of keys or of queries, and the ways to and from memory.
template <int D, int Per, class Block>
struct Tiny {
    static constexpr int kSlots = kTinyThreads / 2;  // of threads whose sums others add to theirs
    static constexpr int kRowsAtOnce = kTinyThreads / D;
    const TinyJob& job;
    const Block& block;
    float* const memory;
    TinyPlace& place;

    MMFAST_INLINE Tiny(const TinyJob& j, const Block& bl, TinyMemory<D>& at, int64_t index, bool of_keys)
        : job(j), block(bl), memory(at.at), place(at.place) {
        block.each([&](int t) {
            if (t) return;
            const int64_t owned = 32 * Per * job.row_warps, rows = of_keys ? job.keys : job.rows;
            const int64_t tiles = (rows + owned - 1) / owned, item = index / tiles,
                          row0 = (index - item * tiles) * owned;
            const int64_t b = item / job.heads, left = rows - row0;
            const int64_t n = job.lengths ? job.lengths[b * job.lengths_stride] : job.keys;
            place = {b,
                     item - b * job.heads,
                     row0,
                     item * job.rows,
                     int(n < 0          ? 0
                         : n > job.keys ? job.keys
                                        : n),
                     int(left < owned ? left : owned)};
        });
    }

    MMFAST_INLINE int row_warps() const { return int(job.row_warps); }
    MMFAST_INLINE int part(int t) const { return t / 32 / row_warps(); }
    // Of the thread's row i among those of the block.
    MMFAST_INLINE int row(int t, int i) const { return t % (32 * row_warps()) + i * 32 * row_warps(); }
    // The rows [first, last) of a tile that a thread's warps meet.
    MMFAST_INLINE void share(int t, int size, int group, int& first, int& last) const {
        const int parts = kTinyWarps / row_warps(), each = ((size + parts - 1) / parts + group - 1) / group * group;
        first = part(t) * each, last = first + each;
        first = first < size ? first : size, last = last < size ? last : size;
    }

    // `rows` rows from `first` on, D numbers of each, zero from `width` on.
    MMFAST_INLINE void stage(const TinyView& from, int64_t first, int rows, int64_t width, float factor, float* to,
                             int pitch, int t) const {
        constexpr int kAtOnce = 8;
        const int r0 = t / D, d = t - r0 * D;  // each thread a feature, side by side
        if (r0 >= kRowsAtOnce) return;
        const float* p =
            from.data + place.b * from.batch + place.h * from.head + (first + r0) * from.row + d * from.feature;
        const int64_t step = kRowsAtOnce * from.row;
        to += r0 * pitch + d;
        MMFAST_ROLLED
        for (int r = r0; r < rows; r += kAtOnce * kRowsAtOnce) {
            float x[kAtOnce];
            MMFAST_UNROLL
            for (int j = 0; j < kAtOnce; ++j, p += step)
                x[j] = r + j * kRowsAtOnce < rows && d < width ? tiny_load(p) : 0.f;
            MMFAST_UNROLL
            for (int j = 0; j < kAtOnce; ++j, to += kRowsAtOnce * pitch)
                if (r + j * kRowsAtOnce < rows) *to = factor * x[j];
        }
    }

    // The block's rows, which stand in `from` one after the other, D numbers each; zero from row `exist` on.
    MMFAST_INLINE void give(const float* from, const TinyView& to, int64_t width, int exist, int t) const {
        const int r0 = t / D, d = t - r0 * D;
        if (r0 >= kRowsAtOnce || d >= width) return;
        float* p = to.data + place.b * to.batch + place.h * to.head + (place.row0 + r0) * to.row + d * to.feature;
        MMFAST_ROLLED
        for (int r = r0; r < place.count; r += kRowsAtOnce, p += kRowsAtOnce * to.row)
            *p = r < exist ? from[r * D + d] : 0.f;
    }

    MMFAST_INLINE void stage_keys(int64_t first, int rows, int t) const {
        constexpr int pitch = TinyShape<D>::kKeyPitch;
        stage(job.key, first, rows, job.dim, 1.f, memory, pitch, t);
        stage(job.value, first, rows, job.value_dim, 1.f, memory + D, pitch, t);
    }

    // sweep(kept[t], rows, first, last) with all the keys that there are, or `limit` others, tile by tile.
    template <int Pitch, class Kept, class Stage, class Sweep>
    MMFAST_INLINE void meet(Kept& kept, int limit, int group, const Stage& stage_tile, const Sweep& sweep) const {
        constexpr int kTile = TinyShape<D>::kTile;
        MMFAST_ROLLED
        for (int start = 0; start < limit; start += kTile) {
            const int size = limit - start < kTile ? limit - start : kTile;
            block.each([&](int t) { stage_tile(start, size, t); });
            block.each([&](int t) {
                int first, last;
                share(t, size, group, first, last);
                sweep(kept[t], reinterpret_cast<const TinyRow<Pitch>*>(memory), first, last);
            });
        }
    }

    // To the sums of the first threads of a row those of the others, in a fixed order: add(own, other's number i) after
    // take(own, i).
    template <int N, class Kept, class Take, class Add>
    MMFAST_INLINE void gather(Kept& kept, const Take& take, const Add& add) const {
        MMFAST_ROLLED
        for (int half = kTinyThreads / 2; half >= 32 * row_warps(); half /= 2) {
            block.each([&](int t) {
                if (t < half || t >= 2 * half) return;
                float of[N];
                take(kept[t], of);
                MMFAST_UNROLL
                for (int i = 0; i < N; ++i) memory[i * kSlots + t - half] = of[i];
            });
            block.each([&](int t) {
                if (t >= half) return;
                float of[N];
                MMFAST_UNROLL
                for (int i = 0; i < N; ++i) of[i] = memory[i * kSlots + t];
                add(kept[t], of);
            });
        }
    }
};

// ---- Forward

template <int D, class Block>
struct TinyForward : Tiny<D, TinyShape<D>::kForward, Block> {
    static constexpr int kBlocks = 2;  // on a multiprocessor
    static constexpr int kPer = TinyShape<D>::kForward, kGroup = TinyShape<D>::kGroup;
    using Base = Tiny<D, kPer, Block>;
    using Row = TinyRow<TinyShape<D>::kKeyPitch>;
    using Base::job, Base::block, Base::memory, Base::place;
    struct Own {
        float q[kPer][D], o[kPer][D], shift[kPer], sum[kPer];
    };

    MMFAST_INLINE TinyForward(const TinyJob& j, const Block& bl, TinyMemory<D>& at, int64_t index)
        : Base(j, bl, at, index, false) {}

    static MMFAST_INLINE float score(const float* q, const Row& key) {
        float s = q[0] * key.at[0];
        MMFAST_UNROLL
        for (int d = 1; d < D; ++d) s += q[d] * key.at[d];
        return s;
    }

    // Moves the shifts to the largest score, where that of one of these keys is larger.
    template <int G>
    static MMFAST_INLINE void raise(Own& own, const Row* keys) {
        MMFAST_UNROLL
        for (int i = 0; i < kPer; ++i) {
            float top = own.shift[i];
            MMFAST_ROLLED
            for (int j = 0; j < G; ++j) top = std::fmax(top, score(own.q[i], keys[j]));
            const float factor = fast_exp2(own.shift[i] - top);
            own.shift[i] = top, own.sum[i] *= factor;
            MMFAST_UNROLL
            for (int d = 0; d < D; ++d) own.o[i][d] *= factor;
        }
    }

    template <int G>
    static MMFAST_INLINE void meet_group(Own& own, const Row* keys) {
        float p[kPer][G], sum[kPer], all;
        MMFAST_ROLLED
        for (bool again = false;; again = true) {
            MMFAST_UNROLL
            for (int j = 0; j < G; ++j) {
                MMFAST_UNROLL
                for (int i = 0; i < kPer; ++i) {
                    p[i][j] = fast_exp2(score(own.q[i], keys[j]) - own.shift[i]);
                    sum[i] = j ? sum[i] + p[i][j] : p[i][j];
                }
            }
            all = sum[0];
            MMFAST_UNROLL
            for (int i = 1; i < kPer; ++i) all += sum[i];
            if (all <= kTinyMost || again) break;
            raise<G>(own, keys);
        }
        MMFAST_UNROLL
        for (int i = 0; i < kPer; ++i) own.sum[i] += sum[i];
        MMFAST_UNROLL
        for (int j = 0; j < G; ++j) {
            MMFAST_UNROLL
            for (int i = 0; i < kPer; ++i) {
                MMFAST_UNROLL
                for (int d = 0; d < D; ++d) own.o[i][d] += p[i][j] * keys[j].at[D + d];
            }
        }
    }

    static MMFAST_INLINE void sweep(Own& own, const Row* keys, int first, int last) {
        if (first >= last) return;
        raise<1>(own, keys + first);
        int c = first;
        MMFAST_ROLLED
        for (; c + kGroup <= last; c += kGroup) meet_group<kGroup>(own, keys + c);
        MMFAST_ROLLED
        for (; c < last; ++c) meet_group<1>(own, keys + c);
    }

    static MMFAST_INLINE void take(const Own& own, float* to) {
        MMFAST_UNROLL
        for (int i = 0; i < kPer; ++i) {
            float* const at = to + i * (D + 2);
            MMFAST_UNROLL
            for (int d = 0; d < D; ++d) at[d] = own.o[i][d];
            at[D] = own.shift[i], at[D + 1] = own.sum[i];
        }
    }

    static MMFAST_INLINE void add(Own& own, const float* other) {
        MMFAST_UNROLL
        for (int i = 0; i < kPer; ++i) {
            const float* const at = other + i * (D + 2);
            const float top = std::fmax(own.shift[i], at[D]);
            const float mine = fast_exp2(own.shift[i] - top), its = fast_exp2(at[D] - top);
            own.shift[i] = top, own.sum[i] = mine * own.sum[i] + its * at[D + 1];
            MMFAST_UNROLL
            for (int d = 0; d < D; ++d) own.o[i][d] = mine * own.o[i][d] + its * at[d];
        }
    }

    MMFAST_INLINE void run() const {
        typename Block::template Kept<Own> kept;
        block.each([&](int t) {
            this->stage(job.query, place.row0, place.count, job.dim, float(job.scale * kLog2E), memory, D, t);
        });
        block.each([&](int t) {
            Own& own = kept[t];
            MMFAST_UNROLL
            for (int i = 0; i < kPer; ++i) {
                const int r = this->row(t, i);
                own.shift[i] = kTinyLowest, own.sum[i] = 0;
                MMFAST_UNROLL
                for (int d = 0; d < D; ++d) own.q[i][d] = r < place.count ? memory[r * D + d] : 0.f, own.o[i][d] = 0;
            }
        });
        this->template meet<TinyShape<D>::kKeyPitch>(
            kept, place.keys, kGroup, [&](int start, int size, int t) { this->stage_keys(start, size, t); },
            [](Own& own, const Row* keys, int first, int last) { sweep(own, keys, first, last); });
        this->template gather<kPer*(D + 2)>(kept, take, add);
        block.each([&](int t) {
            if (this->part(t)) return;
            Own& own = kept[t];
            MMFAST_UNROLL
            for (int i = 0; i < kPer; ++i) {
                const int r = this->row(t, i);
                const float inverse = own.sum[i] == 0 ? 0.f : 1 / own.sum[i];
                MMFAST_UNROLL
                for (int d = 0; d < D; ++d) memory[r * D + d] = own.o[i][d] * inverse;
                if (r < place.count)
                    job.lse[place.base + place.row0 + r] =
                        own.sum[i] == 0 ? -INFINITY : float(kLn2) * (own.shift[i] + std::log2(own.sum[i]));
            }
        });
        block.each([&](int t) { this->give(memory, job.out, job.value_dim, place.count, t); });
    }
};

// ---- Gradients. With P = 2^(S - lse) and less = dlse - dO . O: dS = P (dO . V + less), dQ = scale sum dS K, and by key
// dK = scale sum dS Q, dV = sum P dO.

MMFAST_INLINE float tiny_minus(float lse) {
    return lse == -INFINITY ? 0.f : -float(kLog2E) * lse;
}

template <int D, class Block>
struct TinyOfQuery : Tiny<D, TinyShape<D>::kOfQuery, Block> {
    static constexpr int kBlocks = D > 12 ? 1 : 2;
    static constexpr int kPer = TinyShape<D>::kOfQuery, kGroup = 2;
    using Base = Tiny<D, kPer, Block>;
    using Row = TinyRow<TinyShape<D>::kKeyPitch>;
    using Base::job, Base::block, Base::memory, Base::place;
    struct Own {
        float q[kPer][D], by[kPer][D], sum[kPer][D], minus[kPer], less[kPer];
    };

    MMFAST_INLINE TinyOfQuery(const TinyJob& j, const Block& bl, TinyMemory<D>& at, int64_t index)
        : Base(j, bl, at, index, false) {}

    template <int G>
    static MMFAST_INLINE void meet_group(Own& own, const Row* keys) {
        MMFAST_UNROLL
        for (int j = 0; j < G; ++j) {
            const Row& key = keys[j];
            MMFAST_UNROLL
            for (int i = 0; i < kPer; ++i) {
                float s = own.minus[i], u = own.less[i];
                MMFAST_UNROLL
                for (int d = 0; d < D; ++d) s += own.q[i][d] * key.at[d], u += own.by[i][d] * key.at[D + d];
                const float ds = fast_exp2(s) * u;
                MMFAST_UNROLL
                for (int d = 0; d < D; ++d) own.sum[i][d] += ds * key.at[d];
            }
        }
    }

    static MMFAST_INLINE void sweep(Own& own, const Row* keys, int first, int last) {
        int c = first;
        MMFAST_ROLLED
        for (; c + kGroup <= last; c += kGroup) meet_group<kGroup>(own, keys + c);
        MMFAST_ROLLED
        for (; c < last; ++c) meet_group<1>(own, keys + c);
    }

    MMFAST_INLINE void begin(Own& own, int t) const {
        MMFAST_UNROLL
        for (int i = 0; i < kPer; ++i) {
            const int r = this->row(t, i);
            const bool there = r < place.count;
            const float* const at = memory + 3 * D * r;
            float less = 0;
            MMFAST_UNROLL
            for (int d = 0; d < D; ++d) {
                own.q[i][d] = there ? at[d] : 0.f, own.by[i][d] = there ? at[D + d] : 0.f, own.sum[i][d] = 0;
                less -= there ? at[D + d] * at[2 * D + d] : 0.f;
            }
            const int64_t index = place.base + place.row0 + r;
            own.minus[i] = there ? tiny_minus(job.lse[index]) : 0.f;
            if (there && job.by_lse) less += job.by_lse[index];
            own.less[i] = less;
            if (there && this->part(t) == 0) job.less[index] = less;
        }
    }

    MMFAST_INLINE void run() const {
        typename Block::template Kept<Own> kept;
        block.each([&](int t) {
            this->stage(job.query, place.row0, place.count, job.dim, float(job.scale * kLog2E), memory, 3 * D, t);
            this->stage(job.by_out, place.row0, place.count, job.value_dim, 1.f, memory + D, 3 * D, t);
            this->stage(job.out, place.row0, place.count, job.value_dim, 1.f, memory + 2 * D, 3 * D, t);
        });
        block.each([&](int t) { begin(kept[t], t); });
        this->template meet<TinyShape<D>::kKeyPitch>(
            kept, place.keys, kGroup, [&](int start, int size, int t) { this->stage_keys(start, size, t); },
            [](Own& own, const Row* keys, int first, int last) { sweep(own, keys, first, last); });
        this->template gather<kPer * D>(
            kept,
            [](const Own& own, float* to) {
                MMFAST_UNROLL
                for (int i = 0; i < kPer * D; ++i) to[i] = own.sum[i / D][i % D];
            },
            [](Own& own, const float* other) {
                MMFAST_UNROLL
                for (int i = 0; i < kPer * D; ++i) own.sum[i / D][i % D] += other[i];
            });
        block.each([&](int t) {
            if (this->part(t)) return;
            MMFAST_UNROLL
            for (int i = 0; i < kPer; ++i) {
                MMFAST_UNROLL
                for (int d = 0; d < D; ++d) memory[this->row(t, i) * D + d] = float(job.scale) * kept[t].sum[i][d];
            }
        });
        block.each([&](int t) { this->give(memory, job.by_query, job.dim, place.count, t); });
    }
};

template <int D, class Block>
struct TinyOfKey : Tiny<D, TinyShape<D>::kOfKey, Block> {
    static constexpr int kBlocks = D > 12 ? 1 : 2;
    static constexpr int kPer = TinyShape<D>::kOfKey;
    using Base = Tiny<D, kPer, Block>;
    static constexpr int kPitch = TinyShape<D>::kQueryPitch;
    using Row = TinyRow<kPitch>;
    using Base::job, Base::block, Base::memory, Base::place;
    struct Own {
        float k[kPer][D], v[kPer][D], of_k[kPer][D], of_v[kPer][D];
    };

    MMFAST_INLINE TinyOfKey(const TinyJob& j, const Block& bl, TinyMemory<D>& at, int64_t index)
        : Base(j, bl, at, index, true) {}

    // Of the block's keys those that there are.
    MMFAST_INLINE int exist() const {
        const int64_t left = place.keys - place.row0;
        return left < 0 ? 0 : left < place.count ? int(left) : place.count;
    }

    static MMFAST_INLINE void sweep(Own& own, const Row* queries, int first, int last) {
        MMFAST_ROLLED
        for (int c = first; c < last; ++c) {
            const Row& query = queries[c];
            MMFAST_UNROLL
            for (int i = 0; i < kPer; ++i) {
                float s = query.at[2 * D], u = query.at[2 * D + 1];
                MMFAST_UNROLL
                for (int d = 0; d < D; ++d) s += own.k[i][d] * query.at[d], u += own.v[i][d] * query.at[D + d];
                const float p = fast_exp2(s), ds = p * u;
                MMFAST_UNROLL
                for (int d = 0; d < D; ++d) {
                    own.of_k[i][d] += ds * query.at[d];
                    own.of_v[i][d] += p * query.at[D + d];
                }
            }
        }
    }

    MMFAST_INLINE void stage_queries(int64_t first, int size, int t) const {
        this->stage(job.query, first, size, job.dim, float(job.scale * kLog2E), memory, kPitch, t);
        this->stage(job.by_out, first, size, job.value_dim, 1.f, memory + D, kPitch, t);
        for (int r = t; r < size; r += kTinyThreads) {
            const int64_t index = place.base + first + r;
            memory[r * kPitch + 2 * D] = tiny_minus(job.lse[index]);
            memory[r * kPitch + 2 * D + 1] = job.less[index];
        }
    }

    MMFAST_INLINE void run() const {
        typename Block::template Kept<Own> kept;
        block.each([&](int t) {
            this->stage(job.key, place.row0, exist(), job.dim, 1.f, memory, 2 * D, t);
            this->stage(job.value, place.row0, exist(), job.value_dim, 1.f, memory + D, 2 * D, t);
        });
        block.each([&](int t) {
            Own& own = kept[t];
            const int count = exist();
            MMFAST_UNROLL
            for (int i = 0; i < kPer; ++i) {
                const int r = this->row(t, i);
                MMFAST_UNROLL
                for (int d = 0; d < D; ++d) {
                    own.k[i][d] = r < count ? memory[r * 2 * D + d] : 0.f;
                    own.v[i][d] = r < count ? memory[r * 2 * D + D + d] : 0.f;
                    own.of_k[i][d] = own.of_v[i][d] = 0;
                }
            }
        });
        this->template meet<kPitch>(
            kept, exist() ? int(job.rows) : 0, 1, [&](int start, int size, int t) { stage_queries(start, size, t); },
            [](Own& own, const Row* queries, int first, int last) { sweep(own, queries, first, last); });
        constexpr int N = kPer * D;
        this->template gather<2 * N>(
            kept,
            [](const Own& own, float* to) {
                MMFAST_UNROLL
                for (int i = 0; i < N; ++i) to[i] = own.of_k[i / D][i % D], to[N + i] = own.of_v[i / D][i % D];
            },
            [](Own& own, const float* other) {
                MMFAST_UNROLL
                for (int i = 0; i < N; ++i) own.of_k[i / D][i % D] += other[i], own.of_v[i / D][i % D] += other[N + i];
            });
        float* const values = memory + 32 * kPer * this->row_warps() * D;
        block.each([&](int t) {
            if (this->part(t)) return;
            MMFAST_UNROLL
            for (int i = 0; i < kPer; ++i) {
                MMFAST_UNROLL
                for (int d = 0; d < D; ++d) {
                    const int at = this->row(t, i) * D + d;
                    memory[at] = float(kLn2) * kept[t].of_k[i][d];  // queries were multiplied by scale and log2(e)
                    values[at] = kept[t].of_v[i][d];
                }
            }
        });
        block.each([&](int t) {
            this->give(memory, job.by_key, job.dim, exist(), t);
            this->give(values, job.by_value, job.value_dim, exist(), t);
        });
    }
};

}  // namespace fusion
}  // namespace mmfast
