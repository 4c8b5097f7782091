// Launches of compiled kernels made again, from one call: what mmfast/fusion/recording.py has written down, and a node of
// autograd's graph that needs no Python in the backward pass. The driver is asked for by name at run time, so that nothing here
// needs CUDA to be built.
#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_scaled_dot_product_flash_attention.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/SmallVector.h>
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <tuple>
#include <unordered_map>

#include "common/plain.h"
#include "fusion/fusion_python.h"

namespace py = pybind11;

namespace mmfast {
namespace {

using at::Tensor;
using std::vector;

// ---- The driver

struct Driver {
    using Launch = int (*)(void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned shared,
                           void* stream, void** arguments, void** extra);
    Launch launch;
    int (*get_context)(void**);
    int (*set_context)(void*);

    Driver() {
        void* library = dlopen("libcuda.so.1", RTLD_LAZY);
        const auto find = [library](const char* name) { return library ? dlsym(library, name) : nullptr; };
        launch = reinterpret_cast<Launch>(find("cuLaunchKernel"));
        get_context = reinterpret_cast<int (*)(void**)>(find("cuCtxGetCurrent"));
        set_context = reinterpret_cast<int (*)(void*)>(find("cuCtxSetCurrent"));
        if (!launch || !get_context || !set_context) throw std::runtime_error("libcuda.so.1 cannot be loaded");
    }
    static const Driver& get() {
        static const Driver driver;
        return driver;
    }
};

// ---- What was recorded

struct Room {
    vector<int64_t> sizes, strides;
    at::ScalarType type;

    // at::empty_strided on the current device, without the dispatcher.
    Tensor make(const at::Device& device) const {
        const at::Context& context = at::globalContext();
        if (!(device.is_cpu() || device.is_cuda()) ||
            (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory()))
            return at::empty_strided(sizes, strides, at::TensorOptions().device(device).dtype(type));
        c10::Allocator* const allocator =
            device.is_cpu() ? c10::GetCPUAllocator() : at::detail::getCUDAHooks().getCUDADeviceAllocator();
        const auto kind = device.is_cpu() ? c10::DispatchKey::CPU : c10::DispatchKey::CUDA;
        return Tensor(at::detail::empty_strided_generic(sizes, strides, allocator, c10::DispatchKeySet(kind), type));
    }
};

struct Launch {
    uint64_t function;
    std::array<unsigned, 3> grid;
    unsigned threads, shared;
    vector<uint64_t> arguments;  // each in the first bytes of its word
    vector<std::pair<size_t, size_t>>
        pointers;  // of these the ones that are addresses, and of what: inputs, then rooms
};

class Recording {
public:
    Recording(vector<std::tuple<vector<int64_t>, vector<int64_t>, at::ScalarType>> rooms, at::Device device)
        : device_(device) {
        for (auto& [sizes, strides, type] : rooms) rooms_.push_back({std::move(sizes), std::move(strides), type});
        Driver::get().get_context(&context_);
    }
    void add(uint64_t function, std::array<unsigned, 3> grid, unsigned threads, unsigned shared,
             vector<uint64_t> arguments, vector<std::pair<size_t, size_t>> pointers) {
        launches_.push_back({function, grid, threads, shared, std::move(arguments), std::move(pointers)});
    }
    // The memory that was made, for inputs at these addresses.
    vector<Tensor> again(at::ArrayRef<uint64_t> inputs, uint64_t stream) const {
        const c10::OptionalDeviceGuard guard(device_.is_cpu() ? std::nullopt : std::optional(device_));
        c10::SmallVector<uint64_t, 24> where(inputs.begin(), inputs.end());
        vector<Tensor> made;
        made.reserve(rooms_.size());
        for (const Room& room : rooms_) {
            made.push_back(room.make(device_));
            where.push_back(reinterpret_cast<uint64_t>(made.back().const_data_ptr()));
        }
        const Driver& driver = Driver::get();
        void* current = nullptr;
        driver.get_context(&current);
        if (!current) driver.set_context(context_);  // a thread of autograd that has not met the device yet
        c10::SmallVector<uint64_t, 96> arguments;
        c10::SmallVector<void*, 96> places;
        for (const Launch& launch : launches_) {
            arguments.assign(launch.arguments.begin(), launch.arguments.end());
            for (const auto& [i, of] : launch.pointers) arguments[i] = where[of];
            places.clear();
            for (uint64_t& argument : arguments) places.push_back(&argument);
            const int error = driver.launch(reinterpret_cast<void*>(launch.function), launch.grid[0], launch.grid[1],
                                            launch.grid[2], launch.threads, 1, 1, launch.shared,
                                            reinterpret_cast<void*>(stream), places.data(), nullptr);
            if (error)
                throw std::runtime_error("a kernel could not be launched: CUDA's error " + std::to_string(error));
        }
        return made;
    }

private:
    vector<Room> rooms_;
    vector<Launch> launches_;
    at::Device device_;
    void* context_ = nullptr;
};

// ---- What of tensors a launch depends on

struct Description {
    c10::SmallVector<int64_t, 128> what;
    c10::SmallVector<uint64_t, 16> addresses;

    std::string_view key() const { return {reinterpret_cast<const char*>(what.data()), what.size() * sizeof(int64_t)}; }
    // Adds dtypes, sizes, strides, alignment, whether autograd follows them, and which lie at the same address. False where one of
    // them is not plain memory of the device.
    bool add(at::TensorList tensors, int64_t device) {
        for (const Tensor& t : tensors) {
            if (!holds_its_values(t) || (t.device().is_cpu() ? -1 : t.get_device()) != device) return false;
            const auto address = reinterpret_cast<uint64_t>(t.const_data_ptr());
            const int64_t same = std::find(addresses.begin(), addresses.end(), address) - addresses.begin();
            addresses.push_back(address);
            what.push_back(int64_t(t.scalar_type()) << 32 | int64_t(address % 16) << 24 | t.dim() << 16 | same << 1 |
                           int64_t(t.requires_grad()));
            what.append(t.sizes().begin(), t.sizes().end());
            what.append(t.strides().begin(), t.strides().end());
        }
        return true;
    }
};

// Of maps whose keys are those of descriptions.
struct Hash {
    using is_transparent = void;
    size_t operator()(std::string_view key) const { return std::hash<std::string_view>()(key); }
};
template <class T>
using ByKey = std::unordered_map<std::string, T, Hash, std::equal_to<>>;

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
