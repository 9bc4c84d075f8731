// The losses from logits as Python calls them.
#include "bindings.h"
#include "../cpu/kept_memory.h"

namespace actscale {
namespace {

void check_answers(const InterventionLoss& c) {
    check_ids("correct", c.correct, c.rows, c.vocab, "token id");
    check_ids("wrong", c.wrong, c.rows, c.vocab, "token id");
    for (int64_t row = 0; row < c.rows; row++) {
        if (c.correct[row] == c.wrong[row])
            throw py::value_error("wrong: row " + std::to_string(row) + " has token id " +
                                  std::to_string(c.wrong[row]) + ", the same as correct");
        if (c.direction[row] != 1 && c.direction[row] != -1)
            throw py::value_error("direction: row " + std::to_string(row) + " is " + std::to_string(c.direction[row]) +
                                  ", expected 1 or -1");
    }
}

}  // namespace

void bind_loss(py::module_& module) {
    module.def("intervention_loss", [](int type, int64_t rows, int64_t vocab, Address logits, int64_t logits_stride,
                                       Address reference, int64_t reference_stride, Address correct, Address wrong,
                                       Address direction, Address row_weight, float margin, float inverse_temperature,
                                       float softcap, bool exclude_answers, bool reverse, Address effectiveness,
                                       Address faithfulness, Address grad, Address answer_grad, int threads) {
        InterventionLoss c = loss_call(type, rows, vocab, logits, logits_stride, reference,
                                       reference_stride, correct, wrong, direction, row_weight, margin,
                                       inverse_temperature, softcap, exclude_answers, reverse, effectiveness,
                                       faithfulness, grad, answer_grad);
        c.threads = threads;
        if (c.correct) check_answers(c);
        unlocked(kernels().intervention_loss, c);
    });

    module.def("scale_gradient", [](int type, int64_t rows, int64_t vocab, Address grad, Address d_effectiveness,
                                    int64_t d_effectiveness_stride, Address d_faithfulness,
                                    int64_t d_faithfulness_stride, Address correct, Address wrong, Address answer_grad,
                                    int threads) {
        ScaleGradient c = scale_gradient_call(type, rows, vocab, grad, d_effectiveness,
                                              d_effectiveness_stride, d_faithfulness,
                                              d_faithfulness_stride, correct, wrong, answer_grad);
        c.threads = threads;
        if (c.correct) check_ids("correct", c.correct, rows, vocab, "token id");
        if (c.wrong) check_ids("wrong", c.wrong, rows, vocab, "token id");
        unlocked(kernels().scale_gradient, c);
    });

    py::class_<KeptMemory>(module, "KeptMemory", py::buffer_protocol())
        .def(py::init<int64_t>())
        .def_buffer([](KeptMemory& block) {
            return py::buffer_info(block.memory(), 1, py::format_descriptor<uint8_t>::format(), block.bytes());
        });
}

}  // namespace actscale
