// scale_channels and its backward as Python calls them.
#include "bindings.h"

namespace actscale {
namespace {

void run(void (*kernel)(const ScaleChannels&), const ScaleChannels& c) {
    advise_huge_pages(c.out, c.rows * c.width * size_of(c.type));
    unlocked(kernel, c);
}
void forward(const Arguments& given) { run(kernels().scale_channels, read_ScaleChannels(given)); }
void backward(const Arguments& given) { run(kernels().scale_channels_backward, read_ScaleChannels(given)); }

}  // namespace

void bind_scale_channels(py::module_& module) {
    define<forward>(module, "scale_channels");
    define<backward>(module, "scale_channels_backward");
}

}  // namespace actscale
