// The GPU's warpgroups for gradients of sums of pairs, run on the host against double loops: each in a thread of its own,
// one at a time, and the other's turn comes by chance or when one has to wait. Copies and products end as late as they may:
// when they are waited for, and products read their operands not before, so that what is awaited too late, or overwritten
// too early, is seen.
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "check.h"
#include "mmd/mmd_pairs_gradient.h"
#include "warpgroups.h"

using namespace mmfast;
using namespace mmfast::mmd;

namespace {

// What the two share.
struct Turns {
    std::mutex mutex;
    std::condition_variable changed;
    int whose = 0, waiting = 0, generation = 0;
    bool ended[2] = {false, false}, agrees[2] = {};
    double chance;
    test::Random random;

    Turns(double how_often, uint64_t seed) : chance(how_often), random(seed) {}

    void take(int me) {
        std::unique_lock<std::mutex> lock(mutex);
        changed.wait(lock, [&] { return whose == me; });
    }
    void give(int me) {
        {
            std::unique_lock<std::mutex> lock(mutex);
            if (ended[1 - me]) return;
            whose = 1 - me;
            changed.notify_all();
        }
        take(me);
    }
    void end(int me) {
        std::unique_lock<std::mutex> lock(mutex);
        ended[me] = true;
        whose = 1 - me;
        changed.notify_all();
    }
    template <class F>
    void until(int me, const F& f) {
        for (int rounds = 0; !f(); ++rounds) {
            CHECK(!ended[1 - me] && rounds < 100, "both wait");
            give(me);
        }
    }
    void barrier(int me) {
        const int before = generation;
        if (++waiting == 2) {
            waiting = 0;
            ++generation;
        } else {
            until(me, [&] { return generation != before; });
        }
    }
};

struct HostBlock {
    template <class T>
    struct Kept {
        std::unique_ptr<T[]> all{new T[128]};
        T& operator[](int thread) { return all[thread % 128]; }
    };
    struct Copy {
        void* to;
        const void* from;
    };
    struct Product {
        int half;  // or -1 for weights · points
        const uint16_t *hi, *lo;
    };
    Turns& turns;
    const int group;
    const bool one_part;  // of the weights
    mutable int phase = 0;
    mutable std::vector<Copy> asked;
    mutable std::deque<std::vector<Copy>> groups;
    mutable std::deque<Product> products;

    HostBlock(Turns& shared, int which, bool less) : turns(shared), group(which), one_part(less) {}

    void step() const {
        if (turns.random.chance(turns.chance)) turns.give(group);
    }
    template <class F>
    void each(const F& f) const {
        step();
        ++phase;
        for (int i = 0; i < 128; ++i) f(group * 128 + (phase % 3 == 0 ? i : phase % 3 == 1 ? 127 - i : (i + 64) % 128));
    }
    void barrier() const { turns.barrier(group); }
    template <class F>
    bool all(const F& f) const {
        turns.agrees[group] = true;
        each([&](int thread) {
            if (!f(thread)) turns.agrees[group] = false;
        });
        barrier();
        const bool found = turns.agrees[0] && turns.agrees[1];
        barrier();
        return found;
    }
    void open(uint64_t (&arrived)[2]) const {
        if (group == 0) arrived[0] = arrived[1] = 0;
        barrier();
    }
    template <int left>
    void arrive(uint64_t* arrived) const {
        for (; groups.size() > left; groups.pop_front())
            for (const Copy& c : groups.front()) std::memcpy(c.to, c.from, 16);
        ++*arrived;
        step();
    }
    void wait(uint64_t* arrived, int parity) const {
        turns.until(group, [&] { return int(*arrived / kPullGroups % 2) != parity; });
    }
    uint32_t two(const uint16_t* from) const { return uint32_t(from[0]) | uint32_t(from[1]) << 16; }
    void copy(void* to, const void* from) const { asked.push_back({to, from}); }
    void commit() const {
        groups.push_back(asked);
        asked.clear();
    }
    void split(float a, float b, uint32_t& head, uint32_t& low) const {
        float rounded[2];
        head = test::bits(a) | test::bits(b) << 16;
        join(head, rounded);
        low = one_part ? 0 : test::bits(a - rounded[0]) | test::bits(b - rounded[1]) << 16;
    }
    void join(uint32_t packed, float (&to)[2]) const {
        for (int i = 0; i < 2; ++i) to[i] = test::half(packed >> 16 * i);
    }
    template <int half>
    void multiply(Kept<PullRegisters>& kept, const uint16_t* hi, const uint16_t* lo) const {
        for (int t = 0; t < 128; ++t)
            for (float& x : kept[t].tiles[half]) x = NAN;
        products.push_back({half, hi, lo});
        step();
    }
    void pull(Kept<PullRegisters>&, const uint16_t* hi, const uint16_t* lo) const {
        products.push_back({-1, hi, lo});
        step();
    }
    template <int later, int half>
    void wait_products(Kept<PullRegisters>& kept) const {
        step();
        for (; products.size() > later; products.pop_front()) multiply(kept, products.front());
    }
    void wait_sums(Kept<PullRegisters>& kept) const { wait_products<0, 0>(kept); }

