#include <torch/csrc/utils/pybind.h>

namespace mmfast {

void bind_mel(pybind11::module_& /*m*/) {}

}  // namespace mmfast
