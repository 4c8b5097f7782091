// Argument checks, allocation and the device switch of the mel slice.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <functional>
#include <iterator>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "common/plain.h"
#include "mel/mel.h"

#if defined(MMFAST_WITH_CUDA)
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "mel/mel_cuda.h"
#endif

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

#if defined(MMFAST_WITH_CUDA)
// Rows and samples of a waveform.
bool fits_gpu(at::IntArrayRef sizes) {
    return sizes.back() < (int64_t(1) << 30) && (sizes.size() < 2 || sizes[0] < (int64_t(1) << 31));
}
#endif

mel::Waveform waveform_of(const Tensor& x, const optional<Tensor>& lengths) {
    TORCH_CHECK_VALUE(x.dim() == 2, "waveform must be (B, T), got ", x.sizes());
#if defined(MMFAST_WITH_CUDA)
    TORCH_CHECK_VALUE(x.device().is_cpu() || x.device().is_cuda(), "waveform has no kernel for ", x.device());
    TORCH_CHECK_VALUE(x.device().is_cpu() || fits_gpu(x.sizes()),
                      "waveform on a GPU must have fewer than 2**30 samples in fewer than 2**31 rows");
#else
    TORCH_CHECK_VALUE(x.device().is_cpu(), "waveform must be on the CPU, got ", x.device());
#endif
    if (lengths) {
        TORCH_CHECK_VALUE(lengths->dim() == 1 && lengths->size(0) == x.size(0) && lengths->scalar_type() == at::kLong &&
                              lengths->is_contiguous() && lengths->device() == x.device(),
                          "lengths must be a contiguous int64 tensor of ", x.size(0), " elements on ", x.device());
    }
    return {x.const_data_ptr(),
            scalar_type(x),
            x.size(0),
            x.size(1),
            x.stride(0),
            x.stride(1),
            lengths ? lengths->const_data_ptr<int64_t>() : nullptr};
}

// `t` must be a contiguous tensor of type T on the device; null for none.
template <class T>
const T* table(const char* name, const optional<Tensor>& t, at::IntArrayRef shape, at::Device device) {
    if (!t) return nullptr;
    TORCH_CHECK_VALUE(t->sizes() == shape && t->is_contiguous() && t->device() == device &&
                          t->scalar_type() == c10::CppTypeToScalarType<T>::value,
                      name, " must be a contiguous tensor on ", device, " of shape ", shape, " and type ",
                      c10::CppTypeToScalarType<T>::value);
    return t->const_data_ptr<T>();
}

template <class T>
mel::Tables<T> tables_of(const mel::Plan& plan, const Tensor& window, const optional<Tensor>& filters,
                         const optional<Tensor>& dct, at::Device device) {
    const int64_t bins = plan.spec.n_fft / 2 + 1;
    const int64_t n_filters = filters && filters->dim() == 2 ? filters->size(1) : 0;
    const int64_t cepstra = dct && dct->dim() == 2 ? dct->size(1) : 0;
    // The kernels there count a tile's values in 32 bits.
    TORCH_CHECK_VALUE(device.is_cpu() || (plan.spec.n_fft <= (1 << 24) && bins * n_filters < (int64_t(1) << 30)),
                      "on a GPU n_fft must be at most 2**24 and filters have fewer than 2**30 elements");
    return {table<T>("window", window, {plan.spec.framing.window}, device),
            table<T>("filters", filters, {bins, n_filters}, device), n_filters,
            table<T>("dct", dct, {n_filters ? n_filters : bins, cepstra}, device), cepstra};
}

// Maxima of a call.
int64_t groups_of(const mel::Plan& plan, int64_t rows, int64_t group) {
    if (!plan.spec.has_top_db) return 0;
    return group > 0 ? (rows + group - 1) / group : rows > 0;
}

void check_maxima(const Tensor& maxima, at::ScalarType type, int64_t groups) {
    TORCH_CHECK_VALUE(maxima.scalar_type() == type && maxima.is_contiguous() && maxima.numel() == groups,
                      "maxima must be what the forward pass returned");
}

