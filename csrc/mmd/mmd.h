// Reductions of kernel matrices that never exist; see mmfast/mmd/op.py for the operators they serve.
#pragma once

#include <cstdint>
#include <vector>

#include "common/scalar_types.h"
#include "mmd/mmd_core.h"

namespace mmfast {
namespace mmd {

// The kernel is the product over its layers of the sum over the terms of each.
struct Layer {
    Metric metric;
    int64_t dimension;
    std::vector<Term<double>> terms;
};

struct Kernel {
    std::vector<Layer> layers;
    int64_t dimension() const {
        int64_t n = 0;
        for (const Layer& l : layers) n += l.dimension;
        return n;
    }
    int64_t terms() const {
        int64_t n = 0;
        for (const Layer& l : layers) n += int64_t(l.terms.size());
        return n;
    }
};

// A batch of sets of `count` points, whose features are those of the kernel's layers, one behind the other: strides in
// elements.
struct Set {
    int64_t count;
    const void* data;
    ScalarType type;
    int64_t batch_stride, row_stride, column_stride;
};

// Where gradients go, each added to what is there; null where none is wanted.
template <class T>
struct Gradients {
    T *x = nullptr, *y = nullptr;                       // [batch][count][dimensions of all layers]
    double *weights_x = nullptr, *weights_y = nullptr;  // [batch][count]
    double* parameters = nullptr;                       // [batch][terms][4]
};

// sums: [batch][3], of a_i a_j k(x_i, x_j) over i != j, of b_i b_j k(y_i, y_j) likewise, of a_i b_j k(x_i, y_j) over all;
// wx, wy: [batch][count] or null for ones. The gradients are those of sums . coefs. What has the coefficient 0 is left out, unless all
// sums are asked for.
template <class T>
void quadratic_cpu(int64_t batch, const Kernel& kernel, const Set& x, const Set& y, const T* wx, const T* wy,
                   const double* coefs, bool all_sums, double* sums, const Gradients<T>& gradients);

// The sum of the squared distances of all points to their mean, found in double. The type of the sets is T, their columns lie
// side by side, and they are no batch; y may be empty.
template <class T>
double squares_about_mean_cpu(int64_t dimension, const Set& x, const Set& y);

// Sums of the rows and of the columns, and of the squares, of K(x, y); with `symmetric` of K(x, x) without its diagonal,
// and there are no columns.
template <class T>
void sums_cpu(int64_t batch, const Kernel& kernel, const Set& x, const Set& y, bool symmetric, double* rows,
              double* columns, double* squares);
template <class T>
void sums_backward_cpu(int64_t batch, const Kernel& kernel, const Set& x, const Set& y, bool symmetric,
                       const double* rows, const double* columns, const double* squares, const Gradients<T>& gradients);

// out[batch][x.count][width] = K(x, y) v, with v[batch][y.count][width]; with `symmetric` K(x, x) without its diagonal.
template <class T>
void matmul_cpu(int64_t batch, const Kernel& kernel, const Set& x, const Set& y, bool symmetric, const T* v,
                int64_t width, T* out);
template <class T>
void matmul_backward_cpu(int64_t batch, const Kernel& kernel, const Set& x, const Set& y, bool symmetric, const T* v,
                         const T* grad, int64_t width, T* grad_v, const Gradients<T>& gradients);

// Two kernels of the same number of points, without their diagonals: row sums of each and sums of K L, K K and L L.
template <class T>
void pair_cpu(int64_t batch, const Kernel& kernel_x, const Set& x, const Kernel& kernel_y, const Set& y, double* rows_x,
              double* rows_y, double* products);
template <class T>
void pair_backward_cpu(int64_t batch, const Kernel& kernel_x, const Set& x, const Kernel& kernel_y, const Set& y,
                       const double* rows_x, const double* rows_y, const double* products,
                       const Gradients<T>& gradients_x, const Gradients<T>& gradients_y);

// inside[g] = sum over i != j of k(z_i, z_j) where members[g][i] and members[g][j]; rows: row sums without the diagonal.
template <class T>
void permutations_cpu(const Kernel& kernel, const Set& z, const uint8_t* members, int64_t groups, double* inside,
                      double* rows);

// The squared distances with the given places in ascending order, and a pair (i, j) that has each; over all pairs of x and
// y, or with `symmetric` those of x with i < j. NaN comes last.
template <class T>
void select_cpu(const Set& x, const Set& y, int64_t dimension, bool symmetric, const std::vector<int64_t>& places,
                T* values, int64_t* pairs);

}  // namespace mmd
}  // namespace mmfast
