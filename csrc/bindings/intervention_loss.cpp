// The losses from logits, and the scaling of their gradient, as Python calls them.
#include "../cpu/kept_memory.h"
#include "bindings.h"

namespace actscale {
namespace {

void check_directions(const InterventionLoss& c) {
    for (int64_t row = 0; row < c.rows; row++) {
        if (c.correct[row] == c.wrong[row])
            throw py::value_error("wrong: row " + std::to_string(row) + " has token id " +
                                  std::to_string(c.wrong[row]) + ", the same as correct");
        if (c.direction[row] != 1 && c.direction[row] != -1)
            throw py::value_error("direction: row " + std::to_string(row) + " is " + std::to_string(c.direction[row]) +
                                  ", expected 1 or -1");
    }
}

void run(const Arguments& given) {
    const InterventionLoss c = read_InterventionLoss(given);
    check_answers(c);
    if (c.correct) check_directions(c);
    unlocked(kernels().intervention_loss, c);
}

void scale(const Arguments& given) {
    const InterventionLossScale c = read_InterventionLossScale(given);
    check_answers(c);
    unlocked(kernels().intervention_loss_scale, c);
}

}  // namespace

void bind_intervention_loss(py::module_& module) {
    define<run>(module, "intervention_loss");
    define<scale>(module, "intervention_loss_scale_");
    py::class_<KeptMemory>(module, "KeptMemory", py::buffer_protocol())
        .def(py::init<int64_t>())
        .def_buffer([](KeptMemory& block) {
            return py::buffer_info(block.memory(), 1, py::format_descriptor<uint8_t>::format(), block.bytes());
        });
}

}  // namespace actscale
