// Binds linear layers of bfloat16 by our kernels and of float32 by oneDNN, and their node in autograd's graph.
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/utils/pybind.h>

#include "common/pages.h"
#include "common/plain.h"
#include "fusion/fusion_projection.h"
#include "fusion/fusion_projection_float.h"

namespace py = pybind11;

namespace mmfast {
namespace {

using at::Tensor;
using fusion::HalfRows;
using fusion::Projection;
using std::optional;
using std::vector;

// Of fewer rows, or multiply-adds, torch's products take no longer, and of more columns its result: what we gain is in the
// gradients.
constexpr int64_t kFewestRows = 512, kFewestProducts = int64_t(1) << 22, kMostColumns = 768;

// t as rows, copied only if they are not the same distance apart.
Tensor as_rows(const Tensor& t) {
    const Tensor rows = t.reshape({-1, t.size(-1)});
    return rows.stride(1) == 1 ? rows : rows.contiguous();
}

HalfRows rows_of(const Tensor& t) {
    return {static_cast<uint16_t*>(t.data_ptr()), t.stride(0)};
}
uint16_t* data_of(const Tensor& t) {
    return t.defined() ? static_cast<uint16_t*>(t.data_ptr()) : nullptr;
}

Tensor empty_rows(int64_t rows, int64_t columns, const Tensor& like) {
    const Tensor result = at::empty({rows, columns}, like.options().requires_grad(false));
    prefer_large_pages(result.data_ptr(), result.nbytes());
    return result;
}

// x, the weight and the sizes of its parts.
Projection problem_of(const Tensor& x, const Tensor& weight, at::IntArrayRef parts) {
    Projection p{};
    p.rows = x.size(0);
    p.in = x.size(1);
    p.x = rows_of(x);
    p.weight = rows_of(weight);
    for (const int64_t out : parts) p.out[p.parts++] = out;
    return p;
}

bool is_float(const Tensor& t) {
    return t.scalar_type() == at::kFloat;
}

vector<Tensor> project(const Tensor& x, const Tensor& weight, const optional<Tensor>& bias, at::IntArrayRef parts) {
    if (is_float(x)) return fusion::project_float(x, weight, bias, parts);
    const Tensor rows = as_rows(x);
    Projection p = problem_of(rows, weight, parts);
    vector<Tensor> result;
    for (int j = 0; j < p.parts; ++j) {
        result.push_back(empty_rows(p.rows, p.out[j], x));
        p.y[j] = rows_of(result.back());
    }
    p.bias = bias ? static_cast<const uint16_t*>(bias->const_data_ptr()) : nullptr;
    fusion::project_cpu(p);
    for (Tensor& y : result) {
        vector<int64_t> sizes = x.sizes().vec();
        sizes.back() = y.size(1);
        y = y.view(sizes);
    }
    return result;
}

struct Project : torch::autograd::Function<Project> {
    static vector<Tensor> forward(torch::autograd::AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                                  const optional<Tensor>& bias, const vector<int64_t>& parts) {
        ctx->save_for_backward({x, weight});
        ctx->saved_data["parts"] = parts;
        ctx->saved_data["bias"] = bias.has_value();
        return project(x, weight, bias, parts);
    }

