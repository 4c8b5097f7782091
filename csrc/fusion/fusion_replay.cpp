// Launches of compiled kernels made again, from one call: what mmfast/fusion/recording.py has written down, and a node of
// autograd's graph that needs no Python in the backward pass. The driver is asked for by name at run time, so that nothing here
// needs CUDA to be built.
#include <ATen/ops/empty_strided.h>
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
        : options_(at::TensorOptions().device(device)) {
        for (auto& [sizes, strides, type] : rooms) rooms_.push_back({std::move(sizes), std::move(strides), type});
        Driver::get().get_context(&context_);
    }
    void add(uint64_t function, std::array<unsigned, 3> grid, unsigned threads, unsigned shared,
             vector<uint64_t> arguments, vector<std::pair<size_t, size_t>> pointers) {
        launches_.push_back({function, grid, threads, shared, std::move(arguments), std::move(pointers)});
    }
    // The memory that was made, for inputs at these addresses.
    vector<Tensor> again(vector<uint64_t> where, uint64_t stream) const {
        vector<Tensor> made;
        made.reserve(rooms_.size());
        for (const Room& room : rooms_) {
            made.push_back(at::empty_strided(room.sizes, room.strides, options_.dtype(room.type)));
            where.push_back(reinterpret_cast<uint64_t>(made.back().const_data_ptr()));
        }
        const Driver& driver = Driver::get();
        void* current = nullptr;
        driver.get_context(&current);
        if (!current) driver.set_context(context_);  // a thread of autograd that has not met the device yet
        vector<uint64_t> arguments;
        vector<void*> places;
        for (const Launch& launch : launches_) {
            arguments = launch.arguments;
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
    at::TensorOptions options_;
    void* context_ = nullptr;
};

// ---- What of tensors a launch depends on

struct Description {
    vector<int64_t> what;
    vector<uint64_t> addresses;

    std::string key() const { return {reinterpret_cast<const char*>(what.data()), what.size() * sizeof(int64_t)}; }
};

// Dtypes, sizes, strides, alignment, whether autograd follows them, and which lie at the same address. Nothing where one of
// them is not plain memory of the device.
std::optional<Description> describe(const vector<Tensor>& tensors, int64_t device) {
    Description result;
    auto& [what, at] = result;
    what.reserve(10 * tensors.size());
    for (const Tensor& t : tensors) {
        if (!holds_its_values(t) || (t.device().is_cpu() ? -1 : t.get_device()) != device) return std::nullopt;
        const auto address = reinterpret_cast<uint64_t>(t.const_data_ptr());
        const int64_t same = std::find(at.begin(), at.end(), address) - at.begin();
        at.push_back(address);
        what.push_back(int64_t(t.scalar_type()) << 32 | int64_t(address % 16) << 24 | t.dim() << 16 | same << 1 |
                       int64_t(t.requires_grad()));
        what.insert(what.end(), t.sizes().begin(), t.sizes().end());
        what.insert(what.end(), t.strides().begin(), t.strides().end());
    }
    return result;
}

// ---- What Python passes

// Masks and biases in the four dimensions that kernels take, gates too; nothing for what is none of these.
std::optional<Tensor> in_four(Tensor t, bool gate, const Tensor& query) {
    if (t.dim() == 4) return t;
    if (gate && t.dim() == 1 && t.size(0) == query.size(1)) return t.view({1, -1, 1, 1});
    if (gate ? t.dim() != 0 : t.dim() != 2 && t.dim() != 3) return std::nullopt;
    while (t.dim() < 4) t = t.unsqueeze(0);
    return t;
}

// Of a query and sources: their description with what each source has, all tensors, and their addresses. None for what others
// have to look at. As `_parts` in mmfast/fusion/triton_direct.py.
py::object call_of(py::handle source_class, py::handle query_object, py::handle sources, int64_t device) {
    if (!is_plain_type(query_object.ptr())) return py::none();
    const Tensor query = THPVariable_Unpack(query_object.ptr());
    if (query.is_nested() || query.dim() != 4) return py::none();
    vector<Tensor> tensors{query};
    vector<int64_t> has;
    const auto is_source = [&](PyObject* x) {
        return Py_TYPE(x) == reinterpret_cast<PyTypeObject*>(source_class.ptr());
    };
    PyObject* given = sources.ptr();
    const bool one = is_source(given) || (PyTuple_CheckExact(given) && is_pair(given));
    if (!one && !is_sequence(given)) return py::none();
    for (Py_ssize_t i = 0; i < (one ? 1 : PySequence_Fast_GET_SIZE(given)); ++i) {
        PyObject* source = one ? given : PySequence_Fast_GET_ITEM(given, i);
        const bool whole = is_source(source);
        if (!whole && !is_pair(source)) return py::none();
        int64_t bits = 0;
        double number = 0;
        for (int place = 0; place < (whole ? 6 : 2); ++place) {  // key, value, mask, lengths, bias, gate
            PyObject* part = PySequence_Fast_GET_ITEM(source, place);
            if (part == Py_None) continue;
            const bool gate = place == 5;
            if (is_plain_type(part)) {
                Tensor t = THPVariable_Unpack(part);
                if (t.is_nested()) return py::none();
                std::optional<Tensor> four = t;  // lengths have one dimension, keys and values all of them
                if (place < 2 && t.dim() != 4) four = std::nullopt;
                else if (place == 2 || place > 3) four = in_four(t, gate, query);
                if (!four) return py::none();
                tensors.push_back(*four);
                bits |= 1 << place;
            } else if (gate && (PyFloat_CheckExact(part) || PyLong_CheckExact(part))) {
                number = PyFloat_AsDouble(part);
                if (PyErr_Occurred()) throw py::error_already_set();
                bits |= 1 << 6;
            } else {
                return py::none();
            }
        }
        has.push_back(bits);
        int64_t same_bits;
        std::memcpy(&same_bits, &number, sizeof number);
        has.push_back(same_bits);
    }
    const auto found = describe(tensors, device);
    if (!found) return py::none();
    const std::string key = std::string(reinterpret_cast<const char*>(has.data()), has.size() * sizeof(int64_t));
    return py::make_tuple(py::bytes(key + found->key()), tensors, found->addresses);
}

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
        entries_[key] = {std::move(recording), std::move(room_of)};
    }
    std::optional<Entry> find(const std::string& key) const {
        const std::lock_guard lock(mutex_);
        const auto found = entries_.find(key);
        return found == entries_.end() ? std::nullopt : std::optional<Entry>(found->second);
    }
    void clear() {
        const std::lock_guard lock(mutex_);
        entries_.clear();
    }

    int64_t number = -1;

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
    std::unordered_map<std::string, Entry> entries_;
};

