// What the files of bindings share. Python sees functions over raw addresses, sizes and strides; ids that would lead
// out of bounds are refused there, before anything is written; the kernels run without the interpreter's lock.
#pragma once
#include <pybind11/pybind11.h>

#include <string>

#include "../cpu/kernels.h"

namespace actscale {

namespace py = pybind11;
using Address = uintptr_t;

const Kernels& kernels();  // of the level in use

// A hint that large fresh memory should lie in huge pages.
void advise_huge_pages(void* memory, int64_t bytes);

void bind_scaling(py::module_& module);
void bind_dynamic(py::module_& module);
void bind_channels(py::module_& module);
void bind_loss(py::module_& module);
void bind_linear(py::module_& module);
void bind_scalars(py::module_& module);
void bind_cuda(py::module_& module);  // defined with ACTSCALE_CUDA

template <class T> T* pointer(Address address) { return reinterpret_cast<T*>(address); }

template <size_t N> void copy(const py::tuple& from, int64_t (&to)[N]) {
    for (size_t i = 0; i < N; i++) to[i] = from[i].cast<int64_t>();
}

inline void check_ids(const char* name, const int64_t* ids, int64_t count, int64_t bound, const char* what) {
    for (int64_t row = 0; row < count; row++)
        if (ids[row] < 0 || ids[row] >= bound)
            throw py::value_error(std::string(name) + ": row " + std::to_string(row) + " has " + what + " " +
                                  std::to_string(ids[row]) + ", expected 0 to " + std::to_string(bound - 1));
}

inline int64_t size_of(Type type) { return type == Type::float32 ? 4 : 2; }

// The calls that the C++ and the CUDA launchers share, from the arguments that Python gives both.
inline InterventionLoss loss_call(int type, int64_t rows, int64_t vocab, Address logits, int64_t logits_stride,
                                  Address reference, int64_t reference_stride, Address correct, Address wrong,
                                  Address direction, Address row_weight, float margin, float inverse_temperature,
                                  float softcap, bool exclude_answers, bool reverse, Address effectiveness,
                                  Address faithfulness, Address grad, Address answer_grad) {
    InterventionLoss c = {};
    c.type = Type(type), c.rows = rows, c.vocab = vocab;
    c.logits = pointer<void>(logits), c.reference = pointer<void>(reference);
    c.logits_stride = logits_stride, c.reference_stride = reference_stride;
    c.correct = pointer<int64_t>(correct), c.wrong = pointer<int64_t>(wrong);
    c.direction = pointer<float>(direction), c.row_weight = pointer<float>(row_weight);
    c.margin = margin, c.inverse_temperature = inverse_temperature, c.softcap = softcap;
    c.exclude_answers = exclude_answers, c.reverse = reverse;
    c.effectiveness = pointer<float>(effectiveness), c.faithfulness = pointer<float>(faithfulness);
    c.grad = pointer<void>(grad), c.answer_grad = pointer<float>(answer_grad);
    return c;
}

inline ScaleGradient scale_gradient_call(int type, int64_t rows, int64_t vocab, Address grad, Address d_effectiveness,
                                         int64_t d_effectiveness_stride, Address d_faithfulness,
                                         int64_t d_faithfulness_stride, Address correct, Address wrong,
                                         Address answer_grad) {
    ScaleGradient c = {};
    c.type = Type(type), c.rows = rows, c.vocab = vocab, c.grad = pointer<void>(grad);
    c.d_effectiveness = pointer<float>(d_effectiveness), c.d_effectiveness_stride = d_effectiveness_stride;
    c.d_faithfulness = pointer<float>(d_faithfulness), c.d_faithfulness_stride = d_faithfulness_stride;
    c.correct = pointer<int64_t>(correct), c.wrong = pointer<int64_t>(wrong);
    c.answer_grad = pointer<float>(answer_grad);
    return c;
}

// Scratch that a thread keeps for its next call: that of a loss on 64 threads. What is larger is given back.
constexpr int64_t KEPT_FLOATS = 16 << 20;

// `run` without the interpreter's lock.
template <class Call> void unlocked(void (*run)(const Call&), const Call& call) {
    struct GivenBack { ~GivenBack() { release_scratch(KEPT_FLOATS); } } at_the_end;
    py::gil_scoped_release release;
    run(call);
}

}  // namespace actscale
