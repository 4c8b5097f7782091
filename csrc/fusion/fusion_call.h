// Attention of torch's tensors by the kernels: checks, allocation. Nothing here knows of Python.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <utility>
#include <vector>

namespace mmfast::fusion {

using Optionals = std::vector<std::optional<at::Tensor>>;

// Masks, biases, lengths and gates have an entry for each source; in 4 dimensions but for lengths.
struct Arguments {
    at::Tensor query;
    std::vector<at::Tensor> keys, values;
    Optionals masks, biases, lengths, gates;
    bool decoupled, causal;
    double scale;
};

// The batch size of query, keys and values together: the first that is not 1.
int64_t broadcast_batch(const Arguments& a);

// Weights as of `weigh`, if they come with the output at once; else none.
struct Weighed {
    bool mean;
    std::vector<at::Tensor> weights;
};

// The output and the log-sum-exp, (softmaxes, batch, heads, rows).
std::pair<at::Tensor, at::Tensor> attend(const Arguments& a, Weighed* weighed = nullptr);

struct Derivatives {
    at::Tensor query;
    std::vector<at::Tensor> keys, values;
    at::Tensor gates;  // in the computing type, (sources, batch, heads, rows)
};

// Of query, then keys, then values, where `need` says so; else empty tensors.
Derivatives differentiate(const Arguments& a, const at::Tensor& grad_out, const std::optional<at::Tensor>& grad_lse,
                          const at::Tensor& out, const at::Tensor& lse, const std::vector<bool>& need);

// Weights of one softmax over all sources, from its log-sum-exp: (batch, heads, rows, keys) for each source, or the means
// over the heads, (batch, rows, keys). Values and gates are not looked at.
std::vector<at::Tensor> weigh(const Arguments& a, const at::Tensor& lse, bool mean);

}  // namespace mmfast::fusion
