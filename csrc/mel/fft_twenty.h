// Codelets of 20 points, complex and real, for 400 = 20 x 20: the size most features of speech are made with.
//
// Note: [Prime factors]
//   4 and 5 share no factor, so with n = 5 a + 4 b and k = 5 ka + 16 kb (both mod 20) the kernel of the transform falls apart,
//   exp(-2 pi i n k / 20) = exp(-2 pi i a ka / 4) exp(-2 pi i b kb / 5): five transforms of 4 points, then four of 5, with
//   no twiddles between them. At 400 points, columns and rows take 5500 operations a tile so, where 16 x 25 takes 7300.
#pragma once

#include "mel/fft_core.h"

namespace mmfast {
inline namespace MMFAST_ISA {

// DFT of 20 points: load(n, re, im) gives each point once, sink(k, re, im) takes each output once, after all the loads.
template <class T, class V, class Load, class Sink>
MMFAST_INLINE void dft_twenty(const Load& load, const Sink& sink) {
    V re[4][5], im[4][5];
    MMFAST_UNROLL
    for (int b = 0; b < 5; ++b) {
        V r[4], i[4];
        for (int a = 0; a < 4; ++a) load((5 * a + 4 * b) % 20, r[a], i[a]);
        Dft<4, T, V>::run(r, i);
        for (int a = 0; a < 4; ++a) {
            re[a][b] = r[a];
            im[a][b] = i[a];
        }
    }
    MMFAST_UNROLL
    for (int a = 0; a < 4; ++a) {
        Dft<5, T, V>::run(re[a], im[a]);
        for (int b = 0; b < 5; ++b) sink((5 * a + 16 * b) % 20, re[a][b], im[a][b]);
    }
}

// Rows ka = 0 and 2 of the real transforms of 4 points are real, row 3 is the conjugate of row 1, which alone is complex.
template <class T, class V>
struct RealDft<20, T, V> {
    static MMFAST_INLINE void run(const V* x, V* re, V* im) {
        V even[5], alternate[5], r[5], i[5];
        MMFAST_UNROLL
        for (int b = 0; b < 5; ++b) {
            const V x0 = x[4 * b % 20], x1 = x[(4 * b + 5) % 20], x2 = x[(4 * b + 10) % 20], x3 = x[(4 * b + 15) % 20];
            const V s = x0 + x2, t = x1 + x3;
            even[b] = s + t;
            alternate[b] = s - t;
            r[b] = x0 - x2;
            i[b] = x3 - x1;
        }
        V er[3], ei[3], ar[3], ai[3];
        RealDft<5, T, V>::run(even, er, ei);       // k = 0, 16, 12
        RealDft<5, T, V>::run(alternate, ar, ai);  // k = 10, 6, 2
        Dft<5, T, V>::run(r, i);                   // k = 5, 1, 17, 13, 9
        const auto put = [&](int k, V real, V imaginary) {
            re[k] = real;
            im[k] = imaginary;
        };
        put(0, er[0], V{});
        put(4, er[1], -ei[1]);
        put(8, er[2], -ei[2]);
        put(10, ar[0], V{});
        put(6, ar[1], ai[1]);
        put(2, ar[2], ai[2]);
        put(5, r[0], i[0]);
        put(1, r[1], i[1]);
        put(3, r[2], -i[2]);
        put(7, r[3], -i[3]);
        put(9, r[4], i[4]);
    }

    // The transpose of run, as RealDft::inverse.
    static MMFAST_INLINE void inverse(V* re, V* im, V* x) {
        V er[3] = {re[0], re[4], re[8]}, ei[3] = {V{}, -im[4], -im[8]}, even[5];
        V ar[3] = {re[10], re[6], re[2]}, ai[3] = {V{}, im[6], im[2]}, alternate[5];
        RealDft<5, T, V>::inverse(er, ei, even);
        RealDft<5, T, V>::inverse(ar, ai, alternate);
        // An inverse complex transform is a forward one of swapped parts, its parts swapped back.
        V r[5] = {re[5], re[1], re[3], re[7], re[9]}, i[5] = {im[5], im[1], -im[3], -im[7], im[9]};
        Dft<5, T, V>::run(i, r);
        MMFAST_UNROLL
        for (int b = 0; b < 5; ++b) {
            // x[5 a + 4 b] = even + (-1)^a alternate + 2 Re(i^a (r + i j))
            const V s = even[b] + alternate[b], t = even[b] - alternate[b], u = r[b] + r[b], v = i[b] + i[b];
            x[4 * b % 20] = s + u;
            x[(4 * b + 10) % 20] = s - u;
            x[(4 * b + 5) % 20] = t - v;
            x[(4 * b + 15) % 20] = t + v;
        }
    }
};

}  // namespace MMFAST_ISA
}  // namespace mmfast
