// Sums of Gaussians of many pairs of points with up to 64 features, as a block of three warpgroups runs them on a GPU whose
// tensor cores work beside the rest (sm_90). No CUDA header is needed, so that a host can run the same code
// (tests/native/test_mmd_pairs.cpp).
//
// It computes what the first loop of `narrow` does (mmfast/mmd/triton_narrow.py, whose arrays these are): of whole tiles
// off the diagonal, where terms double and no distance needs a clamp. The rest stays there.
//
// Note: [What a pair costs]
//   Products: three of float16 parts, 384 FLOP a pair, 4096 a cycle and multiprocessor: 0.094 cycles. Arithmetic: an
//   addition, a multiply-add and an exponential for u, for K terms K - 3 squarings, K - 1 multiply-adds and one into the
//   sum; 10 instructions for five terms, 11 with all else, of 128 threads a cycle: 0.086. For 5.4e8 pairs (16 384 + 16 384
//   points) at 1.75 GHz and 132 multiprocessors 0.22 and 0.20 ms. One behind the other they were 0.52 ms in `narrow`, where
//   a tile's products are waited for at once; bytes from the L2 cache, 1.3 a pair, are 0.11 ms.
//
// Note: [Two tiles of each warpgroup]
//   While a thread evaluates one tile's pairs its warpgroup's products for the next are under way: accumulators are there
//   twice, 2 x 32 registers, and the rows' points are in registers as well (32), since products that read both operands
//   from shared memory would take all it gives (128 bytes a cycle) with tiles of 64 columns. Three warpgroups of 168
//   registers fill a multiprocessor. They share the columns' points, which come two tiles ahead into one of four stages.
//
// Note: [Shares]
//   All tiles are one list, row by row; a block takes a share of it as long as the others', and so they end together. A
//   row of tiles is begun anew at most once or twice a block.
#pragma once

#include <cstdint>

#include "common/exp2.h"
#include "common/hd.h"

namespace mmfast {
namespace mmd {

constexpr int kPairGroups = 3, kPairRows = 64 * kPairGroups, kPairColumns = 128, kPairWidth = 64, kPairStages = 4;
constexpr int kPairThreads = 128 * kPairGroups, kPairTerms = 8;
constexpr int kPairCopiers = 256;
constexpr int kPairHalf = kPairColumns / 2;  // the columns of one product
constexpr int kFirstNumber = 7;              // of a kernel's terms, see `settle` in triton_settle.py

struct PairsJob {
    int64_t n, m, second,
        rows;  // points of x and of y; y begins at row `second`, a multiple of kPairRows; rows of an item
    const uint16_t *hi, *lo;  // [batch][rows][kPairWidth] parts of points, float16
    const float* norms;       // [batch][rows]
    const float* numbers;     // [batch][room]
    const double* table;      // [batch][terms][4]
    const double* coefs;      // [3]; what has 0 is left out unless all_sums
    int room, terms, blocks;  // blocks of an item
    bool all_sums;
    double* sums;  // [batch][blocks][3]: over pairs of x, of y, and of x with y
};

// Tiles of kPairRows x kPairColumns, of whole rows and whole columns before the rows' own: those of x first. There are
// fewer than 2^31.
struct PairTiles {
    int of_x, of_y, columns_x;  // rows of tiles, and what a row of y has of x

    MMFAST_INLINE explicit PairTiles(const PairsJob& job)
        : of_x(int(job.n / kPairRows)), of_y(int(job.m / kPairRows)), columns_x(int(job.n / kPairColumns)) {}

    MMFAST_INLINE int in_row(int r) const { return r < of_x ? own(r) : columns_x + own(r - of_x); }
    // Tiles before row r.
    MMFAST_INLINE int before(int r) const {
        const int x = r < of_x ? r : of_x;
        return below(x) + below(r - x) + (r - x) * columns_x;
    }
    MMFAST_INLINE int count() const { return before(of_x + of_y); }

