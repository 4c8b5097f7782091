// Calls that are known: planned once in Python, then made again from here, with launches that mmfast/fusion/recording.py has written
// down.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/SmallVector.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <tuple>

#include "fusion/fusion_python.h"
#include "fusion/fusion_recording.h"
#include "fusion/fusion_replay_autograd.h"

namespace py = pybind11;

namespace mmfast {
namespace {

// ---- What Python passes

// Masks and biases in the four dimensions that kernels take, gates too; nothing for what is none of these.
std::optional<Tensor> in_four(Tensor t, bool gate, const Tensor& query) {
    if (t.dim() == 4) return t;
    if (gate && t.dim() == 1 && t.size(0) == query.size(1)) return t.view({1, -1, 1, 1});
    if (gate ? t.dim() != 0 : t.dim() != 2 && t.dim() != 3) return std::nullopt;
    while (t.dim() < 4) t = t.unsqueeze(0);
    return t;
}

int64_t same_bits(double x) {
    int64_t bits;
    std::memcpy(&bits, &x, sizeof x);
    return bits;
}

using Tensors = c10::SmallVector<Tensor, 8>;

// Adds the tensors of a query and of sources, query first, and to ``has`` what each source has. False for what others have to look
// at. As `_parts` in mmfast/fusion/triton_direct.py.
bool add_parts(PyObject* query_object, PyObject* given, Tensors& tensors, Description& has) {
    if (!is_plain_type(query_object)) return false;
    const Tensor& query = THPVariable_Unpack(query_object);
    if (query.is_nested() || query.dim() != 4) return false;
    tensors.push_back(query);
    const bool one = is_source(given) || (PyTuple_CheckExact(given) && is_pair(given));
    if (!one && !is_sequence(given)) return false;
    for (Py_ssize_t i = 0; i < (one ? 1 : PySequence_Fast_GET_SIZE(given)); ++i) {
        PyObject* source = one ? given : PySequence_Fast_GET_ITEM(given, i);
        const bool whole = is_source(source);
        if (!whole && !is_pair(source)) return false;
        int64_t bits = 0;
        double number = 0;
        for (int place = 0; place < (whole ? 6 : 2); ++place) {  // key, value, mask, lengths, bias, gate
            PyObject* part = PySequence_Fast_GET_ITEM(source, place);
            if (part == Py_None) continue;
            const bool gate = place == 5;
            if (is_plain_type(part)) {
                const Tensor& t = THPVariable_Unpack(part);
                if (t.is_nested() || (place < 2 && t.dim() != 4)) return false;
                if (t.dim() == 4 || place == 3) {  // lengths have one dimension
                    tensors.push_back(t);
                } else {
                    std::optional<Tensor> four = in_four(t, gate, query);
                    if (!four) return false;
                    tensors.push_back(*std::move(four));
                }
                bits |= 1 << place;
            } else if (gate && (PyFloat_CheckExact(part) || PyLong_CheckExact(part))) {
                number = PyFloat_AsDouble(part);
                if (PyErr_Occurred()) throw py::error_already_set();
                bits |= 1 << 6;
            } else {
                return false;
            }
        }
        has.what.push_back(bits);
        has.what.push_back(same_bits(number));
    }
    return true;
}

// ---- Calls that are known

// What a call comes to that was planned in Python. Plans there own it, and it is found by all that calls depend on as long as they
// live. Under the lock of Python.
class Known {
public:
    explicit Known(std::string key) : key_(std::move(key)) {}
    Known(const Known&) = delete;
    virtual ~Known() {
        const auto found = all().find(key_);
        if (found != all().end() && found->second.expired()) all().erase(found);
    }
    // Nothing where somebody has to be told in Python.
    virtual std::optional<Attended> attend(at::TensorList tensors, at::ArrayRef<uint64_t> addresses) const = 0;

    static std::shared_ptr<Known> of(std::string_view key) {
        const auto found = all().find(key);
        return found == all().end() ? nullptr : found->second.lock();
    }
    static std::shared_ptr<Known> keep(std::shared_ptr<Known> known) {
        all()[known->key_] = known;
        return known;
    }

private:
    // Never destroyed: plans may outlive what ends with the program.
    static ByKey<std::weak_ptr<Known>>& all() {
        static auto& map = *new ByKey<std::weak_ptr<Known>>;
        return map;
    }

    std::string key_;
};

// `_Plan` in mmfast/fusion/triton_direct.py whose launches are recorded; with ``flash`` those that merge what it gives.
class Recorded : public Known {
public:
    Recorded(std::string key, std::shared_ptr<Recording> recording, const std::array<size_t, 2>& result, bool tracked,
             bool keeps_out, std::optional<Flash> flash, int64_t number, std::string plan, py::object runtime,
             vector<py::object> kernels)
        : Known(std::move(key)), recording_(std::move(recording)), result_(result), tracked_(tracked),
          keeps_out_(keeps_out), flash_(flash), number_(number), plan_(std::move(plan)), runtime_(std::move(runtime)),
          kernels_(std::move(kernels)) {}

