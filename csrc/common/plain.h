// Which tensors a kernel may be handed past the dispatcher. For files that may include torch.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/GradMode.h>

#include <cstdlib>

namespace mmfast {

// Whether memory holds the values: no gradient of a transform, batch, sign or conjugate still to be applied, no subclass that
// dispatches.
inline bool is_plain(const at::Tensor& t) {
    using c10::DispatchKey;
    constexpr c10::DispatchKeySet kOthers({DispatchKey::Python, DispatchKey::Batched, DispatchKey::FuncTorchBatched,
                                           DispatchKey::FuncTorchGradWrapper, DispatchKey::Functionalize,
                                           DispatchKey::Negative, DispatchKey::Conjugate, DispatchKey::ZeroTensor});
    return t.device().is_cpu() && t.layout() == at::kStrided && !t.is_nested() && !t.key_set().has_any(kOthers);
}

inline bool is_tracked(const at::Tensor& t) {
    return t.requires_grad() && c10::GradMode::is_enabled();
}

// With the lock of Python held, under which the environment changes.
inline bool backend_is_asked_for() {
    return std::getenv("MMFAST_BACKEND");
}

}  // namespace mmfast
