// Nodes of autograd's graph whose backward pass is replayed, without Python where it is known. For fusion_replay.cpp.
#pragma once

#include <ATen/ops/_scaled_dot_product_flash_attention.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_backward.h>
#include <ATen/ops/empty.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <mutex>

#include "fusion/fusion_recording.h"

namespace py = pybind11;

namespace mmfast {
namespace {

// Without the dispatcher where there is nothing to do.
Tensor in(at::ScalarType type, const Tensor& t) {
    return t.scalar_type() == type ? t : t.to(type);
}

// ---- Flash attention of several sources, one by one

// Of tensors that the kernels take as they are: a query, then keys and values of each source.
struct Flash {
    double scale;
    bool causal;

    // The outputs of each source, then their log-sum-exps.
    vector<Tensor> forward(at::TensorList tensors) const {
        vector<Tensor> outs, lses;
        for (size_t i = 1; i + 1 < tensors.size(); i += 2) {
            auto one = at::_scaled_dot_product_flash_attention(tensors[0], tensors[i], tensors[i + 1], 0.0, causal,
                                                               false, scale);
            outs.push_back(std::get<0>(std::move(one)));
            lses.push_back(std::get<1>(std::move(one)));
        }
        outs.insert(outs.end(), lses.begin(), lses.end());
        return outs;
    }

    // Gradients of all ``tensors``; ``out`` and ``lse`` are those of all sources together.
    vector<Tensor> backward(const Tensor& grad, at::TensorList tensors, const Tensor& out, const Tensor& lse) const {
        const Tensor& query = tensors[0];
        const Tensor along = grad.stride(3) == 1 ? grad : grad.contiguous();
        const Tensor seed =
            at::empty({2}, query.options().dtype(at::kUInt64));  // of the dropout that is not: nobody reads it
        vector<Tensor> result(1);
        for (size_t i = 1; i + 1 < tensors.size(); i += 2) {
            auto [of_query, of_key, of_value] = at::_scaled_dot_product_flash_attention_backward(
                along, query, tensors[i], tensors[i + 1], out, lse, Tensor(), Tensor(), query.size(2),
                tensors[i].size(2), 0.0, causal, seed, seed.select(0, 0), scale);
            result[0] = result[0].defined() ? in(at::kFloat, result[0]).add_(of_query) : of_query;
            result.push_back(of_key);
            result.push_back(of_value);
        }
        result[0] = in(query.scalar_type(), result[0]);
        return result;
    }
};

// ---- Autograd

// Recorded backward passes of a plan, by what `describe` says of all that they are given. Nodes know it by its number: what
// they hold must be numbers, strings and tensors for compiled autograd to look at them.
class Backward {
public:
    struct Entry {
        std::shared_ptr<Recording> recording;
        vector<int64_t> room_of;  // for each input the gradient's, or -1
    };

    static std::shared_ptr<Backward> make() {
        const auto made = std::make_shared<Backward>();
        const std::lock_guard lock(all_mutex());
        static int64_t count = 0;
        made->number = count++;
        all()[made->number] = made;
        return made;
    }
    // Null if its plan is forgotten.
    static std::shared_ptr<Backward> of(int64_t number) {
        const std::lock_guard lock(all_mutex());
        const auto found = all().find(number);
        return found == all().end() ? nullptr : found->second.lock();
    }
    Backward() = default;
    Backward(const Backward&) = delete;
    ~Backward() {
        const std::lock_guard lock(all_mutex());
        all().erase(number);
    }
    void keep(const std::string& key, std::shared_ptr<Recording> recording, vector<int64_t> room_of) {
        const std::lock_guard lock(mutex_);
        entries_[key] = std::make_shared<const Entry>(std::move(recording), std::move(room_of));
    }
    std::shared_ptr<const Entry> find(std::string_view key) const {
        const std::lock_guard lock(mutex_);
        const auto found = entries_.find(key);
        return found == entries_.end() ? nullptr : found->second;
    }
    void clear() {
        const std::lock_guard lock(mutex_);
        entries_.clear();
    }

    int64_t number = -1;
    std::optional<Flash> flash;  // in place of recordings; set once, before any node knows this

private:
    // Never destroyed: nodes and plans may outlive what ends with the program.
    static std::mutex& all_mutex() {
        static std::mutex& mutex = *new std::mutex;
        return mutex;
    }
    static std::unordered_map<int64_t, std::weak_ptr<Backward>>& all() {
        static auto& map = *new std::unordered_map<int64_t, std::weak_ptr<Backward>>;
        return map;
    }

