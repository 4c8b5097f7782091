// What Python passes as tensors and sources. For files that include torch's and Python's headers.
#pragma once

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

}  // namespace mmfast
