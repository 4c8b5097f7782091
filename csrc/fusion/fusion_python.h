// What Python passes as tensors and sources. For files that include torch's and Python's headers.
#pragma once

#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

namespace mmfast {

inline bool is_plain_type(PyObject* x) {
    return Py_TYPE(x) == reinterpret_cast<PyTypeObject*>(THPVariableClass) ||
           Py_TYPE(x) == reinterpret_cast<PyTypeObject*>(ParameterClass);
}

inline bool is_sequence(PyObject* x) {
    return PyTuple_CheckExact(x) || PyList_CheckExact(x);
}

inline bool is_pair(PyObject* x) {
    return is_sequence(x) && PySequence_Fast_GET_SIZE(x) == 2 && is_plain_type(PySequence_Fast_GET_ITEM(x, 0)) &&
           is_plain_type(PySequence_Fast_GET_ITEM(x, 1));
}

// Whether it is a mmfast.fusion.Source. Under the lock of Python.
inline bool is_source(PyObject* x) {
    static PyObject* type = nullptr;
    if (!type)
        type = pybind11::object(pybind11::module_::import("mmfast.fusion._inputs").attr("Source")).release().ptr();
    return reinterpret_cast<PyObject*>(Py_TYPE(x)) == type;
}

// What `mmfast.cross_attention` is asked for on the GPU, without dropout, softcap and weights.
struct Question {
    PyObject *query, *sources, *fusion, *scale, *causal;
    bool lse;
    bool free;  // the caller leaves the backend to us
};

// The answer to a call that is known; null, without an error, for others.
PyObject* attend_known(const Question& question);

// As `mmfast.cross_attention` returns it: the output, and with ``lse`` the log-sum-exps, of which there is one for ``joint``.
PyObject* returned(at::Tensor out, const at::Tensor& lses, bool lse, bool joint, PyObject* weights = nullptr);

}  // namespace mmfast