    mutable std::mutex mutex_;
    ByKey<std::shared_ptr<const Entry>> entries_;
};

using Attended = std::pair<Tensor, Tensor>;  // output and log-sum-exps, the latter perhaps undefined

// What is behind a node: its forward pass, which has been made, and where the backward pass is found.
struct Made {
    const Attended& attended;
    int64_t number;
    const at::IValue& plan;
    uint64_t stream;
    bool keeps_out;
};

struct Replayed : torch::autograd::Function<Replayed> {
    static vector<Tensor> forward(torch::autograd::AutogradContext* ctx, at::TensorList tensors, const Made& made) {
        const auto& [out, lse] = made.attended;
        vector<Tensor> saved;
        saved.reserve(tensors.size() + 2);
        saved.assign(tensors.begin(), tensors.end());
        saved.push_back(lse);
        if (made.keeps_out) saved.push_back(out);
        ctx->save_for_backward(std::move(saved));
        ctx->set_materialize_grads(false);
        ctx->saved_data.reserve(4);
        ctx->saved_data["number"] = made.number;
        ctx->saved_data["plan"] = made.plan;
        ctx->saved_data["stream"] = static_cast<int64_t>(made.stream);
        ctx->saved_data["keeps_out"] = made.keeps_out;
        return {out, lse};
    }

    static vector<Tensor> backward(torch::autograd::AutogradContext* ctx, const vector<Tensor>& grads) {
        const vector<Tensor> saved = ctx->get_saved_variables();
        const bool keeps_out = ctx->saved_data["keeps_out"].toBool();
        const int64_t number = ctx->saved_data["number"].toInt();
        const size_t count = saved.size() - 1 - keeps_out;
        vector<Tensor> result(count + 1);  // forward had an argument more
        if (!grads[0].defined() && !grads[1].defined()) return result;
        const auto is_dual = [](const Tensor& t) { return t.defined() && t._fw_grad(0).defined(); };
        if (grads[0].defined() && nobody_looks_on() && !c10::GradMode::is_enabled() &&
            std::none_of(grads.begin(), grads.end(), is_dual)) {
            // The same order as in mmfast/fusion/triton_direct.py.
            const int64_t device = saved[0].get_device();
            const at::TensorList all(saved);
            Description given;
            bool plain = given.add(all.slice(0, count + 1), device) && given.add(grads[0], device);
            plain = plain && (!grads[1].defined() || given.add(grads[1], device));
            plain = plain && (!keeps_out || given.add(saved.back(), device));
            const auto backward = plain ? Backward::of(number) : nullptr;
            if (backward && backward->flash && !grads[1].defined()) {
                auto by =
                    backward->flash->backward(grads[0], all.slice(0, count), saved.back(), saved[count].select(0, 0));
                for (size_t i = 0; i < count; ++i)
                    if (ctx->needs_input_grad(i)) result[i] = std::move(by[i]);
                return result;
            }
            if (const auto entry = backward ? backward->find(given.key()) : nullptr) {
                const auto stream = static_cast<uint64_t>(ctx->saved_data["stream"].toInt());
                const vector<Tensor> made = entry->recording->again(given.addresses, stream);
                for (size_t i = 0; i < count; ++i) {
                    if (entry->room_of[i] < 0 || !ctx->needs_input_grad(i)) continue;
                    // Summed over what the input was broadcast along.
                    const Tensor& full = made[entry->room_of[i]];
                    const Tensor its = full.sizes() == saved[i].sizes() ? full : full.sum_to_size(saved[i].sizes());
                    result[i] = in(saved[i].scalar_type(), its);
                }
                return result;
            }
        }
        const py::gil_scoped_acquire acquire;
        const vector<Tensor> tensors(saved.begin(), saved.begin() + count);
        const auto optional = [](const Tensor& t) { return t.defined() ? std::optional<Tensor>(t) : std::nullopt; };
        const py::object by =
            py::module_::import("mmfast.fusion.triton_direct")
                .attr("differentiate")(number, ctx->saved_data["plan"].toStringRef(), optional(grads[0]),
                                       optional(grads[1]), tensors,
                                       keeps_out ? std::optional<Tensor>(saved.back()) : std::nullopt, saved[count]);
        const auto each = by.cast<vector<std::optional<Tensor>>>();
        for (size_t i = 0; i < count; ++i)
            if (each[i]) result[i] = *each[i];
        return result;
    }
};

// A gate times what it is the gate of, in the dtype of the latter, where both are followed. The gradient of a gate is a sum over
// all that it is broadcast along, taken in float32.
struct Gated : torch::autograd::Function<Gated> {
    static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& out, const Tensor& gate) {
        ctx->save_for_backward({out, gate});
        return in(out.scalar_type(), out * gate);
    }

    static vector<Tensor> backward(torch::autograd::AutogradContext* ctx, const vector<Tensor>& grads) {
        const vector<Tensor> saved = ctx->get_saved_variables();
        const Tensor &grad = grads[0], &out = saved[0], &gate = saved[1];
        vector<Tensor> result(2);
        if (!grad.defined()) return result;
        if (ctx->needs_input_grad(0)) result[0] = in(out.scalar_type(), grad * gate);
        if (ctx->needs_input_grad(1))
            result[1] = in(gate.scalar_type(), (in(at::kFloat, grad) * out).sum_to_size(gate.sizes()));
        return result;
    }
};

}  // namespace
}  // namespace mmfast
