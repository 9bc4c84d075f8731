// scale_heads as Python calls it.
#include "bindings.h"

namespace actscale {
namespace {

ScaleHeads scale_heads_call(int type, const py::tuple& sizes, Address x, const py::tuple& x_stride, Address out,
                            const py::tuple& out_stride, Address alpha, Address shift, const py::tuple& groups,
                            float strength, Address row_strength, Address group, int threads) {
    ScaleHeads c = {};
    int64_t values[4];
    copy(sizes, values);
    c.type = Type(type);
    c.rows = values[0], c.positions = values[1], c.heads = values[2], c.width = values[3];
    c.x = pointer<void>(x), c.out = pointer<void>(out);
    copy(x_stride, c.x_stride);
    if (out) copy(out_stride, c.out_stride);
    c.alpha = pointer<float>(alpha), c.shift = pointer<float>(shift);
    c.groups = groups[0].cast<int64_t>();
    c.alpha_positions = groups[1].cast<int64_t>(), c.shift_positions = groups[2].cast<int64_t>();
    c.strength = strength, c.row_strength = pointer<float>(row_strength), c.group = pointer<int64_t>(group);
    c.threads = threads;
    if (c.group) check_ids("group", c.group, c.rows, c.groups, "group");
    return c;
}

}  // namespace

void bind_scaling(py::module_& module) {
    module.def("scale_heads", [](int type, py::tuple sizes, Address x, py::tuple x_stride, Address out,
                                 py::tuple out_stride, Address alpha, Address shift, py::tuple groups, float strength,
                                 Address row_strength, Address group, int threads) {
        const ScaleHeads c = scale_heads_call(type, sizes, x, x_stride, out, out_stride, alpha, shift, groups, strength,
                                              row_strength, group, threads);
        advise_huge_pages(c.out, c.rows * c.positions * c.heads * c.width * size_of(c.type));
        unlocked(kernels().scale_heads, c);
    });

    module.def("scale_heads_backward", [](int type, py::tuple sizes, Address dy, py::tuple dy_stride, Address x,
                                          py::tuple x_stride, Address dx, py::tuple dx_stride, Address alpha,
                                          Address shift, py::tuple groups, float strength, Address row_strength,
                                          Address group, Address dalpha, Address dshift, int threads) {
        ScaleHeads c = scale_heads_call(type, sizes, x, x_stride, dx, dx_stride, alpha, shift, groups, strength,
                                        row_strength, group, threads);
        c.dy = pointer<void>(dy);
        copy(dy_stride, c.dy_stride);
        c.dalpha = pointer<float>(dalpha), c.dshift = pointer<float>(dshift);
        advise_huge_pages(c.out, c.rows * c.positions * c.heads * c.width * size_of(c.type));
        unlocked(kernels().scale_heads_backward, c);
    });
}

}  // namespace actscale
