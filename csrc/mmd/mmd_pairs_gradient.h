// Sums of Gaussians of many pairs of points with up to 64 features, and gradients by the points, as a block of two
// warpgroups runs them on a GPU whose tensor cores work beside the rest (sm_90). No CUDA header is needed, so that a host
// can run the same code (tests/native/test_mmd_pairs_gradient.cpp).
//
// It computes what the first loop of `narrow` does with gradients (mmfast/mmd/triton_narrow.py, whose arrays these are): a
// block of rows, which own their gradient, with a strip of columns, but for the tile at the diagonal and what is left
// at the ends of samples. That, and blocks whose weights are too small for it, stay there.
//
// Note: [What a pair costs with its gradient]
//   Each pair is seen from both sides: 2^30 of 16 384 + 16 384 points. Products: three of float16 parts for the distance,
//   three for weights · points, 768 FLOP, 4096 a cycle and multiprocessor: 0.188 cycles a pair, 0.87 ms at 1.75 GHz and 132
//   multiprocessors. Arithmetic of five terms: 3 instructions for u, 2 squarings, 4 and 1 for the weight, 1 into the row's sum,
//   3 for its two parts, and for the half of the pairs whose value counts 4: 16 of 128 threads a cycle, 0.125 cycles a pair,
//   0.58 ms. Exponentials alone 0.29 ms, bytes from the L2 cache, 2 a pair, 9 a cycle. One behind the other products and
//   arithmetic were 1.8 ms in `narrow`; here products are the floor.
//   Of weights in one part gradients are off by 1e-4 and more; without the points' second part alike: three products.
//   To see each pair from one side would be 9 products for two pairs instead of 12, but columns' gradients have to be
//   written and read then for each block of rows: 2 GB, 0.5 ms, for the 0.22 that products gain.
//
// Note: [What is under way]
//   A thread evaluates the 32 pairs of a tile that are its own while the products for its warpgroup's next tile are under
//   way, behind those of the last tile's weights with its points. They have to be done before weights are overwritten: then
//   the other warpgroup's are at work. Registers: points of the rows 32, two tiles 64, weights 32, gradient 32.
//   Neither warpgroup waits for the other but where it is a tile ahead: what the one has arrived with at a tile, the other
//   asks for at the next. So they fall into turns by themselves.
//
// Note: [Lengths of sums]
//   Tensor cores cut off what they add to: a strip is no longer than in `narrow`.
#pragma once

#include "mmd/mmd_pairs.h"

namespace mmfast {
namespace mmd {

constexpr int kPullGroups = 2, kPullRows = 64 * kPullGroups, kPullThreads = 128 * kPullGroups, kPullStages = 5;
static_assert(kPullRows == kPairColumns, "the diagonal is in one tile of a block of rows");
static_assert(kPullThreads == kPairCopiers, "each thread brings as many pieces");

struct PairsGradientJob {
    PairsJob pairs;  // whose blocks and sums nobody reads
    int64_t batch;
    int row_tiles;                // of kPullRows rows
    int strips, strips_x, tiles;  // strips of `tiles` times kPairColumns columns, those of x first
    double* totals;               // [batch][row_tiles][strips]: over pairs left of the diagonal
    float* gradients;             // [strips][batch][rows][kPairWidth]
    int* done;                    // [batch][row_tiles][strips]: whether these two were found; else they are not written
};

struct PairsGradientMemory {
    PairStage stages[kPullStages];
    double totals[kPullThreads], partial[16];
    float weights[kPullThreads][2], of_rows[kPullRows];
    uint64_t arrived[2];
};

struct alignas(8) Two {
    float of[2];
};

struct PullRegisters {
    uint32_t points[2][kPairWidth / 16][4];
    float tiles[2][kPairHalf / 2];
    uint32_t weights[2][kPairHalf / 16][4];  // parts of a tile's, as the left operand
    float sums[kPairWidth / 2];              // of weights · points: the rows' features as a tile's columns
    float norms[2], weight[2];
    int64_t from;  // of the points that it copies, in the first tile
    double total;
};

// One warpgroup's part in the work.
template <int Count, class Block>
class PairsGradient {
public:
    using Kept = typename Block::template Kept<PullRegisters>;