    // A warpgroup's product, its operands and result where the tensor cores have them.
    static void multiply(Kept<PullRegisters>& kept, const Product& p) {
        static float a[2][64][kPairWidth], b[2][kPairHalf][kPairWidth];
        const bool sums = p.half < 0;
        for (int part = 0; part < 2; ++part) {
            for (int t = 0; t < 128; ++t) test::left(sums ? kept[t].weights[part] : kept[t].points[part], t, a[part]);
            test::right(part == 0 ? p.hi : p.lo, kPairHalf, b[part]);
        }
        for (int t = 0; t < 128; ++t)
            for (int i = 0; i < kPairHalf / 2; ++i) {
                const int row = test::row_of(t, i), column = test::column_of(t, i);
                float& to = sums ? kept[t].sums[i] : kept[t].tiles[p.half][i];
                float sum = sums ? to : 0;
                for (const auto& [left, right] : {std::pair{0, 0}, {0, 1}, {1, 0}})
                    for (int k = 0; k < kPairWidth; ++k)
                        sum += a[left][row][k] * (sums ? b[right][k][column] : b[right][column][k]);
                to = sum;
            }
    }
};

struct Case {
    int64_t n, m;
    int tiles;  // of a strip
    bool all_sums = false, far = false, small = false, one_part = false;
    double coefs[3] = {1, 2, -3};
    double chance = 0.1;
};

// The largest error of a gradient, of the largest in its block of rows.
template <int Count>
double run(const Case& c, test::Random& random) {
    constexpr int64_t batch = 2;
    const int room = 48;
    const auto up = [](int64_t n) { return (n + kPullRows - 1) / kPullRows * kPullRows; };
    const int64_t second = up(c.n), rows = second + up(c.m);
    const int row_tiles = int(rows / kPullRows), split = int(second / kPairColumns), all = int(rows / kPairColumns);
    const int strips_x = (split + c.tiles - 1) / c.tiles, strips = strips_x + (all - split + c.tiles - 1) / c.tiles;
    std::vector<uint16_t> hi(batch * rows * kPairWidth), lo(hi.size());
    std::vector<float> norms(batch * rows), numbers(batch * room, NAN),
        gradients(strips * batch * rows * kPairWidth, NAN);
    std::vector<double> points(hi.size()), table(batch * Count * 4, NAN), totals(batch * row_tiles * strips, NAN);
    std::vector<int> done(totals.size(), -1);
    for (int64_t item = 0; item < batch; ++item) {
        for (int64_t i = 0; i < rows; ++i) {
            double norm = 0;
            for (int k = 0; k < kPairWidth; ++k) {
                const float x = float(0.2 * random.normal());
                const uint32_t head = test::bits(x);
                hi[(item * rows + i) * kPairWidth + k] = uint16_t(head);
                lo[(item * rows + i) * kPairWidth + k] = uint16_t(test::bits(x - test::half(head)));
                points[(item * rows + i) * kPairWidth + k] =
                    double(test::half(head)) + double(test::half(lo[(item * rows + i) * kPairWidth + k]));
                norm += double(x) * x;
            }
            norms[item * rows + i] = float(-0.05 * norm);
        }
        float* own = &numbers[item * room];
        own[0] = 0.1f;
        own[1] = c.far ? 0 : 1;
        own[4] = 0.5;
        own[5] = item == 0 ? -0.3f : 0.4f;
        own[6] = c.small ? -9 : 11.2f / float(1 << (Count - 1));  // as the largest power may be
        for (int t = 0; t < Count; ++t) {
            own[kFirstNumber + Count + t] = t == 0 ? 1 : float(random.uniform());
            own[kFirstNumber + 3 * Count + t] = t == 0 ? 0.25f : float(random.uniform());
        }
        table[item * Count * 4] = 0.5 + double(item);
    }
    PairsGradientJob job{};
    job.pairs = {c.n,          c.m,     second, rows,  hi.data(), lo.data(),  norms.data(), numbers.data(),
                 table.data(), c.coefs, room,   Count, 0,         c.all_sums, nullptr};
    job.batch = batch;
    job.row_tiles = row_tiles;
    job.strips = strips;
    job.strips_x = strips_x;
    job.tiles = c.tiles;
    job.totals = totals.data();
    job.gradients = gradients.data();
    job.done = done.data();
    double worst = 0;
    for (int64_t index = 0; index < batch * row_tiles * strips; ++index) {
        const auto memory = std::make_unique<PairsGradientMemory>();
        std::memset(static_cast<void*>(memory.get()), 0xff, sizeof *memory);  // not a number
        Turns turns(c.chance, random.bits());
        const auto work = [&](int group) {
            turns.take(group);
            const HostBlock block(turns, group, c.one_part);
            PairsGradient<Count, HostBlock>(job, block, *memory, index).run();
            CHECK(block.products.empty(), "products are left");
            turns.end(group);
        };
        std::thread other(work, 1);
        work(0);
        other.join();

        const int64_t item = index / (row_tiles * strips), row = index % (row_tiles * strips) % row_tiles;
        const int64_t strip = index % (row_tiles * strips) / row_tiles;
        const bool of_y = row >= split, with_y = strip >= strips_x;
        const int64_t begin = with_y ? split + (strip - strips_x) * c.tiles : strip * c.tiles;
        const int64_t end = std::min(begin + c.tiles, with_y ? split + c.m / kPairColumns : c.n / kPairColumns);
        const double scalar = of_y != with_y ? c.coefs[2] : 2 * c.coefs[of_y];
        const int64_t behind = of_y ? second + c.m : c.n;
        int64_t seen = 0;
        for (int64_t tile = begin; tile < end; ++tile) seen += tile != row;
        const bool expected =
            !c.far && !c.small && seen > 0 && (row + 1) * kPullRows <= behind && (scalar != 0 || c.all_sums);
        const int64_t place = (item * row_tiles + row) * strips + strip;
        CHECK(done[place] == int(expected), "row %ld, strip %ld: %d", long(row), long(strip), done[place]);
        const float* of = &gradients[((strip * batch + item) * rows + row * kPullRows) * kPairWidth];
        if (!expected) {
            CHECK(std::isnan(totals[place]) && std::isnan(of[0]), "written, though it was not found");
            continue;
        }
        const auto point = [&](int64_t i, int k) { return points[(item * rows + i) * kPairWidth + k]; };
        const float* own = &numbers[item * room];
        double total = 0, largest = 0, off = 0;
        for (int64_t i = row * kPullRows; i < (row + 1) * kPullRows; ++i) {
            double gradient[kPairWidth] = {};
            for (int64_t j = begin * kPairColumns; j < end * kPairColumns; ++j) {
                if (j / kPairColumns == row) continue;
                double z = 0;
                for (int k = 0; k < kPairWidth; ++k) z += point(i, k) * point(j, k);
                double power = std::exp2(0.1f * z + norms[item * rows + i] + norms[item * rows + j] + own[6]);
                double value = 0, slope = 0;
                for (int t = Count - 1; t >= 0; --t, power *= power) {
                    value += own[kFirstNumber + 3 * Count + t] * power;
                    slope += own[kFirstNumber + Count + t] * power;
                }
                if (j / kPairColumns < row) total += value;
                for (int k = 0; k < kPairWidth; ++k) gradient[k] += slope * (point(i, k) - point(j, k));
            }
            for (int k = 0; k < kPairWidth; ++k) {
                const double wanted = 2 * double(own[5]) * scalar * double(own[4]) * gradient[k];
                largest = std::max(largest, std::fabs(wanted));
                off = std::max(off, std::fabs(of[(i - row * kPullRows) * kPairWidth + k] - wanted));
            }
        }
        total *= table[item * Count * 4];
        CHECK(std::fabs(totals[place] - total) <= 1e-6 * std::fabs(total), "row %ld, strip %ld: %.9g, not %.9g",
              long(row), long(strip), totals[place], total);
        worst = std::max(worst, largest > 0 ? off / largest : off);
    }
    return worst;
}

}  // namespace

