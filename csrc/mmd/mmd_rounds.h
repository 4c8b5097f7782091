// The tasks of a sweep and their order; part of mmd_sweep.h.
//
// Note: [Rounds]
//   Points come in blocks, and a task is a pair of blocks. Each pair of points is met once: what is symmetric is computed
//   once and counted for both. In a round no block takes part in two tasks, so that a task adds to the rows of both its
//   blocks (row sums, gradients) without locks, and in an order that depends on the sizes alone: the result is the same for
//   any number of threads. The rounds of n blocks among themselves are those of a round-robin tournament (n - 1 rounds of
//   n / 2 pairs), after one round of each block with itself; between two sets they are the cyclic shifts. Threads do not meet
//   after a round, whose slowest task would hold up all: a task waits for the earlier ones of its own two blocks. Those of the
//   next round's first tasks are the last round's first, which are through when a thread gets there. A reducer that only adds
//   up numbers needs no rounds.
#pragma once

#include "mmd/mmd_sweep.h"

namespace mmfast {
namespace mmd {

template <class T>
auto Sweep<T>::rounds(const bool (&wanted)[3], bool flat) const -> std::vector<Tasks> {
    std::vector<Tasks> all(1);
    const int n = int(blocks_.size());
    const auto add = [&](int a, int b) {
        if (a > b) std::swap(a, b);
        if (b >= n) return;
        const int s = blocks_[a].side, t = blocks_[b].side;
        if (wanted[s != t ? 2 : s]) all.back().emplace_back(a, b);
    };
    const auto next = [&] {
        if (!all.back().empty()) all.emplace_back();
    };
    const bool between = pairs_ == Pairs::between;
    if (flat) {
        for (int a = 0; a < (between ? x_blocks_ : n); ++a)
            for (int b = between ? x_blocks_ : a; b < n; ++b) add(a, b);
    } else if (between) {
        const int rows = x_blocks_, columns = n - x_blocks_, most = std::max(rows, columns);
        for (int r = 0; r < most; next(), ++r)
            for (int a = 0; a < rows; ++a)
                if ((a + r) % most < columns) add(a, rows + (a + r) % most);
    } else {
        for (int a = 0; a < n; ++a) add(a, a);
        next();
        const int even = (n + 1) / 2 * 2, m = even - 1;
        for (int r = 0; r < m; next(), ++r) {
            add(m, r);
            for (int i = 1; i < even / 2; ++i) add((r + i) % m, (r - i + m) % m);
        }
    }
    return all;
}

// The tasks of all rounds, one behind the other.
template <class T>
std::vector<Turn> Sweep<T>::in_turn(const std::vector<Tasks>& rounds) const {
    std::vector<Turn> turns;
    std::vector<int> used(blocks_.size());
    for (const Tasks& tasks : rounds) {
        const int64_t first = int64_t(turns.size());
        for (const auto& [a, b] : tasks) {
            turns.push_back({a, b, used[a], used[b], first, int64_t(tasks.size())});
            ++used[a];
            if (a != b) ++used[b];
        }
    }
    return turns;
}

template <class T>
template <class R>
void Sweep<T>::run(R& reducer, const std::vector<Tasks>& rounds) {
    const int64_t slots = this->slots(rounds);
    if (parameters_) parameter_sums_.assign(slots * 2 * most_terms() * 4, 0);
    const size_t own = sizes_ + reducer.scratch_bytes(block_size_);
    const Scratch packed = pack_all();
    const std::vector<Turn> turns = in_turn(rounds);
    const bool shared = rounds.size() > 1;  // blocks, by tasks of different rounds
    Turns of_blocks(shared ? batch_ * blocks() : 0);
    const auto pair = [&](int64_t i) {
        const Turn& t = turns[i / batch_];  // of its round
        const int64_t in_round = i - t.first * batch_, batch = in_round / t.count;
        const Turn& turn = turns[t.first + in_round % t.count];
        return BlockPair{batch, &blocks_[turn.a], &blocks_[turn.b], &turn};
    };
    const auto compute = [&](int64_t slot, const BlockPair& of, char* scratch, Hand& hand) {
        const auto [batch, a, b, turn] = of;
        if (sliced_) return sliced_task(batch, slot, *a, *b, scratch, reducer);
        task(batch, slot, *a, *b, scratch, reducer, [&] {
            const int64_t next = hand.ahead();
            return next < 0 ? BlockPair{} : pair(next);
        });
    };
    const auto compute_in_turn = [&](int64_t i, char* scratch, Hand& hand) {
        const BlockPair of = pair(i);
        const auto [batch, a, b, turn] = of;
        const int64_t at_a = batch * blocks() + a->index, at_b = batch * blocks() + b->index;
        if (!of_blocks.wait(at_a, turn->before_a) || !of_blocks.wait(at_b, turn->before_b)) return;
        try {
            compute(at_a, of, scratch, hand);
        } catch (...) {
            of_blocks.fail();
            throw;
        }
        of_blocks.done(at_a);
        if (at_a != at_b) of_blocks.done(at_b);
    };
    const int64_t n = int64_t(turns.size()) * batch_;
    if (shared) {
        size_t most = 0;
        for (const Tasks& tasks : rounds) most = std::max(most, tasks.size());
        deal_out(n, task_cost(), own, compute_in_turn, {.threads = int64_t(most) * batch_, .run = 1});
    } else {
        deal_out(n, task_cost(), own, [&](int64_t i, char* scratch, Hand& hand) { compute(i, pair(i), scratch, hand); },
                 {.shrinks = true});
    }
    put_packed();
    if (parameters_) add_up_parameters(slots / std::max<int64_t>(1, batch_));
}

}  // namespace mmd
}  // namespace mmfast
