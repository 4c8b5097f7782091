// Binds the mmd slice: checks, allocation.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "mmd/mmd.h"
#include "mmd/mmd_tile.h"

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

at::ScalarType compute_type(const vector<Tensor>& features) {
    TORCH_CHECK_VALUE(!features.empty(), "there must be at least one layer of features");
    return features[0].scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

mmd::Set set_of(const vector<Tensor>& layers, int64_t batch) {
    mmd::Set set;
    for (const Tensor& t : layers) {
        TORCH_CHECK_VALUE(t.dim() == 3 && t.device().is_cpu(), "features must be (batch, points, dimensions) on the CPU");
        TORCH_CHECK_VALUE(t.size(0) == batch && t.size(1) == layers[0].size(1), "layers differ in batch or points");
        set.layers.push_back({t.const_data_ptr(), type_of(t), t.stride(0), t.stride(1), t.stride(2)});
    }
    set.count = layers.empty() ? 0 : layers[0].size(1);
    return set;
}

// A kernel as Python has it: the family and the layer of each term, and [weight, gamma, offset, exponent] for each.
struct Terms {
    vector<int64_t> families, layers;
    Tensor parameters;
};

mmd::Kernel kernel_of(const Terms& terms, const vector<Tensor>& features) {
    const int64_t n = int64_t(terms.families.size());
    const Tensor p = terms.parameters.detach().contiguous();
    TORCH_CHECK_VALUE(p.dim() == 2 && p.size(0) == n && p.size(1) == 4 && p.scalar_type() == at::kDouble &&
                          p.device().is_cpu() && int64_t(terms.layers.size()) == n,
                      "params must be a float64 tensor of the shape (terms, 4) on the CPU");
    TORCH_CHECK_VALUE(n <= mmd::Program<float>::kMostTerms && int64_t(features.size()) <= 8,
                      "at most ", mmd::Program<float>::kMostTerms, " terms and 8 layers");
    mmd::Kernel kernel;
    for (const Tensor& f : features) kernel.layers.push_back({mmd::Metric::l2, f.size(2), {}});
    for (int64_t i = 0; i < n; ++i) {
        const double* const v = p.const_data_ptr<double>() + 4 * i;
        const int64_t layer = terms.layers[i];
        TORCH_CHECK_VALUE(terms.families[i] >= 0 && terms.families[i] < mmd::kFamilies && layer >= 0 &&
                              layer < int64_t(features.size()),
                          "no such family or layer");
        const auto family = static_cast<mmd::Family>(terms.families[i]);
        mmd::Layer& to = kernel.layers[layer];
        TORCH_CHECK_VALUE(to.terms.empty() || to.metric == mmd::metric_of(family), "terms of one layer differ in metric");
        to.metric = mmd::metric_of(family);
        to.terms.push_back({family, v[0], v[1], v[2], v[3]});
    }
    for (const mmd::Layer& l : kernel.layers) TORCH_CHECK_VALUE(!l.terms.empty(), "a layer has no term");
    return kernel;
}

// Where the sorted-by-layer parameters of the kernels' gradient go in the caller's order.
Tensor in_callers_order(const Tensor& sorted, const Terms& terms) {
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

// Tensors for gradients, where they are wanted, and pointers to them.
template <class T>
struct Wanted {
    vector<Tensor> x, y;
    Tensor weights_x, weights_y, parameters;
    mmd::Gradients<T> pointers;

    Wanted(const vector<Tensor>& fx, const vector<Tensor>& fy, const Terms& terms, bool need_x, bool need_y,
           bool need_parameters) {
        const auto make = [](const vector<Tensor>& from, bool need, vector<Tensor>& to, vector<T*>& at) {
            for (const Tensor& f : from) {
                if (need) to.push_back(at::zeros(f.sizes(), f.options().dtype(sizeof(T) == 8 ? at::kDouble : at::kFloat)));
                at.push_back(need ? to.back().template data_ptr<T>() : nullptr);
            }
        };
        make(fx, need_x, x, pointers.x);
        make(fy, need_y, y, pointers.y);
        if (need_parameters) {
            parameters = at::zeros({fx[0].size(0), int64_t(terms.families.size()), 4}, terms.parameters.options());
            pointers.parameters = parameters.data_ptr<double>();
        }
    }
    double* weights(const optional<Tensor>& like, bool need, Tensor& to) {
        if (!like || !need) return nullptr;
        to = at::zeros(like->sizes(), like->options().dtype(at::kDouble));
        return to.data_ptr<double>();
    }
    // x, y, then parameters if wanted.
    vector<Tensor> list(const Terms& terms) {
        vector<Tensor> all = x;
        all.insert(all.end(), y.begin(), y.end());
        if (parameters.defined()) all.push_back(in_callers_order(parameters, terms));
        return all;
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

// (sums, [gradients of x, of y, of wx, of wy, of params]): those that are wanted, in this order. The gradients are those of
// the value of each item of the batch.
std::tuple<Tensor, vector<Tensor>> quadratic(const vector<Tensor>& x, const vector<Tensor>& y, const optional<Tensor>& wx,
                                             const optional<Tensor>& wy, const Tensor& coefs,
                                             const Terms& terms, const vector<bool>& need) {
    const int64_t batch = x.at(0).size(0);
    const mmd::Kernel kernel = kernel_of(terms, x);
    const mmd::Set sx = set_of(x, batch), sy = set_of(y, batch);
    const Tensor c = doubles(coefs), sums = at::empty({batch, 3}, c.options());
    TORCH_CHECK_VALUE(c.numel() == 3 && need.size() == 5, "coefs and need must have 3 and 5 elements");
    vector<Tensor> gradients;
    for_type(compute_type(x), [&](auto* kind) {
        using T = std::remove_pointer_t<decltype(kind)>;
        Wanted<T> wanted(x, y, terms, need[0], need[1], need[4]);
        wanted.pointers.weights_x = wanted.weights(wx, need[2], wanted.weights_x);
        wanted.pointers.weights_y = wanted.weights(wy, need[3], wanted.weights_y);
        const Tensor u = wx ? in_type<T>(*wx) : Tensor(), v = wy ? in_type<T>(*wy) : Tensor();
        mmd::quadratic_cpu<T>(batch, kernel, sx, sy, wx ? u.const_data_ptr<T>() : nullptr,
                              wy ? v.const_data_ptr<T>() : nullptr, c.const_data_ptr<double>(), sums.data_ptr<double>(),
                              wanted.pointers);
        gradients = wanted.x;
        gradients.insert(gradients.end(), wanted.y.begin(), wanted.y.end());
        for (const Tensor& t : {wanted.weights_x, wanted.weights_y})
            if (t.defined()) gradients.push_back(t);
        if (wanted.parameters.defined()) gradients.push_back(in_callers_order(wanted.parameters, terms));
    });
    return {sums, gradients};
}

std::tuple<Tensor, Tensor, Tensor> sums(const vector<Tensor>& x, const vector<Tensor>& y, const Terms& terms,
                                        bool symmetric) {
    const int64_t batch = x.at(0).size(0);
    const mmd::Kernel kernel = kernel_of(terms, x);
    const mmd::Set sx = set_of(x, batch), sy = set_of(y, batch);
    const auto options = x[0].options().dtype(at::kDouble);
    Tensor rows = at::empty({batch, sx.count}, options), columns = at::empty({batch, symmetric ? 0 : sy.count}, options);
    Tensor squares = at::empty({batch}, options);
    for_type(compute_type(x), [&](auto* kind) {
        mmd::sums_cpu<std::remove_pointer_t<decltype(kind)>>(batch, kernel, sx, sy, symmetric, rows.data_ptr<double>(),
                                                             columns.data_ptr<double>(), squares.data_ptr<double>());
    });
    return {rows, columns, squares};
}

vector<Tensor> sums_backward(const Tensor& rows, const Tensor& columns, const Tensor& squares, const vector<Tensor>& x,
                             const vector<Tensor>& y, const Terms& terms, bool symmetric, const vector<bool>& need) {
    const int64_t batch = x.at(0).size(0);
    const mmd::Kernel kernel = kernel_of(terms, x);
    const mmd::Set sx = set_of(x, batch), sy = set_of(y, batch);
    const Tensor r = doubles(rows), c = doubles(columns), s = doubles(squares);
    vector<Tensor> result;
    for_type(compute_type(x), [&](auto* kind) {
        using T = std::remove_pointer_t<decltype(kind)>;
        Wanted<T> wanted(x, y, terms, need[0], need[1], need[2]);
        mmd::sums_backward_cpu<T>(batch, kernel, sx, sy, symmetric, r.const_data_ptr<double>(), c.const_data_ptr<double>(),
                                  s.const_data_ptr<double>(), wanted.pointers);
        result = wanted.list(terms);
    });
    return result;
}

Tensor matmul(const vector<Tensor>& x, const vector<Tensor>& y, const Tensor& v, const Terms& terms, bool symmetric) {
    const int64_t batch = x.at(0).size(0), width = v.size(2);
    const mmd::Kernel kernel = kernel_of(terms, x);
    const mmd::Set sx = set_of(x, batch), sy = set_of(y, batch);
    TORCH_CHECK_VALUE(v.dim() == 3 && v.size(0) == batch && v.size(1) == (symmetric ? sx.count : sy.count),
                      "v must have a row for each point of y");
    Tensor out = at::empty({batch, sx.count, width}, x[0].options().dtype(compute_type(x)));
    for_type(compute_type(x), [&](auto* kind) {
        using T = std::remove_pointer_t<decltype(kind)>;
        const Tensor values = in_type<T>(v);
        mmd::matmul_cpu<T>(batch, kernel, sx, sy, symmetric, values.const_data_ptr<T>(), width, out.data_ptr<T>());
    });
    return out;
}

// [gradient of v, of x, of y, of params]: v always, the others where they are wanted.
vector<Tensor> matmul_backward(const Tensor& grad, const vector<Tensor>& x, const vector<Tensor>& y, const Tensor& v,
                               const Terms& terms, bool symmetric, const vector<bool>& need) {
    const int64_t batch = x.at(0).size(0), width = v.size(2);
    const mmd::Kernel kernel = kernel_of(terms, x);
    const mmd::Set sx = set_of(x, batch), sy = set_of(y, batch);
    vector<Tensor> result;
    for_type(compute_type(x), [&](auto* kind) {
        using T = std::remove_pointer_t<decltype(kind)>;
        Wanted<T> wanted(x, y, terms, need[0], need[1], need[2]);
        const Tensor values = in_type<T>(v), g = in_type<T>(grad);
        const Tensor grad_v = at::empty(v.sizes(), values.options());
        mmd::matmul_backward_cpu<T>(batch, kernel, sx, sy, symmetric, values.const_data_ptr<T>(), g.const_data_ptr<T>(),
                                    width, grad_v.template data_ptr<T>(), wanted.pointers);
        result = wanted.list(terms);
        result.insert(result.begin(), grad_v);
    });
    return result;
}

std::tuple<Tensor, Tensor, Tensor> pair(const vector<Tensor>& x, const Terms& terms_x, const vector<Tensor>& y,
                                        const Terms& terms_y) {
    const int64_t batch = x.at(0).size(0);
    const mmd::Kernel kx = kernel_of(terms_x, x), ky = kernel_of(terms_y, y);
    const mmd::Set sx = set_of(x, batch), sy = set_of(y, batch);
    TORCH_CHECK_VALUE(sx.count == sy.count && compute_type(x) == compute_type(y),
                      "x and y must have as many points and the same dtype");
    const auto options = x[0].options().dtype(at::kDouble);
    Tensor rows_x = at::empty({batch, sx.count}, options), rows_y = at::empty({batch, sx.count}, options);
    Tensor products = at::empty({batch, 3}, options);
    for_type(compute_type(x), [&](auto* kind) {
        mmd::pair_cpu<std::remove_pointer_t<decltype(kind)>>(batch, kx, sx, ky, sy, rows_x.data_ptr<double>(),
                                                             rows_y.data_ptr<double>(), products.data_ptr<double>());
    });
    return {rows_x, rows_y, products};
}

// [gradients of x, of params of x], [of y, of params of y].
std::tuple<vector<Tensor>, vector<Tensor>> pair_backward(const Tensor& rows_x, const Tensor& rows_y,
                                                         const Tensor& products, const vector<Tensor>& x,
                                                         const Terms& terms_x, const vector<Tensor>& y,
                                                         const Terms& terms_y, const vector<bool>& need) {
    const int64_t batch = x.at(0).size(0);
    const mmd::Kernel kx = kernel_of(terms_x, x), ky = kernel_of(terms_y, y);
    const mmd::Set sx = set_of(x, batch), sy = set_of(y, batch);
    const Tensor rx = doubles(rows_x), ry = doubles(rows_y), p = doubles(products);
    vector<Tensor> result_x, result_y;
    for_type(compute_type(x), [&](auto* kind) {
        using T = std::remove_pointer_t<decltype(kind)>;
        Wanted<T> wx(x, {}, terms_x, need[0], false, need[2]), wy(y, {}, terms_y, need[1], false, need[3]);
        mmd::pair_backward_cpu<T>(batch, kx, sx, ky, sy, rx.const_data_ptr<double>(), ry.const_data_ptr<double>(),
                                  p.const_data_ptr<double>(), wx.pointers, wy.pointers);
        result_x = wx.list(terms_x);
        result_y = wy.list(terms_y);
    });
    return {result_x, result_y};
}

std::tuple<Tensor, Tensor> permutations(const vector<Tensor>& z, const Terms& terms, const Tensor& members) {
    const mmd::Kernel kernel = kernel_of(terms, z);
    const mmd::Set set = set_of(z, 1);
    TORCH_CHECK_VALUE(members.dim() == 2 && members.size(1) == set.count && members.scalar_type() == at::kBool,
                      "members must be a bool tensor of the shape (groups, points)");
    const Tensor m = members.contiguous();
    const auto options = z[0].options().dtype(at::kDouble);
    Tensor inside = at::empty({members.size(0)}, options), rows = at::empty({set.count}, options);
    for_type(compute_type(z), [&](auto* kind) {
        mmd::permutations_cpu<std::remove_pointer_t<decltype(kind)>>(
            kernel, set, static_cast<const uint8_t*>(m.const_data_ptr()), members.size(0), inside.data_ptr<double>(),
            rows.data_ptr<double>());
    });
    return {inside, rows};
}

std::tuple<Tensor, Tensor> select(const Tensor& x, const optional<Tensor>& y, const vector<int64_t>& places) {
    const mmd::Set sx = set_of({x}, 1), sy = y ? set_of({*y}, 1) : mmd::Set();
    const int64_t count = y ? sx.count * sy.count : sx.count * (sx.count - 1) / 2;
    for (const int64_t place : places)
        TORCH_CHECK_VALUE(place >= 0 && place < count, "place ", place, " of ", count, " pairs");
    Tensor values = at::empty({int64_t(places.size())}, x.options().dtype(compute_type({x})));
    Tensor pairs = at::empty({int64_t(places.size()), 2}, x.options().dtype(at::kLong));
    for_type(compute_type({x}), [&](auto* kind) {
        using T = std::remove_pointer_t<decltype(kind)>;
        mmd::select_cpu<T>(sx, sy, x.size(2), !y, places, values.data_ptr<T>(), pairs.data_ptr<int64_t>());
    });
    return {values, pairs};
}

}  // namespace

void bind_mmd(py::module_& m) {
    py::class_<Terms>(m, "MmdTerms").def(py::init([](vector<int64_t> families, vector<int64_t> layers, Tensor parameters) {
        return Terms{std::move(families), std::move(layers), std::move(parameters)};
    }));
    const auto guard = py::call_guard<py::gil_scoped_release>();
    m.def("mmd_quadratic", &quadratic, guard);
    m.def("mmd_sums", &sums, guard);
    m.def("mmd_sums_backward", &sums_backward, guard);
    m.def("mmd_matmul", &matmul, guard);
    m.def("mmd_matmul_backward", &matmul_backward, guard);
    m.def("mmd_pair", &pair, guard);
    m.def("mmd_pair_backward", &pair_backward, guard);
    m.def("mmd_permutations", &permutations, guard);
    m.def("mmd_select", &select, guard);
}

}  // namespace mmfast
