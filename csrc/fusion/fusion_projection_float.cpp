#include "fusion/fusion_projection_float.h"

#include <ATen/Context.h>
#include <ATen/core/List.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/cat.h>

#include <algorithm>
#include <string_view>

#include "common/isa.h"

namespace mmfast {
namespace fusion {
namespace {

using at::Tensor;
using std::vector;
using Pointwise = Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&, std::string_view,
                         c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>);

// oneDNN sums up all terms in their order, MKL some hundred at a time. Of random ones: with 1024 terms its errors are 1.6
// times MKL's, with 1536 and more they would be 2.1 to 2.3 times.
constexpr int64_t kLongestSum = 1024;

// What torch.compile makes of linear layers, with nothing behind them. Not in every build of torch.
const std::optional<c10::OperatorHandle>& pointwise() {
    static const auto found = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
    return found;
}

// x weightᵀ + bias, of sums of at most kLongestSum terms that are added up.
Tensor by_onednn(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias = std::nullopt) {
    static const auto op = pointwise()->typed<Pointwise>();
    const int64_t terms = x.size(-1), pieces = std::max<int64_t>(1, (terms + kLongestSum - 1) / kLongestSum);
    Tensor result;
    for (int64_t i = 0; i < pieces; ++i) {
        const int64_t first = terms * i / pieces, count = terms * (i + 1) / pieces - first;
        const Tensor part = op.call(x.narrow(-1, first, count), weight.narrow(-1, first, count),
                                    i ? std::nullopt : bias, "none", c10::List<std::optional<at::Scalar>>(), "");
        if (i) result.add_(part);
        else result = part;
    }
    return result;
}

bool is_of_amd() {
#if defined(MMFAST_X86)
    __builtin_cpu_init();
    return __builtin_cpu_is("amd");
#else
    return false;
#endif
}

}  // namespace

bool prefers_onednn() {
    static const bool result =
        is_of_amd() && best_isa() >= Isa::avx512 && at::hasMKL() && at::hasMKLDNN() && pointwise();
    return result;
}

bool may_ask_onednn() {
    return pointwise() && at::globalContext().userEnabledMkldnn();
}

vector<Tensor> project_float(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                             at::IntArrayRef parts) {
    vector<Tensor> result;
    int64_t first = 0;
    for (const int64_t count : parts) {
        std::optional<Tensor> of_part;
        if (bias) of_part = bias->narrow(0, first, count);
        result.push_back(by_onednn(x, weight.narrow(0, first, count), of_part));
        first += count;
    }
    return result;
}

FloatGradients project_float_backward(const Tensor& x, const Tensor& weight, const vector<Tensor>& grads,
                                      at::IntArrayRef parts, bool need_x, bool need_weight, bool need_bias) {
    const Tensor columns = x.reshape({-1, x.size(-1)}).t();
    FloatGradients result;
    vector<Tensor> of_weights, of_biases;
    int64_t first = 0;
    for (size_t j = 0; j < grads.size(); first += parts[j++]) {
        const Tensor grad = grads[j].reshape({-1, parts[j]});
        if (need_x) {
            const Tensor part = by_onednn(grad, weight.narrow(0, first, parts[j]).t());
            if (result.x.defined()) result.x.add_(part);
            else result.x = part;
        }
        if (need_weight) of_weights.push_back(by_onednn(grad.t(), columns));
        if (need_bias) of_biases.push_back(grad.sum(0));
    }
    const auto all = [](const vector<Tensor>& pieces) { return pieces.size() == 1 ? pieces[0] : at::cat(pieces); };
    if (need_x) result.x = result.x.view(x.sizes());
    if (need_weight) result.weight = all(of_weights);
    if (need_bias) result.bias = all(of_biases);
    return result;
}

}  // namespace fusion
}  // namespace mmfast
