// The losses from logits as Python calls them.
#include "bindings.h"
#include "kept_memory.h"

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
                                       Address direction, float margin, float inverse_temperature, bool exclude_answers,
                                       bool reverse, Address effectiveness, Address faithfulness, Address grad,
                                       Address answer_grad, int threads) {
        InterventionLoss c = {};
        c.type = Type(type), c.rows = rows, c.vocab = vocab;
        c.logits = pointer<void>(logits), c.reference = pointer<void>(reference);
        c.logits_stride = logits_stride, c.reference_stride = reference_stride;
        c.correct = pointer<int64_t>(correct), c.wrong = pointer<int64_t>(wrong);
        c.direction = pointer<float>(direction);
        c.margin = margin, c.inverse_temperature = inverse_temperature;
        c.exclude_answers = exclude_answers, c.reverse = reverse;
        c.effectiveness = pointer<float>(effectiveness), c.faithfulness = pointer<float>(faithfulness);
        c.grad = pointer<void>(grad), c.answer_grad = pointer<float>(answer_grad), c.threads = threads;
        if (c.correct) check_answers(c);
        unlocked(kernels().intervention_loss, c);
    });

    module.def("scale_gradient", [](int type, int64_t rows, int64_t vocab, Address grad, Address d_effectiveness,
                                    int64_t d_effectiveness_stride, Address d_faithfulness,
                                    int64_t d_faithfulness_stride, Address correct, Address wrong, Address answer_grad,
                                    int threads) {
        ScaleGradient c = {};
        c.type = Type(type), c.rows = rows, c.vocab = vocab, c.grad = pointer<void>(grad);
        c.d_effectiveness = pointer<float>(d_effectiveness), c.d_effectiveness_stride = d_effectiveness_stride;
        c.d_faithfulness = pointer<float>(d_faithfulness), c.d_faithfulness_stride = d_faithfulness_stride;
        c.correct = pointer<int64_t>(correct), c.wrong = pointer<int64_t>(wrong);
        c.answer_grad = pointer<float>(answer_grad), c.threads = threads;
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
