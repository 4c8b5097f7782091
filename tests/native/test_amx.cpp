// The matrix unit in plain C++ (common/amx.h) against the rules that the instruction is documented to follow.
#include "common/amx.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "check.h"

namespace {

using mmfast::MatrixUnit;

uint16_t bfloat16(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    return uint16_t(u >> 16);
}

struct Product {
    uint16_t left[32][32] = {}, right[2][16][32] = {};  // rows, and tiles of pairs along the depth
    float sum[32][32];

    void set_left(int i, int k, float x) { left[i][k] = bfloat16(x); }
    void set_right(int k, int j, float x) { right[j / 16][k / 2][2 * (j % 16) + k % 2] = bfloat16(x); }
    void run(int times = 1) {
        MatrixUnit unit;
        unit.zero<0>();
        unit.zero<1>();
        unit.zero<2>();
        unit.zero<3>();
        unit.load<4>(left, 64);
        unit.load<5>(left + 16, 64);
        unit.load<6>(right[0], 64);
        unit.load<7>(right[1], 64);
        for (int i = 0; i < times; ++i) {
            unit.multiply<0, 4, 6>();
            unit.multiply<1, 4, 7>();
            unit.multiply<2, 5, 6>();
            unit.multiply<3, 5, 7>();
        }
        unit.store<0>(&sum[0][0], 128);
        unit.store<1>(&sum[0][16], 128);
        unit.store<2>(&sum[16][0], 128);
        unit.store<3>(&sum[16][16], 128);
    }
};

// Small whole numbers, whose products are exact: every element lands in its place.
void check_places() {
    test::Random random(1);
    Product p;
    std::vector<int> a(32 * 32), b(32 * 32);
    for (int i = 0; i < 32; ++i)
        for (int k = 0; k < 32; ++k) {
            p.set_left(i, k, float(a[i * 32 + k] = int(random.between(-9, 9))));
            p.set_right(i, k, float(b[i * 32 + k] = int(random.between(-9, 9))));
        }
    p.run(2);
    for (int i = 0; i < 32; ++i)
        for (int j = 0; j < 32; ++j) {
            int exact = 0;
            for (int k = 0; k < 32; ++k) exact += 2 * a[i * 32 + k] * b[k * 32 + j];
            CHECK(p.sum[i][j] == float(exact), "%d %d: %g instead of %d", i, j, double(p.sum[i][j]), exact);
        }
}

void check_rounding() {
    Product p;
    // Even and odd elements are summed apart: 2^24 + 1 - 2^24 is 0 in either order within one sum, but not across both.
    p.set_left(0, 0, 0x1p24f), p.set_left(0, 1, -0x1p24f), p.set_left(0, 2, 1);
    p.set_left(1, 0, 0x1p24f), p.set_left(1, 1, 1), p.set_left(1, 2, -0x1p24f);
    // Subnormal factors and results are zero, here 2^-127 and 2^-70 2^-70.
    p.set_left(2, 0, 0x1p-127f), p.set_left(3, 0, 0x1p-70f);
    for (int k = 0; k < 3; ++k) p.set_right(k, 0, 1);
    p.set_right(0, 1, 0x1p-70f);
    p.set_left(4, 0, std::numeric_limits<float>::infinity());
    p.set_left(5, 0, std::numeric_limits<float>::quiet_NaN());
    p.run();
    CHECK(p.sum[0][0] == 0, "2^24 + 1 is rounded to %g", double(p.sum[0][0]));
    CHECK(p.sum[1][0] == 1, "the odd element was lost: %g", double(p.sum[1][0]));
    CHECK(p.sum[2][0] == 0 && p.sum[3][1] == 0, "subnormal: %g %g", double(p.sum[2][0]), double(p.sum[3][1]));
    CHECK(p.sum[4][0] == std::numeric_limits<float>::infinity() && std::isnan(p.sum[4][2]), "infinity: %g %g",
          double(p.sum[4][0]), double(p.sum[4][2]));
    CHECK(std::isnan(p.sum[5][0]), "NaN: %g", double(p.sum[5][0]));
}

}  // namespace

int main() {
    check_places();
    check_rounding();
    std::puts("ok");
    return 0;
}