    // The row that tile t is in.
    MMFAST_INLINE int row_of(int t) const {
        int low = 0, high = of_x + of_y - 1;
        while (low < high) {
            const int middle = (low + high + 1) / 2;
            if (before(middle) <= t) low = middle;
            else high = middle - 1;
        }
        return low;
    }
    MMFAST_INLINE int64_t first_row(int r, int64_t second) const {
        return r < of_x ? int64_t(r) * kPairRows : second + int64_t(r - of_x) * kPairRows;
    }
    MMFAST_INLINE int64_t first_column(int r, int place, int64_t second) const {
        const bool with_y = r >= of_x && place >= columns_x;
        return int64_t(with_y ? place - columns_x : place) * kPairColumns + (with_y ? second : 0);
    }

private:
    // Of a sample: tiles of row r, and of all rows before.
    static MMFAST_INLINE int own(int r) { return r * kPairRows / kPairColumns; }
    static MMFAST_INLINE int below(int r) {
        static_assert(2 * kPairRows == 3 * kPairColumns, "0, 1, 3, 4, 6, ...");
        return r / 2 * (r / 2 * 3 - 2) + r % 2 * (r / 2 * 3);
    }
};

// The columns' points in shared memory: rows of 128 bytes, of which the eight pieces of 16 bytes change places by the
// row's last three bits. So tensor cores want them, and eight rows of a piece lie in different banks.
struct alignas(1024) PairStage {
    uint16_t parts[2][kPairColumns * kPairWidth];
    float norms[kPairColumns];
};

struct PairMemory {
    PairStage stages[kPairStages];
    double found[3][kPairThreads];  // each thread's, of pairs of x, of y, and of x with y
    double partial[3][16];
};

// Of a thread: row 16 * warp + lane / 4 of its warpgroup's and the eighth behind it, in the order of the tensor cores'
// operands. Results: columns 8 * g + 2 * (lane % 4) + {0, 1}, first for the one row and then for the other.
struct PairRegisters {
    uint32_t points[2][kPairWidth / 16][4];
    float tiles[2][kPairHalf / 2];
    float norms[2];
    int64_t from;  // of the points that it copies, in the first tile
    double sum;    // of pairs of one row of tiles with one sample
};

MMFAST_INLINE int pair_row(int thread) {
    return thread / 32 * 16 + thread % 32 / 4;
}

// Both parts of the points of a thread's rows, `row` the first.
template <class Block>
MMFAST_INLINE void pair_points(const Block& block, const uint16_t* hi, const uint16_t* lo, int64_t row, int thread,
                               uint32_t (&to)[2][kPairWidth / 16][4]) {
    MMFAST_UNROLL
    for (int part = 0; part < 2; ++part) {
        const uint16_t* points = (part == 0 ? hi : lo) + row * kPairWidth + thread % 4 * 2;
        MMFAST_UNROLL
        for (int k = 0; k < kPairWidth / 16; ++k) {
            MMFAST_UNROLL
            for (int piece = 0; piece < 4; ++piece)
                to[part][k][piece] = block.two(points + piece % 2 * 8 * kPairWidth + piece / 2 * 8 + 16 * k);
        }
    }
}

// What a thread brings of a tile's points, pieces that change places alike; `from`: where in all points its first is.
template <class Block>
MMFAST_INLINE void pair_copy(const Block& block, const PairsJob& job, int64_t from, int thread, PairStage& to) {
    constexpr int pieces = kPairWidth / 8, columns = kPairCopiers / pieces;
    const int column = thread / pieces, at = thread % pieces;
    const int there = column * kPairWidth + ((at ^ column % 8) * 8);
    MMFAST_UNROLL
    for (int c = 0; c < kPairColumns; c += columns) {
        block.copy(&to.parts[0][there + c * kPairWidth], job.hi + from + c * kPairWidth);
        block.copy(&to.parts[1][there + c * kPairWidth], job.lo + from + c * kPairWidth);
    }
}

template <int Count, class Block>
class Pairs {
public:
    using Kept = typename Block::template Kept<PairRegisters>;

    MMFAST_INLINE Pairs(const PairsJob& job, const Block& block, PairMemory& memory, int64_t index)
        : job_(job), block_(block), memory_(memory), tiles_(job), item_(index / job.blocks),
          share_(int(index % job.blocks)) {
        hi_ = job.hi + item_ * job.rows * kPairWidth;
        lo_ = job.lo + item_ * job.rows * kPairWidth;
        norms_ = job.norms + item_ * job.rows;
        numbers_ = job.numbers + item_ * job.room;
    }