int main() {
    test::Random random(3);
    const auto fine = [](double error) { CHECK(error <= 2e-6, "an error of %.2g", error); };
    fine(run<5>({0, 0, 4}, random));
    fine(run<5>({127, 128, 4}, random));
    fine(run<5>({300, 390, 2}, random));
    fine(run<5>({128, 520, 5, false, false, false, false, {1, 2, -3}, 0.5}, random));
    fine(run<5>({900, 100, 7, false, false, false, false, {1, 2, -3}, 0}, random));
    fine(run<1>({390, 200, 2}, random));
    fine(run<2>({256, 256, 1}, random));
    fine(run<3>({256, 300, 2}, random));
    fine(run<4>({200, 520, 3}, random));
    fine(run<8>({384, 256, 3, false, false, false, false, {1, 2, -3}, 0.9}, random));
    fine(run<5>({300, 256, 2, false, true}, random));
    fine(run<5>({300, 256, 2, false, false, true}, random));
    fine(run<5>({390, 256, 2, false, false, false, false, {1, 0, -3}}, random));
    fine(run<5>({256, 256, 2, true, false, false, false, {0, 1, 0}}, random));
    const double error = run<5>({256, 256, 2, false, false, false, true}, random);
    CHECK(error > 1e-5, "one part of the weights would do: %.2g", error);
    std::puts("mmd_pairs_gradient: fine");
}
