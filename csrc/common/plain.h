// Which tensors a kernel may be handed past the dispatcher. For files that may include torch.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <cstdlib>

namespace mmfast {

// Whether memory, of whatever device, holds the values: no gradient of a transform, batch, sign or conjugate still to be applied,
// no subclass that dispatches.
inline bool holds_its_values(const at::Tensor& t) {
    using c10::DispatchKey;
    constexpr c10::DispatchKeySet kOthers({DispatchKey::Python, DispatchKey::Batched, DispatchKey::FuncTorchBatched,
                                           DispatchKey::FuncTorchGradWrapper, DispatchKey::Functionalize,
                                           DispatchKey::Negative, DispatchKey::Conjugate, DispatchKey::ZeroTensor});
    return t.layout() == at::kStrided && !t.is_nested() && !t.key_set().has_any(kOthers);
}

inline bool is_plain(const at::Tensor& t) {
    return t.device().is_cpu() && holds_its_values(t);
}

inline bool is_tracked(const at::Tensor& t) {
    return t.requires_grad() && c10::GradMode::is_enabled();
}

// As `_backend.nobody_looks_on`: no function transform, mode of dispatch or trace that a kernel called by itself would escape.
inline bool nobody_looks_on() {
    const auto included = c10::impl::tls_is_dispatch_key_included;
    return c10::impl::TorchDispatchModeTLS::stack_len() == 0 &&
           !included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) && !included(c10::DispatchKey::Tracer);
}

// With the lock of Python held, under which the environment changes.
inline bool backend_is_asked_for() {
    return std::getenv("MMFAST_BACKEND");
}

}  // namespace mmfast