#if defined(MMFAST_WITH_CUDA)

// What prepare_cuda made of a window and filters, with the tensors themselves: as long as they are held and their version
// stands still, they are the same values.
struct PreparedTables {
    Tensor window, filters, bytes;
    const void *window_data, *filters_data;  // another storage may have been put under a tensor
    int64_t window_version, filters_version, stream;
};

struct PreparedCache {
    std::mutex mutex;
    std::vector<PreparedTables> entries;  // the latest last
};

// Scratch of a call. Once launched, the kernels may go on with it: it is given to others of the same stream only.
struct CallScratch {
    const Tensor& like;
    Tensor bytes{};
    void* operator()(int64_t n) {
        bytes = at::empty({n}, like.options().dtype(at::kByte));
        return bytes.data_ptr();
    }
};

bool capturing() {
    return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
}

// Made anew for every call where they may change unseen (inference tensors), are about to (a gradient is wanted), or have to
// outlive a cache (the capture of a graph). Kept by stream, so that no stream reads what another is still writing.
template <class T>
Tensor prepared(const mel::Plan& plan, const mel::Tables<T>& tables, const Tensor& window,
                const optional<Tensor>& filters, cudaStream_t stream) {
    const int64_t bytes = mel::prepared_bytes<T>(plan.spec, tables.n_filters);
    const Tensor f = filters ? *filters : window;
    const bool cached = bytes && !window.is_inference() && !f.is_inference() && !f.requires_grad() && !capturing();
    const auto make = [&] {
        Tensor made = at::empty({bytes}, window.options().dtype(at::kByte));
        if (bytes) mel::prepare_cuda<T>(plan.spec, tables, made.data_ptr(), stream);
        return made;
    };
    if (!cached) return make();
    constexpr size_t kKept = 8;
    constexpr int kPlace = -1;
    const auto object =
        plan.keep(kPlace, [] { return std::static_pointer_cast<void>(std::make_shared<PreparedCache>()); });
    auto& cache = *static_cast<PreparedCache*>(object.get());
    const int64_t id = reinterpret_cast<int64_t>(stream);
    const std::lock_guard<std::mutex> lock(cache.mutex);
    for (const PreparedTables& e : cache.entries) {
        if (e.stream == id && e.window.is_same(window) && e.filters.is_same(f) &&
            e.window_data == window.const_data_ptr() && e.filters_data == f.const_data_ptr() &&
            e.window_version == window._version() && e.filters_version == f._version())
            return e.bytes;
    }
    if (cache.entries.size() == kKept) cache.entries.erase(cache.entries.begin());
    cache.entries.push_back({window, f, make(), window.const_data_ptr(), f.const_data_ptr(), int64_t(window._version()),
                             int64_t(f._version()), id});
    return cache.entries.back().bytes;
}

