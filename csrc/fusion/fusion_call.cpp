#include "fusion/fusion_call.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>

#include <array>

#include "common/pages.h"
#include "fusion/fusion.h"

namespace mmfast::fusion {
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
        default: TORCH_CHECK_TYPE(false, "attention is of floating point tensors, got ", t.scalar_type());
    }
}

at::ScalarType compute_type(const Tensor& t) {
    return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// t under broadcasting to `sizes`: no stride where it has the size 1.
View view_of(const char* name, const Tensor& t, at::IntArrayRef sizes) {
    TORCH_CHECK_VALUE(t.dim() == 4 && t.device().is_cpu(), name, " must have 4 dimensions and be on the CPU");
    int64_t strides[4];
    for (int i = 0; i < 4; ++i) {
        TORCH_CHECK_VALUE(t.size(i) == sizes[i] || t.size(i) == 1, name, " must broadcast to ", sizes, ", got ",
                          t.sizes());
        strides[i] = t.size(i) == 1 ? (i == 3 && sizes[3] == 1 ? 1 : 0) : t.stride(i);
    }
    const bool boolean = t.scalar_type() == at::kBool;
    return {t.const_data_ptr(), boolean ? ScalarType::float32 : type_of(t), boolean, strides[0], strides[1], strides[2],
            strides[3]};
}

// With the strides of (batch, row, head, column), and no view of another tensor: in place of one that a Function gave out
// nothing may be written.
Tensor heads_inside(at::IntArrayRef sizes, const at::TensorOptions& options) {
    const int64_t row = sizes[1] * sizes[3];
    const Tensor result = at::empty_strided(sizes, {sizes[2] * row, sizes[3], row, 1}, options);
    prefer_large_pages(result.data_ptr(), result.nbytes());
    return result;
}

Target target_of(const Tensor& t) {
    return {t.data_ptr(), type_of(t), t.size(0) == 1 ? 0 : t.stride(0), t.stride(1), t.stride(2)};
}

// A call as the kernels have it; keeps alive what the problem points to.
struct Call {
    Problem problem;
    vector<Tensor> kept;

    explicit Call(const Arguments& a) {
        const auto& [query, keys, values, masks, biases, lengths, gates, decoupled, causal, scale] = a;
        const size_t n = keys.size();
        TORCH_CHECK_VALUE(n >= 1 && n <= kMostSources, "there must be 1 to ", kMostSources, " sources");
        TORCH_CHECK_VALUE(
            values.size() == n && masks.size() == n && biases.size() == n && lengths.size() == n && gates.size() == n,
            "each source must have its key, value, mask, bias, lengths and gate");
        TORCH_CHECK_VALUE(query.dim() == 4 && keys[0].dim() == 4 && values[0].dim() == 4,
                          "tensors must have 4 dimensions");
        Problem& p = problem;
        p.batch = broadcast_batch(a);
        p.heads = query.size(1);
        p.rows = query.size(2);
        p.dim = query.size(3);
        p.value_dim = values[0].size(3);
        p.causal = causal;
        p.decoupled = decoupled;
        p.scale = scale;
        p.query = view_of("query", query, {p.batch, p.heads, p.rows, p.dim});
        p.count = int(n);
        int64_t total = 0;
        for (size_t j = 0; j < n; ++j) {
            Source& s = p.sources[j];
            TORCH_CHECK_VALUE(keys[j].dim() == 4, "keys must have 4 dimensions");
            s.heads = keys[j].size(1);
            s.keys = keys[j].size(2);
            total += s.keys;
            TORCH_CHECK_VALUE(s.heads > 0 && p.heads % s.heads == 0, "the heads of keys must divide those of queries");
            TORCH_CHECK_VALUE(keys[j].scalar_type() == query.scalar_type() &&
                                  values[j].scalar_type() == query.scalar_type() && keys[j].size(3) == p.dim &&
                                  values[j].size(3) == p.value_dim && values[j].size(1) == s.heads &&
                                  values[j].size(2) == s.keys,
                              "query, keys and values do not fit together");
            s.key = view_of("key", keys[j], {p.batch, s.heads, s.keys, p.dim});
            s.value = view_of("value", values[j], {p.batch, s.heads, s.keys, p.value_dim});
            const std::array<int64_t, 4> sizes{p.batch, p.heads, p.rows, s.keys};
            if (masks[j]) s.added[0] = view_of("mask", *masks[j], sizes);
            if (biases[j]) s.added[1] = view_of("bias", *biases[j], sizes);
            if (lengths[j]) {
                TORCH_CHECK_VALUE(lengths[j]->sizes() == at::IntArrayRef({p.batch}) && lengths[j]->device().is_cpu(),
                                  "lengths must be (batch,)");
                kept.push_back(lengths[j]->to(at::kLong).contiguous());
                s.lengths = kept.back().const_data_ptr<int64_t>();
                for (int64_t b = 0; b < p.batch; ++b)
                    TORCH_CHECK_VALUE(s.lengths[b] >= 0 && s.lengths[b] <= s.keys, "lengths must lie in [0, ", s.keys,
                                      "]");
            }
            if (gates[j]) {
                kept.push_back(gates[j]->to(compute_type(query)));
                s.gate = view_of("gate", kept.back(), {p.batch, p.heads, p.rows, 1});
            }
        }
        TORCH_CHECK_VALUE(!decoupled || total <= kResidentKeys, "decoupled sources must have at most ", kResidentKeys,
                          " keys together");
    }
};

template <class F>
void for_type(at::ScalarType type, const F& f) {
    if (type == at::kDouble) f(static_cast<double*>(nullptr));
    else f(static_cast<float*>(nullptr));
}

}  // namespace