    MMFAST_INLINE void run() {
        Kept kept;
        block_.each([&](int thread) MMFAST_LAMBDA {
            for (int k = 0; k < 3; ++k) memory_.found[k][thread] = 0;
            kept[thread].from = item_ * job_.rows * kPairWidth + thread * 8;
        });
        const int64_t count = tiles_.count();
        const int begin = int(count * share_ / job_.blocks), end = int(count * (share_ + 1) / job_.blocks);
        if (numbers_[1] > 0 && begin < end) {
            factor_ = numbers_[0];
            MMFAST_UNROLL
            for (int t = 0; t < Count; ++t) weights_[t] = numbers_[kFirstNumber + t];
            stream(kept, begin, end);
        }
        add_up();
    }

private:
    // Where in the list a tile is; it moves on by one.
    struct Cursor {
        int row, place, length, left;

        MMFAST_INLINE void next(const PairTiles& tiles) {
            --left;
            if (++place < length || left == 0) return;
            do length = tiles.in_row(++row);
            while (length == 0);
            place = 0;
        }
    };

    MMFAST_INLINE void stream(Kept& kept, int begin, int end) {
        Cursor at;
        at.row = tiles_.row_of(begin);
        at.place = begin - tiles_.before(at.row);
        at.length = tiles_.in_row(at.row);
        at.left = end - begin;
        ahead_ = at;
        asked_ = ready_ = 0;
        ask(kept);
        ask(kept);
        while (at.left > 0) {
            // What one row of tiles has of one sample.
            const bool of_y = at.row >= tiles_.of_x;
            const bool with_y = of_y && at.place >= tiles_.columns_x;
            int some = (of_y && !with_y ? tiles_.columns_x : at.length) - at.place;
            if (some > at.left) some = at.left;
            fetch(kept, tiles_.first_row(at.row, job_.second));
            row(kept, some);
            const int kind = of_y ? (with_y ? 1 : 2) : 0;
            block_.each([&](int thread) MMFAST_LAMBDA { memory_.found[kind][thread] += kept[thread].sum; });
            at.place += some - 1;
            at.left -= some - 1;
            at.next(tiles_);
        }
    }

    // `left` tiles of the same rows, by halves: the next one's products are under way while one is evaluated. Always as many
    // are under way at a place of the code, and the last tile is a branch, though it is always there: else the assembler
    // waits for each product (and says so: C7514).
    MMFAST_INLINE void row(Kept& kept, int left) {
        next(kept);
        multiply<0>(kept);
        for (; left > 1; --left) {
            multiply<1>(kept);
            evaluate<0, 1>(kept);
            next(kept);
            multiply<0>(kept);
            evaluate<1, 1>(kept);
        }
        if (left == 1) {
            multiply<1>(kept);
            evaluate<0, 1>(kept);
            evaluate<1, 0>(kept);
        } else {
            evaluate<0, 0>(kept);
        }
    }

    // The points and norms of this thread's rows.
    MMFAST_INLINE void fetch(Kept& kept, int64_t first) {
        block_.each([&](int thread) MMFAST_LAMBDA {
            PairRegisters& mine = kept[thread];
            const int64_t row = first + pair_row(thread);
            pair_points(block_, hi_, lo_, row, thread, mine.points);
            mine.norms[0] = norms_[row];
            mine.norms[1] = norms_[row + 8];
            mine.sum = 0;
        });
    }

    // The next tile's columns are on their way from here on.
    MMFAST_INLINE void ask(Kept& kept) {
        if (ahead_.left > 0) {
            const int64_t start = tiles_.first_column(ahead_.row, ahead_.place, job_.second);
            PairStage& to = memory_.stages[asked_ % kPairStages];
            block_.each([&](int thread) MMFAST_LAMBDA {
                // The first two warpgroups bring points; the third has norms.
                if (thread < kPairCopiers) {
                    pair_copy(block_, job_, start * kPairWidth + kept[thread].from, thread, to);
                } else if (thread < kPairCopiers + kPairColumns / 4) {
                    const int at = (thread - kPairCopiers) * 4;
                    block_.copy(&to.norms[at], norms_ + start + at);
                }
            });
            ahead_.next(tiles_);
        }
        ++asked_;
        block_.commit();
    }