    MMFAST_INLINE PairsGradient(const PairsGradientJob& job, const Block& block, PairsGradientMemory& memory,
                                int64_t index)
        : job_(job), block_(block), memory_(memory) {
        const PairsJob& pairs = job.pairs;
        const int64_t programs = int64_t(job.row_tiles) * job.strips;
        item_ = index / programs;
        row_ = int(index % programs % job.row_tiles);
        strip_ = int(index % programs / job.row_tiles);
        hi_ = pairs.hi + item_ * pairs.rows * kPairWidth;
        lo_ = pairs.lo + item_ * pairs.rows * kPairWidth;
        norms_ = pairs.norms + item_ * pairs.rows;
        numbers_ = pairs.numbers + item_ * pairs.room;
    }

    MMFAST_INLINE void run() {
        const int values = choose();
        if (count_ == 0) {
            block_.each([&](int thread) MMFAST_LAMBDA {
                if (thread == 0) job_.done[place()] = 0;
            });
            return;
        }
        factor_ = numbers_[0];
        MMFAST_UNROLL
        for (int t = 0; t < Count; ++t) {
            slopes_[t] = numbers_[kFirstNumber + Count + t];
            weights_[t] = numbers_[kFirstNumber + 3 * Count + t];
            if (t > 0) weights_[t] -= weights_[0] * slopes_[t];
        }
        Kept kept;
        block_.open(memory_.arrived);
        fetch(kept);
        asked_ = passed_ = to_ = 0;
        now_ = kPullStages - 1;
        ask(kept);
        ask(kept);
        block_.template arrive<1>(&memory_.arrived[0]);

        if (values > 0) tiles<true>(kept, values);
        if (count_ > values) tiles<false>(kept, count_ - values);
        store(kept);
    }

private:
    // Which tiles there are; how many of them are left of the diagonal.
    MMFAST_INLINE int choose() {
        const PairsJob& pairs = job_.pairs;
        const int second = int(pairs.second / kPairColumns);
        const bool of_y = row_ >= second, with_y = strip_ >= job_.strips_x;
        begin_ = (with_y ? second : 0) + (strip_ - (with_y ? job_.strips_x : 0)) * job_.tiles;
        const int whole = with_y ? second + int(pairs.m / kPairColumns) : int(pairs.n / kPairColumns);
        const int end = begin_ + job_.tiles < whole ? begin_ + job_.tiles : whole;
        const int64_t behind = of_y ? pairs.second + pairs.m : pairs.n;
        scalar_ = of_y != with_y ? pairs.coefs[2] : 2 * (of_y ? pairs.coefs[1] : pairs.coefs[0]);
        count_ = before_ = 0;
        // What a coefficient leaves out may even be NaN.
        if (!(numbers_[1] > 0) || int64_t(row_ + 1) * kPullRows > behind || (scalar_ == 0 && !pairs.all_sums)) return 0;
        if (end <= begin_) return 0;
        before_ = row_ < begin_ ? 0 : (row_ < end ? row_ : end) - begin_;
        skips_ = row_ >= begin_ && row_ < end;
        count_ = end - begin_ - skips_;
        return before_;
    }

    MMFAST_INLINE int64_t place() const { return (item_ * job_.row_tiles + row_) * job_.strips + strip_; }

    // The points and norms of this thread's rows.
    MMFAST_INLINE void fetch(Kept& kept) {
        block_.each([&](int thread) MMFAST_LAMBDA {
            PullRegisters& mine = kept[thread];
            const int64_t row = int64_t(row_) * kPullRows + pair_row(thread);
            pair_points(block_, hi_, lo_, row, thread, mine.points);
            MMFAST_UNROLL
            for (int e = 0; e < 2; ++e) {
                mine.norms[e] = norms_[row + 8 * e] + numbers_[6];
                mine.weight[e] = 0;
            }
            MMFAST_UNROLL
            for (float& sum : mine.sums) sum = 0;
            mine.from = item_ * job_.pairs.rows * kPairWidth + thread * 8;
            mine.total = 0;
        });
    }

