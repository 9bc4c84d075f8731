// dynamic_scale as Python calls it.
#include "bindings.h"

namespace actscale {
namespace {

DynamicScale dynamic_scale_call(int type, const py::tuple& sizes, Address x, const py::tuple& x_stride, Address out,
                                const py::tuple& out_stride, Address weight, Address scalars, int64_t groups,
                                float strength, Address row_strength, Address group, int threads) {
    DynamicScale c = {};
    int64_t values[4];
    copy(sizes, values);
    c.type = Type(type);
    c.rows = values[0], c.positions = values[1], c.heads = values[2], c.width = values[3];
    c.x = pointer<void>(x), c.out = pointer<void>(out);
    copy(x_stride, c.x_stride);
    if (out) copy(out_stride, c.out_stride);
    c.weight = pointer<float>(weight), c.scalars = pointer<float>(scalars), c.groups = groups;
    c.strength = strength, c.row_strength = pointer<float>(row_strength), c.group = pointer<int64_t>(group);
    c.threads = threads;
    if (c.group) check_ids("group", c.group, c.rows, c.groups, "group");
    advise_huge_pages(c.out, c.rows * c.positions * c.heads * c.width * size_of(c.type));
    return c;
}

}  // namespace

void bind_dynamic(py::module_& module) {
    module.def("dynamic_scale", [](int type, py::tuple sizes, Address x, py::tuple x_stride, Address y,
                                   py::tuple y_stride, Address weight, Address bias, Address scalars, int64_t groups,
                                   float strength, Address row_strength, Address group, int threads) {
        DynamicScale c = dynamic_scale_call(type, sizes, x, x_stride, y, y_stride, weight, scalars, groups, strength,
                                            row_strength, group, threads);
        c.bias = pointer<float>(bias);
        unlocked(kernels().dynamic_scale, c);
    });

    module.def("dynamic_scale_backward", [](int type, py::tuple sizes, Address dy, py::tuple dy_stride,
                                            Address d_scalars, py::tuple d_scalars_stride, Address x,
                                            py::tuple x_stride, Address dx, py::tuple dx_stride, Address weight,
                                            Address scalars, int64_t groups, float strength, Address row_strength,
                                            Address group, Address dweight, Address dbias, int threads) {
        DynamicScale c = dynamic_scale_call(type, sizes, x, x_stride, dx, dx_stride, weight, scalars, groups, strength,
                                            row_strength, group, threads);
        c.dy = pointer<void>(dy), c.d_scalars = pointer<float>(d_scalars);
        copy(dy_stride, c.dy_stride), copy(d_scalars_stride, c.d_scalars_stride);
        c.dweight = pointer<float>(dweight), c.dbias = pointer<float>(dbias);
        unlocked(kernels().dynamic_scale_backward, c);
    });
}

}  // namespace actscale
