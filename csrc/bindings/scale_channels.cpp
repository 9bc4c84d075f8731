// scale_channels as Python calls it.
#include "bindings.h"

namespace actscale {
namespace {

ScaleChannels scale_channels_call(int type, int64_t rows, int64_t width, Address x, int64_t x_stride, Address out,
                                  Address weight, int threads) {
    ScaleChannels c = {};
    c.type = Type(type), c.rows = rows, c.width = width;
    c.x = pointer<void>(x), c.x_stride = x_stride, c.out = pointer<void>(out);
    c.weight = pointer<float>(weight), c.threads = threads;
    advise_huge_pages(c.out, rows * width * size_of(c.type));
    return c;
}

}  // namespace

void bind_channels(py::module_& module) {
    module.def("scale_channels", [](int type, int64_t rows, int64_t width, Address x, int64_t x_stride, Address y,
                                    Address weight, int threads) {
        unlocked(kernels().scale_channels, scale_channels_call(type, rows, width, x, x_stride, y, weight, threads));
    });

    module.def("scale_channels_backward", [](int type, int64_t rows, int64_t width, Address dy, int64_t dy_stride,
                                             Address x, int64_t x_stride, Address dx, Address weight, Address dweight,
                                             int threads) {
        ScaleChannels c = scale_channels_call(type, rows, width, x, x_stride, dx, weight, threads);
        c.dy = pointer<void>(dy), c.dy_stride = dy_stride, c.dweight = pointer<float>(dweight);
        unlocked(kernels().scale_channels_backward, c);
    });
}

}  // namespace actscale
