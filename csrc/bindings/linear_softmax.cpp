// linear_softmax as Python calls it.
#include "bindings.h"

namespace actscale {
namespace {

void run(const Arguments& given) {
    const LinearSoftmax c = read_LinearSoftmax(given);
    check_answers(c);
    unlocked(kernels().linear_softmax, c);
}

}  // namespace

void bind_linear_softmax(py::module_& module) { define<run>(module, "linear_softmax"); }

}  // namespace actscale
