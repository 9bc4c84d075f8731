// dynamic_scale and its backward as Python calls them.
#include "bindings.h"

namespace actscale {
namespace {

void forward(const Arguments& given) { unlocked(kernels().dynamic_scale, prepared_heads(read_DynamicScale(given))); }
void backward(const Arguments& given) {
    unlocked(kernels().dynamic_scale_backward, prepared_heads(read_DynamicScale(given)));
}

}  // namespace

void bind_dynamic_scale(py::module_& module) {
    define<forward>(module, "dynamic_scale");
    define<backward>(module, "dynamic_scale_backward");
}

}  // namespace actscale
