// The matrix unit (AMX): eight tiles of 16 rows of 64 bytes, and the product of two tiles of bfloat16 pairs. With
// MMFAST_EMULATE_AMX the same functions compute, in plain C++, what the instructions are documented to compute
// (Intel 64 and IA-32 Architectures Software Developer's Manual, TDPBF16PS), so that tests can run the kernels anywhere.
//
// Note: [Sleep]
//   A matrix unit that has had no product for some 900 cycles is switched off (seen on processors of the fourth and fifth
//   generation of Xeon), and the next products take 700 to 1700 cycles more. So whatever lies between products and takes longer
//   than that multiplies two tiles now and then, of which nobody reads the sum. Loads of tiles and zeros do not count.
//
// Note: [Passing by]
//   A factor that stays in the first cache while another one, larger than that, passes by tile by tile is pushed out of it, row by
//   row, before it is used again. Tiles that pass by are loaded with the hint of TILELOADDT1, after which they are not kept
//   there: 6016 x 512 times 512 x 1024 4.7 -> 3.5 ms.
//
// Note: [Few tiles]
//   Every load of a tile and every product writes to a register that has to be free, beside those of the tiles that hold something.
//   At times there are few, perhaps while another program has the other half of the core: then a product takes 65 to 70 cycles
//   in blocks of 2 x 2 tiles, which keep all eight, and 33 to 40 in blocks of two that keep four or five; at other times both
//   take 18. So products go through two sums and one or two tiles of each factor, and the others are left as they begin, zeros.
//
// Tiles 0 ... 3 hold sums, 4 and 5 rows of the left factor, 6 and 7 columns of the right one. For files compiled once per
// instruction set only.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/hd.h"

#if !defined(MMFAST_EMULATE_AMX)
#include <immintrin.h>
#endif

namespace mmfast {
inline namespace MMFAST_ISA {

constexpr int kTileRows = 16, kTileBytes = 64;

#if !defined(MMFAST_EMULATE_AMX)

// While it lives the thread's tiles are all of 16 rows of 64 bytes; what they hold is lost afterwards.
class MatrixUnit {
public:
    MMFAST_INLINE MatrixUnit() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } shape;
        fence();
        _tile_loadconfig(&shape);
    }
    MMFAST_INLINE ~MatrixUnit() { _tile_release(); }
    MatrixUnit(const MatrixUnit&) = delete;

    // The intrinsics do not tell the compiler that they read memory: between writing it and load().
    MMFAST_INLINE void fence() { __asm__ volatile("" ::: "memory"); }
    template <int kNumber>
    MMFAST_INLINE void zero() {
        static_assert(kNumber >= 0 && kNumber < 4);
        if constexpr (kNumber == 0) _tile_zero(0);
        else if constexpr (kNumber == 1) _tile_zero(1);
        else if constexpr (kNumber == 2) _tile_zero(2);
        else _tile_zero(3);
    }
    // Rows `stride` bytes apart. The number of a tile is part of the instruction.
    template <int kNumber>
    MMFAST_INLINE void load(const void* from, int64_t stride) {
        if constexpr (kNumber == 0) _tile_loadd(0, from, stride);
        else if constexpr (kNumber == 1) _tile_loadd(1, from, stride);
        else if constexpr (kNumber == 2) _tile_loadd(2, from, stride);
        else if constexpr (kNumber == 3) _tile_loadd(3, from, stride);
        else if constexpr (kNumber == 4) _tile_loadd(4, from, stride);
        else if constexpr (kNumber == 5) _tile_loadd(5, from, stride);
        else if constexpr (kNumber == 6) _tile_loadd(6, from, stride);
        else _tile_loadd(7, from, stride);
    }
    // The same of what will not be used again soon: see [Passing by].
    template <int kNumber>
    MMFAST_INLINE void load_passing(const void* from, int64_t stride) {
        static_assert(kNumber >= 4 && kNumber < 8);
        if constexpr (kNumber == 4) _tile_stream_loadd(4, from, stride);
        else if constexpr (kNumber == 5) _tile_stream_loadd(5, from, stride);
        else if constexpr (kNumber == 6) _tile_stream_loadd(6, from, stride);
        else _tile_stream_loadd(7, from, stride);
    }
    template <int kNumber>
    MMFAST_INLINE void store(void* to, int64_t stride) {
        if constexpr (kNumber == 0) _tile_stored(0, to, stride);
        else if constexpr (kNumber == 1) _tile_stored(1, to, stride);
        else if constexpr (kNumber == 2) _tile_stored(2, to, stride);
        else _tile_stored(3, to, stride);
    }
    // See [Sleep]. What tile 0 holds is lost.
    MMFAST_INLINE void stay_awake() {
        fence();
        multiply<0, 4, 6>();
    }
    // Tile kSum += tile kLeft times tile kRight.
    template <int kSum, int kLeft, int kRight>
    MMFAST_INLINE void multiply() {
        static_assert(kSum >= 0 && kSum < 4 && (kLeft == 4 || kLeft == 5) && (kRight == 6 || kRight == 7));
        // What the intrinsic is, which wants its numbers as literals.
        __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kLeft), "i"(kRight));
    }
};

