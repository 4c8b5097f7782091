// The GPU's warpgroups for sums of pairs, run on the host against double loops. Copies and products end as late as they may:
// when they are waited for, and products read their operands not before, so that what is awaited too late, or overwritten
// too early, is seen. Threads of a step come in an order that changes.
#include <deque>
#include <memory>
#include <vector>

#include "check.h"
#include "mmd/mmd_pairs.h"
#include "warpgroups.h"

using namespace mmfast;
using namespace mmfast::mmd;

namespace {

struct HostBlock {
    template <class T>
    struct Kept {
        std::unique_ptr<T[]> all{new T[kPairThreads]};
        T& operator[](int thread) { return all[thread]; }
    };
    struct Copy {
        void* to;
        const void* from;
    };
    struct Product {
        int half;
        const uint16_t *hi, *lo;
    };
    mutable int phase = 0;
    mutable std::vector<Copy> asked;
    mutable std::deque<std::vector<Copy>> groups;
    mutable std::deque<Product> products;

    template <class F>
    void each(const F& f) const {
        constexpr int n = kPairThreads;
        ++phase;
        for (int i = 0; i < n; ++i) f(phase % 3 == 0 ? i : phase % 3 == 1 ? n - 1 - i : (i + n / 2) % n);
    }
    void barrier() const {}
    uint32_t two(const uint16_t* from) const { return uint32_t(from[0]) | uint32_t(from[1]) << 16; }
    void copy(void* to, const void* from) const { asked.push_back({to, from}); }
    void commit() const {
        groups.push_back(asked);
        asked.clear();
    }
    void wait_copies() const {
        for (; groups.size() > 1; groups.pop_front())
            for (const Copy& c : groups.front()) std::memcpy(c.to, c.from, 16);
    }
    template <int half>
    void multiply(Kept<PairRegisters>& kept, const uint16_t* hi, const uint16_t* lo) const {
        for (int t = 0; t < kPairThreads; ++t)
            for (float& x : kept[t].tiles[half]) x = NAN;
        products.push_back({half, hi, lo});
    }
    template <int later, int half>
    void wait_products(Kept<PairRegisters>& kept) const {
        for (; products.size() > later; products.pop_front())
            for (int group = 0; group < kPairGroups; ++group) multiply(kept, products.front(), group);
    }