#endif

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
    Tensor maxima = at::empty({groups_of(plan, wave.rows, group)}, options.dtype(compute));
    const auto run = [&](auto* kind) {
        using T = std::remove_pointer_t<decltype(kind)>;
        const auto tables = tables_of<T>(plan, window, filters, dct, waveform.device());
#if defined(MMFAST_WITH_CUDA)
        if (waveform.is_cuda()) {
            const c10::cuda::CUDAGuard guard(waveform.device());
            const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
            const int device = waveform.get_device();
            const Tensor ready = prepared<T>(plan, tables, window, filters, stream);
            CallScratch scratch{waveform};
            mel::forward_cuda<T>(plan, wave, tables, ready.data_ptr(), group, uint32_t(seed), out.data_ptr(),
                                 scalar_type(out), counts.data_ptr<int64_t>(), maxima.data_ptr<T>(), std::ref(scratch),
                                 device, stream);
            return;
        }
#endif
        mel::forward_cpu<T>(plan, wave, tables, group, uint32_t(seed), out.data_ptr(), scalar_type(out),
                            counts.data_ptr<int64_t>(), maxima.data_ptr<T>());
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
    const int64_t frames = plan.spec.framing.count(wave.length),
                  features = mel::feature_count(plan.spec, filters ? filters->size(1) : 0, dct ? dct->size(1) : 0);
    const std::array<int64_t, 3> shape{wave.rows, plan.spec.time_major ? frames : features,
                                       plan.spec.time_major ? features : frames};
    TORCH_CHECK_VALUE(grad.sizes() == at::IntArrayRef(shape) && grad.device() == waveform.device(), "grad must be ",
                      at::IntArrayRef(shape), " on ", waveform.device(), ", got ", grad.sizes(), " on ", grad.device());
    const Tensor g = grad.to(compute).contiguous();
    const auto options = waveform.options().dtype(compute);
    Tensor grad_wave = at::empty({need_waveform ? wave.rows : 0, wave.length}, options);
    Tensor grad_filters = need_filters && filters ? at::empty(filters->sizes(), options) : at::empty({0}, options);
    const auto run = [&](auto* kind) {
        using T = std::remove_pointer_t<decltype(kind)>;
        TORCH_CHECK_VALUE(maxima.device() == waveform.device(), "maxima must be on ", waveform.device());
        check_maxima(maxima, compute, groups_of(plan, wave.rows, group));
        const auto tables = tables_of<T>(plan, window, filters, dct, waveform.device());
        T* const to_wave = need_waveform ? grad_wave.data_ptr<T>() : nullptr;
        T* const to_filters = grad_filters.numel() ? grad_filters.data_ptr<T>() : nullptr;
#if defined(MMFAST_WITH_CUDA)
        if (waveform.is_cuda()) {
            const c10::cuda::CUDAGuard guard(waveform.device());
            const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
            const int device = waveform.get_device();
            const Tensor ready = prepared<T>(plan, tables, window, filters, stream);
            CallScratch scratch{waveform};
            mel::backward_cuda<T>(plan, wave, tables, ready.data_ptr(), group, uint32_t(seed),
                                  maxima.const_data_ptr<T>(), g.const_data_ptr<T>(), to_wave, to_filters,
                                  std::ref(scratch), device, stream);
            return;
        }
#endif
        mel::backward_cpu<T>(plan, wave, tables, group, uint32_t(seed), maxima.const_data_ptr<T>(),
                             g.const_data_ptr<T>(), to_wave, to_filters);
    };
    if (is_double) run(static_cast<double*>(nullptr));
    else run(static_cast<float*>(nullptr));
    return {grad_wave.to(waveform.scalar_type()), grad_filters};
}

// ---- The short way ---------------------------------------------------------------------------------------------------

// A front end with its own tables, in float32, on a device. Its text is that of the configuration.
struct Direct {
    Direct(std::shared_ptr<mel::Plan> plan_, Tensor window_, optional<Tensor> filters_, optional<Tensor> dct_,
           bool by_item_, std::string key_)
        : plan(std::move(plan_)), window(std::move(window_)), filters(std::move(filters_)), dct(std::move(dct_)),
          by_item(by_item_), key(std::move(key_)), device(window.device()),
          tables(tables_of<float>(*plan, window, filters, dct, device)) {}

    const std::shared_ptr<mel::Plan> plan;
    const Tensor window;
    const optional<Tensor> filters, dct;
    const bool by_item;  // a maximum for each row, not for all
    const c10::IValue key;
    const at::Device device;
    const mel::Tables<float> tables;

    // Makes what the kernels of a GPU read of the tables; false while a graph is captured that would have to make it.
    bool prepare() const {
#if defined(MMFAST_WITH_CUDA)
        if (device.is_cpu() || ready_.load(std::memory_order_acquire)) return true;
        if (capturing()) return false;
        const std::lock_guard<std::mutex> lock(mutex_);
        if (ready_.load(std::memory_order_relaxed)) return true;
        prepared_ = mel::keep_prepared<float>(plan->spec, tables, c10::cuda::getCurrentCUDAStream());
        ready_.store(true, std::memory_order_release);
#endif
        return true;
    }
    const void* prepared() const { return prepared_.get(); }

private:
    mutable std::mutex mutex_;
    mutable std::atomic<bool> ready_{false};
    mutable std::shared_ptr<void> prepared_;
};

