// Products of matrices whose blocks stay in registers. For files compiled once per instruction set only.
//
// Note: [Product]
//   c[r][:] += sum over k of a(r, k) b[k][:]. The values of a are broadcast, so that a is read where it lies, whichever way
//   it lies; lanes run along the rows of b and c. A block of R rows by S vectors takes R + S loads for R S multiply-adds a
//   step of k: with two loads and two multiply-adds a cycle the loads are hidden from R = S = 2 on, and from R S = 8 on
//   the latency of the multiply-adds is.
#pragma once

#include "common/simd.h"

namespace mmfast {
inline namespace MMFAST_ISA {

// Vectors of a row that stay in registers beside kProductRows rows: 24 sums of 32 registers, or 12 of 16.
#if defined(__AVX512F__)
constexpr int kProductWidth = 4;
#else
constexpr int kProductWidth = 2;
#endif
constexpr int kProductRows = 6;

// c starts from 0, from what is there, or from that times factor[:]; or from 0 and is streamed, see Simd::stream.
enum class Start { zero, add, scale, stream };

// What is done to a vector of the product before it is stored: f(vector, its number in the row, where it goes).
struct Unchanged {
    template <class V, class T>
    MMFAST_INLINE V operator()(V x, int, const T*) const {
        return x;
    }
};

template <class T, int R, int S, bool kTransposed, class E = Unchanged>
MMFAST_INLINE void product_block(int64_t depth, const T* a, int64_t a_stride, const T* b, int64_t b_stride, T* c,
                                 int64_t c_stride, Start start, const T* factor, E&& finish = {}) {
    using V = typename Simd<T>::V;
    constexpr int N = Simd<T>::lanes;
    V sum[R][S];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < S; ++v) sum[r][v] = V{};
    for (int64_t k = 0; k < depth; ++k) {
        V row[S];
#pragma GCC unroll 8
        for (int v = 0; v < S; ++v) row[v] = Simd<T>::load(b + k * b_stride + v * N);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const T x = kTransposed ? a[k * a_stride + r] : a[r * a_stride + k];
#pragma GCC unroll 8
            for (int v = 0; v < S; ++v) sum[r][v] += x * row[v];
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < S; ++v) {
            // Only now added to what is there: one chain of additions through all products would lose digits.
            T* const to = c + r * c_stride + v * N;
            if (start == Start::add) sum[r][v] += Simd<T>::load(to);
            if (start == Start::scale && factor) sum[r][v] += Simd<T>::load(to) * Simd<T>::load(factor + v * N);
            const V x = finish(sum[r][v], v, to);
            if (start == Start::stream) Simd<T>::stream(to, x);
            else Simd<T>::store(to, x);
        }
}

struct Nothing {
    MMFAST_INLINE void operator()() const {}
};

// Blocks of rows that product_strip takes, at most.
constexpr int64_t product_steps(int64_t rows) {
    return rows / kProductRows + 3;
}

// S vectors a row, any number of rows. a(r, k) is a[r * a_stride + k], or if transposed a[k * a_stride + r]. `between` is called
// before each block of rows.
template <class T, int S, bool kTransposed, class F = Nothing, class E = Unchanged>
MMFAST_INLINE void product_strip(int64_t rows, int64_t depth, const T* a, int64_t a_stride, const T* b,
                                 int64_t b_stride, T* c, int64_t c_stride, Start start, const T* factor = nullptr,
                                 F&& between = {}, E&& finish = {}) {
    int64_t i = 0;
    const auto block = [&]<int R>() MMFAST_LAMBDA {
        between();
        product_block<T, R, S, kTransposed>(depth, a + i * (kTransposed ? 1 : a_stride), a_stride, b, b_stride,
                                            c + i * c_stride, c_stride, start, factor, finish);
        i += R;
    };
    // A single row would wait for its own sums: rather two smaller blocks at the end.
    if constexpr (2 * S <= kProductWidth) {
        while (i + 2 * kProductRows <= rows && rows - i != 2 * kProductRows + 1)
            block.template operator()<2 * kProductRows>();
        if (i + 8 <= rows && rows - i != 9) block.template operator()<8>();
        if (i + 4 <= rows && rows - i != 5) block.template operator()<4>();
    }
    while (i + kProductRows <= rows && rows - i != kProductRows + 1) block.template operator()<kProductRows>();
    if (rows - i == kProductRows + 1) block.template operator()<4>();
    switch (rows - i) {
        case 5: return block.template operator()<5>();
        case 4: return block.template operator()<4>();
        case 3: return block.template operator()<3>();
        case 2: return block.template operator()<2>();
        case 1: return block.template operator()<1>();
    }
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
