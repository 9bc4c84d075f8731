// What the files of bindings share. Ids that would lead out of bounds are refused here, before anything is written; the
// kernels run without the interpreter's lock.
#pragma once
#include "../cpu/kernels.h"
#include "fields.h"

namespace actscale {

const Kernels& kernels();             // of the level in use
const Kernels& kernels_by_verdict();  // of the level that needs a verdict; of that in use where there is none

// A hint that large fresh memory should lie in huge pages.
void advise_huge_pages(void* memory, int64_t bytes);

void bind_scale_heads(py::module_& module);
void bind_dynamic_scale(py::module_& module);
void bind_scale_channels(py::module_& module);
void bind_intervention_loss(py::module_& module);
void bind_linear_softmax(py::module_& module);
void bind_proximal_adam(py::module_& module);
void bind_cuda(py::module_& module);  // defined with ACTSCALE_CUDA

inline void check_ids(const char* name, const int64_t* ids, int64_t count, int64_t bound, const char* what) {
    for (int64_t row = 0; ids && row < count; row++)
        if (ids[row] < 0 || ids[row] >= bound)
            throw py::value_error(std::string(name) + ": row " + std::to_string(row) + " has " + what + " " +
                                  std::to_string(ids[row]) + ", expected 0 to " + std::to_string(bound - 1));
}

// The answers' ids of a loss.
template <class Call> void check_answers(const Call& c) {
    check_ids("correct", c.correct, c.rows, c.vocab, "token id");
    check_ids("wrong", c.wrong, c.rows, c.vocab, "token id");
}

inline int64_t size_of(Type type) { return type == Type::float32 ? 4 : 2; }

// A call on heads [B, T, H, D] whose groups exist.
template <class Call> const Call& prepared_heads(const Call& c) {
    check_ids("group", c.group, c.rows, c.groups, "group");
    advise_huge_pages(c.out, c.rows * c.positions * c.heads * c.width * size_of(c.type));
    return c;
}

// Scratch that a thread keeps for its next call: that of a loss on 64 threads. What is larger is given back.
constexpr int64_t KEPT_FLOATS = 16 << 20;

// `run` without the interpreter's lock.
template <class Call> void unlocked(void (*run)(const Call&), const Call& call) {
    struct GivenBack {
        ~GivenBack() { release_scratch(KEPT_FLOATS); }
    } at_the_end;
    py::gil_scoped_release release;
    run(call);
}

}  // namespace actscale
