// linear_softmax as Python calls it.
#include "bindings.h"

namespace actscale {
namespace {

template <const Kernels& (*KERNELS)()> void run(const Arguments& given) {
    const LinearSoftmax c = read_LinearSoftmax(given);
    check_answers(c);
    unlocked(KERNELS().linear_softmax, c);
}

}  // namespace

void bind_linear_softmax(py::module_& module) {
    define<run<kernels>>(module, "linear_softmax");
    define<run<kernels_by_verdict>>(module, "linear_softmax_by_verdict");
}

}  // namespace actscale
