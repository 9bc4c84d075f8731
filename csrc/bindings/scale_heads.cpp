// scale_heads and its backward as Python calls them.
#include "bindings.h"

namespace actscale {
namespace {

void forward(const Arguments& given) { unlocked(kernels().scale_heads, prepared_heads(read_ScaleHeads(given))); }
void backward(const Arguments& given) {
    unlocked(kernels().scale_heads_backward, prepared_heads(read_ScaleHeads(given)));
}

}  // namespace

void bind_scale_heads(py::module_& module) {
    define<forward>(module, "scale_heads");
    define<backward>(module, "scale_heads_backward");
}

}  // namespace actscale