#else

class MatrixUnit {
public:
    MatrixUnit() { std::memset(tiles_, 0xff, sizeof tiles_); }  // NaN: nothing may be read before it is written
    MatrixUnit(const MatrixUnit&) = delete;

    MMFAST_INLINE void fence() {}
    template <int kNumber>
    MMFAST_INLINE void zero() {
        std::memset(tiles_[kNumber], 0, sizeof tiles_[0]);
    }
    template <int kNumber>
    MMFAST_INLINE void load(const void* from, int64_t stride) {
        static_assert(kNumber >= 0 && kNumber < 8);
        for (int i = 0; i < kTileRows; ++i)
            std::memcpy(tiles_[kNumber][i], static_cast<const char*>(from) + i * stride, kTileBytes);
    }
    template <int kNumber>
    MMFAST_INLINE void load_passing(const void* from, int64_t stride) {
        load<kNumber>(from, stride);
    }
    template <int kNumber>
    MMFAST_INLINE void store(void* to, int64_t stride) {
        static_assert(kNumber >= 0 && kNumber < 4);
        for (int i = 0; i < kTileRows; ++i)
            std::memcpy(static_cast<char*>(to) + i * stride, tiles_[kNumber][i], kTileBytes);
    }
    template <int kSum, int kLeft, int kRight>
    MMFAST_INLINE void multiply() {
        product(tiles_[kSum], tiles_[kLeft], tiles_[kRight]);
    }

    MMFAST_INLINE void stay_awake() {}

private:
    using Tile = uint32_t[kTileRows][kTileBytes / 4];

    static float number(uint32_t bits) {
        float x;
        std::memcpy(&x, &bits, 4);
        return x;
    }
    // Subnormal numbers are taken, and given back, as zeros of their sign.
    static float flushed(float x) {
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        return (bits & 0x7f800000) ? x : number(bits & 0x80000000);
    }
    static float fused(float a, float b, float c) {
        return flushed(__builtin_fmaf(flushed(a), flushed(b), flushed(c)));
    }
    // The even and the odd elements are summed apart, in their order, and then added to what is there.
    static void product(Tile& sum, const Tile& a, const Tile& b) {
        for (int i = 0; i < kTileRows; ++i)
            for (int j = 0; j < kTileBytes / 4; ++j) {
                float even = 0, odd = 0;
                for (int k = 0; k < kTileRows; ++k) {
                    even = fused(number(a[i][k] << 16), number(b[k][j] << 16), even);
                    odd = fused(number(a[i][k] & 0xffff0000), number(b[k][j] & 0xffff0000), odd);
                }
                const float all = flushed(flushed(number(sum[i][j])) + flushed(even + odd));
                std::memcpy(&sum[i][j], &all, 4);
            }
    }

    Tile tiles_[8];
};

#endif

}  // namespace MMFAST_ISA
}  // namespace mmfast