    static vector<Tensor> backward(torch::autograd::AutogradContext* ctx, const vector<Tensor>& grads) {
        const vector<Tensor> saved = ctx->get_saved_variables();
        const Tensor &x = saved[0], &weight = saved[1];
        const bool need_x = ctx->needs_input_grad(0), need_weight = ctx->needs_input_grad(1),
                   need_bias = ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(2);
        const vector<int64_t> parts = ctx->saved_data["parts"].toIntVector();
        Tensor grad_x, grad_weight, grad_bias;
        bool plain = nobody_looks_on() && !c10::GradMode::is_enabled() && is_plain(x) && is_plain(weight);
        for (const Tensor& grad : grads) plain = plain && is_plain(grad) && grad.scalar_type() == x.scalar_type();
        if (!plain) {  // in what can be differentiated again, or batched
            const Tensor grad = at::cat(grads, -1);
            const Tensor columns = grad.reshape({-1, grad.size(-1)});
            if (need_x) grad_x = grad.matmul(weight);
            if (need_weight) grad_weight = columns.t().mm(x.reshape({-1, x.size(-1)}));
            if (need_bias) grad_bias = columns.sum(0);
            return {grad_x, grad_weight, grad_bias, Tensor()};
        }
        if (is_float(x)) {
            const fusion::FloatGradients result =
                fusion::project_float_backward(x, weight, grads, parts, need_x, need_weight, need_bias);
            return {result.x, result.weight, result.bias, Tensor()};
        }
        const Tensor rows = as_rows(x);
        Projection p = problem_of(rows, weight, parts);
        vector<Tensor> kept;
        for (int j = 0; j < p.parts; ++j) {
            kept.push_back(as_rows(grads[j]));
            p.y[j] = rows_of(kept.back());
        }
        if (need_x) {
            grad_x = empty_rows(p.rows, p.in, x);
            p.grad_x = rows_of(grad_x);
            grad_x = grad_x.view(x.sizes());
        }
        if (need_weight) grad_weight = empty_rows(weight.size(0), p.in, weight);
        if (need_bias) grad_bias = at::empty({weight.size(0)}, weight.options().requires_grad(false));
        p.grad_weight = data_of(grad_weight);
        p.grad_bias = data_of(grad_bias);
        fusion::project_backward_cpu(p);
        return {grad_x, grad_weight, grad_bias, Tensor()};
    }
};

bool is_of(const Tensor& t, at::ScalarType type) {
    return is_plain(t) && t.scalar_type() == type;
}

// Whether the kernels take it; else it is torch's.
bool fits(const Tensor& x, const Tensor& weight, const optional<Tensor>& bias, const vector<int64_t>& parts,
          bool tracked) {
    const at::ScalarType type = x.scalar_type();
    const bool by_onednn = type == at::kFloat, possible = by_onednn ? fusion::may_ask_onednn() : fusion::projects();
    const int64_t step = by_onednn ? 1 : fusion::kProjectionStep;
    if (!possible || parts.empty() || parts.size() > size_t(fusion::kMostParts)) return false;
    if ((!by_onednn && type != at::kBFloat16) || !is_of(x, type) || !is_of(weight, type)) return false;
    if (x.dim() < 2 || weight.dim() != 2 || weight.stride(1) != 1 || x.size(-1) != weight.size(1)) return false;
    if (bias && !(is_of(*bias, type) && bias->dim() == 1 && bias->stride(0) == 1)) return false;
    int64_t total = 0;
    for (const int64_t part : parts) {
        if (part <= 0 || part % step) return false;
        total += part;
    }
    if (total != weight.size(0) || (bias && bias->size(0) != total)) return false;
    const int64_t columns = x.size(-1), products = x.numel() * total;
    if (by_onednn) return products >= fusion::kFewestFloatProducts;
    if (columns % step || (!tracked && columns > kMostColumns)) return false;
    return x.numel() >= kFewestRows * columns && products >= kFewestProducts;
}

// The parts of x weightᵀ + bias; None for what is left to torch. Nobody may look on, nor may there be dual tensors: see
// mmfast/fusion/projection.py.
optional<vector<Tensor>> linear(const Tensor& x, const Tensor& weight, const optional<Tensor>& bias,
                                const vector<int64_t>& parts) {
    const bool tracked = is_tracked(x) || is_tracked(weight) || (bias && is_tracked(*bias));
    if (!fits(x, weight, bias, parts, tracked)) return std::nullopt;
    if (tracked) return Project::apply(x, weight, bias, parts);
    return project(x, weight, bias, parts);
}

}  // namespace

void bind_fusion_projection(py::module_& m) {
    m.def("fusion_projects", &fusion::projects);
    m.def("fusion_prefers_onednn", &fusion::prefers_onednn);
    m.def("fusion_linear", &linear, py::call_guard<py::gil_scoped_release>());
}

}  // namespace mmfast
