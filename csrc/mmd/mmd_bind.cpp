// Binds the mmd slice: checks, allocation.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include "mmd/mmd.h"
#include "mmd/mmd_tile.h"

#if defined(MMFAST_WITH_CUDA)
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "mmd/mmd_cuda.h"
#include "mmd/mmd_pairs_cuda.h"
#endif

namespace py = pybind11;

namespace mmfast {
namespace {

using at::Tensor;
using std::optional;
using std::vector;

ScalarType type_of(const Tensor& t) {
    switch (t.scalar_type()) {
        case at::kFloat: return ScalarType::float32;
        case at::kDouble: return ScalarType::float64;
        case at::kHalf: return ScalarType::float16;
        case at::kBFloat16: return ScalarType::bfloat16;
        default: TORCH_CHECK_TYPE(false, "features must be floating point, got ", t.scalar_type());
    }
}

at::ScalarType compute_type(const Tensor& features) {
    return features.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

mmd::Set set_of(const Tensor& t, int64_t batch) {
    TORCH_CHECK_VALUE(t.dim() == 3 && t.size(0) == batch && t.device().is_cpu(),
                      "features must be (batch, points, dimensions) on the CPU");
    return {t.size(1), t.const_data_ptr(), type_of(t), t.stride(0), t.stride(1), t.stride(2)};
}

// The second set, or nothing.
mmd::Set set_of(const Tensor& x, const optional<Tensor>& y, int64_t batch) {
    TORCH_CHECK_VALUE(!y || y->size(-1) == x.size(-1), "x and y differ in their dimensions");
    return y ? set_of(*y, batch) : mmd::Set{};
}

// A kernel as Python has it: the dimensions of the layers, the family and the layer of each term, and [weight, gamma,
// offset, exponent] for each.
struct Terms {
    vector<int64_t> dimensions, families, layers;
    Tensor parameters;
};

mmd::Kernel kernel_of(const Terms& terms, int64_t features) {
    const int64_t n = int64_t(terms.families.size());
    const Tensor p = terms.parameters.detach().contiguous();
    TORCH_CHECK_VALUE(p.dim() == 2 && p.size(0) == n && p.size(1) == 4 && p.scalar_type() == at::kDouble &&
                          p.device().is_cpu() && int64_t(terms.layers.size()) == n,
                      "params must be a float64 tensor of the shape (terms, 4) on the CPU");
    int64_t columns = 0;
    for (const int64_t d : terms.dimensions) columns += d;
    TORCH_CHECK_VALUE(columns == features, "the layers have ", columns, " dimensions together, the points ", features);
    TORCH_CHECK_VALUE(int64_t(terms.dimensions.size()) <= 8, "at most 8 layers");
    mmd::Kernel kernel;
    for (const int64_t d : terms.dimensions) kernel.layers.push_back({mmd::Metric::l2, d, {}});
    for (int64_t i = 0; i < n; ++i) {
        const double* const v = p.const_data_ptr<double>() + 4 * i;
        const int64_t layer = terms.layers[i];
        TORCH_CHECK_VALUE(terms.families[i] >= 0 && terms.families[i] < mmd::kFamilies && layer >= 0 &&
                              layer < int64_t(terms.dimensions.size()),
                          "no such family or layer");
        const auto family = static_cast<mmd::Family>(terms.families[i]);
        mmd::Layer& to = kernel.layers[layer];
        TORCH_CHECK_VALUE(to.terms.empty() || to.metric == mmd::metric_of(family),
                          "terms of one layer differ in metric");
        to.metric = mmd::metric_of(family);
        to.terms.push_back({family, v[0], v[1], v[2], v[3]});
    }
    for (const mmd::Layer& l : kernel.layers)
        TORCH_CHECK_VALUE(!l.terms.empty() && l.terms.size() <= mmd::Program<float>::kMostTerms,
                          "a layer must have 1 to ", mmd::Program<float>::kMostTerms, " terms");
    return kernel;
}

// Where the sorted-by-layer parameters of the kernels' gradient go in the caller's order.
Tensor in_callers_order(const Tensor& sorted, const Terms& terms) {
    if (!sorted.numel() || std::is_sorted(terms.layers.begin(), terms.layers.end())) return sorted;
    vector<int64_t> place(terms.layers.size());
    int64_t at = 0;
    const int64_t layers = terms.layers.empty() ? 0 : 1 + *std::max_element(terms.layers.begin(), terms.layers.end());
    for (int64_t l = 0; l < layers; ++l)
        for (size_t i = 0; i < place.size(); ++i)
            if (terms.layers[i] == l) place[i] = at++;
    Tensor result = at::empty_like(sorted);
    for (int64_t b = 0; b < sorted.size(0); ++b)
        for (size_t i = 0; i < place.size(); ++i)
            std::copy_n(sorted.const_data_ptr<double>() + (b * int64_t(place.size()) + place[i]) * 4, 4,
                        result.data_ptr<double>() + (b * int64_t(place.size()) + int64_t(i)) * 4);
    return result;
}

// Tensors for gradients, empty where they are not wanted, and pointers to the others.
template <class T>
struct Wanted {
    Tensor x, y, weights_x, weights_y, parameters;
    mmd::Gradients<T> pointers;

    Wanted(const Tensor& fx, const optional<Tensor>& fy, const Terms& terms, bool need_x, bool need_y,
           bool need_parameters) {
        const auto options = fx.options().dtype(sizeof(T) == 8 ? at::kDouble : at::kFloat);
        need_y = need_y && fy;
        x = need_x ? at::zeros(fx.sizes(), options) : at::empty({0}, options);
        y = need_y ? at::zeros(fy->sizes(), options) : at::empty({0}, options);
        if (need_x) pointers.x = x.data_ptr<T>();
        if (need_y) pointers.y = y.data_ptr<T>();
        const int64_t n = int64_t(terms.families.size());
        parameters = need_parameters ? at::zeros({fx.size(0), n, 4}, terms.parameters.options())
                                     : at::empty({0}, terms.parameters.options());
        if (need_parameters) pointers.parameters = parameters.data_ptr<double>();
    }
    double* weights(const optional<Tensor>& like, bool need, Tensor& to) {
        const auto options = parameters.options();
        if (!like || !need) {
            to = at::empty({0}, options);
            return nullptr;
        }
        to = at::zeros(like->sizes(), options);
        return to.data_ptr<double>();
    }
};

template <class F>
void for_type(at::ScalarType type, const F& f) {
    if (type == at::kDouble) f(static_cast<double*>(nullptr));
    else f(static_cast<float*>(nullptr));
}

Tensor doubles(const Tensor& t) {
    return t.to(at::kDouble).contiguous();
}

template <class T>
Tensor in_type(const Tensor& t) {
    return t.to(sizeof(T) == 8 ? at::kDouble : at::kFloat).contiguous();
}

using Tensors5 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// (sums, gradients of x, of y, of wx, of wy, of params), of the value of each item of the batch; empty if not wanted.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> quadratic(const Tensor& x, const Tensor& y,
                                                                     const optional<Tensor>& wx,
                                                                     const optional<Tensor>& wy, const Tensor& coefs,
                                                                     const Terms& terms, const vector<bool>& need) {
    const int64_t batch = x.size(0);
    const mmd::Kernel kernel = kernel_of(terms, x.size(2));
    const mmd::Set sx = set_of(x, batch), sy = set_of(x, optional<Tensor>(y), batch);
    const Tensor c = doubles(coefs), sums = at::empty({batch, 3}, c.options());
    TORCH_CHECK_VALUE(c.numel() == 3 && need.size() == 6, "coefs and need must have 3 and 6 elements");
    Tensors5 gradients;
    for_type(compute_type(x), [&](auto* kind) {
        using T = std::remove_pointer_t<decltype(kind)>;
        Wanted<T> w(x, y, terms, need[0], need[1], need[4]);
        w.pointers.weights_x = w.weights(wx, need[2], w.weights_x);
        w.pointers.weights_y = w.weights(wy, need[3], w.weights_y);
        const Tensor u = wx ? in_type<T>(*wx) : Tensor(), v = wy ? in_type<T>(*wy) : Tensor();
        mmd::quadratic_cpu<T>(batch, kernel, sx, sy, wx ? u.template const_data_ptr<T>() : nullptr,
                              wy ? v.template const_data_ptr<T>() : nullptr, c.const_data_ptr<double>(), need[5],
                              sums.data_ptr<double>(), w.pointers);
        gradients = {w.x, w.y, w.weights_x, w.weights_y, in_callers_order(w.parameters, terms)};
    });
    return std::tuple_cat(std::make_tuple(sums), gradients);
}

// What mmfast/mmd/direct.py asks for: one layer of L2 distances in x (n, d) and y (m, d) of one dtype whose columns lie side by
// side, without weights.
struct DirectSums {
    vector<double> coefs;
    vector<int64_t> families;
    // Of the mean that divides the squares of all lengths: of x, of y or of both (1, 2, 3; 0: there is none), what the sum of the
    // squares is multiplied with, and the least it may be.
    int points;
    double factor, least;
    bool self_pairs;  // count each point with itself too
};

// (value, gradients of x and of y, params with the lengths that were found); empty if not wanted.
std::tuple<Tensor, Tensor, Tensor, Tensor> direct(const Tensor& x, const Tensor& y, const Tensor& params,
                                                  const DirectSums& how, bool need_x, bool need_y) {
    const int64_t d = x.size(1), terms = int64_t(how.families.size());
    const at::ScalarType type = x.scalar_type();
    for (const Tensor* t : {&x, &y})
        TORCH_CHECK_VALUE(t->dim() == 2 && t->size(1) == d && t->scalar_type() == type && t->device().is_cpu() &&
                              (type == at::kFloat || type == at::kDouble) && (d <= 1 || t->stride(1) == 1),
                          "no kernel for such features");
    TORCH_CHECK_VALUE(how.coefs.size() == 3, "coefs must have 3 elements");
    const mmd::Set sx{x.size(0), x.const_data_ptr(), type_of(x), 0, x.stride(0), 1};
    const mmd::Set sy{y.size(0), y.const_data_ptr(), type_of(y), 0, y.stride(0), 1};
    const Tensor value = at::empty({}, x.options());
    Tensor by_x, by_y, found = params;
    for_type(type, [&](auto* kind) {
        using T = std::remove_pointer_t<decltype(kind)>;
        if (how.points) {
            const mmd::Set none{};
            const double squares =
                mmd::squares_about_mean_cpu<T>(d, how.points & 1 ? sx : none, how.points & 2 ? sy : none);
            const double length = squares * how.factor;
            found = params.clone();
            double* const p = found.data_ptr<double>();
            // NaN stays. A squared length divides the squares, its root the distances.
            const double square = length < how.least ? how.least : length, root = std::sqrt(square);
            for (int64_t t = 0; t < terms; ++t)
                p[4 * t + 1] /= mmd::needs_root(static_cast<mmd::Family>(how.families[t])) ? root : square;
        }
        const mmd::Kernel kernel = kernel_of({{d}, how.families, vector<int64_t>(size_t(terms)), found}, d);
        TORCH_CHECK_VALUE(kernel.layers[0].metric == mmd::Metric::l2, "no kernel for other metrics");
        double own = 0;
        for (const auto& t : kernel.layers[0].terms) own += t.family == mmd::Family::energy ? 0 : t.weight;
        by_x = need_x ? at::zeros(x.sizes(), x.options()) : at::empty({0}, x.options());
        by_y = need_y ? at::zeros(y.sizes(), x.options()) : at::empty({0}, x.options());
        mmd::Gradients<T> gradients;
        gradients.x = need_x ? by_x.data_ptr<T>() : nullptr;
        gradients.y = need_y ? by_y.data_ptr<T>() : nullptr;
        double sums[3];
        mmd::quadratic_cpu<T>(1, kernel, sx, sy, nullptr, nullptr, how.coefs.data(), false, sums, gradients);
        double total = how.self_pairs ? own * (how.coefs[0] * double(sx.count) + how.coefs[1] * double(sy.count)) : 0;
        for (int i = 0; i < 3; ++i) total += how.coefs[i] != 0 ? how.coefs[i] * sums[i] : 0;
        *value.data_ptr<T>() = T(total);
    });
    return {value, by_x, by_y, found};
}

std::tuple<Tensor, Tensor, Tensor> sums(const Tensor& x, const optional<Tensor>& y, const Terms& terms) {
    const int64_t batch = x.size(0);
    const mmd::Kernel kernel = kernel_of(terms, x.size(2));
    const mmd::Set sx = set_of(x, batch), sy = set_of(x, y, batch);
    const auto options = x.options().dtype(at::kDouble);
    Tensor rows = at::empty({batch, sx.count}, options), columns = at::empty({batch, y ? sy.count : 0}, options);
    Tensor squares = at::empty({batch}, options);
    for_type(compute_type(x), [&](auto* kind) {
        mmd::sums_cpu<std::remove_pointer_t<decltype(kind)>>(batch, kernel, sx, sy, !y, rows.data_ptr<double>(),
                                                             columns.data_ptr<double>(), squares.data_ptr<double>());
    });
    return {rows, columns, squares};
}

// Gradients of x, y and params; empty if not wanted.
std::tuple<Tensor, Tensor, Tensor> sums_backward(const Tensor& rows, const Tensor& columns, const Tensor& squares,
                                                 const Tensor& x, const optional<Tensor>& y, const Terms& terms,
                                                 const vector<bool>& need) {
    const int64_t batch = x.size(0);
    const mmd::Kernel kernel = kernel_of(terms, x.size(2));
    const mmd::Set sx = set_of(x, batch), sy = set_of(x, y, batch);
    const Tensor r = doubles(rows), c = doubles(columns), s = doubles(squares);
    std::tuple<Tensor, Tensor, Tensor> result;
    for_type(compute_type(x), [&](auto* kind) {
        using T = std::remove_pointer_t<decltype(kind)>;
        Wanted<T> wanted(x, y, terms, need[0], need[1], need[2]);
        mmd::sums_backward_cpu<T>(batch, kernel, sx, sy, !y, r.const_data_ptr<double>(), c.const_data_ptr<double>(),
                                  s.const_data_ptr<double>(), wanted.pointers);
        result = {wanted.x, wanted.y, in_callers_order(wanted.parameters, terms)};
    });
    return result;
}

Tensor matmul(const Tensor& x, const optional<Tensor>& y, const Tensor& v, const Terms& terms) {
    const int64_t batch = x.size(0), width = v.size(2);
    const mmd::Kernel kernel = kernel_of(terms, x.size(2));
    const mmd::Set sx = set_of(x, batch), sy = set_of(x, y, batch);
    TORCH_CHECK_VALUE(v.dim() == 3 && v.size(0) == batch && v.size(1) == (y ? sy.count : sx.count),
                      "v must have a row for each point of y");
    Tensor out = at::empty({batch, sx.count, width}, x.options().dtype(compute_type(x)));
    for_type(compute_type(x), [&](auto* kind) {
        using T = std::remove_pointer_t<decltype(kind)>;
        const Tensor values = in_type<T>(v);
        mmd::matmul_cpu<T>(batch, kernel, sx, sy, !y, values.const_data_ptr<T>(), width, out.data_ptr<T>());
    });
    return out;
}

// Gradients of v (always), x, y and params; empty if not wanted.
std::tuple<Tensor, Tensor, Tensor, Tensor> matmul_backward(const Tensor& grad, const Tensor& x,
                                                           const optional<Tensor>& y, const Tensor& v,
                                                           const Terms& terms, const vector<bool>& need) {
    const int64_t batch = x.size(0), width = v.size(2);
    const mmd::Kernel kernel = kernel_of(terms, x.size(2));
    const mmd::Set sx = set_of(x, batch), sy = set_of(x, y, batch);
    std::tuple<Tensor, Tensor, Tensor, Tensor> result;
    for_type(compute_type(x), [&](auto* kind) {
        using T = std::remove_pointer_t<decltype(kind)>;
        Wanted<T> wanted(x, y, terms, need[0], need[1], need[2]);
        const Tensor values = in_type<T>(v), g = in_type<T>(grad);
        const Tensor grad_v = at::empty(v.sizes(), values.options());
        mmd::matmul_backward_cpu<T>(batch, kernel, sx, sy, !y, values.const_data_ptr<T>(), g.const_data_ptr<T>(), width,
                                    grad_v.template data_ptr<T>(), wanted.pointers);
        result = {grad_v, wanted.x, wanted.y, in_callers_order(wanted.parameters, terms)};
    });
    return result;
}

std::tuple<Tensor, Tensor, Tensor> pair(const Tensor& x, const Terms& terms_x, const Tensor& y, const Terms& terms_y) {
    const int64_t batch = x.size(0);
    const mmd::Kernel kx = kernel_of(terms_x, x.size(2)), ky = kernel_of(terms_y, y.size(2));
    const mmd::Set sx = set_of(x, batch), sy = set_of(y, batch);
    TORCH_CHECK_VALUE(sx.count == sy.count && compute_type(x) == compute_type(y),
                      "x and y must have as many points and the same dtype");
    const auto options = x.options().dtype(at::kDouble);
    Tensor rows_x = at::empty({batch, sx.count}, options), rows_y = at::empty({batch, sx.count}, options);
    Tensor products = at::empty({batch, 3}, options);
    for_type(compute_type(x), [&](auto* kind) {
        mmd::pair_cpu<std::remove_pointer_t<decltype(kind)>>(batch, kx, sx, ky, sy, rows_x.data_ptr<double>(),
                                                             rows_y.data_ptr<double>(), products.data_ptr<double>());
    });
    return {rows_x, rows_y, products};
}

// Gradients of x and of its kernel's params, of y and of its; empty if not wanted.
std::tuple<Tensor, Tensor, Tensor, Tensor> pair_backward(const Tensor& rows_x, const Tensor& rows_y,
                                                         const Tensor& products, const Tensor& x, const Terms& terms_x,
                                                         const Tensor& y, const Terms& terms_y,
                                                         const vector<bool>& need) {
    const int64_t batch = x.size(0);
    const mmd::Kernel kx = kernel_of(terms_x, x.size(2)), ky = kernel_of(terms_y, y.size(2));
    const mmd::Set sx = set_of(x, batch), sy = set_of(y, batch);
    const Tensor rx = doubles(rows_x), ry = doubles(rows_y), p = doubles(products);
    std::tuple<Tensor, Tensor, Tensor, Tensor> result;
    for_type(compute_type(x), [&](auto* kind) {
        using T = std::remove_pointer_t<decltype(kind)>;
        Wanted<T> wx(x, std::nullopt, terms_x, need[0], false, need[2]),
            wy(y, std::nullopt, terms_y, need[1], false, need[3]);
        mmd::pair_backward_cpu<T>(batch, kx, sx, ky, sy, rx.const_data_ptr<double>(), ry.const_data_ptr<double>(),
                                  p.const_data_ptr<double>(), wx.pointers, wy.pointers);
        result = {wx.x, in_callers_order(wx.parameters, terms_x), wy.x, in_callers_order(wy.parameters, terms_y)};
    });
    return result;
}

std::tuple<Tensor, Tensor> permutations(const Tensor& z, const Terms& terms, const Tensor& members) {
    const mmd::Kernel kernel = kernel_of(terms, z.size(2));
    const mmd::Set set = set_of(z, 1);
    TORCH_CHECK_VALUE(members.dim() == 2 && members.size(1) == set.count && members.scalar_type() == at::kBool,
                      "members must be a bool tensor of the shape (groups, points)");
    const Tensor m = members.contiguous();
    const auto options = z.options().dtype(at::kDouble);
    Tensor inside = at::empty({members.size(0)}, options), rows = at::empty({set.count}, options);
    for_type(compute_type(z), [&](auto* kind) {
        mmd::permutations_cpu<std::remove_pointer_t<decltype(kind)>>(
            kernel, set, static_cast<const uint8_t*>(m.const_data_ptr()), members.size(0), inside.data_ptr<double>(),
            rows.data_ptr<double>());
    });
    return {inside, rows};
}

std::tuple<Tensor, Tensor> select(const Tensor& x, const optional<Tensor>& y, const vector<int64_t>& places) {
    const mmd::Set sx = set_of(x, 1), sy = set_of(x, y, 1);
    const int64_t count = y ? sx.count * sy.count : sx.count * (sx.count - 1) / 2;
    for (const int64_t place : places)
        TORCH_CHECK_VALUE(place >= 0 && place < count, "place ", place, " of ", count, " pairs");
    Tensor values = at::empty({int64_t(places.size())}, x.options().dtype(compute_type(x)));
    Tensor pairs = at::empty({int64_t(places.size()), 2}, x.options().dtype(at::kLong));
    for_type(compute_type(x), [&](auto* kind) {
        using T = std::remove_pointer_t<decltype(kind)>;
        mmd::select_cpu<T>(sx, sy, x.size(2), !y, places, values.data_ptr<T>(), pairs.data_ptr<int64_t>());
    });
    return {values, pairs};
}

#if defined(MMFAST_WITH_CUDA)

// Few features on the GPU: sums over the columns of x and of y, and the gradient, for x and y (b, n, d) of the
// compute type, contiguous: (b, shares, 2, n + m) and (b, shares, n + m, d), the shares still to be added up.
std::tuple<Tensor, Tensor> quadratic_few(const Tensor& x, const Tensor& y, const optional<Tensor>& wx,
                                         const optional<Tensor>& wy, const Tensor& coefs, const Tensor& parameters,
                                         const vector<int64_t>& families, bool need_gradient, bool all_sums) {
    const int64_t b = x.size(0), n = x.size(1), m = y.size(1), d = x.size(2);
    const auto same = [&](const Tensor& t, at::IntArrayRef sizes, at::ScalarType type) {
        return t.is_cuda() && t.device() == x.device() && t.is_contiguous() && t.sizes() == sizes &&
               t.scalar_type() == type;
    };
    const at::ScalarType type = x.scalar_type();
    TORCH_CHECK_VALUE(d <= mmd::kFewFeatures && families.size() >= 1 && families.size() <= mmd::kFewTerms &&
                          (type == at::kFloat || type == at::kDouble) && same(x, {b, n, d}, type) &&
                          same(y, {b, m, d}, type) && (!wx || same(*wx, {b, n}, type)) &&
                          (!wy || same(*wy, {b, m}, type)) && same(coefs, {3}, at::kDouble) &&
                          same(parameters, {int64_t(families.size()), 4}, at::kDouble),
                      "no kernel for such arguments");
    const c10::cuda::CUDAGuard guard(x.device());
    const int shares = mmd::few_shares(b, n, m, x.get_device());
    const Tensor sums = at::empty({b, shares, 2, n + m}, coefs.options());
    const Tensor gradient = need_gradient ? at::empty({b, shares, n + m, d}, x.options()) : at::empty({0}, x.options());
    for_type(type, [&](auto* kind) {
        using T = std::remove_pointer_t<decltype(kind)>;
        mmd::FewJob<T> job{b,
                           n,
                           m,
                           int(d),
                           x.const_data_ptr<T>(),
                           y.const_data_ptr<T>(),
                           wx ? wx->const_data_ptr<T>() : nullptr,
                           wy ? wy->const_data_ptr<T>() : nullptr,
                           coefs.const_data_ptr<double>(),
                           parameters.const_data_ptr<double>(),
                           int(families.size()),
                           {},
                           shares,
                           all_sums,
                           sums.data_ptr<double>(),
                           need_gradient ? gradient.data_ptr<T>() : nullptr};
        for (size_t t = 0; t < families.size(); ++t) job.families[t] = uint8_t(families[t]);
        mmd::quadratic_few_cuda<T>(job, c10::cuda::getCurrentCUDAStream());
    });
    return {sums, gradient};
}

// What mmd_pairs.h and mmd_pairs_gradient.h compute, on the current device and stream, from the arrays of
// triton_narrow_launch.py by their addresses, which nobody but that has.
mmd::PairsJob pairs_job(uintptr_t hi, uintptr_t lo, uintptr_t norms, uintptr_t numbers, uintptr_t table,
                        uintptr_t coefs, int64_t n, int64_t m, int64_t second, int64_t rows, int room, int terms,
                        bool all_sums) {
    TORCH_CHECK_VALUE(terms >= 1 && terms <= mmd::kPairTerms && second % mmd::kPairColumns == 0,
                      "no kernel for such arguments");
    return {n,
            m,
            second,
            rows,
            reinterpret_cast<const uint16_t*>(hi),
            reinterpret_cast<const uint16_t*>(lo),
            reinterpret_cast<const float*>(norms),
            reinterpret_cast<const float*>(numbers),
            reinterpret_cast<const double*>(table),
            reinterpret_cast<const double*>(coefs),
            room,
            terms,
            0,
            all_sums,
            nullptr};
}

void pairs(uintptr_t hi, uintptr_t lo, uintptr_t norms, uintptr_t numbers, uintptr_t table, uintptr_t coefs,
           uintptr_t sums, int64_t n, int64_t m, int64_t second, int64_t rows, int room, int terms, int blocks,
           int64_t batch, bool all_sums) {
    mmd::PairsJob job = pairs_job(hi, lo, norms, numbers, table, coefs, n, m, second, rows, room, terms, all_sums);
    TORCH_CHECK_VALUE(second % mmd::kPairRows == 0 && blocks >= 1, "no kernel for such arguments");
    job.blocks = blocks;
    job.sums = reinterpret_cast<double*>(sums);
    mmd::pairs_cuda(job, batch, c10::cuda::getCurrentCUDAStream());
}

void pairs_gradient(uintptr_t hi, uintptr_t lo, uintptr_t norms, uintptr_t numbers, uintptr_t table, uintptr_t coefs,
                    uintptr_t totals, uintptr_t gradients, uintptr_t done, int64_t n, int64_t m, int64_t second,
                    int64_t rows, int room, int terms, int strips, int strips_x, int tiles, int64_t batch,
                    bool all_sums) {
    const mmd::PairsGradientJob job{
        pairs_job(hi, lo, norms, numbers, table, coefs, n, m, second, rows, room, terms, all_sums),
        batch,
        int(rows / mmd::kPullRows),
        strips,
        strips_x,
        tiles,
        reinterpret_cast<double*>(totals),
        reinterpret_cast<float*>(gradients),
        reinterpret_cast<int*>(done)};
    mmd::pairs_gradient_cuda(job, c10::cuda::getCurrentCUDAStream());
}

#endif

}  // namespace

void bind_mmd(py::module_& m) {
    py::class_<Terms>(m, "MmdTerms")
        .def(py::init(
            [](vector<int64_t> dimensions, vector<int64_t> families, vector<int64_t> layers, Tensor parameters) {
                return Terms{std::move(dimensions), std::move(families), std::move(layers), std::move(parameters)};
            }));
    const auto guard = py::call_guard<py::gil_scoped_release>();
    py::class_<DirectSums>(m, "MmdDirect")
        .def(py::init([](vector<double> coefs, vector<int64_t> families, int points, double factor, double least,
                         bool self_pairs) {
            return DirectSums{std::move(coefs), std::move(families), points, factor, least, self_pairs};
        }));
    m.def("mmd_direct", &direct, guard);
    m.def("mmd_quadratic", &quadratic, guard);
    m.def("mmd_sums", &sums, guard);
    m.def("mmd_sums_backward", &sums_backward, guard);
    m.def("mmd_matmul", &matmul, guard);
    m.def("mmd_matmul_backward", &matmul_backward, guard);
    m.def("mmd_pair", &pair, guard);
    m.def("mmd_pair_backward", &pair_backward, guard);
    m.def("mmd_permutations", &permutations, guard);
    m.def("mmd_select", &select, guard);
#if defined(MMFAST_WITH_CUDA)
    m.def("mmd_quadratic_few", &quadratic_few, guard);
    m.def("mmd_has_pairs", &mmd::has_pairs);
    m.def("mmd_pairs", &pairs);
    m.def("mmd_pairs_gradient", &pairs_gradient);
#endif
}

}  // namespace mmfast