struct Replayed : torch::autograd::Function<Replayed> {
    static vector<Tensor> forward(torch::autograd::AutogradContext* ctx, at::TensorList tensors,
                                  const Recording& forward, const vector<uint64_t>& addresses,
                                  const std::array<size_t, 2>& result, int64_t number, const std::string& plan,
                                  uint64_t stream, bool keeps_out) {
        const vector<Tensor> made = forward.again(addresses, stream);
        const Tensor &out = made[result[0]], &lse = made[result[1]];
        vector<Tensor> saved = tensors.vec();
        saved.push_back(lse);
        if (keeps_out) saved.push_back(out);
        ctx->save_for_backward(std::move(saved));
        ctx->set_materialize_grads(false);
        ctx->saved_data["number"] = number;
        ctx->saved_data["plan"] = plan;
        ctx->saved_data["stream"] = static_cast<int64_t>(stream);
        ctx->saved_data["keeps_out"] = keeps_out;
        return {out, lse};
    }

    static vector<Tensor> backward(torch::autograd::AutogradContext* ctx, const vector<Tensor>& grads) {
        const vector<Tensor> saved = ctx->get_saved_variables();
        const bool keeps_out = ctx->saved_data["keeps_out"].toBool();
        const int64_t number = ctx->saved_data["number"].toInt();
        const size_t count = saved.size() - 1 - keeps_out;
        vector<Tensor> result(count + 7);  // forward had seven arguments more
        if (!grads[0].defined() && !grads[1].defined()) return result;
        // The same order as in mmfast/fusion/triton_direct.py.
        vector<Tensor> given(saved.begin(), saved.begin() + count + 1);
        for (const Tensor& grad : grads)
            if (grad.defined()) given.push_back(grad);
        if (keeps_out) given.push_back(saved.back());
        const auto is_dual = [](const Tensor& t) { return t.defined() && t._fw_grad(0).defined(); };
        if (grads[0].defined() && nobody_looks_on() && !c10::GradMode::is_enabled() &&
            std::none_of(grads.begin(), grads.end(), is_dual)) {
            const auto found = describe(given, saved[0].get_device());
            const auto backward = found ? Backward::of(number) : nullptr;
            const auto entry = backward ? backward->find(found->key()) : std::nullopt;
            if (entry) {
                const auto stream = static_cast<uint64_t>(ctx->saved_data["stream"].toInt());
                const vector<Tensor> made = entry->recording->again(found->addresses, stream);
                for (size_t i = 0; i < count; ++i) {
                    if (entry->room_of[i] < 0 || !ctx->needs_input_grad(i)) continue;
                    // Summed over what the input was broadcast along.
                    const Tensor& full = made[entry->room_of[i]];
                    const Tensor its = full.sizes() == saved[i].sizes() ? full : full.sum_to_size(saved[i].sizes());
                    result[i] = its.to(saved[i].scalar_type());
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

}  // namespace

void bind_fusion_replay(py::module_& m) {
    py::class_<Recording, std::shared_ptr<Recording>>(m, "Recording")
        .def(py::init<vector<std::tuple<vector<int64_t>, vector<int64_t>, at::ScalarType>>, at::Device>())
        .def("add", &Recording::add)
        .def("again", &Recording::again);
    py::class_<Backward, std::shared_ptr<Backward>>(m, "RecordedBackward")
        .def(py::init(&Backward::make))
        .def_readonly("number", &Backward::number)
        .def("clear", &Backward::clear)
        .def("keep", [](Backward& self, const py::bytes& key, std::shared_ptr<Recording> recording,
                        vector<int64_t> room_of) { self.keep(key, std::move(recording), std::move(room_of)); });
    m.def("fusion_described", [](const vector<Tensor>& tensors, int64_t device) -> py::object {
        const auto found = describe(tensors, device);
        if (!found) return py::none();
        return py::make_tuple(py::bytes(found->key()), found->addresses);
    });
    m.def("fusion_call_of", &call_of);
    m.def("fusion_replayed", [](const vector<Tensor>& tensors, const Recording& forward,
                                const vector<uint64_t>& addresses, const std::array<size_t, 2>& result,
                                const Backward& backward, const std::string& plan, uint64_t stream, bool keeps_out) {
        return Replayed::apply(at::TensorList(tensors), forward, addresses, result, backward.number, plan, stream,
                               keeps_out);
    });
}

}  // namespace mmfast