int64_t broadcast_batch(const Arguments& a) {
    const auto larger = [](int64_t size, const Tensor& t) { return size == 1 ? t.size(0) : size; };
    int64_t batch = a.query.size(0);
    for (const Tensor& t : a.keys) batch = larger(batch, t);
    for (const Tensor& t : a.values) batch = larger(batch, t);
    return batch;
}

namespace {

// Weights of each source of a call, zero where not all are written.
vector<Tensor> empty_weights(const Problem& p, const at::TensorOptions& options, bool mean, Target* targets) {
    vector<Tensor> result;
    for (int j = 0; j < p.count; ++j) {
        // Not a view, as `heads_inside`.
        const int64_t keys = p.sources[j].keys;
        result.push_back(mean ? at::empty({p.batch, p.rows, keys}, options)
                              : at::empty({p.batch, p.heads, p.rows, keys}, options));
        prefer_large_pages(result.back().data_ptr(), result.back().nbytes());
        if (p.causal || p.sources[j].lengths || p.heads == 0) result.back().zero_();
        targets[j] = target_of(mean ? result.back().unsqueeze(1) : result.back());
    }
    return result;
}

}  // namespace

std::pair<Tensor, Tensor> attend(const Arguments& a, Weighed* weighed) {
    const Call call(a);
    const Problem& p = call.problem;
    const Tensor out = heads_inside({p.batch, p.heads, p.rows, p.value_dim}, a.query.options());
    const Tensor lse =
        at::empty({p.softmaxes(), p.batch, p.heads, p.rows}, a.query.options().dtype(compute_type(a.query)));
    for_type(compute_type(a.query), [&](auto* kind) {
        using T = std::remove_pointer_t<decltype(kind)>;
        if (!weighed || !weighs_at_once<T>(p, weighed->mean))
            return forward_cpu<T>(p, target_of(out), lse.data_ptr<T>());
        std::array<Target, kMostSources> targets;
        weighed->weights = empty_weights(p, a.query.options(), weighed->mean, targets.data());
        forward_weighing_cpu<T>(p, target_of(out), lse.data_ptr<T>(), weighed->mean, targets.data());
    });
    return {out, lse};
}