using DirectPtr = std::shared_ptr<const Direct>;

// Those there are. A node of autograd keeps the text, which `torch._dynamo.compiled_autograd` can write down, and asks here.
class Directs {
public:
    void add(const DirectPtr& direct) {
        const std::lock_guard<std::mutex> lock(mutex_);
        for (auto each = all_.begin(); each != all_.end();) {
            std::erase_if(each->second, [](const auto& one) { return one.expired(); });
            each = each->second.empty() ? all_.erase(each) : std::next(each);
        }
        all_[direct->key.toStringRef()].push_back(direct);
    }
    // None if it is gone since.
    DirectPtr find(const std::string& key, at::Device device) {
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto found = all_.find(key);
        if (found == all_.end()) return nullptr;
        for (const auto& each : found->second) {
            DirectPtr direct = each.lock();
            if (direct && direct->device == device) return direct;
        }
        return nullptr;
    }

private:
    std::mutex mutex_;
    std::unordered_map<std::string, std::vector<std::weak_ptr<const Direct>>> all_;
};

Directs& directs() {
    static Directs all;
    return all;
}

// (T,) or (B, T) samples, of which `lengths`, if defined, are valid.
mel::Waveform samples_of(const Tensor& x, const Tensor& lengths) {
    const int64_t dim = x.dim();
    return {x.const_data_ptr(),
            scalar_type(x),
            dim == 1 ? 1 : x.size(0),
            x.size(dim - 1),
            dim == 1 ? 0 : x.stride(0),
            x.stride(dim - 1),
            lengths.defined() ? lengths.const_data_ptr<int64_t>() : nullptr};
}

std::array<int64_t, 3> shape_of(const Direct& direct, const mel::Waveform& wave) {
    const mel::Spec& spec = direct.plan->spec;
    const int64_t frames = spec.framing.count(wave.length);
    const int64_t features = mel::feature_count(spec, direct.tables.n_filters, direct.tables.cepstra);
    if (spec.time_major) return {wave.rows, frames, features};
    return {wave.rows, features, frames};
}

// What is given of a waveform, and what is found besides the features: counts where lengths are given, maxima for a gradient.
struct Ragged {
    Tensor lengths{}, counts{}, maxima{};
};

Tensor features_of(const Direct& direct, const Tensor& waveform, Ragged& rows, bool keep_maxima) {
    const mel::Waveform wave = samples_of(waveform, rows.lengths);
    const auto shape = shape_of(direct, wave);
    const auto options = waveform.options();
    Tensor out = at::empty(at::IntArrayRef(shape).slice(waveform.dim() == 1),
                           wave.type == ScalarType::int16 ? options.dtype(at::kFloat) : options);
    const int64_t groups = groups_of(*direct.plan, wave.rows, direct.by_item);
    if (keep_maxima) rows.maxima = at::empty({groups}, options.dtype(at::kFloat));
    float* const maxima = keep_maxima ? rows.maxima.data_ptr<float>() : nullptr;
    if (rows.lengths.defined()) rows.counts = at::empty(rows.lengths.sizes(), rows.lengths.options());
    int64_t* const counts = rows.lengths.defined() ? rows.counts.data_ptr<int64_t>() : nullptr;
#if defined(MMFAST_WITH_CUDA)
    if (direct.device.is_cuda()) {
        CallScratch scratch{waveform};
        mel::forward_cuda<float>(*direct.plan, wave, direct.tables, direct.prepared(), direct.by_item, 0,
                                 out.data_ptr(), scalar_type(out), counts, maxima, std::ref(scratch),
                                 direct.device.index(), c10::cuda::getCurrentCUDAStream());
        return out;
    }
#endif
    std::vector<int64_t> unseen_counts(counts ? 0 : wave.rows);
    std::vector<float> unseen(maxima ? 0 : groups);
    mel::forward_cpu<float>(*direct.plan, wave, direct.tables, direct.by_item, 0, out.data_ptr(), scalar_type(out),
                            counts ? counts : unseen_counts.data(), maxima ? maxima : unseen.data());
    return out;
}

