// Binds the fusion slice: attention as Python has it, and its node in autograd's graph.
#include <ATen/autocast_mode.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros_like.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "common/plain.h"
#include "fusion/fusion.h"
#include "fusion/fusion_call.h"
#include "fusion/fusion_python.h"

namespace py = pybind11;

namespace mmfast {
namespace {

using at::Tensor;
using fusion::Arguments;
using fusion::Optionals;
using std::optional;
using std::vector;

// ---- Gradients

// Masks, biases and lengths there are, source by source, and gates; which there are: bit 0 mask, bit 1 bias, bit 2 lengths,
// bit 3 gate. As in mmfast/fusion/op.py.
struct Parts {
    vector<Tensor> gates, extras;
    vector<int64_t> flags;

    explicit Parts(const Arguments& a) {
        for (size_t j = 0; j < a.keys.size(); ++j) {
            int64_t flag = 0;
            const optional<Tensor>* each[] = {&a.masks[j], &a.biases[j], &a.lengths[j], &a.gates[j]};
            for (int bit = 0; bit < 4; ++bit) {
                if (!*each[bit]) continue;
                flag |= 1 << bit;
                (bit == 3 ? gates : extras).push_back(**each[bit]);
            }
            flags.push_back(flag);
        }
    }
};

vector<Tensor> followed_in(const Arguments& a, const Parts& parts) {
    vector<Tensor> result{a.query};
    for (const vector<Tensor>* each : {&a.keys, &a.values, &parts.gates})
        result.insert(result.end(), each->begin(), each->end());
    return result;
}

// Gradients that Python gave, or None.
void fill(vector<Tensor>& result, const py::object& by) {
    const auto each = by.cast<Optionals>();
    for (size_t i = 0; i < each.size(); ++i)
        if (each[i]) result.at(i) = *each[i];
}

// The kernels and their derivatives. What they cannot do, gradients that are differentiated again, batches of them and
// subclasses, mmfast.fusion.op does.
struct Attend : torch::autograd::Function<Attend> {
    static vector<Tensor> forward(torch::autograd::AutogradContext* ctx, at::TensorList followed, const Arguments& a,
                                  const Parts& parts, fusion::Weighed* weighed) {
        const auto [out, lse] = fusion::attend(a, weighed);
        vector<Tensor> saved = followed.vec();
        saved.insert(saved.end(), parts.extras.begin(), parts.extras.end());
        saved.insert(saved.end(), {out, lse});
        ctx->save_for_backward(std::move(saved));
        ctx->set_materialize_grads(false);
        ctx->saved_data["parts"] = parts.flags;
        ctx->saved_data["decoupled"] = a.decoupled;
        ctx->saved_data["causal"] = a.causal;
        ctx->saved_data["scale"] = a.scale;
        return {out, lse};
    }