    // The next tile's columns are on their way from here on.
    MMFAST_INLINE void ask(Kept& kept) {
        if (asked_ < count_) {
            const int64_t start = int64_t(begin_ + asked_ + (asked_ >= before_ ? skips_ : 0)) * kPairColumns;
            PairStage& to = memory_.stages[to_];
            block_.each([&](int thread) MMFAST_LAMBDA {
                pair_copy(block_, job_.pairs, start * kPairWidth + kept[thread].from, thread, to);
                if (thread < kPairColumns / 4) block_.copy(&to.norms[thread * 4], norms_ + start + thread * 4);
            });
        }
        ++asked_;
        to_ = to_ + 1 < kPullStages ? to_ + 1 : 0;
        block_.commit();
    }

    // At a tile: the other warpgroup has come to the tile before, with this one's points, and so is through with the third
    // before this one, whose stage is the one that is asked for.
    MMFAST_INLINE void next(Kept& kept) {
        block_.template arrive<0>(&memory_.arrived[(passed_ + 1) % 2]);
        block_.wait(&memory_.arrived[passed_ % 2], passed_ / 2 % 2);
        ++passed_;
        now_ = now_ + 1 < kPullStages ? now_ + 1 : 0;
        ask(kept);
    }

    // Some tiles by halves. As in mmd_pairs.h as many products are under way whenever the code comes to a place.
    template <bool Values>
    MMFAST_INLINE void tiles(Kept& kept, int left) {
        block_.wait_sums(kept);
        next(kept);
        multiply<0>(kept, now_);
        for (; left > 1; --left) {
            multiply<1>(kept, now_);
            evaluate<0, 1, Values>(kept, now_);
            pull<0>(kept, now_);
            const int last = now_;
            next(kept);
            multiply<0>(kept, now_);
            evaluate<1, 1, Values>(kept, last);
            pull<1>(kept, last);
        }
        if (left == 1) {
            multiply<1>(kept, now_);
            evaluate<0, 1, Values>(kept, now_);
            pull<0>(kept, now_);
            evaluate<1, 0, Values>(kept, now_);
            pull<1>(kept, now_);
        } else {
            block_.template wait_products<0, 0>(kept);
        }
        block_.wait_sums(kept);
    }

    template <int half>
    MMFAST_INLINE void multiply(Kept& kept, int stage) {
        const PairStage& from = memory_.stages[stage];
        constexpr int at = half * kPairHalf * kPairWidth;
        block_.template multiply<half>(kept, from.parts[0] + at, from.parts[1] + at);
    }

    template <int half>
    MMFAST_INLINE void pull(Kept& kept, int stage) {
        const PairStage& from = memory_.stages[stage];
        constexpr int at = half * kPairHalf * kPairWidth;
        block_.pull(kept, from.parts[0] + at, from.parts[1] + at);
    }

    // A half whose products began before the last `later` ones, and before the weights that are overwritten were taken.
    template <int half, int later, bool Values>
    MMFAST_INLINE void evaluate(Kept& kept, int stage) {
        block_.template wait_products<later, half>(kept);
        const float* column_norms = memory_.stages[stage].norms + half * kPairHalf;
        block_.each([&](int thread) MMFAST_LAMBDA {
            PullRegisters& mine = kept[thread];
            float sums[4] = {0, 0, 0, 0}, weight[4] = {0, 0, 0, 0};
            MMFAST_UNROLL
            for (int g = 0; g < kPairHalf / 8; ++g) {
                const Two column = *reinterpret_cast<const Two*>(column_norms + g * 8 + thread % 4 * 2);
                float found[4];
                MMFAST_UNROLL
                for (int e = 0; e < 4; ++e) {
                    const float exponent =
                        mine.tiles[half][4 * g + e] * factor_ + (mine.norms[e / 2] + column.of[e % 2]);
                    float powers[Count] = {fast_exp2(exponent)};
                    MMFAST_UNROLL
                    for (int t = 1; t < Count - 1; ++t) powers[t] = powers[t - 1] * powers[t - 1];
                    if constexpr (Values && Count > 1) sums[e] = powers[0] * value(powers) + sums[e];
                    found[e] = powers[0] * slope(powers);
                    weight[e] += found[e];
                }
                MMFAST_UNROLL
                for (int e = 0; e < 2; ++e)
                    block_.split(found[2 * e], found[2 * e + 1], mine.weights[0][g / 2][g % 2 * 2 + e],
                                 mine.weights[1][g / 2][g % 2 * 2 + e]);
            }
            const float of_rows[2] = {weight[0] + weight[1], weight[2] + weight[3]};
            if constexpr (Values) {
                const float rest = (sums[0] + sums[1]) + (sums[2] + sums[3]);
                mine.total += double((of_rows[0] + of_rows[1]) * weights_[0] + rest);
            }
            MMFAST_UNROLL
            for (int e = 0; e < 2; ++e) mine.weight[e] += of_rows[e];
        });
    }