// Whether (B,) lengths of (B, T) samples, or () of (T,).
bool are_lengths_of(const Tensor& lengths, const Tensor& waveform) {
    return lengths.scalar_type() == at::kLong && lengths.is_contiguous() &&
           lengths.sizes() == waveform.sizes().slice(0, waveform.dim() - 1);
}

// The gradient of the samples. What was saved may have been through hooks.
Tensor gradient_of(const Direct& direct, const Tensor& grad, const Tensor& waveform, const Tensor& maxima,
                   const Tensor& lengths) {
    TORCH_CHECK_VALUE(waveform.dim() == 1 || waveform.dim() == 2, "waveform must be (T,) or (B, T), got ",
                      waveform.sizes());
    TORCH_CHECK_VALUE(!lengths.defined() || are_lengths_of(lengths, waveform), "lengths do not fit the waveform");
    const mel::Waveform wave = samples_of(waveform, lengths);
    const auto shape = shape_of(direct, wave);
    const auto expected = at::IntArrayRef(shape).slice(waveform.dim() == 1);
    TORCH_CHECK_VALUE(grad.sizes() == expected, "grad must be ", expected, ", got ", grad.sizes());
    check_maxima(maxima, at::kFloat, groups_of(*direct.plan, wave.rows, direct.by_item));
    const Tensor g = grad.to(at::kFloat).contiguous();
    Tensor result = at::empty(waveform.sizes(), waveform.options().dtype(at::kFloat));
#if defined(MMFAST_WITH_CUDA)
    if (direct.device.is_cuda()) {
        CallScratch scratch{waveform};
        mel::backward_cuda<float>(*direct.plan, wave, direct.tables, direct.prepared(), direct.by_item, 0,
                                  maxima.const_data_ptr<float>(), g.const_data_ptr<float>(), result.data_ptr<float>(),
                                  nullptr, std::ref(scratch), direct.device.index(), c10::cuda::getCurrentCUDAStream());
        return result.to(waveform.scalar_type());
    }
#endif
    mel::backward_cpu<float>(*direct.plan, wave, direct.tables, direct.by_item, 0, maxima.const_data_ptr<float>(),
                             g.const_data_ptr<float>(), result.data_ptr<float>(), nullptr);
    return result.to(waveform.scalar_type());
}

// Features that autograd follows. What the kernels cannot do, a gradient that is differentiated again or a batch of them,
// mmfast.mel.op does. The counts leave by another way: an output without a gradient is more than compiled autograd takes.
struct Follow : torch::autograd::Function<Follow> {
    static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& waveform, const Direct& direct,
                          Ragged* rows) {
        Tensor out = features_of(direct, waveform, *rows, true);
        if (rows->lengths.defined()) ctx->save_for_backward({waveform, rows->maxima, rows->lengths});
        else ctx->save_for_backward({waveform, rows->maxima});
        ctx->set_materialize_grads(false);
        ctx->saved_data["config"] = direct.key;
        return out;
    }

    static std::vector<Tensor> backward(torch::autograd::AutogradContext* ctx, const std::vector<Tensor>& grads) {
        std::vector<Tensor> result(3);  // as many as forward had arguments
        const Tensor& grad = grads[0];
        if (!grad.defined()) return result;
        const std::string& key = ctx->saved_data["config"].toStringRef();
        const std::vector<Tensor> saved = ctx->get_saved_variables();
        const Tensor &waveform = saved[0], &maxima = saved[1], lengths = saved.size() > 2 ? saved[2] : Tensor();
        const at::Device device = waveform.device();
        const auto is_plain_there = [&](const Tensor& t) {
            return !t.defined() || (holds_its_values(t) && t.device() == device);
        };
        if (nobody_looks_on() && !c10::GradMode::is_enabled() && is_plain_there(grad) && is_plain_there(waveform) &&
            is_plain_there(maxima) && is_plain_there(lengths)) {
#if defined(MMFAST_WITH_CUDA)
            c10::cuda::OptionalCUDAGuard guard;
            if (device.is_cuda()) guard.set_device(device);
#endif
            const DirectPtr direct = directs().find(key, device);
            if (direct && direct->prepare()) {
                result[0] = gradient_of(*direct, grad, waveform, maxima, lengths);
                return result;
            }
        }
        const py::gil_scoped_acquire acquire;
        const py::object of_lengths = lengths.defined() ? py::cast(lengths) : py::none();
        result[0] = py::module_::import("mmfast.mel.op")
                        .attr("differentiate")(grad, waveform, maxima, key, of_lengths)
                        .cast<Tensor>();
        return result;
    }
};

