// mmfast._C: one bind function a slice, and what is known about the build.
#include <omp.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include <sstream>
#include <string>
#include <vector>

#include "common/isa.h"
#include "common/parallel.h"

namespace py = pybind11;

namespace mmfast {
void bind_fusion(py::module_& m);
void bind_mel(py::module_& m);
void bind_mmd(py::module_& m);
}  // namespace mmfast

namespace {

// Python finds this text in the file when loading it fails, so that the error can say which torch it was built for.
[[gnu::used]] constexpr char kBuiltFor[] = "mmfast._C built for torch " TORCH_VERSION ";";

std::vector<std::string> words(const std::string& text) {
    std::istringstream stream(text);
    std::vector<std::string> result;
    for (std::string word; stream >> word;) {
        result.push_back(word);
    }
    return result;
}

// Threads that a parallel loop really gets; 1 if the compiler ignored the OpenMP directives.
int openmp_team() {
    int team = 1;
#pragma omp parallel
    {
#pragma omp single
        team = omp_get_num_threads();
    }
    return team;
}

py::dict build_info() {
    py::dict info;
    info["mmfast"] = MMFAST_VERSION;
    info["torch"] = TORCH_VERSION;
    info["compiler"] = MMFAST_COMPILER;
    info["cxx"] = __cplusplus;
    info["build_type"] = MMFAST_BUILD_TYPE;
#if defined(_OPENMP)
    info["openmp"] = _OPENMP;
#else
    info["openmp"] = 0;
#endif
    info["openmp_threads"] = omp_get_max_threads();
    info["openmp_team"] = openmp_team();
    info["isa_built"] = words(mmfast::isa_built());
    info["isa_used"] = mmfast::isa_name(mmfast::best_isa());
#if defined(MMFAST_WITH_CUDA)
    info["cuda"] = true;
    info["cuda_version"] = MMFAST_CUDA_VERSION;
    info["cuda_archs"] = words(MMFAST_CUDA_ARCHS);
#else
    info["cuda"] = false;
    info["cuda_version"] = py::none();
    info["cuda_archs"] = std::vector<std::string>{};
#endif
    info["cuda_reason"] = MMFAST_CUDA_REASON;
    return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.attr("torch_version") = TORCH_VERSION;
#if defined(MMFAST_WITH_CUDA)
    m.attr("with_cuda") = true;
#else
    m.attr("with_cuda") = false;
#endif
    m.def("build_info", &build_info, "What the extension was built with, and what it uses on this machine.");
    mmfast::bind_fusion(m);
    mmfast::bind_mel(m);
    mmfast::bind_mmd(m);
}
