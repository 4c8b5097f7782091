// A warpgroup's operands of products, where the tensor cores of sm_90 have them: in registers of its 128 threads, and rows
// of 64 numbers in shared memory whose pieces of 16 bytes change places.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/scalar_types.h"

namespace test {

inline float half(uint32_t bits) {
    mmfast::Float16 x;
    const uint16_t low = uint16_t(bits);
    std::memcpy(&x, &low, 2);
    return float(x);
}

inline uint32_t bits(float x) {
    const mmfast::Float16 rounded = mmfast::Float16(x);
    uint16_t found;
    std::memcpy(&found, &rounded, 2);
    return found;
}

// Where a thread's result i is.
inline int row_of(int thread, int i) {
    return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
}
inline int column_of(int thread, int i) {
    return i / 4 * 8 + thread % 4 * 2 + i % 2;
}

// Of a thread's left operands all columns.
template <int Columns>
void left(const uint32_t (&pieces)[Columns / 16][4], int thread, float (&to)[64][Columns]) {
    for (int k = 0; k < Columns / 16; ++k)
        for (int piece = 0; piece < 4; ++piece)
            for (int e = 0; e < 2; ++e) {
                const int row = thread / 32 * 16 + thread % 32 / 4 + piece % 2 * 8;
                to[row][16 * k + thread % 4 * 2 + e + piece / 2 * 8] = half(pieces[k][piece] >> 16 * e);
            }
}

inline void right(const uint16_t* from, int rows, float (*to)[64]) {
    for (int row = 0; row < rows; ++row)
        for (int at = 0; at < 64; ++at) {
            size_t byte = size_t(row) * 128 + size_t(at) * 2;
            byte ^= (byte >> 7 & 7) << 4;
            to[row][at] = half(from[byte / 2]);
        }
}

}  // namespace test