    // Σ slopes_t u^(2^(Count - 1 - t)), over u, from u, u^2, u^4 and so on; the first slope is 1.
    MMFAST_INLINE float slope(const float (&powers)[Count]) const {
        if constexpr (Count == 1) return 1;
        float found = powers[Count > 1 ? Count - 2 : 0] + slopes_[Count > 1];
        MMFAST_UNROLL
        for (int t = 2; t < Count; ++t) found = found * powers[Count - 1 - t] + slopes_[t];
        return found;
    }

    // The same of weights, but for the first term, which the slope has.
    MMFAST_INLINE float value(const float (&powers)[Count]) const {
        float found = weights_[Count > 1];
        MMFAST_UNROLL
        for (int t = 2; t < Count; ++t) found = found * powers[Count - 1 - t] + weights_[t];
        return found;
    }

    MMFAST_INLINE void store(Kept& kept) {
        block_.each([&](int thread) MMFAST_LAMBDA {
            memory_.totals[thread] = kept[thread].total;
            for (int e = 0; e < 2; ++e) memory_.weights[thread][e] = kept[thread].weight[e];
        });
        block_.barrier();
        // Weights are good to 2^-25, of up to 2^15: enough where they are 2^-4 in the mean.
        const float least = float(count_) * kPairColumns;
        const bool fine = block_.all([&](int thread) MMFAST_LAMBDA {
            if (thread < 16) {
                double sum = 0;
                for (int i = thread; i < kPullThreads; i += 16) sum += memory_.totals[i];
                memory_.partial[thread] = sum;
            }
            if (thread >= kPullRows) return true;
            const auto* of = &memory_.weights[thread / 16 * 32 + thread % 8 * 4];
            const int e = thread / 8 % 2;
            const float sum = (of[0][e] + of[1][e]) + (of[2][e] + of[3][e]);
            memory_.of_rows[thread] = sum;
            return std::fabs(sum) * 16 >= least;
        });
        block_.each([&](int thread) MMFAST_LAMBDA {
            if (thread == 0) {
                double sum = 0;
                for (int i = 0; i < 16; ++i) sum += memory_.partial[i];
                job_.done[place()] = fine;
                if (fine) job_.totals[place()] = sum * job_.pairs.table[item_ * Count * 4];
            }
            if (!fine) return;
            const PullRegisters& mine = kept[thread];
            const float scale = 2 * numbers_[5] * (float(scalar_) * numbers_[4]);
            const int row = pair_row(thread);
            float* gradients =
                job_.gradients +
                (((strip_ * job_.batch + item_) * job_.pairs.rows) + int64_t(row_) * kPullRows + row) * kPairWidth;
            MMFAST_UNROLL
            for (int g = 0; g < kPairWidth / 8; ++g) {
                MMFAST_UNROLL
                for (int e = 0; e < 2; ++e) {
                    const int piece = g % 2 * 2 + e;
                    const float weight = memory_.of_rows[row + 8 * e];
                    float head[2], low[2];
                    block_.join(mine.points[0][g / 2][piece], head);
                    block_.join(mine.points[1][g / 2][piece], low);
                    Two found;
                    MMFAST_UNROLL
                    for (int i = 0; i < 2; ++i)
                        found.of[i] = (weight * (head[i] + low[i]) - mine.sums[4 * g + 2 * e + i]) * scale;
                    *reinterpret_cast<Two*>(gradients + e * 8 * kPairWidth + g * 8 + thread % 4 * 2) = found;
                }
            }
        });
    }

    const PairsGradientJob& job_;
    const Block& block_;
    PairsGradientMemory& memory_;
    int64_t item_;
    int row_, strip_, begin_, count_, before_, skips_;  // tiles of kPairColumns columns; those before the diagonal
    const uint16_t *hi_, *lo_;
    const float *norms_, *numbers_;
    double scalar_;
    float factor_, slopes_[Count], weights_[Count];
    int asked_, passed_, now_, to_;  // tiles asked for and begun, and their stages
};

}  // namespace mmd
}  // namespace mmfast
