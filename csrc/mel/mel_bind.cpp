// Argument checks, allocation and the device switch of the mel slice.
#include <torch/csrc/utils/pybind.h>

#include <ATen/ATen.h>
#include <pybind11/stl.h>

#include <optional>
#include <tuple>

#include "mel/mel.h"

namespace py = pybind11;

namespace mmfast {
namespace {

using at::Tensor;
using std::optional;

ScalarType scalar_type(const Tensor& t) {
    switch (t.scalar_type()) {
        case at::kFloat: return ScalarType::float32;
        case at::kDouble: return ScalarType::float64;
        case at::kHalf: return ScalarType::float16;
        case at::kBFloat16: return ScalarType::bfloat16;
        case at::kShort: return ScalarType::int16;
        default: TORCH_CHECK_TYPE(false, "waveform has no kernel for ", t.scalar_type());
    }
}

mel::Waveform waveform_of(const Tensor& x, const optional<Tensor>& lengths) {
    TORCH_CHECK_VALUE(x.dim() == 2, "waveform must be (B, T), got ", x.sizes());
    TORCH_CHECK_VALUE(x.device().is_cpu(), "waveform must be on the CPU, got ", x.device());
    if (lengths) {
        TORCH_CHECK_VALUE(lengths->dim() == 1 && lengths->size(0) == x.size(0) && lengths->scalar_type() == at::kLong &&
                              lengths->is_contiguous() && lengths->device().is_cpu(),
                          "lengths must be a contiguous int64 CPU tensor of ", x.size(0), " elements");
    }
    return {x.const_data_ptr(),
            scalar_type(x),
            x.size(0),
            x.size(1),
            x.stride(0),
            x.stride(1),
            lengths ? lengths->const_data_ptr<int64_t>() : nullptr};
}

// `t` must be a contiguous CPU tensor of type T; null for none.
template <class T>
const T* table(const char* name, const optional<Tensor>& t, at::IntArrayRef shape) {
    if (!t) return nullptr;
    TORCH_CHECK_VALUE(t->sizes() == shape && t->is_contiguous() && t->device().is_cpu() &&
                          t->scalar_type() == c10::CppTypeToScalarType<T>::value,
                      name, " must be a contiguous CPU tensor of shape ", shape, " and type ",
                      c10::CppTypeToScalarType<T>::value);
    return t->const_data_ptr<T>();
}

template <class T>
mel::Tables<T> tables_of(const mel::Plan& plan, const Tensor& window, const optional<Tensor>& filters,
                         const optional<Tensor>& dct) {
    const int64_t bins = plan.spec.n_fft / 2 + 1;
    const int64_t n_filters = filters && filters->dim() == 2 ? filters->size(1) : 0;
    const int64_t cepstra = dct && dct->dim() == 2 ? dct->size(1) : 0;
    return {table<T>("window", window, {plan.spec.framing.window}), table<T>("filters", filters, {bins, n_filters}),
            n_filters, table<T>("dct", dct, {n_filters ? n_filters : bins, cepstra}), cepstra};
}

int64_t group_count(int64_t rows, int64_t group) {
    return group > 0 ? (rows + group - 1) / group : rows > 0;
}

std::tuple<Tensor, Tensor, Tensor> mel_forward(const mel::Plan& plan, const Tensor& waveform, const Tensor& window,
                                               const optional<Tensor>& filters, const optional<Tensor>& dct,
                                               const optional<Tensor>& lengths, int64_t group, int64_t seed) {
    const mel::Waveform wave = waveform_of(waveform, lengths);
    const mel::Spec& spec = plan.spec;
    const int64_t n_filters = filters ? filters->size(1) : 0, cepstra = dct ? dct->size(1) : 0;
    const int64_t frames = spec.framing.count(wave.length), features = mel::feature_count(spec, n_filters, cepstra);
    const auto out_type = wave.type == ScalarType::int16 ? at::kFloat : waveform.scalar_type();
    const auto options = waveform.options();
    Tensor out = spec.time_major ? at::empty({wave.rows, frames, features}, options.dtype(out_type))
                                 : at::empty({wave.rows, features, frames}, options.dtype(out_type));
    Tensor counts = at::empty({wave.rows}, options.dtype(at::kLong));
    const auto compute = wave.type == ScalarType::float64 ? at::kDouble : at::kFloat;
    Tensor maxima = at::empty({spec.has_top_db ? group_count(wave.rows, group) : 0}, options.dtype(compute));
    const auto run = [&](auto* kind) {
        using T = std::remove_pointer_t<decltype(kind)>;
        mel::forward_cpu<T>(plan, wave, tables_of<T>(plan, window, filters, dct), group, uint32_t(seed), out.data_ptr(),
                            scalar_type(out), counts.data_ptr<int64_t>(), maxima.data_ptr<T>());
    };
    if (compute == at::kDouble) run(static_cast<double*>(nullptr));
    else run(static_cast<float*>(nullptr));
    return {out, counts, maxima};
}

std::tuple<Tensor, Tensor> mel_backward(const mel::Plan& plan, const Tensor& grad, const Tensor& waveform,
                                        const Tensor& window, const optional<Tensor>& filters,
                                        const optional<Tensor>& dct, const optional<Tensor>& lengths,
                                        const Tensor& maxima, int64_t group, int64_t seed, bool need_waveform,
                                        bool need_filters) {
    const mel::Waveform wave = waveform_of(waveform, lengths);
    const bool is_double = wave.type == ScalarType::float64;
    const auto compute = is_double ? at::kDouble : at::kFloat;
    const Tensor g = grad.to(compute).contiguous();
    const auto options = waveform.options().dtype(compute);
    Tensor grad_wave = at::empty({need_waveform ? wave.rows : 0, wave.length}, options);
    Tensor grad_filters = need_filters && filters ? at::empty(filters->sizes(), options) : at::empty({0}, options);
    const auto run = [&](auto* kind) {
        using T = std::remove_pointer_t<decltype(kind)>;
        TORCH_CHECK_VALUE(maxima.scalar_type() == compute && maxima.is_contiguous() &&
                              maxima.numel() == (plan.spec.has_top_db ? group_count(wave.rows, group) : 0),
                          "maxima must be what the forward pass returned");
        mel::backward_cpu<T>(plan, wave, tables_of<T>(plan, window, filters, dct), group, uint32_t(seed),
                             maxima.const_data_ptr<T>(), g.const_data_ptr<T>(),
                             need_waveform ? grad_wave.data_ptr<T>() : nullptr,
                             grad_filters.numel() ? grad_filters.data_ptr<T>() : nullptr);
    };
    if (is_double) run(static_cast<double*>(nullptr));
    else run(static_cast<float*>(nullptr));
    return {grad_wave.to(waveform.scalar_type()), grad_filters};
}

template <class E>
E choice(const py::kwargs& k, const char* name) {
    return static_cast<E>(k[name].cast<int>());
}

std::shared_ptr<mel::Plan> make_plan(const py::kwargs& k) {
    mel::Spec s;
    const auto integer = [&](const char* name) { return k[name].cast<int64_t>(); };
    const auto real = [&](const char* name) { return k[name].cast<double>(); };
    const auto flag = [&](const char* name) { return k[name].cast<bool>(); };
    s.n_fft = integer("n_fft");
    s.framing = {integer("window"),
                 integer("hop"),
                 integer("first"),
                 integer("count_offset"),
                 integer("min_length"),
                 integer("pad"),
                 choice<PadMode>(k, "pad_mode")};
    s.input_scale = real("input_scale");
    s.preemphasis = real("preemphasis");
    s.preemphasis_of_signal = flag("preemphasis_of_signal");
    s.dither = real("dither");
    s.energy_floor = real("energy_floor");
    s.remove_dc = flag("remove_dc");
    s.raw_energy = flag("raw_energy");
    s.energy = choice<Energy>(k, "energy");
    s.power = real("power");
    s.power_offset = real("power_offset");
    s.normalized = int(integer("normalized"));
    s.log = flag("log");
    s.log_floor = real("log_floor");
    s.log_offset = real("log_offset");
    s.log_scale = real("log_scale");
    s.log_shift = real("log_shift");
    s.has_top_db = flag("has_top_db");
    s.top_db = real("top_db");
    s.output_offset = real("output_offset");
    s.output_scale = real("output_scale");
    s.fill = real("fill");
    s.time_major = flag("time_major");
    TORCH_CHECK_VALUE(s.n_fft >= 1 && s.framing.window >= 1 && s.framing.window <= s.n_fft && s.framing.hop >= 1,
                      "n_fft, window and hop must be positive, window at most n_fft");
    return std::make_shared<mel::Plan>(s);
}

}  // namespace

void bind_mel(py::module_& m) {
    py::class_<mel::Plan, std::shared_ptr<mel::Plan>>(m, "MelPlan")
        .def(py::init(&make_plan))
        .def("prepare", [](mel::Plan& plan, const Tensor& filters) {
            const float* const dense = table<float>("filters", filters, {plan.spec.n_fft / 2 + 1, filters.size(-1)});
            plan.prepare(dense, filters.size(-1));
        });
    m.def("mel_forward", &mel_forward, py::call_guard<py::gil_scoped_release>());
    m.def("mel_backward", &mel_backward, py::call_guard<py::gil_scoped_release>());
}

}  // namespace mmfast