    static vector<Tensor> backward(torch::autograd::AutogradContext* ctx, const vector<Tensor>& grads) {
        const vector<Tensor> saved = ctx->get_saved_variables();
        const vector<int64_t> flags = ctx->saved_data["parts"].toIntVector();
        const size_t n = flags.size();
        Arguments a;
        a.decoupled = ctx->saved_data["decoupled"].toBool();
        a.causal = ctx->saved_data["causal"].toBool();
        a.scale = ctx->saved_data["scale"].toDouble();
        a.query = saved[0];
        a.keys.assign(saved.begin() + 1, saved.begin() + 1 + n);
        a.values.assign(saved.begin() + 1 + n, saved.begin() + 1 + 2 * n);
        size_t gate = 1 + 2 * n, extra = gate;
        for (const int64_t flag : flags) extra += flag >> 3 & 1;
        const size_t count = extra;
        for (const int64_t flag : flags) {
            const auto next = [&](int bit, size_t& at) {
                return flag >> bit & 1 ? optional<Tensor>(saved[at++]) : std::nullopt;
            };
            a.masks.push_back(next(0, extra));
            a.biases.push_back(next(1, extra));
            a.lengths.push_back(next(2, extra));
            a.gates.push_back(next(3, gate));
        }
        const Tensor &out = saved[extra], &lse = saved[extra + 1];

        vector<Tensor> result(count + 3);  // forward had three arguments more
        if (!grads[0].defined() && !grads[1].defined()) return result;
        vector<bool> need;
        for (size_t i = 0; i < 1 + 2 * n; ++i) need.push_back(ctx->needs_input_grad(i));
        bool plain = nobody_looks_on() && !c10::GradMode::is_enabled();
        for (const vector<Tensor>* each : {&saved, &grads})
            for (const Tensor& t : *each) plain = plain && (!t.defined() || is_plain(t));
        if (!plain) {
            const py::gil_scoped_acquire acquire;
            const py::object by =
                py::module_::import("mmfast.fusion.op")
                    .attr("differentiate")(grads[0], grads[1], saved, flags, a.decoupled, a.causal, a.scale, need);
            fill(result, by);
            return result;
        }
        const auto by =
            fusion::differentiate(a, grads[0].defined() ? grads[0] : at::zeros_like(out),
                                  grads[1].defined() ? optional<Tensor>(grads[1]) : std::nullopt, out, lse, need);
        if (need[0]) result[0] = by.query;
        for (size_t j = 0; j < n; ++j) {
            if (need[1 + j]) result[1 + j] = by.keys[j];
            if (need[1 + n + j]) result[1 + n + j] = by.values[j];
        }
        gate = 1 + 2 * n;
        for (size_t j = 0; j < n; ++j) {
            if (!a.gates[j]) continue;
            const Tensor its = by.gates[j].unsqueeze(3).sum_to_size(a.gates[j]->sizes()).to(a.gates[j]->scalar_type());
            result[gate++] = its.is_alias_of(by.gates) ? its.clone() : its;  // kept, it is to have memory of its own
        }
        return result;
    }
};

bool is_followed(const Arguments& a) {
    const auto follows = [](const vector<Tensor>& each) { return std::any_of(each.begin(), each.end(), is_tracked); };
    const auto is_gate = [](const optional<Tensor>& t) { return t && is_tracked(*t); };
    return is_tracked(a.query) || follows(a.keys) || follows(a.values) ||
           std::any_of(a.gates.begin(), a.gates.end(), is_gate);
}

// The output and the log-sum-exp, which autograd follows if it follows what they are of.
vector<Tensor> attend_followed(const Arguments& a, fusion::Weighed* weighed) {
    if (is_followed(a)) {
        const Parts parts(a);
        return Attend::apply(at::TensorList(followed_in(a, parts)), a, parts, weighed);
    }
    const auto [out, lse] = fusion::attend(a, weighed);
    return {out, lse};
}

// Weights of one softmax. Their derivatives are mmfast.fusion.op's.
struct Weigh : torch::autograd::Function<Weigh> {
    static vector<Tensor> forward(torch::autograd::AutogradContext* ctx, at::TensorList followed, const Arguments& a,
                                  const Parts& parts, fusion::Weighed* weighed) {
        vector<Tensor> saved = followed.vec();
        saved.insert(saved.end(), parts.extras.begin(), parts.extras.end());
        ctx->save_for_backward(std::move(saved));
        ctx->set_materialize_grads(false);
        ctx->saved_data["parts"] = parts.flags;
        ctx->saved_data["mean"] = weighed->mean;
        ctx->saved_data["causal"] = a.causal;
        ctx->saved_data["scale"] = a.scale;
        return weighed->weights.empty() ? fusion::weigh(a, followed.back(), weighed->mean)
                                        : std::move(weighed->weights);
    }