    static void multiply(Kept<PairRegisters>& kept, const Product& p, int group) {
        static float a[2][64][kPairWidth], b[2][kPairHalf][kPairWidth];
        for (int part = 0; part < 2; ++part) {
            for (int t = 0; t < 128; ++t) test::left(kept[group * 128 + t].points[part], t, a[part]);
            test::right(part == 0 ? p.hi : p.lo, kPairHalf, b[part]);
        }
        for (int t = 0; t < 128; ++t)
            for (int i = 0; i < kPairHalf / 2; ++i) {
                const int row = test::row_of(t, i), column = test::column_of(t, i);
                float sum = 0;
                for (const auto& [left, right] : {std::pair{0, 0}, {0, 1}, {1, 0}})
                    for (int k = 0; k < kPairWidth; ++k) sum += a[left][row][k] * b[right][column][k];
                kept[group * 128 + t].tiles[p.half][i] = sum;
            }
    }
};

struct Case {
    int64_t n, m;
    int terms, blocks;
    bool all_sums = false, far = false;
    double coefs[3] = {1, 2, -3};
};

template <int Count>
void run(const Case& c, test::Random& random) {
    constexpr int64_t batch = 2;
    const int room = 48;
    const auto up = [](int64_t n) { return (n + 383) / 384 * 384; };
    const int64_t second = up(c.n), rows = second + up(c.m);
    std::vector<uint16_t> hi(batch * rows * kPairWidth), lo(hi.size());
    std::vector<float> norms(batch * rows), numbers(batch * room, NAN);
    std::vector<double> table(batch * Count * 4, NAN), sums(batch * c.blocks * 3, NAN);
    for (int64_t item = 0; item < batch; ++item) {
        for (int64_t i = 0; i < rows; ++i) {
            double norm = 0;
            for (int k = 0; k < kPairWidth; ++k) {
                const float x = float(0.2 * random.normal());
                const Float16 head = Float16(x), low = Float16(x - float(head));
                std::memcpy(&hi[(item * rows + i) * kPairWidth + k], &head, 2);
                std::memcpy(&lo[(item * rows + i) * kPairWidth + k], &low, 2);
                norm += double(x) * x;
            }
            norms[item * rows + i] = float(-0.05 * norm);
        }
        numbers[item * room] = 0.1f;
        numbers[item * room + 1] = c.far ? 0 : 1;
        for (int t = 0; t < Count; ++t) numbers[item * room + kFirstNumber + t] = t == 0 ? 1 : float(random.uniform());
        table[item * Count * 4] = 0.5 + double(item);
    }
    PairsJob job{c.n,          c.m,     second, rows,  hi.data(), lo.data(),  norms.data(), numbers.data(),
                 table.data(), c.coefs, room,   Count, c.blocks,  c.all_sums, sums.data()};
    for (int64_t index = 0; index < batch * c.blocks; ++index) {
        const HostBlock block;
        const auto memory = std::make_unique<PairMemory>();
        std::memset(static_cast<void*>(memory.get()), 0xff, sizeof *memory);  // not a number
        Pairs<Count, HostBlock>(job, block, *memory, index).run();
    }
    for (int64_t item = 0; item < batch; ++item) {
        std::vector<double> points(rows * kPairWidth);
        for (size_t k = 0; k < points.size(); ++k) {
            const size_t at = item * points.size() + k;
            points[k] = double(test::half(hi[at])) + double(test::half(lo[at]));
        }
        const auto pair = [&](int64_t i, int64_t j) {
            double z = 0;
            for (int k = 0; k < kPairWidth; ++k) z += points[i * kPairWidth + k] * points[j * kPairWidth + k];
            const double u = std::exp2(0.1f * z + norms[item * rows + i] + norms[item * rows + j]);
            double found = 0, power = u;
            for (int t = Count - 1; t >= 0; --t, power *= power)
                found += numbers[item * room + kFirstNumber + t] * power;
            return found;
        };
        double expected[3] = {0, 0, 0};
        const auto add = [&](int64_t row, int64_t column, int64_t columns, int kind) {
            for (int64_t i = row; i < row + kPairRows; ++i)
                for (int64_t j = column; j < column + columns; ++j) expected[kind] += pair(i, j);
        };
        for (int64_t r = 0; r < c.n / kPairRows; ++r)
            add(r * kPairRows, 0, r * kPairRows / kPairColumns * kPairColumns, 0);
        for (int64_t r = 0; r < c.m / kPairRows; ++r) {
            add(second + r * kPairRows, second, r * kPairRows / kPairColumns * kPairColumns, 1);
            add(second + r * kPairRows, 0, c.n / kPairColumns * kPairColumns, 2);
        }
        for (int kind = 0; kind < 3; ++kind) {
            double sum = 0;
            for (int share = 0; share < c.blocks; ++share) sum += sums[(item * c.blocks + share) * 3 + kind];
            double wanted = expected[kind] * (0.5 + double(item));
            if (c.far || (!c.all_sums && c.coefs[kind] == 0)) wanted = 0;
            CHECK(std::fabs(sum - wanted) <= 2e-6 * std::fabs(wanted),
                  "n %ld, m %ld, %d terms, %d blocks, sum %d: %.9g, not %.9g", long(c.n), long(c.m), Count, c.blocks,
                  kind, sum, wanted);
        }
    }
}

}  // namespace

int main() {
    test::Random random(3);
    run<5>({0, 0, 5, 1}, random);
    run<5>({191, 383, 5, 2}, random);
    run<5>({192, 127, 5, 3}, random);
    run<5>({128, 192, 5, 1}, random);
    run<5>({100, 400, 5, 2}, random);
    run<1>({390, 200, 1, 2}, random);
    run<2>({385, 300, 2, 5}, random);
    run<3>({580, 192, 3, 3}, random);
    run<4>({200, 600, 4, 4}, random);
    run<8>({384, 384, 8, 20}, random);
    run<5>({580, 400, 5, 2, false, true}, random);
    run<5>({580, 400, 5, 2, false, false, {1, 0, -3}}, random);
    run<5>({580, 400, 5, 2, true, false, {0, 1, 0}}, random);
    std::puts("mmd_pairs: fine");
}