Derivatives differentiate(const Arguments& a, const Tensor& grad_out, const optional<Tensor>& grad_lse,
                          const Tensor& out, const Tensor& lse, const vector<bool>& need) {
    const auto& [query, keys, values] = std::tie(a.query, a.keys, a.values);
    const Call call(a);
    const Problem& p = call.problem;
    TORCH_CHECK_VALUE(need.size() == 1 + 2 * keys.size(), "need must say for query, each key and each value");
    const std::array<int64_t, 4> sizes{p.batch, p.heads, p.rows, p.value_dim};
    const View by_out = view_of("grad_out", grad_out, sizes), of_out = view_of("out", out, sizes);
    const Tensor saved = lse.contiguous(), by_lse = grad_lse ? grad_lse->to(lse.scalar_type()).contiguous() : Tensor();
    TORCH_CHECK_VALUE(saved.scalar_type() == compute_type(query) &&
                          saved.sizes() == at::IntArrayRef({p.softmaxes(), p.batch, p.heads, p.rows}) &&
                          (!grad_lse || by_lse.sizes() == saved.sizes()),
                      "the log-sum-exp or its gradient does not fit");
    const auto empty = [&](const Tensor& like, bool wanted) {
        return wanted ? heads_inside(like.sizes(), like.options()) : at::empty({0}, like.options());
    };
    const Tensor by_query = empty(query, need[0]);
    vector<Tensor> by_keys, by_values;
    for (size_t j = 0; j < keys.size(); ++j) {
        by_keys.push_back(empty(keys[j], need[1 + j]));
        by_values.push_back(empty(values[j], need[1 + keys.size() + j]));
    }
    const Tensor by_gates = at::empty({a.decoupled ? p.count : 0, p.batch, p.heads, p.rows}, saved.options());
    for_type(compute_type(query), [&](auto* kind) {
        using T = std::remove_pointer_t<decltype(kind)>;
        Gradients<T> gradients;
        if (need[0]) gradients.query = target_of(by_query);
        gradients.query_batch = query.size(0);
        for (size_t j = 0; j < keys.size(); ++j) {
            if (need[1 + j]) gradients.key[j] = target_of(by_keys[j]);
            if (need[1 + keys.size() + j]) gradients.value[j] = target_of(by_values[j]);
            gradients.key_batch[j] = keys[j].size(0);
            gradients.value_batch[j] = values[j].size(0);
        }
        if (a.decoupled) gradients.gates = by_gates.data_ptr<T>();
        backward_cpu<T>(p, by_out, grad_lse ? by_lse.const_data_ptr<T>() : nullptr, of_out, saved.const_data_ptr<T>(),
                        gradients);
    });
    return {by_query, by_keys, by_values, by_gates};
}

vector<Tensor> weigh(const Arguments& a, const Tensor& lse, bool mean) {
    Arguments of_keys = a;
    of_keys.values = a.keys;
    of_keys.gates.assign(a.keys.size(), {});
    of_keys.decoupled = false;
    const Call call(of_keys);
    const Problem& p = call.problem;
    const Tensor saved = lse.contiguous();
    TORCH_CHECK_VALUE(
        saved.scalar_type() == compute_type(a.query) && saved.sizes() == at::IntArrayRef({p.batch, p.heads, p.rows}),
        "the log-sum-exp does not fit");
    std::array<Target, kMostSources> targets;
    const vector<Tensor> result = empty_weights(p, a.query.options(), mean, targets.data());
    for_type(compute_type(a.query), [&](auto* kind) {
        using T = std::remove_pointer_t<decltype(kind)>;
        weights_cpu<T>(p, saved.const_data_ptr<T>(), mean, targets.data());
    });
    return result;
}

}  // namespace mmfast::fusion