    std::optional<Attended> attend(at::TensorList tensors, at::ArrayRef<uint64_t> addresses) const override {
        if (is_watched()) return std::nullopt;
        const c10::Device device = tensors[0].device();
        void* handle = nullptr;
        if (!device.is_cpu()) handle = c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
        const auto stream = reinterpret_cast<uint64_t>(handle);
        const Attended made = make(tensors, addresses, stream);
        if (!tracked_) return made;
        const vector<Tensor> followed = Replayed::apply(tensors, Made{made, number_, plan_, stream, keeps_out_});
        return Attended(followed[0], followed[1]);
    }

private:
    Attended make(at::TensorList tensors, at::ArrayRef<uint64_t> addresses, uint64_t stream) const {
        vector<Tensor> parts;
        c10::SmallVector<uint64_t, 16> places;
        if (flash_) {
            const at::AutoGradMode without(false);
            parts = flash_->forward(tensors);
            for (const Tensor& part : parts) places.push_back(reinterpret_cast<uint64_t>(part.const_data_ptr()));
        }
        const vector<Tensor> made = recording_->again(flash_ ? at::ArrayRef<uint64_t>(places) : addresses, stream);
        return {made[result_[0]], made[result_[1]]};
    }
    // As `is_watched` of mmfast/_launch.py.
    bool is_watched() const {
        static PyObject* const enter = PyUnicode_InternFromString("launch_enter_hook");
        static PyObject* const leave = PyUnicode_InternFromString("launch_exit_hook");
        static PyObject* const calls = PyUnicode_InternFromString("calls");
        static PyObject* const before = PyUnicode_InternFromString("pre_run_hooks");
        for (PyObject* const name : {enter, leave}) {
            py::object hook = runtime_.attr(py::handle(name));
            if (py::hasattr(hook, py::handle(calls))) hook = hook.attr(py::handle(calls));
            if (is_true(hook)) return true;
        }
        return std::any_of(kernels_.begin(), kernels_.end(),
                           [](const py::object& kernel) { return is_true(kernel.attr(py::handle(before))); });
    }
    static bool is_true(const py::object& x) {
        const int truth = PyObject_IsTrue(x.ptr());
        if (truth < 0) throw py::error_already_set();
        return truth;
    }

    std::shared_ptr<Recording> recording_;
    std::array<size_t, 2> result_;
    bool tracked_, keeps_out_;
    std::optional<Flash> flash_;
    int64_t number_;
    at::IValue plan_;
    py::object runtime_;
    vector<py::object> kernels_;
};

// `_Composed` in mmfast/fusion/triton_direct.py: scaled_dot_product_attention of each source, and the sum with its gates.
class Composed : public Known {
public:
    struct Part {
        bool grouped, wide;
        std::optional<double> number;
        bool gate;
    };

    Composed(std::string key, int64_t batch, double scale, bool causal,
             vector<std::tuple<bool, bool, py::object>> parts)
        : Known(std::move(key)), batch_(batch), scale_(scale), causal_(causal) {
        for (const auto& [grouped, wide, gate] : parts) {
            const bool tensor = py::isinstance<py::str>(gate);
            const bool number = !tensor && !gate.is_none();
            parts_.push_back(
                {grouped, wide, number ? std::optional<double>(gate.cast<double>()) : std::nullopt, tensor});
        }
    }

    std::optional<Attended> attend(at::TensorList tensors, at::ArrayRef<uint64_t>) const override {
        if (at::impl::torch_function_mode_enabled()) return std::nullopt;
        const py::gil_scoped_release release;
        const Tensor query = whole(tensors[0]);
        const auto type = query.scalar_type();
        auto next = tensors.begin() + 1;
        Tensor total;
        for (const Part& part : parts_) {
            const Tensor key = whole(*next++), value = whole(*next++);
            Tensor out = at::scaled_dot_product_attention(query, key, value, {}, 0.0, causal_, scale_, part.grouped);
            if (part.gate && part.wide && parts_.size() == 1) return Attended(Gated::apply(out, *next), Tensor());
            if (part.wide) out = in(at::kFloat, out);
            if (part.gate) out = out * in(out.scalar_type(), *next++);
            else if (part.number) out = out * *part.number;
            total = total.defined() ? total + out : out;
        }
        return Attended(in(type, total), Tensor());
    }

private:
    Tensor whole(const Tensor& t) const {
        return batch_ < 0 || t.size(0) == batch_ ? t : t.expand({batch_, -1, -1, -1});
    }

    int64_t batch_;
    double scale_;
    bool causal_;
    vector<Part> parts_;
};

// All that a call depends on, as `_called_by_python` in mmfast/fusion/triton_direct.py.
struct Call {
    Tensors tensors;
    Description description;
    bool joint = true;

