// Linear layers of float32 by oneDNN, where torch's own products are slow.
//
// Note: [float32 by oneDNN]
//   torch multiplies float32 by MKL, which on processors of AMD takes code for AVX2: 215 GFLOP/s on two cores of the fifth
//   generation of EPYC that can do 540, where oneDNN, which is in the same torch and asks for instructions, not for a maker, does
//   450 to 510, and for gradients of weights 330 to 360. A size that is new to it takes 0.75 ms more, once: of so many
//   multiply-adds MKL's time is half of that.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace mmfast {
namespace fusion {

constexpr int64_t kFewestFloatProducts = int64_t(1) << 25;

// Whether this processor is one for which oneDNN is the faster, and torch has it.
bool prefers_onednn();

// Whether the user lets torch have it.
bool may_ask_onednn();

// Each part of x weightᵀ + bias, with no node in autograd's graph.
std::vector<at::Tensor> project_float(const at::Tensor& x, const at::Tensor& weight,
                                      const std::optional<at::Tensor>& bias, at::IntArrayRef parts);

// Those that are wanted, by the gradients of the parts.
struct FloatGradients {
    at::Tensor x, weight, bias;
};
FloatGradients project_float_backward(const at::Tensor& x, const at::Tensor& weight,
                                      const std::vector<at::Tensor>& grads, at::IntArrayRef parts, bool need_x,
                                      bool need_weight, bool need_bias);

}  // namespace fusion
}  // namespace mmfast
