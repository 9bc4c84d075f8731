// How Python fills the structs of calls.h: each field is the keyword argument of its name. A new option of an op is a
// field there, a line here, and a value in ops/calls.py or in ops/cpu and ops/cuda.
#pragma once
#include <pybind11/pybind11.h>

#include <new>
#include <string>
#include <vector>

#include "../calls.h"

namespace actscale {

namespace py = pybind11;

template <class T> void assign(T& field, py::handle value) { field = value.cast<T>(); }
inline void assign(Type& field, py::handle value) { field = Type(value.cast<int>()); }

// A tensor, or an address.
template <class T> void assign(T*& field, py::handle value) {
    if (value.is_none()) return;
    static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
    PyObject* address =
        PyLong_Check(value.ptr()) ? value.inc_ref().ptr() : PyObject_CallMethodNoArgs(value.ptr(), data_ptr);
    if (address) field = static_cast<T*>(PyLong_AsVoidPtr(address));
    Py_XDECREF(address);
    if (PyErr_Occurred()) throw py::error_already_set();
}

// The first N strides of a tensor. An empty tensor stands for an output that is not wanted: it has one stride.
template <size_t N> void assign(int64_t (&field)[N], py::handle value) {
    if (!PyTuple_Check(value.ptr())) throw py::type_error("expected a tuple of strides");
    const size_t given = size_t(PyTuple_GET_SIZE(value.ptr()));
    if (given < N && given != 1) throw py::type_error("expected " + std::to_string(N) + " strides");
    for (size_t i = 0; i < N && i < given; i++)
        field[i] = py::handle(PyTuple_GET_ITEM(value.ptr(), Py_ssize_t(i))).cast<int64_t>();
}

template <class Call> struct Field {
    const char* name;
    bool required;
    void (*set)(Call&, py::handle);
    PyObject* key = PyUnicode_InternFromString(name);
};
template <class Call> using Fields = std::vector<Field<Call>>;

#define FIELD(name) {#name, true, [](auto& call, py::handle value) { assign(call.name, value); }}
#define OPTIONAL(name) {#name, false, [](auto& call, py::handle value) { assign(call.name, value); }}

// The keyword arguments of a call as Python hands them over. pybind11 would collect them in a dictionary first, which
// costs a small kernel's call 8 % (benchmarks/README.md).
struct Arguments {
    PyObject* const* values;
    PyObject* names;  // a tuple; null: none are given
};

// The index of the field of that name, searched from `at` on: calls mostly keep to the order of the fields. A name that
// stands in source code is the interned key itself.
template <class Call> size_t find(const Fields<Call>& fields, PyObject* name, size_t at) {
    for (size_t i = 0; i < fields.size(); i++, at++)
        if (fields[at % fields.size()].key == name) return at % fields.size();
    for (size_t i = 0; i < fields.size(); i++)
        if (PyUnicode_Compare(fields[i].key, name) == 0) return i;
    throw py::type_error("unexpected argument " + std::string(py::str(name)));
}

// Sets a field; an error names it.
template <class Call> void set(const Field<Call>& field, Call& call, py::handle value) {
    try {
        field.set(call, value);
    } catch (const std::exception& error) {  // of pybind11 too
        throw py::type_error(std::string(field.name) + ": " + error.what());
    }
}

// The call that they describe. None, as a missing argument, leaves an optional field or a pointer 0.
template <class Call> Call read(const Fields<Call>& fields, const Arguments& given) {
    Call call = {};
    uint64_t seen = 0;
    const size_t count = given.names ? size_t(PyTuple_GET_SIZE(given.names)) : 0;
    for (size_t i = 0, at = 0; i < count; i++, at++) {
        at = find(fields, PyTuple_GET_ITEM(given.names, Py_ssize_t(i)), at);
        if (fields[at].required || given.values[i] != Py_None) set(fields[at], call, given.values[i]);
        seen |= uint64_t(1) << at;
    }
    for (size_t i = 0; i < fields.size(); i++)
        if (fields[i].required && !(seen >> i & 1))
            throw py::type_error(std::string("missing argument ") + fields[i].name);
    return call;
}

// Never destroyed: its keys are Python's, which ends first.
#define FIELDS_OF(Call, ...)                                                \
    inline Call read_##Call(const Arguments& given) {                       \
        static const Fields<Call>& fields = *new Fields<Call>{__VA_ARGS__}; \
        return read(fields, given);                                         \
    }