// Whether each of the lengths, on the CPU, lies within the samples. Elsewhere nobody looks, and the kernels limit them.
bool lie_within(const Tensor& lengths, int64_t samples) {
    if (!lengths.is_cpu()) return true;
    const int64_t *const first = lengths.const_data_ptr<int64_t>(), *const end = first + lengths.numel();
    return std::all_of(first, end, [&](int64_t n) { return 0 <= n && n <= samples; });
}

// The features of (T,) or (B, T) samples, and with lengths the counts; nothing for anything else. Not where somebody has to
// see what is done.
std::vector<Tensor> mel_direct(const std::shared_ptr<Direct>& direct, const Tensor& waveform,
                               const optional<Tensor>& lengths) {
    const auto is_plain_there = [&](const Tensor& t) { return holds_its_values(t) && t.device() == direct->device; };
    if (!is_plain_there(waveform) || (lengths && !is_plain_there(*lengths)) || backend_is_asked_for()) return {};
    const py::gil_scoped_release unlocked;
    const auto type = waveform.scalar_type();
    const bool known = type == at::kFloat || type == at::kHalf || type == at::kBFloat16 || type == at::kShort;
    const int64_t dim = waveform.dim();
    if (!known || dim < 1 || dim > 2) return {};
    const int64_t samples = waveform.size(dim - 1);
    if (lengths ? !are_lengths_of(*lengths, waveform) || !lie_within(*lengths, samples)
                : samples < direct->plan->spec.framing.min_length)
        return {};
#if defined(MMFAST_WITH_CUDA)
    c10::cuda::OptionalCUDAGuard guard;
    if (direct->device.is_cuda()) {
        if (!fits_gpu(waveform.sizes())) return {};
        guard.set_device(direct->device);
    }
#endif
    if (!direct->prepare()) return {};
    Ragged rows{lengths.value_or(Tensor())};
    Tensor out =
        is_tracked(waveform) ? Follow::apply(waveform, *direct, &rows) : features_of(*direct, waveform, rows, false);
    if (!lengths) return {std::move(out)};
    return {std::move(out), std::move(rows.counts)};
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
            const float* const dense =
                table<float>("filters", filters, {plan.spec.n_fft / 2 + 1, filters.size(-1)}, at::kCPU);
            plan.prepare(dense, filters.size(-1));
        });
    py::class_<Direct, std::shared_ptr<Direct>>(m, "MelDirect")
        .def(py::init([](std::shared_ptr<mel::Plan> plan, Tensor window, optional<Tensor> filters, optional<Tensor> dct,
                         bool by_item, std::string key) {
            const auto direct = std::make_shared<Direct>(std::move(plan), std::move(window), std::move(filters),
                                                         std::move(dct), by_item, std::move(key));
            directs().add(direct);
            return direct;
        }));
    m.def("mel_direct", &mel_direct);
    m.def("mel_forward", &mel_forward, py::call_guard<py::gil_scoped_release>());
    m.def("mel_backward", &mel_backward, py::call_guard<py::gil_scoped_release>());
}

}  // namespace mmfast