    // False for what is not for `triton_direct` at all.
    bool describe(const Question& q) {
        if (!nobody_looks_on() || (q.free && backend_is_asked_for()) || !PyUnicode_Check(q.fusion)) return false;
        joint = PyUnicode_CompareWithASCIIString(q.fusion, "joint") == 0;
        if (!joint && PyUnicode_CompareWithASCIIString(q.fusion, "decoupled") != 0) return false;
        const bool scaled = q.scale != Py_None;
        if (scaled && !PyFloat_CheckExact(q.scale) && !PyLong_CheckExact(q.scale)) return false;
        const double number = scaled ? PyFloat_AsDouble(q.scale) : 0.0;
        const int causal = PyObject_IsTrue(q.causal);
        if (PyErr_Occurred()) throw py::error_already_set();
        auto& what = description.what;
        what.resize(3);
        if (!add_parts(q.query, q.sources, tensors, description)) return false;
        const c10::Device at = tensors[0].device();
        if (at::autocast::is_autocast_enabled(at.type())) return false;
        if (!at.is_cpu() && c10::impl::VirtualGuardImpl(at.type()).getDevice() != at) return false;
        const int64_t device = at.is_cpu() ? -1 : at.index();
        what[0] = joint | causal << 1 | q.lse << 2 | scaled << 3 | c10::GradMode::is_enabled() << 4;
        what[1] = device;
        what[2] = same_bits(number);
        return description.add(tensors, device);
    }
};

// For a call that is not known: the key of all that it depends on, its tensors, their addresses. None for what is not for
// `triton_direct` at all.
py::object called(py::handle query, py::handle sources, py::handle fusion, py::handle scale, py::handle causal,
                  bool lse, bool free) {
    Call call;
    if (!call.describe({query.ptr(), sources.ptr(), fusion.ptr(), scale.ptr(), causal.ptr(), lse, free}))
        return py::none();
    const auto& [what, addresses] = call.description;
    return py::make_tuple(py::bytes(std::string(call.description.key())), at::TensorList(call.tensors).vec(),
                          vector<uint64_t>(addresses.begin(), addresses.end()));
}

}  // namespace

PyObject* attend_known(const Question& question) {
    Call call;
    if (!call.describe(question)) return nullptr;
    const auto known = Known::of(call.description.key());
    if (!known) return nullptr;
    auto result = known->attend(call.tensors, call.description.addresses);
    return result ? returned(std::move(result->first), result->second, question.lse, call.joint) : nullptr;
}

void bind_fusion_replay(py::module_& m) {
    py::class_<Recording, std::shared_ptr<Recording>>(m, "Recording")
        .def(py::init<vector<std::tuple<vector<int64_t>, vector<int64_t>, at::ScalarType>>, at::Device>())
        .def("add", &Recording::add)
        .def("again", [](const Recording& self, const vector<uint64_t>& inputs, uint64_t stream) {
            return self.again(inputs, stream);
        });
    py::class_<Backward, std::shared_ptr<Backward>>(m, "RecordedBackward")
        .def(py::init(&Backward::make))
        .def_readonly("number", &Backward::number)
        .def("clear", &Backward::clear)
        .def("keep", [](Backward& self, const py::bytes& key, std::shared_ptr<Recording> recording,
                        vector<int64_t> room_of) { self.keep(key, std::move(recording), std::move(room_of)); });
    m.def("fusion_described", [](const vector<Tensor>& tensors, int64_t device) -> py::object {
        Description found;
        if (!found.add(tensors, device)) return py::none();
        return py::make_tuple(py::bytes(std::string(found.key())),
                              vector<uint64_t>(found.addresses.begin(), found.addresses.end()));
    });
    py::class_<Known, std::shared_ptr<Known>>(m, "KnownCall");
    m.def("fusion_keep_recorded",
          [](const py::bytes& key, std::shared_ptr<Recording> recording, const std::array<size_t, 2>& result,
             bool tracked, bool keeps_out, const std::optional<std::pair<double, bool>>& flash, Backward& backward,
             std::string plan, py::object runtime, vector<py::object> kernels) {
              std::optional<Flash> its;
              if (flash) backward.flash = its = Flash{flash->first, flash->second};
              return Known::keep(std::make_shared<Recorded>(key, std::move(recording), result, tracked, keeps_out, its,
                                                            backward.number, std::move(plan), std::move(runtime),
                                                            std::move(kernels)));
          });
    m.def("fusion_keep_composed", [](const py::bytes& key, int64_t batch, double scale, bool causal,
                                     vector<std::tuple<bool, bool, py::object>> parts) {
        return Known::keep(std::make_shared<Composed>(key, batch, scale, causal, std::move(parts)));
    });
    m.def("fusion_called", &called);
}

}  // namespace mmfast