// `RUN` as the function of Python that takes keyword arguments alone.
template <void (*RUN)(const Arguments&)>
PyObject* called(PyObject*, PyObject* const* values, Py_ssize_t positional, PyObject* names) {
    try {
        if (positional) throw py::type_error("expected keyword arguments alone");
        RUN({values, names});
        Py_RETURN_NONE;
    } catch (py::error_already_set& error) {
        error.restore();
    } catch (const py::builtin_exception& error) {
        error.set_error();
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
}

template <void (*RUN)(const Arguments&)> void define(py::module_& module, const char* name) {
    const auto function = reinterpret_cast<void (*)()>(&called<RUN>);
    static PyMethodDef method = {name, reinterpret_cast<PyCFunction>(function), METH_FASTCALL | METH_KEYWORDS, nullptr};
    module.add_object(name, py::reinterpret_steal<py::object>(PyCFunction_New(&method, nullptr)));
}

FIELDS_OF(ScaleHeads, FIELD(type), FIELD(rows), FIELD(positions), FIELD(heads), FIELD(width), FIELD(x), FIELD(x_stride),
          FIELD(out), FIELD(out_stride), FIELD(alpha), FIELD(shift), FIELD(groups), FIELD(alpha_positions),
          FIELD(shift_positions), FIELD(strength), FIELD(row_strength), FIELD(group), OPTIONAL(dy), OPTIONAL(dy_stride),
          OPTIONAL(dalpha), OPTIONAL(dshift), OPTIONAL(dalpha_partial), OPTIONAL(dshift_partial), OPTIONAL(threads),
          OPTIONAL(stream))

FIELDS_OF(DynamicScale, FIELD(type), FIELD(rows), FIELD(positions), FIELD(heads), FIELD(width), FIELD(x),
          FIELD(x_stride), FIELD(out), FIELD(out_stride), FIELD(weight), FIELD(scalars), FIELD(groups), FIELD(strength),
          FIELD(row_strength), FIELD(group), OPTIONAL(bias), OPTIONAL(dy), OPTIONAL(dy_stride), OPTIONAL(d_scalars),
          OPTIONAL(d_scalars_stride), OPTIONAL(dweight), OPTIONAL(dbias), OPTIONAL(dweight_partial),
          OPTIONAL(dbias_partial), OPTIONAL(threads), OPTIONAL(stream))

FIELDS_OF(ScaleChannels, FIELD(type), FIELD(rows), FIELD(width), FIELD(x), FIELD(x_stride), FIELD(out), FIELD(weight),
          OPTIONAL(dy), OPTIONAL(dy_stride), OPTIONAL(dweight), OPTIONAL(dweight_partial), OPTIONAL(threads),
          OPTIONAL(stream))

FIELDS_OF(InterventionLoss, FIELD(type), FIELD(rows), FIELD(vocab), FIELD(logits), FIELD(logits_stride),
          FIELD(reference), FIELD(reference_stride), FIELD(correct), FIELD(wrong), FIELD(direction), FIELD(margin),
          FIELD(inverse_temperature), FIELD(exclude_answers), FIELD(reverse), FIELD(effectiveness), FIELD(faithfulness),
          OPTIONAL(row_weight), OPTIONAL(gradient_weight), OPTIONAL(softcap), OPTIONAL(grad), OPTIONAL(answer_grad),
          OPTIONAL(scalars), OPTIONAL(n_scalars), OPTIONAL(l1), OPTIONAL(sign), OPTIONAL(threads), OPTIONAL(stream))

FIELDS_OF(InterventionLossScale, FIELD(type), FIELD(rows), FIELD(vocab), FIELD(grad), FIELD(d_effectiveness),
          FIELD(d_effectiveness_stride), FIELD(d_faithfulness), FIELD(d_faithfulness_stride), FIELD(correct),
          FIELD(wrong), FIELD(answer_grad), OPTIONAL(threads), OPTIONAL(stream))

FIELDS_OF(LinearSoftmax, FIELD(type), FIELD(rows), FIELD(vocab), FIELD(width), FIELD(hidden), FIELD(hidden_stride),
          FIELD(weight), FIELD(weight_stride), FIELD(bias), FIELD(correct), FIELD(wrong), FIELD(exclude_answers),
          FIELD(scale), FIELD(bytes), FIELD(log_sum), FIELD(mean), FIELD(mean_bias), FIELD(answers), FIELD(threads))

FIELDS_OF(ProximalAdam, FIELD(count), FIELD(parameter), FIELD(gradient), FIELD(exp_avg), FIELD(exp_avg_sq), FIELD(step),
          FIELD(lr), FIELD(beta1), FIELD(beta2), FIELD(eps), FIELD(l1), OPTIONAL(stream))

}  // namespace actscale