    static vector<Tensor> backward(torch::autograd::AutogradContext* ctx, const vector<Tensor>& grads) {
        const vector<Tensor> saved = ctx->get_saved_variables();
        const vector<int64_t> flags = ctx->saved_data["parts"].toIntVector();
        vector<Tensor> result(2 + flags.size() + 3);  // forward had three arguments more
        const py::gil_scoped_acquire acquire;
        const py::object by =
            py::module_::import("mmfast.fusion.op")
                .attr("differentiate_weights")(grads, saved, flags, ctx->saved_data["mean"].toBool(),
                                               ctx->saved_data["causal"].toBool(), ctx->saved_data["scale"].toDouble());
        fill(result, by);
        return result;
    }
};

// Weights of each source: those that there are, or else from the log-sum-exp of each softmax.
vector<Tensor> weigh_followed(const Arguments& a, const Tensor& lse, fusion::Weighed& weighed) {
    const int64_t batch = fusion::broadcast_batch(a);
    const Tensor query = a.query.size(0) == batch ? a.query : a.query.expand({batch, -1, -1, -1});
    const size_t together = a.decoupled ? 1 : a.keys.size();
    const auto some = [together](const auto& each, size_t j) {
        return std::remove_cvref_t<decltype(each)>(each.begin() + j, each.begin() + j + together);
    };
    vector<Tensor> result;
    for (size_t j = 0; j < a.keys.size(); j += together) {
        Arguments one{query,
                      some(a.keys, j),
                      some(a.keys, j),
                      some(a.masks, j),
                      some(a.biases, j),
                      some(a.lengths, j),
                      Optionals(together),
                      false,
                      a.causal,
                      a.scale};
        const Tensor its = lse[j];
        vector<Tensor> weights;
        if (is_tracked(its)) {
            vector<Tensor> followed{query};
            followed.insert(followed.end(), one.keys.begin(), one.keys.end());
            followed.push_back(its);
            weights = Weigh::apply(at::TensorList(followed), one, Parts(one), &weighed);
        } else {
            weights = weighed.weights.empty() ? fusion::weigh(one, its, weighed.mean) : std::move(weighed.weights);
        }
        result.insert(result.end(), weights.begin(), weights.end());
    }
    return result;
}

// ---- What Python passes

// A mask, bias or gate in 4 dimensions.
Tensor in_four(Tensor t) {
    while (t.dim() < 4) t = t.unsqueeze(0);
    return t;
}

// Adds a mmfast.fusion.Source; false for what is left to others.
bool add_source(Arguments& a, PyObject* source) {
    PyObject* parts[6];  // key, value, mask, lengths, bias, gate
    for (int i = 0; i < 6; ++i) parts[i] = PyTuple_GET_ITEM(source, i);
    optional<Tensor> tensors[6];
    for (int i = 0; i < 6; ++i) {
        if (is_plain_type(parts[i])) tensors[i] = THPVariable_Unpack(parts[i]);
        else if (parts[i] != Py_None && i < 5) return false;
    }
    auto& [key, value, mask, lengths, bias, gate] = tensors;
    if (!key || !value) return false;
    for (const optional<Tensor>* added : {&mask, &bias})
        if (*added && (!is_plain(**added) || (*added)->dim() < 2 || (*added)->dim() > 4)) return false;
    if (gate) {
        if (!is_plain(*gate)) return false;
        if (gate->dim() == 1 && gate->size(0) == a.query.size(1)) gate = gate->view({1, -1, 1, 1});
        else if (gate->dim() != 0 && gate->dim() != 4) return false;
    } else if (PyFloat_CheckExact(parts[5])) {
        const double number = PyFloat_AS_DOUBLE(parts[5]);
        if (!std::isfinite(number)) return false;
        gate = at::full({1, 1, 1, 1}, number, a.query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
    } else if (parts[5] != Py_None) {
        return false;
    }
    const auto four = [](const optional<Tensor>& t) { return t ? optional<Tensor>(in_four(*t)) : t; };
    a.keys.push_back(*key);
    a.values.push_back(*value);
    a.masks.push_back(four(mask));
    a.lengths.push_back(lengths && lengths->scalar_type() == at::kInt ? lengths->to(at::kLong) : lengths);
    a.biases.push_back(four(bias));
    a.gates.push_back(four(gate));
    return true;
}

bool add_pair(Arguments& a, PyObject* pair) {
    if (!is_pair(pair)) return false;
    a.keys.push_back(THPVariable_Unpack(PySequence_Fast_GET_ITEM(pair, 0)));
    a.values.push_back(THPVariable_Unpack(PySequence_Fast_GET_ITEM(pair, 1)));
    for (Optionals* each : {&a.masks, &a.lengths, &a.biases, &a.gates}) each->emplace_back();
    return true;
}

bool is_known(at::ScalarType t) {
    return t == at::kFloat || t == at::kDouble || t == at::kHalf || t == at::kBFloat16;
}

bool broadcasts(const Tensor& t, at::IntArrayRef sizes) {
    if (!is_plain(t) || t.dim() != 4) return false;
    for (int64_t i = 0; i < 4; ++i)
        if (t.size(i) != 1 && t.size(i) != sizes[i]) return false;
    return true;
}

bool are_lengths(const Tensor& t, int64_t batch, int64_t longest) {
    if (!is_plain(t) || t.scalar_type() != at::kLong || t.dim() != 1 || t.size(0) != batch) return false;
    const int64_t* each = t.const_data_ptr<int64_t>();
    for (int64_t b = 0; b < batch; ++b)
        if (each[b * t.stride(0)] < 0 || each[b * t.stride(0)] > longest) return false;
    return true;
}

// Whether these are arguments for the kernels alone, on which nothing is left to check or to choose.
bool is_for_kernels(const Arguments& a) {
    const auto type = a.query.scalar_type();
    const size_t n = a.keys.size();
    if (!is_known(type) || n < 1 || n > fusion::kMostSources) return false;
    const auto fits = [&](const Tensor& t) {
        return is_plain(t) && t.scalar_type() == type && t.dim() == 4 && t.numel() > 0;
    };
    if (!fits(a.query)) return false;
    for (size_t j = 0; j < n; ++j)
        if (!fits(a.keys[j]) || !fits(a.values[j])) return false;
    const int64_t batch = fusion::broadcast_batch(a), heads = a.query.size(1), rows = a.query.size(2);
    const auto has_batch = [&](const Tensor& t) { return t.size(0) == 1 || t.size(0) == batch; };
    if (!has_batch(a.query)) return false;
    int64_t total = 0;
    for (size_t j = 0; j < n; ++j) {
        const Tensor &key = a.keys[j], &value = a.values[j];
        if (!has_batch(key) || !has_batch(value) || heads % key.size(1) || value.size(1) != key.size(1) ||
            value.size(2) != key.size(2) || key.size(3) != a.query.size(3) || value.size(3) != a.values[0].size(3) ||
            (!a.decoupled && key.size(1) != a.keys[0].size(1)))
            return false;
        for (const optional<Tensor>* added : {&a.masks[j], &a.biases[j]}) {
            if (!*added) continue;
            const Tensor& t = **added;
            const bool boolean = added == &a.masks[j] && t.scalar_type() == at::kBool;
            if (is_tracked(t) || !(boolean || is_known(t.scalar_type())) ||
                !broadcasts(t, {batch, heads, rows, key.size(2)}))
                return false;
        }
        if (a.lengths[j] && !are_lengths(*a.lengths[j], batch, key.size(2))) return false;
        const optional<Tensor>& gate = a.gates[j];
        if (gate && !(a.decoupled && is_known(gate->scalar_type()) && broadcasts(*gate, {batch, heads, rows, 1})))
            return false;
        total += key.size(2);
    }
    // Of as many keys as are resident flash attention may be the faster.
    return !a.decoupled || total < fusion::kResidentKeys;
}

bool is_added(const optional<Tensor>& t) {
    return t && t->scalar_type() != at::kBool;
}

// As `attention._is_far`: whether what masks add to all keys of a row leaves too little of the log-sum-exp to take
// probabilities from it again.
bool is_far(const Arguments& a, const Tensor& lse) {
    if (std::none_of(a.masks.begin(), a.masks.end(), is_added) &&
        std::none_of(a.biases.begin(), a.biases.end(), is_added))
        return false;
    const auto any = [n = lse.numel()](const auto* each) {
        return std::any_of(each, each + n, [](auto x) { return std::isfinite(x) && std::abs(x) > fusion::kFar; });
    };
    return lse.scalar_type() == at::kDouble ? any(lse.const_data_ptr<double>()) : any(lse.const_data_ptr<float>());
}

// The arguments of `attention` below, as they stand there.
struct Asked {
    PyObject *query, *sources, *fusion, *scale, *causal, *dropout, *softcap, *lse, *weights, *backend;
};

// On the CPU, by the kernels alone. Null, without an error, for what `is_for_kernels` does not take, or where somebody has to see
// what is done.
PyObject* attend_on_cpu(const Asked& asked, bool lse, bool weights) {
    if (!nobody_looks_on() || backend_is_asked_for() || at::autocast::is_autocast_enabled(at::kCPU)) return nullptr;
    if (!PyBool_Check(asked.causal) || !(asked.scale == Py_None || PyFloat_CheckExact(asked.scale))) return nullptr;
    if (!PyUnicode_Check(asked.fusion)) return nullptr;
    Arguments a;
    a.decoupled = PyUnicode_CompareWithASCIIString(asked.fusion, "decoupled") == 0;
    if (!a.decoupled && PyUnicode_CompareWithASCIIString(asked.fusion, "joint") != 0) return nullptr;
    a.query = THPVariable_Unpack(asked.query);
    if (a.query.dim() != 4 || a.query.is_nested()) return nullptr;
    a.causal = asked.causal == Py_True;
    a.scale = asked.scale == Py_None ? std::pow(double(a.query.size(3)), -0.5) : PyFloat_AS_DOUBLE(asked.scale);
    if (!std::isfinite(a.scale)) return nullptr;
    PyObject* given = asked.sources;
    const bool one = is_source(given) || is_pair(given);
    if (!one && !is_sequence(given)) return nullptr;
    for (Py_ssize_t i = 0; i < (one ? 1 : PySequence_Fast_GET_SIZE(given)); ++i) {
        PyObject* source = one ? given : PySequence_Fast_GET_ITEM(given, i);
        if (!(is_source(source) ? add_source(a, source) : add_pair(a, source))) return nullptr;
    }
    if (!is_for_kernels(a)) return nullptr;
    fusion::Weighed weighed{bool(PyUnicode_Check(asked.weights)), {}};
    vector<Tensor> results, each;
    {
        const py::gil_scoped_release release;
        results = attend_followed(a, weights ? &weighed : nullptr);
        if ((weights || results[0].requires_grad()) && is_far(a, results[1])) results.clear();
        else if (weights) each = weigh_followed(a, results[1], weighed);
    }
    if (results.empty()) return nullptr;
    py::object their;
    if (weights) their = py::tuple(py::cast(each));
    return returned(std::move(results[0]), results[1], lse, !a.decoupled, their.ptr());
}

// `mmfast.cross_attention`, whose arguments these are, all of them by position: what it returns, of a call that may go straight to
// the kernels. None for others.
PyObject* attention(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    if (count != sizeof(Asked) / sizeof(PyObject*)) {
        PyErr_SetString(PyExc_TypeError, "fusion_attention takes all arguments of cross_attention");
        return nullptr;
    }
    Asked asked;
    std::copy_n(arguments, count, &asked.query);
    const auto& [query, sources, fusion, scale, causal, dropout, softcap, lse, weights, backend] = asked;
    const bool weighs = weights != Py_False;
    if (!is_plain_type(query) || softcap != Py_None || !PyFloat_CheckExact(dropout) ||
        PyFloat_AS_DOUBLE(dropout) != 0 ||
        (weighs && weights != Py_True &&
         !(PyUnicode_Check(weights) && PyUnicode_CompareWithASCIIString(weights, "mean") == 0)) ||
        torch::autograd::ForwardADLevel::try_get_by_idx(0))
        Py_RETURN_NONE;
    const int with_lse = PyObject_IsTrue(lse);
    if (with_lse < 0) return nullptr;
    const bool free = backend == Py_None;
    const bool triton = PyUnicode_Check(backend) && PyUnicode_CompareWithASCIIString(backend, "triton") == 0;
    const c10::Device at = THPVariable_Unpack(query).device();
    PyObject* result = nullptr;
    if (free && at.is_cpu()) result = attend_on_cpu(asked, with_lse, weighs);
    else if ((free || triton) && (at.is_cuda() || at.is_cpu()) && !weighs)
        result = attend_known({query, sources, fusion, scale, causal, bool(with_lse), free});
    if (!result && !PyErr_Occurred()) Py_RETURN_NONE;
    return result;
    END_HANDLE_TH_ERRORS
}

// ---- Source

// The names of the parts of `mmfast.fusion.Source`, a named tuple; all but the first two are None unless given.
constexpr Py_ssize_t kParts = 6;
PyObject* part_names[kParts];

// What calls of the type come to, in place of the `__new__` that named tuples have, which is written in Python. What does not fit
// goes there, for its errors.
PyObject* make_source(PyObject* type, PyObject* const* arguments, size_t flagged, PyObject* names) {
    const Py_ssize_t count = PyVectorcall_NARGS(flagged), named = names ? PyTuple_GET_SIZE(names) : 0;
    PyObject* parts[kParts] = {};
    bool fits = count <= kParts;
    if (fits) std::copy_n(arguments, count, parts);
    for (Py_ssize_t i = 0; fits && i < named; ++i) {
        const auto place = std::find(part_names, part_names + kParts, PyTuple_GET_ITEM(names, i)) - part_names;
        fits = place < kParts && !parts[place];
        if (fits) parts[place] = arguments[count + i];
    }
    const auto of = reinterpret_cast<PyTypeObject*>(type);
    if (!fits || !parts[0] || !parts[1]) {
        PyObject *const all = PyTuple_New(count), *const rest = PyDict_New();
        for (Py_ssize_t i = 0; all && i < count; ++i) PyTuple_SET_ITEM(all, i, Py_NewRef(arguments[i]));
        bool made = all && rest;
        for (Py_ssize_t i = 0; made && i < named; ++i)
            made = PyDict_SetItem(rest, PyTuple_GET_ITEM(names, i), arguments[count + i]) == 0;
        PyObject* const source = made ? PyType_Type.tp_call(type, all, rest) : nullptr;
        Py_XDECREF(all);
        Py_XDECREF(rest);
        return source;
    }
    PyObject* const source = of->tp_alloc(of, kParts);
    if (source)
        for (Py_ssize_t i = 0; i < kParts; ++i) PyTuple_SET_ITEM(source, i, Py_NewRef(parts[i] ? parts[i] : Py_None));
    return source;
}

void make_sources_here(const py::type& type) {
    const py::tuple names = type.attr("_fields");
    if (names.size() != kParts) throw py::value_error("a Source has six parts");
    for (Py_ssize_t i = 0; i < kParts; ++i) part_names[i] = Py_NewRef(PyTuple_GET_ITEM(names.ptr(), i));
    reinterpret_cast<PyTypeObject*>(type.ptr())->tp_vectorcall = &make_source;
}

PyMethodDef methods[] = {
    {"fusion_attention", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&attention)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr}};

// ---- One argument after the other, for the operators

Arguments arguments(const Tensor& query, vector<Tensor> keys, vector<Tensor> values, Optionals masks, Optionals biases,
                    Optionals lengths, Optionals gates, bool decoupled, bool causal, double scale) {
    return {query,
            std::move(keys),
            std::move(values),
            std::move(masks),
            std::move(biases),
            std::move(lengths),
            std::move(gates),
            decoupled,
            causal,
            scale};
}

std::tuple<Tensor, vector<Tensor>, vector<Tensor>, Tensor> differentiate(const Arguments& a, const Tensor& grad_out,
                                                                         const optional<Tensor>& grad_lse,
                                                                         const Tensor& out, const Tensor& lse,
                                                                         const vector<bool>& need) {
    const auto by = fusion::differentiate(a, grad_out, grad_lse, out, lse, need);
    return {by.query, by.keys, by.values, by.gates};
}

}  // namespace

PyObject* returned(Tensor out, const Tensor& lses, bool lse, bool joint, PyObject* weights) {
    if (!lse && !weights) return THPVariable_Wrap(std::move(out));
    py::list result;
    result.append(py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(out))));
    if (lse) {
        const vector<Tensor> each = lses.unbind();
        if (joint) result.append(each[0]);
        else result.append(py::tuple(py::cast(each)));
    }
    if (weights) result.append(py::handle(weights));
    return py::tuple(std::move(result)).release().ptr();
}

void bind_fusion_projection(py::module_& m);
void bind_fusion_replay(py::module_& m);
void bind_fusion_tiny(py::module_& m);

void bind_fusion(py::module_& m) {
    using Release = py::call_guard<py::gil_scoped_release>;
    m.attr("fusion_resident_keys") = fusion::kResidentKeys;
    m.attr("fusion_most_sources") = fusion::kMostSources;
    m.attr("fusion_far") = fusion::kFar;
    py::class_<Arguments>(m, "FusionArguments").def(py::init(&arguments));
    if (PyModule_AddFunctions(m.ptr(), methods)) throw py::error_already_set();
    m.def("fusion_make_sources", &make_sources_here);
    m.def("fusion_attend", [](const Arguments& a) { return attend_followed(a, nullptr); }, Release());
    m.def("fusion_forward", [](const Arguments& a) { return fusion::attend(a); }, Release());
    m.def("fusion_backward", &differentiate, Release());
    m.def("fusion_weights", &fusion::weigh, Release());
    bind_fusion_projection(m);
    bind_fusion_replay(m);
    bind_fusion_tiny(m);
}

}  // namespace mmfast