    // Waits for the next tile's columns, and asks for those of the second behind it: that stage is free, for all have
    // evaluated the tile before the last, or they would not have come here.
    MMFAST_INLINE void next(Kept& kept) {
        block_.wait_copies();  // for all but the last that was asked for
        ++ready_;
        ask(kept);
    }

    template <int half>
    MMFAST_INLINE void multiply(Kept& kept) {
        const PairStage& stage = memory_.stages[(ready_ - 1) % kPairStages];
        constexpr int from = half * kPairHalf * kPairWidth;
        block_.template multiply<half>(kept, stage.parts[0] + from, stage.parts[1] + from);
    }

    // A half whose products began before those of the last `later` ones.
    template <int half, int later>
    MMFAST_INLINE void evaluate(Kept& kept) {
        block_.template wait_products<later, half>(kept);
        // The second half is evaluated when the next tile has come, unless there is none.
        const unsigned tile = ready_ - (half == 1 && later == 1 ? 2 : 1);
        const float* column_norms = memory_.stages[tile % kPairStages].norms + half * kPairHalf;
        block_.each([&](int thread) MMFAST_LAMBDA {
            PairRegisters& mine = kept[thread];
            float sums[4] = {0, 0, 0, 0};
            MMFAST_UNROLL
            for (int g = 0; g < kPairHalf / 8; ++g) {
                const float* norms = column_norms + g * 8 + thread % 4 * 2;
                const float column[2] = {norms[0], norms[1]};
                MMFAST_UNROLL
                for (int e = 0; e < 4; ++e) {
                    const float exponent = mine.tiles[half][4 * g + e] * factor_ + (mine.norms[e / 2] + column[e % 2]);
                    const float u = fast_exp2(exponent);
                    sums[e] = u * polynomial(u) + sums[e];
                }
            }
            mine.sum += double((sums[0] + sums[1]) + (sums[2] + sums[3]));
        });
    }

    // Σ weights_t u^(2^(Count - 1 - t)), over u; the first weight is 1.
    MMFAST_INLINE float polynomial(float u) const {
        float powers[Count > 2 ? Count - 2 : 1] = {u};
        MMFAST_UNROLL
        for (int t = 1; t < Count - 2; ++t) powers[t] = powers[t - 1] * powers[t - 1];
        if constexpr (Count == 1) return 1;
        float found = Count == 2
                          ? powers[0] + weights_[1]
                          : powers[Count > 2 ? Count - 3 : 0] * powers[Count > 2 ? Count - 3 : 0] + weights_[Count > 1];
        MMFAST_UNROLL
        for (int t = 2; t < Count; ++t) found = found * powers[Count - 1 - t] + weights_[t];
        return found;
    }

    MMFAST_INLINE void add_up() {
        block_.barrier();
        block_.each([&](int thread) MMFAST_LAMBDA {
            if (thread >= 48) return;
            double sum = 0;
            for (int i = thread % 16; i < kPairThreads; i += 16) sum += memory_.found[thread / 16][i];
            memory_.partial[thread / 16][thread % 16] = sum;
        });
        block_.barrier();
        block_.each([&](int thread) MMFAST_LAMBDA {
            if (thread >= 3) return;
            double sum = 0;
            for (int i = 0; i < 16; ++i) sum += memory_.partial[thread][i];
            const bool counts = job_.all_sums || job_.coefs[thread] != 0;  // what does not may even be NaN
            job_.sums[(item_ * job_.blocks + share_) * 3 + thread] = counts ? sum * job_.table[item_ * Count * 4] : 0;
        });
    }

    const PairsJob& job_;
    const Block& block_;
    PairMemory& memory_;
    const PairTiles tiles_;
    const int64_t item_;
    const int share_;
    const uint16_t *hi_, *lo_;
    const float *norms_, *numbers_;
    float factor_, weights_[Count];
    Cursor ahead_;
    unsigned asked_, ready_;  // tiles
};

}  // namespace mmd
}  // namespace mmfast
